"""Bidirectional leaky integration over tokens: one definition, four implementations.

With a decay `f` into the future and a decay `b` into the past, both per channel group, the current at token `j`
reaches token `t` with the weight

    a[t, j] = f^(t - j)  for j < t,      1  for j = t,      b^(j - t)  for j > t.

`leaky_integration` returns the membrane potential `v[t] = sum_j a[t, j] m[j] I[j] / n[t]` with the attention mask `m`
and `n[t] = sum_j a[t, j] m[j]`: a weighted mean of the currents of the valid tokens. Masked tokens neither give
charge nor receive any: their potential is 0.

`leaky_sum` is the bare sum over `j` that the neurons build on. Its implementations have one signature:

- `naive`: the definition, two loops over the tokens; the reference that the others are tested against;
- `toeplitz`: one matrix product with `a`; quadratic in the length;
- `chunked`: a scan in each direction, inside chunks and then over the chunks' ends; linear in the length;
- `stencil`: one filter over the tokens so near that their weight can be seen. A decay of 0.05 falls below float32's
  rounding within seven tokens, so where decays are small this is the fastest by far; see `stencil_reach`.

`auto` takes the stencil on a CPU where its reach is short, and the scans elsewhere.

No implementation divides by a power of a decay, so a power that underflows only drops a contribution that is too
small to be seen. float16 and bfloat16 currents are integrated in float32.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 8
# The reaches at which the stencil is taken for its speed. A shorter one is no faster than the shortest of them, and at
# 5 and 6 oneDNN takes twice as long with AVX-512.
STENCIL_MIN_REACH = 7
STENCIL_MAX_REACH = 64
WEIGHT_TOEPLITZ_MAX_LENGTH = 128


def leaky_integration(
    current: torch.Tensor,
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    implementation: str = "auto",
) -> torch.Tensor:
    """Membrane potential of every token from the currents of all tokens.

    Args:
        current (`[batch, seq_len, channels]`, floating point): input current `I`.
        decay_forward (`[groups]`): decay per token towards later tokens, in [0, 1]; `groups` divides `channels`, and
            group `g` owns the `g`-th block of `channels / groups` consecutive channels.
        decay_backward (`[groups]`): decay per token towards earlier tokens, in [0, 1]; 0 integrates forward only.
        attention_mask (`[batch, seq_len]`, bool or numeric): 1 at valid tokens, 0 at padding.
        normalize: divide by the total weight `n[t]`, which makes the potential a weighted mean of the currents.
        implementation: `"auto"` (the fastest), `"naive"`, `"toeplitz"`, `"chunked"` or `"stencil"`.

    Returns:
        `[batch, seq_len, channels]` in the dtype of `current`: the potential, 0 at masked tokens.

    Raises:
        ValueError: if a shape, a decay or `implementation` is not as above.
        TypeError: if `current` is not floating point.
    """
    check_sequence(current, attention_mask)
    check_implementation(implementation)
    for name, decay in (("decay_forward", decay_forward), ("decay_backward", decay_backward)):
        same_shape = decay.dim() == 1 and decay.shape == decay_forward.shape
        if not same_shape or not len(decay) or current.shape[-1] % len(decay):
            raise ValueError(
                f"`{name}` must have the shape [groups], the same for both directions, with `groups` dividing the "
                f"{current.shape[-1]} channels of `current`; got {list(decay.shape)}"
            )
        if not torch.compiler.is_compiling() and not bool(((decay >= 0) & (decay <= 1)).all()):
            raise ValueError(f"`{name}` must lie in [0, 1], got {decay.tolist()}")

    return leaky_mean(current, decay_forward, decay_backward, attention_mask, normalize, implementation)


def leaky_mean(
    current: torch.Tensor,
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    attention_mask: torch.Tensor | None,
    normalize: bool,
    implementation: str,
) -> torch.Tensor:
    """`leaky_integration` of arguments that are in their ranges."""
    x = widen(current)
    decay_forward, decay_backward = decay_forward.to(x.dtype), decay_backward.to(x.dtype)
    potential = leaky_sum(silence(x, attention_mask), decay_forward, decay_backward, implementation)
    if normalize:
        weight = total_weight(x, decay_forward, decay_backward, attention_mask, implementation)
        potential = divide_by_group(potential, weight)
    return silence(potential, attention_mask).to(current.dtype)


def leaky_sum(
    x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor, implementation: str = "auto"
) -> torch.Tensor:
    """`y[t] = sum_j a[t, j] x[j]` for `x` of shape `[batch, seq_len, channels]` and decays of shape `[groups]`.

    All three arguments share one dtype, float32 or float64. Autocast is off inside: sums over thousands of tokens
    need float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        integrate = _auto if implementation == "auto" else IMPLEMENTATIONS[implementation]
        return integrate(x, decay_forward, decay_backward)


def total_weight(
    like: torch.Tensor,
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    attention_mask: torch.Tensor | None,
    implementation: str = "auto",
    stencil: torch.Tensor | None = None,
) -> torch.Tensor:
    """`n[t] = sum_j a[t, j] m[j]` as `[batch or 1, seq_len, groups]`, set to 1 at masked tokens.

    It is at least 1 at every valid token, whose own weight is 1; a masked token has nothing to divide. By the kernel
    `stencil` if there is one, and otherwise by `implementation`.
    """
    groups = decay_forward.shape[0]
    valid = like.new_ones(1, like.shape[1], groups)
    if attention_mask is not None:
        valid = attention_mask.to(like.dtype)[..., None].expand(-1, -1, groups)
    if stencil is not None:
        weight = LeakySum.apply(valid, decay_forward, decay_backward, stencil)
    else:
        if implementation == "auto" and like.shape[1] <= WEIGHT_TOEPLITZ_MAX_LENGTH:
            # One number per group: so little work that the number of operations is what counts.
            implementation = "toeplitz"
        weight = leaky_sum(valid, decay_forward, decay_backward, implementation)
    return weight if attention_mask is None else weight.masked_fill(valid == 0, 1)


def divide_by_group(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Divide the channels of `x`, `[batch, seq_len, channels]`, by their group's `weight`, `[.., seq_len, groups]`."""
    groups = weight.shape[-1]
    return (x.unflatten(-1, (groups, -1)) / weight[..., None]).flatten(-2)


def silence(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`x`, `[batch, seq_len, channels]`, with zeros at masked tokens whatever stood there, NaN included."""
    return x if attention_mask is None else x.masked_fill(attention_mask[..., None] == 0, 0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that currents of `dtype` are integrated in: float32 in place of float16 and bfloat16."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype it is integrated in."""
    return x.to(wide_dtype(x.dtype))


def check_sequence(current: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Check the shapes and dtypes of what a neuron takes in; the errors name the argument and what was given."""
    if current.dim() != 3:
        raise ValueError(f"`current` must have the shape [batch, seq_len, channels], got {list(current.shape)}")
    if not current.is_floating_point():
        raise TypeError(f"`current` must be floating point, got {current.dtype}")
    if current.shape[1] == 0:
        raise ValueError("`current` must have at least one token, got seq_len = 0")
    if attention_mask is not None and attention_mask.shape != current.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have the shape [batch, seq_len] = {list(current.shape[:2])}, "
            f"got {list(attention_mask.shape)}"
        )


def check_implementation(implementation: str) -> None:
    """Raise a `ValueError` unless `implementation` is `"auto"` or one of `IMPLEMENTATIONS`."""
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be 'auto' or one of {sorted(IMPLEMENTATIONS)}, got {implementation!r}")


def _decay_matrix(decay_forward: torch.Tensor, decay_backward: torch.Tensor, length: int) -> torch.Tensor:
    """The weights `a` as `[groups, length, length]`."""
    exponents = torch.arange(length, device=decay_forward.device, dtype=decay_forward.dtype)
    # 0 ** 0 is 1, and a tiny power becomes 0.
    earlier, later = decay_forward[:, None] ** exponents, decay_backward[:, None] ** exponents
    if torch.compiler.is_compiling():
        # A window of a length that is left open, as below, cannot be written down in a graph; indices can.
        tokens = torch.arange(length, device=decay_forward.device)
        lag = tokens[:, None] - tokens
        return torch.where(lag >= 0, earlier[:, lag.clamp(min=0)], later[:, (-lag).clamp(min=0)])
    # Row t of `a` reads the diagonals from lag t down to lag t - (length - 1): a window on one vector of all lags.
    diagonals = torch.cat((earlier.flip(-1), later[:, 1:]), dim=-1)
    return diagonals.unfold(-1, length, 1).flip(-2)


def _naive(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor:
    repeats = x.shape[-1] // decay_forward.shape[0]
    forward, backward = (decay.repeat_interleave(repeats) for decay in (decay_forward, decay_backward))
    rows = []
    for t in range(x.shape[1]):
        row = torch.zeros_like(x[:, 0])
        for j in range(x.shape[1]):
            row = row + (forward ** (t - j) if j <= t else backward ** (j - t)) * x[:, j]
        rows.append(row)
    return torch.stack(rows, dim=1)


def _toeplitz(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor:
    matrix = _decay_matrix(decay_forward, decay_backward, x.shape[1])
    grouped = x.unflatten(-1, (decay_forward.shape[0], -1))
    return torch.einsum("gtj,bjgd->btgd", matrix, grouped).flatten(-2)


def _scan(x: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """The one-directional sum `y[t] = x[t] + decay * y[t - 1]` (`y[t + 1]` if `reverse`), `decay` per channel.

    Inside a chunk one token after the other, all chunks at once; then the same over the chunks' ends with the decay
    of a whole chunk. The number of steps grows with the logarithm of the length, the work linearly.
    """
    length = x.shape[1]
    if torch.compiler.is_compiling() and length % CHUNK_SIZE:
        # A compiler takes no views as `out=` (see `_scan_chunks`), and then needs whole chunks.
        padding = CHUNK_SIZE - length % CHUNK_SIZE
        return _scan(torch.nn.functional.pad(x, (0, 0, 0, padding)), decay, reverse)[:, :length]
    y = _scan_chunks(x, decay, reverse)
    if length <= CHUNK_SIZE:
        return y
    powers = decay ** torch.arange(1, CHUNK_SIZE + 1, device=x.device, dtype=x.dtype)[:, None]
    # Arithmetic on denormal numbers is many times slower, and a leak that meets silence or padding soon gets there.
    # So what lies a thousand times below the rounding error, and what is about to become denormal, counts as zero.
    precision = torch.finfo(x.dtype)
    powers = powers.masked_fill(powers < 1e-3 * precision.eps, 0)
    # What each chunk hands to the next one: its last token's sum, or in reverse its first one's.
    if reverse:
        ends = _scan(y[:, CHUNK_SIZE::CHUNK_SIZE], powers[-1], reverse)
    else:
        ends = _scan(y[:, CHUNK_SIZE - 1 : length - 1 : CHUNK_SIZE], powers[-1], reverse)
    ends = ends.masked_fill(ends.abs() < precision.tiny / precision.eps**2, 0)
    for k in range(CHUNK_SIZE):
        if reverse:
            y[:, k::CHUNK_SIZE][:, : ends.shape[1]].addcmul_(ends, powers[CHUNK_SIZE - 1 - k])
        else:
            later = y[:, CHUNK_SIZE + k :: CHUNK_SIZE]
            later.addcmul_(ends[:, : later.shape[1]], powers[k])
    return y


def _scan_chunks(x: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """`_scan` inside the chunks of `[batch, seq_len, channels]`; the last chunk may be short."""
    size = min(CHUNK_SIZE, x.shape[1])
    order = range(size - 1, -1, -1) if reverse else range(size)
    # The k-th tokens of all chunks.
    rows = [x[:, k::CHUNK_SIZE] for k in range(size)]
    if torch.compiler.is_compiling():
        for k in order[1:]:
            rows[k] = torch.addcmul(rows[k], rows[k + 1 if reverse else k - 1], decay)
        return torch.stack(rows, dim=2).flatten(1, 2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = [y[:, k::CHUNK_SIZE] for k in range(size)]
    sums[order[0]].copy_(rows[order[0]])
    for k in order[1:]:
        last = sums[k + 1 if reverse else k - 1]
        # In reverse the short chunk joins at its own last token; forward it drops out after it.
        chunks = min(last.shape[1], sums[k].shape[1])
        torch.addcmul(rows[k][:, :chunks], last[:, :chunks], decay, out=sums[k][:, :chunks])
        sums[k][:, chunks:] = rows[k][:, chunks:]
    return y


def both_scans(
    x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` scanned from earlier to later tokens with `decay_forward`, and from later to earlier with `decay_backward`.

    Each `[batch, seq_len, channels]`, for decays `[groups]`. Their sum less `x` is `leaky_sum(x)`.
    """
    repeats = x.shape[-1] // decay_forward.shape[0]
    earlier = _scan(x, decay_forward.repeat_interleave(repeats), reverse=False)
    later = _scan(x, decay_backward.repeat_interleave(repeats), reverse=True)
    return earlier, later


def stencil_reach(decay_forward: torch.Tensor, decay_backward: torch.Tensor, most: int) -> int:
    """How many tokens away, up to `most`, a current still counts in the dtype of the decays, `[groups]`.

    With the largest decay `d`, what lies beyond a reach of `k` adds at most `sum_{j > k} j d^(j - 1)` times the
    largest current to the derivative with respect to `d`, and less than `d` times as much to the sum itself. The reach
    is the smallest at which that is below the rounding error of 1.
    """
    decay = float(torch.maximum(decay_forward.detach(), decay_backward.detach()).max())
    rounding = torch.finfo(decay_forward.dtype).eps
    for reach in range(1, most):
        if decay**reach * (reach + 1 - reach * decay) <= rounding * (1 - decay) ** 2:
            return reach
    return most


@torch.no_grad()
def stencil_kernel(decay_forward: torch.Tensor, decay_backward: torch.Tensor, reach: int) -> torch.Tensor:
    """The weights `a` of the tokens from `reach` before to `reach` behind, `[groups, 2 reach + 1]`."""
    distances, decays = _distances(decay_forward, decay_backward, reach)
    return _flush(decays ** distances.abs())


def _stencil_slopes(
    decay_forward: torch.Tensor, decay_backward: torch.Tensor, reach: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivatives of `stencil_kernel` with respect to either decay, in its shape."""
    distances, decays = _distances(decay_forward, decay_backward, reach)
    slopes = _flush(decays ** (distances.abs() - 1).clamp_(min=0)) * distances
    return (-slopes).clamp_(min=0), slopes.clamp_(min=0)


def _distances(
    decay_forward: torch.Tensor, decay_backward: torch.Tensor, reach: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distances from `-reach`, of an earlier token, to `reach`; and the decay at each, `[groups, 2 reach + 1]`."""
    distances = torch.arange(-reach, reach + 1, device=decay_forward.device, dtype=decay_forward.dtype)
    return distances, torch.where(distances < 0, decay_forward[:, None], decay_backward[:, None])


def _flush(powers: torch.Tensor) -> torch.Tensor:
    """Powers of a decay, with zeros for those far below the rounding error: denormal numbers are many times slower."""
    return torch.threshold_(powers, 1e-3 * torch.finfo(powers.dtype).eps, 0)


def fast_stencil(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor | None:
    """The kernel of the stencil if that is the fastest way to `leaky_sum(x)`, and `None` if scans are.

    It is scans where the values of the decays, on which the reach depends, cannot be read: while a graph is written,
    and of a tensor that has none, such as a FakeTensor.
    """
    readable = type(decay_forward) in (torch.Tensor, torch.nn.Parameter) and not _writes_graph()
    if not readable or not _has_fast_filter(x):
        return None
    most = x.shape[1] - 1
    reach = stencil_reach(decay_forward, decay_backward, min(most, STENCIL_MAX_REACH + 1))
    if reach > STENCIL_MAX_REACH:
        return None
    return stencil_kernel(decay_forward, decay_backward, min(most, max(reach, STENCIL_MIN_REACH)))


def _writes_graph() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _has_fast_filter(x: torch.Tensor) -> bool:
    """Whether torch filters `x` in one pass: by oneDNN's depthwise convolution, at full precision."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch._C._get_mkldnn_enabled():
        return False
    # An old torch has no such setting, and computes at full precision.
    precision = getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", "none")
    return torch.backends.mkldnn.is_available() and precision in ("none", "ieee")


def _filter(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`y[t] = sum_k kernel[., reach + k] x[t + k]` for `k` from `-reach` to `reach`; zeros stand beyond the ends.

    `x` is `[batch, seq_len, channels]`, `kernel` is `[channels or groups, 2 reach + 1]` with `reach < seq_len`.
    """
    reach, channels = kernel.shape[1] // 2, x.shape[-1]
    if kernel.shape[0] != channels:
        kernel = kernel[:, None].expand(-1, channels // kernel.shape[0], -1).flatten(0, 1)
    if _has_fast_filter(x):
        # What oneDNN does best: images one pixel high whose channels come last.
        image = x.contiguous()[:, None].permute(0, 3, 1, 2)
        with torch.autocast("cpu", enabled=False):
            y = torch.conv2d(image, kernel[:, None, None], padding=(0, reach), groups=channels)
        return y.permute(0, 2, 3, 1).squeeze(1).contiguous()
    y = x * kernel[:, reach]
    for k in range(1, reach + 1):
        y[:, k:].addcmul_(x[:, :-k], kernel[:, reach - k])
        y[:, :-k].addcmul_(x[:, k:], kernel[:, reach + k])
    return y


def plain_sum(
    x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor, stencil: torch.Tensor | None
) -> torch.Tensor:
    """`leaky_sum(x)` with no gradient: by the kernel `stencil`, `[channels or groups, width]`, or by scans."""
    if stencil is None:
        earlier, later = both_scans(x, decay_forward, decay_backward)
        return earlier.add_(later).sub_(x)
    return _filter(x, stencil)


def plain_sum_and_parts(
    x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor, stencil: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`plain_sum(x)`, and what `plain_sum_backward` starts from."""
    if stencil is None:
        earlier, later = both_scans(x, decay_forward, decay_backward)
        return earlier.add(later).sub_(x), (earlier, later)
    return _filter(x, stencil), (x,)


def plain_sum_backward(
    grad_sum: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    stencil: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to `x`, `decay_forward` and `decay_backward` from the gradient to `leaky_sum(x)`.

    `parts` are from `plain_sum_and_parts(x)`; those of scans are overwritten.
    """
    groups = decay_forward.shape[0]
    if stencil is None:
        # The transpose of a scan is the scan in the other direction, which gives the gradient to `x`. With `h` the
        # transposed scan of the gradient, `y[t] = x[t] + f y[t - 1]` gives `d loss / d f = sum_t h[t] y[t - 1]`.
        earlier, later = parts
        to_later, to_earlier = both_scans(grad_sum, decay_backward, decay_forward)
        grad_forward = sum_by_group(earlier[:, :-1].mul_(to_earlier[:, 1:]), groups)
        grad_backward = sum_by_group(later[:, 1:].mul_(to_later[:, :-1]), groups)
        return to_later.add_(to_earlier).sub_(grad_sum), grad_forward, grad_backward
    (x,) = parts
    reach = stencil.shape[1] // 2
    grad_forward, grad_backward = (
        sum_by_group(_filter(x, slopes).mul_(grad_sum), groups)
        for slopes in _stencil_slopes(decay_forward, decay_backward, reach)
    )
    return _filter(grad_sum, stencil.flip(-1)), grad_forward, grad_backward


def sum_by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum of `[batch, seq_len, channels]` over everything but the groups."""
    return x.sum((0, 1)).unflatten(0, (groups, -1)).sum(-1)


class LeakySum(torch.autograd.Function):
    """`leaky_sum` as `plain_sum` computes it. Keeps its input for the backward pass and nothing else."""

    # Not by `setup_context`, before which torch looks up this function's signature in each call.
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor, stencil: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, decay_forward, decay_backward, stencil)
        return plain_sum(x, decay_forward, decay_backward, stencil)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: torch.Tensor):
        x, decay_forward, decay_backward, stencil = ctx.saved_tensors
        parts = both_scans(x, decay_forward, decay_backward) if stencil is None else (x,)
        return *plain_sum_backward(grad_sum, parts, decay_forward, decay_backward, stencil), None


def _chunked(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor:
    return LeakySum.apply(x, decay_forward, decay_backward, None)


def _stencil(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor:
    if _writes_graph():
        # A graph must hold for all decays.
        return _toeplitz(x, decay_forward, decay_backward)
    kernel = stencil_kernel(decay_forward, decay_backward, stencil_reach(decay_forward, decay_backward, x.shape[1] - 1))
    return LeakySum.apply(x, decay_forward, decay_backward, kernel)


def _auto(x: torch.Tensor, decay_forward: torch.Tensor, decay_backward: torch.Tensor) -> torch.Tensor:
    return LeakySum.apply(x, decay_forward, decay_backward, fast_stencil(x, decay_forward, decay_backward))


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "naive": _naive,
    "toeplitz": _toeplitz,
    "chunked": _chunked,
    "stencil": _stencil,
}
