"""Outputs: their fields, what a head passes on, and the firing rate by hand."""

from dataclasses import fields

import pytest
import torch

from modeling_snn_bert import outputs

SPIKING = [field.name for field in fields(outputs.SpikingOutput)]
CLASSES = [kind for name, kind in vars(outputs).items() if name.startswith("SNNBert")]


@pytest.mark.parametrize("output_class", CLASSES, ids=lambda kind: kind.__name__)
def test_fields_are_those_of_transformers_and_then_ours(output_class):
    names = [field.name for field in fields(output_class)]
    (original,) = (base for base in output_class.__bases__ if base is not outputs.SpikingOutput)
    assert names == [field.name for field in fields(original)] + SPIKING
    assert all(name in output_class.__doc__ for name in SPIKING)


def test_a_head_passes_on_what_there_is():
    states, rates = (torch.ones(1),), (torch.zeros(1, 2),)
    base = outputs.SNNBertModelOutput(last_hidden_state=torch.ones(1), hidden_states=states, firing_rates=rates)
    head = outputs.SNNBertMaskedLMOutput(logits=torch.ones(1), **outputs.recorded(base))
    assert head.hidden_states is states and head.firing_rates is rates
    assert head.keys() == {"logits", "hidden_states", "firing_rates"}


def test_firing_rate_by_hand():
    # Two time-steps of a batch of two, three tokens, two channels.
    spikes = torch.tensor(
        [
            [[1, 0], [1, -1], [0, 0]],
            [[0, 0], [0, 0], [0, 0]],
            [[1, 0], [0, 0], [0, 0]],
            [[0, 1], [0, 0], [0, 0]],
        ]
    ).float()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert outputs.firing_rate(spikes, None)[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert outputs.firing_rate(spikes[:2], mask).tolist() == [[1.0, 0.5], [0.0, 0.0]]
    # A row without any valid token is divided by 1.
    assert outputs.firing_rate(spikes, mask, num_timesteps=2).tolist() == [[0.75, 0.25], [0.0, 0.5]]
