"""One classifier with several heads, each of a task of its own: their losses, and a Trainer for them.

The logits are those of all heads in a row, so that the model is saved and loaded as an ordinary
`...ForSequenceClassification`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .batches import Batch, Collate, Row
from .distillation import logit_losses
from .sparsity import add_penalty
from .trainer import FOR_TEACHER, DistillationTrainer


class Head(NamedTuple):
    """A head.

    Args:
        logits: which of the model's logits are its own.
        is_regression: whether it has one logit, a real number; the others tell classes apart.
        reads_pairs: whether it is for pairs of texts; the others are for single ones.
    """

    logits: slice
    is_regression: bool
    reads_pairs: bool


def label_loss(
    logits: torch.Tensor, labels: torch.Tensor, rows_head: torch.Tensor, heads: Sequence[Head]
) -> torch.Tensor:
    """The mean over rows of cross entropy, or of the squared error in a regression, each of the row's own head.

    Args:
        logits (`[rows, logits of all heads]`).
        labels (`[rows]`): floats.
        rows_head (`[rows]`): index in `heads` of the head that a row is for.
        heads: the heads.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for index, head in enumerate(heads):
        # Other rows count nothing, in place of being left out: how many there are, a GPU would have to be asked.
        mine = rows_head == index
        of_head, wanted = logits[:, head.logits].float(), labels.where(mine, 0)
        if head.is_regression:
            of_rows = nn.functional.mse_loss(of_head[:, 0], wanted.float(), reduction="none")
        else:
            of_rows = nn.functional.cross_entropy(of_head, wanted.long(), reduction="none")
        total = total + of_rows.where(mine, 0).sum()
    return total / len(logits)


def heads_logit_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    is_pair: torch.Tensor,
    heads: Sequence[Head],
    teacher_heads: Sequence[Head],
) -> torch.Tensor:
    """The mean over rows of `logit_losses`, summed over the heads that can read a row: a single text, or a pair.

    Args:
        student_logits, teacher_logits (`[rows, logits of all heads]`).
        is_pair (`[rows]`): which rows are pairs.
        heads, teacher_heads: the same heads in the same order, each with its place among its model's logits.
    """
    total = student_logits.new_zeros((), dtype=torch.float32)
    for head, teacher_head in zip(heads, teacher_heads, strict=True):
        mine = is_pair if head.reads_pairs else ~is_pair
        student, teacher = student_logits[:, head.logits].float(), teacher_logits[:, teacher_head.logits].float()
        total = total + logit_losses(student, teacher).where(mine, 0).sum()
    return total / len(is_pair)


class CollateForTeacher:
    """Makes a batch, and the teacher's of the same texts by its own tokenizer, whose names begin with `FOR_TEACHER`.

    Args:
        collate: makes the batch of rows without their `"texts"`.
        tokenizer: the teacher's.
        max_seq_length: longer inputs of the teacher are truncated.
    """

    def __init__(self, collate: Collate, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
        self.collate, self.tokenizer, self.max_seq_length = collate, tokenizer, max_seq_length

    def __call__(self, rows: list[Row]) -> Batch:
        inputs = self.tokenizer(
            [row["texts"] for row in rows],
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )
        batch = self.collate([{name: x for name, x in row.items() if name != "texts"} for row in rows])
        return {**batch, **{FOR_TEACHER + name: x for name, x in inputs.items()}}


class MultitaskTrainer(DistillationTrainer):
    """DistillationTrainer for a model with several heads.

    Without a teacher, each row of a batch has its label as a float and the index of its head in `"task"`. With one, no
    label enters: the loss on logits is `heads_logit_loss`.

    Args:
        model: the student.
        heads: its heads.
        teacher_heads: the same heads in the same order, with their places among the teacher's logits.
        args, kwargs: those of DistillationTrainer; with a teacher, `processing_class` is the student's tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        heads: Sequence[Head],
        teacher_heads: Sequence[Head] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.heads, self.teacher_heads = heads, teacher_heads

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.teacher is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        outputs = model(**{name: x for name, x in inputs.items() if name not in ("labels", "task")})
        loss = label_loss(outputs.logits, inputs["labels"], inputs["task"], self.heads)
        loss = add_penalty(loss, outputs, self.firing_rate_weight)
        return (loss, outputs) if return_outputs else loss

    def logit_part(self, outputs: ModelOutput, wanted: ModelOutput, inputs: Batch) -> torch.Tensor:
        # Not by the token types, which an MPNet's tokenizer does not give.
        separator = cast(PreTrainedTokenizerBase, self.processing_class).sep_token_id
        is_pair = (inputs["input_ids"] == separator).sum(1) > 1
        loss = heads_logit_loss(outputs.logits, wanted.logits, is_pair, self.heads, self.teacher_heads)
        return add_penalty(loss, outputs, self.firing_rate_weight)
