"""Fine-tune an SNN-BERT, or a BERT, on a GLUE task or on your own sentences, with transformers' Trainer.

    python examples/run_glue.py --model_name_or_path outputs/distilled --task_name sst2 --data_dir glue_data \\
        --num_train_epochs 3 --seeds 0 1 2 --output_dir outputs/sst2

`--model_name_or_path` is an SNN-BERT, a BERT, or with `--convert` a BERT that becomes an SNN-BERT first. A BERT that
was fine-tuned on the task teaches it with `--teacher_name_or_path`; beside it, `--unlabelled_file` adds batches of
sentences, or pairs, made of a text, which the teacher alone labels. Takes all flags of TrainingArguments. Writes a
model for each seed and results.json: figures at the last step for each seed, mean and spread, firing rates and energy,
flags and versions. `run_glue_no_trainer.py` shows fine-tuning in a loop of one's own.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from glue_tasks import (
    METRICS_FROM,
    TEACHERS_OF_STATES,
    ClassifierArguments,
    Task,
    TaskArguments,
    check_vocabulary,
    heads_of,
    keep_head,
    measure_energy,
    score,
    tokenize,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modeling_snn_bert.batches import Batch, Batches, DrawnBatches, RowBatches, alternating
from modeling_snn_bert.seeds import checkpoint_of, run_seeds, write_runs
from modeling_snn_bert.text_blocks import check_text_files
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledRows, read_passages


@dataclass
class RunArguments:
    """The teacher, text without labels, and the runs."""

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "a BERT fine-tuned on the task, whose logits are taught beside the labels"}
    )
    unlabelled_file: list[str] | None = field(
        default=None, metadata={"help": "text for the teacher to label: .txt, .csv, .tsv, .json, or packed as .xz"}
    )
    unlabelled_sentences: int = field(default=60_000, metadata={"help": "taken from it"})
    unlabelled_batches: int = field(default=4, metadata={"help": "for each batch with labels"})
    pad_to_max_length: bool = field(default=False, metadata={"help": "pad all inputs to --max_seq_length"})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "a run for each seed, and mean and spread of their figures (default: --seed)"}
    )
    energy_samples: int = field(
        default=256, metadata={"help": "dev rows on which firing rates and energy are measured; 0 measures nothing"}
    )

    def __post_init__(self) -> None:
        for name, least in (("unlabelled_sentences", 1), ("unlabelled_batches", 1), ("energy_samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        check_text_files("--unlabelled_file", self.unlabelled_file or [])
        if self.unlabelled_file and not self.teacher_name_or_path:
            raise ValueError("--unlabelled_file needs --teacher_name_or_path, to label it")


def main() -> None:
    parser = HfArgumentParser(
        [ClassifierArguments, TaskArguments, RunArguments, DistillationTrainingArguments], description=__doc__
    )
    model_args, task_args, run_args, args = parser.parse_args_into_dataclasses()
    if model_args.settings().get("neuron_type") == "psn" and not run_args.pad_to_max_length:
        raise ValueError("neuron_type=psn takes one length only: give --pad_to_max_length and psn_length=<that length>")
    task, rows = task_args.load()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    collate = DataCollatorWithPadding(tokenizer)
    if run_args.pad_to_max_length:
        collate = DataCollatorWithPadding(tokenizer, "max_length", task_args.max_seq_length)
    with args.main_process_first(desc="tokenize"):
        data = DatasetDict(
            {split: tokenize(part, task, tokenizer, task_args.max_seq_length) for split, part in rows.items()}
        )
        drawn = None
        if run_args.unlabelled_file:
            drawn = unlabelled_rows(run_args, task, rows["train"], tokenizer, task_args.max_seq_length)

    def train_one(seed: int, folder: Path) -> dict[str, Any]:
        seed_args = dataclasses.replace(args, seed=seed, output_dir=str(folder))
        set_seed(seed)
        model = model_args.load(task, data["train"], collate, args.device, args.attention_weight > 0)
        teacher = None
        if run_args.teacher_name_or_path:
            check_vocabulary(run_args.teacher_name_or_path, tokenizer)
            teacher = load_teacher(run_args.teacher_name_or_path, task, args.attention_weight > 0)
        return train(model, teacher, seed_args, run_args, task, data, drawn, collate)

    sanitized = args.to_sanitized_dict()
    flags = {**vars(model_args), **vars(task_args), **vars(run_args), **{k: sanitized[k] for k in sorted(sanitized)}}
    is_main_process = args.process_index == 0
    runs = run_seeds(
        run_args.seeds or [args.seed],
        args.output_dir,
        train_one,
        flags,
        resume=args.resume_from_checkpoint is not None,
        is_main_process=is_main_process,
    )
    if is_main_process:
        counts = {split: len(part) for split, part in data.items()}
        write_runs(args.output_dir, task.name, runs, flags, args.device, metrics_from=METRICS_FROM, rows=counts)


def unlabelled_rows(
    args: RunArguments, task: Task, train: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> UnlabelledRows:
    """Draws rows like the task's, made of its training texts and of the unlabelled files."""
    texts = [list(train[column]) for column in task.columns]
    singles, pairs = (texts[0], []) if len(texts) == 1 else ([], list(zip(*texts, strict=True)))
    passages = read_passages(args.unlabelled_file or [], args.unlabelled_sentences)
    return UnlabelledRows(passages, singles, pairs, tokenizer, max_seq_length, single_share=float(len(texts) == 1))


def load_teacher(path: str, task: Task, attention_weights: bool) -> PreTrainedModel:
    """A BERT, or an MPNet, that was fine-tuned on the task, alone or with others.

    Raises:
        ValueError: if it is a model of another type, or has another number of labels than the task.
    """
    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type not in TEACHERS_OF_STATES:
        raise ValueError(f"--teacher_name_or_path must be a BERT or an MPNet, {path} is of the type {model_type!r}")
    teacher = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager" if attention_weights else None, dtype=torch.float32
    )
    if task.name in heads_of(teacher.config):
        keep_head(teacher, task)
    count = len(task.labels) or 1
    if teacher.config.num_labels != count:
        raise ValueError(
            f"--teacher_name_or_path must have been fine-tuned on {task.name}, with {count} labels; it has "
            f"{teacher.config.num_labels}"
        )
    return teacher


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: DistillationTrainingArguments,
    run_args: RunArguments,
    task: Task,
    data: DatasetDict,
    drawn: UnlabelledRows | None,
    collate: DataCollatorWithPadding,
) -> dict[str, Any]:
    """Train and evaluate with one seed; what the results say of it."""
    size, process, processes = args.per_device_train_batch_size, args.process_index, args.world_size
    rows = RowBatches(data["train"], collate, size, args.seed, process, processes)
    batch_of: Callable[[int], Batch] = rows
    per_epoch = rows.per_epoch
    if drawn is not None:
        share = run_args.unlabelled_batches
        batch_of = alternating(rows, DrawnBatches(drawn, collate, size, args.seed, process), share)
        per_epoch *= share + 1
    if args.max_steps <= 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * per_epoch / args.gradient_accumulation_steps))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return score(task, logits.tolist(), prediction.label_ids.tolist())

    validation = {split: part for split, part in data.items() if split != "train"}
    first = next(iter(validation.values()))
    trainer = DistillationTrainer(
        model,
        args,
        teacher=teacher,
        train_dataset=Batches(batch_of, args.max_steps * args.gradient_accumulation_steps),
        eval_dataset=first,
        data_collator=collate,
        processing_class=collate.tokenizer,
        compute_metrics=compute_metrics,
    )
    run: dict[str, Any] = {"seed": args.seed, "last_step": 0, "seconds": 0.0}
    if args.do_train:
        checkpoint = checkpoint_of(args.output_dir, args.resume_from_checkpoint, only_own=True)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        run |= {"last_step": trainer.state.global_step, "seconds": round(result.metrics["train_runtime"], 1)}
    trainer.save_model()
    metrics: dict[str, float] = {}
    for split, part in validation.items():
        # MNLI has two dev sets, matched_accuracy and mismatched_accuracy.
        name = split.removeprefix("validation").lstrip("_")
        figures = trainer.evaluate(part, metric_key_prefix=f"eval_{name}".rstrip("_"))
        metrics |= {f"{name}_{x}".lstrip("_"): figures["_".join(filter(None, ("eval", name, x)))] for x in task.metrics}
    tokens = trainer.state.num_input_tokens_seen
    energy = measure_energy(trainer.model, first, collate, run_args.energy_samples, args.per_device_eval_batch_size)
    if args.push_to_hub:
        trainer.push_to_hub()
    return {**run, "training_tokens": tokens, "metrics": metrics, "energy": energy, "log": trainer.state.log_history}


if __name__ == "__main__":
    main()
