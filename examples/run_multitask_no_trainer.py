"""Fine-tune one BERT, or SNN-BERT, on several GLUE tasks together, with Accelerate: one encoder, a head for each task.

    python examples/run_multitask_no_trainer.py --model_name_or_path minilm_folder --data_dir glue_data \\
        --tasks cola sst2 mrpc stsb rte --max_train_steps 3000 --output_dir outputs/teacher
    python examples/run_multitask_no_trainer.py --model_name_or_path outputs/distilled --data_dir glue_data \\
        --teacher_name_or_path outputs/teacher --unlabelled_file reviews.txt.xz news.txt.xz --learning_rate 1e-3 \\
        --max_train_steps 20000 --output_dir outputs/student

Without a teacher it learns from labels: the rows of a batch are of all tasks, and a task is drawn by the square root of
the number of its rows. With a teacher that has the same heads it learns that one's hidden states and the logits of all
its heads, on unlabelled sentences and pairs made of the tasks' texts and of the files. A teacher of another kind than
BERT, or of another size, teaches its logits alone (`--hidden_weight 0`). `run_glue_no_trainer.py`
takes what this writes as model or teacher of any of the tasks.
"""

import argparse
import random
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate_loop import (
    Batch,
    DrawnBatches,
    TrainingLoop,
    add_loop_arguments,
    check_loop_arguments,
    make_accelerator,
)
from datasets import Dataset, DatasetDict
from glue_models import attention_implementation, check_vocabulary
from glue_tasks import TASKS, Task, load_task
from run_glue_no_trainer import predict
from several_tasks import check_heads, heads_logit_loss, heads_of, label_loss, label_settings, score_tasks
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput
from unlabelled_data import UnlabelledRows, check_unlabelled_files, read_passages

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.distillation import attention_loss, check_same_shape, hidden_state_loss

RESULTS_FILE = "results.json"
FIVE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
ONE_FILE_TASKS = [name for name, task in TASKS.items() if len(task.validation_files) == 1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a BERT, SNN-BERT, MPNet, ...: folder or Hub id")
    parser.add_argument("--tasks", nargs="+", choices=ONE_FILE_TASKS, default=list(FIVE_TASKS))
    parser.add_argument("--data_dir", help="GLUE's folder in its standard layout (default: GLUE of the Hub)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="longer inputs are truncated")
    parser.add_argument("--freeze_embeddings", action="store_true", help="keep the embeddings as they are")
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher_name_or_path", help="a model with the same heads, to learn from in place of labels")
    group.add_argument("--hidden_weight", type=float, default=1.0, help="of the loss on hidden states (default: 1)")
    group.add_argument("--attention_weight", type=float, default=0.0, help="of the loss on attention weights")
    group.add_argument("--unlabelled_file", nargs="+", help="text to draw rows from: .txt, .csv, .tsv, .json, or .xz")
    group.add_argument("--unlabelled_sentences", type=int, default=60_000, help="taken from them (default: 60,000)")
    group.add_argument(
        "--single_share", type=float, default=0.35, help="of single sentences in the rows; 1 for no pairs"
    )
    add_loop_arguments(parser, learning_rate=1e-4, max_train_steps=3000)
    args = parser.parse_args()
    check_loop_arguments(parser, args)
    check_unlabelled_files(parser, args.unlabelled_file, args.unlabelled_sentences)
    for name in ("hidden_weight", "attention_weight"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must be >= 0, got {getattr(args, name)}")
    if not 0 <= args.single_share <= 1:
        parser.error(f"--single_share must lie in [0, 1], got {args.single_share}")
    for name in ("unlabelled_file", "attention_weight"):
        if getattr(args, name) and not args.teacher_name_or_path:
            parser.error(f"--{name} needs --teacher_name_or_path")
    if len(set(args.tasks)) != len(args.tasks):
        parser.error(f"--tasks must differ from each other, got {args.tasks}")
    if args.max_seq_length < 5:
        parser.error(f"--max_seq_length must be >= 5, got {args.max_seq_length}")
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    tasks = [TASKS[name] for name in args.tasks]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    try:
        teacher = load_teacher(args, tasks, tokenizer)
        model = load_model(args, tasks, teacher, accelerator.device)
        data = [load_task(task_name=task.name, data_dir=args.data_dir)[1] for task in tasks]
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    loop = train(accelerator, args, model.to(accelerator.device), teacher, tasks, data, tokenizer)
    model = loop.finish()
    if accelerator.is_main_process:
        model.base_model.embeddings.requires_grad_(True)
        loop.publish(model, tokenizer, RESULTS_FILE, {"tasks": args.tasks, "seconds": round(loop.seconds, 1)})


def load_teacher(
    args: argparse.Namespace, tasks: list[Task], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The teacher, frozen.

    Raises:
        ValueError: if it lacks heads of `tasks`; if its hidden states or attention weights are to be compared, also if
            it is no BERT, or its tokenizer gives other token ids.
    """
    path = args.teacher_name_or_path
    if path is None:
        return None
    config = AutoConfig.from_pretrained(path)
    check_heads(config, tasks, path)
    if compares_states(args):
        if config.model_type != "bert":
            raise ValueError(
                "the teacher must be a BERT for its hidden states and attention weights to be compared, "
                f"{path} is of the type {config.model_type!r}: give --hidden_weight 0 (and no --attention_weight)"
            )
        check_vocabulary(path, tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager" if args.attention_weight else None, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def compares_states(args: argparse.Namespace) -> bool:
    """Whether more than the logits is taught."""
    return bool(args.hidden_weight or args.attention_weight)


def load_model(
    args: argparse.Namespace, tasks: list[Task], teacher: PreTrainedModel | None, device: torch.device
) -> PreTrainedModel:
    """The model with a head for each task.

    Its heads are those of the checkpoint if that has the same ones. Otherwise they are new, or if hidden states are
    taught those of the teacher, together with its embeddings and pooler.

    Raises:
        ValueError: if it has heads of other tasks, or is to learn from a teacher and is of a type that cannot, or of
            another shape than the teacher whose hidden states it is to learn.
    """
    path = args.model_name_or_path
    config = AutoConfig.from_pretrained(path)
    if teacher is not None and config.model_type not in ("bert", SNNBertConfig.model_type):
        raise ValueError(f"a BERT or an SNN-BERT learns from a teacher, {path} is of the type {config.model_type!r}")
    has_heads = bool(heads_of(config))
    settings = label_settings(tasks)
    if has_heads and config.id2label != settings["id2label"]:
        raise ValueError(f"{path} has heads for {list(heads_of(config))}: give these --tasks in this order")
    # Dropout would only blur what a teacher says.
    settings |= {} if teacher is None else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dropout = {**config.to_dict(), **settings}.get("attention_probs_dropout_prob", 0.0)
    attention = attention_implementation(args.attention_weight > 0, device, dropout)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32, ignore_mismatched_sizes=not has_heads, **settings
    )
    if teacher is not None and compares_states(args):
        check_same_shape(model.config, teacher.config)
        if not has_heads:
            take_over(model, teacher, tasks)
    model.base_model.embeddings.requires_grad_(not args.freeze_embeddings)
    return model


def take_over(model: PreTrainedModel, teacher: PreTrainedModel, tasks: list[Task]) -> None:
    """Give `model` the teacher's embeddings, pooler and heads."""
    model.base_model.embeddings.load_state_dict(teacher.base_model.embeddings.state_dict())
    model.base_model.pooler.load_state_dict(teacher.base_model.pooler.state_dict())
    own, heads = heads_of(model.config), heads_of(teacher.config)
    with torch.no_grad():
        for task in tasks:
            model.classifier.weight[own[task.name]] = teacher.classifier.weight[heads[task.name]]
            model.classifier.bias[own[task.name]] = teacher.classifier.bias[heads[task.name]]


class CollateForTeacher:
    """Makes a batch, and the teacher's of the same texts by its own tokenizer, under names that begin with `PREFIX`."""

    PREFIX = "teacher_"

    def __init__(self, collate: Callable, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
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


def inputs_of_teacher(batch: Batch) -> Batch:
    """What the teacher reads: its own inputs, which are taken out of `batch`, or those of the student."""
    names = [name for name in batch if name.startswith(CollateForTeacher.PREFIX)]
    return {name.removeprefix(CollateForTeacher.PREFIX): batch.pop(name) for name in names} or batch


def tokenized(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Token ids and `labels`, real numbers."""

    def encode(rows: dict) -> dict:
        texts = [rows[column] for column in task.columns]
        inputs = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        return {**inputs, "labels": [float(label) for label in rows["label"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def labelled_rows(
    args: argparse.Namespace, tasks: list[Task], data: list[DatasetDict], tokenizer: PreTrainedTokenizerBase
) -> Callable[[random.Random], dict]:
    """Draws training rows of all tasks, each with its label and the index of its task."""
    rows = [
        list(tokenized(part["train"], task, tokenizer, args.max_seq_length))
        for part, task in zip(data, tasks, strict=True)
    ]
    weights = [len(part) ** 0.5 for part in rows]

    def draw(rng: random.Random) -> dict:
        [task] = rng.choices(range(len(tasks)), weights)
        return {**rng.choice(rows[task]), "task": task}

    return draw


def unlabelled_rows(
    args: argparse.Namespace, tasks: list[Task], data: list[DatasetDict], tokenizer: PreTrainedTokenizerBase
) -> UnlabelledRows:
    """Draws sentences and pairs made of the tasks' training texts and of the unlabelled files.

    Raises:
        ValueError: if there are none.
    """
    singles: list[str] = []
    pairs: list[tuple[str, str]] = []
    for task, part in zip(tasks, data, strict=True):
        texts = [part["train"][column] for column in task.columns]
        if len(texts) == 1:
            singles += texts[0]
        else:
            pairs += zip(*texts, strict=True)
    files, count = args.unlabelled_file, args.unlabelled_sentences
    return UnlabelledRows(
        read_passages(files, count) if files else [],
        singles,
        pairs,
        tokenizer,
        args.max_seq_length,
        single_share=args.single_share,
        with_texts=not compares_states(args),
    )


def train(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tasks: list[Task],
    data: list[DatasetDict],
    tokenizer: PreTrainedTokenizerBase,
) -> TrainingLoop:
    """Train on the labels of all tasks, or on what the teacher says: the loop that has run."""
    heads, config = heads_of(model.config), model.config
    collate = drawn_collate = DataCollatorWithPadding(tokenizer)
    if teacher is not None and not compares_states(args):
        own = AutoTokenizer.from_pretrained(args.teacher_name_or_path)
        drawn_collate = CollateForTeacher(collate, own, args.max_seq_length)
    with accelerator.main_process_first():
        try:
            draw = (labelled_rows if teacher is None else unlabelled_rows)(args, tasks, data, tokenizer)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        validation = [
            tokenized(part["validation"], task, tokenizer, args.max_seq_length)
            for part, task in zip(data, tasks, strict=True)
        ]
    batches = DrawnBatches(draw, drawn_collate, args.per_device_train_batch_size, args.seed, accelerator.process_index)

    def loss_on_labels(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        labels, rows_task = batch.pop("labels"), batch.pop("task")
        outputs = model(**batch)
        loss = label_loss(outputs.logits, labels, rows_task, tasks, heads)
        return with_penalty(loss, outputs, config), {}

    def loss_on_teacher(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert teacher is not None
        mask, is_pair = batch["attention_mask"], batch["token_type_ids"].any(1)
        extras = {"output_hidden_states": args.hidden_weight > 0, "output_attentions": args.attention_weight > 0}
        with torch.no_grad():
            wanted = teacher(**inputs_of_teacher(batch), **extras)
        outputs = model(**batch, **extras)
        loss = heads_logit_loss(outputs.logits, wanted.logits, is_pair, tasks, heads, heads_of(teacher.config))
        figures = {"logit_loss": loss}
        if args.hidden_weight:
            figures["hidden_state_loss"] = hidden_state_loss(outputs.hidden_states, wanted.hidden_states, mask)
            loss = loss + args.hidden_weight * figures["hidden_state_loss"]
        if args.attention_weight:
            figures["attention_loss"] = attention_loss(outputs.attentions, wanted.attentions, mask)
            loss = loss + args.attention_weight * figures["attention_loss"]
        return with_penalty(loss, outputs, config), figures

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        predictions = {
            task.name: predict(accelerator, model, rows, collate, args.per_device_eval_batch_size)
            for task, rows in zip(tasks, validation, strict=True)
        }
        return score_tasks(tasks, predictions, heads)

    loss_of = loss_on_labels
    if teacher is not None:
        teacher.to(accelerator.device)
        loss_of = loss_on_teacher
    loop = TrainingLoop(accelerator, model, args, loss_of, evaluate, "run_multitask_no_trainer")
    loop.run(batches.batch, "several tasks")
    return loop


def with_penalty(loss: torch.Tensor, outputs: ModelOutput, config: PreTrainedConfig) -> torch.Tensor:
    """`loss` with the penalty on firing rates, if the model has a target for them; a BERT has none."""
    penalty = getattr(outputs, "firing_rate_penalty", None)
    return loss if penalty is None else loss + config.firing_rate_weight * penalty


if __name__ == "__main__":
    main()
