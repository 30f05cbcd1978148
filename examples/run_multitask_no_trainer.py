"""Fine-tune one BERT, or SNN-BERT, on several GLUE tasks together, with Accelerate: one encoder, a head for each task.

    python examples/run_multitask_no_trainer.py --model_name_or_path minilm_folder --data_dir glue_data \\
        --tasks cola sst2 mrpc stsb rte --max_train_steps 3000 --output_dir outputs/teacher
    python examples/run_multitask_no_trainer.py --model_name_or_path outputs/distilled --data_dir glue_data \\
        --teacher_name_or_path outputs/teacher --unlabelled_file reviews.txt.xz news.txt.xz --learning_rate 1e-3 \\
        --max_train_steps 20000 --output_dir outputs/student

Without a teacher it learns from labels: the rows of a batch are of all tasks, and a task is drawn by the square root of
the number of its rows. With a teacher, a BERT with the same heads, it learns that one's hidden states and the logits of
all its heads, on unlabelled sentences and pairs made of the tasks' texts and of the files. `run_glue_no_trainer.py`
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
from glue_models import check_vocabulary
from glue_tasks import TASKS, Task, load_task
from run_glue_no_trainer import predict
from several_tasks import check_heads, heads_logit_loss, heads_of, label_loss, label_settings, score_tasks
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput
from unlabelled_data import UnlabelledRows, check_unlabelled_files, read_passages

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification
from modeling_snn_bert.distillation import attention_loss, check_same_shape, hidden_state_loss

RESULTS_FILE = "results.json"
FIVE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
ONE_FILE_TASKS = [name for name, task in TASKS.items() if len(task.validation_files) == 1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a BERT or an SNN-BERT: folder or Hub id")
    parser.add_argument("--tasks", nargs="+", choices=ONE_FILE_TASKS, default=list(FIVE_TASKS))
    parser.add_argument("--data_dir", help="GLUE's folder in its standard layout (default: GLUE of the Hub)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="longer inputs are truncated")
    parser.add_argument("--freeze_embeddings", action="store_true", help="keep the embeddings as they are")
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher_name_or_path", help="a BERT with the same heads, to learn from in place of labels")
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
        ValueError: if it is no BERT with the heads of `tasks`, or its tokenizer gives other token ids.
    """
    path = args.teacher_name_or_path
    if path is None:
        return None
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "bert":
        raise ValueError(f"--teacher_name_or_path must be a BERT, {path} is of the type {config.model_type!r}")
    check_heads(config, tasks, path)
    check_vocabulary(path, tokenizer)
    model = BertForSequenceClassification.from_pretrained(
        path, attn_implementation="eager" if args.attention_weight else None, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def load_model(
    args: argparse.Namespace, tasks: list[Task], teacher: PreTrainedModel | None, device: torch.device
) -> PreTrainedModel:
    """The model with a head for each task.

    Its heads are those of the checkpoint if that has the same ones; otherwise, those of the teacher together with its
    embeddings and pooler, or new ones.

    Raises:
        ValueError: if it is neither a BERT nor an SNN-BERT, or has another shape than the teacher.
    """
    classes = {"bert": BertForSequenceClassification, SNNBertConfig.model_type: SNNBertForSequenceClassification}
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if config.model_type not in classes:
        raise ValueError(f"--model_name_or_path must be a BERT or an SNN-BERT, it is of the type {config.model_type!r}")
    settings = label_settings(tasks)
    # Dropout would only blur what a teacher says.
    settings |= {} if teacher is None else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Only the eager attention returns its weights; on a CPU sdpa's backward pass in bfloat16 takes seven times as long.
    attention = "eager" if args.attention_weight or device.type == "cpu" else None
    model = classes[config.model_type].from_pretrained(
        args.model_name_or_path, attn_implementation=attention, dtype=torch.float32, **settings
    )
    if teacher is not None:
        check_same_shape(model.config, teacher.config)
        if config.id2label != settings["id2label"]:
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
    passages = read_passages(files, count) if files else []
    return UnlabelledRows(passages, singles, pairs, tokenizer, args.max_seq_length, single_share=args.single_share)


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
    collate, heads, config = DataCollatorWithPadding(tokenizer), heads_of(model.config), model.config
    with accelerator.main_process_first():
        try:
            draw = (labelled_rows if teacher is None else unlabelled_rows)(args, tasks, data, tokenizer)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        validation = [
            tokenized(part["validation"], task, tokenizer, args.max_seq_length)
            for part, task in zip(data, tasks, strict=True)
        ]
    batches = DrawnBatches(draw, collate, args.per_device_train_batch_size, args.seed, accelerator.process_index)

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
            wanted = teacher(**batch, **extras)
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
