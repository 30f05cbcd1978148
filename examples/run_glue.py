"""Fine-tune an SNN-BERT, or a BERT, on a GLUE task or on your own sentences, with transformers' Trainer.

    python examples/run_glue.py --model_name_or_path outputs/distilled --task_name sst2 --data_dir glue_data \\
        --num_train_epochs 3 --seeds 0 1 2 --output_dir outputs/sst2

`--model_name_or_path` is an SNN-BERT, a BERT or an MPNet, or with `--convert` one of these two that becomes an SNN-BERT
first. A model that was fine-tuned on the task teaches it with `--teacher_name_or_path`; beside it, `--unlabelled_file`
adds batches of sentences, or pairs, made of a text, which the teacher alone labels. Takes all flags of
TrainingArguments. Writes a model for each seed and results.json: figures at the last step for each seed, mean and
spread, firing rates and energy, flags and versions. `run_glue_no_trainer.py` shows fine-tuning in a loop of one's own.
"""

from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict
from glue_tasks import (
    METRICS_FROM,
    ClassifierArguments,
    RunsArguments,
    Task,
    TaskArguments,
    fitting_length,
    load_teacher,
    load_teacher_tokenizer,
    measure_energy,
    score,
    several_heads,
    tokenize,
)
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.hf_argparser import HfArg

from modeling_snn_bert.batches import Batches, BatchOf, Collate, DrawnBatches, RowBatches, alternating
from modeling_snn_bert.multitask import has_named_labels, keep_head, order_head, order_of_labels
from modeling_snn_bert.seeds import run_seeds
from modeling_snn_bert.settings import refuse_given
from modeling_snn_bert.teacher_inputs import collate_for_teacher
from modeling_snn_bert.trainer import OF_TEACHER, DistillationTrainer, DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledArguments


@dataclass
class BatchArguments:
    """What the batches are made of."""

    unlabelled_batches: int = HfArg(default=4, help="of --unlabelled_file, for each batch with labels")
    pad_to_max_length: bool = HfArg(default=False, help="pad all inputs to --max_seq_length")

    def __post_init__(self) -> None:
        if self.unlabelled_batches < 1:
            raise ValueError(f"--unlabelled_batches must be >= 1, got {self.unlabelled_batches}")


def main() -> None:
    groups = [ClassifierArguments, TaskArguments, UnlabelledArguments, BatchArguments, RunsArguments]
    parser = HfArgumentParser([*groups, DistillationTrainingArguments], description=__doc__)
    *script_args, args = parser.parse_args_into_dataclasses()
    model_args, task_args, text_args, batch_args, run_args = script_args
    if model_args.settings().get("neuron_type") == "psn" and not batch_args.pad_to_max_length:
        raise ValueError("neuron_type=psn takes one length only: give --pad_to_max_length and psn_length=<that length>")
    path, teacher_path = model_args.model_name_or_path, text_args.teacher_name_or_path
    if teacher_path is None:
        refuse_given(parser, OF_TEACHER, "needs --teacher_name_or_path")
    if not text_args.unlabelled_file:
        refuse_given(parser, ["unlabelled_sentences", "unlabelled_batches"], "needs --unlabelled_file")
    if not model_args.convert:
        refuse_given(parser, ["firing_rate"], "needs --convert")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model_args.check(args.attention_weight > 0)
    teacher_tokenizer = load_teacher_tokenizer(teacher_path, args, tokenizer)
    task, rows = task_args.load()
    length = fitting_length(task_args.max_seq_length, tokenizer, path, teacher_tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    if batch_args.pad_to_max_length:
        collate = DataCollatorWithPadding(tokenizer, "max_length", length)
    taught: Collate = collate
    if teacher_tokenizer is not None:
        check_head(AutoConfig.from_pretrained(teacher_path), task)
        taught = collate_for_teacher(collate, tokenizer, teacher_tokenizer)
    with args.main_process_first(desc="tokenize"):
        data = DatasetDict({split: tokenize(part, task, tokenizer, length) for split, part in rows.items()})
        drawn = None
        if text_args.unlabelled_file:
            texts = [list(rows["train"][column]) for column in task.columns]
            share = float(len(texts) == 1)
            drawn = text_args.rows([texts], tokenizer, length, single_share=share)

    validation = {split: part for split, part in data.items() if split != "train"}
    first = next(iter(validation.values()))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return score(task, logits.tolist(), prediction.label_ids.tolist())

    def train_one(args: DistillationTrainingArguments) -> dict[str, Any]:
        """Train and evaluate with one seed; what the results say of it."""
        teacher = None
        if teacher_path is not None:
            teacher = load_teacher(teacher_path, args.attention_weight > 0)
            take_head(teacher, task)
        model = model_args.load(task, data["train"], collate, args.device, args.attention_weight > 0)
        size, process = args.per_device_train_batch_size, args.process_index
        labelled = RowBatches(data["train"], taught, size, args.seed, process, args.world_size)
        batch_of: BatchOf = labelled
        per_epoch, share = labelled.per_epoch, batch_args.unlabelled_batches
        if drawn is not None:
            batch_of = alternating(labelled, DrawnBatches(drawn, taught, size, args.seed, process), share)
            per_epoch *= share + 1
        trainer = DistillationTrainer(
            model,
            args,
            teacher=teacher,
            train_dataset=Batches.of_run(batch_of, args, per_epoch),
            eval_dataset=first,
            data_collator=collate,
            processing_class=collate.tokenizer,
            compute_metrics=compute_metrics,
        )
        seconds = trainer.train_as_told(only_own_checkpoints=True)
        trainer.save_model()
        metrics: dict[str, float] = {}
        for split, part in validation.items():
            # MNLI has two dev sets, matched_accuracy and mismatched_accuracy.
            name = split.removeprefix("validation").lstrip("_")
            prefix = f"{name}_" if name else ""
            figures = trainer.evaluate(part, metric_key_prefix=f"eval_{name}".rstrip("_"))
            metrics |= {f"{prefix}{x}": figures[f"eval_{prefix}{x}"] for x in task.metrics}
        energy = measure_energy(trainer.model, first, collate, run_args.energy_samples, args.per_device_eval_batch_size)
        if args.push_to_hub:
            trainer.push_to_hub()
        return trainer.run_of_seed(seconds, metrics) | {"energy": energy}

    flags = {name: value for group in script_args for name, value in vars(group).items()}
    counts = {split: len(part) for split, part in data.items()}
    run_seeds(args, run_args.seeds, train_one, flags, task.name, metrics_from=METRICS_FROM, rows=counts)


def check_head(config: PreTrainedConfig, task: Task) -> None:
    """Raise a `ValueError` if a teacher has no head of `task`. Labels without names may be the task's."""
    wanted, found = task.head.labels, [str(config.id2label[i]) for i in sorted(config.id2label)]
    if several_heads(config):
        task.head.check(config, "--teacher_name_or_path")
    elif len(found) != len(wanted) or (
        has_named_labels(config.id2label) and order_of_labels(config.id2label, wanted) is None
    ):
        raise ValueError(
            f"--teacher_name_or_path must have been fine-tuned on {task.name}, with the labels {list(wanted)}; "
            f"its labels are {found}"
        )


def take_head(teacher: PreTrainedModel, task: Task) -> None:
    """Leave a teacher of several tasks the head of `task`, and put its labels in the order of the task's."""
    if several_heads(teacher.config):
        keep_head(teacher, task.head)
    else:
        order_head(teacher, teacher.config.id2label, task.head.labels)


if __name__ == "__main__":
    main()
