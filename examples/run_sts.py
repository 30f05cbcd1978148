"""Fine-tune an SNN-BERT, or a BERT, as a sentence encoder on pairs that are more or less alike, with Trainer.

    python examples/run_sts.py --model_name_or_path outputs/snn-bert-minilm-sentences \\
        --teacher_name_or_path outputs/bert-sts/seed_0 --data_dir glue_data --num_train_epochs 2 --seeds 0 1 2 \\
        --output_dir outputs/sts

A sentence's embedding is the mean of its tokens' last hidden states, and two sentences are as similar as the cosine of
theirs. Each sentence is read alone, so embeddings can be kept and searched; `run_glue.py --task_name stsb` reads both
at once. The data are STS-B by default; `--task_name mrpc` (or qqp), `--train_file` / `--validation_file` and
`--dataset_name` give others. Pairs have a score, or one of two labels: then those count as alike whose cosine is above
the threshold that has the most training pairs right. Takes all flags of TrainingArguments. Writes a model for each
seed, which SentenceTransformer loads, and results.json: figures before training and at the last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from glue_tasks import METRICS_FROM, RunsArguments, Task, TaskArguments, check_vocabulary, measure_energy, score
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from modeling_snn_bert.batches import Batch, Batches, Row, RowBatches
from modeling_snn_bert.fine_tuning import NO_DROPOUT
from modeling_snn_bert.pair_similarity import SIMILARITIES, PairTrainer, best_threshold
from modeling_snn_bert.seeds import run_seeds
from modeling_snn_bert.settings import refuse_given
from modeling_snn_bert.trainer import DistillationTrainingArguments

ALIKE = ("equivalent", "duplicate", "entailment")


@dataclass(kw_only=True)
class RunArguments(RunsArguments):
    """Model and teacher, what similarity is, and the runs."""

    model_name_or_path: str = HfArg(help="an SNN-BERT or a BERT: folder or Hub id")
    teacher_name_or_path: str | None = HfArg(default=None, help="a BERT, best fine-tuned alike, to learn from")
    similarity: Literal["cosine", "max_sim", "second_in_first"] = HfArg(
        default="cosine", help="of the mean embeddings, or by the best match of each token: of both, of the second"
    )
    max_score: float = HfArg(default=5.0, help="score of two that say the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_score > 0:
            raise ValueError(f"--max_score must be positive, got {self.max_score}")


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a sentence encoder, which learns a teacher's embeddings if there is one."""

    num_train_epochs: float = HfArg(default=2.0, help="or give --max_steps")
    embedding_weight: float = HfArg(default=1.0, help="weight of the loss on the teacher's embeddings, if there is one")
    # PairTrainer has no other loss of a teacher, so that there are no flags of these.
    logit_weight: float = field(default=0.0, init=False)
    temperature: float = field(default=1.0, init=False)
    hidden_weight: float = field(default=0.0, init=False)
    attention_weight: float = field(default=0.0, init=False)
    relation_weight: float = field(default=0.0, init=False)


def main() -> None:
    parser = HfArgumentParser([RunArguments, TaskArguments, Arguments], description=__doc__)
    run_args, task_args, args = parser.parse_args_into_dataclasses()
    path, teacher_path = run_args.model_name_or_path, run_args.teacher_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    if teacher_path is None:
        refuse_given(parser, ["embedding_weight"], "needs --teacher_name_or_path")
        args.embedding_weight = 0.0
    else:
        check_teacher(teacher_path, path, tokenizer)
    if not (task_args.task_name or task_args.train_file or task_args.dataset_name):
        task_args.task_name = "stsb"
    task, rows = load_pairs(task_args, run_args.max_score)
    if not task.is_regression:
        refuse_given(parser, ["max_score"], "is for pairs with scores, these have labels")
    with args.main_process_first(desc="tokenize"):
        data = tokenize(rows, task, tokenizer, task_args.max_seq_length, run_args.max_score)

    def collate(rows: Sequence[Row]) -> Batch:
        """One padded batch of all first sentences, then all second ones: both go through the model at once."""
        ids = [row["input_ids"] for row in rows] + [row["second_ids"] for row in rows]
        batch = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def train_one(args: Arguments) -> dict[str, Any]:
        """Train with one seed; what the results say of it."""
        teacher = None if teacher_path is None else AutoModel.from_pretrained(teacher_path, dtype=torch.float32)
        model = AutoModel.from_pretrained(path, dtype=torch.float32, **NO_DROPOUT)
        batches = RowBatches(
            data["train"], collate, args.per_device_train_batch_size, args.seed, args.process_index, args.world_size
        )

        def figures_of(model: PreTrainedModel) -> dict[str, float]:
            splits = ["validation"] if task.is_regression else ["train", "validation"]
            return score_pairs(task, **{split: trainer.similarities(data[split], collate) for split in splits})

        trainer = PairTrainer(
            model,
            args,
            similarity=SIMILARITIES[run_args.similarity],
            teacher=teacher,
            train_dataset=Batches.of_run(batches, args, batches.per_epoch),
            processing_class=tokenizer,
            figures_of=figures_of,
        )
        before = trainer.evaluate() if args.do_train else {}
        seconds = trainer.train_as_told(only_own_checkpoints=True)
        after = trainer.results()["evaluation"]
        trainer.save_model()
        ids = [row[name] for row in data["validation"] for name in ("input_ids", "second_ids")]
        sentences = Dataset.from_dict({"input_ids": ids})
        pad = DataCollatorWithPadding(tokenizer)
        energy = measure_energy(model, sentences, pad, run_args.energy_samples, args.per_device_eval_batch_size)
        if args.push_to_hub:
            trainer.push_to_hub()
        before, metrics = ({name.removeprefix("eval_"): x for name, x in f.items()} for f in (before, after))
        return {**trainer.run_of_seed(seconds, metrics), "before_training": before or None, "energy": energy}

    counts = {split: len(part) for split, part in data.items()}
    name, flags = f"{task.name} as a sentence encoder", {**vars(run_args), **vars(task_args)}
    run_seeds(args, run_args.seeds, train_one, flags, name, metrics_from=METRICS_FROM, rows=counts)


def load_pairs(args: TaskArguments, max_score: float) -> tuple[Task, DatasetDict]:
    """Pairs of sentences with scores, or with two labels of which the second stands for alike.

    Raises:
        ValueError, FileNotFoundError: as `TaskArguments.load`, and if the labels are neither.
    """
    task, data = args.load()
    if len(task.columns) != 2 or len(task.labels) not in (0, 2):
        raise ValueError("the data must be pairs of sentences, with real numbers or two labels as label")
    for split, rows in data.items() if task.is_regression else ():
        outside = [x for x in rows["label"] if not 0 <= x <= max_score]
        if outside:
            raise ValueError(f"scores must lie in [0, {max_score}] (--max_score), {split} has {outside[0]}")
    return task, data


def check_teacher(teacher_path: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if a teacher has other token ids than the model, or embeddings of another width."""
    check_vocabulary(AutoTokenizer.from_pretrained(teacher_path), tokenizer)
    widths = [AutoConfig.from_pretrained(x).hidden_size for x in (teacher_path, path)]
    if widths[0] != widths[1]:
        raise ValueError(f"the teacher's hidden_size must be the model's, {widths[1]}; it is {widths[0]}")


def tokenize(
    data: DatasetDict, task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, max_score: float
) -> DatasetDict:
    """`input_ids` of the first sentence, `second_ids`, and as `labels` how alike they are, in [0, 1]."""

    def encode(rows: dict) -> dict:
        first, second = (
            tokenizer(rows[column], truncation=True, max_length=max_seq_length)["input_ids"] for column in task.columns
        )
        alike = [x / max_score if task.is_regression else float(x == alike_label(task)) for x in rows["label"]]
        return {"input_ids": first, "second_ids": second, "labels": alike}

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, load_from_cache_file=False)


def alike_label(task: Task) -> int:
    """Which of two labels stands for alike: the one that says so by its name, else the second."""
    return next((i for i, name in enumerate(task.labels) if name in ALIKE), 1)


def score_pairs(
    task: Task, validation: list[tuple[float, float]], train: list[tuple[float, float]] | None = None
) -> dict[str, float]:
    """The task's figures: correlation of similarities and scores, or those of the labels by a threshold."""
    found, likenesses = zip(*validation, strict=True)
    if train is None:
        return score(task, [[x] for x in found], likenesses)
    threshold, alike = best_threshold(train), alike_label(task)
    logits = [[x, threshold] if alike == 0 else [threshold, x] for x in found]
    labels = [alike if x else 1 - alike for x in likenesses]
    return {**score(task, logits, labels), "threshold": threshold}


if __name__ == "__main__":
    main()
