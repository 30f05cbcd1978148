"""The observer of neurons: what it sees is what the model itself gives, and it leaves nothing behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_snn_bert import BPSN, SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.adapters import adapter_settings
from modeling_snn_bert.spike_observer import SpikeObserver, named_neurons


class Keeps(SpikeObserver):
    def __init__(self, model):
        super().__init__(model)
        self.firings = []

    def see(self, firing):
        self.firings.append(firing)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [{}, {"spike_type": "ternary"}, {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 2}],
    ids=["binary", "ternary", "repeat"],
)
def test_sees_what_the_model_gives(make_config, tokenizer, texts, assert_spikes_flow, settings):
    model = SNNBertModel(make_config(**settings)).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert_spikes_flow(model, **batch)
    before = hooks(model)
    with Keeps(model) as observer, torch.no_grad():
        spikes = model(**batch, output_spikes=True).spikes
    assert hooks(model) == before
    model(**batch)
    assert [firing.name for firing in observer.firings] == model.neuron_names()
    steps, lengths = model.config.num_timesteps, batch["attention_mask"].sum()
    for firing, wanted in zip(observer.firings, spikes, strict=True):
        assert firing.neuron is model.get_submodule(firing.name)
        assert torch.equal(firing.spikes, wanted)
        assert torch.equal(firing.neuron(firing.current, firing.token_mask), wanted)
        assert firing.tokens == steps * lengths


def test_masks_however_they_are_given():
    neuron, current = BPSN(8, 2, v_threshold=0.1), torch.randn(2, 5, 8)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    observer = Keeps(nn.ModuleDict({"neuron": neuron}))
    observer.start()
    neuron(current)
    neuron(current, mask)
    neuron(attention_mask=mask, current=current)
    observer.stop()
    neuron(current)
    assert [int(firing.tokens) for firing in observer.firings] == [10, 5, 5]
    assert all(firing.current is current and 0 < firing.spikes.mean() < 1 for firing in observer.firings)


def test_stops_when_the_model_fails(make_config):
    model = SNNBertModel(make_config())
    before = hooks(model)
    with pytest.raises(ValueError, match="input_ids"), Keeps(model):
        model()
    assert hooks(model) == before


def test_neurons_inside_an_adapter(make_config, tokenizer, texts):
    """The neurons that PEFT trains are copies; each neuron layer is seen once, and is the one that runs."""
    model = SNNBertForSequenceClassification(make_config())
    names = [name for name, _ in named_neurons(model)]
    assert names == model.neuron_names()
    adapted = get_peft_model(model, LoraConfig(r=2, **adapter_settings(model))).eval()
    assert len(named_neurons(adapted)) == 2 * len(names)
    with Keeps(adapted) as observer, torch.no_grad():
        adapted(**tokenizer(texts, padding=True, return_tensors="pt"))
    assert [firing.name for firing in observer.firings] == [f"base_model.model.{name}" for name in names]
    assert all(firing.neuron.v_threshold.requires_grad for firing in observer.firings)


def test_see_is_for_the_counter_to_write():
    neuron = BPSN(8, 2)
    with pytest.raises(NotImplementedError), SpikeObserver(nn.ModuleDict({"neuron": neuron})):
        neuron(torch.randn(1, 3, 8))
    assert not neuron._forward_hooks
