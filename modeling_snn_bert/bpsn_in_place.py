"""The BPSN by few torch operations, in place, on one piece of the batch after the other; scans or a stencil integrate.

It is the way where there is no kernel. It keeps the current for the backward pass and computes the potential again
there. On one thread of a CPU, for currents `[64, 128, 384]`, forward and backward pass take half the time of
`by_definition`, and a forward pass alone less than half.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .leaky_integration import (
    fast_stencil,
    plain_sum,
    plain_sum_and_parts,
    plain_sum_backward,
    silence,
    sum_by_group,
    total_weight,
    widen,
)
from .neuron_settings import BPSNParameters, BPSNSettings, BPSNValues
from .surrogate_gradients import SURROGATES

# A stencil runs on about so many currents at a time, which stay in the cache from one operation to the next.
PIECE = 2**18


def spikes_in_place(
    current: torch.Tensor, mask: torch.Tensor | None, parameters: BPSNParameters, settings: BPSNSettings
) -> tuple[torch.Tensor, None]:
    """`bpsn`, with no packed form."""
    x = widen(current)
    values = parameters.values(x.dtype)
    decays = values.decay_forward, values.decay_backward
    stencil = fast_stencil(x, *decays) if settings.implementation == "auto" else None
    weight = total_weight(x, *decays, mask, settings.implementation, stencil) if settings.normalize else None
    return _InPlace.apply(current, mask, weight, stencil, *values, *settings), None


class _InPlace(torch.autograd.Function):
    """`spikes_in_place` from `n` on, `weight` as `[batch or 1, seq_len, groups]` or `None`.

    `stencil` is the kernel from `fast_stencil`, or `None` for scans.
    """

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(
        ctx,
        current: torch.Tensor,
        mask: torch.Tensor | None,
        weight: torch.Tensor | None,
        stencil: torch.Tensor | None,
        *values_and_settings,
    ) -> torch.Tensor:
        values, ctx.settings = values_and_settings[:4], values_and_settings[4:]
        ctx.save_for_backward(current, mask, weight, stencil, *values)
        neuron = _Neuron(BPSNValues(*values), BPSNSettings(*ctx.settings), stencil)
        spikes = torch.empty_like(current, memory_format=torch.contiguous_format)
        for rows in _pieces(current, stencil):
            spikes[rows] = neuron.spikes(current[rows], _of_rows(mask, rows), _of_rows(weight, rows))
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: torch.Tensor):
        current, mask, weight, stencil, *values = ctx.saved_tensors
        neuron = _Neuron(BPSNValues(*values), BPSNSettings(*ctx.settings), stencil)
        grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
        of_pieces: list[list[torch.Tensor]] = []
        for rows in _pieces(current, stencil):
            inputs = grad_spikes[rows], current[rows], _of_rows(mask, rows), _of_rows(weight, rows)
            grad_current[rows], grads_of_piece = neuron.gradients(*inputs)
            of_pieces.append(grads_of_piece)
        grad_weights, *others = zip(*of_pieces, strict=True)
        grad_weight = None if weight is None else torch.cat(grad_weights).sum_to_size(weight.shape)
        grads = [torch.stack(pieces).sum(0) for pieces in others]
        return grad_current, None, grad_weight, None, *grads, *[None] * len(ctx.settings)


class _Neuron(NamedTuple):
    """A `BPSN` at work on a piece of its batch; `stencil` as in `_InPlace`."""

    values: BPSNValues
    settings: BPSNSettings
    stencil: torch.Tensor | None

    def spikes(self, current: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        """The spikes, in the dtype of the integration."""
        x = silence(widen(current), mask)
        margin = _divide_by_group_(plain_sum(x, *self._decays, self.stencil), weight)
        if self.settings.reset_iterations:
            margin = self._subtract_reset_(margin, self._received(margin, mask, weight), weight)
        return self._fire(margin, mask)

    def gradients(
        self,
        grad_spikes: torch.Tensor,
        current: torch.Tensor,
        mask: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient to the current, and those to the weight in every row, the threshold, both decays and reset."""
        x = silence(widen(current), mask)
        potential, parts = plain_sum_and_parts(x, *self._decays, self.stencil)
        _divide_by_group_(potential, weight)
        margin, received = potential, None
        if self.settings.reset_iterations:
            received = self._received(potential, mask, weight)
            margin = self._subtract_reset_(potential.clone(), received, weight)

        grad_spikes = silence(grad_spikes.to(x.dtype), mask)
        derivative, alpha = SURROGATES[self.settings.surrogate], self.settings.surrogate_alpha
        v_threshold, reset = self.values.v_threshold, self.values.reset
        grad_potential = derivative(margin - v_threshold, alpha).mul_(grad_spikes)
        grad_threshold = -grad_potential.sum((0, 1))
        if self.settings.ternary:
            grad_mirrored = derivative(-margin - v_threshold, alpha).mul_(grad_spikes)
            grad_threshold += grad_mirrored.sum((0, 1))
            grad_potential += grad_mirrored

        grad_sum = _divide_by_group_(grad_potential, weight)
        groups = reset.shape[0]
        grad_reset = torch.zeros_like(reset)
        if received is not None:
            grad_reset = sum_by_group(received.mul_(grad_sum), groups).neg_()
        grad_weight = potential.mul_(grad_sum).unflatten(-1, (groups, -1)).sum(-1).neg_()
        grad_x, *grad_decays = plain_sum_backward(grad_sum, parts, *self._decays, self.stencil)
        return _silence_(grad_x, mask), [grad_weight, grad_threshold, *grad_decays, grad_reset]

    @property
    def _decays(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.values.decay_forward, self.values.decay_backward

    def _fire(self, potential: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Spikes in the dtype of the potential, with no gradient."""
        spikes = torch.ge(potential, self.values.v_threshold, out=torch.empty_like(potential))
        if self.settings.ternary:
            spikes.sub_((potential <= -self.values.v_threshold).to(spikes.dtype))
        return _silence_(spikes, mask)

    def _received(
        self, potential: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """`n * r` after all sweeps."""
        margin = potential
        for sweep in range(self.settings.reset_iterations):
            spikes = self._fire(margin, mask)
            received = plain_sum(spikes, *self._decays, self.stencil).sub_(spikes)
            if sweep + 1 < self.settings.reset_iterations:
                margin = self._subtract_reset_(potential.clone(), received, weight)
        return received

    def _subtract_reset_(
        self, potential: torch.Tensor, received: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """`potential - reset * received / weight`, in place of the potential."""
        reset = self.values.reset
        factor = reset if weight is None else reset / weight
        grouped, received = (x.unflatten(-1, (reset.shape[0], -1)) for x in (potential, received))
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


def _silence_(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`silence` of finite values, in place."""
    return x if mask is None else x.mul_(mask.to(x.dtype)[..., None])


def _divide_by_group_(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """`divide_by_group` in place, if there is a weight."""
    if weight is not None:
        x.unflatten(-1, (weight.shape[-1], -1)).div_(weight[..., None])
    return x
