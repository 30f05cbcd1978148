"""What is measured on real text: spikes against the model's own outputs, run lengths against a loop."""

import math
import re

import pytest
import torch
from energy_models import SETTINGS, spikes_by_place

from modeling_snn_bert import BPSN, LIF, PSN
from modeling_snn_bert.energy import energy_report, measure_spikes
from modeling_snn_bert.energy.spike_statistics import comparison_neurons, run_length_histogram


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_spikes_are_those_of_the_models_outputs(make_with_batches, settings):
    model, batches = make_with_batches(**settings)
    statistics = measure_spikes(model, batches)
    steps, heads = model.config.num_timesteps, model.config.num_attention_heads
    spikes, pairs, totals = [], [], dict.fromkeys(model.neuron_names(), 0)
    for batch, fired_at in spikes_by_place(model, batches):
        mask = batch["attention_mask"] != 0
        for row in range(len(mask)):
            fired = {name: (x[:, row][:, mask[row]] != 0).double() for name, x in fired_at.items()}
            spikes.append([x.sum().item() / steps for x in fired.values()])
            for name, x in fired.items():
                totals[name] += x.sum((0, 1)) / steps
            per_head = {name: x.unflatten(-1, (heads, -1)).sum(-1) for name, x in fired.items()}
            pairs.append([])
            for layer in range(2):
                place = f"bert.encoder.layer.{layer}.attention.self."
                product = per_head[place + "key_neuron"] * per_head[place + "value_neuron"]
                pairs[-1].append(product.sum().item() / steps)
    lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in batches])
    assert statistics.names == model.neuron_names()
    assert torch.equal(statistics.lengths, lengths.double())
    torch.testing.assert_close(statistics.spikes, torch.tensor(spikes, dtype=torch.float64))
    torch.testing.assert_close(statistics.key_value_pairs, torch.tensor(pairs, dtype=torch.float64))
    for name, rates in zip(statistics.names, statistics.rates, strict=True):
        torch.testing.assert_close(rates, totals[name] / lengths.sum())
        assert 0 < rates.mean() < 1


def test_example_is_the_first_sequence(make_with_batches, tokenizer, texts):
    model, batches = make_with_batches(spike_type="ternary")
    statistics = measure_spikes(model, batches)
    assert statistics.example_ids == tokenizer(texts[0])["input_ids"]
    with torch.no_grad():
        outputs = model(**tokenizer(texts[:1], return_tensors="pt"), output_spikes=True)
    for example, wanted in zip(statistics.example_spikes, outputs.spikes, strict=True):
        assert torch.equal(example.float(), wanted[0]) and wanted.any()


def test_run_length_histogram():
    fired = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    # The third dimension is channels: the same trains once along the rows, once along the channels.
    for trains in (fired[:, :, None], fired.T[None]):
        assert run_length_histogram(trains).tolist() == [0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_run_lengths_against_a_loop(make_with_batches, settings):
    model, batches = make_with_batches(**settings)
    report = energy_report(model, batches)
    lengths, rates = [], {}
    for batch, spikes in spikes_by_place(model, batches):
        mask = batch["attention_mask"] != 0
        for name, fired in spikes.items():
            for row in range(len(mask)):
                # [time, trains]: along the tokens, or along the time-steps of every token.
                trains = fired[:, row][:, mask[row]] != 0
                trains = trains[0] if len(trains) == 1 else trains.flatten(1)
                for train in trains.T.tolist():
                    runs = re.findall("1+", "".join(str(int(f)) for f in train))
                    lengths += [len(run) for run in runs]
                rates.setdefault(name, []).append((fired[:, row][:, mask[row]] != 0).flatten(0, 1).double())
    mean_rates = torch.cat([torch.cat(parts).mean(0) for parts in rates.values()])
    own = report.statistics.run_lengths[0]
    assert own.name == "this model's neurons" and own.channels == 2 * (6 * 32 + 48)
    assert own.mean == pytest.approx(sum(lengths) / len(lengths))
    assert own.percentile_99 == sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
    assert own.firing_rate == pytest.approx(mean_rates.mean().item()) and own.firing_rate > 0
    assert own.uninterrupted == pytest.approx((mean_rates > 0.95).double().mean().item())
    names = [runs.name for runs in report.statistics.run_lengths]
    assert any("without reset and normalisation" in name for name in names)
    assert any("LIF" in name for name in names) == (model.config.neuron_type != "lif")


def test_comparison_neurons_have_the_same_thresholds_and_decays():
    neuron = BPSN(6, 3)
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.uniform_(0.2, 0.9)
    others = comparison_neurons(neuron, 0.5)
    assert set(others) == {"without reset", "without reset and normalisation", "LIF"}
    for other in others.values():
        assert torch.equal(other.v_threshold, neuron.v_threshold)
        decay = other.decay if isinstance(other, LIF) else other.decay_forward
        assert torch.equal(decay, neuron.decay_forward)
    assert torch.equal(others["without reset"].decay_backward, neuron.decay_backward)
    assert not others["without reset"].reset_iterations and others["without reset"].normalize
    current = torch.full((1, 40, 6), 0.6)
    with torch.no_grad():
        neuron.v_threshold.fill_(0.7)
        neuron.decay_forward_logit.fill_(1.0)
        neuron.decay_backward_logit.fill_(1.0)
    others = comparison_neurons(neuron, 0.5)
    # A constant current below the threshold: silence, and firing without end.
    assert not neuron(current).any() and not others["without reset"](current).any()
    assert others["without reset and normalisation"](current).mean() > 0.9
    lif = LIF(6, 3, decay=0.3)
    (same,) = comparison_neurons(lif, 0.5).values()
    assert torch.equal(same.decay_forward, lif.decay) and not same.bidirectional
    assert comparison_neurons(PSN(6, 3, length=4), 0.5)["LIF"].decay.tolist() == pytest.approx([0.5] * 3)


def test_model_is_left_as_it_was(make_with_batches):
    model, batches = make_with_batches()
    model.train()
    energy_report(model, batches)
    assert model.training and all(not m._forward_hooks for m in model.modules())


def test_bad_arguments(make_with_batches):
    model, batches = make_with_batches()
    with pytest.raises(TypeError, match="`model` must be an SNN-BERT, got Linear"):
        energy_report(torch.nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="at least one batch"):
        energy_report(model, [])
    with pytest.raises(ValueError, match=r"must hold `input_ids`, got the keys \['labels'\]"):
        energy_report(model, [{"labels": torch.ones(2)}])
    empty = {**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    with pytest.raises(ValueError, match="at least one valid token"):
        energy_report(model, [empty])
