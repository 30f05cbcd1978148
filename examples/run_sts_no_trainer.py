"""Fine-tune an SNN-BERT, or a BERT, as a sentence encoder on pairs that are more or less alike, with Accelerate.

    python examples/run_sts_no_trainer.py --model_name_or_path outputs/snn-bert-minilm-sentences \\
        --teacher_name_or_path outputs/bert-sts/seed_0 --data_dir glue_data --num_train_epochs 2 --seeds 0 1 2 \\
        --output_dir outputs/sts

A sentence's embedding is the mean of its tokens' last hidden states, and two sentences are as similar as the cosine of
theirs. Each sentence is read alone, so embeddings can be kept and searched; `run_glue*.py --task_name stsb` reads both
at once. The data are STS-B by default; `--task_name mrpc` (or qqp), `--train_file` / `--validation_file` and
`--dataset_name` give others. Pairs have a score, or one of two labels: then those count as alike whose cosine is above
the threshold that has the most training pairs right. Writes a model for each seed, which SentenceTransformer loads, and
results.json: figures before training and at the last step.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from accelerate_loop import (
    Batch,
    RowBatches,
    TrainingLoop,
    add_loop_arguments,
    check_loop_arguments,
    flags_of,
    make_accelerator,
    push,
)
from datasets import Dataset, DatasetDict
from glue_models import check_vocabulary, measure_energy
from glue_tasks import Task, load_task, score
from pair_similarity import PAIR_LOSSES, SIMILARITIES, embedding_loss
from seeds import check_seeds, run_seeds, write_results
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_snn_bert.distillation import hidden_state_loss

PAIR_TASKS = ("stsb", "mrpc", "qqp", "rte")
ALIKE = ("equivalent", "duplicate", "entailment")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="an SNN-BERT or a BERT: folder or Hub id")
    parser.add_argument("--teacher_name_or_path", help="a BERT to learn embeddings of, best one fine-tuned alike")
    parser.add_argument("--embedding_weight", type=float, default=1.0, help="weight of that loss (default: 1)")
    parser.add_argument(
        "--similarity",
        choices=list(SIMILARITIES),
        default="cosine",
        help="of the mean embeddings (default), or by the best match of each token: of both sentences, of the second",
    )
    parser.add_argument("--pair_loss", choices=list(PAIR_LOSSES), default="squared", help="default: squared")
    parser.add_argument("--task_name", choices=PAIR_TASKS, help="default: stsb, if no other data are given")
    parser.add_argument("--data_dir", help="GLUE's folder in its standard layout")
    parser.add_argument("--dataset_name", help="a dataset on the Hub")
    parser.add_argument("--train_file", help=".csv, .tsv, .json or .jsonl: sentence1, sentence2, label (two, or real)")
    parser.add_argument("--validation_file")
    parser.add_argument("--max_score", type=float, default=5.0, help="score of two that say the same (default: 5)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="longer sentences are truncated")
    parser.add_argument("--num_train_epochs", type=float, default=2.0, help="default: 2; or give --max_train_steps")
    parser.add_argument(
        "--energy_samples", type=int, default=256, help="dev sentences that energy is measured on; 0 measures nothing"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="a run for each seed, and mean and spread")
    parser.add_argument("--skip_saving", action="store_true", help="write the results only, no models")
    add_loop_arguments(parser, learning_rate=1e-4, max_train_steps=None)
    args = parser.parse_args()
    check_loop_arguments(parser, args)
    for name in ("num_train_epochs", "max_score"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    for name in ("embedding_weight", "energy_samples"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must be >= 0, got {getattr(args, name)}")
    check_seeds(parser, args.seeds)
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    try:
        task, rows = load_pairs(args)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        teacher = load_teacher(args, tokenizer, accelerator.device)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    with accelerator.main_process_first():
        data = tokenize(rows, task, tokenizer, args)
    flags = flags_of(args)
    runs = run_seeds(
        accelerator,
        args,
        args.seeds if args.seeds is not None else [args.seed],
        flags,
        lambda run_args: train_one(accelerator, run_args, task, data, tokenizer, teacher),
    )
    if accelerator.is_main_process:
        name = f"{task.name} as a sentence encoder"
        write_results(args.output_dir, task, runs, data, flags, accelerator.device, name)


def load_pairs(args: argparse.Namespace) -> tuple[Task, DatasetDict]:
    """Pairs of sentences with scores, or with two labels of which the second stands for alike.

    Raises:
        ValueError, FileNotFoundError: as `load_task`, and if the labels are neither.
    """
    default = None if args.train_file or args.dataset_name else "stsb"
    task, data = load_task(
        task_name=args.task_name or default,
        data_dir=args.data_dir,
        dataset_name=args.dataset_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
    )
    if len(task.columns) != 2 or len(task.labels) not in (0, 2):
        raise ValueError("the data must be pairs of sentences, with real numbers or two labels as label")
    for split, rows in data.items() if task.is_regression else ():
        outside = [x for x in rows["label"] if not 0 <= x <= args.max_score]
        if outside:
            raise ValueError(f"scores must lie in [0, {args.max_score}] (--max_score), {split} has {outside[0]}")
    return task, data


def load_teacher(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel | None:
    """The teacher, frozen.

    Raises:
        ValueError: if its tokenizer gives other token ids than the model's, or its embeddings have another width.
    """
    if args.teacher_name_or_path is None:
        return None
    check_vocabulary(args.teacher_name_or_path, tokenizer)
    widths = [AutoConfig.from_pretrained(x).hidden_size for x in (args.teacher_name_or_path, args.model_name_or_path)]
    if widths[0] != widths[1]:
        raise ValueError(f"the teacher's hidden_size must be the model's, {widths[1]}; it is {widths[0]}")
    return (
        AutoModel.from_pretrained(args.teacher_name_or_path, dtype=torch.float32)
        .to(device)
        .eval()
        .requires_grad_(False)
    )


def tokenize(
    data: DatasetDict, task: Task, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> DatasetDict:
    """`input_ids` of the first sentence, `second_ids`, and `labels` in [0, 1]."""

    def encode(rows: dict) -> dict:
        first, second = (
            tokenizer(rows[column], truncation=True, max_length=args.max_seq_length)["input_ids"]
            for column in task.columns
        )
        return {"input_ids": first, "second_ids": second, "labels": [likeness(task, args, x) for x in rows["label"]]}

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, load_from_cache_file=False)


def likeness(task: Task, args: argparse.Namespace, label: float) -> float:
    """A pair's label as how alike its sentences are, in [0, 1]."""
    return label / args.max_score if task.is_regression else float(label == alike_label(task))


def alike_label(task: Task) -> int:
    """Which of two labels stands for alike: the one that says so by its name, else the second."""
    return next((i for i, name in enumerate(task.labels) if name in ALIKE), 1)


def make_collate(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict]], Batch]:
    """Makes one padded batch of all first sentences, then all second ones: both go through the model at once."""

    def collate(rows: list[dict]) -> Batch:
        ids = [row["input_ids"] for row in rows] + [row["second_ids"] for row in rows]
        batch = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


def read(model: torch.nn.Module, batch: Batch) -> ModelOutput:
    """What the model makes of all sentences, each read alone: states are `[2 * pairs, seq_len, hidden]`."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def teacher_error(states: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor, of_tokens: bool) -> torch.Tensor:
    """Squared error of the embeddings, or of the tokens' states, in units of the teacher's variance."""
    if of_tokens:
        # The loss leaves out the first of the states, which are commonly the embeddings of the words.
        return hidden_state_loss((states, states), (wanted, wanted), mask)
    return embedding_loss(states, wanted, mask)


def train_one(
    accelerator: Accelerator,
    args: argparse.Namespace,
    task: Task,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """Train with one seed; what the results say of it."""
    set_seed(args.seed)
    collate = make_collate(tokenizer)
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=torch.float32, **NO_DROPOUT)
    model = model.to(accelerator.device).train()
    batches = RowBatches(
        data["train"],
        collate,
        args.per_device_train_batch_size,
        args.seed,
        part=accelerator.process_index,
        parts=accelerator.num_processes,
    )
    if args.max_train_steps is None:
        steps = args.num_train_epochs * batches.per_epoch / args.gradient_accumulation_steps
        args.max_train_steps = max(1, math.ceil(steps))

    # In several processes the model will be wrapped.
    config = model.config
    similarity, pair_loss = SIMILARITIES[args.similarity], PAIR_LOSSES[args.pair_loss]

    def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask, outputs = batch["attention_mask"], read(model, batch)
        figures = {"score_loss": pair_loss(similarity(outputs.last_hidden_state, mask), batch["labels"])}
        loss = figures["score_loss"]
        if teacher is not None:
            with torch.no_grad():
                wanted = read(teacher, batch).last_hidden_state
            of_tokens = args.similarity != "cosine"
            figures["embedding_loss"] = teacher_error(outputs.last_hidden_state, wanted, mask, of_tokens)
            loss = loss + args.embedding_weight * figures["embedding_loss"]
        # A BERT has no such penalty.
        if getattr(outputs, "firing_rate_penalty", None) is not None:
            loss = loss + config.firing_rate_weight * outputs.firing_rate_penalty
        return loss, figures

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        found = {
            split: similarities(accelerator, args, model, data[split], collate)
            for split in (["validation"] if task.is_regression else ["train", "validation"])
        }
        return score_pairs(task, **found)

    loop = TrainingLoop(accelerator, model, args, loss_of, evaluate, "run_sts_no_trainer")
    # An evaluation alone has these figures in the end.
    before = loop.evaluate_now() if args.max_train_steps else None
    loop.run(batches.batch, f"sentence encoder, seed {args.seed}")
    model = loop.finish()
    energy = None
    if accelerator.is_main_process:
        model.eval()
        ids = [row[name] for row in data["validation"] for name in ("input_ids", "second_ids")]
        sentences = Dataset.from_dict({"input_ids": ids})
        energy = measure_energy(model, sentences, tokenizer, args.energy_samples, args.per_device_eval_batch_size)
    if accelerator.is_main_process and not args.skip_saving:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        if args.push_to_hub:
            push(args, model, tokenizer, f"{args.output_dir.parent.resolve().name}-{args.output_dir.name}")
    return {
        "seed": args.seed,
        "before_training": before,
        "metrics": {name.removeprefix("eval_"): x for name, x in loop.last_evaluation().items()},
        "last_step": loop.step,
        "training_tokens": loop.tokens,
        "seconds": round(loop.seconds, 1),
        "energy": energy,
        "log": loop.log,
    }


def similarities(
    accelerator: Accelerator, args: argparse.Namespace, model: torch.nn.Module, rows: Dataset, collate: Callable
) -> list[tuple[float, float]]:
    """Similarity and label of every pair, from all processes."""
    found: list[tuple[float, float]] = []
    batch_size = args.per_device_eval_batch_size
    starts = range(0, len(rows), batch_size)
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        alike = SIMILARITIES[args.similarity](read(model, batch).last_hidden_state, batch["attention_mask"])
        found += zip(alike.tolist(), batch["labels"].tolist(), strict=True)
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
