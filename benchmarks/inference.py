"""Inference of event-driven SNN-BERT against BERT in transformers and in ONNX Runtime: time and memory, on a CPU.

    python benchmarks/inference.py                              6 x 384 and 12 x 768 at imposed firing rates
    python benchmarks/inference.py --model_name_or_path FOLDER  a trained SNN-BERT at its own rates

Subjects have the same shape and vocabulary, no head and no pooler. The spiking models are random BERTs, converted on
random tokens so that each channel fires at the imposed rate; the rate that is met is in the table. All subjects of a
table are timed in turns, round by round, and the ratios are taken round by round. Natural lengths are those of short
film reviews, padded to the longest of the batch. The ONNX models are exports of the very BERT that is timed, checked
against it. The section `linears` times the products of one layer alone, `levels` the whole encoder at each level of the
instruction set that the processor has. This is `run.py inference`, whose options it takes, and writes what that does.

ONNX Runtime and its tools are needed for two of the subjects only:

    pip install onnx onnxruntime onnxscript
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from measure import (
    check_firing_rate,
    in_fresh_process,
    interleaved_seconds,
    mean_firing_rate,
    onnx_session,
    peak_allocated_bytes,
    quantized_onnx,
    ratio,
    speeds,
    spread,
    without_kernels,
)
from registry import Benchmark, Settings
from report import Table
from torch import nn
from training import LARGE, QUICK, Shape, compiled, model_config
from transformers import BertConfig, BertModel

from modeling_snn_bert import SNNBertConfig, SNNBertModel, cpu_kernels
from modeling_snn_bert.conversion import bert_config, convert_bert
from modeling_snn_bert.event_driven import EventDrivenLinear, dense_rates, event_driven
from modeling_snn_bert.event_kernels import PackedSpikes, event_linear, tiles_available
from modeling_snn_bert.export import export_onnx
from modeling_snn_bert.packed_spikes import pack

REFERENCE = "bert_float32"
# The spiking subjects: weights of the event-driven model, `None` for dense products, and whether on the compiled
# kernels.
SPIKING = {
    "event_float32": ("float32", True),
    "event_bfloat16": ("bfloat16", True),
    "event_int8": ("int8", True),
    "torch_bfloat16": ("bfloat16", False),
    "torch_int8": ("int8", False),
    "snn_dense": (None, True),
    "snn_dense_torch": (None, False),
}
ONNX = ("onnx_float32", "onnx_int8")
SUBJECTS = (*SPIKING, REFERENCE, "bert_bfloat16", "bert_compiled", *ONNX)
RATES = (0.05, 0.1, 0.2, 0.3)
SHAPES = {"6x384": Shape(), "12x768": LARGE}
BATCH_SIZES = (1, 8, 32)
LENGTH = 128
# The firing rate whose cost the section `linears` compares with, and the tokens of a product there.
REFERENCE_RATE = 0.2
LINEAR_TOKENS = 1024
# Batch and firing rate of the section `levels`.
LEVELS_BATCH, LEVELS_RATE = 8, 0.1
TILES = "any, on AMX"
# Token counts of short film reviews (SST-2's validation sentences): mean, standard deviation, and the range.
NATURAL_LENGTHS = (25.0, 12.0, 5, 64)
MEDIANS = "Median of interleaved rounds (quartiles)."

Inputs = dict[str, torch.Tensor]


def make_batches(batch_sizes: Sequence[int], length: int, vocab_size: int, seed: int) -> dict[str, Inputs]:
    """Random tokens: full sequences for each batch size, and one padded batch of natural lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(rows: int, columns: int) -> Inputs:
        ids = torch.randint(min(1000, vocab_size // 2), vocab_size, (rows, columns), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    batches = {f"{rows} x {length}": tokens(rows, length) for rows in batch_sizes}
    mean, deviation, shortest, longest = NATURAL_LENGTHS
    rows = batch_sizes[-1]
    lengths = (mean + deviation * torch.randn(rows, generator=generator)).round().clamp(shortest, min(longest, length))
    natural = tokens(rows, int(lengths.max()))
    natural["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batches[f"{rows} x natural"] = natural
    return batches


def spiking_at(rate: float, shape: Shape, inputs: Inputs, seed: int) -> SNNBertModel:
    """A random SNN-BERT of that size in which each channel of each neuron layer fires at `rate` on `inputs`."""
    torch.manual_seed(seed)
    bert = BertModel(cast(BertConfig, model_config("bert", shape)))
    model = cast(SNNBertModel, convert_bert(bert, [inputs], rate, ridge=float("inf")))
    # A BERT is converted whole.
    model.pooler = None
    return model


def need_kernels(what: str) -> None:
    """Ends the program with one line unless there are compiled kernels, which `what` needs."""
    if not cpu_kernels.available():
        raise SystemExit(f"{what} needs the compiled kernels: leave it out, or install the package with a C compiler")


def spiking_subject(name: str, model: SNNBertModel) -> tuple[SNNBertModel, Callable[..., Any]]:
    """The form of `model` that the subject `name` stands for, and how it is called."""
    weight_dtype, on_kernels = SPIKING[name]
    if weight_dtype is not None:
        if on_kernels:
            need_kernels(f"the subject {name}")
        with nullcontext() if on_kernels else without_kernels():
            model = event_driven(copy.deepcopy(model), weight_dtype)
    return model, model if on_kernels else without_kernels()(model.__call__)


def onnx_subject(name: str, bert: BertModel, folder: Path) -> Callable[..., Any]:
    """ONNX Runtime on an export of `bert`, in float32 or dynamically quantized to int8.

    Raises:
        RuntimeError: if the export does not compute what `bert` does.
    """
    path = folder / "float32.onnx"
    try:
        if not path.exists():
            export_onnx(bert, path, ("input_ids", "attention_mask"))
        if name == "onnx_int8":
            path = quantized_onnx(path, folder / "int8.onnx")
        session = onnx_session(path)
    except ImportError as error:
        raise SystemExit(f"the subject {name}: {error}\nor leave the subject out with --subjects") from error
    return lambda **inputs: session.run(None, {key: x.numpy() for key, x in inputs.items()})[0]


def rival(name: str, bert: BertModel) -> Callable[..., Any]:
    """The BERT that the subject `name` stands for."""
    if name == "bert_bfloat16":
        return copy.deepcopy(bert).bfloat16()
    return compiled(copy.deepcopy(bert)) if name == "bert_compiled" else bert


def bert_like(config: SNNBertConfig) -> BertModel:
    """A random BERT of the size of `config`."""
    bert = BertModel(bert_config(config), add_pooling_layer=False)
    bert.set_attn_implementation("sdpa")
    return bert.eval()


def peak_bytes(name: str, config: SNNBertConfig, state: dict[str, torch.Tensor], inputs: Inputs) -> int:
    """Peak of the memory that one call of a PyTorch subject holds above its weights; runs in a process of its own."""
    with torch.inference_mode():
        if name in SPIKING:
            model = SNNBertModel(config, add_pooling_layer=False).eval()
            model.load_state_dict(state)
            _, call = spiking_subject(name, model)
        else:
            call = rival(name, bert_like(config))
        call(**inputs)
        return peak_allocated_bytes(lambda: call(**inputs))


def compare(
    title: str, model: SNNBertModel, batches: dict[str, Inputs], settings: Settings, memory: bool
) -> Iterator[Table]:
    """One table per batch of `batches`, on a model whose rates are set."""
    mean_firing_rate(model, next(reversed(batches.values())))
    bert = bert_like(model.config)
    threads = settings.threads
    memory = memory and not (settings.no_memory or settings.quick)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[..., Any]] = {}
        crossovers = {}
        for name in settings.subjects:
            if name in SPIKING:
                spiking, calls[name] = spiking_subject(name, model)
                crossovers[name] = dense_rates(spiking)
            elif name in ONNX:
                with torch.inference_mode(False), torch.no_grad():
                    calls[name] = onnx_subject(name, bert, Path(folder))
            else:
                calls[name] = rival(name, bert)
        for label, inputs in batches.items():
            rows = len(inputs["input_ids"])
            samples = interleaved_seconds({n: partial(c, **inputs) for n, c in calls.items()}, settings.repeats, 2)
            rate = mean_firing_rate(model, inputs) if crossovers else None
            table = Table(
                f"{title}, batch {label}, {threads} threads",
                {
                    "subject": "model",
                    "milliseconds": "ms",
                    "sentences_per_second": "sentences / s",
                    "reference_over_subject": f"{REFERENCE} / model",
                    "speedup_onnx_int8": "onnx_int8 / model",
                    "peak_mib": "peak MiB",
                    "firing_rate": "firing rate",
                },
                notes=[f"{MEDIANS} Peak: what tensors hold at most beside the weights."],
            )
            for name in calls:
                peak = None
                if memory and name not in ONNX and name != "bert_compiled":
                    peak = in_fresh_process(peak_bytes, threads, name, model.config, model.state_dict(), inputs) / 2**20
                row = {
                    "subject": name,
                    **speeds(samples, name, REFERENCE),
                    "sentences_per_second": spread([rows / x for x in samples[name]]),
                    "speedup_onnx_int8": ratio(samples, "onnx_int8", name) if "onnx_int8" in samples else None,
                    "peak_mib": peak,
                    "firing_rate": rate if name in SPIKING else None,
                    "dense_above": crossovers.get(name),
                }
                table.rows.append(row)
            yield table


def products(model: SNNBertModel, rate: float, tokens: int, generator: torch.Generator) -> Callable[[], None]:
    """The kernels' products of `model` on random packed spikes: lists of the active inputs and sums, or on tiles."""
    linears = [module for module in model.modules() if isinstance(module, EventDrivenLinear)]
    sizes = {linear.in_features for linear in linears}
    spikes = {size: (torch.rand(tokens, size, generator=generator) < rate).float() for size in sizes}
    for size, values in spikes.items():
        check_firing_rate(f"the input of {size} channels", values.mean().item())
    packed = {size: pack(values, ternary=False)[:, None] for size, values in spikes.items()}

    def run() -> None:
        shared = {size: PackedSpikes(x) for size, x in packed.items()}
        for linear in linears:
            inputs, weights = linear.runner.kernel_operands(linear, shared[linear.in_features])
            assert weights is not None  # `dense_above` says so
            event_linear(inputs, weights)

    return run


def linears(settings: Settings) -> Iterator[Table]:
    """What the Linears of one layer cost at each firing rate, against that at 0.2 and against dense float32."""
    rates = sorted({*(settings.rates or RATES), REFERENCE_RATE})
    tokens = 16 if settings.quick else LINEAR_TOKENS
    for full_shape in SHAPES.values():
        shape = (QUICK if settings.quick else full_shape)._replace(num_layers=1)
        for weight_dtype in ("float32", "int8"):
            generator = torch.Generator().manual_seed(settings.seed)
            torch.manual_seed(settings.seed)
            model = SNNBertModel(model_config("snn_bert", shape), add_pooling_layer=False).eval()
            weights = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
            inputs = [torch.rand(tokens, linear.in_features, generator=generator) for linear in weights]
            dense = partial(run_dense, copy.deepcopy(weights), inputs)
            model = event_driven(model, weight_dtype, dense_above=1.0)
            calls: dict[str, Callable[[], None]] = {
                str(rate): products(model, rate, tokens, generator) for rate in rates
            }
            if weight_dtype == "int8" and tiles_available():
                on_tiles = event_driven(copy.deepcopy(model), weight_dtype, dense_above=0.0)
                calls[TILES] = products(on_tiles, REFERENCE_RATE, tokens, generator)
            with torch.inference_mode():
                samples = interleaved_seconds({**calls, "dense": dense}, settings.repeats, 2)
            yield Table(
                f"The Linears of one layer, {shape.hidden_size} wide, {weight_dtype} weights, {tokens} tokens, "
                f"{settings.threads} threads",
                {
                    "rate": "firing rate",
                    "milliseconds": "ms",
                    "over_reference": f"time / that at {REFERENCE_RATE}",
                    "reference_over_subject": "dense float32 / time",
                },
                [
                    {
                        "rate": name,
                        **speeds(samples, name, "dense"),
                        "over_reference": ratio(samples, name, str(REFERENCE_RATE)),
                    }
                    for name in calls
                ],
                [f"{MEDIANS} From packed spikes: finding the active ones is in it."],
            )


def run_dense(linears: list[nn.Linear], inputs: list[torch.Tensor]) -> None:
    """Dense products."""
    for linear, x in zip(linears, inputs, strict=True):
        nn.functional.linear(x, linear.weight, linear.bias)


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """A context with the kernels at one level of the instruction set."""
    before = cpu_kernels.cpu_level()
    assert before is not None  # whoever makes levels has kernels
    cpu_kernels.cap_cpu_level(level)
    try:
        yield
    finally:
        cpu_kernels.cap_cpu_level(before)


def levels(settings: Settings) -> Iterator[Table]:
    """The encoder at each level of the instruction set against BERT, every product by events, or on AMX by tiles."""
    need_kernels("the section levels")
    for shape_name, full_shape in SHAPES.items():
        shape = QUICK if settings.quick else full_shape
        (inputs, _) = make_batches((LEVELS_BATCH,), shape.length, shape.vocab_size, settings.seed).values()
        model = spiking_at(LEVELS_RATE, shape, inputs, settings.seed)
        mean_firing_rate(model, inputs)
        calls: dict[str, Callable[..., Any]] = {REFERENCE: bert_like(model.config)}
        for weight_dtype in ("float32", "int8"):
            for level in cpu_kernels.levels_here():
                if level == "amx" and weight_dtype != "int8":
                    continue
                dense_above = 0.0 if level == "amx" else 1.0
                spiking = event_driven(copy.deepcopy(model), weight_dtype, dense_above=dense_above)
                calls[f"{weight_dtype}, {level}"] = at_level(level)(spiking.__call__)
        with torch.inference_mode():
            samples = interleaved_seconds({n: partial(c, **inputs) for n, c in calls.items()}, settings.repeats, 2)
        yield Table(
            f"{shape_name}, batch {LEVELS_BATCH} x {shape.length}, rate {LEVELS_RATE}, {settings.threads} threads",
            {"subject": "weights, level", "milliseconds": "ms", "reference_over_subject": f"{REFERENCE} / time"},
            [{"subject": name, **speeds(samples, name, REFERENCE)} for name in calls],
            [MEDIANS],
        )


def at_imposed_rates(full_shape: Shape, settings: Settings) -> Iterator[Table]:
    """Models of one size at each firing rate."""
    shape = QUICK if settings.quick else full_shape
    batch_sizes = (1, 2) if settings.quick else settings.batch_sizes or BATCH_SIZES
    batches = make_batches(batch_sizes, shape.length, shape.vocab_size, settings.seed)
    rates = settings.rates or RATES
    for rate in rates[:1] if settings.quick else rates:
        model = spiking_at(rate, shape, next(reversed(batches.values())), settings.seed)
        title = f"{shape.num_layers} layers x {shape.hidden_size}, rate {rate}"
        yield from compare(title, model, batches, settings, memory=rate == 0.1)


def of_checkpoint(settings: Settings) -> Iterator[Table]:
    """A trained model at its own rates."""
    name = settings.model_name_or_path
    model = SNNBertModel.from_pretrained(name, add_pooling_layer=False).eval()
    length = min(LENGTH, model.config.max_position_embeddings)
    batches = make_batches(settings.batch_sizes or BATCH_SIZES, length, model.config.vocab_size, settings.seed)
    yield from compare(str(name), model, batches, settings, memory=True)


BENCHMARK = Benchmark(
    "inference",
    "Inference: event-driven SNN-BERT against BERT in transformers and ONNX Runtime, at imposed firing rates.",
    {
        **{name: partial(at_imposed_rates, shape) for name, shape in SHAPES.items()},
        "linears": linears,
        "levels": levels,
    },
    SUBJECTS,
    repeats=7,
    of_checkpoint=of_checkpoint,
)

if __name__ == "__main__":
    from run import main

    main(["inference", *sys.argv[1:]])
