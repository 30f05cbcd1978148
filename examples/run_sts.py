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

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from glue_tasks import METRICS_FROM, Task, TaskArguments, check_vocabulary, measure_energy, score
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modeling_snn_bert.batches import Batch, Batches, Collate, Row, RowBatches
from modeling_snn_bert.distillation import embedding_loss, hidden_state_loss
from modeling_snn_bert.pair_similarity import SIMILARITIES, cosine
from modeling_snn_bert.seeds import checkpoint_of, run_seeds, write_runs
from modeling_snn_bert.sparsity import add_penalty
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments

ALIKE = ("equivalent", "duplicate", "entailment")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class RunArguments:
    """Model and teacher, what similarity is, and the runs."""

    model_name_or_path: str = field(metadata={"help": "an SNN-BERT or a BERT: folder or Hub id"})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "a BERT to learn embeddings of, best one fine-tuned alike"}
    )
    similarity: Literal["cosine", "max_sim", "second_in_first"] = field(
        default="cosine",
        metadata={"help": "of the mean embeddings, or by the best match of each token: of both, of the second"},
    )
    max_score: float = field(default=5.0, metadata={"help": "score of two that say the same"})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "a run for each seed, and mean and spread of their figures (default: --seed)"}
    )
    energy_samples: int = field(
        default=256, metadata={"help": "dev sentences that energy is measured on; 0 measures nothing"}
    )

    def __post_init__(self) -> None:
        if not self.max_score > 0:
            raise ValueError(f"--max_score must be positive, got {self.max_score}")
        if self.energy_samples < 0:
            raise ValueError(f"--energy_samples must be >= 0, got {self.energy_samples}")


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a sentence encoder, which learns a teacher's embeddings if there is one."""

    num_train_epochs: float = field(default=2.0, metadata={"help": "or give --max_steps"})
    embedding_weight: float = field(default=1.0, metadata={"help": "weight of the loss on the teacher's embeddings"})


def main() -> None:
    run_args, task_args, args = HfArgumentParser(
        [RunArguments, TaskArguments, Arguments], description=__doc__
    ).parse_args_into_dataclasses()
    if not (task_args.task_name or task_args.train_file or task_args.dataset_name):
        task_args.task_name = "stsb"
    task, rows = load_pairs(task_args, run_args.max_score)
    tokenizer = AutoTokenizer.from_pretrained(run_args.model_name_or_path)
    with args.main_process_first(desc="tokenize"):
        data = tokenize(rows, task, tokenizer, task_args.max_seq_length, run_args.max_score)

    def train_one(seed: int, folder: Path) -> dict[str, Any]:
        set_seed(seed)
        teacher = load_teacher(run_args, tokenizer)
        # Without a teacher there is nothing of it to learn.
        weight = args.embedding_weight if teacher is not None else 0.0
        seed_args = dataclasses.replace(args, seed=seed, output_dir=str(folder), embedding_weight=weight)
        return train(run_args, seed_args, task, data, tokenizer, teacher)

    flags = {**vars(run_args), **vars(task_args), **args.to_sanitized_dict()}
    runs = run_seeds(
        run_args.seeds or [args.seed],
        args.output_dir,
        train_one,
        flags,
        resume=args.resume_from_checkpoint is not None,
        is_main_process=args.process_index == 0,
    )
    if args.process_index == 0:
        counts = {split: len(part) for split, part in data.items()}
        name = f"{task.name} as a sentence encoder"
        write_runs(args.output_dir, name, runs, flags, args.device, metrics_from=METRICS_FROM, rows=counts)


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


def load_teacher(args: RunArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The teacher, if there is one.

    Raises:
        ValueError: if its tokenizer gives other token ids than the model's, or its embeddings have another width.
    """
    if args.teacher_name_or_path is None:
        return None
    check_vocabulary(args.teacher_name_or_path, tokenizer)
    widths = [AutoConfig.from_pretrained(x).hidden_size for x in (args.teacher_name_or_path, args.model_name_or_path)]
    if widths[0] != widths[1]:
        raise ValueError(f"the teacher's hidden_size must be the model's, {widths[1]}; it is {widths[0]}")
    return AutoModel.from_pretrained(args.teacher_name_or_path, dtype=torch.float32)


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


def train(
    run_args: RunArguments,
    args: Arguments,
    task: Task,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """Train with one seed; what the results say of it."""

    def collate(rows: Sequence[Row]) -> Batch:
        """One padded batch of all first sentences, then all second ones: both go through the model at once."""
        ids = [row["input_ids"] for row in rows] + [row["second_ids"] for row in rows]
        batch = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    model = AutoModel.from_pretrained(run_args.model_name_or_path, dtype=torch.float32, **NO_DROPOUT)
    batches = RowBatches(
        data["train"], collate, args.per_device_train_batch_size, args.seed, args.process_index, args.world_size
    )
    if args.max_steps <= 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * batches.per_epoch / args.gradient_accumulation_steps))

    def figures_of(model: PreTrainedModel) -> dict[str, float]:
        splits = ["validation"] if task.is_regression else ["train", "validation"]
        return score_pairs(task, **{split: trainer.similarities(data[split], collate) for split in splits})

    trainer = PairTrainer(
        model,
        args,
        similarity=SIMILARITIES[run_args.similarity],
        teacher=teacher,
        train_dataset=Batches(batches, args.max_steps * args.gradient_accumulation_steps),
        processing_class=tokenizer,
        figures_of=figures_of,
    )
    run: dict[str, Any] = {"seed": args.seed, "before_training": None, "last_step": 0, "seconds": 0.0}
    if args.do_train:
        before = trainer.evaluate()
        run["before_training"] = {name.removeprefix("eval_"): x for name, x in before.items()}
        checkpoint = checkpoint_of(args.output_dir, args.resume_from_checkpoint, only_own=True)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        run |= {"last_step": trainer.state.global_step, "seconds": round(result.metrics["train_runtime"], 1)}
    results = trainer.results()
    trainer.save_model()
    ids = [row[name] for row in data["validation"] for name in ("input_ids", "second_ids")]
    sentences = Dataset.from_dict({"input_ids": ids})
    pad = DataCollatorWithPadding(tokenizer)
    energy = measure_energy(model, sentences, pad, run_args.energy_samples, args.per_device_eval_batch_size)
    if args.push_to_hub:
        trainer.push_to_hub()
    metrics = {name.removeprefix("eval_"): x for name, x in results["evaluation"].items()}
    tokens = results["training_tokens"]
    return {**run, "training_tokens": tokens, "metrics": metrics, "energy": energy, "log": results["log"]}


class PairTrainer(DistillationTrainer):
    """DistillationTrainer for pairs whose sentences are read alone, states `[2 * pairs, seq_len, hidden]`."""

    def __init__(self, *args, similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.similarity = similarity

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        mask = inputs["attention_mask"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=mask)
        states = outputs.last_hidden_state
        # The squared difference of similarities and labels.
        loss = self.add_part("score_loss", (self.similarity(states, mask) - inputs["labels"]).square().mean())
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
            if self.similarity is cosine:
                part = embedding_loss(states, wanted, mask)
            else:
                # The loss leaves out the first of the states, which are commonly the embeddings of the words.
                part = hidden_state_loss((states, states), (wanted, wanted), mask)
            loss = loss + self.args.embedding_weight * self.add_part("embedding_loss", part)
        loss = add_penalty(loss, outputs, self.firing_rate_weight)
        return (loss, outputs) if return_outputs else loss

    def similarities(self, rows: Dataset, collate: Collate) -> list[tuple[float, float]]:
        """Similarity and label of every pair, from all processes."""
        found: list[tuple[float, float]] = []
        batch_size, process, processes = (
            self.args.per_device_eval_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        for start in range(0, len(rows), batch_size)[process::processes]:
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            batch = {name: x.to(self.args.device) for name, x in batch.items()}
            mask = batch["attention_mask"]
            states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            found += zip(self.similarity(states, mask).tolist(), batch["labels"].tolist(), strict=True)
        return gather_object(found)


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


def best_threshold(pairs: list[tuple[float, float]]) -> float:
    """Where the most pairs of similarity and label (0 or 1) are on the right side, and the lowest such place."""
    ordered = sorted(pairs)
    # From below the first similarity, where all count as alike, upwards: each step takes one pair to the other side.
    right = sum(label for _, label in ordered)
    best, place = right, ordered[0][0] - 1
    for (similarity, label), (following, _) in itertools.pairwise([*ordered, (ordered[-1][0] + 1, 0.0)]):
        right += 1 - 2 * label
        if right > best and following > similarity:
            best, place = right, (similarity + following) / 2
    return place


if __name__ == "__main__":
    main()
