"""The wrappers of the compiled kernels: none reads memory that is not what it expects, whatever it is given."""

import pytest
import torch
from quantized_like import QuantizedLike
from torch import nn

from modeling_snn_bert import cpu_kernels
from modeling_snn_bert.event_kernels import (
    TILES,
    BlockedWeights,
    NeuronParameters,
    PackedSpikes,
    SpikeLists,
    attention_spikes,
    event_linear,
    linear_neuron_spikes,
    list_float_spikes,
    list_packed_columns,
    list_packed_spikes,
    neuron_spikes,
)
from modeling_snn_bert.neuron_settings import BPSNSettings, BPSNValues
from modeling_snn_bert.packed_spikes import pack

pytestmark = pytest.mark.skipif(not cpu_kernels.available(), reason="there are no compiled kernels here")
BATCH, TOKENS, CHANNELS, GROUPS = 2, 5, 64, 4


def spikes():
    return (torch.rand(BATCH, TOKENS, CHANNELS) < 0.3).float()


def packed():
    return pack(spikes(), ternary=False)


def parameters():
    return {
        "v_threshold": torch.full((CHANNELS,), 0.1),
        "decay_forward": torch.full((GROUPS,), 0.2),
        "decay_backward": torch.full((GROUPS,), 0.3),
        "reset": torch.full((GROUPS,), 0.1),
    }


def neuron(**values):
    return NeuronParameters(BPSNValues(**{**parameters(), **values}), BPSNSettings())


def weights():
    return BlockedWeights(torch.randn(CHANNELS, CHANNELS), None, torch.randn(CHANNELS), "float32")


def mask():
    return torch.ones(BATCH, TOKENS, dtype=torch.uint8)


def current():
    return torch.randn(BATCH, TOKENS, CHANNELS)


SETTINGS = {"normalize": True, "reset_iterations": 1, "ternary": False}
# Every function that hands memory to a kernel: what it takes, of which the tensors are spoilt in turn.
ENTRY_POINTS = {
    "list_float_spikes": (list_float_spikes, lambda: {"spikes": spikes().flatten(0, 1), "ternary": False}),
    "list_packed_spikes": (list_packed_spikes, lambda: {"packed": packed()}),
    "list_packed_columns": (list_packed_columns, lambda: {"packed": packed()}),
    "SpikeLists": (
        SpikeLists,
        lambda: {"kernel": "list_packed_spikes", "spikes": packed(), "rows": 10, "inputs": CHANNELS, "signs": 1},
    ),
    "PackedSpikes": (lambda packed: PackedSpikes(packed).firing_rate, lambda: {"packed": packed()}),
    "BlockedWeights": (
        BlockedWeights,
        lambda: {"weight": torch.randn(40, 8), "scale": None, "bias": torch.randn(40), "layout": "float32"},
    ),
    "BlockedWeights for tiles": (
        BlockedWeights,
        lambda: {
            "weight": torch.ones(40, 8, dtype=torch.int8),
            "scale": torch.ones(40),
            "bias": torch.randn(40),
            "layout": TILES,
        },
    ),
    "NeuronParameters": (neuron, parameters),
    "event_linear": (
        event_linear,
        lambda: {
            "spikes": list_packed_spikes(packed()),
            "weights": weights(),
            "addend": torch.randn(BATCH * TOKENS, CHANNELS),
        },
    ),
    "neuron_spikes": (neuron_spikes, lambda: {"current": current(), "mask": mask(), "neuron": neuron()}),
    "linear_neuron_spikes": (
        linear_neuron_spikes,
        lambda: {
            "spikes": list_packed_spikes(packed()),
            "weights": weights(),
            "batch": BATCH,
            "mask": mask(),
            "neuron": neuron(),
        },
    ),
    "attention_spikes": (
        attention_spikes,
        lambda: {
            **{name: packed() for name in ("query", "key", "value")},
            "gain": torch.ones(CHANNELS),
            "offset": torch.zeros(CHANNELS),
            "scaling": 0.25,
            "mask": mask(),
            "neuron": neuron(),
        },
    ),
    "snn_bert::bpsn_forward": (
        torch.ops.snn_bert.bpsn_forward,
        lambda: {"current": current(), "mask": mask(), **parameters(), **SETTINGS},
    ),
    "snn_bert::bpsn_backward": (
        torch.ops.snn_bert.bpsn_backward,
        lambda: {
            "grad_spikes": current(),
            "current": current(),
            "mask": mask(),
            **parameters(),
            **SETTINGS,
            "surrogate": "atan",
            "alpha": 2.0,
        },
    ),
}


def freed(x):
    x.untyped_storage().resize_(0)
    return x


SPOILT = {
    "on_meta": lambda x: x.to("meta"),
    "float64": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "shorter": lambda x: x[..., :-1].contiguous(),
    "longer": lambda x: torch.cat((x, x[..., :1]), -1),
    "first_dimension": lambda x: x[:0],
    "another_dimension": lambda x: x[None],
    "no_dimension": lambda x: x.flatten()[0],
    "subclass": lambda x: QuantizedLike(x, torch.ones(1)),
    "sparse": lambda x: x.to_sparse(),
    "freed": freed,
}
ANY_PACKED = {"shorter", "longer", "another_dimension"}
# What is right for these, which take other forms or sizes as well.
TAKEN = {
    ("list_float_spikes", "spikes"): {"float64", "int64", "shorter", "longer", "first_dimension"},
    ("list_packed_spikes", "packed"): ANY_PACKED,
    ("list_packed_columns", "packed"): ANY_PACKED,
    ("SpikeLists", "spikes"): {"another_dimension"},
    ("PackedSpikes", "packed"): ANY_PACKED,
    ("BlockedWeights", "weight"): {"shorter", "longer"},
    ("BlockedWeights", "bias"): {"float64", "int64"},
    ("BlockedWeights for tiles", "weight"): {"shorter", "longer"},
    ("BlockedWeights for tiles", "scale"): {"float64", "int64"},
    ("BlockedWeights for tiles", "bias"): {"float64", "int64"},
    **{("NeuronParameters", name): {"float64", "int64"} for name in parameters()},
    **{(f"snn_bert::bpsn_{way}", "mask"): {"float64", "int64"} for way in ("forward", "backward")},
}
# torch's own operations come first there, and read what was freed.
COPIED = {"BlockedWeights", "BlockedWeights for tiles", "NeuronParameters"}
TENSORS = [
    (name, argument)
    for name, (_, make) in ENTRY_POINTS.items()
    for argument, value in make().items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_good_arguments(name):
    function, make = ENTRY_POINTS[name]
    function(**make())


@pytest.mark.parametrize("name, argument", TENSORS)
def test_bad_memory_is_refused(name, argument):
    function, make = ENTRY_POINTS[name]
    refused = set(SPOILT) - TAKEN.get((name, argument), set())
    if name in COPIED or (argument == "mask" and name.startswith("snn_bert")):
        refused.remove("freed")
    for spoilt in SPOILT:
        arguments = make()
        arguments[argument] = SPOILT[spoilt](arguments[argument])
        if spoilt in refused:
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                print(spoilt, function(**arguments))
        elif spoilt != "freed":
            function(**arguments)


FITTING = {
    "inputs": (event_linear, {"weights": lambda: BlockedWeights(torch.randn(64, 72), None, None, "float32")}),
    "lists for tiles": (event_linear, {"weights": lambda: BlockedWeights(*int8_weights(), None, TILES)}),
    "packed for lists": (event_linear, {"spikes": lambda: PackedSpikes(packed())}),
    "batch": (linear_neuron_spikes, {"batch": lambda: 3}),
    "outputs": (linear_neuron_spikes, {"weights": lambda: BlockedWeights(torch.randn(72, 64), None, None, "float32")}),
    "groups and blocks": (linear_neuron_spikes, {"neuron": lambda: neuron_of(72, 3)}),
    "channels": (neuron_spikes, {"neuron": lambda: neuron_of(72, 3)}),
    "heads": (attention_spikes, {"neuron": lambda: neuron_of(72, 3)}),
    "signs": (attention_spikes, {"query": lambda: pack(spikes(), ternary=True)}),
}


def int8_weights():
    return torch.ones(CHANNELS, CHANNELS, dtype=torch.int8), torch.ones(CHANNELS)


def neuron_of(channels, groups):
    values = {name: torch.full((groups,), 0.1) for name in ("decay_forward", "decay_backward", "reset")}
    return neuron(v_threshold=torch.full((channels,), 0.1), **values)


@pytest.mark.parametrize("function, changes", FITTING.values(), ids=FITTING)
def test_what_does_not_fit_together_is_refused(function, changes):
    arguments = ENTRY_POINTS[function.__name__][1]() | {name: make() for name, make in changes.items()}
    with pytest.raises(ValueError, match=r"channels|inputs|layout|batch|groups"):
        function(**arguments)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 8, got 64 channels in 16 groups"):
        neuron_of(64, 16)
    with pytest.raises(ValueError, match="at most 65536 inputs"):
        list_float_spikes(torch.zeros(1, 65537), ternary=False)
    with pytest.raises(ValueError, match="`scale` belongs to int8 weights"):
        BlockedWeights(torch.ones(CHANNELS, CHANNELS), torch.ones(CHANNELS), None, "float32")
    with pytest.raises(TypeError, match="`v_threshold` must be a plain tensor, got Mine"):
        neuron(v_threshold=torch.ones(CHANNELS).as_subclass(Mine))
    with pytest.raises(ValueError, match=r"`current` must be a contiguous torch.float32 .* \[2, 5, 64\]"):
        neuron_spikes(current().transpose(0, 1).contiguous().transpose(0, 1), None, neuron())


class Mine(torch.Tensor):
    """A subclass that is no more than a tensor; a kernel cannot know that."""


def test_what_is_laid_out_is_a_copy():
    """Nobody else can free or change it."""
    weight, bias = nn.Parameter(torch.randn(32, 1)), torch.randn(32)
    with torch.no_grad():
        blocked = BlockedWeights(weight, None, bias, "float32")
        known = neuron()
        before = [x.clone() for x in (*blocked.tensors, *known.tensors) if x is not None]
        for x in (weight, bias):
            x.zero_()
    assert all(torch.equal(x, y) for x, y in zip((*blocked.tensors[::2], *known.tensors), before, strict=True))
