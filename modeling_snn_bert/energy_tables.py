"""The report on what an SNN-BERT costs, for a reader and for a program, and the files that hold it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .energy_plots import import_pyplot, plot_energy, plot_firing_rates, plot_spikes, written_whole
from .layer_places import PLACES, place_of
from .operation_counts import (
    FLOAT32,
    INT8,
    PICOJOULES_PER_BYTE_OF_CACHE,
    PICOJOULES_PER_BYTE_OF_DRAM,
    ModelCost,
    NeuronCost,
    OperationCount,
)
from .spike_statistics import SpikeStatistics

# More do not fit side by side.
RASTER_TOKENS = 48


@dataclasses.dataclass
class EnergyReport:
    """What `energy_report` returns.

    Attributes:
        model: the model's class.
        settings: the settings of its configuration that the figures depend on.
        statistics: what was measured: firing rates, spikes per sequence, lengths, run lengths.
        costs: the model's own cost, then those of the models that it is compared with.
        neuron: the steps of one neuron, per channel, token and time-step.
        baseline: the cost of the repeat-coding baseline that was measured on the same sequences, if one was given.
    """

    model: str
    settings: dict[str, int | float | str | None]
    statistics: SpikeStatistics
    costs: list[ModelCost]
    neuron: list[NeuronCost]
    baseline: ModelCost | None = None

    @property
    def cost(self) -> ModelCost:
        """The model's own cost."""
        return self.costs[0]

    @property
    def bert(self) -> ModelCost:
        """The cost of the float32 BERT of the same shape."""
        return next(cost for cost in self.costs if cost.name == "BERT, float32")

    def matrix_product_ratios(self) -> dict[str, float | None]:
        """How many times the model's energy others take if matrix products alone are counted, as in the paper.

        `"BERT, float32"`: the same shape's BERT. `"repeat coding"`: the baseline, `None` if there is none.
        """
        own = self.cost.matrix_product_picojoules
        baseline = None if self.baseline is None else self.baseline.matrix_product_picojoules / own
        return {"BERT, float32": self.bert.matrix_product_picojoules / own, "repeat coding": baseline}

    def firing_rates(self) -> dict[str, float]:
        """The mean firing rate of every neuron layer, by its name."""
        statistics = self.statistics
        return {name: rate.mean().item() for name, rate in zip(statistics.names, statistics.rates, strict=True)}

    def to_dict(self) -> dict:
        """The report as numbers, strings, lists and dictionaries. Energies are in pJ, per sequence."""
        statistics = self.statistics
        models = [*self.costs, *([self.baseline] if self.baseline else [])]
        return {
            "model": self.model,
            "settings": self.settings,
            "sequences": len(statistics.lengths),
            "tokens_per_sequence": statistics.lengths.mean().item(),
            "costs": [
                {
                    "name": cost.name,
                    "note": cost.note,
                    "matrix_product_picojoules": cost.matrix_product_picojoules,
                    "arithmetic_picojoules": cost.picojoules,
                    "memory": {**dataclasses.asdict(cost.memory), "picojoules": cost.memory.picojoules},
                    "parts": [_row_dict(row) for row in cost.by_part()],
                }
                for cost in models
            ],
            "matrix_product_ratios": self.matrix_product_ratios(),
            "rows": [_row_dict(row) for row in self.cost.rows],
            "neuron": [dataclasses.asdict(step) for step in self.neuron],
            "firing_rates": {
                name: {"mean": rate.mean().item(), "min": rate.min().item(), "max": rate.max().item()}
                for name, rate in zip(statistics.names, statistics.rates, strict=True)
            },
            "run_lengths": [dataclasses.asdict(runs) for runs in statistics.run_lengths],
            "conventions": {
                "picojoules": {arithmetic.name: arithmetic._asdict() for arithmetic in (FLOAT32, INT8)},
                "picojoules_per_byte_of_cache": PICOJOULES_PER_BYTE_OF_CACHE,
                "picojoules_per_byte_of_dram": PICOJOULES_PER_BYTE_OF_DRAM,
                "source": "Horowitz, ISSCC 2014, 45 nm",
            },
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The report for a reader."""
        statistics = self.statistics
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        sections = [
            [
                f"# Energy of {self.model}",
                "",
                f"{len(statistics.lengths):,} sequences of {statistics.lengths.mean().item():.1f} valid tokens on "
                f"average; {settings}. All figures are per mean sequence, at batch size 1, over valid tokens only.",
                "",
            ],
            self._comparison(),
            self._paper_convention(),
            ["## Operations by part", "", *operations_table(self.cost)],
            self._neuron_section(),
            self._linear_section(),
            ["## Firing rates", "", "Spikes per valid token and time-step.", "", *self.firing_rate_table()],
            self._run_length_section(),
            CONVENTIONS.splitlines(),
        ]
        return "\n".join(line for section in sections for line in section) + "\n"

    def _comparison(self) -> list[str]:
        models = [*self.costs, *([self.baseline] if self.baseline else [])]
        rows = []
        for cost in models:
            energies = (cost.matrix_product_picojoules, cost.picojoules, cost.memory.picojoules)
            ratio = cost.picojoules / self.cost.picojoules
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

    def _paper_convention(self) -> list[str]:
        ratios = self.matrix_product_ratios()
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

    def _neuron_section(self) -> list[str]:
        rows = [
            (step.step, f"{step.additions:g}", f"{step.macs:.4g}", f"{step.multiplications:g}") for step in self.neuron
        ]
        header = ("step of a neuron, per channel, token and time-step", "additions", "MACs", "multiplications")
        return ["## A neuron's own arithmetic", "", *markdown_table(header, rows)]

    def _linear_section(self) -> list[str]:
        costs = {(row.layer, row.name): row for row in self.cost.rows if row.part == "Linear"}
        rows = []
        for neuron, rate in self.firing_rates().items():
            layer, place = place_of(neuron)
            for linear in place.linears:
                row = costs[layer, linear.name]
                sizes = str(self.settings[linear.inputs]), str(self.settings[linear.outputs])
                figures = f"{row.additions:,.0f}", f"{row.picojoules / 1e6:.2f}"
                rows.append((f"layer {layer}, {linear.name}", f"{rate:.3f}", *sizes, *figures))
        text = "ACs = rate of the spikes that enter x fan-in x fan-out x tokens (x time-steps)."
        header = ("Linear", "rate", "fan-in", "fan-out", "ACs", "uJ")
        return ["## Every Linear of the encoder", "", text, "", *markdown_table(header, rows)]

    def firing_rate_table(self) -> list[str]:
        """A markdown table: a line for each encoder layer, a column for each of its neuron layers."""
        rates = {place_of(name): rate for name, rate in self.firing_rates().items()}
        layers = sorted({layer for layer, _ in rates})
        rows = [(str(layer), *(f"{rates[layer, place]:.3f}" for place in PLACES)) for layer in layers]
        return markdown_table(("layer", *(place.label for place in PLACES)), rows)

    def _run_length_section(self) -> list[str]:
        if not self.statistics.run_lengths:
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
            for runs in self.statistics.run_lengths
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

    def save(self, folder: str | Path, *, tokens: Sequence[str] | None = None, plots: bool = True) -> list[Path]:
        """Write report.md, report.json, energy.png, firing_rates.png and spikes.png, each whole or not at all.

        Args:
            folder: where to; it is made if it does not exist.
            tokens: the words below the raster of the first sequence, one for each of `statistics.example_ids`; by
                default the token ids.
            plots: whether to draw the pictures.

        Returns:
            The files.

        Raises:
            ImportError: if pictures are wanted and matplotlib is not installed; nothing is written then.
            ValueError: if `tokens` has another length than the first sequence.
        """
        statistics = self.statistics
        tokens = [str(i) for i in statistics.example_ids] if tokens is None else list(tokens)
        if len(tokens) != len(statistics.example_ids):
            raise ValueError(
                f"`tokens` must name the {len(statistics.example_ids)} tokens of the first sequence, got {len(tokens)}"
            )
        if plots:
            import_pyplot()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, text in (("report.md", self.to_markdown()), ("report.json", self.to_json() + "\n")):
            with written_whole(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
            files.append(folder / name)
        if plots:
            files += [folder / "energy.png", folder / "firing_rates.png", folder / "spikes.png"]
            plot_energy([*self.costs, *([self.baseline] if self.baseline else [])], files[2])
            plot_firing_rates(statistics.rates, statistics.names, files[3])
            panels = raster_panels(statistics.names)
            spikes, names = statistics.example_spikes, statistics.names
            shown = [spikes[i][:RASTER_TOKENS] for i in panels]
            plot_spikes(shown, [names[i] for i in panels], tokens[:RASTER_TOKENS], files[4])
        return files


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


def operations_table(cost: ModelCost) -> list[str]:
    """A markdown table of a model's operations, a line for each part."""
    parts = cost.by_part()
    everything = OperationCount("all")
    for part in parts:
        everything.additions += part.additions
        everything.macs += part.macs
        everything.multiplications += part.multiplications
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


def raster_panels(names: Sequence[str]) -> list[int]:
    """Three neuron layers for a raster: near the input, in the middle and near the output."""
    layers = 1 + max(place_of(name)[0] for name in names)
    shown = (0, "attention.self.neuron"), (layers // 2, "output.neuron"), (layers - 1, "attention.output.neuron")
    indices = {(layer, place.neuron): index for index, (layer, place) in enumerate(map(place_of, names))}
    return [indices[panel] for panel in shown]


def _row_dict(row: OperationCount) -> dict:
    return {**dataclasses.asdict(row), "arithmetic": row.arithmetic.name, "picojoules": row.picojoules}
