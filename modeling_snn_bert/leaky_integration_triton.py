"""The BPSN on a GPU: Triton kernels from currents to spikes, and their gradients, in the operators of `cpu_kernels`.

Without triton, or with `SNN_BERT_TRITON_KERNELS=0` in the environment, `takes` is False everywhere and the neurons run
on torch's own operations, with the same results. The operators also take tensors of a CPU if `TRITON_INTERPRET=1` was
set before the import: Triton then runs the kernels in its interpreter, thousands of times slower, for tests.

A program owns `BLOCK` channels of one row, in one warp, and walks over the tokens in chunks of `CHUNK` that it keeps in
registers. All arithmetic is in float32. What one chunk hands to the next (the *carries*, a number per channel and
chunk) wait in buffers of an eighth of the tokens, so the second direction of a chunk can be computed without keeping
anything per token. The walks over a sequence, with what they touch per token and channel:

1. from the last token to the first: the carries of the currents' sum over later tokens. Reads the current.
2. from the first to the last: the sum over earlier tokens, the potential, the provisional spikes and their carries.
   Reads the current again.
3. from the last to the first: potential, reset received, spikes. Reads the current again, writes spikes and bits.

Of the three reads of a current only the first has to come from memory: up to `SEGMENT` tokens the block is 32 KB in
bfloat16, and those of all programs that run at a time can stay in the caches. So the memory sees each current once and
each spike once, and at worst the carries, 1.5 bytes a current forward. The backward pass (which keeps the current and
nothing else) does 1 and 2 again, then

3. the gradient `g` of the leaky sum in place of the spikes. Reads current and gradient, writes `g`.
4. both sums over `g`, which are the gradient to the current, and the gradients to the decays. Reads `g` twice and the
   current, writes the result over `g`. In float16 and bfloat16 `g` is rounded to that type before it is summed.

Longer sequences are cut into segments with a program each, so that few rows fill a GPU too. A segment needs what the
others send it before it can go on, so each thing that is summed over tokens (the currents, the spikes of each sweep,
`g`) ends a launch: with one sweep of the reset the currents come from memory three times forward and four times
backward, and `g` twice.
Every further sweep of the reset is a launch of its own at any length, and keeps the reset received in a float32 buffer
`[batch, seq_len, channels]` in the meantime. Time and memory are linear in the length.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
from transformers.utils import logging

from .cpu_kernels import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    NAMESPACE,
    fake_bpsn_backward,
    fake_bpsn_forward,
    packed_shape,
)

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    triton = constexpr = None

logger = logging.get_logger(__name__)

CHUNK = 8
# Powers of two, and the segment a multiple of the chunk.
SEGMENT = 256
BLOCK = 64
# Tokens of one step of the kernel that sums the mask.
WEIGHT_TILE = 1024
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


def takes(current: torch.Tensor) -> bool:
    """Whether the kernels compute spikes from this current."""
    return (
        _AVAILABLE
        and current.device.type in _DEVICE_TYPES
        and current.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


# Numbers that change from batch to batch. Triton would compile a kernel anew for each that is 1, or the first that is a
# multiple of 16, and would make a 1 a constant, which has no methods.
FREE_NUMBERS = ("tokens", "batch", "segments", "weight_row", "weight_stride", "weight_step", "packed_plane", "size")


def jit(function):
    """`triton.jit`, or the function itself where there is no Triton and nothing will call it."""
    return function if triton is None else triton.jit(function, do_not_specialize=FREE_NUMBERS)


@jit
def _affine(decay, total, next_decay, next_total):
    """Compose `y -> decay * y + total` with the next such step."""
    return decay * next_decay, next_decay * total + next_total


@jit
def _affine_and_slope(decay, slope_of_decay, total, slope, next_decay, next_slope_of_decay, next_total, next_slope):
    """The same, with the derivatives of both numbers with respect to the decay of a single step."""
    return (
        decay * next_decay,
        slope_of_decay * next_decay + decay * next_slope_of_decay,
        next_decay * total + next_total,
        next_slope_of_decay * total + next_decay * slope + next_slope,
    )


@jit
def _weigh_direction(mask, decay, tile, tokens, total, slope, TILE: constexpr, REVERSE: constexpr, SLOPES: constexpr):
    """One tile of the mask's leaky sum: token numbers, mask, sums, their derivatives, and the last sum and derivative.

    A reversed scan takes the tokens in reversed order, so that the scan itself always runs forward.
    """
    offset = tile * TILE + tl.arange(0, TILE)
    token = tokens - 1 - offset if REVERSE else offset
    inside = offset < tokens
    valid = inside.to(tl.float32)
    if mask is not None:
        valid = tl.load(mask + token, mask=inside, other=0).to(tl.float32)
    decays = tl.zeros([TILE], tl.float32) + decay
    if SLOPES:
        power, slope_of_power, sums, slopes = tl.associative_scan(
            (decays, decays * 0 + 1, valid, decays * 0), 0, _affine_and_slope
        )
        slopes += slope_of_power * total + power * slope
    else:
        power, sums = tl.associative_scan((decays, valid), 0, _affine)
        slopes = sums
    sums += power * total
    last = tl.arange(0, TILE) == TILE - 1
    return token, inside, valid, sums, slopes, tl.sum(tl.where(last, sums, 0), 0), tl.sum(tl.where(last, slopes, 0), 0)


@jit
def _weigh(
    mask,
    decay_forward,
    decay_backward,
    later_sums,
    weight,
    slope_forward,
    slope_backward,
    tokens,
    groups,
    TILE: constexpr,
    SLOPES: constexpr,
):
    """`1 / n` at valid tokens and 0 at others, and with `SLOPES` the derivatives of `n`; a program per row and group.

    `mask` is `[rows, tokens]`, uint8, or `None` for one row without padding; the outputs are `[rows, tokens, groups]`.
    """
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    forward = tl.load(decay_forward + group)
    backward = tl.load(decay_backward + group)
    start = row * tokens * groups + group
    if mask is not None:
        mask += row * tokens
    total = 0.0
    slope = 0.0
    for tile in range(0, tl.cdiv(tokens, TILE)):
        token, inside, valid, sums, slopes, total, slope = _weigh_direction(
            mask, backward, tile, tokens, total, slope, TILE, True, SLOPES
        )
        tl.store(later_sums + start + token.to(tl.int64) * groups, sums - valid, mask=inside)
        if SLOPES:
            tl.store(slope_backward + start + token.to(tl.int64) * groups, slopes, mask=inside)
    tl.debug_barrier()
    total = 0.0
    slope = 0.0
    for tile in range(0, tl.cdiv(tokens, TILE)):
        token, inside, valid, sums, slopes, total, slope = _weigh_direction(
            mask, forward, tile, tokens, total, slope, TILE, False, SLOPES
        )
        later = tl.load(later_sums + start + token.to(tl.int64) * groups, mask=inside, other=0)
        inverse = tl.where(valid > 0, 1 / tl.where(valid > 0, sums + later, 1), 0)
        tl.store(weight + start + token.to(tl.int64) * groups, inverse, mask=inside)
        if SLOPES:
            tl.store(slope_forward + start + token.to(tl.int64) * groups, slopes, mask=inside)


@jit
def _place(tokens, channels, group_size, SEGMENT: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr):
    """Where this program works: row, segment, its first token and the one after its last, channels and their group."""
    blocks = tl.cdiv(channels, BLOCK)
    segments = tl.cdiv(tokens, SEGMENT)
    block = tl.program_id(0) % blocks
    item = tl.program_id(0) // blocks
    segment = item % segments
    row = (item // segments).to(tl.int64)
    start = segment * SEGMENT
    channel = block * BLOCK + tl.arange(0, BLOCK)
    # A block that lies in one group reads one number where another block reads one per channel.
    group = (block * BLOCK) // group_size if ONE_GROUP else tl.minimum(channel, channels - 1) // group_size
    return row, segment, start, tl.minimum(start + SEGMENT, tokens), channel, channel < channels, group


@jit
def _rows(rows, start, end, stride, inside, CHUNK: constexpr):
    """A chunk `[CHUNK][BLOCK]` of `rows`, `stride` apart, in float32; 0 from token `end` on."""
    first = rows + start.to(tl.int64) * stride
    chunk = ()
    for k in tl.static_range(CHUNK):
        chunk = chunk + (tl.load(first + k * stride, mask=inside & (start + k < end), other=0).to(tl.float32),)
    return chunk


@jit
def _weights(weight, start, end, stride, CHUNK: constexpr):
    """`1 / n` of a chunk, 0 at tokens that are not valid."""
    chunk = ()
    for k in tl.static_range(CHUNK):
        if weight is None:
            chunk = chunk + (tl.where(start + k < end, 1.0, 0.0),)
        else:
            chunk = chunk + (tl.load(weight + (start + k) * stride, mask=start + k < end, other=0),)
    return chunk


@jit
def _silenced(rows, weights, CHUNK: constexpr):
    """`rows` with zeros at tokens that are not valid, whatever stood there."""
    chunk = ()
    for k in tl.static_range(CHUNK):
        chunk = chunk + (tl.where(weights[k] > 0, rows[k], 0),)
    return chunk


@jit
def _currents(current, weights, start, end, stride, inside, PADDED: constexpr, CHUNK: constexpr):
    """A chunk of the currents, silenced."""
    chunk = _rows(current, start, end, stride, inside, CHUNK)
    if PADDED:
        chunk = _silenced(chunk, weights, CHUNK)
    return chunk


@jit
def _sum_chunk(x, carry, decay, REVERSE: constexpr, CHUNK: constexpr):
    """The leaky sum of a chunk in one direction, in the order of the walk, from the sum at the token before it."""
    sums = ()
    for k in tl.static_range(CHUNK):
        carry = decay * carry + x[CHUNK - 1 - k if REVERSE else k]
        sums = sums + (carry,)
    return sums, carry


@jit
def _leaky_mean(x, weights, earlier, later, forward, backward, WITH_SELF: constexpr, CHUNK: constexpr):
    """`sum_j a[t, j] x[j] / n[t]` over a chunk, over all `j` or over `j != t`, from the sums at the tokens beside it.

    Returns the means, and the sums over earlier and later tokens at the chunk's last and first token.
    """
    laters = ()
    for k in tl.static_range(CHUNK):
        laters = laters + (backward * later,)
        later = backward * later + x[CHUNK - 1 - k]
    means = ()
    for k in tl.static_range(CHUNK):
        before = forward * earlier
        earlier = before + x[k]
        means = means + (((earlier if WITH_SELF else before) + laters[CHUNK - 1 - k]) * weights[k],)
    return means, earlier, later


@jit
def _fire(potentials, weights, threshold, TERNARY: constexpr, CHUNK: constexpr):
    """Spikes of a chunk as floats, 0 at tokens that are not valid."""
    spikes = ()
    for k in tl.static_range(CHUNK):
        fired = tl.where(potentials[k] >= threshold, 1.0, 0.0)
        if TERNARY:
            fired = fired - tl.where(potentials[k] <= -threshold, 1.0, 0.0)
        spikes = spikes + (tl.where(weights[k] > 0, fired, 0.0),)
    return spikes


@jit
def _margins(potentials, received, reset, CHUNK: constexpr):
    """`v - reset * r` of a chunk."""
    margins = ()
    for k in tl.static_range(CHUNK):
        margins = margins + (potentials[k] - reset * received[k],)
    return margins


@jit
def _from_others(sums, at, inside, BLOCK: constexpr):
    """The sum that the other segments send to this one; 0 where there is one segment only."""
    if sums is None:
        return tl.zeros([BLOCK], tl.float32)
    else:
        return tl.load(sums + at, mask=inside, other=0)


@jit
def _walk_later(
    rows,
    weight,
    start,
    end,
    stride,
    weight_stride,
    inside,
    later,
    decay,
    carries,
    channels,
    PADDED: constexpr,
    CHUNK: constexpr,
):
    """Walk 1: store, for each chunk, the sum of `rows` over the tokens after it."""
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(0, chunks):
        chunk = chunks - 1 - i
        token = start + chunk * CHUNK
        tl.store(carries + (token // CHUNK) * channels, later, mask=inside)
        weights = _weights(weight, token, end, weight_stride, CHUNK)
        x = _currents(rows, weights, token, end, stride, inside, PADDED, CHUNK)
        _, later = _sum_chunk(x, later, decay, True, CHUNK)


@jit
def _add_to_sums(x, near, far, power, near_decay, far_decay, REVERSE: constexpr, CHUNK: constexpr):
    """Go on with a segment's two sums: `near` at the token reached, `far` at the segment's other end."""
    for k in tl.static_range(CHUNK):
        near = near_decay * near + x[CHUNK - 1 - k if REVERSE else k]
        far = far + power * x[CHUNK - 1 - k if REVERSE else k]
        power = power * far_decay
    return near, far, power


@jit
def _sum_currents(
    current,
    weight,
    decay_forward,
    decay_backward,
    sums_earlier,
    sums_later,
    tokens,
    channels,
    group_size,
    weight_row,
    weight_stride,
    weight_step,
    PADDED: constexpr,
    CHUNK: constexpr,
    SEGMENT: constexpr,
    BLOCK: constexpr,
    ONE_GROUP: constexpr,
):
    """Both leaky sums of the currents over each segment alone, `[batch, segments, channels]`."""
    row, segment, start, end, channel, inside, group = _place(tokens, channels, group_size, SEGMENT, BLOCK, ONE_GROUP)
    current += row * tokens * channels + channel
    if weight is not None:
        weight += row * weight_row + group * weight_step
    forward = tl.load(decay_forward + group)
    backward = tl.load(decay_backward + group)
    earlier = tl.zeros([BLOCK], tl.float32)
    later = tl.zeros([BLOCK], tl.float32)
    power = tl.zeros([BLOCK], tl.float32) + 1
    for chunk in range(0, tl.cdiv(end - start, CHUNK)):
        token = start + chunk * CHUNK
        weights = _weights(weight, token, end, weight_stride, CHUNK)
        x = _currents(current, weights, token, end, channels, inside, PADDED, CHUNK)
        earlier, later, power = _add_to_sums(x, earlier, later, power, forward, backward, False, CHUNK)
    at = (row * tl.cdiv(tokens, SEGMENT) + segment) * channels + channel
    tl.store(sums_earlier + at, earlier, mask=inside)
    tl.store(sums_later + at, later, mask=inside)


@jit
def _exchange(
    sums_earlier,
    sums_later,
    decay_earlier,
    decay_later,
    segments,
    channels,
    group_size,
    DOUBLINGS: constexpr,
    BLOCK: constexpr,
):
    """From each segment's own sums, `[batch, segments, channels]`, to what it gets from all others, in place.

    A segment has `2 ** DOUBLINGS` tokens.
    """
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    group = tl.minimum(channel, channels - 1) // group_size
    forward = tl.load(decay_earlier + group)
    backward = tl.load(decay_later + group)
    for _ in tl.static_range(DOUBLINGS):
        forward = forward * forward
        backward = backward * backward
    earlier = tl.zeros([BLOCK], tl.float32)
    later = tl.zeros([BLOCK], tl.float32)
    for i in range(0, segments):
        at = (row * segments + i) * channels + channel
        own = tl.load(sums_earlier + at, mask=inside, other=0)
        tl.store(sums_earlier + at, earlier, mask=inside)
        earlier = forward * earlier + own
        at = (row * segments + segments - 1 - i) * channels + channel
        own = tl.load(sums_later + at, mask=inside, other=0)
        tl.store(sums_later + at, later, mask=inside)
        later = backward * later + own


@jit
def _store_plane(signed, packed, token, end, stride, channel, channels, BLOCK: constexpr, CHUNK: constexpr):
    """Store one bit for each channel whose number is positive; four tokens share a word until its bits are together."""
    byte = tl.min(tl.reshape(channel, [BLOCK // 8, 8]), 1) // 8
    bit = (tl.zeros([BLOCK], tl.int32) + 1) << (channel % 8)
    for quarter in tl.static_range(CHUNK // 4):
        word = tl.zeros([BLOCK], tl.int32)
        for j in tl.static_range(4):
            word = word | tl.where(signed[4 * quarter + j] > 0, bit << (8 * j), 0)
        words = tl.sum(tl.reshape(word, [BLOCK // 8, 8]), 1)
        for j in tl.static_range(4):
            at = token + 4 * quarter + j
            tl.store(packed + at * stride + byte, (words >> (8 * j)).to(tl.uint8), mask=(byte < stride) & (at < end))


@jit
def _store_spikes(
    spikes,
    to,
    packed,
    plane,
    token,
    end,
    channel,
    channels,
    TERNARY: constexpr,
    BLOCK: constexpr,
    CHUNK: constexpr,
):
    """Store a chunk of spikes as floats and as bits; -1 has its bits in a second plane."""
    stride = tl.cdiv(channels, 8)
    for k in tl.static_range(CHUNK):
        mask = (channel < channels) & (token + k < end)
        tl.store(to + token.to(tl.int64) * channels + k * channels, spikes[k].to(to.dtype.element_ty), mask=mask)
    _store_plane(spikes, packed, token, end, stride, channel, channels, BLOCK, CHUNK)
    if TERNARY:
        mirrored = ()
        for k in tl.static_range(CHUNK):
            mirrored = mirrored + (-spikes[k],)
        _store_plane(mirrored, packed + plane, token, end, stride, channel, channels, BLOCK, CHUNK)


@jit
def _derivative(x, alpha, SURROGATE: constexpr):
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
def _integrate_gradient(
    current,
    weight,
    grad,
    carries_later,
    carries_grad,
    start,
    end,
    channels,
    weight_stride,
    inside,
    earlier,
    to_later,
    to_earlier,
    forward,
    backward,
    PADDED: constexpr,
    CHUNK: constexpr,
):
    """Walks 4: from `g` to the gradient to the current, in its place. Returns the gradients to both decays.

    The transpose of a sum over earlier tokens is a sum over later ones, and the reverse.
    """
    _walk_later(
        grad,
        None,
        start,
        end,
        channels,
        weight_stride,
        inside,
        to_earlier,
        forward,
        carries_grad,
        channels,
        False,
        CHUNK,
    )
    tl.debug_barrier()
    grad_forward = tl.zeros_like(earlier)
    grad_backward = tl.zeros_like(earlier)
    for chunk in range(0, tl.cdiv(end - start, CHUNK)):
        token = start + chunk * CHUNK
        weights = _weights(weight, token, end, weight_stride, CHUNK)
        x = _currents(current, weights, token, end, channels, inside, PADDED, CHUNK)
        g = _rows(grad, token, end, channels, inside, CHUNK)
        laters, _ = _sum_chunk(
            x, tl.load(carries_later + (token // CHUNK) * channels, mask=inside, other=0), backward, True, CHUNK
        )
        to_earliers, _ = _sum_chunk(
            g, tl.load(carries_grad + (token // CHUNK) * channels, mask=inside, other=0), forward, True, CHUNK
        )
        # All of the chunk has been read before any of it is overwritten.
        tl.debug_barrier()
        for k in tl.static_range(CHUNK):
            grad_forward += earlier * to_earliers[CHUNK - 1 - k]
            grad_backward += to_later * laters[CHUNK - 1 - k]
            to_later = backward * to_later
            total = tl.where(weights[k] > 0, to_later + to_earliers[CHUNK - 1 - k], 0)
            tl.store(
                grad + token.to(tl.int64) * channels + k * channels,
                total.to(grad.dtype.element_ty),
                mask=inside & (token + k < end),
            )
            to_later += g[k]
            earlier = forward * earlier + x[k]
    return grad_forward, grad_backward


@jit
def _bpsn(
    current,
    weight,
    v_threshold,
    decay_forward,
    decay_backward,
    reset,
    received_before,
    received_after,
    carries,
    current_earlier,
    current_later,
    spikes_earlier,
    spikes_later,
    next_earlier,
    next_later,
    spikes,
    packed,
    grad_spikes,
    slope_forward,
    slope_backward,
    grad_sum,
    grad_parameters,
    tokens,
    channels,
    group_size,
    batch,
    weight_row,
    weight_stride,
    weight_step,
    alpha,
    STAGE: constexpr,
    RESET: constexpr,
    TERNARY: constexpr,
    SURROGATE: constexpr,
    PADDED: constexpr,
    CHUNK: constexpr,
    SEGMENT: constexpr,
    BLOCK: constexpr,
    ONE_GROUP: constexpr,
):
    """Walks 1 to 3 (see the module's description), for what `STAGE` says:

    - `"provisional"`: the sums of the first provisional spikes over each segment, into `next_*`;
    - `"sweep"`: a sweep of the reset that is not the last one: what is received in it into `received_after`, and with
      several segments the sums of the spikes after it into `next_*`;
    - `"spikes"`: the last sweep, or with `RESET` false none, and the spikes;
    - `"gradient"`: the same, but `g` into `grad_sum`, and with one segment what follows from it (walks 4).

    `*_earlier` and `*_later` are `[batch, segments, channels]`, or `None` with one segment; `received_before` is `None`
    before the first sweep; `carries` is `[4, batch, chunks, channels]`. `grad_parameters` is
    `[6, batch, segments, channels]`: threshold, reset, both decays through `n`, both decays through the sums.
    """
    row, segment, start, end, channel, inside, group = _place(tokens, channels, group_size, SEGMENT, BLOCK, ONE_GROUP)
    offset = row * tokens * channels + channel
    current += offset
    if weight is not None:
        weight += row * weight_row + group * weight_step
    forward = tl.load(decay_forward + group)
    backward = tl.load(decay_backward + group)
    # What lies beyond the last channel never fires: its bits share a byte with those of real channels.
    threshold = tl.load(v_threshold + channel, mask=inside, other=float("inf"))
    chunks_in_all = tl.cdiv(tokens, CHUNK)
    plane = batch.to(tl.int64) * chunks_in_all * channels
    carries_later = carries + row * chunks_in_all * channels + channel
    carries_earlier = carries_later + plane
    carries_sent = carries_later + 2 * plane
    item = (row * tl.cdiv(tokens, SEGMENT) + segment) * channels + channel
    chunks = tl.cdiv(end - start, CHUNK)

    later = _from_others(current_later, item, inside, BLOCK)
    _walk_later(
        current,
        weight,
        start,
        end,
        channels,
        weight_stride,
        inside,
        later,
        backward,
        carries_later,
        channels,
        PADDED,
        CHUNK,
    )
    tl.debug_barrier()

    strength = 0.0
    if RESET:
        strength = tl.load(reset + group)
        if received_before is not None:
            received_before += offset
    if STAGE == "spikes":
        spikes += offset
        packed += row * tokens * tl.cdiv(channels, 8)
    packed_plane = batch.to(tl.int64) * tokens * tl.cdiv(channels, 8)
    earlier = _from_others(current_earlier, item, inside, BLOCK)
    sent = tl.zeros([BLOCK], tl.float32)
    if STAGE != "provisional":
        sent = _from_others(spikes_earlier, item, inside, BLOCK)
    far = tl.zeros([BLOCK], tl.float32)
    power = tl.zeros([BLOCK], tl.float32) + 1
    for i in range(0, chunks):
        token = start + i * CHUNK
        weights = _weights(weight, token, end, weight_stride, CHUNK)
        x = _currents(current, weights, token, end, channels, inside, PADDED, CHUNK)
        if STAGE != "provisional" and (RESET or STAGE == "gradient"):
            tl.store(carries_earlier + (token // CHUNK) * channels, earlier, mask=inside)
        later = tl.load(carries_later + (token // CHUNK) * channels, mask=inside, other=0)
        margins, earlier, _ = _leaky_mean(x, weights, earlier, later, forward, backward, True, CHUNK)
        if RESET and received_before is not None:
            received = _rows(received_before, token, end, channels, inside, CHUNK)
            margins = _margins(margins, received, strength, CHUNK)
        fired = _fire(margins, weights, threshold, TERNARY, CHUNK)
        if STAGE == "provisional":
            sent, far, power = _add_to_sums(fired, sent, far, power, forward, backward, False, CHUNK)
        elif RESET:
            tl.store(carries_sent + (token // CHUNK) * channels, sent, mask=inside)
            _, sent = _sum_chunk(fired, sent, forward, False, CHUNK)
        elif STAGE == "spikes":
            _store_spikes(fired, spikes, packed, packed_plane, token, end, channel, channels, TERNARY, BLOCK, CHUNK)
    if STAGE == "provisional":
        tl.store(next_earlier + item, sent, mask=inside)
        tl.store(next_later + item, far, mask=inside)
    tl.debug_barrier()

    if STAGE == "gradient":
        grad_spikes += offset
        grad_sum += offset
        if slope_forward is not None:
            slope_forward += row * weight_row + group
            slope_backward += row * weight_row + group
    grad_threshold = tl.zeros([BLOCK], tl.float32)
    grad_reset = tl.zeros([BLOCK], tl.float32)
    grad_forward = tl.zeros([BLOCK], tl.float32)
    grad_backward = tl.zeros([BLOCK], tl.float32)
    if STAGE == "gradient" or (RESET and STAGE != "provisional"):
        later = _from_others(current_later, item, inside, BLOCK)
        sent = _from_others(spikes_later, item, inside, BLOCK)
        near = tl.zeros([BLOCK], tl.float32)
        far = tl.zeros([BLOCK], tl.float32)
        power = tl.zeros([BLOCK], tl.float32) + 1
        for i in range(0, chunks):
            token = start + (chunks - 1 - i) * CHUNK
            weights = _weights(weight, token, end, weight_stride, CHUNK)
            x = _currents(current, weights, token, end, channels, inside, PADDED, CHUNK)
            earlier = tl.load(carries_earlier + (token // CHUNK) * channels, mask=inside, other=0)
            potentials, _, later = _leaky_mean(x, weights, earlier, later, forward, backward, True, CHUNK)
            margins = potentials
            if RESET:
                if received_before is not None:
                    received = _rows(received_before, token, end, channels, inside, CHUNK)
                    margins = _margins(potentials, received, strength, CHUNK)
                fired = _fire(margins, weights, threshold, TERNARY, CHUNK)
                earlier = tl.load(carries_sent + (token // CHUNK) * channels, mask=inside, other=0)
                received, _, sent = _leaky_mean(fired, weights, earlier, sent, forward, backward, False, CHUNK)
                margins = _margins(potentials, received, strength, CHUNK)
            if STAGE == "sweep":
                # What was received before has been read by all threads, if it is to be overwritten.
                tl.debug_barrier()
                for k in tl.static_range(CHUNK):
                    to = received_after + offset + token.to(tl.int64) * channels + k * channels
                    tl.store(to, received[k], mask=inside & (token + k < end))
                if next_earlier is not None:
                    fired = _fire(margins, weights, threshold, TERNARY, CHUNK)
                    near, far, power = _add_to_sums(fired, near, far, power, backward, forward, True, CHUNK)
            elif STAGE == "spikes":
                fired = _fire(margins, weights, threshold, TERNARY, CHUNK)
                _store_spikes(fired, spikes, packed, packed_plane, token, end, channel, channels, TERNARY, BLOCK, CHUNK)
            else:
                incoming = _rows(grad_spikes, token, end, channels, inside, CHUNK)
                incoming = _silenced(incoming, weights, CHUNK)
                for k in tl.static_range(CHUNK):
                    grad = incoming[k] * _derivative(margins[k] - threshold, alpha, SURROGATE)
                    grad_threshold -= grad
                    if TERNARY:
                        mirrored = incoming[k] * _derivative(-margins[k] - threshold, alpha, SURROGATE)
                        grad_threshold += mirrored
                        grad += mirrored
                    if RESET:
                        grad_reset -= received[k] * grad
                    g = grad * weights[k]
                    if slope_forward is not None:
                        # v = sum / n, so d loss / d n = - grad v / n.
                        at = (token + k) * weight_stride
                        grad_weight = -potentials[k] * g
                        grad_forward += grad_weight * tl.load(slope_forward + at, mask=token + k < end, other=0)
                        grad_backward += grad_weight * tl.load(slope_backward + at, mask=token + k < end, other=0)
                    to = grad_sum + token.to(tl.int64) * channels + k * channels
                    tl.store(to, g.to(grad_sum.dtype.element_ty), mask=inside & (token + k < end))
        if STAGE == "sweep" and next_earlier is not None:
            tl.store(next_earlier + item, far, mask=inside)
            tl.store(next_later + item, near, mask=inside)

    if STAGE == "gradient":
        parameter_plane = batch.to(tl.int64) * tl.cdiv(tokens, SEGMENT) * channels
        grad_parameters += item
        tl.store(grad_parameters, grad_threshold, mask=inside)
        tl.store(grad_parameters + parameter_plane, grad_reset, mask=inside)
        tl.store(grad_parameters + 2 * parameter_plane, grad_forward, mask=inside)
        tl.store(grad_parameters + 3 * parameter_plane, grad_backward, mask=inside)
        if current_earlier is None:
            tl.debug_barrier()
            nothing = tl.zeros([BLOCK], tl.float32)
            grad_forward, grad_backward = _integrate_gradient(
                current,
                weight,
                grad_sum,
                carries_later,
                carries_later + 3 * plane,
                start,
                end,
                channels,
                weight_stride,
                inside,
                nothing,
                nothing,
                nothing,
                forward,
                backward,
                PADDED,
                CHUNK,
            )
            tl.store(grad_parameters + 4 * parameter_plane, grad_forward, mask=inside)
            tl.store(grad_parameters + 5 * parameter_plane, grad_backward, mask=inside)


@jit
def _finish_gradient(
    current,
    weight,
    decay_forward,
    decay_backward,
    carries,
    current_earlier,
    grad_earlier,
    grad_later,
    grad_sum,
    grad_parameters,
    tokens,
    channels,
    group_size,
    batch,
    weight_row,
    weight_stride,
    weight_step,
    PADDED: constexpr,
    CHUNK: constexpr,
    SEGMENT: constexpr,
    BLOCK: constexpr,
    ONE_GROUP: constexpr,
):
    """Walks 4 of a sequence of several segments, after `_bpsn` for the gradient; `carries` are from there."""
    row, segment, start, end, channel, inside, group = _place(tokens, channels, group_size, SEGMENT, BLOCK, ONE_GROUP)
    offset = row * tokens * channels + channel
    if weight is not None:
        weight += row * weight_row + group * weight_step
    chunks_in_all = tl.cdiv(tokens, CHUNK)
    plane = batch.to(tl.int64) * chunks_in_all * channels
    carries_later = carries + row * chunks_in_all * channels + channel
    item = (row * tl.cdiv(tokens, SEGMENT) + segment) * channels + channel
    grad_forward, grad_backward = _integrate_gradient(
        current + offset,
        weight,
        grad_sum + offset,
        carries_later,
        carries_later + 3 * plane,
        start,
        end,
        channels,
        weight_stride,
        inside,
        tl.load(current_earlier + item, mask=inside, other=0),
        tl.load(grad_earlier + item, mask=inside, other=0),
        tl.load(grad_later + item, mask=inside, other=0),
        tl.load(decay_forward + group),
        tl.load(decay_backward + group),
        PADDED,
        CHUNK,
    )
    parameter_plane = batch.to(tl.int64) * tl.cdiv(tokens, SEGMENT) * channels
    tl.store(grad_parameters + 4 * parameter_plane + item, grad_forward, mask=inside)
    tl.store(grad_parameters + 5 * parameter_plane + item, grad_backward, mask=inside)


def _weight_of_tokens(
    current: torch.Tensor,
    mask: torch.Tensor | None,
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    normalize: bool,
    slopes: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`1 / n` at valid tokens and 0 at others, `[batch or 1, seq_len, groups or 1]`; the derivatives of `n`, or `None`.

    `None` for the weight stands for 1 at every token.
    """
    valid = None if mask is None else mask != 0
    if not normalize:
        return None if valid is None else valid.float()[..., None].contiguous(), None, None
    rows, tokens = (1, current.shape[1]) if valid is None else valid.shape
    shape = (rows, tokens, decay_forward.shape[0])
    weight, later_sums = (torch.empty(shape, device=current.device) for _ in range(2))
    both_slopes = [torch.empty(shape, device=current.device) if slopes else None for _ in range(2)]
    _weigh[(rows * shape[2],)](
        None if valid is None else valid.to(torch.uint8).contiguous(),
        decay_forward,
        decay_backward,
        later_sums,
        weight,
        *both_slopes,
        tokens,
        shape[2],
        TILE=min(WEIGHT_TILE, _power_of_2(tokens)),
        SLOPES=slopes,
        num_warps=4 if tokens > 128 else 1,
    )
    return weight, both_slopes[0], both_slopes[1]


def _power_of_2(number: int) -> int:
    """The first power of two that is not below `number`. Triton's own takes ten times as long from Python."""
    return 1 << (number - 1).bit_length()


class _Launches:
    """The launches of one call of an operator: what all of them share, and the sums between them."""

    def __init__(
        self, current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary,
        slopes=False,
    ) -> None:  # fmt: skip
        self.current = current.contiguous()
        self.batch, self.tokens, self.channels = current.shape
        self.reset_iterations = reset_iterations
        self.segments = -(-self.tokens // SEGMENT)
        groups = decay_forward.shape[0]
        group_size = self.channels // groups
        decays = decay_forward.contiguous(), decay_backward.contiguous()
        weight, *self.slopes = _weight_of_tokens(current, mask, *decays, normalize, slopes)
        carries = self.empty(4, self.batch, -(-self.tokens // CHUNK), self.channels)
        block = min(BLOCK, max(16, _power_of_2(self.channels)))
        self.blocks = -(-self.channels // block)
        # A program for each row, segment and block of channels.
        self.grid = (self.batch * self.segments * self.blocks,)
        self.decays = {"decay_forward": decays[0], "decay_backward": decays[1]}
        self.parameters = {"v_threshold": v_threshold.contiguous(), "reset": reset.contiguous()}
        self.shared: dict[str, Any] = {
            "current": self.current,
            "weight": weight,
            "tokens": self.tokens,
            "channels": self.channels,
            "group_size": group_size,
            "weight_row": 0 if weight is None or weight.shape[0] == 1 else weight.stride(0),
            "weight_stride": 0 if weight is None else weight.shape[2],
            "weight_step": 0 if weight is None or weight.shape[2] == 1 else 1,
            "PADDED": mask is not None,
            "CHUNK": CHUNK,
            "SEGMENT": SEGMENT,
            "BLOCK": block,
            "ONE_GROUP": group_size % block == 0,
            "num_warps": 1,
        }
        self.carries = {"carries": carries, "batch": self.batch}
        self.settings = {"RESET": reset_iterations > 0, "TERNARY": ternary}
        nothing = dict.fromkeys(
            "received_before received_after current_earlier current_later spikes_earlier spikes_later next_earlier "
            "next_later spikes packed grad_spikes slope_forward slope_backward grad_sum grad_parameters".split()
        )
        self.arguments: dict[str, Any] = {**nothing, "alpha": 1.0, "SURROGATE": "atan"}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.current.device)

    def bpsn(self, stage: str, **arguments) -> None:
        """Launch `_bpsn` for a stage."""
        arguments = {**self.arguments, **arguments}
        _bpsn[self.grid](
            **self.shared,
            **self.decays,
            **self.parameters,
            **self.carries,
            **self.settings,
            **arguments,
            STAGE=stage,
        )

    def new_sums(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for the sums over earlier and later tokens of each segment; nothing where there is one segment."""
        if self.segments == 1:
            return None, None
        shape = (self.batch, self.segments, self.channels)
        return self.empty(*shape), self.empty(*shape)

    def exchange(self, sums: tuple, decay_earlier: torch.Tensor, decay_later: torch.Tensor) -> None:
        """From each segment's own sums to those that it gets from the others, in place."""
        if self.segments > 1:
            _exchange[(self.batch * self.blocks,)](
                *sums,
                decay_earlier,
                decay_later,
                self.segments,
                self.channels,
                self.shared["group_size"],
                DOUBLINGS=SEGMENT.bit_length() - 1,
                BLOCK=self.shared["BLOCK"],
                num_warps=1,
            )

    def until_last_sweep(self) -> None:
        """All that comes before the last sweep of the reset; what the last one needs goes into `arguments`."""
        decays = tuple(self.decays.values())
        if self.segments > 1:
            sums = self.new_sums()
            _sum_currents[self.grid](**self.shared, **self.decays, sums_earlier=sums[0], sums_later=sums[1])
            self.exchange(sums, *decays)
            self.arguments |= {"current_earlier": sums[0], "current_later": sums[1]}
            if self.reset_iterations:
                self.arguments |= dict(zip(("spikes_earlier", "spikes_later"), self.new_sums(), strict=True))
                spikes = self.arguments["spikes_earlier"], self.arguments["spikes_later"]
                self.bpsn("provisional", next_earlier=spikes[0], next_later=spikes[1])
                self.exchange(spikes, *decays)
        for _ in range(self.reset_iterations - 1):
            if self.arguments["received_after"] is None:
                self.arguments["received_after"] = self.empty(*self.current.shape)
            sums = self.new_sums()
            self.bpsn("sweep", next_earlier=sums[0], next_later=sums[1])
            self.exchange(sums, *decays)
            self.arguments |= {
                "received_before": self.arguments["received_after"],
                "spikes_earlier": sums[0],
                "spikes_later": sums[1],
            }

    def finish_gradient(self, grad_sum: torch.Tensor, grad_parameters: torch.Tensor) -> None:
        """The second half of the backward pass over several segments, from `g` in `grad_sum`, in its place."""
        sums = self.new_sums()
        # The gradient goes the other way round: what a token sent to later ones comes back from them.
        decays = self.decays["decay_backward"], self.decays["decay_forward"]
        shared = {**self.shared, "current": grad_sum, "weight": None, "PADDED": False}
        _sum_currents[self.grid](
            **shared, decay_forward=decays[0], decay_backward=decays[1], sums_earlier=sums[0], sums_later=sums[1]
        )
        self.exchange(sums, *decays)
        _finish_gradient[self.grid](
            **self.shared,
            **self.decays,
            **self.carries,
            current_earlier=self.arguments["current_earlier"],
            grad_earlier=sums[0],
            grad_later=sums[1],
            grad_sum=grad_sum,
            grad_parameters=grad_parameters,
        )


def on_device_of(x: torch.Tensor):
    """The context in which kernels are launched on the GPU that `x` is on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.custom_op(f"{NAMESPACE}::bpsn_triton_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def bpsn_forward(
    current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary
):
    """Spikes of a `BPSN`, in the dtype of `current` and packed.

    `current` is `[batch, seq_len, channels]` in float32, bfloat16 or float16, `mask` `[batch, seq_len]`, `v_threshold`
    `[channels]`, the decays and the reset `[groups]`, all three in float32. Any number of channels and groups will do.
    """
    spikes = torch.empty_like(current, memory_format=torch.contiguous_format)
    packed = current.new_empty(packed_shape(current.shape, ternary), dtype=torch.uint8)
    if current.shape[0] == 0:
        return spikes, packed
    with on_device_of(current):
        launches = _Launches(
            current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary
        )
        launches.until_last_sweep()
        launches.bpsn("spikes", spikes=spikes, packed=packed)
    return spikes, packed


@torch.library.custom_op(f"{NAMESPACE}::bpsn_triton_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def bpsn_backward(
    grad_spikes,
    current,
    mask,
    v_threshold,
    decay_forward,
    decay_backward,
    reset,
    normalize,
    reset_iterations,
    ternary,
    surrogate,
    alpha,
):
    """Gradients to the current, the threshold, both decays and the reset; arguments as for `bpsn_forward`."""
    grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
    if current.shape[0] == 0:
        return grad_current, *(torch.zeros_like(x) for x in (v_threshold, decay_forward, decay_backward, reset))
    with on_device_of(current):
        launches = _Launches(
            current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary, True
        )
        launches.until_last_sweep()
        parameters = launches.empty(6, launches.batch, launches.segments, launches.channels)
        launches.bpsn(
            "gradient",
            grad_spikes=grad_spikes.contiguous(),
            slope_forward=launches.slopes[0],
            slope_backward=launches.slopes[1],
            grad_sum=grad_current,
            grad_parameters=parameters,
            alpha=alpha,
            SURROGATE=surrogate,
        )
        if launches.segments > 1:
            launches.finish_gradient(grad_current, parameters)
    of_channel = parameters.sum((1, 2))
    of_group = of_channel.unflatten(1, (decay_forward.shape[0], -1)).sum(-1)
    # An operator returns tensors of their own, not views of one.
    of_weight_and_sums = of_group[2:4] + of_group[4:6]
    grad_forward, grad_backward = of_weight_and_sums.unbind()
    return grad_current, *(grad.clone() for grad in (of_channel[0], grad_forward, grad_backward, of_group[1]))


bpsn_forward.register_fake(fake_bpsn_forward)
bpsn_backward.register_fake(fake_bpsn_backward)
