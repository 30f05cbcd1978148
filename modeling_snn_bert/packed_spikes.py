"""Spikes at one bit each: what training keeps of them between the forward and the backward pass.

A neuron hands its spikes on as floats, since that is what a matrix product takes, with their packed form attached.
`SpikingLinear` and `keep_packed` save that form for the backward pass, where a plain Linear or attention would keep the
floats. A tensor with no packed form attached goes the plain way, so nothing depends on where a spike came from.

The invariant: `packed_form(x)` is `None` or the bits of the numbers that `x` holds now. The form is an attribute of the
tensor object that `attach_packed` sets, which views, copies and casts do not have, and it counts no more once `x` has
been written to. Attention functions see views only: there `keep_packed` knows spikes by the address of their memory,
which is theirs alone as long as it holds them, and to which an attention function does not write.

In float32 on the CPU, where the compiled kernels are at hand and few inputs fire, `SpikingLinear` also computes by
events: its output is a sum over the weights of the inputs that fire, and the gradient to its weights a sum over the
tokens at which they do. Only the gradient to the spikes is a dense product.

Packed spikes are `[signs, ..., channels / 8]` bytes: bit `k` of byte `i` is channel `8 i + k`. Binary spikes have one
sign; ternary ones have a second plane with the spikes of -1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules

from .cpu_kernels import PLAIN_TYPES
from .cpu_kernels import available as kernels_available
from .event_kernels import (
    MAX_INPUTS,
    BlockedWeights,
    SpikeLists,
    event_linear,
    list_packed_columns,
    list_packed_spikes,
)
from .packed_spikes_triton import takes_packed, unpack_triton
from .triton_tiles import call_operator

# Byte `i` of eight, each 0 or 1, times 2^(56 - 7 i) lands on bit 56 + i, and nothing else reaches the highest byte.
_GATHER_BITS = 0x0102040810204080
# A byte times the first is eight copies of it, and the second leaves bit `i` of copy `i` (it is 0x8040201008040201).
_COPY_BYTE = 0x0101010101010101
_OWN_BIT = -0x7FBFDFEFF7FBFDFF
_ATTRIBUTE = "_packed_spikes"
# The firing rate below which a product of a training step runs by events.
EVENTS_BELOW = 0.3
_CALL = nn.Module.__call__


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
    if takes_packed(packed, dtype):
        return call_operator(unpack_triton, packed, channels, dtype)
    eight = packed.to(torch.int64, memory_format=torch.contiguous_format).mul_(_COPY_BYTE).bitwise_and_(_OWN_BIT)
    bits = eight.view(torch.uint8)[..., :channels]
    # The comparison itself writes `dtype`: to convert its bools would be another pass.
    planes = torch.ne(bits, 0, out=bits.new_empty(bits.shape, dtype=dtype))
    return planes[0] if len(planes) == 1 else planes[0].sub_(planes[1])


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


def _by_events(
    lists_of: Callable[[torch.Tensor], SpikeLists], packed: torch.Tensor, *dense: torch.Tensor
) -> SpikeLists | None:
    """The lists of `packed` if a product of these spikes is to be computed by events, and `None` if it is not.

    Which way is taken depends on the spikes and the shapes only, so that a run can be repeated bit for bit.
    """
    if not kernels_available():
        return None
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or type(x) not in PLAIN_TYPES for x in dense):
        return None
    if max(packed[0, ..., 0].numel(), 8 * packed.shape[-1]) > MAX_INPUTS:
        return None
    lists = lists_of(packed)
    return lists if lists.firing_rate < EVENTS_BELOW else None


class _LinearsOnSpikes(torch.autograd.Function):
    """`linear(spikes, weight, bias)` for each weight and bias; keeps the packed spikes, and the weights.

    `parameters` are a weight, its bias or `None`, the next weight, and so on. For the backward pass the spikes are
    unpacked, or listed, once.
    """

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(
        ctx, spikes: torch.Tensor, packed: torch.Tensor, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights = [weight for weight in parameters[::2] if weight is not None]
        biases = parameters[1::2]
        ctx.save_for_backward(packed, *weights)
        # The lists are of whole bytes of inputs.
        whole = spikes.shape[-1] % 8 == 0
        lists = _by_events(list_packed_spikes, packed, spikes, *weights) if whole else None
        if lists is None:
            return tuple(nn.functional.linear(spikes, w, bias) for w, bias in zip(weights, biases, strict=True))
        return tuple(
            event_linear(lists, BlockedWeights(w, None, bias, "float32")).unflatten(0, spikes.shape[:-1])
            for w, bias in zip(weights, biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: torch.Tensor):
        packed, *weights = ctx.saved_tensors
        needs_spikes, _, *needs = ctx.needs_input_grad
        rows = [grad.flatten(0, -2) for grad in grad_outputs]
        grads: list[torch.Tensor | None] = [None] * len(needs)
        grads[1::2] = [grad.sum(0) if wanted else None for grad, wanted in zip(rows, needs[1::2], strict=True)]
        learning = [grad for grad, wanted in zip(rows, needs[::2], strict=True) if wanted]
        of_weights = iter(_weight_gradients(packed, learning, weights[0].shape[1]))
        grads[::2] = [next(of_weights) if wanted else None for wanted in needs[::2]]
        grad_spikes = None
        if needs_spikes:
            grad_spikes = rows[0] @ weights[0]
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                grad_spikes.addmm_(grad, weight)
            grad_spikes = grad_spikes.unflatten(0, grad_outputs[0].shape[:-1])
        return grad_spikes, None, *grads


def _weight_gradients(packed: torch.Tensor, grads: list[torch.Tensor], inputs: int) -> list[torch.Tensor]:
    """`grad.T @ spikes`, `[outputs, inputs]`, from packed spikes and each gradient `[rows, outputs]`."""
    if not grads:
        return []
    lists = _by_events(list_packed_columns, packed, *grads)
    if lists is not None:
        return [event_linear(lists, BlockedWeights(grad.T, None, None, "float32"))[:inputs].T for grad in grads]
    spikes = unpack(packed, inputs, grads[0].dtype).flatten(0, -2)
    return [grad.T @ spikes for grad in grads]


class SpikingLinear(nn.Linear):
    """A Linear that is fed by spikes, and keeps one bit of each for the backward pass.

    An input without a packed form (see the module's description) is treated as `nn.Linear` treats it.
    """

    # What computes the product in place of all this, from the module and its input; `event_driven` sets it.
    runner: Any = None

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        if self.runner is not None:
            return self.runner(self, spikes)
        if not self.keeps_packed(spikes):
            return super().forward(spikes)
        [output] = _products([self], spikes)
        return output

    def keeps_packed(self, spikes: torch.Tensor) -> bool:
        """Whether a packed form of `spikes` is there, and wanted: with a weight that is not trained nothing is kept."""
        return packed_form(spikes) is not None and torch.is_grad_enabled() and self.weight.requires_grad

    def extra_repr(self) -> str:
        return super().extra_repr() if self.runner is None else f"{super().extra_repr()}, {self.runner}"


_FORWARD = SpikingLinear.forward


def _products(linears: Sequence[SpikingLinear], spikes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The products of `linears` with spikes that have a packed form."""
    packed = packed_form(spikes)
    parameters = [x for linear in linears for x in (linear.weight, linear.bias)]
    if torch.is_autocast_enabled(spikes.device.type):
        dtype = torch.get_autocast_dtype(spikes.device.type)
        spikes, *parameters = (None if x is None else x.to(dtype) for x in (spikes, *parameters))
    return _LinearsOnSpikes.apply(spikes, packed, *parameters)


def spiking_linears(linears: Sequence[nn.Module], spikes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What each of `linears` makes of the same spikes: `linear(spikes)`.

    If each is a plain `SpikingLinear` that keeps the packed form, they share one backward pass. Others, and those that
    something is hooked to, are called one by one.
    """
    if packed_form(spikes) is not None and calls_run_forward_alone():
        plain = [linear for linear in linears if _is_plain(linear) and linear.keeps_packed(spikes)]
        if len(plain) == len(linears):
            return _products(plain, spikes)
    return tuple(linear(spikes) for linear in linears)


def calls_run_forward_alone() -> bool:
    """Whether a call of a module that has no hooks of its own runs its `forward` and nothing else."""
    hooks = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return not hooks and nn.Module.__call__ is _CALL


def _is_plain(linear: nn.Module) -> TypeGuard[SpikingLinear]:
    """Whether it does forward and backward what this module's `SpikingLinear` does, and nobody looks at it."""
    hooks = (
        linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks,
        torch_modules._global_backward_hooks, torch_modules._global_backward_pre_hooks,
    )  # fmt: skip
    is_own = type(linear) is SpikingLinear and SpikingLinear.forward is _FORWARD and "forward" not in vars(linear)
    return is_own and linear.runner is None and not any(hooks)


def affine(spikes: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`spikes * gain + offset`, with a gain and an offset per channel, `[channels]`."""
    return torch.addcmul(offset, spikes, gain)


def can_keep_packed(*spikes: torch.Tensor) -> bool:
    """Whether autograd is at work and there is a packed form of each of `spikes`."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(packed_form(x) is not None for x in spikes)
    )


@contextmanager
def keep_packed(*spikes: torch.Tensor) -> Iterator[Callable[..., torch.Tensor]]:
    """Within it, autograd keeps the packed forms of `spikes`, and of their views, in place of the floats.

    Gives a function that is `affine` for one of `spikes`. On the CPU its result is kept as packed spikes too; on a GPU
    it is kept as it is, which spares the backward pass some launches.
    """
    restorers: dict[int, Callable[[], torch.Tensor]] = {
        _address(x): partial(unpack, packed, x.shape[-1], x.dtype)
        for x in spikes
        if (packed := packed_form(x)) is not None
    }
    # So that nothing else comes to lie at its address.
    held: list[torch.Tensor] = []

    def affine_of_spikes(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        result = affine(x, gain, offset)
        if result.device.type == "cpu":
            restore_spikes, parameters = restorers[_address(x)], (gain.detach(), offset.detach())
            restorers[_address(result)] = lambda: affine(restore_spikes(), *parameters)
            held.append(result)
        return result

    def keep(tensor: torch.Tensor) -> tuple:
        restorer = restorers.get(_address(tensor))
        if restorer is None:
            return tensor, None
        return restorer, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def restore(kept: tuple) -> torch.Tensor:
        value, view = kept
        return value if view is None else value().contiguous().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        yield affine_of_spikes


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
