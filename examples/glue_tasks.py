"""What the scripts for GLUE and for tasks like it share: data, figures, classifiers with their heads, energy.

Tasks are read from GLUE's files, from files of one's own or from the Hub.
The figures are those of GLUE's own script, computed here by scikit-learn and scipy, so that no code has to be
downloaded: accuracy, F1 (MRPC, QQP), Matthews correlation (CoLA), Pearson and Spearman correlation (STS-B).
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import scipy
import sklearn
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.batches import Batch, batches_in_order
from modeling_snn_bert.conversion import FAMILIES, convert_bert
from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.multitask import Head, keep_head, renew_heads, renew_other_head
from modeling_snn_bert.settings import ConversionArguments
from modeling_snn_bert.teacher_inputs import longest_input
from modeling_snn_bert.text_blocks import Separators
from modeling_snn_bert.text_files import check_columns, read_rows
from modeling_snn_bert.trainer import DistillationTrainingArguments

logger = logging.get_logger(__name__)
METRICS_FROM = f"scikit-learn {sklearn.__version__}, scipy {scipy.__version__}"
METRICS: dict[str, Callable] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0),
    "matthews_correlation": matthews_corrcoef,
}
CORRELATIONS = ("combined", "pearson", "spearman")
ENTAILMENT = ("entailment", "not_entailment")
SCORE = "score"
CALIBRATION_TOKENS = 10_000
WHOLE_NUMBER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class Task:
    """One classification or regression task.

    Attributes:
        name: as users write it on the command line.
        folder: name of its folder in the standard layout.
        columns: names of one or two text columns.
        label_column: name of the column of labels.
        labels: names of the classes in their order; empty for a regression.
        metrics: what is reported; the first is the task's score.
        header: column names of files that have no header line.
        validation_files: name of the dev file, by split.
        in_tsv: names that columns have in the files, where they are others.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label_column: str = "label"
    header: tuple[str, ...] | None = None
    validation_files: dict[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})
    in_tsv: dict[str, str] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def head(self) -> Head:
        """Its head in a model."""
        return Head(self.name, self.labels or (SCORE,), self.is_regression, len(self.columns) == 2)


_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews_correlation", "accuracy"),
            header=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", "SST-2", ("sentence",), ("negative", "positive")),
        Task(
            "mrpc",
            "MRPC",
            _PAIR,
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            in_tsv={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        ),
        Task("stsb", "STS-B", _PAIR, (), CORRELATIONS, in_tsv={"label": "score"}),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            in_tsv={"label": "is_duplicate"},
        ),
        Task(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation_files={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
            in_tsv={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        ),
        Task("qnli", "QNLI", ("question", "sentence"), ENTAILMENT),
        Task("rte", "RTE", _PAIR, ENTAILMENT),
        Task("wnli", "WNLI", _PAIR, ("not_entailment", "entailment")),
    )
}


@dataclass
class TaskArguments:
    """The task and its data."""

    task_name: str | None = HfArg(default=None, help="cola, sst2, mrpc, stsb, qqp, mnli, ...")
    data_dir: str | None = HfArg(default=None, help="GLUE's folder in its standard layout")
    dataset_name: str | None = HfArg(default=None, help="a dataset on the Hub")
    dataset_config_name: str | None = None
    train_file: str | None = HfArg(default=None, help=".csv, .tsv, .json or .jsonl")
    validation_file: str | None = None
    text_column: str | None = HfArg(default=None, help="column of the (first) text")
    text_pair_column: str | None = HfArg(default=None, help="column of the second text")
    label_column: str = "label"
    max_seq_length: int = HfArg(default=128, aliases=["--max_length"], help="longer inputs are truncated")
    max_train_samples: int | None = HfArg(default=None, help="the same rows for every seed")
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_train_samples", 1), ("max_eval_samples", 1), ("max_seq_length", 4)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        if self.text_pair_column and not self.text_column:
            raise ValueError("--text_pair_column needs --text_column")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("--dataset_config_name needs --dataset_name")

    def load(self) -> tuple[Task, DatasetDict]:
        """The task and its data: splits `train` and one or two that begin with `validation`, cut to the wanted number.

        Without a `task_name`, labels that are real numbers make it a regression, and all others a classification by
        accuracy. Training rows are drawn once, whatever the seed.

        Returns:
            The task, and data with its text columns as strings and `label` as a class or a real number.

        Raises:
            ValueError: if the arguments do not fit together, or a column, a label or a file is not what it should be.
            FileNotFoundError: if a file is missing.
        """
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"--task_name must be one of {', '.join(TASKS)}; got {self.task_name!r}")
        if bool(self.train_file) != bool(self.validation_file):
            raise ValueError("--train_file and --validation_file must be given together")
        if sum(map(bool, (self.data_dir, self.train_file, self.dataset_name))) > 1:
            raise ValueError("give one of --data_dir, --dataset_name, and --train_file with --validation_file")
        task = TASKS[self.task_name] if self.task_name else None
        if task is not None and (self.text_column or self.label_column != task.label_column):
            raise ValueError(
                f"the columns of {task.name} are {[*task.columns, task.label_column]}: leave out --text_column, "
                "--text_pair_column and --label_column, or --task_name"
            )
        data = self.read(task)
        if "train" not in data or not any(split.startswith("validation") for split in data):
            raise ValueError(f"the data must have the splits train and validation, it has {list(data)}")
        if task is None:
            columns = tuple(column for column in (self.text_column, self.text_pair_column) if column)
            task = guess_task(data, columns or None, self.label_column)
        splits = {}
        for split in (split for split in data if split == "train" or split.startswith("validation")):
            rows = checked_rows(data[split], task, split)
            limit = self.max_train_samples if split == "train" else self.max_eval_samples
            if limit is not None and limit < len(rows):
                rows = (rows.shuffle(seed=0) if split == "train" else rows).select(range(limit))
            splits[split] = rows
        return task, DatasetDict(splits)

    def read(self, task: Task | None) -> DatasetDict:
        """The rows as they are, from wherever the arguments say; of a `task` alone, from the GLUE of the Hub."""
        if self.data_dir:
            if task is None:
                raise ValueError("--data_dir needs a --task_name, which says how its files are to be read")
            return read_glue_folder(Path(self.data_dir), task)
        if self.train_file and self.validation_file:
            return DatasetDict({"train": read_file(self.train_file), "validation": read_file(self.validation_file)})
        if self.dataset_name:
            return load_dataset(self.dataset_name, self.dataset_config_name)
        if task is None:
            raise ValueError("give a --task_name, a --dataset_name, or --train_file and --validation_file")
        return load_dataset("nyu-mll/glue", task.name)


def read_glue_folder(folder: Path, task: Task) -> DatasetDict:
    """The training and dev rows of `task` from GLUE's tab-separated files, under `folder` or `folder/<task>`.

    Raises:
        FileNotFoundError: if there are no such files.
        ValueError: if a file cannot be read as that task's.
    """
    if (folder / task.folder).is_dir():
        folder = folder / task.folder
    splits = {}
    for split, name in {"train": "train.tsv", **task.validation_files}.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} of {task.folder} in {folder}")
        rows = [row.value for row in read_rows(folder / name, header=task.header)]
        names = {column: task.in_tsv.get(column, column) for column in (*task.columns, "label")}
        if rows:
            check_columns(folder / name, rows[0], *names.values())
        splits[split] = Dataset.from_dict({column: [row[name] for row in rows] for column, name in names.items()})
    return DatasetDict(splits)


def read_file(path: str) -> Dataset:
    """The rows of a .csv, .tsv, .json or .jsonl file; what is in a table is text.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is of another kind, or its rows have no columns.
    """
    rows = [row.value for row in read_rows(Path(path))]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a .csv, .tsv, .json or .jsonl file, whose rows have columns")
    return Dataset.from_list(rows)


def guess_task(data: DatasetDict, text_columns: tuple[str, ...] | None, label_column: str) -> Task:
    """The task of data that is none of GLUE's.

    Raises:
        ValueError: if a column is missing, or the labels are those of no task.
    """
    names = data["train"].column_names
    if text_columns is None:
        text_columns = next((c for c in (_PAIR, ("sentence",), ("text",)) if set(c) <= set(names)), None)
        if text_columns is None:
            raise ValueError(f"name the text columns (--text_column, --text_pair_column); the data has {names}")
    check_columns("the data", names, *text_columns, label_column)
    label_feature = data["train"].features[label_column]
    values = data["train"][label_column]
    if isinstance(label_feature, ClassLabel):
        labels = tuple(label_feature.names)
    elif are_real_numbers(values):
        return Task("regression", "", text_columns, (), CORRELATIONS, label_column)
    else:
        names = set(map(str, values))
        labels = tuple(sorted(names, key=int if all(map(WHOLE_NUMBER.fullmatch, names)) else None))
        if not 2 <= len(labels) <= 1000:
            raise ValueError(f"the training data must have between 2 and 1,000 different labels, got {len(labels)}")
    return Task("classification", "", text_columns, labels, ("accuracy",), label_column)


def are_real_numbers(values: Sequence[Any]) -> bool:
    """Whether all are numbers with a decimal point, or texts that are numbers and not all whole ones."""
    if not all(isinstance(value, str) for value in values):
        return all(isinstance(value, float) for value in values)
    try:
        list(map(float, values))
    except ValueError:
        return False
    return not all(WHOLE_NUMBER.fullmatch(value) for value in values)


def checked_rows(rows: Dataset, task: Task, split: str) -> Dataset:
    """The task's columns of `rows`, labels as a class of `task` or as a real number.

    Raises:
        ValueError: if a column is missing, a text is not a string, or a label is none of the task's.
    """
    check_columns(f"the {split} data of {task.name}", rows.column_names, *task.columns, task.label_column)
    if not len(rows):
        raise ValueError(f"the {split} data of {task.name} has no rows")
    has_indices = isinstance(rows.features[task.label_column], ClassLabel)
    labels = []
    for number, value in enumerate(rows[task.label_column]):
        try:
            labels.append(float(value) if task.is_regression else _class_of(value, task.labels, has_indices))
            if not math.isfinite(labels[-1]):
                raise ValueError(value)
        except (KeyError, TypeError, ValueError):
            wanted = "a finite number" if task.is_regression else f"one of {list(task.labels)[:5]} or its index"
            raise ValueError(
                f"the label of row {number} of the {split} data of {task.name} must be {wanted}, got {value!r}"
            ) from None
    for column in task.columns:
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise ValueError(f"{column} of row {number} of the {split} data must be a text, got {value!r}")
    label = Value("float32") if task.is_regression else Value("int64")
    features = Features({**{c: Value("string") for c in task.columns}, "label": label})
    return Dataset.from_dict({**{c: list(rows[c]) for c in task.columns}, "label": labels}, features=features)


def _class_of(value: object, names: tuple[str, ...], has_indices: bool) -> int:
    """The index of a label: of its name, or where names are no numbers, or `has_indices`, the index that it is."""
    if not has_indices and str(value) in names:
        return names.index(str(value))
    index = int(str(value))
    if not 0 <= index < len(names) or (not has_indices and all(map(WHOLE_NUMBER.fullmatch, names))):
        raise ValueError(value)
    return index


def score(task: Task, logits, labels) -> dict[str, float]:
    """The task's figures, its score first, from logits `[rows, classes]` (`[rows, 1]` for a regression) and labels.

    A correlation with predictions that are all the same counts as 0.

    Raises:
        ValueError: if the logits are not finite, or are not as many as the labels.
    """
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"there must be as many predictions as labels, got {len(logits)} and {len(labels)}")
    if not all(math.isfinite(value) for row in logits for value in row):
        raise ValueError("the predictions hold NaN or infinite values")
    if not task.is_regression:
        predictions = [max(range(len(row)), key=row.__getitem__) for row in logits]
        return {name: float(METRICS[name](labels, predictions)) for name in task.metrics}
    predictions = [row[0] for row in logits]
    constant = len(set(predictions)) == 1 or len(set(labels)) == 1
    pearson, spearman = (0.0 if constant else float(x(predictions, labels).statistic) for x in (pearsonr, spearmanr))
    return dict(zip(CORRELATIONS, ((pearson + spearman) / 2, pearson, spearman), strict=True))


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Token ids and `labels`, nothing else."""

    def encode(rows: dict) -> dict:
        texts = [rows[column] for column in task.columns]
        inputs = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        return {**inputs, "labels": rows["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def fitting_length(
    wanted: int, tokenizer: PreTrainedTokenizerBase, path: str, teacher_tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """The tokens at which inputs are cut: as many as `wanted`, or as student and teacher take, with a warning."""
    limits = {path: longest_input(AutoConfig.from_pretrained(path))}
    if teacher_tokenizer is not None:
        teacher_path = teacher_tokenizer.name_or_path
        limit = longest_input(AutoConfig.from_pretrained(teacher_path))
        # A pair may have more separators for the teacher.
        more = max(0, Separators(teacher_tokenizer).between - Separators(tokenizer).between)
        limits[teacher_path] = None if limit is None else limit - more
    for name, limit in limits.items():
        if limit is not None and limit < wanted:
            logger.warning(f"inputs are cut at {limit} tokens, not {wanted} (--max_seq_length): {name} takes no more")
            wanted = limit
    return wanted


def check_vocabulary(teacher: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, otherwise: str = "") -> None:
    """Raise a `ValueError` if the teacher's tokenizer gives other token ids than `tokenizer`."""
    if teacher.get_vocab() != tokenizer.get_vocab():
        path = teacher.name_or_path
        raise ValueError(
            f"--teacher_name_or_path must have the vocabulary of the model, {path} has another one{otherwise}"
        )


def load_teacher_tokenizer(
    path: str | None, args: DistillationTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher, if there is one; what can be known of it before any work is checked.

    Args:
        path: folder or Hub id, or `None`.
        args: what it teaches.
        tokenizer: the student's.

    Raises:
        ValueError: if its states are to be compared with the student's, token by token, and it is neither a BERT nor an
            MPNet, or its tokenizer gives other token ids.
    """
    if path is None:
        return None
    advice = ": give --hidden_weight 0 (and no --attention_weight or --embedding_weight)"
    model_type = AutoConfig.from_pretrained(path).model_type
    # A student compares its hidden states with those of what it may be made of.
    if args.compares_states and model_type not in FAMILIES:
        raise ValueError(
            f"--teacher_name_or_path must be a BERT or an MPNet, {path} is of the type {model_type!r}{advice}"
        )
    teacher_tokenizer = AutoTokenizer.from_pretrained(path)
    if args.compares_states:
        check_vocabulary(teacher_tokenizer, tokenizer, advice)
    return teacher_tokenizer


def load_teacher(path: str, attention_weights: bool) -> PreTrainedModel:
    """The classifier that teaches, with attention weights if they are taught.

    Raises:
        ValueError: if it has no head.
    """
    attention = "eager" if attention_weights else None
    teacher, info = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"--teacher_name_or_path must be a classifier, {path} lacks {', '.join(sorted(info['missing_keys']))}"
        )
    return teacher


def attention_implementation(weights: bool, device: torch.device, dropout: float) -> str | None:
    """The attention to train with, or `None` for the default.

    Only the eager attention returns its weights. Without dropout it is also the faster one on a CPU, where the backward
    pass of sdpa takes one and a half times as long in float32 and seven times in bfloat16.
    """
    return "eager" if weights or (device.type == "cpu" and not dropout) else None


@dataclass
class RunsArguments:
    """The runs, and what is measured of their models."""

    seeds: list[int] | None = HfArg(default=None, help="a run for each, and their mean and spread (default: --seed)")
    energy_samples: int = HfArg(default=256, help="dev rows that firing rates and energy are measured on; 0 for none")

    def __post_init__(self) -> None:
        if self.energy_samples < 0:
            raise ValueError(f"--energy_samples must be >= 0, got {self.energy_samples}")


@dataclass(kw_only=True)
class ClassifierArguments(ConversionArguments):
    """The classifier that is trained: an SNN-BERT, a BERT or an MPNet, or one of these that is converted first."""

    model_name_or_path: str = HfArg(help="an SNN-BERT, a BERT, an MPNet, ...: folder or Hub id")
    convert: bool = HfArg(default=False, help="convert the BERT or MPNet by calibration on the training rows")

    def check(self, attention_weights: bool = False) -> None:
        """Raise a `ValueError` if the checkpoint cannot be converted, or the settings do not fit it.

        `attention_weights` says that they will be asked for.
        """
        path, settings = self.model_name_or_path, self.settings()
        config = AutoConfig.from_pretrained(path)
        dropout = self.attention_dropout()
        if self.convert and config.model_type not in FAMILIES:
            raise ValueError(f"--convert is for a BERT or an MPNet, {path} is of the type {config.model_type!r}")
        if settings and not (self.convert or config.model_type == SNNBertConfig.model_type):
            raise ValueError(f"{sorted(settings)} are settings of an SNN-BERT: give --convert to make one of the BERT")
        if attention_weights and config.model_type not in (*FAMILIES, SNNBertConfig.model_type):
            raise ValueError(
                f"--attention_weight takes an SNN-BERT, a BERT or an MPNet, {path} is of the type {config.model_type!r}"
            )
        if attention_weights and dropout:
            raise ValueError(
                f"--attention_weight compares attention weights, to which a dropout of {dropout} would be applied: "
                "give --config_overrides attention_probs_dropout_prob=0"
            )

    def attention_dropout(self) -> float:
        """That of the model which is trained."""
        config = AutoConfig.from_pretrained(self.model_name_or_path)
        own = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
        return self.settings().get("attention_probs_dropout_prob", own)

    def load(
        self,
        task: Task,
        train: Dataset,
        collate: Callable,
        device: torch.device,
        attention_weights: bool = False,
    ) -> PreTrainedModel:
        """The classifier of `task`, calibrated on `train` in batches of `collate` if it is converted; `check` it first.

        The head is new unless the checkpoint has one of `task`, alone or among others; seed the random numbers
        first. `attention_weights` says that they will be asked for.
        """
        settings, path = self.settings(), self.model_name_or_path
        is_spiking = AutoConfig.from_pretrained(path).model_type == SNNBertConfig.model_type
        model = load_for_task(
            path,
            task,
            attn_implementation=attention_implementation(attention_weights, device, self.attention_dropout()),
            dtype=torch.float32,  # a checkpoint in half precision is trained in full
            **(settings if is_spiking else {}),
        ).to(device)
        if self.convert:
            model = convert_bert(model, calibration_batches(train, collate), self.firing_rate, **settings).train()
        if isinstance(model.config, SNNBertConfig):
            model.config.reads_pairs = task.head.reads_pairs
        return model


def calibration_batches(train: Dataset, collate: Callable) -> list[Batch]:
    """Batches of some 10,000 tokens from the first rows of `train`."""
    batches: list[Batch] = []
    tokens = 0
    for batch in batches_in_order(train, collate, 32):
        batches.append(batch)
        tokens += int(batch["attention_mask"].sum())
        if tokens >= CALIBRATION_TOKENS:
            break
    return batches


def measure_energy(
    model: PreTrainedModel, rows: Dataset, collate: Callable, samples: int, batch_size: int
) -> dict[str, Any] | None:
    """Firing rates and energy of an SNN-BERT on the first rows; `None` for a BERT, or if `samples` is 0.

    Energy is that of a mean sequence in picojoules, by the conventions of `modeling_snn_bert.energy`.
    """
    if samples == 0 or model.config.model_type != SNNBertConfig.model_type:
        return None
    rows = rows.select(range(min(samples, len(rows))))
    report = energy_report(model.eval(), batches_in_order(rows, collate, batch_size), run_lengths=False)
    rates = report.firing_rates()
    return {
        "sequences": len(rows),
        "tokens_per_sequence": report.statistics.lengths.float().mean().item(),
        "mean_firing_rate": statistics.fmean(rates.values()),
        "firing_rates": rates,
        "picojoules": {
            cost.name: {"matrix_products": cost.matrix_product_picojoules, "all_arithmetic": cost.picojoules}
            for cost in report.costs
        },
    }


def several_heads(config: PreTrainedConfig) -> list[str]:
    """The tasks of a model of several tasks, in the order of its logits; none for a model of one."""
    parts = [str(config.id2label[i]).partition(":") for i in sorted(config.id2label)]
    return list(dict.fromkeys(name for name, colon, _ in parts if colon and name in TASKS))


def load_for_task(path: str, task: Task, **options: Any) -> PreTrainedModel:
    """The classifier in `path` as one of `task`.

    Of a model of several tasks it keeps the head of `task`, and gets a new one if there is none. A model of one task
    keeps its head for the same labels, in the order of `task`, or for as many without names; else it gets a new one.

    Args:
        path: folder or Hub id.
        task: the task.
        options: further arguments of `from_pretrained`.
    """
    others = several_heads(AutoConfig.from_pretrained(path))
    if task.name not in others:
        options |= {"ignore_mismatched_sizes": True, **task.head.alone()}
    model = AutoModelForSequenceClassification.from_pretrained(path, **options)
    if task.name in others:
        keep_head(model, task.head)
    elif others:
        renew_heads(model)
    else:
        new_head = renew_other_head(model, PreTrainedConfig.get_config_dict(path)[0], path)
        if new_head is not None:
            logger.warning(new_head)
    return model
