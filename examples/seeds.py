"""A run for each seed: where they are kept, the runs of an interrupted call, mean and spread."""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate_loop import environment, write_json
from datasets import DatasetDict
from glue_tasks import METRICS_FROM, Task

RESULTS_FILE = "results.json"


def check_seeds(parser: argparse.ArgumentParser, seeds: Sequence[int] | None) -> None:
    """End the program with a clear message if two seeds are the same."""
    if seeds is not None and len(set(seeds)) != len(seeds):
        parser.error(f"--seeds must differ from each other, got {seeds}")


def run_seeds(
    accelerator: Accelerator,
    args: argparse.Namespace,
    seeds: Sequence[int],
    flags: dict[str, Any],
    train_one: Callable[[argparse.Namespace], dict[str, Any]],
) -> list[dict[str, Any]]:
    """What `train_one` returns for each seed, from `args` with that seed and the seed's folder as `output_dir`.

    Each is written to its folder when it is done, with `flags`. A call with `--resume_from_checkpoint` leaves out the
    seeds that are done, and resumes the one whose checkpoint that is.
    """
    runs = []
    for seed in seeds:
        run_args = copy.copy(args)
        run_args.seed, run_args.output_dir = seed, seed_folder(args.output_dir, seed)
        finished = finished_run(run_args, flags)
        if finished is not None:
            accelerator.print(f"seed {seed} is done already")
            runs.append(finished)
            continue
        if args.resume_from_checkpoint is not None and args.resume_from_checkpoint.parent.name != f"seed_{seed}":
            run_args.resume_from_checkpoint = None
        runs.append(train_one(run_args))
        if accelerator.is_main_process:
            write_json(run_args.output_dir / RESULTS_FILE, {**runs[-1], "arguments": flags})
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    return runs


def finished_run(args: argparse.Namespace, flags: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted call with the same flags has written for this seed, if this call resumes it."""
    file: Path = args.output_dir / RESULTS_FILE
    if args.resume_from_checkpoint is None or not file.is_file():
        return None
    results = json.loads(file.read_text())
    written = results.pop("arguments")
    free = ("resume_from_checkpoint", "seeds", "output_dir")
    comparable = json.loads(json.dumps(flags))
    different = [k for k in comparable if k not in free and comparable[k] != written.get(k)]
    if different:
        raise SystemExit(f"{file} was made with other flags ({', '.join(different)}): choose another --output_dir")
    return results


def write_results(
    output_dir: Path,
    task: Task,
    runs: Sequence[dict[str, Any]],
    data: DatasetDict,
    flags: dict[str, Any],
    device: torch.device,
    name: str | None = None,
) -> None:
    """Write `RESULTS_FILE`, and print mean and spread; `name` is that of the task unless it is given."""
    summary = summarize(runs)
    results = {
        "task": name or task.name,
        **summary,
        "runs": runs,
        "rows": {split: len(part) for split, part in data.items()},
        "arguments": flags,
        "environment": environment(device),
    }
    write_json(output_dir / RESULTS_FILE, results)
    print(summary_line(task, summary))


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds of every figure, and what they are of."""
    names = list(runs[0]["metrics"])
    values = {name: [run["metrics"][name] for run in runs] for name in names}
    return {
        "seeds": [run["seed"] for run in runs],
        "mean": {name: statistics.fmean(figures) for name, figures in values.items()},
        # One seed has no spread.
        "standard_deviation": {
            name: statistics.stdev(figures) if len(figures) > 1 else None for name, figures in values.items()
        },
        "taken_at": "last step",
        "metrics_from": METRICS_FROM,
    }


def summary_line(task: Task, summary: dict[str, Any]) -> str:
    """The summary for a reader."""
    parts = []
    for name, mean in summary["mean"].items():
        spread = summary["standard_deviation"][name]
        parts.append(f"{name} {100 * mean:.1f}" + ("" if spread is None else f" +- {100 * spread:.1f}"))
    count = len(summary["seeds"])
    return f"{task.name}: {', '.join(parts)} (last step, {count} seed{'s' if count > 1 else ''})"


def seed_folder(output_dir: str | Path, seed: int) -> Path:
    """Where the run with that seed is kept."""
    return Path(output_dir) / f"seed_{seed}"
