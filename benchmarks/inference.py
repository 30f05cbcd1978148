"""Inference of event-driven SNN-BERT against BERT in transformers and in ONNX Runtime: time and memory, on a CPU.

    python benchmarks/inference.py                              6 x 384 and 12 x 768 at imposed firing rates
    python benchmarks/inference.py --model_name_or_path FOLDER  a trained SNN-BERT at its own rates

Subjects have the same shape and vocabulary, no head and no pooler. Thresholds of the spiking models are set on random
tokens so that each channel fires at the imposed rate; the rate that is met is in the table. All subjects of a table are
timed in turns, round by round, and the ratios are taken round by round. Natural lengths are those of short film
reviews, padded to the longest of the batch. The ONNX models are exports of the very BERT that is timed, checked against
it. The section `linears` times the products of one layer alone, `levels` the whole encoder at each level of the
instruction set that the processor has. Writes inference.json.

ONNX Runtime and its tools are needed for two of the subjects only:

    pip install onnx onnxruntime onnxscript
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    check_firing_rate,
    environment,
    in_fresh_process,
    interleaved_seconds,
    peak_allocated_bytes,
    ratio,
    spread,
    without_kernels,
)
from registry import Settings, benchmark
from report import Table
from torch import nn
from transformers import BertModel, PreTrainedModel

from modeling_snn_bert import SNNBertConfig, SNNBertModel, SpikingNeuron, cpu_kernels
from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.conversion import bert_config
from modeling_snn_bert.event_driven import EventDrivenLinear, dense_rates, event_driven
from modeling_snn_bert.event_kernels import PackedSpikes, event_linear, tiles_available
from modeling_snn_bert.export import export_onnx
from modeling_snn_bert.packed_spikes import pack

REFERENCE = "bert_float32"
# Name of the subject: weights of the event-driven model, and whether on the compiled kernels.
EVENT_DRIVEN = {
    "event_float32": ("float32", True),
    "event_bfloat16": ("bfloat16", True),
    "event_int8": ("int8", True),
    "torch_bfloat16": ("bfloat16", False),
    "torch_int8": ("int8", False),
}
ONNX = ("onnx_float32", "onnx_int8")
# The model with dense products: whether on the compiled kernels.
DENSE = {"snn_dense": True, "snn_dense_torch": False}
SUBJECTS = (*EVENT_DRIVEN, *DENSE, REFERENCE, "bert_bfloat16", "bert_compiled", *ONNX)
RATES = (0.05, 0.1, 0.2, 0.3)
SHAPES = {"6x384": (6, 384, 1536, 12), "12x768": (12, 768, 3072, 12)}
BATCH_SIZES = (1, 8, 32)
LENGTH = 128
# The firing rate whose cost the section `linears` compares with, and the tokens of a product there.
REFERENCE_RATE = 0.2
LINEAR_TOKENS = 1024
SECTIONS = (*SHAPES, "linears", "levels")
# Batch and firing rate of the section `levels`.
LEVELS_BATCH, LEVELS_RATE = 8, 0.1
TILES = "any, on AMX"
# Token counts of short film reviews (SST-2's validation sentences): mean, standard deviation, and the range.
NATURAL_LENGTHS = (25.0, 12.0, 5, 64)
VOCAB_SIZE = 30522
BISECTION_STEPS = 10

Inputs = dict[str, torch.Tensor]


def make_batches(batch_sizes: tuple[int, ...], length: int, vocab_size: int, seed: int) -> dict[str, Inputs]:
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


@torch.no_grad()
def impose_firing_rate(model: SNNBertModel, rate: float, inputs: Inputs) -> None:
    """Set the thresholds of `model` so that each channel of each neuron layer fires at `rate` on `inputs`.

    By bisection, layer after layer: each neuron's currents are those that the layers before it send at their new rates.
    """

    def set_thresholds(neuron: SpikingNeuron, args: tuple) -> None:
        current = args[0]
        mask = inputs["attention_mask"]
        valid = current[mask != 0]
        low, high = valid.amin(0), valid.amax(0)
        for _ in range(BISECTION_STEPS):
            neuron.v_threshold.copy_((low + high) / 2)
            quiet = neuron.forward(*args)[mask != 0].mean(0) < rate
            high = torch.where(quiet, neuron.v_threshold, high)
            low = torch.where(quiet, low, neuron.v_threshold)
        neuron.v_threshold.copy_(low)

    neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
    handles = [neuron.register_forward_pre_hook(set_thresholds) for neuron in neurons]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def firing_rates(model: PreTrainedModel, inputs: Inputs) -> list[float]:
    """Mean rate of each neuron layer on `inputs`; an error if one is dead or saturated."""
    rates = model(**inputs, output_firing_rates=True).firing_rates
    names = model.neuron_names()
    return [check_firing_rate(name, rate.mean().item()) for name, rate in zip(names, rates, strict=True)]


class TorchOnly:
    """A call of `model` as where there are no compiled kernels."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **inputs: torch.Tensor) -> Any:
        with without_kernels():
            return self.model(**inputs)


def event_driven_subject(name: str, model: SNNBertModel) -> SNNBertModel | TorchOnly:
    """The event-driven form of a copy of `model` that the subject `name` stands for."""
    weight_dtype, on_kernels = EVENT_DRIVEN[name]
    if on_kernels and not cpu_kernels.available():
        raise SystemExit(
            f"the subject {name} needs the compiled kernels: install the package where there is a C compiler, "
            f"or leave it out with --subjects"
        )
    if on_kernels:
        return event_driven(copy.deepcopy(model), weight_dtype)
    with without_kernels():
        return TorchOnly(event_driven(copy.deepcopy(model), weight_dtype))


def dense_subject(name: str, model: SNNBertModel) -> SNNBertModel | TorchOnly:
    """`model` itself as the subject `name` runs it."""
    return model if DENSE[name] else TorchOnly(model)


def onnx_subject(name: str, bert: BertModel, threads: int, folder: Path) -> Callable[..., Any]:
    """ONNX Runtime on an export of `bert`, in float32 or dynamically quantized to int8.

    Raises:
        RuntimeError: if the export does not compute what `bert` does.
    """
    path, quantized = folder / "float32.onnx", folder / "int8.onnx"
    try:
        if not path.exists():
            export_onnx(bert, path, ("input_ids", "attention_mask"))
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise SystemExit(f"the subject {name}: {error}\nor leave the subject out with --subjects") from error
    if name == "onnx_int8":
        quantize_dynamic(path, quantized, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        quantized if name == "onnx_int8" else path, options, providers=["CPUExecutionProvider"]
    )

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        return session.run(None, {key: x.numpy() for key, x in inputs.items()})[0]

    return run


def rival(name: str, bert: BertModel) -> Callable[..., Any]:
    """The BERT that the subject `name` stands for."""
    if name == "bert_bfloat16":
        return copy.deepcopy(bert).bfloat16()
    if name == "bert_compiled":
        torch.compiler.reset()
        return torch.compile(copy.deepcopy(bert))
    return bert


def build_spiking(shape: tuple[int, int, int, int], seed: int) -> SNNBertModel:
    layers, hidden, intermediate, heads = shape
    torch.manual_seed(seed)
    config = SNNBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    return SNNBertModel(config, add_pooling_layer=False).eval()


def bert_like(config: SNNBertConfig) -> BertModel:
    """A random BERT of the size of `config`."""
    bert = BertModel(bert_config(config), add_pooling_layer=False)
    bert.set_attn_implementation("sdpa")
    return bert.eval()


def peak_bytes(name: str, config: SNNBertConfig, state: dict[str, torch.Tensor], inputs: Inputs) -> int:
    """Peak of the memory that one call of a PyTorch subject holds above its weights; runs in a process of its own."""
    with torch.inference_mode():
        call: Callable[..., Any]
        if name in EVENT_DRIVEN or name in DENSE:
            model = SNNBertModel(config, add_pooling_layer=False).eval()
            model.load_state_dict(state)
            call = dense_subject(name, model) if name in DENSE else event_driven_subject(name, model)
        else:
            call = rival(name, bert_like(config))
        call(**inputs)
        return peak_allocated_bytes(lambda: call(**inputs))


def compare(
    title: str, section: str, model: SNNBertModel, batches: dict[str, Inputs], settings: Settings, memory: bool
) -> Iterator[Table]:
    """One table per batch of `batches`, on a model whose rates are set."""
    rates = firing_rates(model, next(reversed(batches.values())))
    bert = bert_like(model.config)
    threads = settings.threads
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[..., Any]] = {}
        crossovers = {}
        for name in settings.subjects:
            if name in EVENT_DRIVEN:
                subject = event_driven_subject(name, model)
                calls[name] = subject
                crossovers[name] = dense_rates(subject.model if isinstance(subject, TorchOnly) else subject)
            elif name in ONNX:
                with torch.inference_mode(False), torch.no_grad():
                    calls[name] = onnx_subject(name, bert, threads, Path(folder))
            else:
                calls[name] = dense_subject(name, model) if name in DENSE else rival(name, bert)
        for label, inputs in batches.items():
            rows = len(inputs["input_ids"])
            samples = interleaved_seconds({n: partial(c, **inputs) for n, c in calls.items()}, settings.repeats, 2)
            rate = sum(firing_rates(model, inputs)) / len(rates) if any(n in EVENT_DRIVEN for n in calls) else None
            table = Table(
                section,
                f"{title}, batch {label}, {threads} threads",
                {
                    "subject": "model",
                    "milliseconds": "ms",
                    "sentences_per_second": "sentences / s",
                    "speedup": f"{REFERENCE} / model",
                    "speedup_onnx_int8": "onnx_int8 / model",
                    "peak_mib": "peak MiB",
                    "firing_rate": "firing rate",
                },
                notes=["Median of interleaved rounds (quartiles). Peak: what tensors hold at most beside the weights."],
            )
            for name in calls:
                peak = None
                if memory and name not in ONNX and name != "bert_compiled":
                    peak = in_fresh_process(peak_bytes, threads, name, model.config, model.state_dict(), inputs) / 2**20
                row = {
                    "subject": name,
                    "milliseconds": spread(samples[name], 1e3),
                    "sentences_per_second": spread([rows / x for x in samples[name]]),
                    "speedup": ratio(samples, REFERENCE, name) if REFERENCE in samples else None,
                    "speedup_onnx_int8": ratio(samples, "onnx_int8", name) if "onnx_int8" in samples else None,
                    "peak_mib": peak,
                    "firing_rate": rate if name in EVENT_DRIVEN or name in DENSE else None,
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


def linear_tables(settings: Settings, rates: tuple[float, ...]) -> Iterator[Table]:
    """What the Linears of one layer cost at each firing rate, against that at 0.2 and against dense float32."""
    rates = tuple(sorted({*rates, REFERENCE_RATE}))
    tokens = 16 if settings.quick else LINEAR_TOKENS
    for _, hidden, intermediate, heads in SHAPES.values():
        shape = (1, 48, 96, 4) if settings.quick else (1, hidden, intermediate, heads)
        for weight_dtype in ("float32", "int8"):
            generator = torch.Generator().manual_seed(settings.seed)
            model = build_spiking(shape, settings.seed)
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
            table = Table(
                "linears",
                f"The Linears of one layer, {shape[1]} wide, {weight_dtype} weights, {tokens} tokens, "
                f"{settings.threads} threads",
                {
                    "rate": "firing rate",
                    "milliseconds": "ms",
                    "over_reference": f"time / that at {REFERENCE_RATE}",
                    "speedup": "dense float32 / time",
                },
                notes=[
                    "Median of interleaved rounds (quartiles). From packed spikes: finding the active ones is in it."
                ],
            )
            for name in calls:
                row = {
                    "rate": name,
                    "milliseconds": spread(samples[name], 1e3),
                    "over_reference": ratio(samples, name, str(REFERENCE_RATE)),
                    "speedup": ratio(samples, "dense", name),
                }
                table.rows.append(row)
            yield table


def run_dense(linears: list[nn.Linear], inputs: list[torch.Tensor]) -> None:
    """Dense products."""
    for linear, x in zip(linears, inputs, strict=True):
        nn.functional.linear(x, linear.weight, linear.bias)


class AtLevel:
    """A call of `model` with the kernels at one level of the instruction set."""

    def __init__(self, model: nn.Module, level: str) -> None:
        self.model = model
        self.level = level

    def __call__(self, **inputs: torch.Tensor) -> Any:
        before = cpu_kernels.cpu_level()
        assert before is not None  # whoever makes levels has kernels
        cpu_kernels.cap_cpu_level(self.level)
        try:
            return self.model(**inputs)
        finally:
            cpu_kernels.cap_cpu_level(before)


def level_tables(settings: Settings) -> Iterator[Table]:
    """The encoder at each level of the instruction set against BERT, every product by events, or on AMX by tiles."""
    if not cpu_kernels.available():
        raise SystemExit("the section levels needs the compiled kernels: install the package where there is a compiler")
    for shape_name, full_shape in SHAPES.items():
        shape, length = ((2, 48, 96, 4), 16) if settings.quick else (full_shape, LENGTH)
        model = build_spiking(shape, settings.seed)
        inputs = make_batches((LEVELS_BATCH,), length, VOCAB_SIZE, settings.seed)[f"{LEVELS_BATCH} x {length}"]
        impose_firing_rate(model, LEVELS_RATE, inputs)
        firing_rates(model, inputs)
        calls: dict[str, Callable[..., Any]] = {REFERENCE: bert_like(model.config)}
        for weight_dtype in ("float32", "int8"):
            for level in cpu_kernels.levels_here():
                if level != "amx":
                    calls[f"{weight_dtype}, {level}"] = AtLevel(
                        event_driven(copy.deepcopy(model), weight_dtype, dense_above=1.0), level
                    )
                elif weight_dtype == "int8":
                    calls["int8, amx"] = AtLevel(event_driven(copy.deepcopy(model), "int8", dense_above=0.0), level)
        with torch.inference_mode():
            samples = interleaved_seconds({n: partial(c, **inputs) for n, c in calls.items()}, settings.repeats, 2)
        table = Table(
            "levels",
            f"{shape_name}, batch {LEVELS_BATCH} x {length}, rate {LEVELS_RATE}, {settings.threads} threads",
            {"subject": "weights, level", "milliseconds": "ms", "speedup": f"{REFERENCE} / time"},
            notes=["Median of interleaved rounds (quartiles)."],
        )
        for name in calls:
            row = {"milliseconds": spread(samples[name], 1e3), "speedup": ratio(samples, REFERENCE, name)}
            table.rows.append({"subject": name, **row})
        yield table


@benchmark("inference", sections=SECTIONS, subjects=SUBJECTS, repeats=7)
def inference(settings: Settings) -> Iterator[Table]:
    """Inference: event-driven SNN-BERT against BERT in transformers and ONNX Runtime, at imposed firing rates."""
    yield from tables_of(settings, RATES, BATCH_SIZES, memory=not settings.quick)


def tables_of(
    settings: Settings, rates: tuple[float, ...], batch_sizes: tuple[int, ...], memory: bool
) -> Iterator[Table]:
    """The tables of the sections that were asked for."""
    if "linears" in settings.sections:
        yield from linear_tables(settings, rates)
    if "levels" in settings.sections:
        yield from level_tables(settings)
    yield from at_imposed_rates(settings, rates, batch_sizes, memory)


def at_imposed_rates(
    settings: Settings, rates: tuple[float, ...], batch_sizes: tuple[int, ...], memory: bool
) -> Iterator[Table]:
    for section in (name for name in SHAPES if name in settings.sections):
        shape, length = (2, 48, 96, 4) if settings.quick else SHAPES[section], 16 if settings.quick else LENGTH
        model = build_spiking(shape, settings.seed)
        batches = make_batches((1, 2) if settings.quick else batch_sizes, length, VOCAB_SIZE, settings.seed)
        for rate in rates[:1] if settings.quick else rates:
            impose_firing_rate(model, rate, next(iter(reversed(batches.values()))))
            title = f"{shape[0]} layers x {shape[1]}, rate {rate}"
            yield from compare(title, section, model, batches, settings, memory and rate == 0.1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="an SNN-BERT: folder or Hub id, measured at its own rates")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--no_memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    if args.threads < 1 or args.repeats < 1 or min(args.batch_sizes) < 1:
        parser.error("--threads, --repeats and --batch_sizes must be >= 1")
    if not all(0 < rate < 1 for rate in args.rates):
        parser.error(f"--rates must lie in (0, 1), got {args.rates}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(tuple(args.sections), tuple(args.subjects), False, args.threads, args.repeats, args.seed)
    if args.model_name_or_path is not None:
        model = SNNBertModel.from_pretrained(args.model_name_or_path, add_pooling_layer=False).eval()
        length = min(LENGTH, model.config.max_position_embeddings)
        batches = make_batches(tuple(args.batch_sizes), length, model.config.vocab_size, args.seed)
        tables = compare(args.model_name_or_path, "checkpoint", model, batches, settings, not args.no_memory)
    else:
        tables = tables_of(settings, tuple(args.rates), tuple(args.batch_sizes), not args.no_memory)
    done = []
    for table in tables:
        done.append(table.to_dict())
        print(table.markdown(), flush=True)
    result = {
        "benchmark": "inference",
        "command": " ".join(["python", "benchmarks/inference.py", *sys.argv[1:]]),
        "environment": environment(args.threads, args.seed),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "tables": done,
    }
    write_json(args.output_dir / "inference.json", result, allow_nan=False)
    print(f"written to {args.output_dir / 'inference.json'}")


if __name__ == "__main__":
    main()
