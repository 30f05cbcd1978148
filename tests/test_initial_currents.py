"""The thresholds of a fresh model: against currents drawn at random, and in models of many settings."""

import pytest
import torch

from modeling_snn_bert import SNNBertConfig, SNNBertModel, leaky_integration
from modeling_snn_bert.initial_currents import InitialCurrents

INTEGRATIONS = [{}, {"normalize": False}, {"bidirectional": False}, {"normalize": False, "bidirectional": False}]


@pytest.mark.parametrize("settings", INTEGRATIONS, ids=str)
@pytest.mark.parametrize("spike_type", ["binary", "ternary"])
def test_a_neuron_on_normed_currents_fires_as_often_as_it_says(settings, spike_type):
    torch.manual_seed(0)
    config = SNNBertConfig(decay=0.4, v_threshold=0.8, spike_type=spike_type, **settings)
    currents = InitialCurrents(config)
    decays = torch.tensor([0.4]), torch.tensor([0.4 if config.bidirectional else 0.0])
    # Far from either end of the sequence.
    potential = leaky_integration(torch.randn(1, 40, 50_000), *decays, normalize=config.normalize)[0, 20]
    assert potential.std().item() == pytest.approx(currents.gain_of_deviation, rel=0.02)
    fires = potential.abs() if spike_type == "ternary" else potential
    assert (fires >= currents.normed()).float().mean().item() == pytest.approx(currents.firing_rate, rel=0.03)
    mean = leaky_integration(torch.ones(1, 40, 1), *decays, normalize=config.normalize)[0, 20].item()
    assert mean == pytest.approx(currents.gain_of_mean, rel=1e-5)


def test_a_linear_adds_up_as_many_weights_as_spikes_arrive():
    torch.manual_seed(0)
    config = SNNBertConfig(decay=1e-6, v_threshold=1.0, initializer_range=0.05)
    currents = InitialCurrents(config)
    spikes = (torch.rand(4000, 300) < currents.firing_rate).float()
    current = spikes @ (0.05 * torch.randn(300, 200))
    assert current.std().item() == pytest.approx(currents.linear(300), rel=0.03)
    assert InitialCurrents(SNNBertConfig(neuron_type="lif", v_threshold=1.5)).normed() == 1.5


@pytest.mark.parametrize("decay", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("v_threshold", [1.0, 2.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"spike_type": "ternary"}, {"attention_type": "spiking"}, {"normalize": False}, {"bidirectional": False}],
    ids=["default", "ternary", "spiking-attention", "no-normalization", "forward"],
)
def test_no_layer_starts_silent_whatever_the_decay(decay, v_threshold, settings):
    config = SNNBertConfig(
        vocab_size=500,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        decay=decay,
        v_threshold=v_threshold,
        **settings,
    )
    model = SNNBertModel(config).eval()
    outputs = model(torch.randint(5, 500, (4, 64)), output_firing_rates=True)
    assert all(rate.mean() > 0.005 for rate in outputs.firing_rates)
