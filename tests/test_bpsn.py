"""The ways to compute a BPSN against its definition, and which of them is taken."""

import pytest
import torch

from modeling_snn_bert import bpsn, cpu_kernels, leaky_integration
from modeling_snn_bert.bpsn_in_place import spikes_in_place
from modeling_snn_bert.leaky_integration import IMPLEMENTATIONS
from modeling_snn_bert.neuron_settings import BPSNParameters, BPSNSettings
from modeling_snn_bert.packed_spikes import pack

TRITON, SEGMENTS, CPU, IN_PLACE, *_, DEFINITION = bpsn.BACKENDS
BATCH, LENGTH, CHANNELS, GROUPS = 3, 29, 32, 4


def make_parameters(dtype=torch.float32, bidirectional=True, with_reset=True):
    generator = torch.Generator().manual_seed(0)

    def values(size, low, high):
        random = torch.rand(size, generator=generator, dtype=torch.float64)
        return (low + (high - low) * random).to(dtype).requires_grad_()

    return BPSNParameters(
        values(CHANNELS, 0.1, 0.7),
        values(GROUPS, -2.5, 1.5),
        values(GROUPS, -2.5, 1.5) if bidirectional else None,
        values(GROUPS, -0.7, 1.3) if with_reset else None,
    )


def make_current(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(BATCH, LENGTH, CHANNELS, generator=generator, dtype=torch.float64) + 0.2
    return current.to(dtype).requires_grad_()


MASK = torch.arange(LENGTH) < torch.tensor([[LENGTH], [17], [1]])


def run(backend, dtype, settings, mask, **parts):
    """Spikes, the packed form, and the gradients to the current and to the parameters that there are."""
    current, parameters = make_current(dtype), make_parameters(dtype, **parts)
    assert backend.takes(current, parameters, settings)
    spikes, packed = backend.spikes(current, mask, parameters, settings)
    weight = torch.linspace(-1, 1, spikes.numel(), dtype=dtype).view_as(spikes)
    inputs = [current, *(x for x in parameters if x is not None)]
    return spikes, packed, torch.autograd.grad(spikes, inputs, weight)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            CPU, id="cpu", marks=pytest.mark.skipif(not cpu_kernels.available(), reason="no compiled kernels here")
        ),
        pytest.param(IN_PLACE, id="in-place"),
    ],
)
@pytest.mark.parametrize("mask", [None, MASK, MASK.float()], ids=["none", "bool", "float"])
@pytest.mark.parametrize(
    ("ternary", "normalize", "parts"),
    [
        (False, True, {}),
        (True, True, {}),
        (False, False, {"bidirectional": False}),
        (True, False, {"with_reset": False}),
    ],
)
def test_agrees_with_the_definition(backend, mask, ternary, normalize, parts):
    sweeps = 2 if parts.get("with_reset", True) else 0
    settings = BPSNSettings(normalize=normalize, reset_iterations=sweeps, ternary=ternary)
    spikes, packed, gradients = run(backend, torch.float32, settings, mask, **parts)
    naive = settings._replace(implementation="naive")
    wanted, nothing, wanted_gradients = run(DEFINITION, torch.float64, naive, mask, **parts)
    assert nothing is None and 0 < wanted.abs().mean() < 1
    assert torch.equal(spikes.double(), wanted)
    assert packed is None or torch.equal(packed, pack(wanted, ternary))
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("mask", [None, MASK], ids=["none", "bool"])
def test_the_definition_is_leaky_integration_with_a_threshold_and_a_reset(mask):
    """Two sweeps of the reset, written out on the public function."""
    current, parameters = make_current(torch.float64), make_parameters(torch.float64)
    settings = BPSNSettings(reset_iterations=2, implementation="naive")
    decays = torch.sigmoid(parameters.decay_forward_logit), torch.sigmoid(parameters.decay_backward_logit)
    v = leaky_integration(current, *decays, mask, implementation="naive")
    torch.testing.assert_close(bpsn.membrane_potential(current, mask, parameters, settings), v, rtol=0, atol=1e-14)
    valid = torch.ones(BATCH, LENGTH, 1) if mask is None else mask[..., None]
    ones = torch.ones_like(current)
    n = leaky_integration(ones, *decays, mask, normalize=False, implementation="naive").where(valid > 0, ones)
    reset = parameters.reset_strength.abs().repeat_interleave(CHANNELS // GROUPS)
    s = (v >= parameters.v_threshold) * valid.double()
    before = s
    for _ in range(2):
        r = (leaky_integration(s, *decays, mask, normalize=False, implementation="naive") - s) / n
        s = (v - reset * r >= parameters.v_threshold) * valid.double()
    assert 0 < s.mean() < 1 and not torch.equal(s, before)
    assert torch.equal(bpsn.bpsn(current, mask, parameters, settings)[0], s)


class TestChoice:
    """Which way is taken."""

    @pytest.fixture
    def chosen(self, monkeypatch):
        """A function that returns the name of the way that `bpsn` takes."""
        names = {
            TRITON: "triton", SEGMENTS: "segments", CPU: "cpu", IN_PLACE: "in place", DEFINITION: "definition"
        }  # fmt: skip
        calls = []

        def named(backend, name):
            return backend._replace(spikes=lambda *_: calls.append(name) or (torch.zeros(1), None))

        monkeypatch.setattr(bpsn, "BACKENDS", tuple(named(backend, name) for backend, name in names.items()))

        def choose(settings, current, channels_per_group=8):
            groups = current.shape[-1] // channels_per_group
            parameters = BPSNParameters(torch.zeros(current.shape[-1]), *(torch.zeros(groups) for _ in range(3)))
            bpsn.bpsn(current, None, parameters, settings)
            return calls.pop()

        return choose

    @pytest.mark.parametrize("available", [True, False])
    def test_by_what_the_kernels_take(self, chosen, available, monkeypatch):
        monkeypatch.setattr(bpsn, "kernels_available", lambda: available)
        current, kernel = torch.zeros(1, 3, 16), "cpu" if available else "in place"
        assert chosen(BPSNSettings(), current) == kernel
        assert chosen(BPSNSettings(), current.bfloat16()) == kernel
        assert chosen(BPSNSettings(), current.double()) == "in place"
        assert chosen(BPSNSettings(), current, channels_per_group=4) == "in place"
        assert chosen(BPSNSettings(surrogate="of one's own"), current) == "in place"

    @pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
    def test_by_the_implementation_that_is_asked_for(self, chosen, implementation):
        way = "in place" if implementation == "chunked" else "definition"
        assert chosen(BPSNSettings(implementation=implementation), torch.zeros(1, 3, 16)) == way

    def test_in_an_exported_graph(self, chosen, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
        assert chosen(BPSNSettings(), torch.zeros(1, 3, 16)) == "definition"

    @pytest.mark.parametrize("length", [512, 513])
    def test_on_a_gpu(self, chosen, length, monkeypatch):
        monkeypatch.setattr(bpsn, "triton_takes", lambda current: True)
        assert chosen(BPSNSettings(), torch.zeros(1, length, 16)) == ("triton" if length == 512 else "segments")

    def test_one_that_is_added(self, monkeypatch):
        def everything(current, mask, parameters, settings):
            return torch.ones_like(current), None

        added = bpsn.Backend(lambda current, parameters, settings: current.shape[1] == 3, everything)
        monkeypatch.setattr(bpsn, "BACKENDS", (added, *bpsn.BACKENDS))
        arguments = make_parameters(), BPSNSettings()
        assert bpsn.bpsn(torch.zeros(1, 3, CHANNELS), None, *arguments)[0].all()
        assert not bpsn.bpsn(torch.zeros(1, 4, CHANNELS), None, *arguments)[0].any()


def test_in_place_is_the_way_without_kernels():
    assert IN_PLACE.spikes is spikes_in_place and DEFINITION.spikes is bpsn.by_definition
