"""Event-driven inference: both of its paths against the dense model, and what surrounds them."""

import copy
import math
import pickle

import pytest
import torch
import transformers
from cpu_levels import CPU_LEVELS
from heads import MODELS
from torch import nn
from transformers import BertConfig, BertModel, pipeline

import modeling_snn_bert as snn
from modeling_snn_bert import cpu_kernels
from modeling_snn_bert import event_driven as module
from modeling_snn_bert.event_driven import (
    EventDrivenLayer,
    EventDrivenLinear,
    EventDrivenProduct,
    SharedLists,
    crossover_rate,
    dense,
    dense_rates,
    event_driven,
    is_event_driven,
    round_products,
)
from modeling_snn_bert.event_kernels import PackedSpikes, tiles_available
from modeling_snn_bert.event_weights import round_weights, rounded_floats
from modeling_snn_bert.layer_places import LINEARS
from modeling_snn_bert.packed_spikes import SpikingLinear, pack

KERNELS_MISSING = "no compiled kernels: installed without a C compiler, or SNN_BERT_CPU_KERNELS=0 is set"
# The compiled kernels at each level of the instruction set that is there, and torch's operations.
PATHS = [*CPU_LEVELS, pytest.param(False, id="torch")]
needs_tiles = pytest.mark.skipif(not tiles_available(), reason="no AMX in this processor, or no kernels for it")
WEIGHT_DTYPES = ["float32", "bfloat16", "int8"]
# Shapes whose blocks hold whole groups, and (24 channels a group) whose blocks do not.
SHAPES = {
    "even": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256},
    "wide": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "uneven": {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192},
    "odd": {"hidden_size": 20, "num_attention_heads": 4, "intermediate_size": 36},
}


def rounded_weights(linear):
    return rounded_floats(linear.weight, linear.runner.weight_dtype)


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that takes the compiled kernels away."""
    return lambda: monkeypatch.setattr(module, "available", lambda: False)


@pytest.fixture(autouse=True)
def on_path(request, cap_cpu_level, without_kernels):
    """Where a test has a parameter from `PATHS`, the kernels run at its level, or torch's operations in their place."""
    path = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernels")
    if path:
        cap_cpu_level(path)
    elif path is False:
        without_kernels()


@pytest.fixture
def make_model(make_config):
    def make(model_class=snn.SNNBertModel, **overrides):
        torch.manual_seed(0)
        return model_class(make_config(**overrides)).eval()

    return make


@pytest.fixture
def batch():
    """Sequences without padding, with padding on the right, on the left, and of one token."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 120, (4, 21), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 13:] = 0
    attention_mask[2, :6] = 0
    attention_mask[3, 1:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def run(model, **inputs):
    outputs = model(**inputs)
    return outputs[0]


def same(a, b, inputs):
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(a[valid], b[valid], rtol=0, atol=1e-4)


def rounded_copy(model, weight_dtype):
    """A dense copy of `model` with the encoder's weights rounded, and the products in float32."""
    model = copy.deepcopy(model)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and ".layer." in name:
            weight, scale = round_weights(linear.weight, weight_dtype)
            linear.weight.data = weight.float() if scale is None else weight.float() * scale[:, None]
    return model


class TestProduct:
    """One Linear."""

    def layer(self, inputs, outputs, weight_dtype, kernels, ternary=False, bias=True, dense_above=1.0):
        linear = SpikingLinear(inputs, outputs, bias=bias).eval()
        linear.runner = EventDrivenProduct(weight_dtype, dense_above, SharedLists(ternary))
        return linear

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 5), (64, 128), (65, 33), (768, 200), (3000, 129)])
    @pytest.mark.parametrize("ternary", [False, True])
    def test_is_the_product_with_the_rounded_weights(self, inputs, outputs, rate, weight_dtype, kernels, ternary):
        linear = self.layer(inputs, outputs, weight_dtype, kernels, ternary)
        spikes = (torch.rand(3, 9, inputs) < rate).float()
        if ternary:
            spikes *= torch.randint(0, 2, spikes.shape) * 2 - 1
        spikes[1, 2] = 0  # a row without any
        with torch.no_grad():
            got = linear(spikes)
            wanted = nn.functional.linear(spikes.double(), rounded_weights(linear).double(), linear.bias.double())
        # Only embedding_bag rounds a result: to bfloat16, once, before the bias.
        tolerance = 2**-8 * wanted.abs().max().item() if weight_dtype == "bfloat16" and not kernels else 1e-5
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=max(tolerance, 1e-5))

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["events", "dense"])
    def test_int8_sums_are_exact_at_the_extremes(self, kernels, dense_above):
        # 3,000 weights of 127 overflow 16 bits many times over.
        for sign in (1, -1):
            linear = self.layer(3000, 130, "int8", kernels, bias=False, dense_above=dense_above)
            with torch.no_grad():
                linear.weight.fill_(sign * 127.0)
                linear.weight[:, 1::2] *= -1
                assert torch.equal(linear(torch.ones(2, 3000)), torch.zeros(2, 130))
                linear.weight.abs_().mul_(sign)
                assert torch.equal(linear(torch.ones(2, 3000)), torch.full((2, 130), sign * 127.0 * 3000))

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
    def test_dense_product_of_the_same_weights(self, kernels, weight_dtype):
        events = self.layer(96, 40, weight_dtype, kernels)
        above = copy.deepcopy(events)
        above.runner.dense_above = 0.0
        spikes = (torch.rand(5, 96) < 0.3).float()
        with torch.no_grad():
            tolerance = 2e-2 if weight_dtype == "bfloat16" and not kernels else 1e-5
            torch.testing.assert_close(above(spikes), events(spikes), rtol=0, atol=tolerance)

    @needs_tiles
    @pytest.mark.parametrize("rows", [1, 16, 17, 33, 200])
    @pytest.mark.parametrize("inputs, outputs", [(7, 5), (64, 64), (65, 33), (72, 130), (768, 200), (3000, 129)])
    @pytest.mark.parametrize("ternary", [False, True])
    def test_tiles_give_the_very_sums_of_events(self, rows, inputs, outputs, ternary):
        events = self.layer(inputs, outputs, "int8", True, ternary)
        tiles = copy.deepcopy(events)
        tiles.runner.dense_above = 0.0
        assert tiles.runner.tiled(tiles) is not None
        spikes = (torch.rand(rows, inputs) < 0.3).float()
        if ternary:
            spikes *= torch.randint(0, 2, spikes.shape) * 2 - 1
        with torch.no_grad():
            assert torch.equal(tiles(spikes), events(spikes)) and spikes.any()

    def test_without_tiles_the_dense_product_is_that_of_torch(self, monkeypatch):
        monkeypatch.setattr("modeling_snn_bert.event_driven.tiles_available", lambda: False)
        linear = self.layer(96, 40, "int8", cpu_kernels.available(), dense_above=0.0)
        products = []
        multiply = torch._int_mm
        monkeypatch.setattr(torch, "_int_mm", lambda *operands: products.append(operands) or multiply(*operands))
        spikes = (torch.rand(5, 96) < 0.3).float()
        with torch.no_grad():
            wanted = nn.functional.linear(spikes, rounded_weights(linear), linear.bias)
            torch.testing.assert_close(linear(spikes), wanted, rtol=0, atol=1e-5)
        assert len(products) == 1

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("value", [0.5, 2.0, math.nan, -1.0])
    def test_refuses_what_is_no_spike(self, kernels, value):
        linear = self.layer(100, 8, "float32", kernels)
        spikes = torch.zeros(3, 100)
        spikes[1, 99] = value
        with pytest.raises(ValueError, match="spikes only"), torch.no_grad():
            linear(spikes)

    @pytest.mark.parametrize("kernels", PATHS)
    def test_gradient_is_an_error(self, kernels):
        linear = self.layer(16, 8, "float32", kernels)
        result = linear(torch.ones(2, 16))
        with pytest.raises(RuntimeError, match="no gradients"):
            result.sum().backward()
        with pytest.raises(RuntimeError, match="no training mode"):
            linear.train()(torch.ones(2, 16))
        with pytest.raises(ValueError, match="16 channels"):
            linear.eval()(torch.ones(2, 15))

    @pytest.mark.parametrize("kernels", PATHS)
    def test_lists_are_shared_and_follow_the_input(self, kernels):
        shared = SharedLists(False)
        spikes = (torch.rand(4, 32) < 0.3).float()
        assert shared.of(spikes) is shared.of(spikes)
        first = shared.of(spikes)
        assert shared.of(spikes.clone()) is not first
        assert shared.last is None, "the lists of a tensor that is gone are kept"

    @pytest.mark.parametrize("kernels", PATHS)
    def test_changed_weights_are_used(self, kernels):
        linear = self.layer(16, 8, "int8", kernels)
        spikes = torch.ones(1, 16)
        with torch.no_grad():
            before = linear(spikes)
            linear.weight.mul_(2)
            linear.bias.zero_()
            after = linear(spikes)
            torch.testing.assert_close(after, spikes @ rounded_weights(linear).T)
        assert not torch.equal(before, after)


class TestModel:
    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
    @pytest.mark.parametrize("shape", list(SHAPES))
    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    def test_equals_dense(self, make_model, assert_spikes_flow, batch, kernels, weight_dtype, shape, spike_type):
        if weight_dtype == "bfloat16" and not kernels:
            pytest.skip("embedding_bag rounds its sums to bfloat16, which moves spikes: compared per product above")
        model = make_model(**SHAPES[shape], spike_type=spike_type)
        wanted = run(rounded_copy(model, weight_dtype), **batch)
        assert event_driven(model, weight_dtype, dense_above=1.0) is model
        assert_spikes_flow(model, **batch)
        same(run(model, **batch), wanted, batch)
        single = {name: x[:1] for name, x in batch.items()}
        same(run(model, **single), wanted[:1], single)

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize(
        "settings",
        [
            {"neuron_type": "lif"},
            {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
            {"neuron_type": "psn", "psn_length": 21},
            {"attention_type": "spiking"},
            {"reset_iterations": 0},
            {"reset_iterations": 3, "reset": 0.5},
            {"normalize": False, "bidirectional": False},
            {"integration": "toeplitz"},
            {"attn_implementation": "sdpa"},
            {"relative_attention_num_buckets": 8},
            {"relative_attention_num_buckets": 8, "attention_type": "spiking"},
            {"relative_attention_num_buckets": 8, "spike_type": "ternary", "attn_implementation": "sdpa"},
        ],
        ids=str,
    )
    def test_every_setting(self, make_model, assert_spikes_flow, batch, kernels, settings):
        model = make_model(**SHAPES["even"], **settings)
        if settings.get("relative_attention_num_buckets"):
            nn.init.normal_(model.encoder.relative_attention_bias.weight)
        wanted = run(model, **batch)
        event_driven(model, dense_above=1.0)
        assert_spikes_flow(model, **batch)
        same(run(model, **batch), wanted, batch)

    @pytest.mark.parametrize("kernels", PATHS)
    @pytest.mark.parametrize("head", list(MODELS))
    def test_every_head_and_back(self, make_model, assert_spikes_flow, batch, kernels, head):
        model = make_model(MODELS[head], **SHAPES["even"])
        inputs = {name: x.view(2, 2, -1) for name, x in batch.items()} if head == "choice" else batch
        wanted = run(model, **inputs)
        classes = [type(x) for x in model.modules()]
        state = {name: x.clone() for name, x in model.state_dict().items()}
        for weight_dtype in WEIGHT_DTYPES:
            event_driven(model, weight_dtype)
            assert is_event_driven(model) and len(dense_rates(model)) == 3
            assert run(model, **inputs).isfinite().all()
        event_driven(model, "float32", dense_above=1.0)
        got = run(model, **inputs)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        assert_spikes_flow(model.base_model, **batch)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert dense(model) is model and not is_event_driven(model)
        assert [type(x) for x in model.modules()] == classes
        assert torch.equal(run(model, **inputs), wanted)

    @pytest.mark.skipif(not cpu_kernels.available(), reason=KERNELS_MISSING)
    @pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
    @pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
    @pytest.mark.parametrize("buckets", [0, 32])
    def test_whole_layer_is_its_modules(
        self, make_model, assert_spikes_flow, monkeypatch, length, weight_dtype, buckets
    ):
        settings = {"max_position_embeddings": 256, "relative_attention_num_buckets": buckets}
        model = event_driven(make_model(**SHAPES["wide"], **settings), weight_dtype, dense_above=1.0)
        batch = {"input_ids": torch.randint(1, 120, (2, length)), "attention_mask": torch.ones(2, length).long()}
        batch["attention_mask"][1, length // 2 + 1 :] = 0
        whole_runs = []
        run_whole = EventDrivenLayer.__call__
        monkeypatch.setattr(EventDrivenLayer, "__call__", lambda *args: whole_runs.append(True) or run_whole(*args))
        got = run(model, **batch)
        assert len(whole_runs) == 2
        if length > 1:
            assert_spikes_flow(model, **batch)
        with torch.no_grad():
            recorded = model(**batch, output_spikes=True, output_attentions=True)
            assert len(whole_runs) == 2, "what was asked for cannot be seen in a whole layer"
            assert len(recorded.spikes) == 14
            # The hooks that recorded stay in place and must not keep the layers from running whole.
            assert torch.equal(model(**batch)[0], got) and len(whole_runs) == 4
        same(got, recorded.last_hidden_state, batch)

    @needs_tiles
    @pytest.mark.parametrize("length", [1, 33, 200])
    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    @pytest.mark.parametrize("shape", list(SHAPES))
    def test_tiles_give_the_model_of_events(self, make_model, assert_spikes_flow, shape, spike_type, length):
        model = make_model(**SHAPES[shape], spike_type=spike_type, max_position_embeddings=256)
        batch = {"input_ids": torch.randint(1, 120, (2, length)), "attention_mask": torch.ones(2, length).long()}
        batch["attention_mask"][1, length // 2 + 1 :] = 0
        wanted = run(event_driven(model, "int8", dense_above=1.0), **batch)
        assert torch.equal(run(event_driven(model, "int8", dense_above=0.0), **batch), wanted)
        if length > 1:
            assert_spikes_flow(model, **batch)

    @pytest.mark.skipif(not cpu_kernels.available(), reason=KERNELS_MISSING)
    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    def test_the_firing_rate_decides(self, make_model, batch, spike_type):
        """Between 0 and 1 a whole layer counts its spikes; either product gives the same here."""
        model = make_model(**SHAPES["even"], spike_type=spike_type)
        wanted = run(event_driven(model, "int8", dense_above=1.0), **batch)
        same(run(event_driven(model, "int8", dense_above=0.2), **batch), wanted, batch)
        spikes = (torch.rand(3, 5, 40) < 0.3).float()
        packed = PackedSpikes(pack(spikes, spike_type == "ternary"))
        assert packed.firing_rate == pytest.approx(spikes.mean().item()) == packed.lists.firing_rate

    @pytest.mark.parametrize("kernels", PATHS)
    def test_hooks_see_what_happens(self, make_model, batch, kernels):
        model = event_driven(make_model(**SHAPES["even"]), dense_above=1.0)
        seen = []
        for linear in model.modules():
            if isinstance(linear, EventDrivenLinear):
                linear.register_forward_hook(lambda m, args, output: seen.append(args[0]))
        run(model, **batch)
        assert len(seen) == 12 and all(set(x.unique().tolist()) == {0.0, 1.0} for x in seen)

    @pytest.mark.parametrize("kernels", PATHS)
    def test_without_no_grad(self, make_model, batch, kernels):
        model = make_model(snn.SNNBertForSequenceClassification, **SHAPES["even"], num_labels=3)
        wanted = run(model, **batch)
        event_driven(model, dense_above=1.0)
        outputs = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
        torch.testing.assert_close(outputs.logits.detach(), wanted, rtol=0, atol=1e-4)
        with pytest.raises(RuntimeError, match="no gradients"):
            outputs.loss.backward()
        with torch.inference_mode():
            torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kernels", PATHS)
    def test_save_and_load(self, make_model, batch, kernels, tmp_path):
        model = make_model(snn.SNNBertForSequenceClassification, **SHAPES["even"], num_labels=3)
        wanted = run(model, **batch)
        event_driven(model, "int8").save_pretrained(tmp_path)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert type(loaded) is snn.SNNBertForSequenceClassification and not is_event_driven(loaded)
        assert torch.equal(run(loaded, **batch), wanted)

    def test_methods_of_the_model(self, make_model, batch):
        model = make_model(snn.SNNBertForSequenceClassification, **SHAPES["even"], num_labels=3)
        assert model.to_event_driven("int8", dense_above=0.5) is model and is_event_driven(model)
        assert set(dense_rates(model).values()) == {0.5}
        assert model.to_dense() is model and not is_event_driven(model)

    @pytest.mark.parametrize("kernels", PATHS)
    def test_copies_work(self, make_model, batch, kernels):
        model = event_driven(make_model(**SHAPES["even"]), "int8", dense_above=1.0)
        wanted = run(model, **batch)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied, **batch), wanted)

    @pytest.mark.parametrize("kernels", PATHS)
    def test_pipeline(self, make_model, tokenizer, texts, kernels):
        model = make_model(snn.SNNBertForSequenceClassification, num_labels=3)
        wanted = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(texts)
        got = pipeline(
            "text-classification", model=event_driven(model, dense_above=1.0), tokenizer=tokenizer, device="cpu"
        )(texts)
        assert [x["label"] for x in got] == [x["label"] for x in wanted]
        assert [x["score"] for x in got] == pytest.approx([x["score"] for x in wanted], abs=1e-4)

    def test_both_paths_agree(self, make_model, batch, without_kernels):
        if not cpu_kernels.available():
            pytest.skip(KERNELS_MISSING)
        model = make_model(**SHAPES["even"])
        on_kernels = run(event_driven(model, "int8", dense_above=1.0), **batch)
        without_kernels()
        same(run(event_driven(model, "int8", dense_above=1.0), **batch), on_kernels, batch)

    def test_log_names_the_path(self, make_model, without_kernels, caplog, monkeypatch):
        monkeypatch.setattr(module.logger, "propagate", True)
        without_kernels()
        transformers.utils.logging.get_logger("transformers").propagate = True
        with caplog.at_level("INFO", logger=module.logger.name):
            event_driven(make_model(), "bfloat16", dense_above=0.25)
        assert "embedding_bag" in caplog.text and "bfloat16" in caplog.text and "0.25" in caplog.text


class TestBadInput:
    def test_not_spiking(self):
        bert = BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).eval()
        with pytest.raises(TypeError, match=r"`model` must be an SNN-BERT.*BertModel"):
            event_driven(bert)

    def test_training_mode(self, make_model):
        with pytest.raises(ValueError, match="training mode"):
            event_driven(make_model().train())
        model = event_driven(make_model(), dense_above=1.0).train()
        with pytest.raises(RuntimeError, match="no training mode"):
            model(torch.ones(1, 4, dtype=torch.long))

    def test_arguments(self, make_model):
        with pytest.raises(ValueError, match=r"`weight_dtype` must be one of .*'int8'.*got 'int4'"):
            event_driven(make_model(), "int4")
        with pytest.raises(ValueError, match=r"`dense_above` must lie in \[0, 1\]"):
            event_driven(make_model(), dense_above=1.5)


@pytest.mark.parametrize("kernels", PATHS)
def test_crossover_is_measured_once(kernels):
    level = cpu_kernels.cpu_level() if module.available() else None
    rate = crossover_rate(64, 96, "int8", level, torch.get_num_threads())
    assert 0 <= rate <= 1
    assert crossover_rate(64, 96, "int8", level, torch.get_num_threads()) == rate


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_rounded_once_both_forms_have_the_same_weights(make_model, batch, assert_spikes_flow, weight_dtype):
    model = make_model()
    before = {name: x.clone() for name, x in model.named_parameters()}
    with torch.no_grad():
        exact = model(**batch).last_hidden_state
    assert model.round_products(weight_dtype) is model
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    products = {f"encoder.layer.{i}.{name}.weight" for i in range(2) for name in LINEARS}
    assert changed == products
    after = {name: x.clone() for name, x in model.named_parameters()}
    round_products(model, weight_dtype)
    for name, x in model.named_parameters():
        torch.testing.assert_close(x, after[name], rtol=1e-6, atol=0)
    with torch.no_grad():
        outputs = model(**batch)
        events = event_driven(copy.deepcopy(model), weight_dtype, dense_above=1.0)(**batch)
    assert_spikes_flow(model, **batch)
    assert not torch.equal(outputs.last_hidden_state, exact)
    torch.testing.assert_close(events.last_hidden_state, outputs.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_rounding_refuses_what_it_cannot_round(make_model):
    model = make_model()
    before = [x.clone() for x in model.parameters()]
    assert round_products(model, "float32") is model
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match=r"`weight_dtype` must be one of .*, got 'int4'"):
        round_products(model, "int4")
    with pytest.raises(TypeError, match="must be an SNN-BERT"):
        round_products(nn.Linear(2, 2), "int8")
