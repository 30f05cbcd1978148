"""Fine-tune one BERT, or SNN-BERT, on several GLUE tasks together, with Trainer: one encoder, a head for each task.

    python examples/run_multitask.py --model_name_or_path minilm_folder --data_dir glue_data \\
        --tasks cola sst2 mrpc stsb rte --max_steps 3000 --output_dir outputs/teacher
    python examples/run_multitask.py --model_name_or_path outputs/distilled --data_dir glue_data \\
        --teacher_name_or_path outputs/teacher --unlabelled_file reviews.txt.xz news.txt.xz --learning_rate 1e-3 \\
        --max_steps 20000 --output_dir outputs/student

Without a teacher it learns from labels: the rows of a batch are of all tasks, and a task is drawn by the square root of
the number of its rows. With a teacher that has the same heads it learns that one's hidden states and the logits of all
its heads, on unlabelled sentences and pairs made of the tasks' texts and of the files. A teacher of another kind than
what the student was made of, or of another size, teaches its logits alone (`--hidden_weight 0`). `run_glue.py` takes
what this writes as model or teacher of any of the tasks.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from glue_tasks import (
    TASKS,
    TEACHERS_OF_STATES,
    Task,
    TaskArguments,
    attention_implementation,
    check_heads,
    check_vocabulary,
    heads_of,
    label_settings,
    score,
    tokenize,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    MPNetPreTrainedModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import ModelOutput

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.batches import Batch, Batches, Collate, DrawnBatches, Row
from modeling_snn_bert.distillation import check_same_shape, logit_loss
from modeling_snn_bert.mpnet import weights_of
from modeling_snn_bert.seeds import RESULTS_FILE, checkpoint_of
from modeling_snn_bert.sparsity import add_penalty
from modeling_snn_bert.text_blocks import check_text_files
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledRows, read_passages

FIVE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
ONE_FILE_TASKS = [name for name, task in TASKS.items() if len(task.validation_files) == 1]


@dataclass
class RunArguments:
    """Model, teacher and tasks."""

    model_name_or_path: str = field(metadata={"help": "a BERT, SNN-BERT, MPNet, ...: folder or Hub id"})
    tasks: list[str] = field(default_factory=lambda: list(FIVE_TASKS), metadata={"help": "names of GLUE's tasks"})
    data_dir: str | None = field(default=None, metadata={"help": "GLUE's folder in its layout (default: the Hub's)"})
    max_seq_length: int = field(default=128, metadata={"help": "longer inputs are truncated"})
    freeze_embeddings: bool = field(default=False, metadata={"help": "keep the embeddings as they are"})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "a model with the same heads, to learn from in place of labels"}
    )
    unlabelled_file: list[str] | None = field(
        default=None, metadata={"help": "text to draw rows from: .txt, .csv, .tsv, .json, or packed as .xz"}
    )
    unlabelled_sentences: int = field(default=60_000, metadata={"help": "taken from it"})
    single_share: float = field(default=0.35, metadata={"help": "of single sentences in the rows; 1 for no pairs"})

    def __post_init__(self) -> None:
        check_text_files("--unlabelled_file", self.unlabelled_file or [])
        for name, least in (("unlabelled_sentences", 1), ("max_seq_length", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 <= self.single_share <= 1:
            raise ValueError(f"--single_share must lie in [0, 1], got {self.single_share}")
        if self.unlabelled_file and not self.teacher_name_or_path:
            raise ValueError("--unlabelled_file needs --teacher_name_or_path")
        if len(set(self.tasks)) != len(self.tasks) or not set(self.tasks) <= set(ONE_FILE_TASKS):
            raise ValueError(f"--tasks must differ from each other and be among {ONE_FILE_TASKS}, got {self.tasks}")


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a run of so many steps, which teaches hidden states if there is a teacher."""

    max_steps: int = field(default=3000, metadata={"help": "steps of the run"})
    hidden_weight: float = field(default=1.0, metadata={"help": "weight of the loss on hidden states"})

    @property
    def compares_states(self) -> bool:
        """Whether more than the logits is taught."""
        return bool(self.hidden_weight or self.attention_weight)


def main() -> None:
    parser = HfArgumentParser([RunArguments, Arguments], description=__doc__)
    run_args, args = parser.parse_args_into_dataclasses()
    if run_args.teacher_name_or_path is None:
        if args.attention_weight:
            raise ValueError("--attention_weight needs --teacher_name_or_path")
        args.hidden_weight = 0.0
    set_seed(args.seed)
    tasks = [TASKS[name] for name in run_args.tasks]
    tokenizer = AutoTokenizer.from_pretrained(run_args.model_name_or_path)
    teacher = load_teacher(run_args, args, tasks, tokenizer)
    model = load_model(run_args, args, tasks, teacher)
    data = [TaskArguments(task_name=name, data_dir=run_args.data_dir).load()[1] for name in run_args.tasks]
    collate = drawn_collate = DataCollatorWithPadding(tokenizer)
    if teacher is not None and not args.compares_states:
        own = AutoTokenizer.from_pretrained(run_args.teacher_name_or_path)
        drawn_collate = CollateForTeacher(collate, own, run_args.max_seq_length)
    with args.main_process_first(desc="tokenize"):
        draw: Callable[[random.Random], Row]
        if teacher is None:
            draw = labelled_rows(tasks, data, tokenizer, run_args.max_seq_length)
        else:
            draw = unlabelled_rows(run_args, tasks, data, tokenizer, with_texts=not args.compares_states)
        validation = [
            tokenize(part["validation"], task, tokenizer, run_args.max_seq_length)
            for part, task in zip(data, tasks, strict=True)
        ]
    heads = heads_of(model.config)

    def figures_of(model: PreTrainedModel) -> dict[str, float]:
        predictions = {
            task.name: predict(trainer.accelerator, model, rows, collate, args.per_device_eval_batch_size)
            for task, rows in zip(tasks, validation, strict=True)
        }
        return score_tasks(tasks, predictions, heads)

    batches = DrawnBatches(draw, drawn_collate, args.per_device_train_batch_size, args.seed, args.process_index)
    trainer = MultitaskTrainer(
        model,
        args,
        tasks=tasks,
        teacher=teacher,
        train_dataset=Batches(batches, args.max_steps * args.gradient_accumulation_steps),
        processing_class=tokenizer,
        figures_of=figures_of,
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint_of(args.output_dir, args.resume_from_checkpoint))
    results = trainer.results()
    model.base_model.embeddings.requires_grad_(True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        results |= {"tasks": run_args.tasks, "arguments": asdict(run_args)}
        write_json(Path(args.output_dir) / RESULTS_FILE, results)
    if args.push_to_hub:
        trainer.push_to_hub()


class MultitaskTrainer(DistillationTrainer):
    """DistillationTrainer for the heads of `tasks`; the teacher may have them in another order."""

    def __init__(self, model: PreTrainedModel, *args, tasks: Sequence[Task], **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self.tasks, self.heads = tasks, heads_of(model.config)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.teacher is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        outputs = model(**{name: x for name, x in inputs.items() if name not in ("labels", "task")})
        loss = label_loss(outputs.logits, inputs["labels"], inputs["task"], self.tasks, self.heads)
        loss = add_penalty(loss, outputs, self.firing_rate_weight)
        return (loss, outputs) if return_outputs else loss

    def ask_teacher(self, inputs: Batch, **extras: bool) -> ModelOutput:
        assert self.teacher is not None
        prefix = CollateForTeacher.PREFIX
        own = {name.removeprefix(prefix): x for name, x in inputs.items() if name.startswith(prefix)}
        return self.teacher(**(own or inputs), **extras)

    def inputs_of_student(self, inputs: Batch) -> Batch:
        return {name: x for name, x in inputs.items() if not name.startswith(CollateForTeacher.PREFIX)}

    def logit_part(self, outputs: ModelOutput, wanted: ModelOutput, inputs: Batch) -> torch.Tensor:
        assert self.teacher is not None
        # Not by the token types, which an MPNet's tokenizer does not give.
        separator = cast(PreTrainedTokenizerBase, self.processing_class).sep_token_id
        is_pair = (inputs["input_ids"] == separator).sum(1) > 1
        teacher_heads = heads_of(self.teacher.config)
        loss = heads_logit_loss(outputs.logits, wanted.logits, is_pair, self.tasks, self.heads, teacher_heads)
        return add_penalty(loss, outputs, self.firing_rate_weight)


def load_teacher(
    run_args: RunArguments, args: Arguments, tasks: list[Task], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The teacher, if there is one.

    Raises:
        ValueError: if it lacks heads of `tasks`; if its hidden states or attention weights are to be compared, also if
            it is neither a BERT nor an MPNet, or its tokenizer gives other token ids.
    """
    path = run_args.teacher_name_or_path
    if path is None:
        return None
    config = AutoConfig.from_pretrained(path)
    check_heads(config, tasks, path)
    if args.compares_states:
        if config.model_type not in TEACHERS_OF_STATES:
            raise ValueError(
                "the teacher must be a BERT or an MPNet for its hidden states and attention weights to be compared, "
                f"{path} is of the type {config.model_type!r}: give --hidden_weight 0 (and no --attention_weight)"
            )
        check_vocabulary(path, tokenizer)
    attention = "eager" if args.attention_weight else None
    return AutoModelForSequenceClassification.from_pretrained(path, attn_implementation=attention, dtype=torch.float32)


def load_model(
    run_args: RunArguments, args: Arguments, tasks: list[Task], teacher: PreTrainedModel | None
) -> PreTrainedModel:
    """The model with a head for each task.

    Its heads are those of the checkpoint if that has the same ones. Otherwise they are new, or if hidden states are
    taught those of the teacher, together with its embeddings and pooler.

    Raises:
        ValueError: if it has heads of other tasks, or is to learn from a teacher and is of a type that cannot, or of
            another shape than the teacher whose hidden states it is to learn.
    """
    path = run_args.model_name_or_path
    config = AutoConfig.from_pretrained(path)
    if teacher is not None and config.model_type not in ("bert", SNNBertConfig.model_type):
        raise ValueError(f"a BERT or an SNN-BERT learns from a teacher, {path} is of the type {config.model_type!r}")
    has_heads = bool(heads_of(config))
    settings = label_settings(tasks)
    if has_heads and config.id2label != settings["id2label"]:
        raise ValueError(f"{path} has heads for {list(heads_of(config))}: give these --tasks in this order")
    # Dropout would only blur what a teacher says, and labels of several tasks hold each other in check.
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    attention = attention_implementation(args.attention_weight > 0, args.device, dropout=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32, ignore_mismatched_sizes=not has_heads, **settings
    )
    if teacher is not None and args.compares_states:
        check_same_shape(model.config, teacher.config)
        if not has_heads:
            take_over(model, teacher, tasks)
    model.base_model.embeddings.requires_grad_(not run_args.freeze_embeddings)
    return model


def take_over(model: PreTrainedModel, teacher: PreTrainedModel, tasks: list[Task]) -> None:
    """Give `model` the teacher's embeddings, pooler and heads."""
    weights = weights_of(teacher) if isinstance(teacher, MPNetPreTrainedModel) else teacher.state_dict()
    for part in ("embeddings", "pooler"):
        prefix = f"bert.{part}."
        model.base_model.get_submodule(part).load_state_dict(
            {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        )
    own, heads = heads_of(model.config), heads_of(teacher.config)
    with torch.no_grad():
        for task in tasks:
            model.classifier.weight[own[task.name]] = weights["classifier.weight"][heads[task.name]]
            model.classifier.bias[own[task.name]] = weights["classifier.bias"][heads[task.name]]


class CollateForTeacher:
    """Makes a batch, and the teacher's of the same texts by its own tokenizer, under names that begin with `PREFIX`."""

    PREFIX = "teacher_"

    def __init__(self, collate: Collate, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
        self.collate, self.tokenizer, self.max_seq_length = collate, tokenizer, max_seq_length

    def __call__(self, rows: list[dict]) -> Batch:
        inputs = self.tokenizer(
            [row["texts"] for row in rows],
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )
        batch = self.collate([{name: x for name, x in row.items() if name != "texts"} for row in rows])
        return {**batch, **{self.PREFIX + name: x for name, x in inputs.items()}}


def labelled_rows(
    tasks: list[Task], data: list[DatasetDict], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> Callable[[random.Random], Row]:
    """Draws training rows of all tasks, each with its label, a real number, and the index of its task."""
    rows = [
        [{**row, "labels": float(row["labels"])} for row in tokenize(part["train"], task, tokenizer, max_seq_length)]
        for part, task in zip(data, tasks, strict=True)
    ]
    weights = [len(part) ** 0.5 for part in rows]

    def draw(rng: random.Random) -> Row:
        [task] = rng.choices(range(len(tasks)), weights)
        return {**rng.choice(rows[task]), "task": task}

    return draw


def unlabelled_rows(
    args: RunArguments,
    tasks: list[Task],
    data: list[DatasetDict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_texts: bool,
) -> UnlabelledRows:
    """Draws sentences and pairs made of the tasks' training texts and of the unlabelled files."""
    singles: list[str] = []
    pairs: list[tuple[str, str]] = []
    for task, part in zip(tasks, data, strict=True):
        texts = [part["train"][column] for column in task.columns]
        if len(texts) == 1:
            singles += texts[0]
        else:
            pairs += zip(*texts, strict=True)
    passages = read_passages(args.unlabelled_file, args.unlabelled_sentences) if args.unlabelled_file else []
    length, share = args.max_seq_length, args.single_share
    return UnlabelledRows(passages, singles, pairs, tokenizer, length, single_share=share, with_texts=with_texts)


def predict(
    accelerator: Accelerator, model: nn.Module, rows: Dataset, collate: Collate, batch_size: int
) -> list[tuple[list[float], float]]:
    """Logits and label of every row, in the order of the rows, from all processes."""
    # Sorted by length, so that there is little to pad.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    mine = []
    starts = range(0, len(rows), batch_size)
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        indices = order[start : start + batch_size]
        batch = {name: x.to(accelerator.device) for name, x in collate([rows[i] for i in indices]).items()}
        labels = batch.pop("labels").tolist()
        mine += list(zip(indices, model(**batch).logits.float().tolist(), labels, strict=True))
    return [(logits, label) for _, logits, label in sorted(gather_object(mine), key=lambda row: row[0])]


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


if __name__ == "__main__":
    main()
