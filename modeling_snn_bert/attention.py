"""Attention: functions with the interface of those of transformers, each of which can stand in another's place.

They take the module, `query`, `key` and `value` (`[batch, heads, seq_len, head_size]`), the `attention_mask` that
transformers makes for the implementation in use (broadcast to `[batch, heads, seq_len, seq_len]`; bool, or numbers that
are added to the scores), `scaling` of the scores and `dropout`. They return the context `[batch, seq_len, heads,
head_size]` and the attention weights `[batch, heads, seq_len, seq_len]`, or `None`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .leaky_integration import widen
from .packed_spikes import pack, unpack

# So many attention weights are computed at a time.
ATTENTION_PIECE = 2**18


def spiking_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    token_mask: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax-free attention, `q (k^T v) * scaling / (number of valid tokens)`; linear in the length, no dropout.

    Spikes are 0 at masked tokens, so of masks only `token_mask`, `[batch, seq_len]`, enters, in the count. The division
    keeps the result, like a softmax's, independent of the length. `attention_mask` is a position bias, with numbers for
    masked keys as well, or `None`; its own term `attention_mask v / (number of valid tokens)`, of quadratic cost, is
    added to the linear one. With the implementation "eager" the weights, `q k^T` and the bias, are formed, at quadratic
    cost, and returned.
    """
    # Not `float(length)`, which an exported graph would take for a constant.
    tokens: int | torch.Tensor = key.shape[2]
    if token_mask is not None:
        tokens = token_mask.sum(-1).clamp(min=1).to(query.dtype)[:, None, None, None]
    if module.config._attn_implementation == "eager":
        weights = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            bias = attention_mask if token_mask is None else attention_mask * (token_mask != 0)[:, None, None]
            weights = weights + bias
        weights = weights / tokens
        context = weights @ value
    else:
        weights = None
        context = query @ (key.transpose(2, 3) @ value) * scaling
        if attention_mask is not None:
            context = context + attention_mask @ value
        context = context / tokens
    return context.transpose(1, 2).contiguous(), weights


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """Softmax attention with dropout, for training on the CPU, where there is no fused one that drops.

    It keeps one bit of each number of the dropout's mask for the backward pass, and none of the attention weights,
    which are computed again there; within `keep_packed` it keeps one bit of each spike, too. `attention_mask` is bool,
    True where a query may see a key, or numbers that are added to the scores, which get a gradient; `dropout` lies in
    (0, 1).
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return _PackedAttention.apply(query, key, value, attention_mask, scaling, dropout), None


class _PackedAttention(torch.autograd.Function):
    """The context of `packed_attention`."""

    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        ctx.scaling, ctx.keep = scaling, KeepBits(dropout)
        contexts, kept = [], []
        with torch.autocast("cpu", enabled=False):
            for rows in _pieces(query):
                weights = _attention_weights(query[rows], key[rows], mask, rows, scaling)
                kept.append(ctx.keep.draw(weights.shape))
                context = ctx.keep.apply(weights, kept[-1]).to(value.dtype) @ value[rows]
                contexts.append(context.transpose(1, 2))
        ctx.save_for_backward(query, key, value, mask, *kept)
        return torch.cat(contexts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context: torch.Tensor):
        query, key, value, mask, *kept = ctx.saved_tensors
        grad_mask = torch.zeros_like(mask) if ctx.needs_input_grad[3] else None
        grads: list[tuple[torch.Tensor, ...]] = []
        for rows, bits in zip(_pieces(query), kept, strict=True):
            q, k, v = query[rows], key[rows], value[rows]
            grad = grad_context[rows].to(v.dtype).transpose(1, 2)
            weights = _attention_weights(q, k, mask, rows, ctx.scaling)
            grad_v = ctx.keep.apply(weights, bits).to(v.dtype).transpose(2, 3) @ grad
            grad_weights = ctx.keep.apply((grad @ v.transpose(2, 3)).to(weights.dtype), bits)
            inner = (grad_weights * weights).sum(-1, keepdim=True)
            grad_scores = grad_weights.sub_(inner).mul_(weights)
            if grad_mask is not None:
                of_rows = _of_rows(grad_mask, rows)
                of_rows.add_(grad_scores.sum_to_size(of_rows.shape))
            grad_scores = grad_scores.mul_(ctx.scaling).to(q.dtype)
            grads.append((grad_scores @ k, grad_scores.transpose(2, 3) @ q, grad_v))
        return *(torch.cat(pieces) for pieces in zip(*grads, strict=True)), grad_mask, None, None


def _attention_weights(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, rows: slice, scaling: float
) -> torch.Tensor:
    """The softmax of the scores, at least in float32. A query that may see no key at all sees every key."""
    scores = q @ k.transpose(2, 3)
    scores = widen(scores).mul_(scaling)
    if mask is not None:
        of_rows = _of_rows(mask, rows)
        if mask.dtype == torch.bool:
            scores.masked_fill_(~of_rows, torch.finfo(scores.dtype).min)
        else:
            scores.add_(of_rows)
    return scores.softmax(-1)


def _of_rows(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """The part of a mask, of the whole batch or the same for all of it, that belongs to these rows; a view."""
    return mask if len(mask) == 1 else mask[rows]


def _pieces(query: torch.Tensor) -> Iterator[slice]:
    """Slices of the batch whose attention weights stay in the cache."""
    batch, heads, length, _ = query.shape
    size = max(1, ATTENTION_PIECE // (heads * length**2))
    for first in range(0, batch, size):
        yield slice(first, first + size)


class KeepBits:
    """Dropout whose mask is one bit a number, drawn 16 bits at a time.

    Numbers are dropped with the probability `dropout`, rounded to a 65,536th, and what is kept is scaled up by the
    probability that it really is kept with.
    """

    def __init__(self, dropout: float) -> None:
        self.dropped = round(dropout * 65536)
        self.scale = 65536 / (65536 - self.dropped)

    def draw(self, shape: torch.Size) -> torch.Tensor:
        """A packed mask for a tensor of that shape."""
        numbers = shape.numel()
        bits = torch.empty((numbers + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        return pack(bits.view(torch.int16)[:numbers] >= self.dropped - 32768, ternary=False)

    def apply(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`x` with zeros where the mask has none, and scaled up elsewhere."""
        return unpack(mask, x.numel(), x.dtype)[: x.numel()].view(x.shape).mul_(self.scale).mul_(x)
