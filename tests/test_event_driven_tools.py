"""What people and their tools do to an event-driven model: the results of the dense one, or an error with the cure.

Each table is a class of user actions, and its rows are the members.
"""

import copy
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from quantized_like import quantize_like
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AttentionInterface, TorchAoConfig

from modeling_snn_bert import SNNBertForSequenceClassification, cpu_kernels
from modeling_snn_bert import event_driven as event_driven_module
from modeling_snn_bert.checksums import check_finite
from modeling_snn_bert.event_driven import dense, event_driven, is_event_driven
from modeling_snn_bert.modeling_snn_bert import SNNBertLayer
from modeling_snn_bert.packed_spikes import SpikingLinear

needs_kernels = pytest.mark.skipif(not cpu_kernels.available(), reason="there are no compiled kernels here")
INPUTS = {"input_ids": torch.arange(5, 101).view(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
INPUTS["attention_mask"][1, 7:] = 0


@pytest.fixture(params=[pytest.param("kernels", marks=needs_kernels), "torch"])
def path(request, monkeypatch):
    """Both ways in which event-driven products run."""
    if request.param == "torch":
        monkeypatch.setattr(event_driven_module, "available", lambda: False)
    return request.param


@pytest.fixture
def model(make_config, assert_spikes_flow):
    torch.manual_seed(0)
    model = SNNBertForSequenceClassification(make_config(hidden_size=64, intermediate_size=128)).eval()
    assert_spikes_flow(model, **INPUTS)
    return model


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**INPUTS, **kwargs).logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def by_events(model, weight_dtype="float32"):
    return event_driven(model, weight_dtype, dense_above=1.0)


# Weights, whoever writes them


def each(write):
    """An action that does `write` to each parameter."""

    def act(model, parameters):
        for parameter in parameters:
            write(parameter)

    return act


def assign_twice(p):
    # The second one may take the memory that the first one freed.
    p.data = p.data * 3
    p.data = p.data / 2


def through_numpy(p):
    p.detach().numpy()[...] *= 1.5


def step(make):
    def act(model, parameters):
        for p in parameters:
            p.grad = torch.full_like(p, 0.3)
        make(parameters).step()

    return act


def swap_ema(model, parameters):
    averages = [p.detach() * 1.5 for p in parameters]
    for p, average in zip(parameters, averages, strict=True):
        p.data, average.data = average.data, p.data


def load(assign):
    def act(model, parameters):
        state = {name: x.clone() for name, x in model.state_dict().items()}
        ids = {id(p) for p in parameters}
        for name, p in model.named_parameters():
            if id(p) in ids:
                state[name] *= 1.5
        model.load_state_dict(state, assign=assign)

    return act


def to_vector_and_back(model, parameters):
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(vector * 1.5, parameters)
    # Now all parameters are views of one tensor, which is written to once more.
    logits(model)
    parameters[0].data.view(-1)[:] *= 1.5


def swap_tensors(p):
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))


def share_memory(model, parameters):
    model.share_memory()
    logits(model)
    each(lambda p: p.data.mul_(1.5))(model, parameters)


def to_half_and_back(model, parameters):
    each(lambda p: p.data.mul_(1.5))(model, parameters)
    model.bfloat16().float()


@torch.no_grad()
def in_place(p):
    p.mul_(1.5)


@torch.inference_mode()
def in_inference_mode(p):
    p.data.mul_(1.5)


@torch.no_grad()
def replace(model, parameters):
    ids = {id(p) for p in parameters}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) in ids:
                setattr(module, name, nn.Parameter(p * 1.5))


WRITES = {
    "in_place": each(in_place),
    "in_inference_mode": each(in_inference_mode),
    "data_mul": each(lambda p: p.data.mul_(1.5)),
    "data_copy": each(lambda p: p.data.copy_(p.data * 1.5)),
    "data_one_number": each(lambda p: p.data.view(-1)[0].add_(1.0)),
    "data_negated": each(lambda p: p.data.mul_(-1.5)),
    "data_assigned": each(lambda p: setattr(p, "data", p.data * 1.5)),
    "data_assigned_twice": each(assign_twice),
    "data_reordered": each(lambda p: p.data.copy_(p.data.flip(0))),
    "data_other_view": each(lambda p: setattr(p, "data", p.data[:1].expand(p.shape))),
    "data_foreach": lambda model, parameters: torch._foreach_mul_([p.data for p in parameters], 1.5),
    "numpy": each(through_numpy),
    "dlpack": each(lambda p: torch.from_dlpack(p.detach()).mul_(1.5)),
    "load_state_dict": load(assign=False),
    "load_state_dict_assign": load(assign=True),
    "ema_swap": swap_ema,
    "vector_to_parameters": to_vector_and_back,
    "swap_tensors": each(swap_tensors),
    "replaced": replace,
    "share_memory": share_memory,
    "to_half_and_back": to_half_and_back,
    "sgd": step(lambda parameters: torch.optim.SGD(parameters, lr=0.3)),
    "adamw_foreach": step(lambda parameters: torch.optim.AdamW(parameters, lr=0.3, foreach=True)),
    "adamw_fused": step(lambda parameters: torch.optim.AdamW(parameters, lr=0.3, fused=True)),
}
GROUPS = {
    "weights": lambda name: "LayerNorm" not in name and name.endswith(".weight"),
    "biases": lambda name: "LayerNorm" not in name and name.endswith(".bias"),
    "thresholds": lambda name: name.endswith("v_threshold"),
    "decays": lambda name: name.endswith("logit"),
    "resets": lambda name: name.endswith("reset_strength"),
    "norms": lambda name: "LayerNorm" in name,
    "affine": lambda name: name.endswith(("query_gain", "query_offset")),
}


def parameters_of(model, group):
    named = model.bert.encoder.named_parameters()
    return [p for name, p in named if GROUPS[group](name)]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_written_weights_are_used(model, path, write, group):
    with torch.no_grad():
        for p in parameters_of(model, group):
            # So that every write changes what the layer computes.
            p.add_(0.2 * torch.rand_like(p))
    by_events(model)
    before = logits(model)
    assert torch.equal(logits(model), before)
    write(model, parameters_of(model, group))
    got = logits(model)
    assert not torch.equal(got, before)
    assert torch.equal(logits(model), got)
    same(got, logits(dense(copy.deepcopy(model))))


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_written_weights_are_rounded_anew(model, path, weight_dtype):
    by_events(model, weight_dtype)
    before = logits(model)
    each(lambda p: p.data.mul_(-1.5))(model, parameters_of(model, "weights"))
    fresh = by_events(dense(copy.deepcopy(model)), weight_dtype)
    assert torch.equal(logits(model), logits(fresh)) and not torch.equal(logits(model), before)


@pytest.mark.parametrize("taken", ["before", "between", "after"])
@pytest.mark.parametrize("as_what", [lambda p: p.detach().numpy(), lambda p: torch.from_dlpack(p.detach())])
def test_a_view_of_another_library_may_be_written_to_at_any_time(model, path, taken, as_what):
    weights = parameters_of(model, "weights")
    views = [as_what(p) for p in weights] if taken == "before" else []
    by_events(model)
    views = [as_what(p) for p in weights] if taken == "between" else views
    logits(model)
    views = [as_what(p) for p in weights] if taken == "after" else views
    for _ in range(2):
        before = logits(model)
        for view in views:
            view[...] *= 1.5
        assert not torch.equal(logits(model), before)
        same(logits(model), logits(dense(copy.deepcopy(model))))


def mask_half(linear):
    prune.l1_unstructured(linear, "weight", 0.5)


def change_the_mask(linear):
    mask_half(linear)
    linear.weight_mask.data.mul_(-1).add_(1)


def make_permanent(linear):
    mask_half(linear)
    prune.remove(linear, "weight")


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


RESHAPED = {
    "prune": mask_half,
    "prune_other_mask": change_the_mask,
    "prune_remove": make_permanent,
    "parametrize": lambda linear: parametrize.register_parametrization(linear, "weight", Halved()),
    "weight_norm": lambda linear: parametrizations.weight_norm(linear).parametrizations.weight.original0.data.mul_(1.5),
    "old_weight_norm": lambda linear: nn.utils.weight_norm(linear).weight_g.data.mul_(1.5),
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("reshape", RESHAPED.values(), ids=RESHAPED)
def test_computed_weights_are_used(model, path, reshape):
    by_events(model)
    before = logits(model)
    for module in [x for x in model.modules() if isinstance(x, SpikingLinear)]:
        reshape(module)
    got = logits(model)
    assert not torch.equal(got, before)
    same(got, logits(dense(model)))


def test_weights_of_a_functional_call(model, path):
    by_events(model)
    before = logits(model)
    state = {name: p.detach() * 1.5 for name, p in model.named_parameters() if "encoder" in name}
    with torch.no_grad():
        got = torch.func.functional_call(model, state, kwargs=INPUTS).logits
        same(got, torch.func.functional_call(dense(copy.deepcopy(model)), state, kwargs=INPUTS).logits)
    assert not torch.equal(got, before) and torch.equal(logits(model), before)


def test_adapters_merge_into_the_weights(model, path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False))
    by_events(adapted.eval())
    before = logits(adapted)
    adapted.merge_adapter()
    same(logits(adapted), before)
    adapted.unmerge_adapter()
    same(logits(adapted), before)
    each(lambda p: p.data.mul_(2))(adapted, [p for name, p in adapted.named_parameters() if "lora" in name])
    adapted.merge_adapter()
    assert not torch.allclose(logits(adapted), before, atol=1e-2)
    same(logits(adapted), logits(dense(copy.deepcopy(adapted))))


def test_weights_that_another_process_writes(model, path):
    by_events(model.share_memory())
    before = logits(model)
    process = os.fork()
    if not process:
        for p in parameters_of(model, "weights"):
            # By NumPy, since torch's threads do not survive a fork.
            p.detach().numpy()[...] *= 1.5
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0 and not torch.equal(logits(model), before)
    same(logits(model), logits(dense(copy.deepcopy(model))))


def test_unchanged_weights_are_not_read_again(model, path, tmp_path):
    """Also not those that safetensors loads, which lie in memory of its own."""
    model.save_pretrained(tmp_path)
    loaded = by_events(SNNBertForSequenceClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(logits(loaded), logits(by_events(model)))
    for x in (*loaded.bert.encoder.modules(), *model.bert.encoder.modules()):
        if isinstance(x, SpikingLinear):
            snapshot, layouts = x.runner._layouts._state
            assert layouts and snapshot.is_in_place([x.weight, x.bias])
        elif isinstance(x, SNNBertLayer) and path == "kernels":
            snapshots = [made._state[0] for made in x.runner._parameters.values()]
            assert len(snapshots) == 7 and all(snapshot.addresses for snapshot in snapshots)


# Modules, whoever changes what they do

PARTS = (
    "attention",
    "attention.self",
    *(f"attention.self.{name}" for name in ("neuron", "query", "key", "value", "query_neuron", "key_neuron")),
    *("attention.self.value_neuron", "attention.output", "attention.output.neuron", "attention.output.dense"),
    *("attention.output.LayerNorm", "attention.output.dropout", "intermediate", "intermediate.neuron"),
    *("intermediate.dense", "output", "output.neuron", "output.dense", "output.LayerNorm", "output.dropout"),
)


def silent(output):
    """An output of zeros: it changes what follows, and zeros are spikes."""
    return (silent(output[0]), *output[1:]) if isinstance(output, tuple) else output * 0


@contextmanager
def replaced_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: silent(forward(*args, **kwargs))
    yield
    del module.forward


def replaced_in(kind, name, module):
    """`kind`'s method of that name replaced, with an effect on `module` only."""
    method = getattr(kind, name)

    def replacement(self, *args, **kwargs):
        output = method(self, *args, **kwargs)
        return silent(output) if self is module else output

    return mock.patch.object(kind, name, replacement)


@contextmanager
def subclass(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, *a, **k: silent(kind.forward(self, *a, **k))})
    yield
    module.__class__ = kind


class Silence(ModelHook):
    def post_forward(self, module, output):
        return silent(output)


@contextmanager
def accelerate_hook(module):
    add_hook_to_module(module, Silence())
    yield


@contextmanager
def handle(register):
    hook = register()
    yield
    hook.remove()


OBSERVERS = {
    "forward": replaced_forward,
    "class_forward": lambda module: replaced_in(type(module), "forward", module),
    "call": lambda module: replaced_in(nn.Module, "__call__", module),
    "subclass": subclass,
    "accelerate": accelerate_hook,
    "hook": lambda m: handle(lambda: m.register_forward_hook(lambda m, args, output: silent(output))),
    "hook_with_kwargs": lambda m: handle(
        lambda: m.register_forward_hook(lambda m, args, kwargs, output: silent(output), with_kwargs=True)
    ),
    "pre_hook": lambda m: handle(lambda: m.register_forward_pre_hook(lambda m, args: (silent(args[0]), *args[1:]))),
    "global_hook": lambda module: handle(
        lambda: torch_modules.register_module_forward_hook(
            lambda m, args, output: silent(output) if m is module else None
        )
    ),
    "global_pre_hook": lambda module: handle(
        lambda: torch_modules.register_module_forward_pre_hook(
            lambda m, args: (silent(args[0]), *args[1:]) if m is module else None
        )
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("observe", OBSERVERS.values(), ids=OBSERVERS)
def test_what_is_done_to_a_module_counts(model, path, part, observe):
    events = by_events(copy.deepcopy(model))
    plain = logits(events)
    with observe(model.bert.encoder.layer[0].get_submodule(part)):
        wanted = logits(model)
    with observe(events.bert.encoder.layer[0].get_submodule(part)):
        got = logits(events)
    assert not torch.allclose(got, plain, atol=1e-4)
    same(got, wanted)


@pytest.mark.parametrize("part", ["attention.output.dropout", "output.dropout"])
def test_dropout_that_is_left_on(model, path, part):
    """Monte Carlo dropout: `train()` of the dropouts alone."""
    events = by_events(copy.deepcopy(model))
    found = []
    for x in (model, events):
        dropout = x.bert.encoder.layer[0].get_submodule(part)
        dropout.p = 0.5
        dropout.train()
        torch.manual_seed(1)
        found.append(logits(x))
    same(*found)
    assert not torch.equal(logits(events), found[1])


def test_attention_of_somebody_else(model, path):
    def uniform(module, query, key, value, attention_mask, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    AttentionInterface.register("uniform", uniform)
    events = by_events(copy.deepcopy(model))
    plain = logits(events)
    for x in (model, events):
        x.set_attn_implementation("uniform")
    assert not torch.allclose(logits(events), plain, atol=1e-4)
    same(logits(events), logits(model))


def test_a_mask_for_a_layer_alone(model, path):
    layer, states = model.bert.encoder.layer[0], torch.randn(2, 6, 64)
    mask = torch.zeros(2, 1, 6, 6)
    mask[..., 3:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        wanted = layer(states, mask)
        same(by_events(model).bert.encoder.layer[0](states, mask), wanted)
        assert not torch.allclose(layer(states), wanted, atol=1e-4)


@pytest.mark.parametrize("asked_by", ["call", "config"])
@pytest.mark.parametrize("name", ["hidden_states", "attentions", "spikes", "firing_rates"])
def test_what_is_asked_for_is_recorded(model, path, name, asked_by):
    events = by_events(copy.deepcopy(model))
    for _ in range(2):
        # Before it was ever asked for, and with transformers' hooks in place.
        same(logits(events), logits(model))
        found = []
        for x in (model, events):
            if asked_by == "config":
                setattr(x.config, f"output_{name}", True)
            kwargs = {f"output_{name}": True} if asked_by == "call" else {}
            with torch.no_grad():
                found.append(x.bert(**INPUTS, **kwargs)[name])
            setattr(x.config, f"output_{name}", False)
        assert len(found[0]) == len(found[1]) > 0
        for wanted, got in zip(*found, strict=True):
            same(got, wanted)


# Where weights lie


DEVICES = {"bert.embeddings": "cpu", "bert.encoder": "disk"}
DEVICES |= dict.fromkeys(("bert.pooler", "dropout", "classifier"), "cpu")
OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model),
    "cpu_offload_with_hook": lambda model, folder: cpu_offload_with_hook(model, "cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, DEVICES, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_after(model, path, offload, tmp_path):
    wanted = logits(model)
    by_events(model)
    same(logits(model), wanted)
    offload(model, tmp_path)
    for _ in range(2):
        same(logits(model), wanted)


@pytest.mark.parametrize("offload", [OFFLOADS["cpu_offload"], OFFLOADS["disk_offload"]], ids=["cpu", "disk"])
def test_offloaded_before(model, offload, tmp_path):
    offload(model, tmp_path)
    with pytest.raises(ValueError, match="is on 'meta': move it to the CPU, and offload weights after that"):
        by_events(model)
    assert not is_event_driven(model)


@pytest.mark.parametrize("part", ["", *(x for x in PARTS if not x.endswith("dropout"))])
def test_moved_away(model, path, part):
    """Each module by itself; the error comes before anything is read."""
    by_events(model)
    logits(model)
    model.bert.encoder.layer[0].get_submodule(part).to("meta")
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        print(logits(model))


# Tensors that are no plain ones


def linears(model):
    return [x for x in model.bert.encoder.modules() if isinstance(x, SpikingLinear)]


def test_quantized_tensors_dense(model):
    plain = copy.deepcopy(model)
    quantize_like(linears(plain), linears(model))
    check_finite(model)
    same(logits(model), logits(plain))
    linears(model)[3].weight.scale[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values in bert\.encoder\.layer\.0\.attention\.output"):
        check_finite(model)


def test_quantized_tensors_by_events(model, path):
    events = by_events(copy.deepcopy(model))
    logits(events)
    for x in (model, events):
        quantize_like(linears(copy.deepcopy(x)), linears(x))
    message = "needs plain tensors, but .* is QuantizedLike: load the model without quantization"
    with pytest.raises(TypeError, match=message):
        by_events(model)
    assert not is_event_driven(model)
    with pytest.raises(TypeError, match=message):
        logits(events)
    same(logits(dense(events)), logits(model))


def test_torchao(model, path, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig()
    model.save_pretrained(tmp_path)
    loaded = SNNBertForSequenceClassification.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
    plain, events = copy.deepcopy(model), by_events(copy.deepcopy(model))
    logits(events)
    for x in (model, events):
        quantization.quantize_(x, config)
    for quantized in (model, loaded.eval()):
        wanted = copy.deepcopy(plain)
        for x, y in zip(wanted.modules(), quantized.modules(), strict=True):
            if hasattr(getattr(y, "weight", None), "dequantize"):
                x.weight.data = y.weight.dequantize()
        assert not torch.equal(logits(wanted), logits(plain))
        same(logits(quantized), logits(wanted))
    for x in (loaded, events):
        with pytest.raises(TypeError, match=r"needs plain tensors, but .* is Int8Tensor"):
            logits(x if is_event_driven(x) else by_events(x))
    same(logits(dense(events)), logits(model))


# Copies and hashes

HASH = """
import sys, pickle
from datasets.fingerprint import Hasher
print(Hasher.hash(pickle.load(open(sys.argv[1], "rb"))))
"""


def test_the_hash_stays(make_config, path, tmp_path):
    model = SNNBertForSequenceClassification(make_config()).eval()
    hasher = pytest.importorskip("datasets.fingerprint").Hasher
    hash_of_dense = hasher.hash(model)
    event_driven(model, "int8")
    found = {hasher.hash(model)}
    logits(model)
    found.add(hasher.hash(model))
    found |= {hasher.hash(copy.deepcopy(model)), hasher.hash(pickle.loads(pickle.dumps(model)))}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-c", HASH, str(tmp_path / "model.pkl")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip())
    assert len(found) == 1 and hash_of_dense not in found
    assert hasher.hash(event_driven(model, "float32")) not in found
    assert hasher.hash(dense(model)) == hash_of_dense


def test_nothing_special_happened(model):
    """The modules, their classes and their state are those of the dense model."""
    classes = [type(x) for x in model.modules()]
    names = list(model.state_dict())
    by_events(model)
    assert [type(x) for x in model.modules()] == classes and list(model.state_dict()) == names
