"""The BPSN on a GPU for sequences of up to `MAX_TOKENS`: one Triton kernel forward, and two backward.

Forward, a program owns a block of channels of one row with all its tokens: it reads the currents once, keeps them in
registers, and writes each spike once as a float and once as a bit. Sums over tokens, in both directions, the division
by `n`, every sweep of the reset, threshold and packing happen in between. The parameters are read as they are trained
(logits, and a strength whose sign does not count), so nothing runs before the kernel. Backward, a program does the
same again and goes on to the gradients. It keeps the current, and nothing else, from the forward pass. The parameters'
gradients are sums over rows, which a second small kernel adds up: without atomic additions, so that a run can be
repeated bit for bit.

How a sum over tokens is split among threads: the sequence is a tile (see `triton_tiles`). Inside the chunks a sum is a
step per token, for all chunks at once; from chunk to chunk it is an associative scan of a `CHUNK`-th of the numbers
(`_carry`). A block that lies in one group needs its decays, its mask and its `n` once and not per channel.

Longer sequences are for `bpsn_segments_triton`.
"""

from typing import Any

import torch

from .cpu_kernels import empty_spikes
from .triton_tiles import (
    constexpr,
    fire,
    fire_backward,
    jit,
    kernel_in_operator,
    leaky_sums,
    leaky_sums_backward,
    load_rows,
    on_device_of,
    register_fake,
    reset_by,
    scale,
    silence,
    store_rows,
    store_spikes,
    sums_before,
    tl,
    triton_operator,
)

# The longest sequence that a program can hold.
MAX_TOKENS = 512
CHUNK = 8
# Channels of a program and its warps, by the number of tokens rounded up to a power of two; the first row that is not
# below it. A kernel is compiled once for each row, so a new length needs none. A thread has 32 numbers forward.
FORWARD_TILES = {32: (32, 1), 64: (32, 2), 128: (32, 4), 256: (32, 8), 512: (16, 8)}
BACKWARD_TILES = {32: (32, 1), 64: (32, 2), 128: (32, 4), 256: (32, 8), 512: (16, 8)}
# Rows and channels that the sum over rows takes at a time.
SUM_ROWS, SUM_CHANNELS = 64, 32


@jit
def _valid_tokens(mask, first, tokens, CHUNK: constexpr):
    """1 at valid tokens and 0 at others, a tile of one column."""
    tile = ()
    for k in tl.static_range(CHUNK):
        valid = first + k < tokens
        if mask is not None:
            valid = valid & (tl.load(mask + first + k, mask=valid, other=0) != 0)
        tile = tile + (tl.where(valid, 1.0, 0.0),)
    return tile


@jit
def _join(power, total, power_before, before, next_power, next_total, next_power_before, next_before):
    """Two neighbouring runs of chunks as one: its decay and its sum, and both without its last chunk."""
    return (
        power * next_power,
        next_power * total + next_total,
        power * next_power_before,
        next_power_before * total + next_before,
    )


@jit
def _carry(tile, decay, REVERSE: constexpr, CHUNK: constexpr):
    """The leaky sum over the tokens before each chunk (after it, if `REVERSE`), as it stands at the one beside it."""
    ends = tile[CHUNK - 1 if REVERSE else 0]
    power = decay
    for k in tl.static_range(1, CHUNK):
        ends = decay * ends + tile[CHUNK - 1 - k if REVERSE else k]
    for _ in tl.static_range(CHUNK.bit_length() - 1):
        power = power * power
    # Triton 3.6 cannot scan a tile of one column.
    COLUMN: constexpr = ends.shape[1] == 1
    if COLUMN:
        ends, power = tl.reshape(ends, [ends.shape[0]]), tl.reshape(power, [1])
    power = tl.broadcast_to(power, ends.shape)
    # The sum without the last chunk is kept beside the sum: to shift the latter would change the layout of all tiles.
    _, _, _, before = tl.associative_scan((power, ends, power * 0 + 1, ends * 0), 0, _join, reverse=REVERSE)
    return before[:, None] if COLUMN else before


@jit
def _carries(tile, forward, backward, CHUNK: constexpr):
    """What earlier and what later tokens hand to each chunk."""
    return _carry(tile, forward, False, CHUNK), _carry(tile, backward, True, CHUNK)


@jit
def _inverse_weights(valid, earlier, later, forward, backward, CHUNK: constexpr):
    """`1 / n` at valid tokens and 0 at others, from the carries of `valid`."""
    weights, _, _ = leaky_sums(valid, earlier, later, forward, backward, True, CHUNK)
    inverse = ()
    for k in tl.static_range(CHUNK):
        inverse = inverse + (tl.where(valid[k] > 0, 1 / tl.where(valid[k] > 0, weights[k], 1), 0),)
    return inverse


@jit
def _slopes(valid, carry, decay, REVERSE: constexpr, CHUNK: constexpr):
    """The derivative of one direction's part of `n` with respect to its decay, from the carry of `valid`.

    `y[t] = decay * y[t - 1] + m[t]` gives `y'[t] = decay * y'[t - 1] + y[t - 1]`: the leaky sum of the sum before.
    """
    before, _ = sums_before(valid, carry, decay, REVERSE, CHUNK)
    slope = _carry(before, decay, REVERSE, CHUNK)
    slopes = ()
    for k in tl.static_range(CHUNK):
        slope = decay * slope + before[CHUNK - 1 - k if REVERSE else k]
        slopes = ((slope,) + slopes) if REVERSE else (slopes + (slope,))
    return slopes


@jit
def _leaky_means(tile, earlier, later, inverse, forward, backward, WITH_SELF: constexpr, CHUNK: constexpr):
    """`sum_j a[t, j] x[j] / n[t]`, over all `j` or over `j != t`, from the carries."""
    sums, _, _ = leaky_sums(tile, earlier, later, forward, backward, WITH_SELF, CHUNK)
    return scale(sums, inverse, CHUNK)


@jit
def _load_currents(current, mask, valid, first, tokens, channels, inside, CHUNK: constexpr):
    """A tile of currents, with zeros in the padding; `current` are those of the first tokens of the chunks."""
    x = load_rows(current, first, tokens, channels, inside, CHUNK)
    if mask is not None:
        x = silence(x, valid, CHUNK)
    return x


@jit
def _charge(
    current, mask, v_threshold, decay_forward_logit, decay_backward_logit,
    tokens, channels, group_size,
    NORMALIZE: constexpr, CHUNK: constexpr, CHUNKS: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """What forward and backward pass start with.

    Where this program works: row, first channel, channels, which of them there are, their groups, the first token of
    each chunk, and the place of their currents. Threshold and decays. Valid tokens and `1 / n`. The carries from
    earlier and later tokens of valid tokens and of currents. The potentials.
    """
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    channel = (start + tl.arange(0, BLOCK))[None, :]
    inside = channel < channels
    if ONE_GROUP:
        group = tl.zeros([1, 1], tl.int32) + start // group_size
    else:
        group = tl.minimum(channel, channels - 1) // group_size
    first = (tl.arange(0, CHUNKS) * CHUNK)[:, None]
    offset = row * tokens * channels + first * channels + channel
    # What lies beyond the last channel never fires: its bits share a byte with those of real channels.
    threshold = tl.load(v_threshold + channel, mask=inside, other=float("inf")).to(tl.float32)
    forward = tl.sigmoid(tl.load(decay_forward_logit + group).to(tl.float32))
    backward = tl.zeros_like(forward)
    if decay_backward_logit is not None:
        backward = tl.sigmoid(tl.load(decay_backward_logit + group).to(tl.float32))
    if mask is not None:
        mask += row * tokens
    valid = _valid_tokens(mask, first, tokens, CHUNK)
    x = _load_currents(current + offset, mask, valid, first, tokens, channels, inside, CHUNK)
    inverse = valid
    of_valid = _carries(valid, forward, backward, CHUNK)
    if NORMALIZE:
        inverse = _inverse_weights(valid, of_valid[0], of_valid[1], forward, backward, CHUNK)
    of_currents = _carries(x, forward, backward, CHUNK)
    potentials = _leaky_means(x, of_currents[0], of_currents[1], inverse, forward, backward, True, CHUNK)
    place = row, start, channel, inside, group, first, offset
    return place, (threshold, forward, backward), valid, inverse, of_valid, of_currents, potentials


@jit
def _reset(potentials, valid, inverse, values, reset_strength, group, sweeps, TERNARY: constexpr, CHUNK: constexpr):
    """The margins after all sweeps, and the reset received in the last: `sum_{j != t} a[t, j] s[j] / n[t]`."""
    threshold, forward, backward = values
    margins = potentials
    received = potentials
    if reset_strength is not None:
        reset = tl.abs(tl.load(reset_strength + group).to(tl.float32))
        for _ in range(sweeps):
            fired = fire(margins, valid, threshold, TERNARY, CHUNK)
            earlier, later = _carries(fired, forward, backward, CHUNK)
            received = _leaky_means(fired, earlier, later, inverse, forward, backward, False, CHUNK)
            margins = reset_by(potentials, received, reset, CHUNK)
    return margins, received


@jit
def _bpsn_forward(
    current, mask, v_threshold, decay_forward_logit, decay_backward_logit, reset_strength, spikes, packed,
    packed_plane,
    tokens, channels, group_size, sweeps,
    NORMALIZE: constexpr, TERNARY: constexpr, CHUNK: constexpr, CHUNKS: constexpr, BLOCK: constexpr,
    ONE_GROUP: constexpr,
):  # fmt: skip
    """Currents to spikes. `packed_plane` is the number of bytes of a sign's plane."""
    place, values, valid, inverse, _, _, potentials = _charge(
        current, mask, v_threshold, decay_forward_logit, decay_backward_logit, tokens, channels, group_size,
        NORMALIZE, CHUNK, CHUNKS, BLOCK, ONE_GROUP,
    )  # fmt: skip
    row, start, _channel, inside, group, first, offset = place
    margins, _ = _reset(potentials, valid, inverse, values, reset_strength, group, sweeps, TERNARY, CHUNK)
    fired = fire(margins, valid, values[0], TERNARY, CHUNK)
    packed += row * tokens * tl.cdiv(channels, 8)
    store_spikes(
        fired, spikes + offset, packed, packed_plane, first, tokens, channels, start, inside, TERNARY, CHUNK, BLOCK
    )


@jit
def _bpsn_backward(
    grad_spikes, current, mask, v_threshold, decay_forward_logit, decay_backward_logit, reset_strength, grad_current,
    partial,
    tokens, channels, group_size, sweeps, batch, alpha,
    NORMALIZE: constexpr, TERNARY: constexpr, SURROGATE: constexpr, CHUNK: constexpr, CHUNKS: constexpr,
    BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """The gradient to the current, and each row's part of the gradients to threshold, decays and reset into `partial`.

    `partial` is `[4, batch, channels]`.
    """
    place, values, valid, inverse, of_valid, of_currents, potentials = _charge(
        current, mask, v_threshold, decay_forward_logit, decay_backward_logit, tokens, channels, group_size,
        NORMALIZE, CHUNK, CHUNKS, BLOCK, ONE_GROUP,
    )  # fmt: skip
    row, _start, channel, inside, group, first, offset = place
    threshold, forward, backward = values
    earlier, later = of_currents
    margins, received = _reset(potentials, valid, inverse, values, reset_strength, group, sweeps, TERNARY, CHUNK)

    if NORMALIZE:
        slopes_forward = _slopes(valid, of_valid[0], forward, False, CHUNK)
        slopes_backward = _slopes(valid, of_valid[1], backward, True, CHUNK)
    grad_threshold = tl.zeros([CHUNKS, BLOCK], tl.float32)
    grad_forward = tl.zeros([CHUNKS, BLOCK], tl.float32)
    grad_backward = tl.zeros([CHUNKS, BLOCK], tl.float32)
    grad_reset = tl.zeros([CHUNKS, BLOCK], tl.float32)
    incoming = silence(load_rows(grad_spikes + offset, first, tokens, channels, inside, CHUNK), valid, CHUNK)
    grads, grad_threshold = fire_backward(
        incoming, margins, threshold, alpha, grad_threshold, TERNARY, SURROGATE, CHUNK
    )
    if reset_strength is not None:
        for k in tl.static_range(CHUNK):
            grad_reset -= received[k] * grads[k]
    # The gradient to the leaky sum.
    g = scale(grads, inverse, CHUNK)
    if NORMALIZE:
        for k in tl.static_range(CHUNK):
            # v = sum / n, so d loss / d n = - grad v / n.
            grad_forward -= potentials[k] * g[k] * slopes_forward[k]
            grad_backward -= potentials[k] * g[k] * slopes_backward[k]

    to_later, to_earlier = _carries(g, backward, forward, CHUNK)
    # Read again, from the cache: to hold it through all of the above would take more registers than there are.
    tl.debug_barrier()
    x = _load_currents(current + offset, mask, valid, first, tokens, channels, inside, CHUNK)
    grads, grad_forward, grad_backward, _, _ = leaky_sums_backward(
        g, x, earlier, later, to_earlier, to_later, forward, backward, grad_forward, grad_backward, CHUNK
    )
    store_rows(silence(grads, valid, CHUNK), grad_current + offset, first, tokens, channels, inside, CHUNK)

    partial += row * channels + channel
    plane = batch.to(tl.int64) * channels
    tl.store(partial, tl.sum(grad_threshold, 0)[None, :], mask=inside)
    tl.store(partial + plane, tl.sum(grad_forward, 0)[None, :], mask=inside)
    tl.store(partial + 2 * plane, tl.sum(grad_backward, 0)[None, :], mask=inside)
    tl.store(partial + 3 * plane, tl.sum(grad_reset, 0)[None, :], mask=inside)


@jit
def _sum_rows(
    partial, decay_forward_logit, decay_backward_logit, reset_strength, grad_threshold, grad_forward, grad_backward,
    grad_reset, batch, channels, group_size,
    ROWS: constexpr, CHANNELS: constexpr,
):  # fmt: skip
    """Sums of `partial` (see `_bpsn_backward`) over rows and groups, and from decays and reset on to their parameters.

    A program for each group and each of the four gradients.
    """
    group = tl.program_id(0)
    which = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    partial += which.to(tl.int64) * batch * channels
    total = 0.0
    for block in range(0, tl.cdiv(group_size, CHANNELS)):
        channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        inside = channel < group_size
        channel += group * group_size
        sums = tl.zeros([ROWS, CHANNELS], tl.float32)
        for start in range(0, batch, ROWS):
            rows = (start + row).to(tl.int64)
            sums += tl.load(partial + rows * channels + channel, mask=inside & (rows < batch), other=0)
        of_channel = tl.sum(sums, 0)
        total += tl.sum(of_channel, 0)
        if which == 0:
            tl.store(grad_threshold + channel, of_channel[None, :].to(grad_threshold.dtype.element_ty), mask=inside)
    if which == 1:
        decay = tl.sigmoid(tl.load(decay_forward_logit + group).to(tl.float32))
        tl.store(grad_forward + group, (total * decay * (1 - decay)).to(grad_forward.dtype.element_ty))
    # The compiler decides about what is `None`, and the program about its number: so these are two.
    if decay_backward_logit is not None:  # noqa: SIM102
        if which == 2:
            decay = tl.sigmoid(tl.load(decay_backward_logit + group).to(tl.float32))
            tl.store(grad_backward + group, (total * decay * (1 - decay)).to(grad_backward.dtype.element_ty))
    if reset_strength is not None:  # noqa: SIM102
        if which == 3:
            negative = tl.load(reset_strength + group).to(tl.float32) < 0
            tl.store(grad_reset + group, tl.where(negative, -total, total).to(grad_reset.dtype.element_ty))


def _tile(tiles: dict[int, tuple[int, int]], tokens: int, channels: int, groups: int) -> dict[str, Any]:
    """The arguments of a kernel that say how large its programs are."""
    padded = next(length for length in tiles if length >= tokens)
    block, warps = tiles[padded]
    group_size = channels // groups
    return {
        "CHUNK": CHUNK,
        "CHUNKS": padded // CHUNK,
        "BLOCK": block,
        "ONE_GROUP": group_size % block == 0,
        "num_warps": warps,
    }


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@triton_operator("bpsn_tile_forward")
def bpsn_tile_forward(
    current: torch.Tensor,
    mask: torch.Tensor | None,
    v_threshold: torch.Tensor,
    decay_forward_logit: torch.Tensor,
    decay_backward_logit: torch.Tensor | None,
    reset_strength: torch.Tensor | None,
    normalize: bool,
    reset_iterations: int,
    ternary: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes of a `BPSN`, in the dtype of `current` and packed.

    `current` is `[batch, seq_len, channels]` in float32, bfloat16 or float16 with `seq_len <= MAX_TOKENS`, `mask`
    `[batch, seq_len]` of any dtype, `v_threshold` `[channels]`, the logits and the strength `[groups]`.
    """
    batch, tokens, channels = current.shape
    spikes, packed = empty_spikes(current, ternary)
    if batch:
        groups = decay_forward_logit.shape[0]
        current, mask, *parameters = _contiguous(
            current, mask, v_threshold, decay_forward_logit, decay_backward_logit, reset_strength
        )
        tile = _tile(FORWARD_TILES, tokens, channels, groups)
        with on_device_of(current):
            kernel_in_operator(_bpsn_forward)[(batch * -(-channels // tile["BLOCK"]),)](
                current,
                mask,
                *parameters,
                spikes,
                packed,
                packed.numel() // packed.shape[0],
                tokens,
                channels,
                channels // groups,
                reset_iterations,
                NORMALIZE=normalize,
                TERNARY=ternary,
                **tile,
            )
    return spikes, packed


@triton_operator("bpsn_tile_backward")
def bpsn_tile_backward(
    grad_spikes: torch.Tensor,
    current: torch.Tensor,
    mask: torch.Tensor | None,
    v_threshold: torch.Tensor,
    decay_forward_logit: torch.Tensor,
    decay_backward_logit: torch.Tensor | None,
    reset_strength: torch.Tensor | None,
    normalize: bool,
    reset_iterations: int,
    ternary: bool,
    surrogate: str,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to the current, threshold, both logits and strength, zeros for what is `None`; see the forward one."""
    batch, tokens, channels = current.shape
    groups = decay_forward_logit.shape[0]
    grad_current, *grads = _new_gradients(
        current, v_threshold, decay_forward_logit, decay_backward_logit, reset_strength
    )
    if not batch:
        for grad in grads:
            grad.zero_()
        return grad_current, grads[0], grads[1], grads[2], grads[3]
    grad_spikes, current, mask, *parameters = _contiguous(
        grad_spikes, current, mask, v_threshold, decay_forward_logit, decay_backward_logit, reset_strength
    )
    partial = current.new_empty((4, batch, channels), dtype=torch.float32)
    tile = _tile(BACKWARD_TILES, tokens, channels, groups)
    with on_device_of(current):
        kernel_in_operator(_bpsn_backward)[(batch * -(-channels // tile["BLOCK"]),)](
            grad_spikes,
            current,
            mask,
            *parameters,
            grad_current,
            partial,
            tokens,
            channels,
            channels // groups,
            reset_iterations,
            batch,
            alpha,
            NORMALIZE=normalize,
            TERNARY=ternary,
            SURROGATE=surrogate,
            **tile,
        )
        kernel_in_operator(_sum_rows)[(groups, 4)](
            partial,
            *parameters[1:],
            *grads,
            batch,
            channels,
            channels // groups,
            ROWS=SUM_ROWS,
            CHANNELS=SUM_CHANNELS,
            num_warps=4,
        )
    return grad_current, grads[0], grads[1], grads[2], grads[3]


def _new_gradients(current: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Room for the gradients. For a parameter that there is not, an empty tensor: an operator returns no `None`."""
    return tuple(
        current.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (current, *parameters)
    )


register_fake(bpsn_tile_forward, lambda current, *arguments: empty_spikes(current, arguments[-1]))
register_fake(bpsn_tile_backward, lambda grad_spikes, current, mask, *others: _new_gradients(current, *others[:4]))
