"""The neuron and the model on a GPU, and the floors that memory sets.

Sections that measure need a CUDA device. The section `floors` only calculates, so it runs anywhere.

`profile` takes a training step apart: wall time, the time that the GPU is busy, the time that the host takes to launch
it all, and the kernels that take longest. `tiles` compares sizes of the neuron's programs.

Bytes that must move are those of the arguments and results of an operator, each once, in bfloat16: forward, the
current in, the spikes out as floats and as bits; backward, the current and the gradient in, the gradient out. The floor
is their time at the device's bandwidth.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from measure import interleaved_seconds, speeds, spread, wall_seconds
from neuron import GROUPS, Pass, Subject
from registry import Benchmark, Section, Settings
from report import Table
from torch.profiler import ProfilerActivity
from training import COMPILED, LARGE, MASKED_LM, MIB, QUICK, Shape, TrainingStep, compiled, model_config
from transformers import AutoModel

from modeling_snn_bert import BPSN, bpsn_triton

HIDDEN = 768
# Rows times tokens are constant: [batch, tokens] from 256 x 128 to 1 x 32,768.
LENGTHS = (128, 512, 2048, 4096, 8192, 32768)
TOKENS = 32768
# Where launches count more than bytes.
SMALL = Shape(6, 384, 1536, 12, 64, 64)
INFERENCE_BATCHES = (1, 32, 256)
# Steps under the profiler, and the number of kernels that its table names.
PROFILED_STEPS = 5
LARGEST = 15
COPY = "copy"
# A subject whose name ends so is replayed from a CUDA graph.
GRAPH = " in a graph"


class NeuronShape(NamedTuple):
    """Currents `[batch, length, channels]`."""

    batch: int
    length: int
    channels: int

    @property
    def elements(self) -> int:
        return self.batch * self.length * self.channels

    def forward_bytes(self) -> float:
        """Bytes that must move from currents to binary spikes, floats and bits."""
        return self.elements * (2 + 2 + 1 / 8)

    def backward_bytes(self) -> float:
        """Bytes that must move from the gradient of the spikes to that of the currents."""
        return self.elements * (2 + 2 + 2)


def neuron_shapes(settings: Settings) -> list[NeuronShape]:
    """The shapes of the tables: one batch size a length, at a constant number of tokens."""
    if settings.quick:
        return [NeuronShape(2, 16, 48), NeuronShape(1, 32, 48)]
    lengths = chosen_lengths(settings)
    return [NeuronShape(TOKENS // length, length, channels) for length in lengths for channels in (HIDDEN, 4 * HIDDEN)]


def chosen_lengths(settings: Settings) -> list[int]:
    """Those of `LENGTHS` that `--lengths` leaves; ends the program with one line if it asks for others."""
    known = (SMALL.length, *LENGTHS)
    if not set(settings.lengths) <= set(known):
        raise SystemExit(f"--lengths must be of {', '.join(map(str, known))}; got {list(settings.lengths)}")
    return [length for length in LENGTHS if not settings.lengths or length in settings.lengths]


def floors(settings: Settings) -> Iterator[Table]:
    """The time that memory allows the neuron, at a nominal bandwidth; nothing is measured."""
    table = Table(
        f"Floors of one neuron layer, bfloat16, at {settings.bandwidth / 1e12:g} TB/s",
        {
            "shape": "[batch, tokens, channels]",
            "forward_megabytes": "forward, MB",
            "forward_microseconds": "us",
            "backward_megabytes": "backward, MB",
            "backward_microseconds": "us",
        },
        notes=["Calculated, not measured. The bandwidth is nominal (`--bandwidth`); no copy reaches it."],
    )
    for shape in neuron_shapes(settings):
        row: dict[str, Any] = {"shape": list(shape)}
        for name, moved in (("forward", shape.forward_bytes()), ("backward", shape.backward_bytes())):
            row |= {f"{name}_megabytes": moved / 1e6, f"{name}_microseconds": 1e6 * moved / settings.bandwidth}
        table.rows.append(row)
    yield table


def on_gpu(section: Section, settings: Settings) -> Iterator[Table]:
    """The tables of a section that measures, which name the GPU; ends the program with one line unless there is one."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"the section `{section.__name__}` of the benchmark `gpu` needs a CUDA device, and torch sees none; "
            "`--sections floors` runs anywhere"
        )
    for table in section(settings):
        table.title += f", on {torch.cuda.get_device_name()}"
        yield table


def gpu_clock(call: Callable[[], object], times: int) -> float:
    """Seconds per call by the GPU's own clock, of `times` calls in a row.

    So the time to launch one hides behind the one before, as in a model.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


gpu_seconds = partial(interleaved_seconds, warmup=3, clock=gpu_clock)


def neuron_pass(implementation: str, shape: NeuronShape, seed: int) -> Pass:
    """A call runs a layer of BPSN in bfloat16, forward and backward."""
    subject = Subject(lambda tokens, channels: BPSN(channels, GROUPS, implementation=implementation))
    return Pass(subject, shape, seed, "cuda", torch.bfloat16)


def neuron(settings: Settings) -> Iterator[Table]:
    """The neuron's bandwidth against a copy's, kernels and scans."""
    for shape in neuron_shapes(settings):
        passes = {name: neuron_pass(name, shape, settings.seed) for name in ("auto", "chunked")}
        source = passes["auto"].current.detach()
        calls: dict[str, Callable[[], object]] = {COPY: partial(torch.empty_like(source).copy_, source)}
        moved = {COPY: 4.0 * shape.elements}
        for name, both in passes.items():
            calls |= {f"{name} forward": both.forward, f"{name} forward + backward": both}
            moved[f"{name} forward"] = shape.forward_bytes()
            moved[f"{name} forward + backward"] = shape.forward_bytes() + shape.backward_bytes()
        samples = gpu_seconds(calls, settings.repeats)
        table = Table(
            f"One neuron layer, bfloat16, {list(shape)}",
            {
                "subject": "subject",
                "microseconds": "us",
                "gigabytes_per_second": "bytes that must move, GB/s",
                "share_of_copy": "share of the copy's bandwidth",
                "firing_rate": "firing rate",
            },
            notes=["`auto` is the Triton kernel where triton is there, `chunked` the same by torch's operations."],
        )
        for name, times in samples.items():
            share = moved[name] / moved[COPY]
            table.rows.append(
                {
                    "subject": name,
                    "shape": list(shape),
                    "microseconds": spread(times, 1e6),
                    "gigabytes_per_second": moved[name] / statistics.median(times) / 1e9,
                    "share_of_copy": spread([share * c / t for t, c in zip(times, samples[COPY], strict=True)]),
                    "firing_rate": None if name == COPY else passes[name.split()[0]].firing_rate(),
                }
            )
        yield table


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a step holds above what it starts from: weights, gradients and optimiser state."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def training_shapes(settings: Settings) -> list[Shape]:
    """The shape that the targets are for, longer sequences of as many tokens, and `SMALL`."""
    if settings.quick:
        return [QUICK]
    shapes = [LARGE._replace(batch_size=TOKENS // length, length=length) for length in chosen_lengths(settings)]
    return shapes + ([SMALL] if not settings.lengths or SMALL.length in settings.lengths else [])


def inference_shapes(settings: Settings) -> list[Shape]:
    """Both sizes at a few batch sizes of the first length, and the larger one at longer sequences."""
    if settings.quick:
        return [QUICK]
    shapes = []
    for length in chosen_lengths(settings):
        first = length == LENGTHS[0]
        sizes, batches = ((LARGE, SMALL), INFERENCE_BATCHES) if first else ((LARGE,), (TOKENS // length,))
        shapes += [size._replace(batch_size=batch, length=length) for size in sizes for batch in batches]
    return shapes


def in_graph(call: Callable[[], object]) -> Callable[[], object]:
    """A call of the result replays what a call of `call` does on the GPU, from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def made(make: Callable[..., Callable[[], object]], subject: str, shape: Shape, seed: int) -> Callable[[], object]:
    """What `make(subject, shape, seed)` returns, replayed from a CUDA graph if the name of the subject says so."""
    call = make(subject.removesuffix(GRAPH), shape, seed)
    return in_graph(call) if subject.endswith(GRAPH) else call


# A call is a training step in bfloat16 autocast: forward, loss, backward, fused AdamW.
GPUStep = partial(TrainingStep, device="cuda")


class Inference:
    """A call is a forward pass of the encoder of `subject` in bfloat16."""

    def __init__(self, subject: str, shape: Shape, seed: int) -> None:
        torch.manual_seed(seed)
        config = model_config(subject, shape)
        model = AutoModel.from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
        self.model: Callable[..., object] = model.to("cuda", torch.bfloat16).eval()
        if subject.endswith(COMPILED):
            self.model = compiled(model)
        self.input_ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.length), device="cuda")

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(input_ids=self.input_ids)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def measure_one(
    make: Callable[..., Callable[[], object]], name: str, shape: Shape, settings: Settings, memory: bool
) -> tuple[list[float], int | None]:
    """Times and peak of one subject, which is gone from the GPU afterwards."""
    call = made(make, name, shape, settings.seed)
    return gpu_seconds({name: call}, settings.repeats)[name], peak_bytes(call) if memory else None


def model_table(
    title: str,
    make: Callable[..., Callable[[], object]],
    shape: Shape,
    settings: Settings,
    *,
    variant: str = "plain",
    memory: bool = True,
) -> Table:
    """Times and, if wanted, peaks of all subjects, and the ratios to theirs of the first one's, run in the same way.

    They are on the GPU one at a time, so their rounds are not interleaved: side by side such large ones do not fit.
    """
    times: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name in settings.subjects:
        with suppress(torch.cuda.OutOfMemoryError):
            times[name], peaks[name] = measure_one(make, name, shape, settings, memory)
        # What did not fit is let go of here, outside the handler that holds on to it.
        free_memory()
    first = settings.subjects[0]
    table = Table(
        f"{title}, {shape}",
        {
            "subject": "model",
            "milliseconds": "ms",
            "reference_over_subject": f"{first} / model",
            "mebibytes": "peak above state, MiB",
            "memory_reference_over_subject": f"memory, {first} / model",
        },
        notes=[
            "What is compiled, or replayed from a CUDA graph, is compared with its like.",
            "A dash stands for what did not fit into the GPU's memory, or was not measured.",
        ],
    )
    for name in settings.subjects:
        row: dict[str, Any] = {"subject": name, "variant": variant, "shape": shape._asdict()}
        if name in times:
            way = next((way for way in (GRAPH, COMPILED) if name.endswith(way)), "")
            reference = first.removesuffix(way) + way
            row |= speeds(times, name, reference)
            if peak := peaks[name]:
                row["mebibytes"] = peak / MIB
                if at_reference := peaks.get(reference):
                    row["memory_reference_over_subject"] = at_reference / peak
        table.rows.append(row)
    return table


def training(settings: Settings) -> Iterator[Table]:
    """Time and peak memory of a training step, compiled and not."""
    for shape in training_shapes(settings):
        yield model_table("Training step, bfloat16 autocast", GPUStep, shape, settings)


def masked_lm(settings: Settings) -> Iterator[Table]:
    """The same of masked language modelling, at the first shape."""
    make = partial(GPUStep, variant=MASKED_LM)
    title = "Training step, masked LM, bfloat16 autocast"
    yield model_table(title, make, training_shapes(settings)[0], settings, variant=MASKED_LM)


def inference(settings: Settings) -> Iterator[Table]:
    """Time of a forward pass, compiled and not."""
    for shape in inference_shapes(settings):
        yield model_table("Forward pass, bfloat16", Inference, shape, settings, memory=False)


class KernelRun(NamedTuple):
    """One run of a kernel on the GPU, in nanoseconds."""

    name: str
    start: int
    end: int


def busy_nanoseconds(runs: Iterable[KernelRun]) -> int:
    """The time in which at least one kernel runs."""
    busy, until = 0, 0
    for run in sorted(runs, key=lambda run: run.start):
        busy += max(0, run.end - max(run.start, until))
        until = max(until, run.end)
    return busy


def largest_kernels(runs: list[KernelRun], steps: int, number: int = LARGEST) -> list[dict]:
    """Launches and milliseconds a step, and share of all kernels' time, of the kernels that take longest."""
    times: dict[str, list[int]] = {}
    for run in runs:
        times.setdefault(run.name, []).append(run.end - run.start)
    in_all = sum(map(sum, times.values()))
    order = sorted(times, key=lambda name: sum(times[name]), reverse=True)
    return [
        {
            "kernel": name,
            "launches": len(times[name]) / steps,
            "milliseconds": sum(times[name]) / steps / 1e6,
            "share": sum(times[name]) / in_all,
        }
        for name in order[:number]
    ]


def kernel_runs(call: Callable[[], object], steps: int) -> list[KernelRun]:
    """What runs on the GPU, copies included, in `steps` calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    # Compiled code marks the stretches of its graphs, which are no kernels.
    return [
        KernelRun(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith("## ")
    ]


def host_seconds(call: Callable[[], object]) -> float:
    """What the host takes to launch a call on an idle GPU."""
    torch.cuda.synchronize()
    seconds = wall_seconds(call, 1)
    torch.cuda.synchronize()
    return seconds


def profile(settings: Settings) -> Iterator[Table]:
    """A training step taken apart: wall, GPU and host time of each subject, and its largest kernels."""
    clocked = {}
    # All of it first: after a profiler every launch takes longer.
    for shape in training_shapes(settings):
        for subject in settings.subjects:
            step = made(GPUStep, subject, shape, settings.seed)
            wall = gpu_seconds({subject: step}, settings.repeats)[subject]
            clocked[shape, subject] = wall, [host_seconds(step) for _ in range(settings.repeats)]
            del step
            free_memory()
    for shape in training_shapes(settings):
        apart = Table(
            f"Training step taken apart, {shape}",
            {
                "subject": "model",
                "wall": "wall, ms",
                "busy": "GPU busy, ms",
                "host": "host, ms",
                "launches": "launches",
            },
            notes=[
                "Host: until all is launched, on an idle GPU. Where it is near the wall time, launches set the pace."
            ],
        )
        for subject in settings.subjects:
            step = made(GPUStep, subject, shape, settings.seed)
            step()
            wall, host = clocked[shape, subject]
            runs = kernel_runs(step, PROFILED_STEPS)
            apart.rows.append(
                {
                    "subject": subject,
                    "shape": shape._asdict(),
                    "wall": spread(wall, 1e3),
                    "busy": busy_nanoseconds(runs) / PROFILED_STEPS / 1e6,
                    "host": spread(host, 1e3),
                    "launches": len(runs) / PROFILED_STEPS,
                }
            )
            title = f"The {LARGEST} largest kernels of {subject}, {shape}"
            columns = {"kernel": "kernel", "launches": "launches", "milliseconds": "ms a step", "share": "share"}
            yield Table(title, columns, largest_kernels(runs, PROFILED_STEPS))
            del step
            free_memory()
        for row in apart.rows:
            row["ratio"] = row["wall"]["median"] / apart.rows[-1]["wall"]["median"]
        yield apart


def tile_choices(length: int) -> list[tuple[int, int]]:
    """Channels and warps of a program: those that give a thread 16 to 64 numbers, and a row 32 bytes or more."""
    return [
        (block, warps)
        for block in (16, 32, 64)
        for warps in (1, 2, 4, 8, 16)
        if 16 <= length * block / (32 * warps) <= 64
    ]


@contextmanager
def using_tile(length: int, tile: tuple[int, int]) -> Iterator[None]:
    """Within it, both kernels of the neuron have programs of that size for rows of `length` tokens."""
    forward, backward = bpsn_triton.FORWARD_TILES, bpsn_triton.BACKWARD_TILES
    with mock.patch.dict(forward, {length: tile}), mock.patch.dict(backward, {length: tile}):
        yield


def tiles(settings: Settings) -> Iterator[Table]:
    """The neuron with programs of other sizes; the best line of each length belongs into `bpsn_triton`."""
    lengths = [32] if settings.quick else [length for length in bpsn_triton.FORWARD_TILES if length >= 64]
    for length in lengths:
        shape = NeuronShape(2, 32, 96) if settings.quick else NeuronShape(TOKENS // length, length, HIDDEN)
        both = neuron_pass("auto", shape, settings.seed)
        columns = {"tile": "[channels, warps]", "forward": "forward, us", "both": "forward + backward, us"}
        title = f"Sizes of the neuron's programs, bfloat16, {list(shape)}"
        now = [list(table[length]) for table in (bpsn_triton.FORWARD_TILES, bpsn_triton.BACKWARD_TILES)]
        table = Table(title, columns, notes=[f"In use: {now[0]} forward, {now[1]} backward."])
        for tile in tile_choices(length):
            with using_tile(length, tile):
                times = gpu_seconds({"forward": both.forward, "both": both}, settings.repeats)
            rows = {name: spread(samples, 1e6) for name, samples in times.items()}
            table.rows.append({"tile": list(tile), "shape": list(shape), **rows})
        yield table


MEASURED = (neuron, tiles, training, profile, masked_lm, inference)
BENCHMARK = Benchmark(
    "gpu",
    "The neuron and the model on a GPU, and the floors that memory sets.",
    {"floors": floors, **{section.__name__: partial(on_gpu, section) for section in MEASURED}},
    (*(f"{subject}{way}" for way in ("", GRAPH, COMPILED) for subject in ("snn_bert", "bert")), "lif_repeat4"),
    repeats=15,
)
