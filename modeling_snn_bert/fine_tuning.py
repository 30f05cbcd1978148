"""The recipe from a BERT to a spiking classifier: training, teaching, scores and the report.

`examples/quickstart.py` and the command `snn-bert train` follow it.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from .atomic_writes import write_json
from .batches import Batch, BatchOf, Row, RowBatches, batches_in_order
from .configuration_snn_bert import SNNBertConfig
from .conversion import convert_bert
from .distillation import check_same_shape, hidden_state_loss, label_and_logit_loss, parameter_groups
from .energy import EnergyReport, energy_report
from .energy.tables import markdown_table, operations_table
from .html_report import html_page
from .model_card import card_from_report
from .modeling_snn_bert import SNNBertForSequenceClassification, SNNBertModel, SNNBertPreTrainedModel
from .muon import MuonAdamW, multiplies_bfloat16_fast

if TYPE_CHECKING:
    from accelerate import Accelerator

# The student is to hit the teacher's states, and noise only blurs them.
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Batches that calibrate a BERT that is converted, and steps that it is then distilled for.
CALIBRATION_BATCHES = 12
DISTILLATION_STEPS = 130
# Learning rates of an SNN-BERT. From labels alone, at the rate that it takes from a BERT's states, it unlearns.
TAUGHT_RATE, LABELS_RATE = 1e-3, 1e-4
# Where a BERT teaches, Muon moves the weights that take spikes, at so many times the rate of the others.
MUON_FACTOR = 10.0
# Of the held-out texts, so many give the firing rates and the energy.
ENERGY_TEXTS = 512


@dataclass
class Recipe:
    """How a BERT is fine-tuned and its student taught; `HfArgumentParser` makes flags of it."""

    batch_size: int = HfArg(default=32, help="texts of a step")
    firing_rate: float = HfArg(default=0.2, help="firing rate at calibration")
    distillation_steps: int | None = HfArg(
        default=None, help=f"before the labels (default: {DISTILLATION_STEPS} for a BERT that is converted, else 0)"
    )
    learning_rate: float | None = HfArg(
        default=None, help=f"of the SNN-BERT (default: {TAUGHT_RATE:g} if a BERT teaches it, else {LABELS_RATE:g})"
    )
    bert_learning_rate: float = HfArg(default=5e-5, help="of the BERT")
    logit_weight: float = HfArg(default=0.5, help="share of the BERT's logits in the loss")
    seed: int = HfArg(default=0, help="of all that is random")


class Trained(NamedTuple):
    """What `train_classifier` returns: the model, what report.json is to say of it, and its energy."""

    model: SNNBertForSequenceClassification
    results: dict[str, Any]
    energy: EnergyReport


def label_names(names: Sequence[str]) -> dict[str, Any]:
    """The settings of a configuration that has these labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def classifier_settings(names: Sequence[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a classifier of texts with these labels, trained in float32."""
    return {
        **label_names(names),
        "problem_type": "single_label_classification",
        "ignore_mismatched_sizes": True,
        "dtype": torch.float32,
    }


def train_classifier(
    accelerator: "Accelerator",
    start: PreTrainedModel,
    training: Sequence[Row],
    validation: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    steps: int,
    encoder: SNNBertModel | None = None,
) -> Trained:
    """Fine-tune a BERT and teach its student; or fine-tune an SNN-BERT. Both are scored on `validation`.

    Args:
        accelerator: trains.
        start: a BERT or an SNN-BERT with a head for the labels.
        training, validation: tokenized rows with the index of their label in `"labels"`.
        tokenizer: pads them.
        recipe: the settings.
        steps: of fine-tuning, of each of the two.
        encoder: the student of a BERT; `None` converts the BERT.

    Raises:
        ValueError: if training diverges, or `encoder` is of another shape than the BERT.
    """
    collate = DataCollatorWithPadding(tokenizer)
    batches = RowBatches(training, collate, recipe.batch_size, recipe.seed)
    seconds: dict[str, float] = {}
    models: dict[str, PreTrainedModel] = {"SNN-BERT": start}
    rates = {"SNN-BERT": recipe.learning_rate or LABELS_RATE}
    distillation_steps = 0
    if isinstance(start, SNNBertPreTrainedModel):
        with timed(seconds, "fine-tune the SNN-BERT"):
            finetune(accelerator, start, batches, steps, rates["SNN-BERT"])
    else:
        rates = {"SNN-BERT": recipe.learning_rate or TAUGHT_RATE, "BERT": recipe.bert_learning_rate}
        with timed(seconds, "fine-tune the BERT"):
            finetune(accelerator, start, batches, steps, rates["BERT"])
        check_finite(start, "--bert_learning_rate")
        distillation_steps = DISTILLATION_STEPS if encoder is None else 0
        if recipe.distillation_steps is not None:
            distillation_steps = recipe.distillation_steps
        with timed(seconds, "make an SNN-BERT"):
            student = make_student(start, batches, recipe.firing_rate, encoder)
        with timed(seconds, "teach the SNN-BERT"):
            stages = {"distillation_steps": distillation_steps, "finetuning_steps": steps}
            teach(accelerator, student, start, batches, rates["SNN-BERT"], recipe.logit_weight, **stages)
        models = {"SNN-BERT": student, "BERT": start}
    spiking = models["SNN-BERT"]
    check_finite(spiking, "--learning_rate")
    with timed(seconds, "score"):
        # Scores do not depend on the order, and texts of like length need no padding.
        by_length = sorted(validation, key=lambda row: len(row["input_ids"]))
        size = 2 * recipe.batch_size
        found = {name: predictions(model, batches_in_order(by_length, collate, size)) for name, model in models.items()}
        first = batches_in_order(validation[:ENERGY_TEXTS], collate, size)
        energy = energy_report(spiking, first, run_lengths=False)
    right = found["SNN-BERT"][1]
    found["majority class"] = torch.full_like(right, int(right.bincount().argmax())), right
    results = {
        "accuracy": {name: (labels == right).sum().item() / len(right) for name, (labels, right) in found.items()},
        "macro_f1": {name: macro_f1(*labels) for name, labels in found.items()},
        "training_sentences": len(training),
        "validation_sentences": len(validation),
        "distillation_steps": distillation_steps,
        "finetuning_steps": steps,
        "learning_rates": rates,
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "firing_rates": energy.firing_rates(),
        "energy": energy.to_dict(),
        "seconds": seconds,
        "seed": recipe.seed,
    }
    return Trained(spiking, results, energy)


def make_student(
    bert: PreTrainedModel, batches: BatchOf, firing_rate: float, encoder: SNNBertModel | None = None
) -> SNNBertForSequenceClassification:
    """The SNN-BERT that `bert` teaches: its copy, calibrated on the first `batches`; or `encoder` with its head.

    Raises:
        ValueError: if `encoder` is of another shape than `bert`.
    """
    if encoder is None:
        return convert_bert(bert, [batches(i) for i in range(CALIBRATION_BATCHES)], firing_rate, **NO_DROPOUT)
    check_same_shape(encoder.config, bert.config)
    labels = {name: getattr(bert.config, name) for name in ("id2label", "label2id")}
    student = SNNBertForSequenceClassification(SNNBertConfig(**{**encoder.config.to_dict(), **NO_DROPOUT, **labels}))
    head = {name: x for name, x in bert.state_dict().items() if name.startswith(("bert.pooler.", "classifier."))}
    student.load_state_dict({**{f"bert.{name}": x for name, x in encoder.state_dict().items()}, **head})
    return student.to(bert.device)


def check_finite(model: PreTrainedModel, option: str) -> None:
    """Raise a `ValueError` that names the learning rate if a weight of `model` is not finite any more."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise ValueError(f"training diverged, weights are not finite any more: lower {option}")


def bert_autocast(accelerator: "Accelerator") -> contextlib.AbstractContextManager:
    """The precision of a BERT: bfloat16 on a CPU with instructions for it, else what Accelerate was told.

    A BERT's step takes less than half of its time then; without the instructions it would take several times as long.
    An SNN-BERT stays in float32, so that it trains on the spikes that it will have when it is used.
    What `accelerate launch --mixed_precision` says goes first, for both.
    """
    if accelerator.device.type != "cpu" or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return accelerator.autocast()
    if multiplies_bfloat16_fast(accelerator.device):
        return torch.autocast("cpu", torch.bfloat16)
    return accelerator.autocast()


def train(
    accelerator: "Accelerator",
    model: PreTrainedModel,
    batches: BatchOf,
    steps: int,
    learning_rate: float,
    description: str,
    loss_of: Callable[[Batch, int], torch.Tensor],
    muon_learning_rate: float | None = None,
) -> None:
    """AdamW, or `MuonAdamW`, with a tenth of the steps as warm-up, then linear decay, and gradients clipped at norm 1.

    `batches` makes the batch of a step, and `loss_of` takes it with the number of the step.
    """
    groups = parameter_groups(model, learning_rate, weight_decay=0.01, muon_learning_rate=muon_learning_rate)
    optimizer = MuonAdamW(groups, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)
    # Not the model: Accelerate would wrap its `forward` for good, and what follows wants float32.
    model.to(accelerator.device)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    progress = tqdm(range(steps), desc=description, unit="step")
    for step in progress:
        batch = {name: x.to(accelerator.device) for name, x in batches(step).items()}
        with accelerator.autocast():
            loss = loss_of(batch, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # Drawn with the next step: a bar in a log file has a line for each time.
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def finetune(
    accelerator: "Accelerator", model: PreTrainedModel, batches: BatchOf, steps: int, learning_rate: float
) -> None:
    """Fine-tune a BERT or an SNN-BERT on the labels."""
    model.train()
    is_spiking = isinstance(model, SNNBertPreTrainedModel)

    def loss_of(batch: Batch, step: int) -> torch.Tensor:
        with contextlib.nullcontext() if is_spiking else bert_autocast(accelerator):
            return model(**batch).loss

    description = f"fine-tune the {'SNN-BERT' if is_spiking else 'BERT'}"
    train(accelerator, model, batches, steps, learning_rate, description, loss_of)


def teach(
    accelerator: "Accelerator",
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: BatchOf,
    learning_rate: float,
    logit_weight: float,
    *,
    distillation_steps: int,
    finetuning_steps: int,
) -> None:
    """Distil the hidden states of `teacher`, then fine-tune on a mix of the labels and the teacher's logits as well.

    One schedule of the learning rate goes through both, so that the student need not start over in between.
    """
    student.train()
    teacher.eval()

    def loss_of(batch: Batch, step: int) -> torch.Tensor:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        with torch.no_grad(), bert_autocast(accelerator):
            wanted = teacher(**inputs, output_hidden_states=True)
        outputs = student(**batch, output_hidden_states=True)
        loss = hidden_state_loss(outputs.hidden_states, wanted.hidden_states, inputs["attention_mask"])
        if step < distillation_steps:
            return loss
        firing_rate_weight = student.config.firing_rate_weight
        return loss + label_and_logit_loss(
            outputs, wanted.logits.float(), logit_weight, firing_rate_weight=firing_rate_weight
        )

    steps = distillation_steps + finetuning_steps
    description, muon_rate = "distil and fine-tune the SNN-BERT", MUON_FACTOR * learning_rate
    train(accelerator, student, batches, steps, learning_rate, description, loss_of, muon_learning_rate=muon_rate)


@torch.no_grad()
def predictions(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """The index of the likeliest label of each row, and that of its right one, both `[rows]` on the CPU."""
    model.eval()
    found, right = [], []
    for batch in logging.tqdm(batches, desc="score", unit="batch"):
        found.append(model(**{name: x.to(model.device) for name, x in batch.items()}).logits.argmax(-1).cpu())
        right.append(batch["labels"].cpu())
    return torch.cat(found), torch.cat(right)


def macro_f1(found: torch.Tensor, right: torch.Tensor) -> float:
    """The mean over the labels that occur in `right` of the harmonic mean of precision and recall, both `[rows]`."""
    scores = []
    for label in right.unique():
        hits = ((found == label) & (right == label)).sum().item()
        scores.append(2 * hits / ((found == label).sum().item() + (right == label).sum().item()))
    return sum(scores) / len(scores)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the block takes as `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def write_report(trained: Trained, folder: Path, model_folder: Path, title: str, pictures: Sequence[Path] = ()) -> str:
    """Write report.json, report.md and report.html to `folder`, and the model card to `model_folder`.

    Args:
        trained: with all that report.json is to say in its results; of `"BERT"` in its scores, and of
            `"predictions"`, what is there is shown.
        folder, model_folder: where to.
        title: of the report.
        pictures: shown with the firing rates.

    Returns:
        The report as markdown.
    """
    report = report_markdown(trained, title)
    write_json(folder / "report.json", trained.results)
    (folder / "report.md").write_text(report, encoding="utf-8")
    (folder / "report.html").write_text(html_page(report, {"Firing rates": pictures}), encoding="utf-8")
    card_from_report(trained.model.config, trained.results).save(model_folder / "README.md")
    return report


def report_markdown(trained: Trained, title: str) -> str:
    """The report as markdown, see `write_report`."""
    results, energy = trained.results, trained.energy
    unit = "pair" if trained.model.config.reads_pairs else "sentence"
    scores, f1, parameters = results["accuracy"], results["macro_f1"], results["parameters"]
    seen = " (see firing_rates.png)" if "predictions" in results else ""
    spiking, bert = energy.cost.matrix_product_picojoules, energy.bert.matrix_product_picojoules
    seconds = [(name, f"{value:.1f}") for name, value in results["seconds"].items()]
    labels = {"SNN-BERT": "SNN-BERT", "BERT": "BERT, same steps", "majority class": "majority class"}
    rows = [
        (label, f"{scores[name]:.3f}", f"{f1[name]:.3f}", f"{parameters.get(name, 0):,}")
        for name, label in labels.items()
        if name in scores
    ]
    lines = [
        f"# {title}",
        "",
        *markdown_table(("model", "accuracy on validation", "macro F1", "parameters"), rows),
        f"{results['training_sentences']:,} training and {results['validation_sentences']:,} validation {unit}s, "
        f"{results['distillation_steps']} steps of distillation, {results['finetuning_steps']} of fine-tuning, "
        f"seed {results['seed']}, last step.",
        "",
        f"## Operations of a mean {unit}",
        "",
        f"Over {len(energy.statistics.lengths):,} validation {unit}s, as the firing rates below.",
        "",
        *operations_table(energy.cost),
        f"The matrix products take {spiking / 1e6:.2f} uJ, all additions; the same BERT's take {bert / 1e6:.2f} uJ, "
        "all multiplications with addition. Convention: float32 at 45 nm, 0.9 pJ an addition, 3.7 pJ a multiplication; "
        "arithmetic only, no memory traffic. `snn-bert energy` writes the full report.",
        "",
        "## Firing rates",
        "",
        f"Mean spikes per valid token of each neuron layer{seen}.",
        "",
        *energy.firing_rate_table(),
        "## Seconds",
        "",
        *markdown_table(("stage", "seconds"), seconds),
    ]
    if "predictions" in results:
        predictions = [(p["sentence"], p["label"], f"{p['score']:.3f}") for p in results["predictions"]]
        lines += ["## Three sentences, by the saved model in a fresh process", ""]
        lines += markdown_table(("sentence", "label", "score"), predictions)
    return "\n".join(lines)
