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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from measure import check_firing_rate, ratio, spread
from registry import Settings, benchmark
from report import Table
from torch import nn
from torch.profiler import ProfilerActivity
from training import LEARNING_RATE, MASKED_LM, MIB, QUICK, Classifier, MaskedLM, Shape, masked_labels, model_config
from transformers import AutoModel

from modeling_snn_bert import BPSN, bpsn_triton

GROUPS = 12
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
COMPILED = " compiled"


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
        "floors",
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
        forward, backward = shape.forward_bytes(), shape.backward_bytes()
        table.rows.append(
            {
                "shape": list(shape),
                "forward_megabytes": forward / 1e6,
                "forward_microseconds": 1e6 * forward / settings.bandwidth,
                "backward_megabytes": backward / 1e6,
                "backward_microseconds": 1e6 * backward / settings.bandwidth,
            }
        )
    yield table


def check_cuda(section: str) -> None:
    """End the program with one line unless there is a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"the section `{section}` of the benchmark `gpu` needs a CUDA device, and torch sees none; "
            "`--sections floors` runs anywhere"
        )


def gpu_seconds(subjects: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds per call on the GPU's own clock, in rounds in which each subject is measured once.

    A sample is several calls in a row, so that the time to launch one hides behind the one before, as in a model.
    """
    calls = {}
    for name, call in subjects.items():
        for _ in range(3):
            call()
        calls[name] = max(1, round(0.01 / max(_gpu_sample(call, 3), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for round_number in range(repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_gpu_sample(subjects[name], calls[name]))
    return samples


def _gpu_sample(call: Callable[[], object], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


@torch.no_grad()
def run_forward(layer: nn.Module, current: torch.Tensor) -> torch.Tensor:
    """The spikes, with nothing kept for a backward pass."""
    return layer(current)


def run_both(layer: nn.Module, current: torch.Tensor, gradient: torch.Tensor) -> None:
    """Forward and backward, to the currents and to every parameter."""
    torch.autograd.grad(layer(current), [current, *layer.parameters()], gradient)


def neuron(settings: Settings) -> Iterator[Table]:
    """The neuron's bandwidth against a copy's, kernels and scans."""
    check_cuda("neuron")
    for shape in neuron_shapes(settings):
        torch.manual_seed(settings.seed)
        current = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient, target = torch.randn_like(current), torch.empty_like(current)
        layers = {name: BPSN(shape.channels, GROUPS, implementation=name).cuda() for name in ("auto", "chunked")}

        calls: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, current.detach())}
        for name, layer in layers.items():
            calls[f"{name} forward"] = partial(run_forward, layer, current)
            calls[f"{name} forward + backward"] = partial(run_both, layer, current, gradient)
        samples = gpu_seconds(calls, settings.repeats)
        copied = 4.0 * shape.elements
        table = Table(
            "neuron",
            f"One neuron layer, bfloat16, {list(shape)}, on {torch.cuda.get_device_name()}",
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
            moved = copied
            if name != COPY:
                moved = shape.forward_bytes() + (shape.backward_bytes() if "backward" in name else 0)
            copy_share = [moved / t / (copied / c) for t, c in zip(times, samples[COPY], strict=True)]
            rate = None
            if name != COPY:
                spikes = run_forward(layers[name.split()[0]], current)
                rate = check_firing_rate(name, spikes.count_nonzero().item() / spikes.numel())
            table.rows.append(
                {
                    "subject": name,
                    "shape": list(shape),
                    "microseconds": spread(times, 1e6),
                    "gigabytes_per_second": moved / statistics.median(times) / 1e9,
                    "share_of_copy": spread(copy_share),
                    "firing_rate": rate,
                }
            )
        yield table


class GPUStep:
    """A call is a training step of `subject` in bfloat16 autocast: forward, loss, backward, fused AdamW."""

    network: type[Classifier | MaskedLM] = Classifier

    def __init__(self, subject: str, shape: Shape, seed: int) -> None:
        torch.manual_seed(seed)
        network = self.network(model_config(subject.removesuffix(COMPILED), shape)).cuda().train()
        self.model: Callable[..., torch.Tensor] = network
        if subject.endswith(COMPILED):
            torch.compiler.reset()
            self.model = torch.compile(network)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
        self.input_ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.length), device="cuda")
        if self.network is MaskedLM:
            self.labels = masked_labels(self.input_ids)
        else:
            self.labels = torch.randint(2, (shape.batch_size,), device="cuda")

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self.input_ids, self.labels)
        loss.backward()
        self.optimizer.step()

    def peak_bytes(self) -> int:
        """The most that a step holds above what it starts from: weights, gradients and optimiser state."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class GPUMaskedLMStep(GPUStep):
    """The same with a masked-LM head."""

    network = MaskedLM


def training_shapes(settings: Settings) -> list[Shape]:
    """The shape that the targets are for, longer sequences of as many tokens, and `SMALL`."""
    if settings.quick:
        return [QUICK]
    shapes = [Shape(12, HIDDEN, 4 * HIDDEN, 12, TOKENS // length, length) for length in chosen_lengths(settings)]
    return shapes + ([SMALL] if not settings.lengths or SMALL.length in settings.lengths else [])


def inference_shapes(settings: Settings) -> list[Shape]:
    """Both sizes at a few batch sizes of the first length, and the larger one at longer sequences."""
    if settings.quick:
        return [QUICK]
    shapes = []
    for length in chosen_lengths(settings):
        large = Shape(12, HIDDEN, 4 * HIDDEN, 12, TOKENS // length, length)
        if length == LENGTHS[0]:
            sizes = (large, SMALL._replace(length=length))
            shapes += [size._replace(batch_size=batch) for size in sizes for batch in INFERENCE_BATCHES]
        else:
            shapes.append(large)
    return shapes


def measure_apart(
    kind: "type[GPUStep | GPUInference]", shape: Shape, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Times, and peaks of memory or `None`, of subjects that are on the GPU one at a time; who has no room is left out.

    Subjects so large do not fit side by side, so their rounds are not interleaved.
    """
    times: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name in settings.subjects:
        try:
            measured = measure_one(kind, name, shape, settings)
        except torch.cuda.OutOfMemoryError:
            measured = None
        # What did not fit is let go of here, outside the handler that holds on to it.
        gc.collect()
        torch.cuda.empty_cache()
        if measured is not None:
            times[name], peaks[name] = measured
    return times, peaks


def measure_one(
    kind: "type[GPUStep | GPUInference]", name: str, shape: Shape, settings: Settings
) -> tuple[list[float], int | None]:
    """Times and peak of one subject, which is gone from the GPU afterwards."""
    call = kind(name, shape, settings.seed)
    return gpu_seconds({name: call}, settings.repeats)[name], call.peak_bytes()


def model_table(
    section: str, title: str, shape: Shape, subjects: tuple[str, ...], times: dict, peaks: dict, variant: str = "plain"
) -> Table:
    """Times and peaks of all subjects, and the ratios of the first one's to theirs."""
    reference = subjects[0]
    table = Table(
        section,
        f"{title}, {shape}, on {torch.cuda.get_device_name()}",
        {
            "subject": "model",
            "milliseconds": "ms",
            "reference_over_subject": f"{reference} / model",
            "mebibytes": "peak above state, MiB",
            "memory_reference_over_subject": f"memory, {reference} / model",
        },
        notes=["A dash stands for what did not fit into the GPU's memory, or was not measured."],
    )
    for name in subjects:
        row: dict = {"subject": name, "variant": variant, "shape": shape._asdict()}
        if name in times:
            row["milliseconds"] = spread(times[name], 1e3)
            if peaks[name] is not None:
                row["mebibytes"] = peaks[name] / MIB
            if reference in times:
                row["reference_over_subject"] = ratio(times, reference, name)
                if peaks[name]:
                    row["memory_reference_over_subject"] = peaks[reference] / peaks[name]
        table.rows.append(row)
    return table


def training(settings: Settings) -> Iterator[Table]:
    """Time and peak memory of a training step, compiled and not."""
    check_cuda("training")
    for shape in training_shapes(settings):
        times, peaks = measure_apart(GPUStep, shape, settings)
        yield model_table("training", "Training step, bfloat16 autocast", shape, settings.subjects, times, peaks)


def masked_lm(settings: Settings) -> Iterator[Table]:
    """The same of masked language modelling, at the first shape."""
    check_cuda("masked_lm")
    shape = training_shapes(settings)[0]
    times, peaks = measure_apart(GPUMaskedLMStep, shape, settings)
    title = "Training step, masked LM, bfloat16 autocast"
    yield model_table("masked_lm", title, shape, settings.subjects, times, peaks, MASKED_LM)


class GPUInference:
    """A call is a forward pass of the encoder in bfloat16."""

    def __init__(self, subject: str, shape: Shape, seed: int) -> None:
        torch.manual_seed(seed)
        config = model_config(subject.removesuffix(COMPILED), shape)
        model = AutoModel.from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
        self.model: Callable[..., object] = model.to("cuda", torch.bfloat16).eval()
        if subject.endswith(COMPILED):
            torch.compiler.reset()
            self.model = torch.compile(self.model)
        self.input_ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.length), device="cuda")

    def peak_bytes(self) -> None:
        """`None`: the memory of a forward pass is not measured."""
        return None

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(input_ids=self.input_ids)


def inference(settings: Settings) -> Iterator[Table]:
    """Time of a forward pass, compiled and not."""
    check_cuda("inference")
    for shape in inference_shapes(settings):
        times, peaks = measure_apart(GPUInference, shape, settings)
        yield model_table("inference", "Forward pass, bfloat16", shape, settings.subjects, times, peaks)


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
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


def profile(settings: Settings) -> Iterator[Table]:
    """A training step taken apart: wall, GPU and host time of each subject, and its largest kernels."""
    check_cuda("profile")
    for shape in training_shapes(settings):
        apart = Table(
            "profile",
            f"Training step taken apart, {shape}, on {torch.cuda.get_device_name()}",
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
            step = GPUStep(subject, shape, settings.seed)
            wall = gpu_seconds({subject: step}, settings.repeats)[subject]
            host = [host_seconds(step) for _ in range(settings.repeats)]
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
            title = f"The {LARGEST} largest kernels of {subject}, {shape}, on {torch.cuda.get_device_name()}"
            columns = {"kernel": "kernel", "launches": "launches", "milliseconds": "ms a step", "share": "share"}
            yield Table("profile", title, columns, largest_kernels(runs, PROFILED_STEPS))
            del step
            gc.collect()
            torch.cuda.empty_cache()
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
    tables = bpsn_triton.FORWARD_TILES, bpsn_triton.BACKWARD_TILES
    before = [table[length] for table in tables]
    for table in tables:
        table[length] = tile
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table[length] = old


def tiles(settings: Settings) -> Iterator[Table]:
    """The neuron with programs of other sizes; the best line of each length belongs into `bpsn_triton`."""
    check_cuda("tiles")
    lengths = [32] if settings.quick else [length for length in bpsn_triton.FORWARD_TILES if length >= 64]
    for length in lengths:
        shape = NeuronShape(2, 32, 96) if settings.quick else NeuronShape(TOKENS // length, length, HIDDEN)
        current = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient, layer = torch.randn_like(current), BPSN(shape.channels, GROUPS).cuda()
        columns = {"tile": "[channels, warps]", "forward": "forward, us", "both": "forward + backward, us"}
        title = f"Sizes of the neuron's programs, bfloat16, {list(shape)}, on {torch.cuda.get_device_name()}"
        now = [list(table[length]) for table in (bpsn_triton.FORWARD_TILES, bpsn_triton.BACKWARD_TILES)]
        table = Table("tiles", title, columns, notes=[f"In use: {now[0]} forward, {now[1]} backward."])
        for tile in tile_choices(length):
            calls: dict[str, Callable[[], object]] = {
                "forward": partial(run_forward, layer, current),
                "both": partial(run_both, layer, current, gradient),
            }
            with using_tile(length, tile):
                times = gpu_seconds(calls, settings.repeats)
            rows = {name: spread(samples, 1e6) for name, samples in times.items()}
            table.rows.append({"tile": list(tile), "shape": list(shape), **rows})
        yield table


SECTIONS = {
    "floors": floors,
    "neuron": neuron,
    "tiles": tiles,
    "training": training,
    "profile": profile,
    "masked_lm": masked_lm,
    "inference": inference,
}
MODELS = ("snn_bert", "snn_bert compiled", "lif_repeat4", "bert", "bert compiled")


@benchmark("gpu", sections=tuple(SECTIONS), subjects=MODELS, repeats=15)
def gpu(settings: Settings) -> Iterator[Table]:
    """The neuron and the model on a GPU, and the floors that memory sets."""
    for section in settings.sections:
        if section != "floors":
            check_cuda(section)
    for section in settings.sections:
        yield from SECTIONS[section](settings)
