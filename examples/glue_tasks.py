"""GLUE's tasks: where their columns stand, how they are read from files or from the Hub, and the figures that count.

The figures are those of GLUE's own script, computed here by scikit-learn and scipy, so that no code has to be
downloaded: accuracy, F1 (MRPC, QQP), Matthews correlation (CoLA), Pearson and Spearman correlation (STS-B).
"""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import scipy
import sklearn
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

METRICS_FROM = f"scikit-learn {sklearn.__version__}, scipy {scipy.__version__}"
ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")


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
        Task("stsb", "STS-B", _PAIR, (), ("combined", "pearson", "spearman"), in_tsv={"label": "score"}),
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
            MNLI,
            validation_files={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
            in_tsv={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        ),
        Task("qnli", "QNLI", ("question", "sentence"), ENTAILMENT),
        Task("rte", "RTE", _PAIR, ENTAILMENT),
        Task("wnli", "WNLI", _PAIR, ("not_entailment", "entailment")),
    )
}


def load_task(
    *,
    task_name: str | None = None,
    data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    text_columns: tuple[str, ...] | None = None,
    label_column: str = "label",
) -> tuple[Task, DatasetDict]:
    """The task and its data: splits `train` and one or two that begin with `validation`.

    The data come from `data_dir` (GLUE's standard layout), from `train_file` and `validation_file` (.csv, .tsv, .json),
    from `dataset_name`, or for a `task_name` alone from the GLUE of the Hub. Without a `task_name`, labels that are
    real numbers make it a regression, and all others a classification by accuracy.

    Returns:
        The task, and data with its text columns as strings and `label` as a class or a real number.

    Raises:
        ValueError: if the arguments do not fit together, or a column, a label or a file is not what it should be.
        FileNotFoundError: if a file is missing.
    """
    if task_name is not None and task_name not in TASKS:
        raise ValueError(f"task_name must be one of {', '.join(TASKS)}; got {task_name!r}")
    task = TASKS[task_name] if task_name else None
    if bool(train_file) != bool(validation_file):
        raise ValueError("train_file and validation_file must be given together")
    if sum(map(bool, (data_dir, train_file, dataset_name))) > 1:
        raise ValueError("give one of data_dir, dataset_name, and train_file with validation_file")
    if data_dir:
        if task is None:
            raise ValueError("data_dir needs a task_name, which says how its files are to be read")
        data = read_glue_folder(Path(data_dir), task)
    elif train_file:
        assert validation_file is not None
        data = DatasetDict({"train": read_file(train_file), "validation": read_file(validation_file)})
    elif dataset_name:
        data = load_dataset(dataset_name, dataset_config_name)
    elif task is not None:
        data = load_dataset("nyu-mll/glue", task.name)
    else:
        raise ValueError("give a task_name, a dataset_name, or train_file and validation_file")
    if "train" not in data or not any(split.startswith("validation") for split in data):
        raise ValueError(f"the data must have the splits train and validation, it has {list(data)}")
    data = DatasetDict({k: v for k, v in data.items() if k == "train" or k.startswith("validation")})
    if task is None:
        task = guess_task(data, text_columns, label_column)
    return task, DatasetDict({split: checked_rows(rows, task, split) for split, rows in data.items()})


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
        table = read_table(folder / name, task.header)
        names = {column: task.in_tsv.get(column, column) for column in (*task.columns, "label")}
        for column in names.values():
            if column not in table:
                raise ValueError(f"{folder / name} has no column {column!r}, only {list(table)}")
        splits[split] = Dataset.from_dict({column: table[name] for column, name in names.items()})
    return DatasetDict(splits)


def read_table(path: Path, header: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """The columns of a tab-separated file: quotes and "null" are text like any other, a byte-order mark is dropped.

    Args:
        path: the file, in UTF-8.
        header: names of the columns of a file that has no header line.

    Raises:
        ValueError: if its lines do not have the same number of columns, or it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a tab-separated file in UTF-8: {error}") from error
    if header is None:
        if not lines:
            raise ValueError(f"{path} is empty")
        header, lines = tuple(lines[0]), lines[1:]
        first = 2
    else:
        first = 1
    for number, line in enumerate(lines, first):
        if len(line) != len(header):
            raise ValueError(
                f"{path} must have the {len(header)} columns {list(header)}, line {number} has {len(line)}"
            )
    return {name: [line[index] for line in lines] for index, name in enumerate(header)}


def read_file(path: str) -> Dataset:
    """A .csv, .tsv, .json or .jsonl file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = Path(path).suffix
    if suffix == ".tsv":
        return Dataset.from_dict(read_table(Path(path)))
    if suffix == ".csv":
        return load_dataset("csv", data_files=path, split="train", keep_default_na=False)
    if suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=path, split="train")
    raise ValueError(f"{path} must be a .csv, .tsv, .json or .jsonl file")


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
    for column in (*text_columns, label_column):
        if column not in names:
            raise ValueError(f"the data has no column {column!r}, only {names}")
    label_feature = data["train"].features[label_column]
    values = data["train"][label_column]
    if isinstance(label_feature, ClassLabel):
        labels = tuple(label_feature.names)
    elif all(isinstance(value, float) for value in values):
        return Task("regression", "", text_columns, (), ("combined", "pearson", "spearman"), label_column)
    else:
        labels = tuple(map(str, sorted(set(values))))
        if not 2 <= len(labels) <= 1000:
            raise ValueError(f"the training data must have between 2 and 1,000 different labels, got {len(labels)}")
    return Task("classification", "", text_columns, labels, ("accuracy",), label_column)


def checked_rows(rows: Dataset, task: Task, split: str) -> Dataset:
    """The task's columns of `rows`, labels as a class of `task` or as a real number.

    Raises:
        ValueError: if a column is missing, a text is not a string, or a label is none of the task's.
    """
    for column in (*task.columns, task.label_column):
        if column not in rows.column_names:
            raise ValueError(f"the {split} data of {task.name} has no column {column!r}, only {rows.column_names}")
    if not len(rows):
        raise ValueError(f"the {split} data of {task.name} has no rows")
    classes = {name: index for index, name in enumerate(task.labels)}
    labels = []
    for number, value in enumerate(rows[task.label_column]):
        try:
            labels.append(float(value) if task.is_regression else _class_of(value, classes))
        except (KeyError, TypeError, ValueError):
            wanted = "a number" if task.is_regression else f"one of {list(task.labels)[:5]} or its index"
            raise ValueError(
                f"the label of row {number} of the {split} data of {task.name} must be {wanted}, got {value!r}"
            ) from None
        if task.is_regression and not math.isfinite(labels[-1]):
            raise ValueError(f"the label of row {number} of the {split} data of {task.name} is {value!r}")
    for column in task.columns:
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise ValueError(f"{column} of row {number} of the {split} data must be a text, got {value!r}")
    label = Value("float32") if task.is_regression else Value("int64")
    features = Features({**{c: Value("string") for c in task.columns}, "label": label})
    return Dataset.from_dict({**{c: list(rows[c]) for c in task.columns}, "label": labels}, features=features)


def _class_of(value: object, classes: dict[str, int]) -> int:
    """The index of a label that is a name or an index of one."""
    if str(value) in classes:
        return classes[str(value)]
    index = int(str(value))
    if not 0 <= index < len(classes):
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
    if task.is_regression:
        predictions = [row[0] for row in logits]
        constant = len(set(predictions)) == 1 or len(set(labels)) == 1
        pearson = 0.0 if constant else float(pearsonr(predictions, labels).statistic)
        spearman = 0.0 if constant else float(spearmanr(predictions, labels).statistic)
        figures = {"combined": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}
    else:
        predictions = [max(range(len(row)), key=row.__getitem__) for row in logits]
        figures = {"accuracy": float(accuracy_score(labels, predictions))}
        if "f1" in task.metrics:
            figures["f1"] = float(f1_score(labels, predictions, zero_division=0))
        if "matthews_correlation" in task.metrics:
            figures["matthews_correlation"] = float(matthews_corrcoef(labels, predictions))
    return {name: figures[name] for name in task.metrics}
