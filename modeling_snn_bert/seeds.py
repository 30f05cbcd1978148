"""A run for each seed: where it is kept, what an interrupted call has done already, mean and spread of the figures."""

import dataclasses
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .atomic_writes import write_json

RESULTS_FILE = "results.json"
Run = dict[str, Any]
# Flags that do not change what a seed's run gives.
FREE_FLAGS = ("resume_from_checkpoint", "seeds", "seed", "output_dir", "logging_dir")


def run_seeds(
    args: TrainingArguments,
    seeds: Sequence[int] | None,
    train_one: Callable[[Any], Run],
    flags: Mapping[str, Any],
    task_name: str,
    **further: Any,
) -> list[Run]:
    """Train with each seed in a folder of its own, write all runs with mean and spread, and print the summary.

    What `train_one` returns is written to `RESULTS_FILE` in the seed's folder, `seed_<seed>` in that of `args`. A call
    that resumes leaves out the seeds that an interrupted call with the same flags has done. The main process writes.

    Args:
        args: of all runs.
        seeds: the seeds; `None` for that of `args` alone.
        train_one: trains with arguments that have the seed and its folder; what it returns is written as JSON, and has
            `"seed"` and `"metrics"`.
        flags: the settings beside `args`, as JSON takes them; all are written with the results.
        task_name: of the summary.
        further: what else the results are to say.

    Raises:
        ValueError: if two seeds are the same, or a seed was done with other flags.
    """
    seeds, flags = seeds or [args.seed], {**flags, **args.to_sanitized_dict()}
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds must differ from each other, got {list(seeds)}")
    is_main_process = args.process_index == 0
    runs = []
    for seed in seeds:
        folder = Path(args.output_dir or ".") / f"seed_{seed}"
        run = _finished(folder / RESULTS_FILE, flags) if args.resume_from_checkpoint is not None else None
        if run is None:
            set_seed(seed)
            run = train_one(dataclasses.replace(args, seed=seed, output_dir=str(folder)))
            if is_main_process:
                write_json(folder / RESULTS_FILE, {**run, "arguments": flags})
        runs.append(run)
    if is_main_process:
        summary = summarize(runs)
        results = {"task": task_name, **summary, **further, "runs": runs, "arguments": flags}
        write_json(Path(args.output_dir or ".") / RESULTS_FILE, {**results, "environment": environment(args.device)})
        print(summary_line(task_name, summary))
    return runs


def _finished(file: Path, flags: Mapping[str, Any]) -> Run | None:
    """What is in the results file of a seed, if there is one; its flags must be these."""
    if not file.is_file():
        return None
    run = json.loads(file.read_text(encoding="utf-8"))
    written = run.pop("arguments")
    comparable = json.loads(json.dumps(flags))
    different = [k for k in comparable if k not in FREE_FLAGS and comparable[k] != written.get(k)]
    if different:
        raise ValueError(f"{file} was made with other flags ({', '.join(different)}): choose another --output_dir")
    return run


def checkpoint_of(folder: str | Path, wanted: str | None, *, only_own: bool = False) -> str | None:
    """The checkpoint of Trainer that the run in `folder` resumes from, if any.

    Args:
        folder: the run's.
        wanted: a checkpoint, or `"true"` for the last one in `folder`.
        only_own: a checkpoint of another folder is another seed's, and not this run's.

    Raises:
        ValueError: if `wanted` is no checkpoint.
    """
    if wanted is None:
        return None
    if wanted.lower() == "true":
        return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint: {wanted} is not a checkpoint of Trainer")
    return wanted if not only_own or Path(wanted).resolve().parent == Path(folder).resolve() else None


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds of every figure in `metrics`, and what they are of."""
    values = {name: [run["metrics"][name] for run in runs] for name in runs[0]["metrics"]}
    return {
        "seeds": [run["seed"] for run in runs],
        "mean": {name: statistics.fmean(figures) for name, figures in values.items()},
        # One seed has no spread.
        "standard_deviation": {
            name: statistics.stdev(figures) if len(figures) > 1 else None for name, figures in values.items()
        },
        "taken_at": "last step",
    }


def summary_line(name: str, summary: Mapping[str, Any]) -> str:
    """The summary of the runs on the task `name` for a reader, figures times 100."""
    parts = []
    for figure, mean in summary["mean"].items():
        spread = summary["standard_deviation"][figure]
        parts.append(f"{figure} {100 * mean:.1f}" + ("" if spread is None else f" +- {100 * spread:.1f}"))
    count = len(summary["seeds"])
    return f"{name}: {', '.join(parts)} (last step, {count} seed{'s' if count > 1 else ''})"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the results."""
    versions: dict[str, Any] = {}
    for package in ("snn-bert", "torch", "transformers", "accelerate", "datasets", "scikit-learn", "scipy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
