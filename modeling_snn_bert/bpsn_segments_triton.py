"""The BPSN on a GPU for long sequences: Triton kernels from currents to spikes and back, as torch operators.

A program owns `BLOCK` channels of one row, in one warp, and walks over the tokens in chunks of `CHUNK` that it keeps in
registers: tiles (see `triton_tiles`) of one row. What one chunk hands to the next (the *carries*, a number per channel
and chunk) wait in buffers of an eighth of the tokens, so the second direction of a chunk can be computed without
keeping anything per token. The walks over a sequence, with what they touch per token and channel:

1. from the last token to the first: the carries of the currents' sum over later tokens. Reads the current.
2. from the first to the last: the sum over earlier tokens, the potential, the provisional spikes and their carries.
   Reads the current again.
3. from the last to the first: potential, reset received, spikes. Reads the current again, writes spikes and bits.

Of the three reads of a current only the first has to come from memory: in bfloat16 the block of a segment is 32 KB, and
those of all programs that run at a time can stay in the caches. The backward pass (which keeps the current and nothing
else) does 1 and 2 again, then

3. the gradient `g` of the leaky sum in place of the spikes. Reads current and gradient, writes `g`.
4. both sums over `g`, which are the gradient to the current, and the gradients to the decays. Reads `g` twice and the
   current, writes the result over `g`. In float16 and bfloat16 `g` is rounded to that type before it is summed.

A sequence is cut into segments of `SEGMENT` tokens with a program each, so that few rows fill a GPU too. A segment
needs what the others send it before it can go on, so each thing that is summed over tokens (the currents, the spikes of
each sweep, `g`) ends a launch: with one sweep of the reset the currents come from memory three times forward and four
times backward, and `g` twice; the carries take 1.5 bytes a current forward.
Every further sweep of the reset is a launch of its own, and keeps the reset received in a float32 buffer
`[batch, seq_len, channels]` in the meantime. Time and memory are linear in the length.
"""

from typing import Any

import torch

from .cpu_kernels import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    NAMESPACE,
    empty_spikes,
    fake_bpsn_backward,
    fake_bpsn_forward,
)
from .triton_tiles import (
    constexpr,
    fire,
    fire_backward,
    jit,
    leaky_sums,
    leaky_sums_backward,
    load_rows,
    on_device_of,
    reset_by,
    scale,
    silence,
    store_rows,
    store_spikes,
    sums_before,
    tl,
)

CHUNK = 8
# Powers of two, and the segment a multiple of the chunk.
SEGMENT = 256
BLOCK = 64
# Tokens of one step of the kernel that sums the mask.
WEIGHT_TILE = 1024


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
    mask, decay_forward, decay_backward, later_sums, weight, slope_forward, slope_backward,
    tokens, groups,
    TILE: constexpr, SLOPES: constexpr,
):  # fmt: skip
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
def _neuron(
    v_threshold, decay_forward, decay_backward, reset, carries,
    tokens, channels, group_size, batch,
    PADDED: constexpr, CHUNK: constexpr, SEGMENT: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """What a kernel starts from: where its program works, and the neuron's parameters there.

    Row, first channel, which channels there are, the place of its numbers in `[batch, segments, channels]`, and what
    the functions below take as `walk`: first token and the one after the last, channels in all, which of its own there
    are, where its row of currents starts, where its weights do, their stride. Threshold, decays and reset. This
    program's place in the first plane of the carries, and the size of a plane.
    """
    blocks = tl.cdiv(channels, BLOCK)
    segments = tl.cdiv(tokens, SEGMENT)
    first = tl.program_id(0) % blocks * BLOCK
    item = tl.program_id(0) // blocks
    row = (item // segments).to(tl.int64)
    start = item % segments * SEGMENT
    end = tl.minimum(start + SEGMENT, tokens)
    channel = (first + tl.arange(0, BLOCK))[None, :]
    inside = channel < channels
    # A block that lies in one group reads one number where another block reads one per channel.
    group = first // group_size if ONE_GROUP else tl.minimum(channel, channels - 1) // group_size
    groups = channels // group_size
    # Without padding all rows have the same weights.
    weights_at = row * tokens * groups + group if PADDED else group
    walk = (start, end, channels, inside, row * tokens * channels + channel, weights_at, groups)
    # What lies beyond the last channel never fires: its bits share a byte with those of real channels.
    threshold = tl.load(v_threshold + channel, mask=inside, other=float("inf"))
    values = threshold, tl.load(decay_forward + group), tl.load(decay_backward + group), tl.load(reset + group)
    item = item.to(tl.int64) * channels + channel
    of_row = tl.cdiv(tokens, CHUNK) * channels
    return row, first, inside, item, walk, values, carries + row * of_row + channel, batch.to(tl.int64) * of_row


@jit
def _weights(weight, token, walk, CHUNK: constexpr):
    """A chunk of `1 / n`, or of its slopes; 0 at tokens that are not valid."""
    _start, end, _channels, _inside, _offset, first, stride = walk
    chunk = ()
    for k in tl.static_range(CHUNK):
        chunk = chunk + (tl.load(weight + first + (token + k) * stride, mask=token + k < end, other=0),)
    return chunk


@jit
def _load_chunk(rows, token, walk, CHUNK: constexpr):
    _start, end, channels, inside, offset, _first, _stride = walk
    return load_rows(rows + offset + token.to(tl.int64) * channels, token, end, channels, inside, CHUNK)


@jit
def _store_chunk(chunk, rows, token, walk, CHUNK: constexpr):
    _start, end, channels, inside, offset, _first, _stride = walk
    store_rows(chunk, rows + offset + token.to(tl.int64) * channels, token, end, channels, inside, CHUNK)


@jit
def _load_currents(current, weight, token, walk, PADDED: constexpr, CHUNK: constexpr):
    """A chunk of the currents, silenced, and its weights."""
    weights = _weights(weight, token, walk, CHUNK)
    x = _load_chunk(current, token, walk, CHUNK)
    if PADDED:
        x = silence(x, weights, CHUNK)
    return x, weights


@jit
def _walk_later(rows, weight, walk, later, decay, carries, PADDED: constexpr, CHUNK: constexpr):
    """Walk 1: store, for each chunk, the sum of `rows` over the tokens after it."""
    start, end, channels, inside, _offset, _first, _stride = walk
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(0, chunks):
        token = start + (chunks - 1 - i) * CHUNK
        tl.store(carries + (token // CHUNK) * channels, later, mask=inside)
        x, _ = _load_currents(rows, weight, token, walk, PADDED, CHUNK)
        _, later = sums_before(x, later, decay, True, CHUNK)
    tl.debug_barrier()


@jit
def _add_to_sums(x, earlier, later, power, forward, backward, REVERSE: constexpr, CHUNK: constexpr):
    """Go on with a segment's sums of earlier and of later tokens, from its first token or, if `REVERSE`, its last.

    One of them stands at the token reached. The other stands at the end of the segment where the walk began; `power`
    is what the next token has left of itself there.
    """
    for k in tl.static_range(CHUNK):
        if REVERSE:
            later = backward * later + x[CHUNK - 1 - k]
            earlier += power * x[CHUNK - 1 - k]
            power = power * forward
        else:
            earlier = forward * earlier + x[k]
            later += power * x[k]
            power = power * backward
    return earlier, later, power


@jit
def _sum_currents(
    current, weight, v_threshold, decay_forward, decay_backward, reset, carries, sums_earlier, sums_later,
    tokens, channels, group_size, batch,
    PADDED: constexpr, CHUNK: constexpr, SEGMENT: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """Both leaky sums of the currents over each segment alone, `[batch, segments, channels]`."""
    _row, _first, inside, item, walk, values, _carries, _plane = _neuron(
        v_threshold, decay_forward, decay_backward, reset, carries,
        tokens, channels, group_size, batch,
        PADDED, CHUNK, SEGMENT, BLOCK, ONE_GROUP,
    )  # fmt: skip
    earlier = tl.zeros([1, BLOCK], tl.float32)
    later = tl.zeros([1, BLOCK], tl.float32)
    power = tl.zeros([1, BLOCK], tl.float32) + 1
    for chunk in range(0, tl.cdiv(walk[1] - walk[0], CHUNK)):
        x, _ = _load_currents(current, weight, walk[0] + chunk * CHUNK, walk, PADDED, CHUNK)
        earlier, later, power = _add_to_sums(x, earlier, later, power, values[1], values[2], False, CHUNK)
    tl.store(sums_earlier + item, earlier, mask=inside)
    tl.store(sums_later + item, later, mask=inside)


@jit
def _exchange(
    sums_earlier, sums_later, decay_earlier, decay_later, segments, channels, group_size,
    DOUBLINGS: constexpr, BLOCK: constexpr,
):  # fmt: skip
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
def _fire_chunk(
    current, weight, received_before, token, walk, earlier, later, values,
    TERNARY: constexpr, PADDED: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """A chunk before a sweep: weights, potentials, spikes, and the currents' sums at its last and first token."""
    threshold, forward, backward, reset = values
    x, weights = _load_currents(current, weight, token, walk, PADDED, CHUNK)
    sums, earlier, later = leaky_sums(x, earlier, later, forward, backward, True, CHUNK)
    potentials = scale(sums, weights, CHUNK)
    margins = potentials
    if received_before is not None:
        margins = reset_by(potentials, _load_chunk(received_before, token, walk, CHUNK), reset, CHUNK)
    return weights, potentials, fire(margins, weights, threshold, TERNARY, CHUNK), earlier, later


@jit
def _walk_earlier(
    current, weight, received_before, spikes_earlier, item, walk, earlier, values, carries, plane,
    RESET: constexpr, TERNARY: constexpr, PADDED: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """Walk 2: store, for each chunk, the sum of the currents over the tokens before it, and that of the spikes."""
    start, end, channels, inside, _offset, _first, _stride = walk
    if RESET:
        sent = tl.load(spikes_earlier + item, mask=inside, other=0)
    for i in range(0, tl.cdiv(end - start, CHUNK)):
        token = start + i * CHUNK
        at = carries + (token // CHUNK) * channels
        later = tl.load(at, mask=inside, other=0)
        tl.store(at + plane, earlier, mask=inside)
        _, _, fired, earlier, _ = _fire_chunk(
            current, weight, received_before, token, walk, earlier, later, values, TERNARY, PADDED, CHUNK
        )
        if RESET:
            tl.store(at + 2 * plane, sent, mask=inside)
            _, sent = sums_before(fired, sent, values[1], False, CHUNK)
    tl.debug_barrier()


@jit
def _sweep_chunk(
    current, weight, received_before, token, walk, later, sent, values, carries, plane,
    RESET: constexpr, TERNARY: constexpr, PADDED: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """A chunk of walk 3, after the sweep.

    Weights, potentials, the reset received, margins, and the sums of currents and spikes at its first token.
    """
    _threshold, forward, backward, reset = values
    at = carries + (token // CHUNK) * walk[2]
    earlier = tl.load(at + plane, mask=walk[3], other=0)
    weights, potentials, fired, _, later = _fire_chunk(
        current, weight, received_before, token, walk, earlier, later, values, TERNARY, PADDED, CHUNK
    )
    received = potentials
    margins = potentials
    if RESET:
        earlier = tl.load(at + 2 * plane, mask=walk[3], other=0)
        sums, _, sent = leaky_sums(fired, earlier, sent, forward, backward, False, CHUNK)
        received = scale(sums, weights, CHUNK)
        margins = reset_by(potentials, received, reset, CHUNK)
    return weights, potentials, received, margins, later, sent


@jit
def _spikes(
    current, weight, v_threshold, decay_forward, decay_backward, reset, carries, current_earlier, current_later,
    spikes_earlier, spikes_later, received_before, received_after, next_earlier, next_later, spikes, packed,
    tokens, channels, group_size, batch,
    RESET: constexpr, TERNARY: constexpr, PADDED: constexpr, CHUNK: constexpr, SEGMENT: constexpr, BLOCK: constexpr,
    ONE_GROUP: constexpr,
):  # fmt: skip
    """Walks 1 to 3 with a sweep of the reset, or with `RESET` false walks 1 and 2: the spikes.

    The last sweep writes them to `spikes` and `packed`. One before it writes what is received in it to
    `received_after`, which may be `received_before`, and the spikes' sums over each segment to `next_*`.
    What is not written is `None`.
    """
    row, first_channel, inside, item, walk, values, carries, plane = _neuron(
        v_threshold, decay_forward, decay_backward, reset, carries,
        tokens, channels, group_size, batch,
        PADDED, CHUNK, SEGMENT, BLOCK, ONE_GROUP,
    )  # fmt: skip
    start, end, _channels, _inside, offset, _first, _stride = walk
    later = tl.load(current_later + item, mask=inside, other=0)
    _walk_later(current, weight, walk, later, values[2], carries, PADDED, CHUNK)
    earlier = tl.load(current_earlier + item, mask=inside, other=0)
    if RESET:
        _walk_earlier(
            current, weight, received_before, spikes_earlier, item, walk, earlier, values, carries, plane, True,
            TERNARY, PADDED, CHUNK,
        )  # fmt: skip
        sent = tl.load(spikes_later + item, mask=inside, other=0)
    sum_earlier = tl.zeros([1, BLOCK], tl.float32)
    sum_later = tl.zeros([1, BLOCK], tl.float32)
    power = tl.zeros([1, BLOCK], tl.float32) + 1
    count = tl.cdiv(end - start, CHUNK)
    for i in range(0, count):
        if RESET:
            token = start + (count - 1 - i) * CHUNK
            weights, _, received, margins, later, sent = _sweep_chunk(
                current, weight, received_before, token, walk, later, sent, values, carries, plane, True, TERNARY,
                PADDED, CHUNK,
            )  # fmt: skip
            fired = fire(margins, weights, values[0], TERNARY, CHUNK)
            if received_after is not None:
                # What was received before has been read by all threads, if it is to be overwritten.
                tl.debug_barrier()
                _store_chunk(received, received_after, token, walk, CHUNK)
        else:
            token = start + i * CHUNK
            later = tl.load(carries + (token // CHUNK) * channels, mask=inside, other=0)
            _, _, fired, earlier, _ = _fire_chunk(
                current, weight, None, token, walk, earlier, later, values, TERNARY, PADDED, CHUNK
            )
        if next_earlier is not None:
            sum_earlier, sum_later, power = _add_to_sums(
                fired, sum_earlier, sum_later, power, values[1], values[2], RESET, CHUNK
            )
        if spikes is not None:
            width = tl.cdiv(channels, 8)
            store_spikes(
                fired, spikes + offset + token.to(tl.int64) * channels, packed + row * tokens * width,
                batch.to(tl.int64) * tokens * width, token, end, channels, first_channel, inside, TERNARY, CHUNK, BLOCK,
            )  # fmt: skip
    if next_earlier is not None:
        tl.store(next_earlier + item, sum_earlier, mask=inside)
        tl.store(next_later + item, sum_later, mask=inside)


@jit
def _gradient(
    current, weight, v_threshold, decay_forward, decay_backward, reset, carries, current_earlier, current_later,
    spikes_earlier, spikes_later, received_before, grad_spikes, slope_forward, slope_backward, grad_sum,
    grad_parameters,
    tokens, channels, group_size, batch, alpha,
    SURROGATE: constexpr, RESET: constexpr, TERNARY: constexpr, PADDED: constexpr, CHUNK: constexpr,
    SEGMENT: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """Walks 1 to 3 with the last sweep: `g` into `grad_sum`.

    `grad_parameters` is `[6, batch, segments, channels]`: threshold, reset, both decays through `n`, both decays
    through the sums.
    """
    _row, _first, inside, item, walk, values, carries, plane = _neuron(
        v_threshold, decay_forward, decay_backward, reset, carries,
        tokens, channels, group_size, batch,
        PADDED, CHUNK, SEGMENT, BLOCK, ONE_GROUP,
    )  # fmt: skip
    later = tl.load(current_later + item, mask=inside, other=0)
    _walk_later(current, weight, walk, later, values[2], carries, PADDED, CHUNK)
    earlier = tl.load(current_earlier + item, mask=inside, other=0)
    _walk_earlier(
        current, weight, received_before, spikes_earlier, item, walk, earlier, values, carries, plane, RESET, TERNARY,
        PADDED, CHUNK,
    )  # fmt: skip
    sent = tl.load(spikes_later + item, mask=inside, other=0) if RESET else later
    grad_threshold = tl.zeros([1, BLOCK], tl.float32)
    grad_reset = tl.zeros([1, BLOCK], tl.float32)
    grad_forward = tl.zeros([1, BLOCK], tl.float32)
    grad_backward = tl.zeros([1, BLOCK], tl.float32)
    count = tl.cdiv(walk[1] - walk[0], CHUNK)
    for i in range(0, count):
        token = walk[0] + (count - 1 - i) * CHUNK
        weights, potentials, received, margins, later, sent = _sweep_chunk(
            current, weight, received_before, token, walk, later, sent, values, carries, plane, RESET, TERNARY,
            PADDED, CHUNK,
        )  # fmt: skip
        incoming = silence(_load_chunk(grad_spikes, token, walk, CHUNK), weights, CHUNK)
        grads, grad_threshold = fire_backward(
            incoming, margins, values[0], alpha, grad_threshold, TERNARY, SURROGATE, CHUNK
        )
        if RESET:
            for k in tl.static_range(CHUNK):
                grad_reset -= received[k] * grads[k]
        g = scale(grads, weights, CHUNK)
        if slope_forward is not None:
            slopes_forward = _weights(slope_forward, token, walk, CHUNK)
            slopes_backward = _weights(slope_backward, token, walk, CHUNK)
            for k in tl.static_range(CHUNK):
                # v = sum / n, so d loss / d n = - grad v / n.
                grad_forward -= potentials[k] * g[k] * slopes_forward[k]
                grad_backward -= potentials[k] * g[k] * slopes_backward[k]
        _store_chunk(g, grad_sum, token, walk, CHUNK)
    parameter_plane = batch.to(tl.int64) * tl.cdiv(tokens, SEGMENT) * channels
    grad_parameters += item
    tl.store(grad_parameters, grad_threshold, mask=inside)
    tl.store(grad_parameters + parameter_plane, grad_reset, mask=inside)
    tl.store(grad_parameters + 2 * parameter_plane, grad_forward, mask=inside)
    tl.store(grad_parameters + 3 * parameter_plane, grad_backward, mask=inside)


@jit
def _finish_gradient(
    current, weight, v_threshold, decay_forward, decay_backward, reset, carries, current_earlier, grad_earlier,
    grad_later, grad_sum, grad_parameters,
    tokens, channels, group_size, batch,
    PADDED: constexpr, CHUNK: constexpr, SEGMENT: constexpr, BLOCK: constexpr, ONE_GROUP: constexpr,
):  # fmt: skip
    """Walks 4: from `g` to the gradient to the current, in its place, and the gradients to both decays.

    `carries` has the currents' sums over later tokens, from walk 1 in `_gradient`.
    """
    _row, _first, inside, item, walk, values, carries, plane = _neuron(
        v_threshold, decay_forward, decay_backward, reset, carries,
        tokens, channels, group_size, batch,
        PADDED, CHUNK, SEGMENT, BLOCK, ONE_GROUP,
    )  # fmt: skip
    _threshold, forward, backward, _reset = values
    to_earlier = tl.load(grad_later + item, mask=inside, other=0)
    _walk_later(grad_sum, weight, walk, to_earlier, forward, carries + 3 * plane, False, CHUNK)
    earlier = tl.load(current_earlier + item, mask=inside, other=0)
    to_later = tl.load(grad_earlier + item, mask=inside, other=0)
    grad_forward = tl.zeros_like(earlier)
    grad_backward = tl.zeros_like(earlier)
    for chunk in range(0, tl.cdiv(walk[1] - walk[0], CHUNK)):
        token = walk[0] + chunk * CHUNK
        x, weights = _load_currents(current, weight, token, walk, PADDED, CHUNK)
        g = _load_chunk(grad_sum, token, walk, CHUNK)
        at = carries + (token // CHUNK) * channels
        later = tl.load(at, mask=inside, other=0)
        to_earlier = tl.load(at + 3 * plane, mask=inside, other=0)
        grads, grad_forward, grad_backward, earlier, to_later = leaky_sums_backward(
            g, x, earlier, later, to_earlier, to_later, forward, backward, grad_forward, grad_backward, CHUNK
        )
        # All of the chunk has been read before any of it is overwritten.
        tl.debug_barrier()
        _store_chunk(silence(grads, weights, CHUNK), grad_sum, token, walk, CHUNK)
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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`1 / n` at valid tokens and 0 at others, `[batch or 1, seq_len, groups]`; the derivatives of `n`, or `None`."""
    valid = None if mask is None else (mask != 0).to(torch.uint8).contiguous()
    rows, tokens = (1, current.shape[1]) if valid is None else valid.shape
    shape = (rows, tokens, decay_forward.shape[0])
    if not normalize:
        ones = torch.ones(shape, device=current.device)
        return ones if valid is None else ones * valid[..., None], None, None
    weight, later_sums = (torch.empty(shape, device=current.device) for _ in range(2))
    both_slopes = [torch.empty(shape, device=current.device) if slopes else None for _ in range(2)]
    _weigh[(rows * shape[2],)](
        valid,
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


# Over earlier and over later tokens, of each segment; `None` where nobody needs them.
Sums = tuple[torch.Tensor | None, torch.Tensor | None]


class _Launches:
    """The launches of one call of an operator: what all of them share, and the sums between them."""

    def __init__(
        self, current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary,
        *, slopes=False,
    ) -> None:  # fmt: skip
        self.current = current.contiguous()
        self.batch, self.tokens, self.channels = current.shape
        self.reset_iterations = reset_iterations
        self.segments = -(-self.tokens // SEGMENT)
        groups = decay_forward.shape[0]
        group_size = self.channels // groups
        self.decays = decay_forward.contiguous(), decay_backward.contiguous()
        weight, *self.slopes = _weight_of_tokens(current, mask, *self.decays, normalize, slopes)
        carries = self.empty(4, self.batch, -(-self.tokens // CHUNK), self.channels)
        block = min(BLOCK, max(16, _power_of_2(self.channels)))
        self.blocks = -(-self.channels // block)
        # A program for each row, segment and block of channels.
        self.grid = (self.batch * self.segments * self.blocks,)
        self.neuron: dict[str, Any] = {
            "current": self.current,
            "weight": weight,
            "v_threshold": v_threshold.contiguous(),
            "decay_forward": self.decays[0],
            "decay_backward": self.decays[1],
            "reset": reset.contiguous(),
            "carries": carries,
            "batch": self.batch,
            "tokens": self.tokens,
            "channels": self.channels,
            "group_size": group_size,
            "PADDED": mask is not None,
            "CHUNK": CHUNK,
            "SEGMENT": SEGMENT,
            "BLOCK": block,
            "ONE_GROUP": group_size % block == 0,
            "num_warps": 1,
        }
        self.ternary = ternary

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.current.device)

    def new_sums(self) -> Sums:
        """Room for the sums over earlier and later tokens of each segment."""
        shape = (self.batch, self.segments, self.channels)
        return self.empty(*shape), self.empty(*shape)

    def exchange(self, sums: Sums, decay_earlier: torch.Tensor, decay_later: torch.Tensor) -> None:
        """From each segment's own sums to those that it gets from the others, in place."""
        _exchange[(self.batch * self.blocks,)](
            *sums,
            decay_earlier,
            decay_later,
            self.segments,
            self.channels,
            self.neuron["group_size"],
            DOUBLINGS=SEGMENT.bit_length() - 1,
            BLOCK=self.neuron["BLOCK"],
            num_warps=1,
        )

    def sums_of_others(self, decay_forward: torch.Tensor, decay_backward: torch.Tensor, **rows: Any) -> Sums:
        """What each segment gets from the others of the currents, or of other `rows` in their place."""
        sums = self.new_sums()
        others = {**rows, "decay_forward": decay_forward, "decay_backward": decay_backward}
        _sum_currents[self.grid](**{**self.neuron, **others}, sums_earlier=sums[0], sums_later=sums[1])
        self.exchange(sums, decay_forward, decay_backward)
        return sums

    def until_last_sweep(self) -> dict[str, Any]:
        """All that comes before the last sweep of the reset; what the kernel of the last one takes."""
        arguments = {**self.neuron, **_named("current", self.sums_of_others(*self.decays)), "TERNARY": self.ternary}
        spikes: Sums = (None, None)
        received = None
        # The 0th gives the sums of the provisional spikes.
        for sweep in range(self.reset_iterations):
            after = self.new_sums()
            received_after = self.empty(*self.current.shape) if sweep and received is None else received
            _spikes[self.grid](
                **arguments,
                **_named("spikes", spikes),
                **_named("next", after),
                received_before=received,
                received_after=received_after,
                spikes=None,
                packed=None,
                RESET=sweep > 0,
            )
            self.exchange(after, *self.decays)
            spikes, received = after, received_after
        last = {"received_before": received, "RESET": self.reset_iterations > 0}
        return {**arguments, **_named("spikes", spikes), **last}


def _named(name: str, sums: Sums) -> dict[str, torch.Tensor | None]:
    """Sums over earlier and later tokens as a kernel takes them."""
    return {f"{name}_earlier": sums[0], f"{name}_later": sums[1]}


@torch.library.custom_op(f"{NAMESPACE}::bpsn_triton_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def bpsn_forward(current, *neuron):
    """Spikes of a `BPSN`, in the dtype of `current` and packed; arguments as in `FORWARD_SCHEMA`.

    `current` is `[batch, seq_len, channels]` in float32, bfloat16 or float16, `mask` `[batch, seq_len]`, `v_threshold`
    `[channels]`, the decays and the reset `[groups]`, all three in float32. Any number of channels and groups will do.
    """
    spikes, packed = empty_spikes(current, ternary=neuron[-1])
    if current.shape[0] == 0:
        return spikes, packed
    with on_device_of(current):
        launches = _Launches(current, *neuron)
        arguments = launches.until_last_sweep()
        _spikes[launches.grid](
            **arguments, **_named("next", (None, None)), received_after=None, spikes=spikes, packed=packed
        )
    return spikes, packed


@torch.library.custom_op(f"{NAMESPACE}::bpsn_triton_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def bpsn_backward(grad_spikes, current, *others):
    """Gradients to the current, the threshold, both decays and the reset; arguments as in `BACKWARD_SCHEMA`."""
    *neuron, surrogate, alpha = others
    grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
    if current.shape[0] == 0:
        return grad_current, *(torch.zeros_like(x) for x in neuron[1:5])
    with on_device_of(current):
        launches = _Launches(current, *neuron, slopes=True)
        arguments = launches.until_last_sweep()
        parameters = launches.empty(6, launches.batch, launches.segments, launches.channels)
        _gradient[launches.grid](
            **arguments,
            grad_spikes=grad_spikes.contiguous(),
            slope_forward=launches.slopes[0],
            slope_backward=launches.slopes[1],
            grad_sum=grad_current,
            grad_parameters=parameters,
            alpha=alpha,
            SURROGATE=surrogate,
        )
        # The gradient goes the other way round: what a token sent to later ones comes back from them.
        sums = launches.sums_of_others(*reversed(launches.decays), current=grad_current, PADDED=False)
        _finish_gradient[launches.grid](
            **launches.neuron,
            **_named("grad", sums),
            current_earlier=arguments["current_earlier"],
            grad_sum=grad_current,
            grad_parameters=parameters,
        )
    of_channel = parameters.sum((1, 2))
    of_group = of_channel.unflatten(1, (neuron[2].shape[0], -1)).sum(-1)
    # An operator returns tensors of their own, not views of one.
    grad_decays = of_group[2:4] + of_group[4:6]
    return grad_current, *(grad.clone() for grad in (of_channel[0], *grad_decays, of_group[1]))


bpsn_forward.register_fake(fake_bpsn_forward)
bpsn_backward.register_fake(fake_bpsn_backward)
