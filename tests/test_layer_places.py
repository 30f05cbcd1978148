"""The table of a layer's places, against a model and a BERT that run."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from modeling_snn_bert import SNNBertModel, SpikingNeuron
from modeling_snn_bert.layer_places import LINEARS, PLACES, place_of, short_name


def test_places_are_those_of_the_model(make_config, tokenizer, texts, assert_spikes_flow):
    """Hooks see which neuron gives what a Linear takes, and which Linear gives what a neuron takes."""
    model = SNNBertModel(make_config()).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    order, taken, given = [], {}, {}

    def see(name):
        def hook(module, args, output):
            order.append(name)
            taken[name], given[name] = args[0], output

        return hook

    layer = model.encoder.layer[1]
    kinds = {name: type(module) for name, module in layer.named_modules()}
    for name, module in layer.named_modules():
        if isinstance(module, (SpikingNeuron, nn.Linear)):
            module.register_forward_hook(see(name))
    assert_spikes_flow(model, **batch)
    neurons = [name for name in order if issubclass(kinds[name], SpikingNeuron)]
    assert neurons == [place.neuron for place in PLACES]
    assert {name for name in order if name not in neurons} == set(LINEARS)
    for place in PLACES:
        spikes = given[place.neuron]
        assert spikes.shape[-1] == getattr(model.config, place.width)
        assert [name for name in order if taken[name] is spikes] == list(place.linears)
        sources = [linear for linear in LINEARS if given[linear] is taken[place.neuron]]
        assert sources == ([] if place.source is None else [place.source])
    for linear, settings in LINEARS.items():
        module = layer.get_submodule(linear)
        sizes = tuple(getattr(model.config, name) for name in settings)
        assert (module.in_features, module.out_features) == sizes


def test_linears_have_the_names_of_a_bert():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    layer = BertModel(config).encoder.layer[0]
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert set(linears) == set(LINEARS)
    for linear, (inputs, outputs) in LINEARS.items():
        assert linears[linear].weight.shape == torch.Size((getattr(config, outputs), getattr(config, inputs)))


def test_place_of_every_neuron(make_config):
    model = SNNBertModel(make_config())
    for prefix in ("", "bert.", "base_model.model.bert."):
        found = [place_of(prefix + name) for name in model.neuron_names()]
        assert found == [(layer, place) for layer in range(2) for place in PLACES]
    assert short_name("bert.encoder.layer.11.attention.self.query_neuron") == "layer 11, query"
    assert [short_name(name) for name in model.neuron_names()] == [
        f"layer {layer}, {place}"
        for layer in range(2)
        for place in ("attention input", "query", "key", "value", "attention output", "MLP input", "MLP hidden")
    ]


@pytest.mark.parametrize("name", ["", "neuron", "layer.x.output.neuron", "encoder.layer.0.output", "layer.0"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="`name` must be that of a neuron in a layer"):
        place_of(name)
