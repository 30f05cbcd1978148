"""One classifier with several heads, each of a task of its own: the heads, their losses, and a Trainer for them.

The logits are those of all heads in a row, so that the model is saved and loaded as an ordinary
`...ForSequenceClassification`. Which logits are whose is said by its `id2label`: "cola:unacceptable",
"cola:acceptable", "stsb:score", ...
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import MPNetPreTrainedModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .batches import Batch, Row
from .distillation import logit_losses
from .fine_tuning import label_names
from .mpnet import weights_of
from .sparsity import add_penalty
from .text_files import shortened
from .trainer import DistillationTrainer


class Head(NamedTuple):
    """A head.

    Args:
        name: of its task.
        labels: the names of its logits.
        is_regression: `True` for one logit that is a real number, `False` for classes.
        reads_pairs: `True` for pairs of texts, `False` for single ones.
    """

    name: str
    labels: tuple[str, ...]
    is_regression: bool
    reads_pairs: bool

    def alone(self) -> dict[str, Any]:
        """The settings of a configuration that make a model one of this head alone."""
        problem_type = "regression" if self.is_regression else "single_label_classification"
        return {**label_names(self.labels), "problem_type": problem_type}

    def logits_of(self, config: PreTrainedConfig) -> slice:
        """Which logits of a model with several heads are its own: none of them if the model has no such head."""
        own = sorted(i for i, label in config.id2label.items() if str(label).startswith(f"{self.name}:"))
        return slice(own[0], own[-1] + 1) if own else slice(0)

    def check(self, config: PreTrainedConfig, path: str) -> None:
        """Raise a `ValueError` unless the model in `path` has this head among others, with these labels."""
        names = [config.id2label[i] for i in sorted(config.id2label)]
        wanted = [f"{self.name}:{label}" for label in self.labels]
        if names[self.logits_of(config)] != wanted:
            raise ValueError(
                f"{path} must have a head for {self.name}, with the labels {wanted}; its labels are {names}"
            )


def heads_settings(heads: Sequence[Head]) -> dict[str, Any]:
    """The settings of a configuration that give a model these heads."""
    return {**label_names([f"{x.name}:{label}" for x in heads for label in x.labels]), "problem_type": None}


def last_linear(model: PreTrainedModel) -> nn.Linear:
    """The Linear that makes the logits of a classifier of texts; an MPNet's is the last one of a module."""
    return getattr(model.classifier, "out_proj", model.classifier)


@torch.no_grad()
def renew_heads(model: PreTrainedModel) -> None:
    """Give the heads of `model` new random weights, in place."""
    last_linear(model).weight.normal_(std=model.config.initializer_range)
    last_linear(model).bias.zero_()


def keep_head(model: PreTrainedModel, head: Head) -> None:
    """Keep one head of a model that has several, in place; it is then as if fine-tuned on that head's task.

    Raises:
        ValueError: if it has no such head.
    """
    head.check(model.config, model.name_or_path or "the model")
    rows, linear = head.logits_of(model.config), last_linear(model)
    linear.weight, linear.bias = (nn.Parameter(x.detach()[rows].clone()) for x in (linear.weight, linear.bias))
    model.num_labels = linear.out_features = len(head.labels)
    for setting, value in head.alone().items():
        setattr(model.config, setting, value)


def has_named_labels(id2label: Mapping[int, str]) -> bool:
    """Whether the labels have names, and not those that transformers gives: `LABEL_0`, `LABEL_1`, ..."""
    return any(str(name) != f"LABEL_{i}" for i, name in id2label.items())


def order_of_labels(id2label: Mapping[int, str], labels: Sequence[str]) -> list[int] | None:
    """Which of a model's logits each of `labels` is, or `None` if the model has other labels.

    Case does not count where it does not tell `labels` apart.
    """
    names = [str(id2label[i]) for i in sorted(id2label)]
    if len(set(map(str.casefold, labels))) == len(labels):
        names, labels = ([label.casefold() for label in part] for part in (names, labels))
    return [names.index(label) for label in labels] if sorted(names) == sorted(labels) else None


@torch.no_grad()
def order_head(model: PreTrainedModel, id2label: Mapping[int, str], labels: Sequence[str]) -> bool:
    """Put the logits of a model of one task in the order of `labels`, in place, if it has these in another order.

    Args:
        model: a classifier of texts.
        id2label: the labels of its logits. Other ones than `labels`, for example `LABEL_0`, leave it as it is.
        labels: the labels in the wanted order, see `order_of_labels`.

    Returns:
        Whether it has them.
    """
    order, linear = order_of_labels(id2label, labels), last_linear(model)
    if order is None:
        return False
    linear.weight[:], linear.bias[:] = linear.weight[order], linear.bias[order]
    return True


def renew_other_head(model: PreTrainedModel, saved: Mapping[str, Any], path: str) -> str | None:
    """Give `model` a new head, in place, if the one of its checkpoint is of other labels, though of as many.

    Args:
        model: with the labels to be trained; where these are in another order than saved, its head is put into it.
        saved: the configuration of the checkpoint, as its file has it. Labels without names keep the head.
        path: of the checkpoint, for the message.

    Returns:
        What the user is to be told of a new head, or `None`.
    """
    names = {int(i): str(name) for i, name in (saved.get("id2label") or {}).items()}
    # Labels without names may be the same ones.
    if not has_named_labels(names):
        return None
    wanted = [str(name) for _, name in sorted(model.config.id2label.items())]
    has_head = type(model).__name__ in (saved.get("architectures") or ()) and len(names) == len(wanted)
    if order_head(model, names, wanted) or not has_head:
        return None
    renew_heads(model)
    told = shortened(map(repr, names.values()))
    return f"the head of {path} is for other labels ({told}): a new one is random until trained"


@torch.no_grad()
def take_over(model: PreTrainedModel, teacher: PreTrainedModel, heads: Sequence[Head]) -> None:
    """Give `model` the embeddings, the pooler and the `heads` of a BERT or an MPNet, which may be in another order."""
    weights = weights_of(teacher) if isinstance(teacher, MPNetPreTrainedModel) else teacher.state_dict()
    for part in ("embeddings", "pooler"):
        prefix = f"bert.{part}."
        model.base_model.get_submodule(part).load_state_dict(
            {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        )
    for head in heads:
        own, taught = head.logits_of(model.config), head.logits_of(teacher.config)
        model.classifier.weight[own] = weights["classifier.weight"][taught]
        model.classifier.bias[own] = weights["classifier.bias"][taught]


def logits_by_head(logits: torch.Tensor, heads: Sequence[Head], config: PreTrainedConfig) -> list[torch.Tensor]:
    """The logits `[rows, labels of the head]` of each of the `heads`, in float32, among those of all heads."""
    return [logits[:, head.logits_of(config)].float() for head in heads]


def label_loss(
    logits: Sequence[torch.Tensor], labels: torch.Tensor, rows_head: torch.Tensor, heads: Sequence[Head]
) -> torch.Tensor:
    """The mean over rows of cross entropy, or of the squared error in a regression, each of the row's own head.

    Args:
        logits: of each head, see `logits_by_head`.
        labels (`[rows]`): floats.
        rows_head (`[rows]`): index in `heads` of the head that a row is for.
        heads: the heads.
    """
    total = labels.new_zeros((), dtype=torch.float32)
    for index, (head, of_head) in enumerate(zip(heads, logits, strict=True)):
        # Other rows count nothing, in place of being left out: how many there are, a GPU would have to be asked.
        mine = rows_head == index
        wanted = labels.where(mine, 0)
        if head.is_regression:
            of_rows = nn.functional.mse_loss(of_head[:, 0], wanted.float(), reduction="none")
        else:
            of_rows = nn.functional.cross_entropy(of_head, wanted.long(), reduction="none")
        total = total + of_rows.where(mine, 0).sum()
    return total / len(labels)


def heads_logit_loss(
    student_logits: Sequence[torch.Tensor],
    teacher_logits: Sequence[torch.Tensor],
    is_pair: torch.Tensor,
    heads: Sequence[Head],
    temperature: float = 2.0,
) -> torch.Tensor:
    """The mean over rows of `logit_losses`, summed over the heads that can read a row: a single text, or a pair.

    Args:
        student_logits, teacher_logits: of each head, see `logits_by_head`.
        is_pair (`[rows]`): which rows are pairs.
        heads: the heads.
        temperature: as for `logit_loss`.
    """
    total = is_pair.new_zeros((), dtype=torch.float32)
    for head, student, teacher in zip(heads, student_logits, teacher_logits, strict=True):
        mine = is_pair if head.reads_pairs else ~is_pair
        total = total + logit_losses(student, teacher, temperature).where(mine, 0).sum()
    return total / len(is_pair)


def rows_of_all(tasks: Sequence[Sequence[Row]]) -> Callable[[random.Random], Row]:
    """Draws from the labelled rows of several tasks, a task by the square root of the number of its rows.

    Each row gets its label as a float and the index of its task in `"task"`.
    """
    weights = [len(rows) ** 0.5 for rows in tasks]

    def draw(rng: random.Random) -> Row:
        [task] = rng.choices(range(len(tasks)), weights)
        row = rng.choice(tasks[task])
        return {**row, "labels": float(row["labels"]), "task": task}

    return draw


class MultitaskTrainer(DistillationTrainer):
    """DistillationTrainer for a model with several heads.

    Without a teacher, each row of a batch has its label as a float and the index of its head in `"task"`. With one, no
    label enters: the loss on logits is `heads_logit_loss`.

    Args:
        model: the student.
        heads: its heads, which a teacher has too.
        args, kwargs: those of DistillationTrainer; with a teacher, `processing_class` is the student's tokenizer.

    Raises:
        ValueError: if the student or the teacher lacks one of the heads, or there is a teacher and no tokenizer.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, heads: Sequence[Head], **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.heads, self.config = heads, model.config
        # No model takes what the losses need: the task of a row, and what is there for the teacher.
        self.args.remove_unused_columns = False
        if self.teacher is not None and self.processing_class is None:
            raise ValueError("`processing_class` must be the student's tokenizer, which tells pairs from single texts")
        for config in (self.config, *(() if self.teacher is None else (self.teacher.config,))):
            for head in heads:
                head.check(config, config.name_or_path or "the model")

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        unlabelled = {name: x for name, x in inputs.items() if name not in ("labels", "task")}
        if self.teacher is not None:
            return super().compute_loss(model, unlabelled, return_outputs=return_outputs, **kwargs)
        outputs = model(**unlabelled)
        logits = logits_by_head(outputs.logits, self.heads, self.config)
        loss = label_loss(logits, inputs["labels"], inputs["task"], self.heads)
        loss = add_penalty(loss, outputs, self.firing_rate_weight)
        return (loss, outputs) if return_outputs else loss

    def head_loss(self, outputs: ModelOutput, wanted: ModelOutput, inputs: Batch) -> torch.Tensor:
        assert self.teacher is not None
        # Not by the token types, which an MPNet's tokenizer does not give.
        separator = cast(PreTrainedTokenizerBase, self.processing_class).sep_token_id
        is_pair = (inputs["input_ids"] == separator).sum(1) > 1
        logits = logits_by_head(outputs.logits, self.heads, self.config)
        taught = logits_by_head(wanted.logits, self.heads, self.teacher.config)
        loss = heads_logit_loss(logits, taught, is_pair, self.heads, self.args.temperature)
        return add_penalty(loss, outputs, self.firing_rate_weight)
