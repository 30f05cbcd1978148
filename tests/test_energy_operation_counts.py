"""Counts of operations against hooks, a second counter and arithmetic by hand."""

import neurobench_wheels
import pytest
import torch
from energy_models import SETTINGS, rows_of, spikes_by_place
from heads import MODELS
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from modeling_snn_bert import (
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)
from modeling_snn_bert.energy import energy_report, measure_spikes
from modeling_snn_bert.energy.operation_counts import (
    FLOAT32,
    INT8,
    OperationCount,
    bert_operations,
    neuron_costs,
    spiking_cost,
)
from modeling_snn_bert.layer_places import LINEARS


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_linears_are_counted_spike_by_spike(make_with_batches, settings, texts):
    """Each Linear's ACs, against hooks that look at what it really receives."""
    model, batches = make_with_batches(**settings)
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
def test_attention_is_counted_spike_by_spike(make_with_batches, settings, texts):
    """By loops over heads and tokens that perform the products as additions, and count them."""
    model, batches = make_with_batches(**settings)
    scores = contexts = bias = 0
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
                        bias += 4 * len(a) ** 2
                        continue
                    # The term of the bias, and its sum with the other one.
                    bias += (torch.ones(len(c), len(c), dtype=torch.long) @ c).sum().item() + c.numel()
                    for head in range(4):
                        here = slice(8 * head, 8 * head + 8)
                        scores += (b[:, here].T @ c[:, here]).sum().item()
                        contexts += (a[:, here] @ torch.ones(8, 8, dtype=torch.long)).sum().item()
    cost = energy_report(model, batches, run_lengths=False).cost
    assert 0 < scores == pytest.approx(len(texts) * sum(row.additions for row in rows_of(cost, "QK^T")))
    assert 0 < contexts == pytest.approx(len(texts) * sum(row.additions for row in rows_of(cost, "attention x V")))
    has_bias = model.config.relative_attention_num_buckets > 0
    counted = sum(row.additions for row in rows_of(cost, "position bias"))
    assert len(texts) * counted == pytest.approx(bias if has_bias else 0)
    assert all(row.macs == 0 for row in cost.rows if row.is_matrix_product)
    assert bool(rows_of(cost, "softmax")) == (model.config.attention_type == "softmax")


def test_products_of_queries_and_keys_need_no_multiplication(make_with_batches):
    """With gain and offset the scores are sums of the affine query's components, picked by the keys' spikes."""
    model, batches = make_with_batches()
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
def test_second_counter_agrees(make_with_batches, settings, texts):
    """NeuroBench's effective ACs and MACs, on every Linear, of the encoder and behind it, on real text."""
    torch_model, synaptic_operations, layer_operations = neurobench_wheels.load()
    model, batches = make_with_batches(**SETTINGS[settings])
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


@pytest.mark.parametrize("head", MODELS.values(), ids=MODELS)
def test_read_out_of_every_head(make_with_batches, head, texts):
    model, batches = make_with_batches(head, pad_token_id=0)
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
def test_padding_costs_nothing(make_with_batches, settings):
    model, batches = make_with_batches(**SETTINGS[settings])
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


def test_repeat_coding_multiplies_by_the_time_steps(make_with_batches):
    model, batches = make_with_batches(**SETTINGS["repeat"])
    report = energy_report(model, batches, run_lengths=False)
    with_one = {**SETTINGS["lif"]}
    single, _ = make_with_batches(**with_one)
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
def test_arithmetic_of_a_neuron(make_with_batches, settings, wanted):
    model, batches = make_with_batches(**settings)
    statistics = measure_spikes(model, batches)
    steps = neuron_costs(model.config, statistics)
    sums = tuple(sum(getattr(s, kind) for s in steps) for kind in ("additions", "macs", "multiplications"))
    assert sums == pytest.approx(wanted)
    cost = spiking_cost(model, statistics)
    elements = 2 * (6 * 32 + 48) * statistics.lengths.mean().item()
    assert sum(row.additions for row in rows_of(cost, "neurons")) == pytest.approx(wanted[0] * elements)
    assert sum(row.macs for row in rows_of(cost, "neurons")) == pytest.approx(wanted[1] * elements)


def test_psn_pays_for_every_token_that_it_looks_at(make_with_batches):
    model, batches = make_with_batches(**SETTINGS["psn"])
    statistics = measure_spikes(model, batches)
    cost = spiking_cost(model, statistics)
    pairs = statistics.lengths.square().mean().item()
    assert sum(row.macs for row in rows_of(cost, "neurons")) == pytest.approx(2 * (6 * 32 + 48) * pairs)


def test_rivals(make_with_batches):
    model, batches = make_with_batches()
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
