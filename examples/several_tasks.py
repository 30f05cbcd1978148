"""One encoder and a head for each of several tasks, as one classifier whose logits are those of all heads in a row.

So a model of several tasks is an ordinary `...ForSequenceClassification`, saved and loaded as such. Which logits are
whose is said by its `id2label`: "cola:unacceptable", "cola:acceptable", "stsb:score", ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from glue_tasks import TASKS, Task, score
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from modeling_snn_bert.distillation import logit_loss

SCORE = "score"


def label_settings(tasks: Sequence[Task]) -> dict[str, Any]:
    """The settings of a configuration that give a model the heads of `tasks`."""
    return _named_labels([f"{task.name}:{label}" for task in tasks for label in labels_of(task)])


def labels_of(task: Task) -> tuple[str, ...]:
    """The names of a task's logits."""
    return task.labels or (SCORE,)


def settings_of(task: Task) -> dict[str, Any]:
    """The settings of a configuration that make a model one of `task` alone."""
    problem_type = "regression" if task.is_regression else "single_label_classification"
    return {**_named_labels(labels_of(task)), "problem_type": problem_type}


def _named_labels(names: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def heads_of(config: PreTrainedConfig) -> dict[str, slice]:
    """Which logits are whose, by the names of the tasks; empty for a model of one task."""
    heads: dict[str, slice] = {}
    for index in range(len(config.id2label)):
        task, colon, _ = str(config.id2label[index]).partition(":")
        # Labels of one task may have a colon too.
        if not colon or task not in TASKS:
            return {}
        heads[task] = slice(heads[task].start if task in heads else index, index + 1)
    return heads


def check_heads(config: PreTrainedConfig, tasks: Sequence[Task], path: str) -> None:
    """Raise a `ValueError` unless a model has the heads of `tasks`, in any order, and those heads have their labels."""
    heads = heads_of(config)
    for task in tasks:
        names = [f"{task.name}:{label}" for label in labels_of(task)]
        if [config.id2label[i] for i in range(len(config.id2label))[heads.get(task.name, slice(0))]] != names:
            raise ValueError(
                f"{path} must have a head for {task.name} with the labels {list(labels_of(task))}; it has the labels "
                f"{list(config.id2label.values())}"
            )


def load_for_task(model_class: type[PreTrainedModel], path: str, task: Task, **options: Any) -> PreTrainedModel:
    """The classifier in `path` as one of `task`.

    Of a model of several tasks it keeps the head of `task`, and gets a new one if there is none. The head of a model of
    one task is kept if it has as many labels.

    Args:
        model_class: a BERT or an SNN-BERT for sequence classification.
        path: folder or Hub id.
        task: the task.
        options: further arguments of `from_pretrained`.
    """
    config = AutoConfig.from_pretrained(path, revision=options.get("revision", "main"))
    heads = heads_of(config)
    if task.name not in heads:
        return model_class.from_pretrained(path, ignore_mismatched_sizes=bool(heads), **settings_of(task), **options)
    model = model_class.from_pretrained(path, **options)
    keep_head(model, task)
    return model


def keep_head(model: PreTrainedModel, task: Task) -> None:
    """Leave a model of several tasks the head of one alone, in place; it is then as if fine-tuned on that one.

    Raises:
        ValueError: if it has no such head.
    """
    check_heads(model.config, [task], model.name_or_path)
    rows = heads_of(model.config)[task.name]
    classifier = nn.Linear(model.classifier.in_features, rows.stop - rows.start, device=model.device)
    with torch.no_grad():
        classifier.weight.copy_(model.classifier.weight[rows])
        classifier.bias.copy_(model.classifier.bias[rows])
    model.classifier = classifier
    model.num_labels = classifier.out_features
    for name, value in settings_of(task).items():
        setattr(model.config, name, value)


def label_loss(
    logits: torch.Tensor, labels: torch.Tensor, rows_task: torch.Tensor, tasks: Sequence[Task], heads: dict[str, slice]
) -> torch.Tensor:
    """The mean over rows of cross entropy, or of the squared error in a regression, each of the row's own head.

    Args:
        logits (`[rows, logits of all heads]`).
        labels (`[rows]`): floats.
        rows_task (`[rows]`): index in `tasks` of the task that a row is of.
        tasks: the tasks.
        heads: see `heads_of`.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for index, task in enumerate(tasks):
        mine = rows_task == index
        of_task, wanted = logits[mine][:, heads[task.name]].float(), labels[mine]
        if task.is_regression:
            total = total + nn.functional.mse_loss(of_task[:, 0], wanted.float(), reduction="sum")
        else:
            total = total + nn.functional.cross_entropy(of_task, wanted.long(), reduction="sum")
    return total / len(logits)


def heads_logit_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    is_pair: torch.Tensor,
    tasks: Sequence[Task],
    heads: dict[str, slice],
    teacher_heads: dict[str, slice],
) -> torch.Tensor:
    """`logit_loss` of each head on the rows that it can read, single texts or pairs, summed over the heads.

    A head whose rows are few in the batch counts by their share, so that every row has the same weight.

    Args:
        student_logits, teacher_logits (`[rows, logits of all heads]`).
        is_pair (`[rows]`): which rows are pairs.
        tasks: the tasks to teach.
        heads, teacher_heads: see `heads_of`.
    """
    total = student_logits.new_zeros((), dtype=torch.float32)
    for task in tasks:
        mine = is_pair if len(task.columns) == 2 else ~is_pair
        count = int(mine.sum())
        if count:
            student = student_logits[mine][:, heads[task.name]].float()
            teacher = teacher_logits[mine][:, teacher_heads[task.name]].float()
            total = total + count / len(mine) * logit_loss(student, teacher)
    return total


def score_tasks(
    tasks: Sequence[Task], predictions: dict[str, list[tuple[list[float], float]]], heads: dict[str, slice]
) -> dict[str, float]:
    """`average`, the mean of the tasks' scores, and each task's figures with its name in front.

    Args:
        tasks: the tasks.
        predictions: by the name of the task, logits of all heads and label of each row.
        heads: see `heads_of`.
    """
    figures: dict[str, float] = {}
    scores = []
    for task in tasks:
        logits = [row[heads[task.name]] for row, _ in predictions[task.name]]
        found = score(task, logits, [label for _, label in predictions[task.name]])
        scores.append(found[task.metrics[0]])
        figures |= {f"{task.name}_{name}": value for name, value in found.items()}
    return {"average": sum(scores) / len(scores), **figures}
