"""Fine-tune an SNN-BERT, or a BERT, on a GLUE task or on your own sentences, with Accelerate and no Trainer.

    python examples/run_glue_no_trainer.py --model_name_or_path outputs/distilled --task_name sst2 \\
        --data_dir glue_data --num_train_epochs 3 --seeds 0 1 2 --output_dir outputs/sst2

`--model_name_or_path` is an SNN-BERT, a BERT, or with `--convert` a BERT that becomes an SNN-BERT first. Beside a
teacher, `--unlabelled_file` adds batches of sentences, or pairs, made of a text, which the teacher alone labels. Writes
a model for each seed and results.json: figures at the last step for each seed, mean and spread, firing rates and
energy, flags and versions. `run_glue.py` does the same with transformers' Trainer, but for the unlabelled batches.
"""

import argparse
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from accelerate_loop import (
    Batch,
    DrawnBatches,
    RowBatches,
    TrainingLoop,
    add_loop_arguments,
    check_loop_arguments,
    flags_of,
    make_accelerator,
    push,
)
from datasets import Dataset, DatasetDict
from glue_models import (
    DataArguments,
    ModelArguments,
    Teacher,
    check_arguments,
    load_data,
    load_model,
    load_tokenizer,
    measure_energy,
    tokenize,
)
from glue_tasks import Task, score
from seeds import run_seeds, write_results
from transformers import DataCollatorWithPadding, HfArgumentParser, PreTrainedTokenizerBase
from unlabelled_data import UnlabelledRows, check_unlabelled_files, read_passages


def parse_args() -> tuple[ModelArguments, DataArguments, argparse.Namespace]:
    parser = HfArgumentParser(
        [ModelArguments, DataArguments], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_loop_arguments(parser, learning_rate=1e-4, max_train_steps=None)
    parser.add_argument("--num_train_epochs", type=float, default=3.0, help="default: 3; or give --max_train_steps")
    group = parser.add_argument_group("unlabelled data")
    group.add_argument(
        "--unlabelled_file", nargs="+", help="text for the teacher to label: .txt, .csv, .tsv, .json, .xz"
    )
    group.add_argument("--unlabelled_sentences", type=int, default=60_000, help="taken from it (default: 60,000)")
    group.add_argument("--unlabelled_batches", type=int, default=4, help="for each batch with labels (default: 4)")
    parser.add_argument("--skip_saving", action="store_true", help="write the results only, no models")
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args, data_args)
    check_loop_arguments(parser, args)
    if not args.num_train_epochs > 0:
        parser.error(f"--num_train_epochs must be positive, got {args.num_train_epochs}")
    check_unlabelled_files(parser, args.unlabelled_file, args.unlabelled_sentences)
    if args.unlabelled_batches < 1:
        parser.error(f"--unlabelled_batches must be >= 1, got {args.unlabelled_batches}")
    if args.unlabelled_file and not model_args.teacher_name_or_path:
        parser.error("--unlabelled_file needs --teacher_name_or_path, to label it")
    return model_args, data_args, args


def main() -> None:
    model_args, data_args, args = parse_args()
    accelerator = make_accelerator(args)
    try:
        task, rows = load_data(data_args)
        tokenizer = load_tokenizer(model_args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    with accelerator.main_process_first():
        data = tokenize(rows, task, tokenizer, data_args)
        unlabelled = unlabelled_rows(args, data_args, task, rows["train"], tokenizer) if args.unlabelled_file else None
    flags = {**vars(model_args), **vars(data_args), **flags_of(args)}
    seeds = data_args.seeds if data_args.seeds is not None else [args.seed]
    runs = run_seeds(
        accelerator,
        args,
        seeds,
        flags,
        lambda run_args: train_one(accelerator, model_args, data_args, run_args, task, data, tokenizer, unlabelled),
    )
    if accelerator.is_main_process:
        write_results(args.output_dir, task, runs, data, flags, accelerator.device)


def unlabelled_rows(
    args: argparse.Namespace, data_args: DataArguments, task: Task, train: Dataset, tokenizer: PreTrainedTokenizerBase
) -> UnlabelledRows:
    """Draws rows like the task's, made of its training texts and of the unlabelled files."""
    texts = [train[column] for column in task.columns]
    is_pair = len(texts) == 2
    try:
        return UnlabelledRows(
            read_passages(args.unlabelled_file, args.unlabelled_sentences),
            [] if is_pair else list(texts[0]),
            list(zip(*texts, strict=True)) if is_pair else [],
            tokenizer,
            data_args.max_seq_length,
            single_share=0.0 if is_pair else 1.0,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error


def train_one(
    accelerator: Accelerator,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: argparse.Namespace,
    task: Task,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    unlabelled: UnlabelledRows | None,
) -> dict[str, Any]:
    """Fine-tune with one seed; what the results say of it."""
    set_seed(args.seed)
    collate = DataCollatorWithPadding(tokenizer)
    if data_args.pad_to_max_length:
        collate = DataCollatorWithPadding(tokenizer, "max_length", data_args.max_seq_length)
    try:
        model = load_model(model_args, task, data["train"], tokenizer, accelerator.device)
        teacher = None
        if model_args.teacher_name_or_path:
            teacher = Teacher(model_args, task, tokenizer, accelerator.device)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    model.train()
    process, processes = accelerator.process_index, accelerator.num_processes
    batches = RowBatches(
        data["train"], collate, args.per_device_train_batch_size, args.seed, part=process, parts=processes
    )
    batch_of, per_labelled = batches.batch, 1
    if unlabelled is not None:
        drawn = DrawnBatches(unlabelled, collate, args.per_device_train_batch_size, args.seed, process)
        per_labelled += args.unlabelled_batches

        def batch_of(number: int) -> Batch:
            labelled, place = divmod(number, per_labelled)
            return batches.batch(labelled) if place == 0 else drawn.batch(number - labelled - 1)

    if args.max_train_steps is None:
        steps = args.num_train_epochs * batches.per_epoch * per_labelled / args.gradient_accumulation_steps
        args.max_train_steps = max(1, math.ceil(steps))

    def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (model(**batch).loss if teacher is None else teacher.loss(model, batch)[0]), {}

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        for split in (name for name in data if name != "train"):
            predictions = predict(accelerator, model, data[split], collate, args.per_device_eval_batch_size)
            logits, labels = zip(*predictions, strict=True)
            prefix = split.removeprefix("validation").lstrip("_")
            figures |= {f"{prefix}_{name}".lstrip("_"): x for name, x in score(task, logits, labels).items()}
        return figures

    loop = TrainingLoop(accelerator, model, args, loss_of, evaluate, "run_glue_no_trainer")
    loop.run(batch_of, f"{task.name}, seed {args.seed}")
    model = loop.finish()
    validation = data[next(split for split in data if split != "train")]
    run = {
        "seed": args.seed,
        "metrics": {name.removeprefix("eval_"): x for name, x in loop.last_evaluation().items()},
        "last_step": loop.step,
        "training_tokens": loop.tokens,
        "seconds": round(loop.seconds, 1),
        "energy": None,
        "log": loop.log,
    }
    if accelerator.is_main_process:
        model.eval()
        run["energy"] = measure_energy(
            model, validation, tokenizer, data_args.energy_samples, args.per_device_eval_batch_size
        )
        if not args.skip_saving:
            model.save_pretrained(args.output_dir)
            tokenizer.save_pretrained(args.output_dir)
            if args.push_to_hub:
                push(args, model, tokenizer, f"{args.output_dir.parent.resolve().name}-{args.output_dir.name}")
    return run


def predict(
    accelerator: Accelerator, model: torch.nn.Module, rows, collate, batch_size: int
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
        logits = model(**batch).logits.float().tolist()
        mine += list(zip(indices, logits, labels, strict=True))
    return [(logits, label) for _, logits, label in sorted(gather_object(mine), key=lambda row: row[0])]


if __name__ == "__main__":
    main()
