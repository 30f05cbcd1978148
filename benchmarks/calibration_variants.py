"""Thresholds per layer, and a rotation before the spike, against the neurons as the library makes them by default.

    python benchmarks/calibration_variants.py --seeds 0 1 2 --train_file text.txt.xz --max_steps 60 ...

takes the flags of examples/distill_bert.py, which it runs for each variant and seed:

    as_designed        thresholds per channel, spikes of the channels themselves
    layer_calibration  one threshold for all channels of a neuron layer at calibration; training moves them apart
    layer_thresholds   the same, and training keeps them alike
    rotation           a fixed Hadamard rotation, in blocks and with random signs, of what goes into a neuron whose
                       input is not a projection already (in front of query, key and value, of the attention's output
                       projection and of the MLP's first one); the Linears behind are rotated back

A rotation spreads what a few large channels hold over all of them, which helps where activations are rounded to few
bits; source: Ashkboos et al., "QuaRot", 2024. At run time it would cost additions of real numbers in front of each
neuron. Writes calibration_variants.json: loss on held-out text and firing rate after calibration and at the end. The
models are not kept.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from report import Table
from torch import nn
from transformers import PreTrainedModel

from modeling_snn_bert import conversion
from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.layer_places import PLACES
from modeling_snn_bert.seeds import environment
from modeling_snn_bert.spiking_neurons import SpikingNeuron

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import distill_bert

# The Linears whose input is no projection already.
ROTATED = tuple(linear for place in PLACES if place.source is None for linear in place.linears)


def main(arguments: list[str] | None = None) -> None:
    # No abbreviations: a flag of the other script must not pass for one of these.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ours, flags = parser.parse_known_args(arguments)
    student_args, text_args, args = distill_bert.parse_args(flags)
    if student_args.student_name_or_path or args.resume_from_checkpoint:
        parser.error("each variant starts from a BERT: leave out --student_name_or_path and --resume_from_checkpoint")
    if student_args.threshold_per != "channel":
        parser.error(f"--threshold_per is what the variants are about: leave it out, got {student_args.threshold_per}")
    runs = []
    for variant in ours.variants:
        for seed in ours.seeds:
            changes: dict[str, Any] = {"seed": seed, "save_strategy": "no"}
            run_args = dataclasses.replace(args, **changes)
            _, results = distill_bert.distil(student_args, text_args, run_args, VARIANTS[variant])
            run: dict[str, Any] = {"variant": variant, "seed": seed, "seconds": results["seconds"]}
            for name, when in (("calibrated", "before_training"), ("trained", "evaluation")):
                run[name] = {figure.removeprefix("eval_"): x for figure, x in results[when].items()}
            runs.append(run)
    table = summary(runs)
    print(table.markdown())
    settings = {"flags": flags, "seeds": ours.seeds, **environment(args.device)}
    write_json(
        Path(args.output_dir) / "calibration_variants.json", {"settings": settings, "runs": runs}, allow_nan=False
    )


class Rotated(nn.Module):
    """A neuron that gets its currents, `[batch, seq_len, channels]`, rotated."""

    def __init__(self, neuron: SpikingNeuron, rotation: torch.Tensor) -> None:
        super().__init__()
        self.neuron = neuron
        self.register_buffer("rotation", rotation)

    def forward(self, current: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.neuron(current @ self.rotation.T.to(current.dtype), attention_mask)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.neuron, name)


class Rotation(conversion._LayerCalibration):
    """Calibration with `Rotated` neurons."""

    def __init__(self, model, layer, *args) -> None:
        super().__init__(model, layer, *args)
        self.rotation = hadamard_rotation(model.config.hidden_size).to(model.device)
        for block in (layer.attention.self, layer.attention.output, layer.intermediate):
            block.neuron = Rotated(block.neuron, self.rotation)

    def fit(self, name: str, spikes: list[torch.Tensor], residual=None) -> None:
        if name not in ROTATED:
            super().fit(name, spikes, residual)
            return
        linear = self.layer.get_submodule(name)
        linear.weight.copy_(linear.weight @ self.rotation.T)
        inputs = self.targets.inputs
        self.targets.inputs = {**inputs, name: [x @ self.rotation.T for x in inputs[name]]}
        try:
            super().fit(name, spikes, residual)
        finally:
            self.targets.inputs = inputs


def hadamard_rotation(size: int) -> torch.Tensor:
    """An orthogonal `[size, size]`: Hadamard matrices along the diagonal, as large as fit, times random signs."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return torch.block_diag(*[block] * (size // len(block))) / len(block) ** 0.5 * signs


def with_layer_calibration(*args, **settings) -> PreTrainedModel:
    """`convert_bert`, with thresholds per layer at calibration."""
    return conversion.convert_bert(*args, **{**settings, "threshold_per": "layer"})


def with_layer_thresholds(*args, **settings) -> PreTrainedModel:
    """The same, and training keeps them alike."""
    model = with_layer_calibration(*args, **settings)
    for neuron in neurons(model):
        # Gradients that are alike move them alike.
        neuron.v_threshold.register_hook(lambda gradient: gradient.mean().expand_as(gradient))
    return model


def with_rotation(*args, **settings) -> PreTrainedModel:
    """`convert_bert`, with rotated currents."""
    with mock.patch.object(conversion, "_LayerCalibration", Rotation):
        return conversion.convert_bert(*args, **settings)


def neurons(model: PreTrainedModel) -> Iterable[SpikingNeuron]:
    return (module for module in model.modules() if isinstance(module, SpikingNeuron))


VARIANTS = {
    "as_designed": conversion.convert_bert,
    "layer_calibration": with_layer_calibration,
    "layer_thresholds": with_layer_thresholds,
    "rotation": with_rotation,
}


def summary(runs: list[dict[str, Any]]) -> Table:
    """Mean and standard deviation over the seeds of each variant."""
    columns = {
        "variant": "variant",
        "calibrated": "loss after calibration",
        "trained": "loss at the end",
        "firing_rate": "firing rate at the end",
        "seeds": "seeds",
    }
    table = Table("text", "Squared error of the hidden states on held-out text, mean (standard deviation)", columns)
    for variant in dict.fromkeys(run["variant"] for run in runs):
        same = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "seeds": len(same)}
        for name in ("calibrated", "trained"):
            losses = [run[name]["loss"] for run in same]
            deviation = f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
            row[name] = f"{statistics.fmean(losses):.4f}{deviation}"
        row["firing_rate"] = statistics.fmean(run["trained"]["firing_rate"] for run in same)
        table.rows.append(row)
    return table


if __name__ == "__main__":
    main()
