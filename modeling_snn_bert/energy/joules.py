"""Joules that a computation takes on this machine, read from the counters of the processor (RAPL) and the GPU (NVML).

Linux shows the counters of Intel's and AMD's processors in `/sys/class/powercap` (Running Average Power Limit, RAPL):
one for each package and, on some machines, one for its memory. They count everything that runs there, so a computation
is measured beside an idle machine, and the machine must have nothing else to do.
"""

import copy
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import BertModel

from ..conversion import bert_config
from ..modeling_snn_bert import SNNBertPreTrainedModel

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """A counter of energy. `name` says of what."""

    name: str

    def read(self) -> float:
        """Joules since some fixed moment."""


class RaplCounter:
    """A RAPL domain, such as `package-0` or `package-0 dram`.

    Args:
        folder: the domain's folder, such as `/sys/class/powercap/intel-rapl:0`.
        name: how to call it.

    Raises:
        PermissionError: if this user may not read it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.span = int((folder / "max_energy_range_uj").read_text())
        self.wraps, self.last = 0, 0
        self.read()

    def read(self) -> float:
        # The counter starts over at its span, after minutes under full load: it must be read more often than that.
        now = int((self.folder / "energy_uj").read_text())
        self.wraps += now < self.last
        self.last = now
        return (self.wraps * self.span + now) / 1e6


class NvmlCounter:
    """The energy of one NVIDIA GPU since the driver was loaded (Volta or newer).

    Args:
        nvml: the module `pynvml`, initialised.
        index: which GPU.
    """

    def __init__(self, nvml, index: int) -> None:
        self.nvml = nvml
        self.device = nvml.nvmlDeviceGetHandleByIndex(index)
        self.name = f"GPU {index}"
        self.read()

    def read(self) -> float:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device) / 1e3


def find_counters(device: str = "cpu", powercap: Path = POWERCAP) -> list[Counter]:
    """The counters of energy of this machine for a computation on `device`.

    Args:
        device: `"cpu"`, or `"cuda"` for the processor and its GPUs.
        powercap: the folder in which Linux shows the domains of RAPL.

    Raises:
        RuntimeError: if there is none that can be read; it says why, and what would help.
    """
    found: list[Counter] = []
    reasons = []
    try:
        found += _rapl_counters(powercap)
    except PermissionError as error:
        reasons.append(
            f"{error.filename} may not be read by this user: run as root, or `sudo chmod -R a+r {powercap}/*rapl*/`"
        )
    else:
        if not found:
            reasons.append(
                f"{powercap} shows no RAPL counters, by which Linux tells the joules of a processor of Intel or AMD: "
                "virtual machines and containers mostly have none, so run on the machine itself"
            )
    if torch.device(device).type == "cuda":
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            found += [NvmlCounter(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        except Exception as error:
            reasons.append(f"NVML gives no energy of the GPU ({error}): `pip install nvidia-ml-py`, Volta or newer")
    if not found:
        raise RuntimeError(f"energy cannot be measured on this machine: {'; '.join(reasons)}")
    return found


def _rapl_counters(powercap: Path) -> list[Counter]:
    """Packages and their memory; not their cores, which are part of the package, nor `psys`, which holds the rest."""
    counters: list[Counter] = []
    for package in sorted(powercap.glob("*-rapl:[0-9]*")):
        if package.name.count(":") != 1 or not (name := (package / "name").read_text().strip()).startswith("package"):
            continue
        counters.append(RaplCounter(package, name))
        for part in sorted(package.glob(f"{package.name}:*")):
            if (part / "name").read_text().strip() == "dram":
                counters.append(RaplCounter(part, f"{name} dram"))
    return counters


@dataclass
class MeasuredEnergy:
    """What one computation took, as medians over the rounds.

    Attributes:
        joules: of one run, by the name of the counter; everything that the machine took meanwhile.
        above_idle: the same less what the idle machine takes in that time.
        seconds: of one run.
        rounds: how many rounds were measured.
    """

    joules: dict[str, float]
    above_idle: dict[str, float]
    seconds: float
    rounds: int

    def divided_by(self, parts: int) -> "MeasuredEnergy":
        """What one of `parts` equal parts of the computation took."""
        joules, above_idle = ({c: x / parts for c, x in of.items()} for of in (self.joules, self.above_idle))
        return MeasuredEnergy(joules, above_idle, self.seconds / parts, self.rounds)


def measure_joules(
    runs: Mapping[str, Callable[[], object]],
    counters: Sequence[Counter],
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, MeasuredEnergy]:
    """Joules of each of `runs`, measured in turn so that a machine that grows warm or busy meets all of them.

    A round lets the machine idle for `seconds` and then repeats each run for as long. Each run is called once before,
    which is not measured.

    Args:
        runs: what to measure, by name; each waits for what it started on a GPU.
        counters: from `find_counters`.
        seconds: of idling and of each run in a round. The counters of a processor move about a thousand times a second.
        rounds: how often.
        sleep: lets the machine idle.

    Raises:
        RuntimeError: if a counter stands still while a run is at work, as some virtual machines' do.
    """

    def watch(run: Callable[[], object]) -> tuple[float, dict[str, float]]:
        """Seconds and joules of one of the repetitions of `run` that fill `seconds`."""
        before, started, repetitions = {c.name: c.read() for c in counters}, time.perf_counter(), 0
        while not repetitions or time.perf_counter() < started + seconds:
            run()
            repetitions += 1
        elapsed = time.perf_counter() - started
        return elapsed / repetitions, {c.name: (c.read() - before[c.name]) / repetitions for c in counters}

    for run in runs.values():
        run()
    samples: dict[str, list[tuple[float, dict[str, float], dict[str, float]]]] = {name: [] for name in runs}
    for _ in range(rounds):
        idle_seconds, idle_joules = watch(functools.partial(sleep, seconds))
        for name, run in runs.items():
            time_of_one, each = watch(run)
            for counter, value in each.items():
                if not value > 0:
                    raise RuntimeError(f"energy cannot be measured on this machine: the counter {counter} stands still")
            above = {c: value - idle_joules[c] / idle_seconds * time_of_one for c, value in each.items()}
            samples[name].append((time_of_one, each, above))
    return {
        name: MeasuredEnergy(
            joules={c.name: statistics.median(each[c.name] for _, each, _ in rows) for c in counters},
            above_idle={c.name: statistics.median(above[c.name] for _, _, above in rows) for c in counters},
            seconds=statistics.median(time_of_one for time_of_one, _, _ in rows),
            rounds=rounds,
        )
        for name, rows in samples.items()
    }


def measured_energy(
    model: SNNBertPreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    counters: Sequence[Counter] | None = None,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
) -> dict[str, MeasuredEnergy]:
    """Joules of a mean sequence of `batches`: of the SNN-BERT, and of a float32 BERT of its shape.

    On a CPU also of the SNN-BERT event-driven with int8 weights. The BERT has random weights, on which its energy does
    not depend. The machine should have nothing else to do.

    Args:
        model: an SNN-BERT with any head; its encoder is measured, in evaluation mode and on its device.
        batches: what the tokenizer returns, see `measure_spikes`.
        counters: default: `find_counters` of the model's device.
        seconds, rounds: as for `measure_joules`.

    Raises:
        RuntimeError: if the machine has no counter of energy that can be read; it says why.
        ValueError: if `batches` is empty.
    """
    if not batches:
        raise ValueError("`batches` must hold at least one batch")
    device = model.device
    counters = find_counters(device.type) if counters is None else counters
    encoder = copy.deepcopy(model.base_model).eval()
    models: dict[str, torch.nn.Module] = {"SNN-BERT": encoder}
    if device.type == "cpu":
        models["SNN-BERT, event-driven, int8 weights"] = copy.deepcopy(encoder).to_event_driven("int8")
    models["BERT, float32"] = BertModel(bert_config(model.config)).to(device).eval()
    # The choices of multiple choice are sequences like any other.
    inputs = [{k: x.flatten(0, -2).to(device) for k, x in batch.items()} for batch in batches]
    sequences = sum(len(batch["input_ids"]) for batch in inputs)

    def run(one: torch.nn.Module) -> None:
        with torch.inference_mode():
            for batch in inputs:
                one(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = {name: functools.partial(run, one) for name, one in models.items()}
    measured = measure_joules(runs, counters, seconds=seconds, rounds=rounds)
    return {name: energy.divided_by(sequences) for name, energy in measured.items()}
