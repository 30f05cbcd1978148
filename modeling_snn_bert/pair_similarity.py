"""How alike two sentences are by their hidden states, and a Trainer for it.

The hidden states, `[2 * pairs, seq_len, hidden]`, are those of all first sentences, then of all second ones, each read
alone; so is `attention_mask`, `[2 * pairs, seq_len]`. All is computed in float32, under autocast too: similarities
near 1 differ by less than a bfloat16 can tell.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from .batches import Batch, Collate, Row
from .distillation import embedding_loss, hidden_state_loss, mean_embeddings
from .sparsity import add_penalty
from .trainer import DistillationTrainer

Similarity: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


SIMILARITIES: dict[str, Similarity] = {
    "cosine": cosine,
    "max_sim": max_sim,
    "second_in_first": second_in_first,
}


class PairTrainer(DistillationTrainer):
    """DistillationTrainer for pairs, whose `"labels"` in a batch say how alike they are, `[pairs]`, in [0, 1].

    The loss is the squared difference of similarities and labels, and with a teacher, by `embedding_weight`, that on
    its mean embeddings, or on all its last hidden states if the similarity looks at each token.

    Args:
        similarity: one of `SIMILARITIES`.
        args, kwargs: those of DistillationTrainer.
    """

    def __init__(self, *args: Any, similarity: Similarity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.similarity = similarity

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        mask = inputs["attention_mask"]
        texts = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        outputs = model(**texts)
        states = outputs.last_hidden_state
        loss = self.add_part("score_loss", (self.similarity(states, mask) - inputs["labels"]).square().mean())
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.ask_teacher(texts).last_hidden_state
            if self.similarity is cosine:
                part = embedding_loss(states, wanted, mask)
            else:
                # The loss leaves out the first of the states, which are commonly the embeddings of the words.
                part = hidden_state_loss((states, states), (wanted, wanted), mask)
            loss = loss + self.args.embedding_weight * self.add_part("embedding_loss", part)
        loss = add_penalty(loss, outputs, self.firing_rate_weight)
        return (loss, outputs) if return_outputs else loss

    def similarities(self, rows: Sequence[Row], collate: Collate) -> list[tuple[float, float]]:
        """Similarity and label of every pair, from all processes."""

        def answer(batch: Batch) -> Iterable[tuple[float, float]]:
            mask = batch["attention_mask"]
            states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            return zip(self.similarity(states, mask).tolist(), batch["labels"].tolist(), strict=True)

        return self.answers(rows, collate, answer)


def best_threshold(pairs: list[tuple[float, float]]) -> float:
    """Where the most pairs of similarity and label (0 or 1) are on the right side, and the lowest such place."""
    ordered = sorted(pairs)
    # From below the first similarity, where all count as alike, upwards: each step takes one pair to the other side.
    right = sum(label for _, label in ordered)
    best, place = right, ordered[0][0] - 1
    for (similarity, label), (following, _) in itertools.pairwise([*ordered, (ordered[-1][0] + 1, 0.0)]):
        right += 1 - 2 * label
        if right > best and following > similarity:
            best, place = right, (similarity + following) / 2
    return place
