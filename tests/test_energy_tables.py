"""The tables of the report: their figures are those that were counted."""

import re

from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.energy.tables import (
    comparison_section,
    firing_rate_table,
    linear_section,
    markdown_table,
    neuron_section,
    operations_table,
    paper_section,
    run_length_section,
)
from modeling_snn_bert.layer_places import LINEARS, PLACES


def cells(lines):
    """The rows of the one table in `lines`, without the rule below the header."""
    rows = [re.split(r" \| ", line[2:-2]) for line in lines if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return rows[0], rows[1:]


def test_markdown_table():
    assert markdown_table(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]


def test_models_and_parts(make_with_batches):
    model, batches = make_with_batches()
    report = energy_report(model, batches, run_lengths=False)
    _, rows = cells(comparison_section(report.models))
    assert [row[0] for row in rows] == [cost.name for cost in report.costs]
    for row, cost in zip(rows, report.costs, strict=True):
        assert float(row[2].replace(",", "")) == round(cost.picojoules / 1e6, 2)
    assert rows[0][4] == "1.00"
    _, parts = cells(operations_table(report.cost))
    assert [row[0] for row in parts] == [*(part.part for part in report.cost.by_part()), "all"]
    assert parts[-1][-1] == "100.0%"
    additions = sum(int(row[1].replace(",", "")) for row in parts[:-1])
    assert abs(additions - int(parts[-1][1].replace(",", ""))) <= len(parts)


def test_rates_stand_at_their_places(make_with_batches):
    """Also where the names come in another order: nothing is found by its index."""
    model, batches = make_with_batches()
    report = energy_report(model, batches, run_lengths=False)
    rates = report.firing_rates()
    assert len(set(rates.values())) == len(rates)
    backwards = dict(reversed(rates.items()))
    header, rows = cells(firing_rate_table(backwards))
    assert header == ["layer", *(place.label for place in PLACES)]
    for layer, row in enumerate(rows):
        names = [f"bert.encoder.layer.{layer}.{place.neuron}" for place in PLACES]
        assert row == [str(layer), *(f"{rates[name]:.3f}" for name in names)]
    counted = {(row.layer, row.name): row for row in report.cost.rows if row.part == "Linear"}
    _, rows = cells(linear_section(report.cost, report.settings, backwards))
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == 2 * len(LINEARS)
    for layer in range(2):
        for place in PLACES:
            for linear in place.linears:
                rate = rates[f"bert.encoder.layer.{layer}.{place.neuron}"]
                cost = counted[layer, linear]
                sizes = [str(getattr(model.config, name)) for name in LINEARS[linear]]
                figures = [f"{cost.additions:,.0f}", f"{cost.picojoules / 1e6:.2f}"]
                assert found[f"layer {layer}, {linear}"] == [f"{rate:.3f}", *sizes, *figures]


def test_neurons_and_runs(make_with_batches):
    model, batches = make_with_batches()
    report = energy_report(model, batches)
    _, rows = cells(neuron_section(report.neuron))
    assert [row[0] for row in rows] == [step.step for step in report.neuron]
    _, rows = cells(run_length_section(report.statistics.run_lengths))
    assert [row[0] for row in rows] == [runs.name for runs in report.statistics.run_lengths]
    assert run_length_section([]) == []


def test_papers_ratios():
    assert cells(paper_section({"BERT, float32": 12.345, "repeat coding": None}))[1][0][1] == "12.35"
    _, rows = cells(paper_section({"BERT, float32": 12.0, "repeat coding": 3.0}))
    assert [row[1] for row in rows] == ["12.00", "3.00 (measured on the same sequences)"]
