"""The list of benchmarks. A new one is a module beside this one with a `BENCHMARK`, named below.

Importing this module does not import the benchmarks; `load_benchmarks` does.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from report import Table

MODULES = ("neuron", "training", "inference", "gpu")


def option(default: Any, **flag: Any) -> Any:
    """A setting that is a flag of `run.py` too, with what `add_argument` takes."""
    return field(default=default, metadata={"default": default, **flag})


def bytes_per_second(terabytes: str) -> float:
    return 1e12 * float(terabytes)


@dataclass(frozen=True)
class Settings:
    """What a benchmark is told: a subset of its sections and subjects, and how to measure."""

    sections: tuple[str, ...]
    subjects: tuple[str, ...]
    repeats: int
    quick: bool = option(False, action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    threads: int = option(min(2, os.cpu_count() or 1), type=int)
    seed: int = option(0, type=int)
    bandwidth: float = option(
        4.8e12,
        type=bytes_per_second,
        help="memory bandwidth for the floors of `gpu`, TB/s (default: 4.8, the nominal figure of an H200)",
    )
    lengths: Sequence[int] = option((), nargs="+", type=int, help="of `gpu`: only shapes of such a length")
    rates: Sequence[float] = option((), nargs="+", type=float, help="of `inference` (default: 0.05 to 0.3)")
    batch_sizes: Sequence[int] = option((), nargs="+", type=int, help="of `inference` (default: 1, 8, 32)")
    no_memory: bool = option(False, action="store_true", help="of `inference`: leave out the peaks of memory")
    model_name_or_path: str | None = option(
        None, help="of `inference`: an SNN-BERT, folder or Hub id, measured at its own rates"
    )


Section = Callable[[Settings], Iterator[Table]]


@dataclass(frozen=True)
class Benchmark:
    """The sections of a benchmark by name, each a function from settings to tables.

    Args:
        name: what it is called.
        description: what it measures.
        sections: its parts.
        subjects: what to choose from.
        repeats: the default of the interleaved rounds.
        of_checkpoint: measures the checkpoint of the settings, if it can be told one.
    """

    name: str
    description: str
    sections: Mapping[str, Section]
    subjects: tuple[str, ...]
    repeats: int
    of_checkpoint: Section | None = None

    def run(self, settings: Settings) -> Iterator[Table]:
        """The tables of the sections that are asked for, or of the checkpoint, one after the other."""
        parts = {name: self.sections[name] for name in settings.sections}
        if settings.model_name_or_path is not None and self.of_checkpoint is not None:
            parts = {"checkpoint": self.of_checkpoint}
        for name, section in parts.items():
            for table in section(settings):
                table.section = name
                yield table


def load_benchmarks() -> dict[str, Benchmark]:
    """Import every module of `MODULES` and return its benchmark by its name."""
    benchmarks = [importlib.import_module(module).BENCHMARK for module in MODULES]
    return {benchmark.name: benchmark for benchmark in benchmarks}
