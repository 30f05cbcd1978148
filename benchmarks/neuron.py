"""Forward and backward of one layer of spiking neurons, alone.

spikingjelly is needed for its neurons only. Its requirements pull in torchvision and torchaudio, which it imports
nowhere on the way to its neurons and which may not fit the torch that is installed, so install it without them:

    pip install --no-deps spikingjelly loguru
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from measure import check_firing_rate, interleaved_seconds, ratio, speeds, spread
from registry import Benchmark, Settings
from report import Table
from torch import nn

from modeling_snn_bert import BPSN, LIF, PSN, leaky_integration

# One group per attention head.
GROUPS = 12
SLIDING_ORDER = 4


class Subject(NamedTuple):
    """A neuron to measure: `build(tokens, channels)`, and whether tokens come first in its layout, `[T, N, C]`."""

    build: Callable[[int, int], nn.Module]
    tokens_first: bool = False


def spikingjelly() -> SimpleNamespace:
    """spikingjelly's modules, or an end with a word on how to get it."""
    try:
        from spikingjelly.activation_based import functional, neuron, surrogate
    except ImportError as error:
        others = [name for name in SUBJECTS if not name.startswith("spikingjelly")]
        raise SystemExit(
            f"the benchmark `neuron` compares with spikingjelly, which cannot be imported ({error}). Install it with\n"
            "    pip install --no-deps spikingjelly loguru\n"
            f"(Python 3.11 or newer), or leave it out with --subjects {' '.join(others)}"
        ) from error
    return SimpleNamespace(functional=functional, neuron=neuron, surrogate=surrogate)


class ResetBeforeCall(nn.Module):
    """A spikingjelly neuron that starts every sequence from rest, as all the others do."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron
        self.reset_net = spikingjelly().functional.reset_net

    def forward(self, current: torch.Tensor) -> torch.Tensor:
        self.reset_net(self.neuron)
        return self.neuron(current)


def spikingjelly_lif(tokens: int, channels: int) -> nn.Module:
    library = spikingjelly()
    neuron = library.neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_threshold=1.0,
        v_reset=None,
        surrogate_function=library.surrogate.ATan(),
        detach_reset=True,
        step_mode="m",
    )
    return ResetBeforeCall(neuron)


def spikingjelly_psn(tokens: int, channels: int) -> nn.Module:
    return spikingjelly().neuron.PSN(tokens)


def spikingjelly_sliding_psn(tokens: int, channels: int) -> nn.Module:
    return ResetBeforeCall(spikingjelly().neuron.SlidingPSN(SLIDING_ORDER, step_mode="m"))


SUBJECTS = {
    "bpsn": Subject(lambda tokens, channels: BPSN(channels, GROUPS)),
    "bpsn_without_reset": Subject(lambda tokens, channels: BPSN(channels, GROUPS, reset_iterations=0)),
    "lif": Subject(lambda tokens, channels: LIF(channels, GROUPS)),
    "psn": Subject(lambda tokens, channels: PSN(channels, GROUPS, length=tokens)),
    "spikingjelly_lif": Subject(spikingjelly_lif, tokens_first=True),
    "spikingjelly_psn": Subject(spikingjelly_psn, tokens_first=True),
    "spikingjelly_sliding_psn": Subject(spikingjelly_sliding_psn, tokens_first=True),
}


class Pass:
    """A call runs the neuron `subject` forward and backward once, to the currents and to every parameter.

    Currents are drawn from a standard normal distribution, `[batch, tokens, channels]`, in the neuron's own layout.
    """

    def __init__(
        self,
        subject: Subject,
        shape: tuple[int, int, int],
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, tokens, channels = shape
        torch.manual_seed(seed)
        self.neuron = subject.build(tokens, channels).to(device)
        size = (tokens, batch, channels) if subject.tokens_first else shape
        self.current = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        self.gradient = torch.randn(size, device=device, dtype=dtype)
        self.inputs = [self.current, *self.neuron.parameters()]

    def __call__(self) -> None:
        torch.autograd.grad(self.neuron(self.current), self.inputs, self.gradient)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        """The spikes, with nothing kept for a backward pass."""
        return self.neuron(self.current)

    def firing_rate(self) -> float:
        """Share of the outputs that are spikes; an error if the neuron is dead or saturated."""
        rate = self.forward().count_nonzero().item() / self.current.numel()
        return check_firing_rate(self.neuron.__class__.__name__, rate)


def peers(settings: Settings) -> Iterator[Table]:
    """BPSN against other neurons."""
    shapes = [(4, 8, 24), (8, 4, 48)] if settings.quick else [(128, 16, 384), (512, 8, 768)]
    reference = settings.subjects[0]
    for shape in shapes:
        passes = {name: Pass(SUBJECTS[name], shape, settings.seed) for name in settings.subjects}
        samples = interleaved_seconds(passes, settings.repeats, warmup=3)
        yield Table(
            f"Forward + backward, [batch, tokens, channels] = {list(shape)}",
            {
                "subject": "neuron",
                "milliseconds": "ms",
                "reference_over_subject": f"{reference} / neuron",
                "firing_rate": "firing rate",
            },
            [
                {"subject": name, "shape": shape, **speeds(samples, name, reference), "firing_rate": call.firing_rate()}
                for name, call in passes.items()
            ],
            [
                "Median of interleaved rounds (quartiles); the ratio is taken round by round. Gradients go to the "
                "currents and to all parameters that a neuron has; spikingjelly's LIF has none."
            ],
        )


def implementations(settings: Settings) -> Iterator[Table]:
    """The implementations of the leaky integration against each other."""
    fast = ("toeplitz", "chunked", "auto")
    # The reference takes a Python step per pair of tokens.
    cases: list[tuple[tuple[int, int, int], tuple[str, ...]]] = [
        ((128, 16, 384), ("naive", *fast)),
        ((16, 128, 384), fast),
        ((4, 512, 384), fast),
        ((1, 2048, 384), fast),
    ]
    if settings.quick:
        cases = [((2, 8, 24), ("naive", *fast))]
    for shape, names in cases:
        torch.manual_seed(settings.seed)
        current, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        decays = [torch.full((GROUPS,), 0.05, requires_grad=True) for _ in range(2)]

        def forward_backward(name, inputs, gradient) -> None:
            torch.autograd.grad(leaky_integration(*inputs, implementation=name), inputs, gradient)

        calls = {name: partial(forward_backward, name, [current, *decays], gradient) for name in names}
        samples = interleaved_seconds(calls, settings.repeats)
        yield Table(
            f"leaky_integration, forward + backward, {list(shape)}",
            {"implementation": "implementation", "milliseconds": "ms", "over_auto": "time / auto's"},
            [
                {
                    "implementation": name,
                    "shape": shape,
                    "milliseconds": spread(samples[name], 1e3),
                    "over_auto": ratio(samples, name, "auto"),
                }
                for name in names
            ],
        )


def length(settings: Settings) -> Iterator[Table]:
    """BPSN's time per token over the length, for a constant number of tokens."""
    lengths = [8, 16, 32] if settings.quick else [128, 512, 2048, 8192, 32768]
    channels = 24 if settings.quick else 384
    tokens = lengths[-1]
    for subject in (name for name in settings.subjects if name.startswith("bpsn")):
        passes = {
            str(length): Pass(SUBJECTS[subject], (tokens // length, length, channels), settings.seed)
            for length in lengths
        }
        samples = interleaved_seconds(passes, settings.repeats)
        yield Table(
            f"{subject}: time per token, {tokens:,} tokens in sequences of one length, {channels} channels",
            {
                "length": "length",
                "nanoseconds_per_token": "ns per token",
                "over_shortest": f"time / that at {lengths[0]}",
                "firing_rate": "firing rate",
            },
            [
                {
                    "subject": subject,
                    "length": int(name),
                    "nanoseconds_per_token": spread(samples[name], 1e9 / tokens),
                    "over_shortest": ratio(samples, name, str(lengths[0])),
                    "firing_rate": call.firing_rate(),
                }
                for name, call in passes.items()
            ],
        )


BENCHMARK = Benchmark(
    "neuron",
    "Forward and backward of one layer of neurons: BPSN against its peers, its implementations, its lengths.",
    {"peers": peers, "implementations": implementations, "length": length},
    tuple(SUBJECTS),
    repeats=9,
)
