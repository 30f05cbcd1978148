"""Run benchmarks, print their tables and write what they measured.

    python benchmarks/run.py                                       all of them
    python benchmarks/run.py training --sections step_384 profile  a part of one
    python benchmarks/run.py --list                                names, sections, subjects

A run writes `<output_dir>/<benchmark>.json`, or `<benchmark>-<sections>.json` for a part.
"""

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from registry import Benchmark, Settings, load_benchmarks
from report import write_results


def parse_args(benchmarks: dict[str, Benchmark], arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(benchmarks)} (default: all; gpu only where there is one)",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks, their sections and subjects")
    parser.add_argument("--sections", nargs="+", default=[], metavar="SECTION", help="only these sections")
    parser.add_argument("--subjects", nargs="+", default=[], metavar="SUBJECT", help="measure only these")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--repeats", type=int, help="interleaved rounds (default: as --list says)")
    for option in (field for field in fields(Settings) if field.metadata):
        parser.add_argument(f"--{option.name}", **option.metadata)
    args = parser.parse_args(arguments)
    for name in ("threads", "repeats", "batch_sizes"):
        value = getattr(args, name)
        if min([value] if isinstance(value, int) else value or [1]) < 1:
            parser.error(f"--{name} must be >= 1, got {value}")
    if not 0 < args.bandwidth < math.inf:
        parser.error(f"--bandwidth must be positive and finite, got {args.bandwidth / 1e12}")
    if not all(0 < rate < 1 for rate in args.rates):
        parser.error(f"--rates must lie in (0, 1), got {args.rates}")
    unknown = [name for name in args.names if name not in benchmarks]
    if unknown:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(sorted(benchmarks))}")
    # Not without being asked for, where there is nothing that it could measure.
    args.names = args.names or [name for name in benchmarks if name != "gpu" or torch.cuda.is_available()]
    for kind in ("sections", "subjects"):
        for name in args.names:
            if getattr(args, kind) and not choose(getattr(args, kind), getattr(benchmarks[name], kind)):
                parser.error(
                    f"--{kind} leaves nothing of {name}, which has {', '.join(getattr(benchmarks[name], kind))}"
                )
        known = {entry for name in args.names for entry in getattr(benchmarks[name], kind)}
        unknown = [entry for entry in getattr(args, kind) if entry not in known]
        if unknown:
            parser.error(f"--{kind} {' '.join(unknown)}: there are {', '.join(sorted(known))}")
    return args


def choose(chosen: list[str], available: Iterable[str]) -> tuple[str, ...]:
    """Those of `available` that are chosen, in their own order; all of them if the choice is empty."""
    return tuple(name for name in available if not chosen or name in chosen)


def run_benchmark(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Run it, print its tables as they come, and write the JSON file."""
    settings = Settings(
        sections=choose(args.sections, benchmark.sections),
        subjects=choose(args.subjects, benchmark.subjects),
        repeats=args.repeats or benchmark.repeats,
        **{option.name: getattr(args, option.name) for option in fields(Settings) if option.metadata},
    )
    started = time.perf_counter()
    tables = []
    print(f"## {benchmark.name}\n\n{benchmark.description}\n", flush=True)
    for table in benchmark.run(settings):
        tables.append(table)
        print(table.markdown(), flush=True)
    part = settings.sections if settings.sections != tuple(benchmark.sections) else ()
    path = args.output_dir / f"{'-'.join([benchmark.name, *part])}.json"
    write_results(path, vars(settings), tables, seconds=time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> None:
    benchmarks = load_benchmarks()
    args = parse_args(benchmarks, arguments)
    if args.list:
        for name, entry in benchmarks.items():
            print(f"{name}: {entry.description}")
            print(f"  sections: {' '.join(entry.sections)}\n  subjects: {' '.join(entry.subjects)}")
            print(f"  repeats:  {entry.repeats}")
        return
    torch.set_num_threads(args.threads)
    for name in args.names:
        run_benchmark(benchmarks[name], args)


if __name__ == "__main__":
    main()
