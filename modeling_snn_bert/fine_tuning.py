"""The recipe from a BERT to a spiking classifier: batches, training, teaching, scores and the report.

`examples/quickstart.py` and the command `snn-bert train` follow it.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging

from .batches import batches_by_length
from .distillation import hidden_state_loss, label_and_logit_loss, parameter_groups
from .energy import EnergyReport
from .energy.tables import markdown_table, operations_table
from .modeling_snn_bert import SNNBertPreTrainedModel

if TYPE_CHECKING:
    from accelerate import Accelerator

# The student is to hit the teacher's states, and noise only blurs them.
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Batches that calibrate a BERT that is converted, and steps that it is then distilled for.
CALIBRATION_BATCHES = 12
DISTILLATION_STEPS = 130


def bert_autocast(accelerator: "Accelerator") -> contextlib.AbstractContextManager:
    """The precision of a BERT: bfloat16 on a CPU with instructions for it, else what Accelerate was told.

    A BERT's step takes less than half of its time then; without the instructions it would take several times as long.
    An SNN-BERT stays in float32, so that it trains on the spikes that it will have when it is used.
    What `accelerate launch --mixed_precision` says goes first, for both.
    """
    if accelerator.device.type != "cpu" or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return accelerator.autocast()
    # An older torch does not say what the CPU has; training stays in float32.
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if features.get("avx512_bf16") or features.get("amx_bf16"):
        return torch.autocast("cpu", torch.bfloat16)
    return accelerator.autocast()


def training_batches(
    data: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> Iterator[dict]:
    """Padded batches without end, shuffled anew each epoch; sentences of like length go together.

    Args:
        data: tokenized rows with the index of their label in `"labels"`.
        tokenizer: pads them.
        batch_size: rows of a batch; the last of an epoch may have fewer.
        seed: of the order.
    """
    collate = DataCollatorWithPadding(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows = [dict(row) for row in data]
    lengths = [len(row["input_ids"]) for row in rows]
    while True:
        for batch in batches_by_length(lengths, batch_size, generator):
            yield collate([rows[i] for i in batch])


def train(
    accelerator: "Accelerator",
    model: PreTrainedModel,
    batches: Iterator[dict],
    steps: int,
    learning_rate: float,
    description: str,
    loss_of: Callable[[dict, int], torch.Tensor],
) -> None:
    """AdamW with a tenth of the steps as warm-up, then linear decay, and gradients clipped at norm 1.

    `loss_of` takes a batch and the number of the step.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate, weight_decay=0.01), fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)
    # Not the model: Accelerate would wrap its `forward` for good, and what follows wants float32.
    model.to(accelerator.device)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    progress = tqdm(range(steps), desc=description, unit="step")
    for step in progress:
        batch = {name: x.to(accelerator.device) for name, x in next(batches).items()}
        with accelerator.autocast():
            loss = loss_of(batch, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def finetune(
    accelerator: "Accelerator",
    model: PreTrainedModel,
    batches: Iterator[dict],
    steps: int,
    learning_rate: float,
    description: str = "fine-tune the BERT",
) -> None:
    """Fine-tune a BERT or an SNN-BERT on the labels."""
    model.train()
    is_spiking = isinstance(model, SNNBertPreTrainedModel)

    def loss_of(batch: dict, step: int) -> torch.Tensor:
        with contextlib.nullcontext() if is_spiking else bert_autocast(accelerator):
            return model(**batch).loss

    train(accelerator, model, batches, steps, learning_rate, description, loss_of)


def teach(
    accelerator: "Accelerator",
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterator[dict],
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

    def loss_of(batch: dict, step: int) -> torch.Tensor:
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
    train(accelerator, student, batches, steps, learning_rate, "distil and fine-tune the SNN-BERT", loss_of)


@torch.no_grad()
def predictions(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """The index of the likeliest label of each row, and that of its right one, both `[rows]` on the CPU."""
    model.eval()
    found, right = [], []
    for batch in logging.tqdm(batches, desc="score", unit="batch"):
        found.append(model(**{name: x.to(model.device) for name, x in batch.items()}).logits.argmax(-1).cpu())
        right.append(batch["labels"].cpu())
    return torch.cat(found), torch.cat(right)


def accuracy(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Share of sentences that get the right label."""
    found, right = predictions(model, batches)
    return (found == right).sum().item() / len(right)


def macro_f1(found: torch.Tensor, right: torch.Tensor) -> float:
    """The mean over the labels that occur in `right` of the harmonic mean of precision and recall, both `[rows]`."""
    scores = []
    for label in right.unique():
        hits = ((found == label) & (right == label)).sum().item()
        scores.append(2 * hits / ((found == label).sum().item() + (right == label).sum().item()))
    return sum(scores) / len(scores)


class timed:
    """Adds the seconds that the block takes to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def report_markdown(results: Mapping[str, Any], energy: EnergyReport, title: str = "SNN-BERT quickstart") -> str:
    """The report as markdown.

    Args:
        results: what goes to report.json; of `"BERT"` in `"accuracy"`, `"macro_f1"` and `"predictions"`, what is there.
        energy: the energy of the SNN-BERT on held-out sentences.
        title: of the report.
    """
    scores, f1, parameters = results["accuracy"], results.get("macro_f1"), results["parameters"]
    seen = " (see firing_rates.png)" if "predictions" in results else ""
    shown = [(name, {"BERT": "BERT, same steps"}.get(name, name)) for name in ("SNN-BERT", "BERT", "majority class")]
    lines = [f"# {title}", ""]
    lines += markdown_table(
        ("model", "accuracy on validation", *(("macro F1",) if f1 else ()), "parameters"),
        [
            (label, f"{scores[name]:.3f}", *((f"{f1[name]:.3f}",) if f1 else ()), f"{parameters.get(name, 0):,}")
            for name, label in shown
            if name in scores
        ],
    )
    lines += [
        f"{results['training_sentences']:,} training and {results['validation_sentences']:,} validation sentences, "
        f"{results['distillation_steps']} steps of distillation, {results['finetuning_steps']} of fine-tuning, "
        f"seed {results['seed']}, last step.",
        "",
        "## Operations of a mean sentence",
        "",
        f"Over {len(energy.statistics.lengths):,} validation sentences, as the firing rates below.",
        "",
    ]
    lines += operations_table(energy.cost)
    spiking, bert = energy.cost.matrix_product_picojoules, energy.bert.matrix_product_picojoules
    lines += [
        f"The matrix products take {spiking / 1e6:.2f} uJ, all additions; the same BERT's take {bert / 1e6:.2f} uJ, "
        "all multiplications with addition. Convention: float32 at 45 nm, 0.9 pJ an addition, 3.7 pJ a multiplication; "
        "arithmetic only, no memory traffic. `snn-bert energy` writes the full report.",
        "",
        "## Firing rates",
        "",
        f"Mean spikes per valid token of each neuron layer{seen}.",
        "",
    ]
    lines += energy.firing_rate_table()
    lines += ["## Seconds", ""]
    seconds = [(name, f"{value:.1f}") for name, value in results["seconds"].items()]
    lines += markdown_table(("stage", "seconds"), seconds)
    if "predictions" in results:
        lines += ["## Three sentences, by the saved model in a fresh process", ""]
        lines += markdown_table(
            ("sentence", "label", "score"),
            [(p["sentence"], p["label"], f"{p['score']:.3f}") for p in results["predictions"]],
        )
    return "\n".join(lines)
