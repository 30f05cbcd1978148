"""One training step of SNN-BERT, of the repeat-4 LIF baseline and of transformers' BERT: time and memory.

A step is `zero_grad`, forward, loss, backward and a fused AdamW step, in training mode with BERT's dropout, on random
tokens without padding. All subjects have the same shape, dtype, vocabulary, attention kernel (sdpa), loss, and
transformers' head for sequence classification or masked language modelling, so embedding table, its gradient and its
optimiser state cost each the same.

Memory is measured in a process of its own, after one complete step. By then weights, gradients and optimiser state
are there and stay (`zero_grad(set_to_none=False)`). The peak is the most that forward and backward of the next step
hold above them: what is saved for the backward pass, and what comes and goes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import (
    in_fresh_process,
    interleaved_seconds,
    mean_firing_rate,
    peak_allocated_bytes,
    peak_resident_bytes,
    physical_memory,
    ratio,
    speeds,
    spread,
    without_kernels,
)
from registry import Benchmark, Settings
from report import Table
from torch import nn
from torch.profiler import ProfilerActivity
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_snn_bert import SNNBertConfig

# Small enough to leave the network, and with it the firing rates, as initialised.
LEARNING_RATE = 1e-6
# 12 x 768 fits into this much with the repeat-4 baseline and without it; a smaller machine gets fewer layers.
MEMORY_WITH_BASELINE = 40 * 2**30
MEMORY_WITHOUT_BASELINE = 16 * 2**30
LAYERS_OF_A_SMALL_MACHINE = 3
MIB = 2**20

BASELINE = "lif_repeat4"
TORCH_ONLY = "snn_bert_torch"
SUBJECTS: dict[str, Callable[..., PreTrainedConfig]] = {
    "snn_bert": SNNBertConfig,
    # The same with thresholds that fewer currents reach: a firing rate of about 0.09 in place of 0.19.
    "snn_bert_sparse": partial(SNNBertConfig, v_threshold=1.65),
    # As where there are no compiled kernels.
    TORCH_ONLY: SNNBertConfig,
    BASELINE: partial(SNNBertConfig, neuron_type="lif", coding="repeat", num_timesteps=4),
    "bert": BertConfig,
}
MAIN = ("snn_bert", BASELINE, "bert")
PAIR = ("snn_bert", "bert")
MASKED_LM = "masked LM"
VARIANTS = ("plain", "gradient checkpointing", "bfloat16 autocast", "torch.compile", MASKED_LM)
# A subject whose name ends so is compiled, whatever the variant.
COMPILED = " compiled"


class Shape(NamedTuple):
    """Size of the model and of the batch."""

    num_layers: int = 6
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_heads: int = 12
    batch_size: int = 16
    length: int = 128
    vocab_size: int = 30522

    def __str__(self) -> str:
        return f"{self.num_layers} layers x {self.hidden_size}, batch {self.batch_size}, {self.length} tokens"


LARGE = Shape(12, 768, 3072)
QUICK = Shape(2, 48, 96, 4, 2, 16, 200)


def model_config(subject: str, shape: Shape) -> PreTrainedConfig:
    """The configuration of a subject at a shape."""
    return SUBJECTS[subject.removesuffix(COMPILED)](
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=max(512, shape.length),
    )


def compiled(network: nn.Module) -> Callable[..., Any]:
    """`network` by `torch.compile`, which forgets what it compiled before."""
    torch.compiler.reset()
    return torch.compile(network)


class TrainingStep:
    """A call is one step of `subject` at `shape`, in one of the `VARIANTS`; on a GPU in bfloat16 autocast always."""

    def __init__(self, subject: str, shape: Shape, seed: int, variant: str = "plain", device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.subject, self.device = subject, device
        kind = AutoModelForMaskedLM if variant == MASKED_LM else AutoModelForSequenceClassification
        self.network: PreTrainedModel = kind.from_config(model_config(subject, shape), attn_implementation="sdpa")
        self.network.to(device).train()
        self.model: Callable[..., Any] = self.network
        if variant == "gradient checkpointing":
            self.network.gradient_checkpointing_enable()
        elif variant == "torch.compile" or subject.endswith(COMPILED):
            self.model = compiled(self.network)
        self.autocast = variant == "bfloat16 autocast" or device == "cuda"
        on_gpu = device == "cuda"  # where a graph can capture it
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=True, capturable=on_gpu)
        self.input_ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.length), device=device)
        self.labels = torch.randint(2, (shape.batch_size,), device=device)
        if variant == MASKED_LM:
            # A random 15% of the tokens.
            self.labels = self.input_ids.masked_fill(torch.rand(self.input_ids.shape, device=device) >= 0.15, -100)

    def __call__(self) -> None:
        # On a GPU the peak of a whole step is measured, above the gradients that are there and stay.
        self.optimizer.zero_grad(set_to_none=self.device != "cuda")
        self.forward_backward()
        self.optimizer.step()

    def forward_backward(self) -> None:
        """Forward, loss and backward, on top of the gradients that are there."""
        with without_kernels() if self.subject == TORCH_ONLY else nullcontext():
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=self.input_ids, labels=self.labels).loss
            loss.backward()

    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        parameters = list(self.network.parameters())
        tensors = parameters + [p.grad for p in parameters if p.grad is not None] + states
        return sum(tensor.nbytes for tensor in tensors)

    def firing_rate(self) -> float | None:
        """Mean firing rate of all neuron layers on the batch, `None` for BERT; an error if one is dead or saturated."""
        return mean_firing_rate(self.network.base_model, {"input_ids": self.input_ids})


def measure_memory(subject: str, variant: str, seed: int, shapes: list[Shape]) -> list[dict[str, Any]]:
    """State and peaks (see the module's docstring) of a subject at each of `shapes`."""
    results = []
    for shape in shapes:
        step = TrainingStep(subject, shape, seed, variant)
        step()
        step.optimizer.zero_grad(set_to_none=False)
        results.append(
            {
                "subject": subject,
                "variant": variant,
                "shape": shape._asdict(),
                "state_bytes": step.state_bytes(),
                "peak_bytes": peak_allocated_bytes(step.forward_backward),
                "peak_resident_bytes": peak_resident_bytes(step.forward_backward),
                "firing_rate": step.firing_rate(),
            }
        )
    return results


def fitting(shape: Shape, settings: Settings, subjects: tuple[str, ...]) -> tuple[Shape, list[str]]:
    """`shape`, or where 12 layers of these subjects are too much for the machine, fewer and a note that says so."""
    if settings.quick:
        return QUICK, []
    needed = MEMORY_WITH_BASELINE if BASELINE in subjects else MEMORY_WITHOUT_BASELINE
    if shape != LARGE or physical_memory() >= needed:
        return shape, []
    note = (
        f"{LAYERS_OF_A_SMALL_MACHINE} layers in place of 12: the machine has {physical_memory() / 2**30:.0f} GiB, "
        f"and 12 of these models are measured from {needed / 2**30:.0f} GiB on."
    )
    return shape._replace(num_layers=LAYERS_OF_A_SMALL_MACHINE), [note]


def among(settings: Settings, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the chosen subjects that a section is about; all of them if it is about none."""
    return tuple(name for name in settings.subjects if name in wanted) or settings.subjects


def one_table(
    table: Callable[..., Table], shape: Shape, wanted: tuple[str, ...], settings: Settings, variant: str = "plain"
) -> Iterator[Table]:
    """`time_table` or `memory_table` of the wanted subjects at a size."""
    subjects = among(settings, wanted)
    yield table(settings, subjects, *fitting(shape, settings, subjects), variant)


def described(what: str, variant: str, shape: Shape) -> str:
    """The title of a table."""
    return ", ".join([what, *([variant] if variant != "plain" else []), str(shape)])


def time_table(
    settings: Settings, subjects: tuple[str, ...], shape: Shape, notes: list[str], variant: str = "plain"
) -> Table:
    """Time of each subject's step, and its ratios to the first one's."""
    steps = {name: TrainingStep(name, shape, settings.seed, variant) for name in subjects}
    samples = interleaved_seconds(steps, settings.repeats)
    reference = subjects[0]
    return Table(
        described("Training step", variant, shape),
        {
            "subject": "model",
            "milliseconds": "ms",
            "subject_over_reference": f"model / {reference}",
            "reference_over_subject": f"{reference} / model",
            "firing_rate": "firing rate",
        },
        [
            {
                "subject": name,
                "variant": variant,
                "shape": shape._asdict(),
                **speeds(samples, name, reference),
                "subject_over_reference": ratio(samples, name, reference),
                "firing_rate": call.firing_rate(),
            }
            for name, call in steps.items()
        ],
        ["Medians of interleaved rounds (quartiles); ratios are taken round by round.", *notes],
    )


def memory_table(
    settings: Settings, subjects: tuple[str, ...], shape: Shape, notes: list[str], variant: str = "plain"
) -> Table:
    """Peaks of each subject, and the ratios of the exact ones to the first subject's."""
    measured = {
        name: in_fresh_process(measure_memory, settings.threads, name, variant, settings.seed, [shape])[0]
        for name in subjects
    }
    reference = subjects[0]
    table = Table(
        described("Peak memory of forward + backward", variant, shape),
        {
            "subject": "model",
            "mebibytes": "peak above state, MiB",
            "subject_over_reference": f"model / {reference}",
            "reference_over_subject": f"{reference} / model",
            "resident_mebibytes": "the same by resident memory, MiB",
            "state_mebibytes": "state, MiB",
            "firing_rate": "firing rate",
        },
        notes=["State: weights, gradients, optimiser state.", *notes],
    )
    for values in measured.values():
        resident = values["peak_resident_bytes"]
        row = {
            **values,
            "mebibytes": values["peak_bytes"] / MIB,
            "subject_over_reference": values["peak_bytes"] / measured[reference]["peak_bytes"],
            "reference_over_subject": measured[reference]["peak_bytes"] / values["peak_bytes"],
            "resident_mebibytes": None if resident is None else resident / MIB,
            "state_mebibytes": values["state_bytes"] / MIB,
        }
        table.rows.append(row)
    return table


def plain_and(variant: str, settings: Settings) -> Iterator[Table]:
    """Time and memory, plain and in `variant`, at a quarter of the batch to save time."""
    if variant == "torch.compile" and (problem := compile_problem()):
        note = f"Not measured, torch.compile does not work here: {problem}"
        yield Table("torch.compile", {"problem": "problem"}, [{"problem": problem}], [note])
        return
    shape = QUICK if settings.quick else Shape()
    shape = shape._replace(batch_size=math.ceil(shape.batch_size / 4))
    if variant == "torch.compile":
        # Compiling takes minutes a layer, and every layer compiles to the same.
        shape = shape._replace(num_layers=1)
    for name in ("plain", variant):
        yield time_table(settings, among(settings, MAIN), shape, [], name)
        yield memory_table(settings, among(settings, MAIN), shape, [], name)


def compile_problem() -> str | None:
    """Why torch.compile cannot be used on this machine, in one line, or `None` if it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as error:  # whatever it is that the backend raises, it is the answer
        return str(error).strip().splitlines()[0]
    return None


def growth(settings: Settings) -> Iterator[Table]:
    """Time and memory over batch, length and layers."""
    # A small vocabulary, so that what grows is the encoder and not hidden by the gradient of the embedding table.
    base = QUICK if settings.quick else Shape(num_layers=2, batch_size=8, vocab_size=1000)
    values = {"batch_size": (4, 8, 16, 32), "length": (64, 128, 256, 512), "num_layers": (2, 4, 6)}
    if settings.quick:
        values = {"batch_size": (1, 2), "length": (8, 16), "num_layers": (1, 2)}
    subjects = among(settings, PAIR)
    shapes = list(dict.fromkeys(base._replace(**{key: size}) for key, sizes in values.items() for size in sizes))
    peaks = {
        name: in_fresh_process(measure_memory, settings.threads, name, "plain", settings.seed, shapes)
        for name in subjects
    }
    headings: dict[str, str] = {}
    for name in subjects:
        headings |= {f"{name}_milliseconds": f"{name}, ms", f"{name}_mebibytes": f"{name}, peak MiB"}
    for name in subjects[1:]:
        headings[f"time_over_{name}"] = f"time, {subjects[0]} / {name}"
        headings[f"memory_over_{name}"] = f"memory, {subjects[0]} / {name}"
    rows = {}
    for index, shape in enumerate(shapes):
        steps = {name: TrainingStep(name, shape, settings.seed) for name in subjects}
        samples = interleaved_seconds(steps, settings.repeats)
        row: dict[str, Any] = {"shape": shape._asdict()}
        for name in subjects:
            row[f"{name}_milliseconds"] = spread(samples[name], 1e3)
            row[f"{name}_mebibytes"] = peaks[name][index]["peak_bytes"] / MIB
        for name in subjects[1:]:
            row[f"time_over_{name}"] = ratio(samples, subjects[0], name)
            row[f"memory_over_{name}"] = row[f"{subjects[0]}_mebibytes"] / row[f"{name}_mebibytes"]
        rows[shape] = row
    for key, sizes in values.items():
        what = key.replace("_", " ")
        table = [{key: size, **rows[base._replace(**{key: size})]} for size in sizes]
        yield Table(f"Growth with {what}, otherwise {base}", {key: what, **headings}, table)


def profile(settings: Settings) -> Iterator[Table]:
    """Where the time of a step goes, by operator."""
    shape = QUICK if settings.quick else Shape()
    for name in among(settings, PAIR):
        training_step = TrainingStep(name, shape, settings.seed)
        training_step()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            training_step()
        operators = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in operators)
        yield Table(
            f"Operators of a training step by their own time: {name}, {shape}",
            {"operator": "operator", "calls": "calls", "milliseconds": "ms", "share": "share"},
            [
                {
                    "operator": event.key,
                    "calls": event.count,
                    "milliseconds": event.self_cpu_time_total / 1e3,
                    "share": event.self_cpu_time_total / total,
                }
                for event in operators[:12]
            ],
        )


BENCHMARK = Benchmark(
    "training",
    "Time and peak memory of a training step: SNN-BERT, the repeat-4 LIF baseline, transformers' BERT.",
    {
        "step_384": partial(one_table, time_table, Shape(), tuple(SUBJECTS)),
        "step_768": partial(one_table, time_table, LARGE, (*MAIN, TORCH_ONLY)),
        "step_mlm_384": partial(one_table, time_table, Shape(), PAIR, variant=MASKED_LM),
        "step_mlm_768": partial(one_table, time_table, LARGE, PAIR, variant=MASKED_LM),
        "memory_384": partial(one_table, memory_table, Shape(), MAIN),
        "memory_768": partial(one_table, memory_table, LARGE, MAIN),
        "checkpointing": partial(plain_and, "gradient checkpointing"),
        "autocast": partial(plain_and, "bfloat16 autocast"),
        "compile": partial(plain_and, "torch.compile"),
        "growth": growth,
        "profile": profile,
    },
    tuple(SUBJECTS),
    repeats=3,
)
