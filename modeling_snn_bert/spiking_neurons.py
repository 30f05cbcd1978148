"""Spiking neurons over a sequence of tokens (token = time-step): BPSN and the baselines LIF and PSN.

All neurons share one interface: input currents `[batch, seq_len, channels]` and an attention mask `[batch, seq_len]`
in, spikes of the same shape and dtype out. Spikes are in {0, 1}, or in {-1, 0, 1} with `spike_type="ternary"`, and
are 0 at masked tokens. Channels are cut into `num_groups` blocks of consecutive channels; decays and resets are
learned per group, thresholds per channel.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .bpsn_triton import MAX_TOKENS, BPSNByTile
from .cpu_kernels import SURROGATE_INDEX, bpsn_backward, bpsn_forward, warn_if_missing
from .cpu_kernels import available as kernels_available
from .leaky_integration import (
    check_implementation,
    check_sequence,
    divide_by_group,
    fast_stencil,
    kernel_per_channel,
    leaky_sum,
    plain_sum,
    plain_sum_and_parts,
    plain_sum_backward,
    silence,
    sum_by_group,
    total_weight,
    wide_dtype,
    widen,
)
from .leaky_integration_triton import bpsn_backward as triton_backward
from .leaky_integration_triton import bpsn_forward as triton_forward
from .leaky_integration_triton import takes as triton_takes
from .packed_spikes import attach_packed, pack, packed_form
from .surrogate_gradients import SURROGATES, check_surrogate, heaviside

SPIKE_TYPES = ("binary", "ternary")
# Filters run on about so many currents at a time, which stay in the cache from one operation to the next.
PIECE = 2**18


class SpikingNeuron(nn.Module):
    """What every neuron here has: a threshold per channel, a spike function, and the checks of its arguments.

    Subclasses define `spikes(current, attention_mask)` and the initial values of their parameters.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        v_threshold: float,
        surrogate: str,
        surrogate_alpha: float,
        spike_type: str,
    ) -> None:
        super().__init__()
        if num_channels < 1 or num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"`num_groups` must divide `num_channels`, both positive; got {num_groups} groups for {num_channels}"
            )
        if not math.isfinite(v_threshold):
            raise ValueError(f"`v_threshold` must be finite, got {v_threshold}")
        check_surrogate(surrogate, surrogate_alpha)
        if spike_type not in SPIKE_TYPES:
            raise ValueError(f"`spike_type` must be one of {list(SPIKE_TYPES)}, got {spike_type!r}")
        self.num_channels = num_channels
        self.num_groups = num_groups
        self.initial_v_threshold = v_threshold
        self.surrogate = surrogate
        self.surrogate_alpha = surrogate_alpha
        self.spike_type = spike_type
        self.v_threshold = nn.Parameter(torch.empty(num_channels))

    def initial_values(self) -> dict[str, float]:
        """The value that each parameter starts from, by its name."""
        return {"v_threshold": self.initial_v_threshold}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for name, value in self.initial_values().items():
            getattr(self, name).fill_(value)

    def forward(self, current: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The spikes that the class describes.

        Args:
            current (`[batch, seq_len, num_channels]`, floating point): input current.
            attention_mask (`[batch, seq_len]`, bool or numeric): 1 at valid tokens, 0 at padding.

        Returns:
            Spikes of the shape and dtype of `current`, 0 at masked tokens. In training their packed form is attached
            (see `packed_spikes`).

        Raises:
            ValueError: if a shape is wrong, or is none that this neuron can take.
            TypeError: if `current` is not floating point.
        """
        self.check_current(current, attention_mask)
        spikes = self.spikes(current, attention_mask)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and packed_form(spikes) is None:
            attach_packed(spikes, pack(spikes.detach(), self.spike_type == "ternary"))
        return spikes

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`forward` on arguments that have been checked."""
        raise NotImplementedError

    def fire(self, potential: torch.Tensor, v_threshold: torch.Tensor) -> torch.Tensor:
        """Spikes where the potential reaches the threshold; ternary neurons also fire -1 at its mirror image."""
        spikes = heaviside(potential - v_threshold, self.surrogate, self.surrogate_alpha)
        if self.spike_type == "ternary":
            spikes = spikes - heaviside(-potential - v_threshold, self.surrogate, self.surrogate_alpha)
        return spikes

    def check_current(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Raise an error that names the argument unless the shapes are those that this neuron takes."""
        check_sequence(current, attention_mask)
        if current.shape[-1] != self.num_channels:
            raise ValueError(f"`current` must have {self.num_channels} channels, got {list(current.shape)}")

    def per_channel(self, value: torch.Tensor) -> torch.Tensor:
        """A value per group, `[groups]`, repeated for each channel of its group, `[channels]`."""
        return value.repeat_interleave(self.num_channels // self.num_groups)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {self.num_groups}, surrogate={self.surrogate!r}, spike_type={self.spike_type!r}"


class BPSN(SpikingNeuron):
    """The Bidirectional Parallel Spiking Neuron.

    Its membrane potential is a leaky mean of the currents of all valid tokens, earlier ones through
    `decay_forward` and later ones through `decay_backward`, and its spikes are found for all tokens at once. A
    provisional spike at one token lowers the potential at its neighbours (the soft reset), which keeps a charged
    neuron from firing without end:

        v[t]  = sum_j a[t, j] m[j] I[j] / n[t]
        s0[t] = H(v[t] - v_threshold)
        r[t]  = sum_{j != t} a[t, j] m[j] s0[j] / n[t]
        s[t]  = H(v[t] - reset * r[t] - v_threshold)

    with `a`, `m` and `n` of `leaky_integration`. The last two lines are one step of the fixed-point iteration whose
    limit, for a forward-only neuron without normalisation and with `reset = v_threshold`, is the spike train of the
    leaky integrate-and-fire neuron with soft reset. The idea of the neuron is that of Su et al., "SNN-BERT", Neural
    Networks 180, 2024, whose equations are not public; these are this project's own.

    Args:
        num_channels: channels of the current.
        num_groups: blocks of channels that share decays and reset.
        v_threshold: initial threshold, in units of the potential.
        decay: initial decay per token in both directions, in (0, 1).
        reset: initial strength of the reset, >= 0.
        reset_iterations: sweeps of the reset; 0 switches it off. The sweeps alternate: an odd one starts from too
            many spikes and an even one from too few, so with a strong reset a few more sweeps are not better.
        normalize: divide by `n[t]`. Without it the potential is a plain leaky sum.
        bidirectional: integrate in both directions; otherwise from earlier to later tokens only.
        surrogate, surrogate_alpha: the surrogate gradient (see `surrogate_gradients`).
        spike_type: `"binary"` or `"ternary"`.
        implementation: how the integration is computed (see `leaky_integration`).

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        v_threshold: float = 1.0,
        decay: float = 0.05,
        reset: float = 0.05,
        reset_iterations: int = 1,
        normalize: bool = True,
        bidirectional: bool = True,
        surrogate: str = "atan",
        surrogate_alpha: float = 2.0,
        spike_type: str = "binary",
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            num_channels,
            num_groups,
            v_threshold=v_threshold,
            surrogate=surrogate,
            surrogate_alpha=surrogate_alpha,
            spike_type=spike_type,
        )
        check_decay(decay)
        if not (math.isfinite(reset) and reset >= 0):
            raise ValueError(f"`reset` must be finite and >= 0, got {reset}")
        if reset_iterations < 0:
            raise ValueError(f"`reset_iterations` must be >= 0, got {reset_iterations}")
        check_implementation(implementation)
        self.initial_decay = decay
        self.initial_reset = reset
        self.reset_iterations = reset_iterations
        self.normalize = normalize
        self.bidirectional = bidirectional
        self.implementation = implementation
        self.decay_forward_logit = nn.Parameter(torch.empty(num_groups))
        if bidirectional:
            self.decay_backward_logit = nn.Parameter(torch.empty(num_groups))
        if reset_iterations:
            # Used through its absolute value: never negative, exact, and with a gradient everywhere (see `soft_reset`).
            self.reset_strength = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def initial_values(self) -> dict[str, float]:
        values = super().initial_values()
        values["decay_forward_logit"] = logit(self.initial_decay)
        if self.bidirectional:
            values["decay_backward_logit"] = logit(self.initial_decay)
        if self.reset_iterations:
            values["reset_strength"] = self.initial_reset
        return values

    @property
    def decay_forward(self) -> torch.Tensor:
        """Decay per token from earlier to later tokens, `[groups]`."""
        return torch.sigmoid(widen(self.decay_forward_logit))

    @property
    def decay_backward(self) -> torch.Tensor:
        """Decay per token from later to earlier tokens, `[groups]`; zeros if the neuron looks forward only."""
        if not self.bidirectional:
            return torch.zeros_like(self.decay_forward_logit)
        return torch.sigmoid(widen(self.decay_backward_logit))

    @property
    def soft_reset(self) -> torch.Tensor:
        """Strength of the soft reset, `[groups]`; zeros if it is switched off."""
        if not self.reset_iterations:
            return torch.zeros_like(self.decay_forward_logit)
        # Not `abs()`, whose gradient at 0 is 0: a reset that starts there could never grow.
        return torch.where(self.reset_strength < 0, -self.reset_strength, self.reset_strength)

    def membrane_potential(self, current: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The potential `v` before any reset.

        Args:
            current (`[batch, seq_len, channels]`): input current.
            attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.

        Returns:
            `[batch, seq_len, channels]` in the dtype of `current`, 0 at masked tokens.
        """
        self.check_current(current, attention_mask)
        x = widen(current)
        potential = self._leaky_mean(x, attention_mask, self._total_weight(x, attention_mask))
        return silence(potential, attention_mask).to(current.dtype)

    @property
    def _integration(self) -> str:
        """The implementation in use: in an exported graph, whose length is open, the one of a fixed number of steps."""
        return "toeplitz" if self.implementation == "auto" and _is_exporting() else self.implementation

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        settings = [self.reset_iterations, self.spike_type == "ternary", self.surrogate, self.surrogate_alpha]
        by_triton = self._may_use_kernels() and triton_takes(current)
        if by_triton and current.shape[1] <= MAX_TOKENS:
            names = ("v_threshold", "decay_forward_logit", "decay_backward_logit", "reset_strength")
            trained = [getattr(self, name, None) for name in names]
            return attach_packed(*BPSNByTile.apply(current, attention_mask, *trained, self.normalize, *settings))
        dtype = wide_dtype(current.dtype)
        parameters = [x.to(dtype) for x in (self.v_threshold, self.decay_forward, self.decay_backward, self.soft_reset)]
        if by_triton or (self._may_use_kernels() and self._cpu_kernel_takes(current)):
            spikes, packed = BPSNByKernel.apply(
                current, attention_mask, *parameters, by_triton, self.normalize, *settings
            )
            return attach_packed(spikes, packed)
        x = widen(current)
        if self._integration in ("auto", "chunked"):
            _, f, b, _ = parameters
            stencil = fast_stencil(x, f, b) if self._integration == "auto" else None
            weight = total_weight(x, f, b, attention_mask, self._integration, stencil) if self.normalize else None
            return BPSNInPlace.apply(current, attention_mask, weight, stencil, *parameters, *settings)
        weight = self._total_weight(x, attention_mask)
        potential = self._leaky_mean(x, attention_mask, weight)
        v_threshold = parameters[0]
        if self.reset_iterations:
            received = self._received_reset(potential, v_threshold, attention_mask, weight)
            potential = potential - self.per_channel(parameters[3]) * received
        return silence(self.fire(potential, v_threshold), attention_mask).to(current.dtype)

    def _may_use_kernels(self) -> bool:
        """Whether the choice is ours, the kernels know the surrogate, and no graph is written that lacks them."""
        return (
            self.implementation == "auto"
            and self.surrogate in SURROGATE_INDEX
            and not torch.jit.is_tracing()
            and not _is_exporting()
        )

    def _cpu_kernel_takes(self, current: torch.Tensor) -> bool:
        """Whether the CPU's kernel computes this; it packs group by group, whose channels must come in whole bytes."""
        takes = (
            current.device.type == "cpu"
            and wide_dtype(current.dtype) == torch.float32
            and (self.num_channels // self.num_groups) % 8 == 0
        )
        if takes and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warn_if_missing()
        return takes and kernels_available()

    def _total_weight(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        if not self.normalize:
            return None
        return total_weight(
            x, self.decay_forward.to(x.dtype), self.decay_backward.to(x.dtype), attention_mask, self._integration
        )

    def _leaky_mean(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        weight: torch.Tensor | None,
        without_self: bool = False,
    ) -> torch.Tensor:
        """`sum_j a[t, j] m[j] x[j] / n[t]`, over all `j` or over `j != t`."""
        x = silence(x, attention_mask)
        total = leaky_sum(x, self.decay_forward.to(x.dtype), self.decay_backward.to(x.dtype), self._integration)
        total = total - x if without_self else total
        return total if weight is None else divide_by_group(total, weight)

    @torch.no_grad()
    def _received_reset(
        self,
        potential: torch.Tensor,
        v_threshold: torch.Tensor,
        attention_mask: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """`r` after `reset_iterations` sweeps. It carries no gradient, as is usual for a reset."""
        reset = self.per_channel(self.soft_reset.to(potential.dtype))
        spikes = self.fire(potential, v_threshold)
        received = self._leaky_mean(spikes, attention_mask, weight, without_self=True)
        for _ in range(self.reset_iterations - 1):
            spikes = self.fire(potential - reset * received, v_threshold)
            received = self._leaky_mean(spikes, attention_mask, weight, without_self=True)
        return received

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, reset_iterations={self.reset_iterations}, normalize={self.normalize}, "
            f"bidirectional={self.bidirectional}"
        )


class BPSNByKernel(torch.autograd.Function):
    """`BPSN` from currents to spikes by a kernel; returns them as floats and packed.

    The kernel is that of `leaky_integration_triton` if `by_triton`, and otherwise the CPU's (see `cpu_kernels`). It
    keeps the current for the backward pass. The other arguments are those of `BPSNInPlace`, with `normalize` for the
    weight.
    """

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(
        ctx,
        current: torch.Tensor,
        attention_mask: torch.Tensor | None,
        v_threshold: torch.Tensor,
        decay_forward: torch.Tensor,
        decay_backward: torch.Tensor,
        reset: torch.Tensor,
        by_triton: bool,
        normalize: bool,
        reset_iterations: int,
        ternary: bool,
        surrogate: str,
        alpha: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The GPU's kernel reads half precision itself.
        spikes, packed = (triton_forward if by_triton else bpsn_forward)(
            current if by_triton else widen(current),
            attention_mask,
            v_threshold,
            decay_forward,
            decay_backward,
            reset,
            normalize,
            reset_iterations,
            ternary,
        )
        ctx.save_for_backward(current, attention_mask, v_threshold, decay_forward, decay_backward, reset)
        ctx.by_triton = by_triton
        ctx.settings = normalize, reset_iterations, ternary, surrogate, alpha
        ctx.mark_non_differentiable(packed)
        return spikes.to(current.dtype), packed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: torch.Tensor, grad_packed: None):
        current, *others = ctx.saved_tensors
        x = current if ctx.by_triton else widen(current)
        backward = triton_backward if ctx.by_triton else bpsn_backward
        grad_x, *grads = backward(grad_spikes.to(x.dtype), x, *others, *ctx.settings)
        return grad_x.to(current.dtype), None, *grads, None, *[None] * len(ctx.settings)


class BPSNInPlace(torch.autograd.Function):
    """`BPSN` from currents to spikes by few torch operations, in place and on one piece of the batch after the other.

    It keeps the current for the backward pass and computes the potential again there. `current` is
    `[batch, seq_len, channels]`, `weight` is `n` as `[batch or 1, seq_len, groups]` or `None`, `stencil` is the kernel
    from `fast_stencil`, or `None` for scans, `v_threshold` is `[channels]`, the decays and `reset` are `[groups]`, all
    in the dtype that the current is integrated in.
    """

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(
        ctx,
        current: torch.Tensor,
        attention_mask: torch.Tensor | None,
        weight: torch.Tensor | None,
        stencil: torch.Tensor | None,
        v_threshold: torch.Tensor,
        decay_forward: torch.Tensor,
        decay_backward: torch.Tensor,
        reset: torch.Tensor,
        reset_iterations: int,
        ternary: bool,
        surrogate: str,
        alpha: float,
    ) -> torch.Tensor:
        parameters = v_threshold, decay_forward, decay_backward, reset
        ctx.save_for_backward(current, attention_mask, weight, stencil, *parameters)
        ctx.settings = reset_iterations, ternary, surrogate, alpha
        neuron = _Neuron.of(stencil, *parameters, reset_iterations, ternary)
        spikes = torch.empty_like(current, memory_format=torch.contiguous_format)
        for rows in _pieces(current, stencil):
            spikes[rows] = neuron.spikes(current[rows], _of_rows(attention_mask, rows), _of_rows(weight, rows))
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: torch.Tensor):
        current, attention_mask, weight, stencil, *parameters = ctx.saved_tensors
        reset_iterations, ternary, surrogate, alpha = ctx.settings
        neuron = _Neuron.of(stencil, *parameters, reset_iterations, ternary)
        grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
        of_pieces: list[list[torch.Tensor]] = []
        for rows in _pieces(current, stencil):
            inputs = grad_spikes[rows], current[rows], _of_rows(attention_mask, rows), _of_rows(weight, rows)
            grad_current[rows], grads_of_piece = neuron.gradients(*inputs, surrogate, alpha)
            of_pieces.append(grads_of_piece)
        grad_weights, *others = zip(*of_pieces, strict=True)
        grad_weight = None if weight is None else torch.cat(grad_weights).sum_to_size(weight.shape)
        grads = [torch.stack(pieces).sum(0) for pieces in others]
        return grad_current, None, grad_weight, None, *grads, *[None] * 4


class _Neuron(NamedTuple):
    """A `BPSN` at work on a piece of its batch, for `BPSNInPlace`.

    `stencil` is per channel; `neighbours` is the same without the token itself.
    """

    stencil: torch.Tensor | None
    neighbours: torch.Tensor | None
    v_threshold: torch.Tensor
    decay_forward: torch.Tensor
    decay_backward: torch.Tensor
    reset: torch.Tensor
    reset_iterations: int
    ternary: bool

    @staticmethod
    def of(stencil: torch.Tensor | None, v_threshold: torch.Tensor, *others) -> "_Neuron":
        neighbours = None
        if stencil is not None:
            stencil = kernel_per_channel(stencil, v_threshold.shape[0])
            neighbours = stencil.clone()
            neighbours[:, stencil.shape[1] // 2] = 0
        return _Neuron(stencil, neighbours, v_threshold, *others)

    def spikes(
        self, current: torch.Tensor, attention_mask: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """The spikes, in the dtype of the integration."""
        x = silence(widen(current), attention_mask)
        margin = divide_by_group_(plain_sum(x, self.decay_forward, self.decay_backward, self.stencil), weight)
        if self.reset_iterations:
            margin = self._subtract_reset_(margin, self._received(margin, attention_mask, weight), weight)
        return silence_(_fire(margin, self.v_threshold, self.ternary), attention_mask)

    def gradients(
        self,
        grad_spikes: torch.Tensor,
        current: torch.Tensor,
        attention_mask: torch.Tensor | None,
        weight: torch.Tensor | None,
        surrogate: str,
        alpha: float,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient to the current, and those to the weight in every row, the threshold, both decays and reset."""
        x = silence(widen(current), attention_mask)
        decays = self.decay_forward, self.decay_backward
        potential, parts = plain_sum_and_parts(x, *decays, self.stencil)
        divide_by_group_(potential, weight)
        margin, received = potential, None
        if self.reset_iterations:
            received = self._received(potential, attention_mask, weight)
            margin = self._subtract_reset_(potential.clone(), received, weight)

        grad_spikes = silence(grad_spikes.to(x.dtype), attention_mask)
        derivative = SURROGATES[surrogate]
        grad_potential = derivative(margin - self.v_threshold, alpha).mul_(grad_spikes)
        grad_threshold = -grad_potential.sum((0, 1))
        if self.ternary:
            grad_mirrored = derivative(-margin - self.v_threshold, alpha).mul_(grad_spikes)
            grad_threshold += grad_mirrored.sum((0, 1))
            grad_potential += grad_mirrored

        grad_sum = divide_by_group_(grad_potential, weight)
        groups = self.reset.shape[0]
        grad_reset = torch.zeros_like(self.reset)
        if received is not None:
            grad_reset = sum_by_group(received.mul_(grad_sum), groups).neg_()
        grad_weight = potential.mul_(grad_sum).unflatten(-1, (groups, -1)).sum(-1).neg_()
        grad_x, *grad_decays = plain_sum_backward(grad_sum, parts, *decays, self.stencil)
        return silence_(grad_x, attention_mask), [grad_weight, grad_threshold, *grad_decays, grad_reset]

    def _received(
        self, potential: torch.Tensor, attention_mask: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """`n * r` after all sweeps."""
        margin = potential
        for sweep in range(self.reset_iterations):
            spikes = silence_(_fire(margin, self.v_threshold, self.ternary), attention_mask)
            received = plain_sum(spikes, self.decay_forward, self.decay_backward, self.neighbours)
            if self.neighbours is None:
                received.sub_(spikes)
            if sweep + 1 < self.reset_iterations:
                margin = self._subtract_reset_(potential.clone(), received, weight)
        return received

    def _subtract_reset_(
        self, potential: torch.Tensor, received: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """`potential - reset * received / weight`, in place of the potential."""
        factor = self.reset if weight is None else self.reset / weight
        grouped, received = (x.unflatten(-1, (self.reset.shape[0], -1)) for x in (potential, received))
        grouped.addcmul_(received, factor[..., None], value=-1)
        return potential


def _pieces(current: torch.Tensor, stencil: torch.Tensor | None) -> list[slice]:
    """Slices of the batch. Scans take it whole: they are too many operations to be repeated."""
    batch, length, channels = current.shape
    size = batch if stencil is None else max(1, PIECE // (length * channels))
    return [slice(first, first + size) for first in range(0, batch, size)]


def _of_rows(x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The part of a mask or weight that belongs to `rows`; one that has a single row belongs to all."""
    return x if x is None or len(x) == 1 else x[rows]


def _fire(potential: torch.Tensor, v_threshold: torch.Tensor, ternary: bool) -> torch.Tensor:
    """Spikes in the dtype of the potential, with no gradient."""
    spikes = torch.ge(potential, v_threshold, out=torch.empty_like(potential))
    return spikes.sub_((potential <= -v_threshold).to(spikes.dtype)) if ternary else spikes


class LIF(SpikingNeuron):
    """The leaky integrate-and-fire neuron with soft reset, stepped one after the other (the baseline).

        v[t] = decay * (v[t - 1] - v_threshold * s[t - 1]) + I[t],    s[t] = H(v[t] - v_threshold)

    The reset carries no gradient. With `num_timesteps=None` the time-steps are the tokens (individual coding). With
    a number, the batch holds that many copies of the input, `[num_timesteps * batch, seq_len, channels]` with the
    time-step as the slowest index, and the neuron of each token steps through them (repeat coding).

    Args:
        num_channels, num_groups, v_threshold, decay, surrogate, surrogate_alpha, spike_type: as for `BPSN`.
        num_timesteps: time-steps of the repeat coding, or `None` to step through the tokens.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        v_threshold: float = 1.0,
        decay: float = 0.5,
        surrogate: str = "atan",
        surrogate_alpha: float = 2.0,
        spike_type: str = "binary",
        num_timesteps: int | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            num_groups,
            v_threshold=v_threshold,
            surrogate=surrogate,
            surrogate_alpha=surrogate_alpha,
            spike_type=spike_type,
        )
        check_decay(decay)
        if num_timesteps is not None and num_timesteps < 1:
            raise ValueError(f"`num_timesteps` must be >= 1 or None, got {num_timesteps}")
        self.initial_decay = decay
        self.num_timesteps = num_timesteps
        self.decay_logit = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def initial_values(self) -> dict[str, float]:
        return {**super().initial_values(), "decay_logit": logit(self.initial_decay)}

    @property
    def decay(self) -> torch.Tensor:
        """Decay per time-step, `[groups]`."""
        return torch.sigmoid(widen(self.decay_logit))

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.num_timesteps is None:
            time_dim, steps = 1, widen(current)
        else:
            if current.shape[0] % self.num_timesteps:
                raise ValueError(
                    f"`current` must hold {self.num_timesteps} time-steps along the batch, got {list(current.shape)}"
                )
            time_dim, steps = 0, widen(current).unflatten(0, (self.num_timesteps, -1))
        mask = current.new_ones(current.shape[:2]) if attention_mask is None else attention_mask
        silent = (mask == 0).reshape(*steps.shape[:-1], 1)
        steps = steps.masked_fill(silent, 0)
        decay = self.per_channel(self.decay.to(steps.dtype))
        v_threshold = self.v_threshold.to(steps.dtype)
        charge = torch.zeros_like(steps.select(time_dim, 0))
        spikes = []
        for step, is_silent in zip(steps.unbind(time_dim), silent.unbind(time_dim), strict=True):
            potential = decay * charge + step
            # A masked token neither fires nor resets.
            spikes.append(self.fire(potential, v_threshold).masked_fill(is_silent, 0))
            charge = potential - v_threshold.detach() * spikes[-1].detach()
        return torch.stack(spikes, time_dim).reshape(current.shape).to(current.dtype)


class PSN(SpikingNeuron):
    """The Parallel Spiking Neuron with a learned `T x T` matrix and no reset (the baseline).

        v = W I,    s[t] = H(v[t] - v_threshold)

    with `W` shared by all channels, as in Fang et al., "Parallel Spiking Neurons with High Efficiency and Ability to
    Learn Long-term Dependencies", NeurIPS 2023. Its length is fixed. `W` starts as the identity.

    Args:
        num_channels, num_groups, v_threshold, surrogate, surrogate_alpha, spike_type: as for `BPSN`.
        length: the number of tokens `T` that it takes.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        length: int,
        v_threshold: float = 1.0,
        surrogate: str = "atan",
        surrogate_alpha: float = 2.0,
        spike_type: str = "binary",
    ) -> None:
        super().__init__(
            num_channels,
            num_groups,
            v_threshold=v_threshold,
            surrogate=surrogate,
            surrogate_alpha=surrogate_alpha,
            spike_type=spike_type,
        )
        if length < 1:
            raise ValueError(f"`length` must be >= 1, got {length}")
        self.length = length
        self.weight = nn.Parameter(torch.empty(length, length))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.copy_(torch.eye(self.length))

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if current.shape[1] != self.length:
            raise ValueError(
                f"a PSN has weights for exactly {self.length} tokens, got seq_len = {current.shape[1]}: pad or cut "
                "the input to that length, or use a neuron that takes any length (neuron_type='bpsn')"
            )
        x = silence(widen(current), attention_mask)
        with torch.autocast(x.device.type, enabled=False):
            potential = torch.einsum("tj,bjc->btc", self.weight.to(x.dtype), x)
        spikes = self.fire(potential, self.v_threshold.to(x.dtype))
        return silence(spikes, attention_mask).to(current.dtype)


def silence_(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Zero finite values at masked tokens, in place."""
    return x if attention_mask is None else x.mul_(attention_mask.to(x.dtype)[..., None])


def divide_by_group_(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Divide the channels of `x`, `[batch, seq_len, channels]`, by their group's `weight`, in place."""
    if weight is not None:
        x.unflatten(-1, (weight.shape[-1], -1)).div_(weight[..., None])
    return x


def _is_exporting() -> bool:
    """Whether the model is being written down as a graph, for places that do not know this package's operators."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def logit(decay: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(decay / (1 - decay))


def check_decay(decay: float) -> None:
    """Raise a `ValueError` unless `decay` can be the sigmoid of a logit."""
    if not 0 < decay < 1:
        raise ValueError(f"`decay` must lie in (0, 1), got {decay}")
