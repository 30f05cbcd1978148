"""The energy report: its counts against hooks, a second counter and arithmetic by hand; its files and command line."""

import json
import math
import re
import sys

import neurobench_wheels
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from modeling_snn_bert import (
    BPSN,
    LIF,
    PSN,
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)
from modeling_snn_bert.energy import energy_report, load_model, read_texts, tokenized_batches
from modeling_snn_bert.energy_plots import plot_firing_rates, plot_spikes
from modeling_snn_bert.layer_places import LINEARS
from modeling_snn_bert.operation_counts import (
    FLOAT32,
    INT8,
    OperationCount,
    bert_operations,
    neuron_costs,
    spiking_cost,
)
from modeling_snn_bert.spike_statistics import comparison_neurons, measure_spikes, run_length_histogram

SETTINGS = {
    "bpsn": {},
    "ternary": {"spike_type": "ternary"},
    "lif": {"neuron_type": "lif"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "psn": {"neuron_type": "psn", "psn_length": 32},
    "spiking-attention": {"attention_type": "spiking"},
    "spiking-ternary-repeat": {
        "attention_type": "spiking",
        "spike_type": "ternary",
        "neuron_type": "lif",
        "coding": "repeat",
        "num_timesteps": 2,
    },
}
HEADS = {
    "base": SNNBertModel,
    "masked-lm": SNNBertForMaskedLM,
    "sequence": SNNBertForSequenceClassification,
    "token": SNNBertForTokenClassification,
    "question": SNNBertForQuestionAnswering,
    "choice": SNNBertForMultipleChoice,
}


@pytest.fixture
def make(make_config, tokenizer, texts):
    """A function that returns a model and batches of the sentences, padded."""

    def build(head=SNNBertForSequenceClassification, **settings):
        torch.manual_seed(0)
        model = head(make_config(**settings)).eval()
        return model, tokenized_batches(model, tokenizer, texts, batch_size=4)

    return build


def rows_of(cost, part):
    return [row for row in cost.rows if row.part == part]


def spikes_by_place(model, batches):
    """All spikes, `[time-steps, sequences, tokens, channels]` per neuron layer, of each batch."""
    for batch in batches:
        with torch.no_grad():
            spikes = model(**batch, output_spikes=True).spikes
        steps = model.config.num_timesteps
        unfolded = [s.unflatten(0, (steps, -1)) for s in spikes]
        yield batch, dict(zip(model.neuron_names(), unfolded, strict=True))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_linears_are_counted_spike_by_spike(make, settings, texts):
    """Each Linear's ACs, against hooks that look at what it really receives."""
    model, batches = make(**settings)
    seen = {}

    def count(name):
        def hook(module, args):
            seen[name] = seen.get(name, 0) + (args[0] != 0).sum().item() * module.out_features

        return hook

    linears = {n: m for n, m in model.bert.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(count(name))
    report = energy_report(model, batches)
    assert all(0 < rate < 1 for rate in report.firing_rates().values())
    rows = rows_of(report.cost, "Linear")
    assert len(rows) == len(linears) == 2 * len(LINEARS)
    # Once by `measure_spikes`, and nothing else ran.
    for row in rows:
        assert row.macs == row.multiplications == 0
        assert row.additions * len(texts) == pytest.approx(seen[f"layer.{row.layer}.{row.name}"])
    rate = report.statistics.rates[0].mean().item()
    tokens = report.statistics.lengths.mean().item() * model.config.num_timesteps
    query = next(row for row in rows if row.name == "attention.self.query")
    assert query.additions == pytest.approx(rate * 32 * 32 * tokens)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_attention_is_counted_spike_by_spike(make, settings, texts):
    """By loops over heads and tokens that perform the products as additions, and count them."""
    model, batches = make(**settings)
    scores = contexts = 0
    for batch, spikes in spikes_by_place(model, batches):
        mask = batch["attention_mask"] != 0
        for layer in range(2):
            prefix = f"bert.encoder.layer.{layer}.attention.self"
            q, k, v = (spikes[f"{prefix}.{name}_neuron"] != 0 for name in ("query", "key", "value"))
            for step in range(model.config.num_timesteps):
                for row in range(len(mask)):
                    a, b, c = (x[step, row][mask[row]].long() for x in (q, k, v))
                    if model.config.attention_type == "softmax":
                        scores += (torch.ones_like(a) @ b.T).sum().item()
                        contexts += (torch.ones(len(c), len(c), dtype=torch.long) @ c).sum().item()
                        continue
                    for head in range(4):
                        here = slice(8 * head, 8 * head + 8)
                        scores += (b[:, here].T @ c[:, here]).sum().item()
                        contexts += (a[:, here] @ torch.ones(8, 8, dtype=torch.long)).sum().item()
    cost = energy_report(model, batches, run_lengths=False).cost
    assert 0 < scores == pytest.approx(len(texts) * sum(row.additions for row in rows_of(cost, "QK^T")))
    assert 0 < contexts == pytest.approx(len(texts) * sum(row.additions for row in rows_of(cost, "attention x V")))
    assert all(row.macs == 0 for row in cost.rows if row.is_matrix_product)
    assert bool(rows_of(cost, "softmax")) == (model.config.attention_type == "softmax")


def test_products_of_queries_and_keys_need_no_multiplication(make):
    """With gain and offset the scores are sums of the affine query's components, picked by the keys' spikes."""
    model, batches = make()
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.query_gain.uniform_(0.5, 2)
        attention.query_offset.uniform_(-1, 1)
    batch, spikes = next(iter(spikes_by_place(model, batches[:1])))
    query = spikes["bert.encoder.layer.0.attention.self.query_neuron"][0, 0]
    key = spikes["bert.encoder.layer.0.attention.self.key_neuron"][0, 0]
    affine = torch.where(query == 1, attention.query_gain + attention.query_offset, attention.query_offset).detach()
    n = int(batch["attention_mask"][0].sum())
    summed, additions = torch.zeros(n, n), 0
    for t in range(n):
        for j in range(n):
            picked = affine[t][key[j] == 1]
            additions += len(picked)
            summed[t, j] = picked.sum()
    product = (query * attention.query_gain + attention.query_offset)[:n] @ key[:n].T
    torch.testing.assert_close(summed, product.detach())
    one = [{name: x[:1] for name, x in batches[0].items()}]
    row = rows_of(energy_report(model, one, run_lengths=False).cost, "QK^T")[0]
    assert row.additions == additions > 0


@pytest.mark.parametrize("settings", ["bpsn", "ternary", "repeat", "spiking-attention"])
def test_second_counter_agrees(make, settings, texts):
    """NeuroBench's effective ACs and MACs, on every Linear, of the encoder and behind it, on real text."""
    torch_model, synaptic_operations, layer_operations = neurobench_wheels.load()
    model, batches = make(**SETTINGS[settings])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}

    class TakesOneBatch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch).logits

    wrapped = torch_model(TakesOneBatch())
    wrapped.register_hooks()
    metric = synaptic_operations()
    counted = dict.fromkeys(layers, 0)
    spiking = {}
    with torch.no_grad():
        for batch in batches:
            logits = wrapped(batch)
            names = {id(module): name for name, module in layers.items()}
            for hook in wrapped.connection_hooks:
                name = names[id(hook.layer)]
                for (inputs,) in hook.inputs:
                    hook.hook.remove()
                    operations, spiking[name] = layer_operations(inputs, hook.layer)
                    hook.register_hook()
                    counted[name] += operations
            totals = metric(wrapped, logits, (logits, None))
            wrapped.reset_hooks()
    wrapped.cleanup_hooks()
    cost = energy_report(model, batches, run_lengths=False).cost
    for row in rows_of(cost, "Linear"):
        name = f"bert.encoder.layer.{row.layer}.{row.name}"
        assert spiking.pop(name), f"{name} takes something else than spikes"
        assert counted[name] == pytest.approx(len(texts) * row.additions) and counted[name] > 0
    assert set(spiking) == {"bert.pooler.dense", "classifier"} and not any(spiking.values())
    linear_acs = sum(row.additions for row in rows_of(cost, "Linear"))
    assert totals["Effective_ACs"] == pytest.approx(linear_acs)
    # The tanh of the pooler is in our row and not in NeuroBench's.
    read_out = [*rows_of(cost, "pooler"), *rows_of(cost, "classifier")]
    dense = {row.name: layers[row.name].weight.numel() for row in read_out}
    assert {name: counted[name] / len(texts) for name in dense} == dense
    assert totals["Effective_MACs"] == pytest.approx(sum(dense.values()))


def test_bert_is_counted_as_torch_counts_it():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, 12)))
    rows = bert_operations(config, torch.tensor([12.0]))
    assert sum(row.macs for row in rows if row.is_matrix_product) == counter.get_total_flops() / 2


def test_bert_base_at_128_tokens():
    rows = bert_operations(BertConfig(), torch.tensor([128]))
    products = [row for row in rows if row.is_matrix_product]
    assert round(sum(row.macs for row in products) / 1e9, 3) == 11.174
    assert round(sum(row.picojoules for row in products) / 1e9, 1) == 51.4
    assert {row.part for row in rows} - {row.part for row in products} == set(
        "GELU,softmax,LayerNorm,residual,biases,embeddings".split(",")
    )


def test_energy_of_an_operation():
    assert OperationCount("x", additions=10).picojoules == pytest.approx(9)
    assert OperationCount("x", macs=10).picojoules == pytest.approx(46)
    assert OperationCount("x", multiplications=10).picojoules == pytest.approx(37)
    assert OperationCount("x", macs=10, arithmetic=INT8).picojoules == pytest.approx(3)
    assert FLOAT32.addition + FLOAT32.multiplication == pytest.approx(4.6)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_read_out_of_every_head(make, head, texts):
    model, batches = make(head, pad_token_id=0)
    report = energy_report(model, batches, run_lengths=False)
    tokens = report.statistics.lengths.mean().item()
    width, vocab = 32, model.config.vocab_size
    per_sequence = {"bert.pooler.dense": width * width}
    wanted = {
        SNNBertModel: {"pooler.dense": width * width},
        SNNBertForSequenceClassification: {**per_sequence, "classifier": 2 * width},
        SNNBertForMultipleChoice: {**per_sequence, "classifier": width},
        SNNBertForTokenClassification: {"classifier": 2 * width * tokens},
        SNNBertForQuestionAnswering: {"qa_outputs": 2 * width * tokens},
        SNNBertForMaskedLM: {
            "cls.predictions.transform.dense": width * width * tokens,
            "cls.predictions.decoder": width * vocab * tokens,
        },
    }[head]
    assert len(report.statistics.lengths) == len(texts)
    rows = {row.name: row for part in ("pooler", "classifier") for row in rows_of(report.cost, part)}
    for name, macs in wanted.items():
        outputs = rows.pop(name)
        activation = {"pooler": 10 * width, "transform": 14 * width * tokens}
        extra = next((value for key, value in activation.items() if key in name), 0)
        assert outputs.macs == pytest.approx(macs + extra)
    assert set(rows) <= {"cls.predictions.transform.LayerNorm"}
    # The rivals have the same read-out.
    for cost in report.costs:
        for part in ("pooler", "classifier"):
            assert sum(r.macs for r in rows_of(cost, part)) == sum(r.macs for r in rows_of(report.cost, part))


@pytest.mark.parametrize("settings", ["bpsn", "repeat", "spiking-attention"])
def test_padding_costs_nothing(make, settings):
    model, batches = make(**SETTINGS[settings])
    wider = []
    for index, batch in enumerate(batches):
        # To the right of one batch, to the left of the other, and with nonsense in it.
        pad = (0, 5) if index else (5, 0)
        padded = {name: torch.nn.functional.pad(x, pad, value=0) for name, x in batch.items()}
        padded["input_ids"] = torch.where(padded["attention_mask"] == 1, padded["input_ids"], 7)
        wider.append(padded)
    plain, padded = (energy_report(model, x).to_dict() for x in (batches, wider))
    assert plain["tokens_per_sequence"] == padded["tokens_per_sequence"]
    for a, b in zip(plain["rows"], padded["rows"], strict=True):
        assert a == pytest.approx(b)
    for a, b in zip(plain["run_lengths"], padded["run_lengths"], strict=True):
        assert a == pytest.approx(b)


def test_repeat_coding_multiplies_by_the_time_steps(make):
    model, batches = make(**SETTINGS["repeat"])
    report = energy_report(model, batches, run_lengths=False)
    with_one = {**SETTINGS["lif"]}
    single, _ = make(**with_one)
    cost = energy_report(single, batches, run_lengths=False).cost
    for part in ("neurons", "softmax", "LayerNorm", "biases", "residual"):
        repeated, once = (sum(row.picojoules for row in rows_of(c, part)) for c in (report.cost, cost))
        assert repeated == pytest.approx(3 * once)
    for part in ("embeddings", "pooler", "classifier"):
        assert rows_of(report.cost, part) == rows_of(cost, part)
    assert rows_of(report.cost, "mean over time-steps")[0].additions > 0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # Two scans, two additions, a division, a comparison; in the sweep two scans, two additions, a scaled
        # subtraction, a normalisation, a comparison. The reciprocal and the two scans of `n` are shared by 8 channels.
        ({}, (6, 5 + 6 / 8, 2)),
        ({"reset_iterations": 0}, (3, 2 + 6 / 8, 1)),
        ({"bidirectional": False}, (3, 3 + 5 / 8, 2)),
        ({"normalize": False}, (6, 5, 0)),
        ({"spike_type": "ternary"}, (8, 5 + 6 / 8, 2)),
        ({"neuron_type": "lif"}, (2, 1, 0)),
    ],
)
def test_arithmetic_of_a_neuron(make, settings, wanted):
    model, batches = make(**settings)
    statistics = measure_spikes(model, batches)
    steps = neuron_costs(model.config, statistics)
    sums = tuple(sum(getattr(s, kind) for s in steps) for kind in ("additions", "macs", "multiplications"))
    assert sums == pytest.approx(wanted)
    cost = spiking_cost(model, statistics)
    elements = 2 * (6 * 32 + 48) * statistics.lengths.mean().item()
    assert sum(row.additions for row in rows_of(cost, "neurons")) == pytest.approx(wanted[0] * elements)
    assert sum(row.macs for row in rows_of(cost, "neurons")) == pytest.approx(wanted[1] * elements)


def test_psn_pays_for_every_token_that_it_looks_at(make):
    model, batches = make(**SETTINGS["psn"])
    statistics = measure_spikes(model, batches)
    cost = spiking_cost(model, statistics)
    pairs = statistics.lengths.square().mean().item()
    assert sum(row.macs for row in rows_of(cost, "neurons")) == pytest.approx(2 * (6 * 32 + 48) * pairs)


def test_rivals(make):
    model, batches = make()
    report = energy_report(model, batches)
    costs = {cost.name: cost for cost in report.costs}
    bert, int8 = costs["BERT, float32"], costs["BERT, int8"]
    dense, sparse = (costs[name] for name in costs if "1-bit" in name)
    assert int8.matrix_product_picojoules == pytest.approx(bert.matrix_product_picojoules * 0.3 / 4.6)
    assert dense.matrix_product_picojoules == pytest.approx(bert.matrix_product_picojoules * 0.9 / 4.6)
    assert sparse.matrix_product_picojoules == pytest.approx(report.cost.matrix_product_picojoules)
    assert sparse.picojoules < min(report.cost.picojoules, dense.picojoules) and dense.picojoules < bert.picojoules
    ratios = report.matrix_product_ratios()
    assert ratios["repeat coding"] is None
    assert ratios["BERT, float32"] == bert.matrix_product_picojoules / report.cost.matrix_product_picojoules
    parameters = sum(p.numel() for n, p in model.named_parameters() if "_embeddings" not in n)
    neurons = sum(p.numel() for n, p in model.named_parameters() if "neuron." in n and "v_threshold" not in n)
    tokens = report.statistics.lengths.mean().item()
    # Without the norm of the embeddings, which is among the rows of embeddings.
    weights = 4 * (parameters - neurons + 3 * 32 * tokens)
    assert costs["SNN-BERT"].memory.weight_bytes == pytest.approx(weights)


def test_baseline(make):
    model, batches = make()
    baseline, _ = make(neuron_type="lif", coding="repeat", num_timesteps=4)
    report = energy_report(model, iter(batches), baseline=baseline)
    own = energy_report(baseline, batches, run_lengths=False).cost
    assert report.baseline.matrix_product_picojoules == own.matrix_product_picojoules
    ratio = report.matrix_product_ratios()["repeat coding"]
    assert ratio == pytest.approx(own.matrix_product_picojoules / report.cost.matrix_product_picojoules) and ratio > 1
    assert f"{ratio:.2f} (measured" in report.to_markdown()
    with pytest.raises(ValueError, match=r"`baseline` must have `coding='repeat'`, got 'individual'"):
        energy_report(model, batches, baseline=model)
    with pytest.raises(TypeError, match="`baseline` must be an SNN-BERT, got Linear"):
        energy_report(model, batches, baseline=torch.nn.Linear(2, 2))


def test_run_length_histogram():
    fired = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    # The third dimension is channels: the same trains once along the rows, once along the channels.
    for trains in (fired[:, :, None], fired.T[None]):
        assert run_length_histogram(trains).tolist() == [0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_run_lengths_against_a_loop(make, settings):
    model, batches = make(**settings)
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


def test_model_is_left_as_it_was(make):
    model, batches = make()
    model.train()
    energy_report(model, batches)
    assert model.training and all(not m._forward_hooks for m in model.modules())


def test_report_files(make, tmp_path, tokenizer):
    model, batches = make(firing_rate_target=0.3)
    report = energy_report(model, batches)
    tokens = tokenizer.convert_ids_to_tokens(report.statistics.example_ids)
    files = report.save(tmp_path / "new", tokens=tokens)
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(f.name for f in files)
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert numbers == json.loads(report.to_json())
    assert numbers["settings"]["firing_rate_target"] == 0.3
    own = numbers["costs"][0]
    assert own["arithmetic_picojoules"] == pytest.approx(sum(row["picojoules"] for row in numbers["rows"]))
    assert sum(part["picojoules"] for part in own["parts"]) == pytest.approx(own["arithmetic_picojoules"])
    text = (tmp_path / "new" / "report.md").read_text()
    assert text == report.to_markdown()
    for part in ("Linear", "QK^T", "attention x V", "neurons", "softmax", "LayerNorm", "embeddings", "pooler"):
        assert f"| {part} |" in text
    for layer in range(2):
        for linear in LINEARS:
            assert f"| layer {layer}, {linear.name} |" in text
    for picture in ("energy", "firing_rates", "spikes"):
        assert (tmp_path / "new" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`tokens` must name the \d+ tokens of the first sequence, got 1"):
        report.save(tmp_path, tokens=["x"])


def test_pictures_without_matplotlib(make, tmp_path, monkeypatch):
    model, batches = make()
    report = energy_report(model, batches, run_lengths=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [f.name for f in report.save(tmp_path / "out", plots=False)] == ["report.md", "report.json"]


def test_names_and_pictures(make, tmp_path):
    model, batches = make(spike_type="ternary")
    names = model.neuron_names()
    statistics = measure_spikes(model, batches)
    plot_firing_rates(statistics.rates, names, tmp_path / "rates.png")
    words = [str(i) for i in statistics.example_ids]
    for panels in (1, 3):
        plot_spikes(statistics.example_spikes[:panels], names[:panels], words, tmp_path / f"spikes{panels}.png")
    for name in ("rates", "spikes1", "spikes3"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments(make):
    model, batches = make()
    with pytest.raises(TypeError, match="`model` must be an SNN-BERT, got Linear"):
        energy_report(torch.nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="at least one batch"):
        energy_report(model, [])
    with pytest.raises(ValueError, match=r"must hold `input_ids`, got the keys \['labels'\]"):
        energy_report(model, [{"labels": torch.ones(2)}])
    empty = {**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    with pytest.raises(ValueError, match="at least one valid token"):
        energy_report(model, [empty])


FILES = {
    "x.txt": "the old clock\n\nit rained\n",
    "x.csv": 'sentence,label\n"the ""old"" clock, again",1\nit rained,0\n',
    "x.tsv": 'sentence\tlabel\nthe "old clock\t1\nit rained\t0\n',
    "x.json": '[{"sentence": "the old clock"}, {"sentence": "it rained"}]',
    "x.jsonl": '{"sentence": "the old clock"}\n{"sentence": "it rained"}\n',
    "list.json": '["the old clock", "it rained"]',
}
BAD_FILES = {
    "x.pdf": ("a", "must be a .txt, .csv, .tsv, .json or .jsonl file"),
    "x.txt": ("\n \n", "holds no texts"),
    "x.csv": ("text\na\n", "line 2: has no column 'sentence', only ['text']"),
    "x.json": ("{", "is not JSON"),
    "x.jsonl": ('{"sentence": 3}', "line 1: must hold a text, got 3"),
    "numbers.json": ("[1, 2]", "row 1: must hold a text, got 1"),
}


@pytest.mark.parametrize("name", FILES)
def test_texts(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    texts = read_texts(tmp_path / name, "sentence")
    first = {"x.csv": 'the "old" clock, again', "x.tsv": 'the "old clock'}.get(name, "the old clock")
    assert texts == [first, "it rained"]


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_texts(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_texts(tmp_path / name, "sentence")


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_checkpoint_of_every_head(make, head, tmp_path, tokenizer, texts):
    model, batches = make(head)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is head
    wanted, got = (energy_report(m, batches, run_lengths=False).to_dict() for m in (model, loaded))
    assert wanted == got
