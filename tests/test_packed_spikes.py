"""Spikes at one bit each: the packing, and training that keeps the packed form against training that keeps floats."""

import copy

import pytest
import torch
from torch import nn

import modeling_snn_bert as snn
from modeling_snn_bert import attention, cpu_kernels, packed_spikes, spiking_neurons
from modeling_snn_bert.packed_spikes import (
    SpikingLinear,
    attach_packed,
    keep_packed,
    pack,
    packed_form,
    spiking_linears,
    unpack,
)

# Every option of the neurons and of the attention.
SETTINGS = {
    "bpsn": {},
    "ternary": {"spike_type": "ternary"},
    "no_reset": {"reset_iterations": 0},
    "three_sweeps": {"reset_iterations": 3, "reset": 0.5},
    "sum": {"normalize": False},
    "forward": {"bidirectional": False},
    "toeplitz": {"integration": "toeplitz"},
    "rectangle": {"surrogate": "rectangle", "surrogate_alpha": 1.0},
    "lif": {"neuron_type": "lif"},
    "lif_ternary": {"neuron_type": "lif", "spike_type": "ternary"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "psn": {"neuron_type": "psn", "psn_length": 13},
    "spiking_attention": {"attention_type": "spiking"},
    "spiking_attention_ternary": {"attention_type": "spiking", "spike_type": "ternary"},
    "sdpa": {"attn_implementation": "sdpa"},
    "dropout": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "target": {"firing_rate_target": 0.05},
    "position_bias": {"relative_attention_num_buckets": 8, "attn_implementation": "sdpa"},
}
DROPOUT_SDPA = {"attention_probs_dropout_prob": 0.1, "attn_implementation": "sdpa"}


def random_spikes(*shape, ternary=False, rate=0.3, dtype=torch.float32):
    spikes = (torch.rand(shape) < rate).to(dtype)
    return spikes * (torch.randint(0, 2, shape) * 2 - 1) if ternary else spikes


class TestPacking:
    @pytest.mark.parametrize("ternary", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (2, 5, 20), (7,), (3, 64), (1, 0, 8)], ids=str)
    def test_there_and_back(self, shape, dtype, ternary):
        spikes = random_spikes(*shape, ternary=ternary, dtype=dtype)
        packed = pack(spikes, ternary)
        assert packed.dtype == torch.uint8 and packed.shape == (1 + ternary, *shape[:-1], (shape[-1] + 7) // 8)
        back = unpack(packed, shape[-1], dtype)
        assert back.dtype == dtype and torch.equal(back, spikes)

    def test_bit_k_of_byte_i_is_channel_8_i_plus_k(self):
        for channel in range(24):
            packed = pack(nn.functional.one_hot(torch.tensor(channel), 24).float(), ternary=False)
            assert packed[0].tolist() == [(1 << channel % 8) * (channel // 8 == i) for i in range(3)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_every_byte_is_unpacked(self, dtype):
        plus, minus = torch.arange(256, dtype=torch.uint8).expand(256, -1), torch.arange(256)[:, None].expand(-1, 256)
        packed = torch.stack((plus, minus.to(torch.uint8)))
        bits = (packed.int()[..., None] >> torch.arange(8)) & 1
        wanted = (bits[0] - bits[1]).flatten(-2).to(dtype)
        for channels in (2048, 2043, 1):
            binary, ternary = unpack(packed[:1], channels, dtype), unpack(packed, channels, dtype)
            assert torch.equal(binary, bits[0].flatten(-2)[:, :channels].to(dtype)) and binary.dtype == dtype
            assert torch.equal(ternary, wanted[:, :channels]) and ternary.dtype == dtype

    @pytest.mark.parametrize("ternary", [False, True])
    def test_unpacking_leaves_the_packed_form_as_it_is(self, ternary):
        # Every other row: packed spikes need not lie in one piece.
        packed = torch.randint(256, (1 + ternary, 6, 5), dtype=torch.uint8)[:, ::2]
        before = packed.clone()
        assert torch.equal(unpack(packed, 37, torch.float32), unpack(before, 37, torch.float32))
        assert torch.equal(packed, before)
        turned = before.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(unpack(turned, 37, torch.float32), unpack(before, 37, torch.float32))

    def test_form_is_gone_once_the_spikes_change(self):
        spikes = random_spikes(2, 8)
        attach_packed(spikes, pack(spikes, False))
        assert torch.equal(unpack(packed_form(spikes), 8, spikes.dtype), spikes)
        spikes.mul_(2)
        assert packed_form(spikes) is None and packed_form(spikes.clone()) is None


def gradients(function, inputs, grad):
    result = function(*inputs)
    return result.detach(), torch.autograd.grad(result, inputs, grad)


class TestSpikingLinear:
    @pytest.mark.parametrize("ternary", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(1, 8), (2, 3, 20), (4, 64)], ids=str)
    def test_is_a_linear(self, shape, bias, ternary):
        spikes = random_spikes(*shape, ternary=ternary, dtype=torch.float64).requires_grad_()
        linear = nn.Linear(shape[-1], 5, bias=bias).double()
        spiking = SpikingLinear(shape[-1], 5, bias=bias).double()
        spiking.load_state_dict(linear.state_dict())
        grad = torch.randn(*shape[:-1], 5, dtype=torch.float64)
        wanted, wanted_grads = gradients(lambda x, *_: linear(x), [spikes, *linear.parameters()], grad)
        attach_packed(spikes, pack(spikes.detach(), ternary))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            got, got_grads = gradients(lambda x, *_: spiking(x), [spikes, *spiking.parameters()], grad)
        assert torch.equal(got, wanted)
        for a, b in zip(got_grads, wanted_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert {x.dtype for x in kept} == {torch.uint8, torch.float64}
        assert all(x.dtype == torch.uint8 or x is spiking.weight for x in kept)

    def test_other_inputs_go_the_plain_way(self):
        linear = SpikingLinear(8, 3)
        x = torch.randn(2, 8, requires_grad=True)
        linear(x).sum().backward()
        assert torch.allclose(linear.weight.grad, x.sum(0).expand(3, -1)) and x.grad is not None

    def test_frozen_weights_keep_nothing(self):
        linear, kept = SpikingLinear(8, 3), []
        linear.weight.requires_grad_(False)
        spikes = random_spikes(2, 8).requires_grad_()
        attach_packed(spikes, pack(spikes.detach(), False))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            linear(spikes).sum().backward()
        assert all(x.data_ptr() == linear.weight.data_ptr() for x in kept) and spikes.grad is not None


class TestSpikingLinears:
    @pytest.mark.parametrize("kernels", [True, False], ids=["events", "dense"])
    @pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
    def test_are_what_each_is(self, autocast, kernels, monkeypatch):
        if not kernels:
            monkeypatch.setattr(packed_spikes, "kernels_available", lambda: False)
        linears = [SpikingLinear(64, outputs, bias=outputs != 24) for outputs in (16, 24, 8)]
        linears[2].weight.requires_grad_(False)
        grads = [torch.randn(5, 7, linear.out_features) for linear in linears]
        spikes = random_spikes(5, 7, 64, rate=0.1)

        def run(products):
            x = spikes.clone().requires_grad_()
            attach_packed(x, pack(spikes, False))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = products(x)
            parameters = [p for linear in linears for p in linear.parameters() if p.requires_grad]
            wanted = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
            return outputs, torch.autograd.grad(outputs, [x, *parameters], wanted)

        one_by_one = run(lambda x: [linear(x) for linear in linears])
        with_frozen = run(lambda x: spiking_linears(linears, x))
        linears.pop(), grads.pop()
        few = run(lambda x: [linear(x) for linear in linears])
        unpacked = []
        unpacking = unpack if autocast or not kernels else packed_spikes.list_packed_columns
        monkeypatch.setattr(packed_spikes, unpacking.__name__, lambda *x: unpacked.append(x) or unpacking(*x))
        together = run(lambda x: spiking_linears(linears, x))
        assert len(unpacked) == 1
        assert spikes.any() and few[1][0].any()
        for got, wanted in ((with_frozen, one_by_one), (together, few)):
            for a, b in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0.1 if autocast else 1e-5)

    def test_what_is_hooked_or_replaced_is_called(self, monkeypatch):
        linears = [SpikingLinear(16, 8) for _ in range(3)]
        spikes = random_spikes(2, 16).requires_grad_()
        attach_packed(spikes, pack(spikes.detach(), False))
        wanted = [linear(spikes) for linear in linears]
        seen = []
        linears[0].register_forward_hook(lambda *_: seen.append("hook"))
        spiking_linears(linears, spikes)
        linears[0]._forward_hooks.clear()
        linears[1].forward = lambda x: seen.append("forward") or SpikingLinear.forward(linears[1], x)
        got = spiking_linears(linears, spikes)
        assert seen == ["hook", "forward"] and all(map(torch.equal, got, wanted))
        del linears[1].forward
        for patched, name in ((SpikingLinear, "forward"), (nn.Module, "__call__")):
            method = getattr(patched, name)
            seen.clear()
            monkeypatch.setattr(patched, name, lambda *x, method=method: seen.append("patched") or method(*x))
            assert all(map(torch.equal, spiking_linears(linears, spikes), wanted))
            assert seen == ["patched"] * 3
            monkeypatch.undo()
        linears[1] = nn.Sequential(linears[2])
        assert torch.equal(spiking_linears(linears, spikes)[1], wanted[2])


def test_kept_views_come_back():
    spikes = random_spikes(2, 6, 16, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 2, 8, 6, dtype=torch.float64, requires_grad=True)

    def product(x, w):
        return w.transpose(2, 3) @ x.unflatten(-1, (2, 8)).transpose(1, 2).transpose(2, 3)

    grad = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    wanted, wanted_grads = gradients(product, [spikes, weight], grad)
    attach_packed(spikes, pack(spikes.detach(), False))
    with keep_packed(spikes):
        got, got_grads = gradients(product, [spikes, weight], grad)
    assert torch.equal(got, wanted)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got_grads, wanted_grads, strict=True))


@pytest.mark.skipif(not cpu_kernels.available(), reason="no compiled kernels: products never run by events")
@pytest.mark.usefixtures("at_every_level")
class TestByEvents:
    @pytest.mark.parametrize("ternary", [False, True])
    @pytest.mark.parametrize("rate", [0.0, 0.02, 0.2, 0.4])
    @pytest.mark.parametrize("shape, outputs", [((1, 8), 1), ((3, 50, 20), 40), ((2, 130, 384), 96)], ids=str)
    def test_is_a_linear(self, monkeypatch, shape, outputs, rate, ternary):
        ways = []
        decide = packed_spikes._by_events

        def spy(lists_of, *tensors):
            ways.append(decide(lists_of, *tensors))
            return ways[-1]

        monkeypatch.setattr(packed_spikes, "_by_events", spy)
        spikes = random_spikes(*shape, ternary=ternary, rate=rate).requires_grad_()
        linear, grad = SpikingLinear(shape[-1], outputs), torch.randn(*shape[:-1], outputs)
        exact = copy.deepcopy(linear).double()
        plain = spikes.detach().double().requires_grad_()
        wanted, wanted_grads = gradients(lambda x, *_: exact(x), [plain, *exact.parameters()], grad.double())
        attach_packed(spikes, pack(spikes.detach(), ternary))
        got, got_grads = gradients(lambda x, *_: linear(x), [spikes, *linear.parameters()], grad)
        by_events = shape[-1] % 8 == 0 and rate < 0.3
        if shape[0] > 1:
            # Of inputs that are no whole bytes lists are made for the gradient to the weights only.
            assert [way is not None for way in ways] == [rate < 0.3] * (2 if shape[-1] % 8 == 0 else 1)
            assert by_events or rate == 0.4 or shape[-1] == 20
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
        for a, b in zip(got_grads, wanted_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))

    def test_is_the_same_every_time(self):
        linear, spikes = SpikingLinear(64, 40), random_spikes(5, 30, 64, rate=0.1).requires_grad_()
        attach_packed(spikes, pack(spikes.detach(), False))
        runs = [gradients(lambda x, *_: linear(x), [spikes, *linear.parameters()], torch.ones(5, 30, 40))]
        runs.append(gradients(lambda x, *_: linear(x), [spikes, *linear.parameters()], torch.ones(5, 30, 40)))
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.fixture
def plain(monkeypatch):
    """A function that switches the packing off, so that floats are kept."""
    return lambda: monkeypatch.setattr(spiking_neurons, "attach_packed", lambda spikes, packed: spikes)


@pytest.fixture
def make(make_config):
    """A function that builds a classifier in training mode, and a batch for it."""

    def build(dtype=torch.float64, **settings):
        torch.manual_seed(0)
        # Heads of 8 channels, so that the compiled kernels take the neurons in float32.
        model = snn.SNNBertForSequenceClassification(make_config(hidden_size=32, intermediate_size=64, **settings))
        mask = torch.ones(3, 13, dtype=torch.long)
        mask[1, 9:] = 0
        batch = {"input_ids": torch.randint(1, 120, (3, 13)), "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
        return model.to(dtype).train(), batch

    return build


def step(model, batch, calls=1, autocast=None):
    """Loss and gradients of `calls` forward passes with one backward pass."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = sum(model(**batch).loss for _ in range(calls))
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same(got, wanted, tolerance):
    assert torch.allclose(got[0], wanted[0], rtol=0, atol=tolerance)
    for name, grad in wanted[1].items():
        scale = max(grad.abs().max().item(), 1.0)
        difference = (got[1][name] - grad).abs().max().item() / scale
        assert difference <= tolerance, f"the gradient of {name} is off by {difference}"


def test_model_uses_packed_attention(make, monkeypatch):
    model, batch = make(torch.float32, **DROPOUT_SDPA)
    calls = []
    function = attention._PackedAttention.forward
    monkeypatch.setattr(attention._PackedAttention, "forward", lambda *a: calls.append(a) or function(*a))
    step(model, batch)
    assert len(calls) == 2
    with torch.no_grad():
        model.eval()(**batch)
    assert len(calls) == 2


class TestTraining:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
    def test_packed_is_plain(self, make, plain, assert_spikes_flow, settings, dtype, tolerance):
        model, batch = make(dtype, **settings)
        packed = step(model, batch)
        assert_spikes_flow(model.eval().bert, **{k: v for k, v in batch.items() if k != "labels"})
        plain()
        same(packed, step(model.train(), batch), tolerance)

    @pytest.mark.parametrize("settings", ["bpsn", "ternary", "spiking_attention", "dropout"])
    def test_twice_in_one_graph(self, make, plain, settings):
        model, batch = make(**SETTINGS[settings])
        packed = step(model, batch, calls=2)
        plain()
        same(packed, step(model, batch, calls=2), 1e-10)

    def test_backward_twice(self, make):
        model, batch = make()
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        loss.backward()
        assert all(torch.allclose(p.grad, 2 * once[name], rtol=1e-12) for name, p in model.named_parameters())

    @pytest.mark.parametrize("settings", ["bpsn", "ternary", "lif", "spiking_attention", "dropout", "target"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_gradient_checkpointing(self, make, settings, dtype):
        model, batch = make(dtype, **SETTINGS[settings])
        wanted = step(model, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        same(step(model, batch), wanted, 1e-10 if dtype == torch.float64 else 1e-5)

    @pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("settings", ["bpsn", "ternary", "lif", "spiking_attention", "sdpa"])
    def test_autocast(self, make, plain, settings, autocast):
        model, batch = make(torch.float32, **SETTINGS[settings])
        packed = step(model, batch, autocast=autocast)
        assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in packed[1].values())
        plain()
        # The products are the same; a bias is summed in another order, in the low precision.
        same(packed, step(model, batch, autocast=autocast), 4 * torch.finfo(autocast).eps)

    @pytest.mark.parametrize(
        "settings",
        [SETTINGS[name] for name in ("bpsn", "ternary", "lif", "repeat", "psn", "sdpa")] + [DROPOUT_SDPA],
        ids=str,
    )
    def test_no_spike_is_kept_as_a_float(self, make, settings):
        model, batch = make(torch.float32, **settings)
        floats = []

        def look(x):
            # In the encoder; a mean over identical rows or a mask may be made of ones as well, but has no such shape.
            whole = x.is_floating_point() and x.numel() >= 3 * 13 * 32 and bool(((x == 0) | (x.abs() == 1)).all())
            if whole and bool((x != 0).any()):
                floats.append(tuple(x.shape))
            return x

        with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
            loss = model(**batch).loss
        assert not floats
        loss.backward()

    def test_deep_copies_and_inference(self, make):
        model, batch = make(torch.float32)
        with torch.inference_mode():
            wanted = model.eval()(**batch).logits
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(model)(**batch).logits, wanted)
