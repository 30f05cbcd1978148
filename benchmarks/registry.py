"""The list of benchmarks. A new one is a module beside this one with a function under `@benchmark`, named below.

Importing this module does not import the benchmarks; `load_benchmarks` does.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from report import Table

MODULES = ("neuron", "training", "inference", "sparsity", "gpu")


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
    # Tokens in a row of the shapes of `gpu`; empty for all that it has.
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A function from settings to tables, the sections and subjects to choose from, and the default of `repeats`."""

    name: str
    run: Callable[[Settings], Iterator[Table]]
    sections: tuple[str, ...]
    subjects: tuple[str, ...]
    repeats: int

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, *, sections: tuple[str, ...], subjects: tuple[str, ...], repeats: int):
    """Register the decorated function, which yields one table after the other, as the benchmark `name`."""

    def register(run: Callable[[Settings], Iterator[Table]]) -> Callable[[Settings], Iterator[Table]]:
        if name in BENCHMARKS:
            raise ValueError(f"there is already a benchmark named {name!r}")
        BENCHMARKS[name] = Benchmark(name, run, sections, subjects, repeats)
        return run

    return register


def load_benchmarks() -> dict[str, Benchmark]:
    """Import every module of `MODULES`, which fills the registry."""
    for module in MODULES:
        importlib.import_module(module)
    return BENCHMARKS
