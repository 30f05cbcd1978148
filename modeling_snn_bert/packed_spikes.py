"""Spikes at one bit each: what training keeps of them between the forward and the backward pass.

A neuron hands its spikes on as floats, since that is what a matrix product takes, with their packed form attached.
`SpikingLinear` and `keep_packed` save that form for the backward pass, where a plain Linear or attention would keep the
floats. A tensor with no packed form attached goes the plain way, so nothing depends on where a spike came from.

Packed spikes are `[signs, ..., channels / 8]` bytes: bit `k` of byte `i` is channel `8 i + k`. Binary spikes have one
sign; ternary ones have a second plane with the spikes of -1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# Byte `i` of eight, each 0 or 1, times 2^(56 - 7 i) lands on bit 56 + i, and nothing else reaches the highest byte.
_GATHER_BITS = 0x0102040810204080
_ATTRIBUTE = "_packed_spikes"


def pack(spikes: torch.Tensor, ternary: bool) -> torch.Tensor:
    """The packed form of spikes `[..., channels]` with values in {0, 1}, or {-1, 0, 1} if `ternary`.

    Returns:
        `[1 or 2, ..., ceil(channels / 8)]`, uint8.
    """
    planes = torch.stack((spikes > 0, spikes < 0)) if ternary else (spikes > 0)[None]
    planes = nn.functional.pad(planes.view(torch.uint8), (0, -planes.shape[-1] % 8))
    return ((planes.contiguous().view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack(packed: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`: spikes `[..., channels]` of the given dtype."""
    values = torch.arange(256, device=packed.device)[:, None]
    eight_spikes = ((values >> torch.arange(8, device=packed.device)) & 1).to(dtype)
    planes = nn.functional.embedding(packed.int(), eight_spikes).flatten(-2)[..., :channels]
    return planes[0] if len(planes) == 1 else planes[0] - planes[1]


def attach_packed(spikes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`spikes`, with its packed form attached to it.

    Not while a compiler traces the model: it takes no attributes of tensors, and decides itself what to keep. Nor in
    inference mode, where tensors have no version and nothing is kept.
    """
    if not torch.compiler.is_compiling() and not spikes.is_inference():
        setattr(spikes, _ATTRIBUTE, (packed, spikes._version))
    return spikes


def packed_form(spikes: torch.Tensor) -> torch.Tensor | None:
    """The packed form attached to `spikes`, or `None` if there is none or `spikes` was changed in place since."""
    packed, version = getattr(spikes, _ATTRIBUTE, (None, None))
    return packed if packed is not None and spikes._version == version else None


class _LinearOnSpikes(torch.autograd.Function):
    """`linear(spikes, weight, bias)` that keeps the packed spikes, and the weight, for the backward pass."""

    @staticmethod
    def forward(
        spikes: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return nn.functional.linear(spikes, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, packed, weight, _ = inputs
        ctx.save_for_backward(packed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        packed, weight = ctx.saved_tensors
        needs_spikes, _, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad_output.flatten(0, -2)
        grad_spikes = grad_output @ weight if needs_spikes else None
        grad_weight = None
        if needs_weight:
            grad_weight = rows.T @ unpack(packed, weight.shape[1], grad_output.dtype).flatten(0, -2)
        return grad_spikes, None, grad_weight, rows.sum(0) if needs_bias else None


class SpikingLinear(nn.Linear):
    """A Linear that is fed by spikes, and keeps one bit of each for the backward pass.

    An input without a packed form (see the module's description) is treated as `nn.Linear` treats it.
    """

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        packed = packed_form(spikes)
        # With a weight that is not trained nothing of the spikes is kept anyway.
        if packed is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(spikes)
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(spikes.device.type):
            dtype = torch.get_autocast_dtype(spikes.device.type)
            spikes, weight = spikes.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _LinearOnSpikes.apply(spikes, packed, weight, bias)


class _RecomputedFromSpikes(torch.autograd.Function):
    """`function(spikes, others)` that keeps `packed` and `others` only, and runs again in the backward pass."""

    @staticmethod
    def forward(ctx, function: Callable, packed: tuple[torch.Tensor, ...], *tensors: torch.Tensor) -> torch.Tensor:
        spikes, others = tensors[: len(packed)], tensors[len(packed) :]
        ctx.function = function
        ctx.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        ctx.random_state = torch.get_rng_state()
        ctx.forms = [(x.shape[-1], x.dtype) for x in spikes]
        ctx.save_for_backward(*packed, *others)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        enabled, dtype = ctx.autocast
        saved = ctx.saved_tensors
        packed, others = saved[: len(ctx.forms)], saved[len(ctx.forms) :]
        spikes = [unpack(x, *form) for x, form in zip(packed, ctx.forms, strict=True)]
        tensors = [x.detach().requires_grad_() for x in (*spikes, *others)]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", dtype, enabled):
            torch.set_rng_state(ctx.random_state)
            output = ctx.function(*tensors)
        return None, None, *torch.autograd.grad(output, tensors, grad_output)


def recompute_from_spikes(
    function: Callable[..., torch.Tensor], spikes: tuple[torch.Tensor, ...], *others: torch.Tensor
) -> torch.Tensor:
    """`function(*spikes, *others)` on the CPU, of which nothing is kept for the backward pass but the inputs, packed.

    The function runs a second time in the backward pass, with the random numbers of the first.

    Args:
        function: returns one tensor, and takes every tensor that needs a gradient as an argument.
        spikes: tensors with a packed form attached.
        others: further arguments.
    """
    packed = tuple(packed_form(x) for x in spikes)
    return _RecomputedFromSpikes.apply(function, packed, *spikes, *others)


@contextmanager
def keep_packed(*spikes: torch.Tensor) -> Iterator[None]:
    """Within it, autograd keeps the packed forms of `spikes`, and of their views, in place of the floats."""
    forms = {x.untyped_storage().data_ptr(): (packed_form(x), x.shape[-1], x.dtype) for x in spikes}

    def keep(tensor: torch.Tensor) -> tuple:
        form = forms.get(tensor.untyped_storage().data_ptr())
        return (tensor, None) if form is None else (form, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def restore(kept: tuple) -> torch.Tensor:
        value, view = kept
        return value if view is None else unpack(*value).contiguous().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        yield
