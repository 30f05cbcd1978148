"""The sections and tables of an energy report, as lines of Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from ..layer_places import LINEARS, PLACES, place_of
from .joules import MeasuredEnergy
from .operation_counts import (
    FLOAT32,
    INT8,
    PICOJOULES_PER_BYTE_OF_CACHE,
    PICOJOULES_PER_BYTE_OF_DRAM,
    ModelCost,
    NeuronCost,
    OperationCount,
)
from .spike_statistics import RunLengths

CONVENTIONS = f"""## What is counted, and how

Arithmetic at 45 nm (Horowitz, ISSCC 2014): float32 addition {FLOAT32.addition} pJ, multiplication \
{FLOAT32.multiplication} pJ, so a multiply-accumulate (MAC) 4.6 pJ; 8-bit multiplication {INT8.multiplication} pJ, \
32-bit integer addition {INT8.addition} pJ. An exponential counts as 6 MACs, a reciprocal or square root as 4, a tanh \
as 10, a GELU as 14, a comparison as an addition.

- A Linear in the encoder adds one row of its weights for each spike that enters it; its bias is counted apart.
- Keys are spikes, so a product of a query and a key only adds up components of the query where the key fires, \
whatever the query's gain and offset are: ACs = key spikes x tokens. The affine query itself costs one addition per \
query spike. Values are spikes, so a context only adds up attention weights: ACs = value spikes x tokens. \
Spiking attention is counted in its linear form, first k^T v, then q (k^T v).
- Embeddings, softmax, LayerNorm, residual sums, pooler and classifier are real-valued and counted in float32.
- Memory traffic is an estimate: each weight once per sequence from DRAM ({PICOJOULES_PER_BYTE_OF_DRAM:g} pJ a byte), \
each activation written to and read from a 1 MB cache once ({PICOJOULES_PER_BYTE_OF_CACHE:g} pJ a byte; a spike is one \
bit). Larger batches share the weights, and whatever skips zeros may also skip weights; neither is in the estimate. \
Event-driven hardware with weights beside the neurons would avoid most of it.

These are counts and a published energy table, not measurements of a device."""


def measured_section(measured: Mapping[str, MeasuredEnergy]) -> list[str]:
    """The section of a report in Markdown on what `measured_energy` gives."""
    names = list(next(iter(measured.values())).joules)
    rows = [
        (
            name,
            *(f"{1e3 * energy.joules[c]:.2f} ({1e3 * energy.above_idle[c]:.2f})" for c in names),
            f"{1e3 * energy.seconds:.2f}",
        )
        for name, energy in measured.items()
    ]
    rounds = next(iter(measured.values())).rounds
    return [
        "## Measured on this machine",
        "",
        f"Millijoules of a mean sequence by the counters of this machine, medians of {rounds} rounds; in brackets what "
        "is above the idle machine. The counters hold everything that runs on it, memory traffic included, so the "
        "figures are far above the estimates of arithmetic below and must not be mixed with them.",
        "",
        *markdown_table(("encoder", *(f"{c}, mJ (above idle)" for c in names), "ms"), rows),
    ]


def comparison_section(costs: Sequence[ModelCost]) -> list[str]:
    """A table of all models, each beside the first one."""
    rows = []
    for cost in costs:
        energies = (cost.matrix_product_picojoules, cost.picojoules, cost.memory.picojoules)
        ratio = cost.picojoules / costs[0].picojoules
        rows.append((cost.name, *(f"{energy / 1e6:,.2f}" for energy in energies), f"{ratio:.2f}", cost.note))
    header = (
        "model",
        "matrix products, uJ",
        "all arithmetic, uJ",
        "memory traffic, uJ (estimate)",
        "arithmetic relative to this model",
        "what is assumed",
    )
    return ["## Against other models of the same shape", "", *markdown_table(header, rows)]


def paper_section(ratios: Mapping[str, float | None]) -> list[str]:
    """The `matrix_product_ratios` of a report beside those that the paper states."""
    baseline = ratios["repeat coding"]
    repeat = (
        "not measured: give a model with `coding='repeat'` as the baseline"
        if baseline is None
        else f"{baseline:.2f} (measured on the same sequences)"
    )
    return [
        "## The paper's convention: matrix products only",
        "",
        "Su et al. (Neural Networks 180, 2024) count matrix products alone: no neurons, softmax, norms or memory. "
        "In that convention, energy relative to this model's:",
        "",
        *markdown_table(
            ("", "here", "in the paper, for its own models and data"),
            [
                ("float32 BERT of the same shape", f"{ratios['BERT, float32']:.2f}", "up to 22.5"),
                ("baseline with repeat coding", repeat, "6.46 (4 time-steps)"),
            ],
        ),
    ]


def neuron_section(steps: Iterable[NeuronCost]) -> list[str]:
    """A table of the steps of a neuron."""
    rows = [(step.step, f"{step.additions:g}", f"{step.macs:.4g}", f"{step.multiplications:g}") for step in steps]
    header = ("step of a neuron, per channel, token and time-step", "additions", "MACs", "multiplications")
    return ["## A neuron's own arithmetic", "", *markdown_table(header, rows)]


def linear_section(
    cost: ModelCost, settings: Mapping[str, int | float | str | None], firing_rates: Mapping[str, float]
) -> list[str]:
    """A table of the encoder's Linears, each with the rate of the spikes that enter it."""
    costs = {(row.layer, row.name): row for row in cost.rows if row.part == "Linear"}
    rows = []
    for neuron, rate in firing_rates.items():
        layer, place = place_of(neuron)
        for linear in place.linears:
            row = costs[layer, linear]
            sizes = [str(settings[name]) for name in LINEARS[linear]]
            figures = f"{row.additions:,.0f}", f"{row.picojoules / 1e6:.2f}"
            rows.append((f"layer {layer}, {linear}", f"{rate:.3f}", *sizes, *figures))
    text = "ACs = rate of the spikes that enter x fan-in x fan-out x tokens (x time-steps)."
    header = ("Linear", "rate", "fan-in", "fan-out", "ACs", "uJ")
    return ["## Every Linear of the encoder", "", text, "", *markdown_table(header, rows)]


def firing_rate_table(firing_rates: Mapping[str, float]) -> list[str]:
    """A markdown table: a line for each encoder layer, a column for each of its neuron layers."""
    rates = {place_of(name): rate for name, rate in firing_rates.items()}
    layers = sorted({layer for layer, _ in rates})
    rows = [(str(layer), *(f"{rates[layer, place]:.3f}" for place in PLACES)) for layer in layers]
    return markdown_table(("layer", *(place.label for place in PLACES)), rows)


def run_length_section(run_lengths: Sequence[RunLengths]) -> list[str]:
    """A table of the runs of each kind of neuron; nothing if none were measured."""
    if not run_lengths:
        return []
    rows = [
        (
            runs.name,
            f"{runs.channels:,}",
            f"{runs.firing_rate:.3f}",
            f"{runs.mean:.2f}",
            str(runs.percentile_99),
            f"{runs.uninterrupted:.2%}",
        )
        for runs in run_lengths
    ]
    header = (
        "neuron, fed by the same currents",
        "channels",
        "firing rate",
        "mean run",
        "99th percentile",
        "channels that fire at > 95 % of valid tokens",
    )
    return [
        "## Runs of uninterrupted firing",
        "",
        "A run is a stretch of spikes at consecutive valid tokens (time-steps with repeat coding). The other "
        "neurons have this model's thresholds and decays and get the currents that its own neurons got. They are "
        "compared where the threshold is positive, because a soft reset by a negative one would charge a neuron.",
        "",
        *markdown_table(header, rows),
    ]


def operations_table(cost: ModelCost) -> list[str]:
    """A markdown table of a model's operations, a line for each part."""
    parts = cost.by_part()
    everything = OperationCount("all")
    for part in parts:
        everything.add(part)
    rows = [
        (
            row.part,
            *(f"{count:,.0f}" for count in (row.additions, row.macs, row.multiplications)),
            f"{energy / 1e6:.2f}",
            f"{energy / cost.picojoules:.1%}",
        )
        for row, energy in [*((part, part.picojoules) for part in parts), (everything, cost.picojoules)]
    ]
    return markdown_table(("part", "additions", "MACs", "multiplications", "uJ", "share"), rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a markdown table, and an empty one."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
