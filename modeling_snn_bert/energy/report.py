"""The report on what an SNN-BERT costs: its figures, for a program and for a reader, and the files that hold them."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..atomic_writes import written_whole
from ..html_report import html_page
from ..modeling_snn_bert import SNNBertPreTrainedModel
from .joules import MeasuredEnergy
from .operation_counts import (
    FLOAT32,
    INT8,
    PICOJOULES_PER_BYTE_OF_CACHE,
    PICOJOULES_PER_BYTE_OF_DRAM,
    ModelCost,
    NeuronCost,
    OperationCount,
    neuron_costs,
    rival_costs,
    spiking_cost,
)
from .plots import import_pyplot, plot_energy, plot_firing_rates, plot_spikes, raster_panels
from .spike_statistics import SpikeStatistics, measure_spikes
from .tables import (
    CONVENTIONS,
    comparison_section,
    firing_rate_table,
    linear_section,
    measured_section,
    neuron_section,
    operations_table,
    paper_section,
    run_length_section,
)

# Settings that a reader needs to place the figures.
SETTINGS = (
    "num_hidden_layers hidden_size num_attention_heads intermediate_size neuron_type coding num_timesteps "
    "attention_type spike_type reset_iterations firing_rate_target"
).split()


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
        measured: joules by the machine's own counters, from `measured_energy`, if they were measured.
    """

    model: str
    settings: dict[str, int | float | str | None]
    statistics: SpikeStatistics
    costs: list[ModelCost]
    neuron: list[NeuronCost]
    baseline: ModelCost | None = None
    measured: Mapping[str, MeasuredEnergy] | None = None

    @property
    def cost(self) -> ModelCost:
        """The model's own cost."""
        return self.costs[0]

    @property
    def bert(self) -> ModelCost:
        """The cost of the float32 BERT of the same shape."""
        return next(cost for cost in self.costs if cost.name == "BERT, float32")

    @property
    def models(self) -> list[ModelCost]:
        """The costs of all models: the model's own, those that it is compared with, and the baseline."""
        return self.costs if self.baseline is None else [*self.costs, self.baseline]

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

    def firing_rate_table(self) -> list[str]:
        """A markdown table: a line for each encoder layer, a column for each of its neuron layers."""
        return firing_rate_table(self.firing_rates())

    def to_dict(self) -> dict:
        """The report as numbers, strings, lists and dictionaries. Energies of a sequence, in pJ; measured ones in J."""
        statistics = self.statistics
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
                for cost in self.models
            ],
            "matrix_product_ratios": self.matrix_product_ratios(),
            "rows": [_row_dict(row) for row in self.cost.rows],
            "neuron": [dataclasses.asdict(step) for step in self.neuron],
            "firing_rates": {
                name: {"mean": rate.mean().item(), "min": rate.min().item(), "max": rate.max().item()}
                for name, rate in zip(statistics.names, statistics.rates, strict=True)
            },
            "measured": {name: dataclasses.asdict(energy) for name, energy in (self.measured or {}).items()},
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
            measured_section(self.measured) if self.measured else [],
            comparison_section(self.models),
            paper_section(self.matrix_product_ratios()),
            ["## Operations by part", "", *operations_table(self.cost)],
            neuron_section(self.neuron),
            linear_section(self.cost, self.settings, self.firing_rates()),
            ["## Firing rates", "", "Spikes per valid token and time-step.", "", *self.firing_rate_table()],
            run_length_section(statistics.run_lengths),
            CONVENTIONS.splitlines(),
        ]
        return "\n".join(line for section in sections for line in section) + "\n"

    def save(self, folder: str | Path, *, tokens: Sequence[str] | None = None, plots: bool = True) -> list[Path]:
        """Write report.md, report.json, energy.png, firing_rates.png, spikes.png and report.html, which holds all.

        Each is written whole or not at all.

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
        pictures = [folder / f"{name}.png" for name in ("energy", "firing_rates", "spikes")] if plots else []
        if plots:
            plot_energy(self.models, pictures[0])
            plot_firing_rates(statistics.rates, statistics.names, pictures[1])
            panels = raster_panels(statistics.names)
            spikes = [statistics.example_spikes[i] for i in panels]
            plot_spikes(spikes, [statistics.names[i] for i in panels], tokens, pictures[2])
        markdown = self.to_markdown()
        below = {"Against other models of the same shape": pictures[:1], "Firing rates": pictures[1:]}
        texts = {"md": markdown, "json": self.to_json() + "\n", "html": html_page(markdown, below)}
        for kind, text in texts.items():
            with written_whole(folder / f"report.{kind}") as temporary:
                temporary.write_text(text, encoding="utf-8")
        return [*(folder / f"report.{kind}" for kind in texts), *pictures]


def energy_report(
    model: SNNBertPreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    baseline: SNNBertPreTrainedModel | None = None,
    run_lengths: bool = True,
) -> EnergyReport:
    """Measure `model` on real text and count what it costs, beside what other models of its shape would.

    Args:
        model: an SNN-BERT with any head; it is run in evaluation mode and left in the mode that it was in.
        batches: what the tokenizer returns, see `measure_spikes`.
        baseline: an SNN-BERT with repeat coding to measure on the same batches.
        run_lengths: whether to measure runs of uninterrupted firing too.

    Raises:
        TypeError: if `model` or `baseline` is not an SNN-BERT.
        ValueError: if `batches` is empty or lacks `input_ids`, or `baseline` does not use repeat coding.
    """
    if baseline is not None:
        if not isinstance(baseline, SNNBertPreTrainedModel):
            raise TypeError(f"`baseline` must be an SNN-BERT, got {type(baseline).__name__}")
        if baseline.config.coding != "repeat":
            raise ValueError(f"`baseline` must have `coding='repeat'`, got {baseline.config.coding!r}")
        batches = list(batches)
    statistics = measure_spikes(model, batches, run_lengths=run_lengths)
    baseline_cost = None
    if baseline is not None:
        name = f"{baseline.config.neuron_type.upper()}, repeat coding, {baseline.config.num_timesteps} time-steps"
        baseline_cost = spiking_cost(baseline, measure_spikes(baseline, batches), name)
    return EnergyReport(
        model=type(model).__name__,
        settings={name: getattr(model.config, name, None) for name in SETTINGS},
        statistics=statistics,
        costs=[spiking_cost(model, statistics), *rival_costs(model, statistics)],
        neuron=neuron_costs(model.config, statistics),
        baseline=baseline_cost,
    )


def _row_dict(row: OperationCount) -> dict:
    return {**dataclasses.asdict(row), "arithmetic": row.arithmetic.name, "picojoules": row.picojoules}
