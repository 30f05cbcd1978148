"""Accuracy against energy and speed as the target of the firing rate goes down, on real text.

    python benchmarks/sparsity.py                                        film reviews, all-MiniLM-L6-v2
    python benchmarks/sparsity.py --train_file t.tsv --validation_file v.tsv --targets none 0.1 0.05

A BERT is fine-tuned, and for every target the distilled SNN-BERT (or another, `--student_name_or_path`) is fine-tuned
with the BERT as its teacher and the target in its configuration, on the same batches each time, as in
examples/quickstart.py. With `--convert`, or another BERT alone, each target's model is the BERT converted with that
firing rate and distilled briefly; `none` is converted with that example's firing rate, and has no target. Then it is
scored on held-out sentences, its operations are counted there, and it is timed on a batch of them in its dense and in
its event-driven form. Of the event-driven forms with rounded weights the labels are counted that differ from those of
the dense model, and of the dense model with the same rounded weights. Writes sparsity.json and sparsity.png.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from measure import check_firing_rate, interleaved_seconds, spread
from report import Table, write_results
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
)

from modeling_snn_bert.batches import RowBatches
from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.energy.plots import import_pyplot, save_figure
from modeling_snn_bert.event_driven import event_driven, round_products
from modeling_snn_bert.fine_tuning import (
    DISTILLATION_STEPS,
    TAUGHT_RATE,
    Recipe,
    finetune,
    make_student,
    predictions,
    teach,
)

# The example's own functions, so that both train in the same way.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart


def parse_args() -> tuple[quickstart.DataArguments, Recipe, argparse.Namespace]:
    kinds = [quickstart.DataArguments, Recipe]
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a BERT: folder or Hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--convert", action="store_true", help="convert the fine-tuned BERT, whichever it is")
    parser.add_argument("--student_name_or_path", help="an SNN-BERT to start from, as one distilled with a target")
    parser.add_argument("--targets", nargs="+", default=["none", "0.2", "0.1", "0.05"], help="in (0, 1), or none")
    parser.add_argument("--firing_rate_weight", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=160, help="of fine-tuning, of the BERT and for each target")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds of the timing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    data_args, recipe, args = parser.parse_args_into_dataclasses()
    for name in ("steps", "threads", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    for target in args.targets:
        try:
            valid = target == "none" or 0 < float(target) < 1
        except ValueError:
            valid = False
        if not valid:
            parser.error(f"--targets must be `none` or lie in (0, 1), got {target!r}")
    return data_args, recipe, args


def measure(data_args: quickstart.DataArguments, recipe: Recipe, args: argparse.Namespace) -> Table:
    """Train and measure one model for each target."""
    accelerator = Accelerator(cpu=True)
    start = quickstart.Arguments(args.model_name_or_path, args.student_name_or_path, args.convert)
    task, rows = data_args.load()
    encoder = start.encoder()
    distillation_steps = recipe.distillation_steps
    if distillation_steps is None:
        distillation_steps = DISTILLATION_STEPS if encoder is None else 0
    path = args.model_name_or_path or str(quickstart.minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(path)
    # MNLI has two dev sets.
    splits = {"train": rows["train"], "validation": next(rows[name] for name in rows if name != "train")}
    data = {name: quickstart.tokenize(part, task, tokenizer, data_args.max_seq_length) for name, part in splits.items()}
    collate = DataCollatorWithPadding(tokenizer)
    validation = DataLoader(data["validation"], batch_size=2 * recipe.batch_size, collate_fn=collate)
    truth = torch.tensor(data["validation"]["labels"])
    majority = truth.bincount().max().item() / len(truth)
    table = Table(
        f"Accuracy against energy and speed, {len(data['validation']):,} held-out sentences, {distillation_steps} "
        f"steps of distillation and {args.steps} of fine-tuning of {recipe.batch_size} sentences, seed {recipe.seed}",
        {
            "target": "firing rate target",
            "firing_rate": "firing rate",
            "highest_rate": "of the busiest neuron layer",
            "accuracy": "accuracy",
            "matrix_product_microjoules": "matrix products, uJ",
            "microjoules": "all arithmetic, uJ",
            "accuracy_bfloat16": "with bfloat16 weights",
            "accuracy_int8": "with int8 weights",
            "labels_changed_bfloat16": "labels that bfloat16 weights change",
            "labels_changed_int8": "labels that int8 weights change",
            "labels_differ_bfloat16": "labels that differ from dense, bfloat16 weights",
            "labels_differ_int8": "the same, int8 weights",
            "event_driven_milliseconds": "event-driven, ms",
            "dense_milliseconds": "dense, ms",
        },
        notes=[
            f"Energy per sentence at 45 nm, arithmetic only. The majority class has {majority:.3f} of the sentences. "
            f"Time: the whole model on one batch of {2 * recipe.batch_size} sentences, float32, medians (quartiles).",
        ],
    )
    calls: dict[str, Callable[[], object]] = {}
    set_seed(recipe.seed)
    bert = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(task.labels))
    batches = RowBatches(data["train"], collate, recipe.batch_size, recipe.seed)
    finetune(accelerator, bert, batches, args.steps, recipe.bert_learning_rate)
    stages = {"distillation_steps": distillation_steps, "finetuning_steps": args.steps}
    for target in args.targets:
        set_seed(recipe.seed)
        rate = None if target == "none" else float(target)
        model = make_student(bert, batches, rate or recipe.firing_rate, encoder)
        model.config.firing_rate_target, model.config.firing_rate_weight = rate, args.firing_rate_weight
        teach(accelerator, model, bert, batches, recipe.learning_rate or TAUGHT_RATE, recipe.logit_weight, **stages)
        wanted, _ = predictions(model, validation)
        report = energy_report(model, validation, run_lengths=False)
        rates = report.firing_rates()
        mean = check_firing_rate(f"the model with target {target}", sum(rates.values()) / len(rates))
        row: dict[str, Any] = {
            "target": target,
            "firing_rate": mean,
            "highest_rate": max(rates.values()),
            "accuracy": (wanted == truth).float().mean().item(),
            "matrix_product_microjoules": report.cost.matrix_product_picojoules / 1e6,
            "microjoules": report.cost.picojoules / 1e6,
            "firing_rates": rates,
        }
        table.rows.append(row)
        inputs = {name: x for name, x in next(iter(validation)).items() if name != "labels"}
        events = event_driven(copy.deepcopy(model))
        check_same(model, events, inputs)
        for weight_dtype in ("bfloat16", "int8"):
            found, _ = predictions(event_driven(copy.deepcopy(model), weight_dtype), validation)
            rounded, _ = predictions(round_products(copy.deepcopy(model), weight_dtype), validation)
            row[f"accuracy_{weight_dtype}"] = (found == truth).float().mean().item()
            row[f"labels_changed_{weight_dtype}"] = (found != wanted).float().mean().item()
            row[f"labels_differ_{weight_dtype}"] = (found != rounded).float().mean().item()
        calls[f"{target}, dense"] = partial(run, model, inputs)
        calls[f"{target}, event-driven"] = partial(run, events, inputs)
    samples = interleaved_seconds(calls, args.repeats)
    for row in table.rows:
        row["dense_milliseconds"] = spread(samples[f"{row['target']}, dense"], 1e3)
        row["event_driven_milliseconds"] = spread(samples[f"{row['target']}, event-driven"], 1e3)
    return table


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits."""
    return model(**inputs).logits


def check_same(model: PreTrainedModel, events: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """End with an error unless the event-driven model gives the dense one's logits.

    A spike that is right at its threshold moves with the order of a sum, and takes its sentence's logits along, so the
    middle one of the sentences is looked at.
    """
    difference = (run(events, inputs) - run(model, inputs)).abs().amax(-1).median().item()
    if not difference <= 1e-3:
        raise SystemExit(f"the event-driven model gives other logits than the dense one: they differ by {difference}")


def draw(table: Table, path: Path) -> None:
    """Accuracy against energy, and against the time of a batch, a point for each target."""
    plt = import_pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    accuracies = [row["accuracy"] for row in table.rows]
    for axes, x, label in (
        (panels[0], [row["microjoules"] for row in table.rows], "uJ per sentence (45 nm, all arithmetic)"),
        (
            panels[1],
            [row["event_driven_milliseconds"]["median"] for row in table.rows],
            "ms for a batch, event-driven",
        ),
    ):
        axes.plot(x, accuracies, marker="o", color="tab:blue")
        for row, at in zip(table.rows, x, strict=True):
            text = f"{row['target']} ({row['firing_rate']:.2f})"
            axes.annotate(text, (at, row["accuracy"]), textcoords="offset points", xytext=(7, -12), fontsize=8)
        axes.set_xlabel(label)
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, held-out sentences")
    figure.suptitle("Firing rate target (measured rate)", fontsize=11)
    save_figure(figure, path)


def main() -> None:
    data_args, recipe, args = parse_args()
    torch.set_num_threads(args.threads)
    table = measure(data_args, recipe, args)
    print(table.markdown())
    draw(table, args.output_dir / "sparsity.png")
    settings = vars(data_args) | vars(recipe) | vars(args)
    write_results(args.output_dir / "sparsity.json", settings, [table])


if __name__ == "__main__":
    main()
