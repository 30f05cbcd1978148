"""How the benchmarks measure: interleaved repeats, medians of ratios, exact peaks of memory, fresh processes."""

import ctypes
import datetime
import gc
import hashlib
import importlib
import multiprocessing
import os
import platform
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel

import modeling_snn_bert
from modeling_snn_bert import cpu_kernels, event_driven, seeds

Result = TypeVar("Result")
# A sample shorter than this is repeated inside one measurement, so that the clock and the scheduler matter less.
MIN_SAMPLE_SECONDS = 0.02
# The name of this setting in the GNU C library's malloc.h.
M_MMAP_THRESHOLD = -3
# Environment variables that change how fast things are or how much memory they take.
ENVIRONMENT_PREFIXES = ("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "LD_PRELOAD", "TORCH", "SNN_BERT_", "ATEN_")


def wall_seconds(call: Callable[[], object], times: int) -> float:
    """Seconds per call of `times` calls in a row, by the clock on the wall and without a collection of garbage."""
    gc.collect()
    return timeit.timeit(call, number=times) / times


def interleaved_seconds(
    subjects: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object], int], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds per call of each subject, one sample per round.

    In every round each subject is measured once, so that whatever slows the machine down for a while hits all of
    them; the order rotates from round to round. A subject whose call is short is called several times per sample.

    Raises:
        ValueError: if `repeats` or `warmup` is below 1 or there is no subject.
    """
    if repeats < 1 or warmup < 1 or not subjects:
        raise ValueError(f"`repeats` and `warmup` must be >= 1 and `subjects` not empty, got {repeats}, {warmup}")
    calls = {}
    for name, call in subjects.items():
        for _ in range(warmup):
            seconds = clock(call, 1)
        calls[name] = max(1, round(MIN_SAMPLE_SECONDS / seconds))
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for round_number in range(repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock(subjects[name], calls[name]))
    return samples


def spread(samples: list[float], scale: float = 1.0) -> dict[str, Any]:
    """Median, quartiles and number of `samples`, and the samples themselves, all times `scale`."""
    scaled = [scale * sample for sample in samples]
    q1, median, q3 = statistics.quantiles(scaled, n=4, method="inclusive") if len(scaled) > 1 else scaled * 3
    return {"median": median, "q1": q1, "q3": q3, "repeats": len(scaled), "samples": scaled}


def ratio(samples: dict[str, list[float]], numerator: str, denominator: str) -> dict[str, Any]:
    """Spread of the ratio of two subjects' samples, taken round by round."""
    return spread([a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)])


def speeds(samples: dict[str, list[float]], name: str, reference: str) -> dict[str, Any]:
    """The cells of the subject `name`: its milliseconds, and how many times its time the subject `reference` takes."""
    faster = ratio(samples, reference, name) if reference in samples else None
    return {"milliseconds": spread(samples[name], 1e3), "reference_over_subject": faster}


def check_firing_rate(name: str, rate: float) -> float:
    """`rate` itself.

    Raises:
        RuntimeError: unless it lies strictly between 0 and 1; what never or always fires is no subject to measure.
    """
    if not 0 < rate < 1:
        raise RuntimeError(f"{name} has the firing rate {rate}: it is dead or saturated, so its figures mean nothing")
    return rate


@torch.no_grad()
def mean_firing_rate(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> float | None:
    """Mean over the neuron layers of `model` of the rate on `inputs`; `None` for a model without neurons.

    Raises:
        RuntimeError: if a layer is dead or saturated.
    """
    if not hasattr(model, "neuron_names"):
        return None
    rates = model(**inputs, output_firing_rates=True).firing_rates
    named = zip(model.neuron_names(), rates, strict=True)
    return statistics.fmean(check_firing_rate(name, rate.mean().item()) for name, rate in named)


def in_fresh_process(function: Callable[..., Result], threads: int, *arguments: Any) -> Result:
    """The result of `function(*arguments)` in a new Python process with `threads` threads.

    Raises:
        RuntimeError: if the process dies, as it does when the machine runs out of memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process that measured {arguments} died; out of memory?") from error


@contextmanager
def without_kernels() -> Iterator[None]:
    """A context in which the library behaves as if it had been installed without a compiler."""
    without_library = mock.patch.object(cpu_kernels, "_LIBRARY", None)
    with without_library, mock.patch.object(event_driven, "available", lambda: False):
        yield


def onnx_session(path: Path) -> Any:
    """ONNX Runtime on the model in `path`, on the CPU, with as many threads as torch has.

    Raises:
        ImportError: if onnxruntime is not installed.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def quantized_onnx(source: Path, target: Path) -> Path:
    """`target`, which is the ONNX model `source` with weights in int8 and activations that are rounded as they come.

    Raises:
        ImportError: if onnxruntime or onnx is not installed.
    """
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QInt8)
    return target


def peak_allocated_bytes(call: Callable[[], object]) -> int:
    """The most bytes that tensors held at one moment of `call()`, less those that they held before it.

    Exact: adds up every allocation and release that PyTorch's CPU allocator reports to the profiler, which includes
    what an operator allocates inside.
    """
    gc.collect()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at the highest point of `call()`, as the kernel counts it.

    A cross-check of `peak_allocated_bytes` that also sees what other allocators take. `None` where it cannot be had:
    it needs Linux and the GNU C library.
    """
    gc.collect()
    try:
        c_library = ctypes.CDLL(None)
        # From now on a block of this size or more goes back to the kernel when it is freed, so that what is resident
        # is what is in use; and what was kept from earlier, which would be used again unseen, goes back too.
        c_library.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
        c_library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def environment(threads: int, seed: int) -> dict[str, Any]:
    """What the figures depend on: versions, processor, threads, seed, date."""
    return {
        **seeds.environment(torch.device("cpu")),
        "snn_bert_sources": sources_digest(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_level": cpu_kernels.cpu_level(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": physical_memory(),
        "threads": threads,
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT_PREFIXES)},
    }


def sources_digest() -> str:
    """The first digits of a hash of the library's sources, which tells two states of one version apart."""
    digest = hashlib.sha256()
    for path in sorted(Path(modeling_snn_bert.__file__).parent.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """The processor's name as the operating system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
