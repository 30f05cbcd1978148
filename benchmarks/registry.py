"""The list of benchmarks. A new one is a module beside this one with a `BENCHMARK`, named below.

Importing this module does not import the benchmarks; `load_benchmarks` does.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from report import Table

MODULES = ("neuron", "training", "inference", "gpu")


@dataclass(frozen=True)
class Settings:
    """What a benchmark is told: a subset of its sections and subjects, and how to measure."""

    sections: tuple[str, ...]
    subjects: tuple[str, ...]
    quick: bool
    threads: int
    repeats: int
    seed: int
    # Bytes per second that `gpu` works out its floors with.
    bandwidth: float = 4.8e12
    # Tokens in a row of the shapes of `gpu`, firing rates and batch sizes of `inference`; empty for all that it has.
    lengths: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    # Whether `inference` measures peaks of memory, and the checkpoint that it measures in place of its sections.
    memory: bool = True
    model_name_or_path: str | None = None


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
