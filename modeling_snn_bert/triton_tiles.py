"""What the Triton kernels share: whether they run, how they become torch operators, and their arithmetic on tiles.

Without triton, or with `SNN_BERT_TRITON_KERNELS=0` in the environment, `takes` is False everywhere and torch's own
operations run, with the same results. The operators also take tensors of a CPU if `TRITON_INTERPRET=1` was set before
the import: Triton then runs the kernels in its interpreter, thousands of times slower, for tests.

A *chunk* is `CHUNK` tokens that follow one another: a multiple of four, and a power of two. A *tile* is a tuple of
`CHUNK` tensors `[chunks, channels]`, of which the `k`-th holds the `k`-th token of every chunk. What does not differ
between channels or chunks may have one column or row, or be a number, and broadcasts. `first` are the chunks' first
tokens. All arithmetic is in float32.
"""

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers.utils import logging

from .cpu_kernels import NAMESPACE, PLAIN_TYPES

# The other modules with kernels take these from here.
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    triton = tl = constexpr = None

logger = logging.get_logger(__name__)

# The first Triton whose compiler takes what is used here (tuples of tensors).
MIN_TRITON = (3, 3)


def _load() -> bool:
    """Whether Triton is there and wanted; the log says which it is."""
    if os.environ.get("SNN_BERT_TRITON_KERNELS") == "0":
        logger.info("SNN-BERT's Triton kernels are switched off by SNN_BERT_TRITON_KERNELS=0")
        return False
    if triton is None:
        logger.info("triton is not installed: on a GPU SNN-BERT's neurons run on torch's operations, more slowly")
        return False
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        wanted = ".".join(map(str, MIN_TRITON))
        logger.info(f"triton {triton.__version__} is older than {wanted}: SNN-BERT's neurons run on torch's operations")
        return False
    return True


_AVAILABLE = _load()
_DEVICE_TYPES = ("cuda",)


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels compute spikes from this current, or write numbers of this dtype."""
    return _AVAILABLE and x.device.type in _DEVICE_TYPES and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


# Numbers that change from batch to batch. Triton would compile a kernel anew for each that is 1, or the first that is a
# multiple of 16, and would make a 1 a constant, which has no methods.
FREE_NUMBERS = ("tokens", "batch", "segments", "packed_plane", "size")


def jit(function):
    """`triton.jit`, or the function itself where there is no Triton and nothing will call it."""
    return function if triton is None else triton.jit(function, do_not_specialize=FREE_NUMBERS)


@jit
def load_rows(rows, first, tokens, stride, inside, CHUNK: constexpr):
    """A tile in float32, 0 from token `tokens` on. `rows` are those of the `first` tokens, `stride` apart."""
    tile = ()
    for k in tl.static_range(CHUNK):
        there = inside & (first + k < tokens)
        tile = tile + (tl.load(rows + k * stride, mask=there, other=0).to(tl.float32),)
    return tile


@jit
def store_rows(tile, rows, first, tokens, stride, inside, CHUNK: constexpr):
    """The inverse, in the dtype of `rows`."""
    for k in tl.static_range(CHUNK):
        there = inside & (first + k < tokens)
        tl.store(rows + k * stride, tile[k].to(rows.dtype.element_ty), mask=there)


@jit
def store_bits(spikes, packed, first, tokens, width, start, NEGATIVE: constexpr, CHUNK: constexpr, BLOCK: constexpr):
    """Store a bit for each channel that fires with the sign wanted; the bytes of four tokens are summed as one word.

    `packed` has `width` bytes a token; `start` is the first channel of the tile.
    """
    byte = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    bit = (tl.full([BLOCK], 1, tl.int32) << (tl.arange(0, BLOCK) % 8))[None, :]
    for four in tl.static_range(CHUNK // 4):
        word = tl.zeros_like(spikes[0]).to(tl.int32)
        for j in tl.static_range(4):
            spike = spikes[4 * four + j]
            word = word | tl.where((spike < 0) if NEGATIVE else (spike > 0), bit << (8 * j), 0)
        words = tl.sum(tl.reshape(word, [word.shape[0], BLOCK // 8, 8]), 2)
        for j in tl.static_range(4):
            token = first + 4 * four + j
            there = (byte < width) & (token < tokens)
            tl.store(packed + token * width + byte, (words >> (8 * j)).to(tl.uint8), mask=there)


@jit
def store_spikes(
    spikes, rows, packed, packed_plane, first,
    tokens, channels, start, inside,
    TERNARY: constexpr, CHUNK: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Store a tile of spikes as floats and as bits; the bits of -1 lie `packed_plane` bytes further."""
    store_rows(spikes, rows, first, tokens, channels, inside, CHUNK)
    width = tl.cdiv(channels, 8)
    store_bits(spikes, packed, first, tokens, width, start, False, CHUNK, BLOCK)
    if TERNARY:
        store_bits(spikes, packed + packed_plane, first, tokens, width, start, True, CHUNK, BLOCK)


@jit
def silence(tile, valid, CHUNK: constexpr):
    """A tile with zeros where `valid` is 0, whatever stood there."""
    silent = ()
    for k in tl.static_range(CHUNK):
        silent = silent + (tl.where(valid[k] > 0, tile[k], 0),)
    return silent


@jit
def scale(tile, factors, CHUNK: constexpr):
    scaled = ()
    for k in tl.static_range(CHUNK):
        scaled = scaled + (tile[k] * factors[k],)
    return scaled


@jit
def sums_before(tile, carry, decay, REVERSE: constexpr, CHUNK: constexpr):
    """The leaky sum at the token before each (after it, if `REVERSE`), in the order of the tokens.

    It starts from the sum at the token beside the chunk, `carry`; that at the chunk's other end is returned too.
    """
    sums = ()
    for k in tl.static_range(CHUNK):
        sums = ((carry,) + sums) if REVERSE else (sums + (carry,))
        carry = decay * carry + tile[CHUNK - 1 - k if REVERSE else k]
    return sums, carry


@jit
def leaky_sums(tile, earlier, later, forward, backward, WITH_SELF: constexpr, CHUNK: constexpr):
    """`sum_j a[t, j] x[j]`, over all `j` or over `j != t`, from the sums at the tokens beside the chunk.

    Returns them, and the sums over earlier and later tokens at the chunk's last and first token.
    """
    laters, later = sums_before(tile, later, backward, True, CHUNK)
    sums = ()
    for k in tl.static_range(CHUNK):
        before = forward * earlier
        earlier = before + tile[k]
        sums = sums + ((earlier if WITH_SELF else before) + backward * laters[k],)
    return sums, earlier, later


@jit
def fire(potentials, valid, threshold, TERNARY: constexpr, CHUNK: constexpr):
    """Spikes as floats, 0 where `valid` is 0."""
    spikes = ()
    for k in tl.static_range(CHUNK):
        fired = tl.where((potentials[k] >= threshold) & (valid[k] > 0), 1.0, 0.0)
        if TERNARY:
            fired = fired - tl.where((potentials[k] <= -threshold) & (valid[k] > 0), 1.0, 0.0)
        spikes = spikes + (fired,)
    return spikes


@jit
def reset_by(potentials, received, reset, CHUNK: constexpr):
    """`v - reset * r`."""
    margins = ()
    for k in tl.static_range(CHUNK):
        margins = margins + (potentials[k] - reset * received[k],)
    return margins


@jit
def derivative(x, alpha, SURROGATE: constexpr):
    """The functions of `surrogate_gradients`."""
    if SURROGATE == "atan":
        scaled = 1.5707963267948966 * alpha * x
        return 0.5 * alpha / (scaled * scaled + 1)
    elif SURROGATE == "sigmoid":
        step = tl.sigmoid(alpha * x)
        return alpha * step * (1 - step)
    elif SURROGATE == "triangle":
        return alpha * tl.maximum(1 - alpha * tl.abs(x), 0)
    else:
        tl.static_assert(SURROGATE == "rectangle")
        return tl.where(tl.abs(x) < 1 / (2 * alpha), alpha, 0)


@jit
def fire_backward(
    grad_spikes, margins, threshold, alpha, grad_threshold, TERNARY: constexpr, SURROGATE: constexpr, CHUNK: constexpr
):
    """The gradient to the potentials from that to the spikes, and the one to the threshold, added to what it was."""
    grads = ()
    for k in tl.static_range(CHUNK):
        grad = grad_spikes[k] * derivative(margins[k] - threshold, alpha, SURROGATE)
        grad_threshold -= grad
        if TERNARY:
            mirrored = grad_spikes[k] * derivative(-margins[k] - threshold, alpha, SURROGATE)
            grad_threshold += mirrored
            grad += mirrored
        grads = grads + (grad,)
    return grads, grad_threshold


@jit
def leaky_sums_backward(
    g, x, earlier, later, to_earlier, to_later, forward, backward, grad_forward, grad_backward, CHUNK: constexpr
):
    """The gradient to `x` from that to its leaky sums, `g`, and those to the decays, added to what they were.

    The transpose of a sum over earlier tokens is a sum over later ones, and the reverse: `to_earlier` is what the
    tokens after the chunk send to it, and `to_later` what those before it do. With `h` the transposed sum,
    `y[t] = x[t] + f y[t - 1]` gives `d loss / d f = sum_t h[t] y[t - 1]`. Also returns the sums of `x` over earlier and
    of `g` over earlier tokens at the chunk's last token.
    """
    laters, _ = sums_before(x, later, backward, True, CHUNK)
    to_earliers, _ = sums_before(g, to_earlier, forward, True, CHUNK)
    grads = ()
    for k in tl.static_range(CHUNK):
        from_earlier = backward * to_later
        to_later = from_earlier + g[k]
        from_later = forward * to_earliers[k]
        grad_forward += (from_later + g[k]) * earlier
        grad_backward += to_later * laters[k]
        earlier = forward * earlier + x[k]
        grads = grads + (to_later + from_later,)
    return grads, grad_forward, grad_backward, earlier, to_later


# The tracer of torch, which would show the kernels to a compiler, cannot follow them into Triton's interpreter.
INTERPRETED = triton is not None and not isinstance(fire, triton.runtime.JITFunction)


def on_device_of(x: torch.Tensor):
    """The context in which kernels are launched on the GPU that `x` is on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def triton_operator(name: str):
    """Register the torch operator `name`, whose kernels `torch.compile` sees where Triton compiles them.

    It is to be called by `call_operator`.
    """
    register = torch.library.custom_op if triton is None or INTERPRETED else torch.library.triton_op

    def operator_of(launch: Callable) -> Any:
        operator: Any = register(f"{NAMESPACE}::{name}", mutates_args=())(launch)
        operator.launch = launch
        return operator

    return operator_of


def register_fake(operator, fake) -> None:
    """What an operator returns while it is traced, where its own code, which then launches nothing, does not say so."""
    if triton is None or INTERPRETED:
        operator.register_fake(fake)


class _Launching(threading.local):
    """Whether this thread launches kernels outside an operator, where nothing is to see them."""

    directly = False


_launching = _Launching()


def kernel_in_operator(function):
    """A kernel to launch inside an operator of `triton_operator`."""
    return function if INTERPRETED or _launching.directly else torch.library.wrap_triton(function)


def call_operator(operator: Any, x: torch.Tensor, *arguments: Any) -> Any:
    """`operator(x, *arguments)`; where no compiler is to see it, by the function that it was made of.

    The way through torch's dispatcher takes the host several times as long as the launch itself.
    """
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TYPES:
        return operator(x, *arguments)
    _launching.directly = True
    try:
        return operator.launch(x, *arguments)
    finally:
        _launching.directly = False
