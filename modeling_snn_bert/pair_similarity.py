"""How alike two sentences are by their hidden states.

The hidden states, `[2 * pairs, seq_len, hidden]`, are those of all first sentences, then of all second ones, each read
alone; so is `attention_mask`, `[2 * pairs, seq_len]`. All is computed in float32, under autocast too: similarities
near 1 differ by less than a bfloat16 can tell.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from .distillation import mean_embeddings


def cosine(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The cosine of the two mean embeddings, `[pairs]`."""
    first, second = mean_embeddings(states, attention_mask).chunk(2)
    return functional.cosine_similarity(first, second)


def second_in_first(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """How much of the second sentence is found in the first: mean over its tokens of the largest cosine, `[pairs]`.

    Late interaction's MaxSim; source: Khattab and Zaharia, "ColBERT", 2020, with a mean in place of the sum, so that
    long sentences do not count as more alike.
    """
    cosines, first_valid, second_valid = _token_cosines(states, attention_mask)
    return _best_match(cosines.transpose(1, 2), second_valid, first_valid)


def max_sim(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`second_in_first`, averaged with the same of the first sentence in the second, `[pairs]`."""
    cosines, first_valid, second_valid = _token_cosines(states, attention_mask)
    both = _best_match(cosines, first_valid, second_valid) + _best_match(
        cosines.transpose(1, 2), second_valid, first_valid
    )
    return both / 2


def _token_cosines(
    states: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines of each token of the first sentences with each of the second, and which tokens of both are valid."""
    first, second = functional.normalize(states.float(), dim=-1).chunk(2)
    with torch.autocast(states.device.type, enabled=False):
        cosines = first @ second.transpose(1, 2)
    first_valid, second_valid = (attention_mask != 0).chunk(2)
    return cosines, first_valid, second_valid


def _best_match(cosines: torch.Tensor, rows_valid: torch.Tensor, columns_valid: torch.Tensor) -> torch.Tensor:
    """The mean over valid rows of the largest cosine among valid columns; `cosines` is `[pairs, rows, columns]`."""
    best = cosines.masked_fill(~columns_valid[:, None], -1.0).amax(-1)
    return (best * rows_valid).sum(-1) / rows_valid.sum(-1)


SIMILARITIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": cosine,
    "max_sim": max_sim,
    "second_in_first": second_in_first,
}
