"""LoRA, DoRA and IA3 on SNN-BERT: gradients, what is trained and saved, merging, and event-driven inference."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from modeling_snn_bert import SNNBertForMaskedLM, SNNBertForSequenceClassification, spiking_neurons
from modeling_snn_bert.adapters import ENCODER_LINEARS, IA3_TARGETS, adapter_settings, merge_adapters
from modeling_snn_bert.event_driven import dense, event_driven
from modeling_snn_bert.packed_spikes import SpikingLinear

IDS = torch.arange(5, 53).view(4, 12)
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [0] * 3 + [1] * 9, [1] * 12])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
LABELS = torch.tensor([0, 1, 1, 0])
METHODS = {
    "lora": (LoraConfig, "lora", {"r": 4}),
    "dora": (LoraConfig, "lora", {"r": 4, "use_dora": True}),
    "ia3": (IA3Config, "ia3", {}),
}
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def adapt(make_config):
    """A function that returns a model and the same with adapters, which do something from the start."""

    def make(method, settings=None, **choices):
        torch.manual_seed(0)
        model = SNNBertForSequenceClassification(make_config(attn_implementation="sdpa", **(settings or {})))
        kind, name, arguments = METHODS[method]
        config = kind(**arguments, **adapter_settings(model, name, **choices))
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name or "ia3_l" in parameter_name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model, adapted

    return make


def train(model, steps=3):
    """A few steps on the trainable parameters; the loss of each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model.train()(**INPUTS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@each_method
def test_packed_spikes_give_the_gradients_of_floats(adapt, assert_spikes_flow, monkeypatch, method):
    _, adapted = adapt(method)
    assert_spikes_flow(adapted.base_model.model, **INPUTS)
    wrapped = adapted.base_model.model.bert.encoder.layer[0].attention.self.key
    assert type(wrapped.base_layer) is SpikingLinear
    gradients = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(spiking_neurons, "attach_packed", lambda spikes, packed: spikes)
        adapted.zero_grad()
        adapted.train()(**INPUTS, labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > 0.9 * len(gradients[0])


@each_method
def test_reentrant_checkpointing_with_a_target_is_refused_where_only_adapters_train(adapt, method):
    _, adapted = adapt(method, {"firing_rate_target": 0.05})
    adapted.enable_input_require_grads()
    assert adapted.train()(**INPUTS, labels=LABELS).firing_rate_penalty > 0
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        adapted(**INPUTS, labels=LABELS)


@each_method
@pytest.mark.parametrize("train_neurons", [True, False], ids=["neurons", "no-neurons"])
def test_trains_saves_loads_and_merges(adapt, assert_spikes_flow, tmp_path, method, train_neurons):
    # The target makes the neurons' rates a part of the loss: the recorder has to find them inside PEFT's wrappers.
    model, adapted = adapt(method, {"firing_rate_target": 0.1}, train_neurons=train_neurons)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    names = model.neuron_names()
    assert adapted.base_model.model.neuron_names() == names
    assert_spikes_flow(adapted.base_model.model, **INPUTS)

    adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))

    merged = merge_adapters(loaded)
    assert not any("modules_to_save" in name or "base_layer" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert merged.neuron_names() == names and type(merged) is SNNBertForSequenceClassification
    state, before = merged.state_dict(), model.state_dict()
    assert set(state) == set(before)
    changed = {name for name, x in state.items() if not torch.equal(x, before[name])}
    targets = IA3_TARGETS if method == "ia3" else ENCODER_LINEARS
    assert {name for name in changed if name.endswith("weight") and "encoder" in name} == {
        name for name in state if any(name.endswith(f".{target}.weight") for target in targets)
    }
    thresholds = {name for name in state if name.endswith("neuron.v_threshold")}
    assert len(thresholds) == 14 and thresholds & changed == (thresholds if train_neurons else set())
    assert "classifier.weight" in changed and "bert.pooler.dense.weight" in changed
    merged.save_pretrained(tmp_path / "merged")
    again = SNNBertForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert torch.equal(logits(again), logits(merged))


@each_method
def test_event_driven_inference_with_adapters_and_merged(adapt, method):
    _, adapted = adapt(method)
    expected = logits(adapted)
    with torch.no_grad():
        torch.testing.assert_close(logits(event_driven(adapted, dense_above=1.0)), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match=r"call `dense\(model\)` before training"):
            adapted.train()(**INPUTS)
        merged = merge_adapters(dense(adapted.eval()))
        torch.testing.assert_close(logits(event_driven(merged, dense_above=1.0)), expected, rtol=1e-4, atol=1e-4)


def test_scaled_inputs_are_no_spikes(make_config):
    model = SNNBertForSequenceClassification(make_config())
    config = IA3Config(target_modules=["output.dense"], feedforward_modules=["output.dense"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.5)
        dense_logits = logits(adapted)
        event_driven(adapted.eval(), dense_above=1.0)
        with pytest.raises(ValueError, match="spikes"):
            logits(adapted)
        # Merged, the scale is in the weights, and the input is spikes again.
        merged = event_driven(dense(adapted).merge_and_unload(), dense_above=1.0)
        torch.testing.assert_close(logits(merged), dense_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_peft_knows_the_default_targets(make_config, kind):
    adapted = get_peft_model(SNNBertForMaskedLM(make_config()), kind())
    targets = {name for name, module in adapted.named_modules() if hasattr(module, "base_layer")}
    assert len(targets) == 2 * (2 if kind is LoraConfig else 4)
    adapted(**INPUTS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_bfloat16_and_gradient_checkpointing(adapt):
    model, _ = adapt("lora")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = get_peft_model(model.bfloat16(), LoraConfig(r=4, **adapter_settings(model)))
    adapted.train()(**INPUTS, labels=LABELS).loss.backward()
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())


def test_settings_name_what_the_model_has(make_config):
    masked_lm = SNNBertForMaskedLM(make_config())
    assert adapter_settings(masked_lm, train_neurons=False)["modules_to_save"] is None
    with pytest.raises(TypeError, match="`model` must be an SNN-BERT, got Linear"):
        adapter_settings(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`model` must be a PeftModel of an SNN-BERT, got SNNBertForMaskedLM"):
        merge_adapters(masked_lm)
    with pytest.raises(ValueError, match="`method` must be 'lora' or 'ia3', got 'dora'"):
        adapter_settings(masked_lm, "dora")
