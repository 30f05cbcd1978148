"""Firing rates, operation counts and pictures."""

import pytest
import torch
from transformers import BertConfig, BertModel

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification
from modeling_snn_bert.energy import (
    NEURON_PLACES,
    OperationCount,
    bert_multiplications,
    measure_spikes,
    operation_counts,
    plot_firing_rates,
    plot_spikes,
    short_name,
)

SETTINGS = {
    "bpsn": {},
    "ternary": {"spike_type": "ternary"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "spiking-attention": {"attention_type": "spiking"},
}


def make_model(**settings):
    torch.manual_seed(0)
    config = SNNBertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **settings
    )
    return SNNBertForSequenceClassification(config)


def make_batches():
    torch.manual_seed(1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return [
        {"input_ids": torch.randint(1, 100, (4, 10)), "attention_mask": mask, "labels": torch.zeros(4)},
        {"input_ids": torch.randint(1, 100, (2, 7))},
    ]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_additions_of_the_linears_are_counted_spike_by_spike(settings):
    """Against hooks that look at what each Linear of the encoder really receives."""
    model, batches = make_model(**settings).eval(), make_batches()
    additions = [0.0]

    def count(module, args):
        (spikes,) = args
        additions[0] += (spikes.abs().sum() * module.out_features).item()

    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    statistics = measure_spikes(model, batches)
    assert all(0 < rate.mean() < 1 for rate in statistics.rates)
    rows = {row.name: row for row in operation_counts(model, statistics)}
    linears = [m for m in model.bert.encoder.modules() if isinstance(m, torch.nn.Linear)]
    tokens = statistics.lengths.sum().item() * model.config.num_timesteps
    biases = sum(linear.out_features for linear in linears) * tokens
    assert rows["linear layers"].additions * 6 == pytest.approx(additions[0] + biases, rel=1e-5)
    assert rows["linear layers"].multiplications == 0
    assert ("softmax" in rows) == (model.config.attention_type == "softmax")


def test_attention_is_counted_spike_by_spike():
    model = make_model().eval()
    batch = {"input_ids": torch.randint(1, 100, (3, 9))}
    rows = {row.name: row for row in operation_counts(model, measure_spikes(model, [batch]))}
    spikes = dict(zip(model.neuron_names(), model(**batch, output_spikes=True).spikes, strict=True))
    for row, end in (("attention scores (q k)", "key_neuron"), ("attention contexts (weights v)", "value_neuron")):
        wanted = sum(s.sum().item() for name, s in spikes.items() if name.endswith(end)) * 9 / 3
        assert wanted > 0 and rows[row].additions == pytest.approx(wanted)


def test_bert_is_counted_as_torch_counts_it():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, 12)))
    assert bert_multiplications(config, torch.tensor([12.0])) == counter.get_total_flops() / 2


def test_bert_base_at_128_tokens():
    macs = bert_multiplications(BertConfig(), torch.tensor([128.0]))
    assert round(macs / 1e9, 3) == 11.174
    assert round(OperationCount("", multiplications=macs).picojoules / 1e9, 1) == 51.4


def test_statistics_leave_the_mode_alone():
    model = make_model().train()
    measure_spikes(model, make_batches())
    assert model.training


def test_names():
    names = make_model().neuron_names()
    assert [short_name(name) for name in names] == [
        f"layer {layer}, {place}" for layer in range(2) for place in NEURON_PLACES.values()
    ]


def test_pictures(tmp_path):
    model, batches = make_model(spike_type="ternary").eval(), make_batches()
    plot_firing_rates(measure_spikes(model, batches).rates, model.neuron_names(), tmp_path / "rates.png")
    spikes = model(input_ids=batches[1]["input_ids"], output_spikes=True).spikes
    for panels in (1, 3):
        names = model.neuron_names()[:panels]
        plot_spikes([s[0] for s in spikes[:panels]], names, list("abcdefg"), tmp_path / f"spikes{panels}.png")
    for name in ("rates", "spikes1", "spikes3"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be an SNN-BERT"):
        measure_spikes(torch.nn.Linear(2, 2), make_batches())
    with pytest.raises(ValueError, match="at least one batch"):
        measure_spikes(make_model(), [])
