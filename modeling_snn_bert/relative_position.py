"""Relative position bias: a number for each attention head and each bucket of distances, added to the scores.

Buckets are those of T5's encoder, which MPNet has as well. Half of them are for keys in front of the query and for the
query's own token, half for keys behind it. In each half the first half of the buckets holds one distance each, and the
ranges of the others grow by one factor, up to `max_distance`; the last bucket holds all that is farther.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
"""

from collections.abc import Sequence

import torch
from torch import nn


def bucket_starts(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each bucket of one direction but the first, which begins at 0.

    With `e = num_buckets / 4` and `n = num_buckets / 2 - e`, bucket `e + k` begins at the smallest integer that is not
    below `e * (max_distance / e) ** (k / n)`, which is found in integers.
    """
    exact = num_buckets // 4
    steps = num_buckets // 2 - exact
    starts = list(range(1, exact + 1))
    for k in range(1, steps):
        start = starts[-1]
        while start**steps * exact**k < max_distance**k * exact**steps:
            start += 1
        starts.append(start)
    return tuple(starts)


def relative_position_buckets(length: int, starts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The bucket of each pair of a query and a key, `[length, length]`, int64, from what `bucket_starts` gives."""
    distance = torch.arange(length, device=device)
    bucket = torch.zeros_like(distance)
    for start in starts:
        bucket = bucket + (distance >= start)
    behind = distance[None, :] - distance[:, None]
    return bucket[behind.abs()] + (behind > 0) * (len(starts) + 1)


def relative_position_bias(
    embedding: nn.Module, length: int, starts: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The bias of the scores, `[1, heads, length, length]`.

    Args:
        embedding: gives the numbers of a bucket, `[..., heads]`, from its index, `[...]`.
        length: the number of tokens.
        starts: those of `bucket_starts`.
        device: of the indices.
    """
    bias = embedding(relative_position_buckets(length, starts, device))
    return bias.permute(2, 0, 1)[None].contiguous()
