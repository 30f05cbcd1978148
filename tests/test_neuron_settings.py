"""The ranges of the neurons' settings, which the configuration and the neurons share, and the types of BPSN."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_snn_bert import BPSN, LIF, PSN, SNNBertConfig
from modeling_snn_bert.neuron_settings import BPSNParameters, BPSNSettings

OF_ALL = [
    ("v_threshold", math.nan, "`v_threshold` must be finite, got nan"),
    ("surrogate", "step", "`surrogate` must be one of"),
    ("surrogate_alpha", 0.0, "`surrogate_alpha` must be positive and finite, got 0.0"),
]
OF_DECAYING = [("decay", 1.0, r"`decay` must lie in \(0, 1\), got 1.0")]
OF_BPSN = [
    ("reset", -0.5, "`reset` must be finite and >= 0, got -0.5"),
    ("reset", math.inf, "`reset` must be finite and >= 0, got inf"),
    ("reset_iterations", -1, "`reset_iterations` must be >= 0, got -1"),
    ("implementation", "fft", "`implementation` must be 'auto' or one of .* got 'fft'"),
]


@pytest.mark.parametrize(
    ("neuron", "cases"),
    [
        (BPSN, OF_ALL + OF_DECAYING + OF_BPSN),
        (LIF, OF_ALL + OF_DECAYING),
        (lambda *sizes, **settings: PSN(*sizes, length=4, **settings), OF_ALL),
    ],
    ids=["bpsn", "lif", "psn"],
)
def test_neurons_refuse_what_is_out_of_range(neuron, cases):
    for name, value, message in cases:
        with pytest.raises(ValueError, match=message):
            neuron(8, 2, **{name: value})


@pytest.mark.parametrize(("name", "value", "message"), OF_ALL + OF_DECAYING + OF_BPSN)
def test_the_configuration_refuses_the_same_in_the_same_words(name, value, message):
    name = {"implementation": "integration"}.get(name, name)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        SNNBertConfig(**{name: value})


def test_what_a_neuron_lacks_is_zero_in_its_equations():
    whole = BPSNParameters(torch.ones(4), torch.zeros(2), torch.ones(2), torch.tensor([-0.5, 0.25]))
    values = whole.values(torch.float64)
    assert {x.dtype for x in values} == {torch.float64}
    assert values.decay_forward.tolist() == [0.5, 0.5] and values.reset.tolist() == [0.5, 0.25]
    torch.testing.assert_close(values.decay_backward, torch.ones(2).sigmoid().double())
    values = whole._replace(decay_backward_logit=None, reset_strength=None).values(torch.float32)
    assert values.decay_backward.tolist() == values.reset.tolist() == [0, 0]


def test_low_precision_logits_are_widened_before_the_sigmoid():
    logits = torch.tensor([-3.3], dtype=torch.bfloat16)
    parameters = BPSNParameters(torch.ones(1), logits, None, None)
    assert torch.equal(parameters.decay_forward, logits.float().sigmoid())


def test_settings_of_a_neuron():
    assert BPSN(8, 2).settings == BPSNSettings()
    neuron = BPSN(8, 2, spike_type="ternary", normalize=False, reset_iterations=0, bidirectional=False)
    assert neuron.settings == BPSNSettings(normalize=False, reset_iterations=0, ternary=True)
    assert neuron.learned == (neuron.v_threshold, neuron.decay_forward_logit, None, None)
