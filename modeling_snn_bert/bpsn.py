"""The Bidirectional Parallel Spiking Neuron as a function: its definition, and the ways in which it is computed.

`bpsn` takes the first of `BACKENDS` that takes its arguments. To add one, write a function of the signature of
`by_definition`, and one that says what it takes, and enter them there. `by_definition`, the last of them, is what the
others are tested against.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .bpsn_in_place import spikes_in_place
from .bpsn_segments_triton import bpsn_backward as segments_backward
from .bpsn_segments_triton import bpsn_forward as segments_forward
from .bpsn_triton import MAX_TOKENS, bpsn_tile_backward, bpsn_tile_forward
from .cpu_kernels import SURROGATE_INDEX, bpsn_backward, bpsn_forward
from .cpu_kernels import available as kernels_available
from .leaky_integration import divide_by_group, leaky_mean, silence, total_weight, wide_dtype, widen
from .neuron_settings import BPSNParameters, BPSNSettings
from .surrogate_gradients import fire
from .triton_tiles import call_operator
from .triton_tiles import takes as triton_takes

# Spikes, and their packed form where it comes at no cost.
Spikes = tuple[torch.Tensor, torch.Tensor | None]


def bpsn(
    current: torch.Tensor, mask: torch.Tensor | None, parameters: BPSNParameters, settings: BPSNSettings
) -> Spikes:
    """Spikes of a `BPSN`, by the fastest way there is.

    Args:
        current (`[batch, seq_len, channels]`, floating point): input current.
        mask (`[batch, seq_len]`, bool or numeric): 1 at valid tokens, 0 at padding.
        parameters: a threshold for each channel; decays and reset for each group, whose number divides `channels`.
        settings: `implementation="auto"` leaves the way to this function.

    Returns:
        Spikes of the shape and dtype of `current`, 0 at masked tokens; and their packed form (see `packed_spikes`) if
        the way that was taken has it anyway.
    """
    settings = _of_graph(settings)
    backend = next(backend for backend in BACKENDS if backend.takes(current, parameters, settings))
    return backend.spikes(current, mask, parameters, settings)


def membrane_potential(
    current: torch.Tensor, mask: torch.Tensor | None, parameters: BPSNParameters, settings: BPSNSettings
) -> torch.Tensor:
    """The potential of a `BPSN` before any reset, `[batch, seq_len, channels]`, 0 at masked tokens."""
    settings = _of_graph(settings)
    decays = parameters.decay_forward, parameters.decay_backward
    return leaky_mean(current, *decays, mask, settings.normalize, settings.implementation)


def by_definition(
    current: torch.Tensor, mask: torch.Tensor | None, parameters: BPSNParameters, settings: BPSNSettings
) -> Spikes:
    """The equations of `BPSN`, on top of `leaky_integration`."""
    x = widen(current)
    v_threshold, decay_forward, decay_backward, reset = parameters.values(x.dtype)
    decays, implementation = (decay_forward, decay_backward), settings.implementation
    reset = reset.repeat_interleave(x.shape[-1] // reset.shape[0])

    def spikes_of(potential: torch.Tensor) -> torch.Tensor:
        spikes = fire(potential, v_threshold, settings.surrogate, settings.surrogate_alpha, settings.ternary)
        return silence(spikes, mask)

    potential = leaky_mean(x, *decays, mask, settings.normalize, implementation)
    margin = potential
    for _ in range(settings.reset_iterations):
        # What is received carries no gradient, as is usual for a reset.
        with torch.no_grad():
            spikes = spikes_of(margin)
            received = leaky_mean(spikes, *decays, mask, False, implementation) - spikes
            if settings.normalize:
                received = divide_by_group(received, total_weight(x, *decays, mask, implementation))
        margin = potential - reset * received
    return spikes_of(margin).to(current.dtype), None


class _Operators(NamedTuple):
    """A kernel as torch operators, all with the arguments of those in `cpu_kernels`.

    `wide` says that they take the dtype of the integration only; `trained`, that they take `BPSNParameters` as they are
    and not their values.
    """

    forward: Callable
    backward: Callable
    wide: bool = False
    trained: bool = False


_OPERATORS = {
    "triton": _Operators(
        partial(call_operator, bpsn_tile_forward), partial(call_operator, bpsn_tile_backward), trained=True
    ),
    "triton_segments": _Operators(segments_forward, segments_backward),
    "cpu": _Operators(bpsn_forward, bpsn_backward, wide=True),
}


class _ByKernel(torch.autograd.Function):
    """A `BPSN` from currents to spikes, as floats and packed, by a kernel; keeps the current for the backward pass.

    `kernel` is a key of `_OPERATORS`. The `others` are those of its backward operator (see `BACKWARD_SCHEMA` in
    `cpu_kernels`) from the mask on: five tensors, then the settings.
    """

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(ctx, kernel: str, current: torch.Tensor, *others) -> tuple[torch.Tensor, torch.Tensor]:
        operators = _OPERATORS[kernel]
        # The forward operator takes all but the last two, the surrogate and its alpha.
        spikes, packed = operators.forward(widen(current) if operators.wide else current, *others[:-2])
        ctx.kernel, ctx.settings = kernel, others[5:]
        ctx.save_for_backward(current, *others[:5])
        ctx.mark_non_differentiable(packed)
        return spikes.to(current.dtype), packed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: torch.Tensor, grad_packed: None):
        operators, (current, *others) = _OPERATORS[ctx.kernel], ctx.saved_tensors
        x = widen(current) if operators.wide else current
        grad_x, *grads = operators.backward(grad_spikes.to(x.dtype), x, *others, *ctx.settings)
        # An operator returns no `None`.
        grads = [None if x is None else grad for x, grad in zip(others[1:], grads, strict=True)]
        return None, grad_x.to(current.dtype), None, *grads, *[None] * len(ctx.settings)


def _by_kernel(kernel: str) -> Callable[..., Spikes]:
    """The spikes of a backend that is a kernel."""

    def spikes(
        current: torch.Tensor, mask: torch.Tensor | None, parameters: BPSNParameters, settings: BPSNSettings
    ) -> Spikes:
        trained = _OPERATORS[kernel].trained
        tensors = parameters if trained else parameters.values(wide_dtype(current.dtype))
        return _ByKernel.apply(kernel, current, mask, *tensors, *settings[:-1])

    return spikes


def _kernels_know(settings: BPSNSettings) -> bool:
    """Whether the choice is ours, the kernels know the surrogate, and no graph is written that lacks them."""
    return settings.implementation == "auto" and settings.surrogate in SURROGATE_INDEX and not torch.jit.is_tracing()


def _triton_takes(current: torch.Tensor, parameters: BPSNParameters, settings: BPSNSettings) -> bool:
    return _segments_take(current, parameters, settings) and current.shape[1] <= MAX_TOKENS


def _segments_take(current: torch.Tensor, parameters: BPSNParameters, settings: BPSNSettings) -> bool:
    return _kernels_know(settings) and triton_takes(current)


def is_for_cpu_kernel(current: torch.Tensor, parameters: BPSNParameters, settings: BPSNSettings) -> bool:
    """Whether the CPU's kernel would compute this, were it there.

    It packs group by group, whose channels must come in whole bytes.
    """
    return (
        _kernels_know(settings)
        and current.device.type == "cpu"
        and wide_dtype(current.dtype) == torch.float32
        and current.shape[-1] // parameters.decay_forward_logit.shape[0] % 8 == 0
    )


def _cpu_kernel_takes(current: torch.Tensor, parameters: BPSNParameters, settings: BPSNSettings) -> bool:
    return is_for_cpu_kernel(current, parameters, settings) and kernels_available()


def _in_place_takes(current: torch.Tensor, parameters: BPSNParameters, settings: BPSNSettings) -> bool:
    return settings.implementation in ("auto", "chunked")


class Backend(NamedTuple):
    """A way to compute a `BPSN`: `takes(current, parameters, settings)`, and spikes as `bpsn` returns them."""

    takes: Callable[[torch.Tensor, BPSNParameters, BPSNSettings], bool]
    spikes: Callable[[torch.Tensor, torch.Tensor | None, BPSNParameters, BPSNSettings], Spikes]


BACKENDS = (
    Backend(_triton_takes, _by_kernel("triton")),
    Backend(_segments_take, _by_kernel("triton_segments")),
    Backend(_cpu_kernel_takes, _by_kernel("cpu")),
    Backend(_in_place_takes, spikes_in_place),
    Backend(lambda *_: True, by_definition),
)


def _of_graph(settings: BPSNSettings) -> BPSNSettings:
    """The settings; in an exported graph, whose length is open, `"auto"` is what has a fixed number of steps."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return settings._replace(implementation="toeplitz") if exporting and settings.implementation == "auto" else settings
