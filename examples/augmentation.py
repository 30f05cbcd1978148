"""Variants of a batch for a teacher to label: words are replaced by words like them."""

import torch
from transformers import PreTrainedTokenizerBase


class WordReplacement:
    """Replaces tokens by neighbours in a BERT's word embeddings.

    A few thousand labelled rows are too few to teach what a teacher does on other ones, but a teacher can label any
    input. As in Jiao et al., "TinyBERT", 2020, whose neighbours are GloVe's where a word is one token.

    Args:
        embeddings (`[vocab_size, hidden]`): the word embeddings.
        tokenizer: whose special and unused tokens neither are replaced nor replace others.
        max_share: in each row a share of the tokens is replaced that is drawn from between 0 and this.
        neighbours: a token is replaced by one of its so many nearest, by cosine.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        max_share: float = 0.4,
        neighbours: int = 15,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        excluded = {index for word, index in vocabulary.items() if word.startswith("[unused")}
        excluded |= set(tokenizer.all_special_ids)
        if not 0 < max_share <= 1:
            raise ValueError(f"`max_share` must lie in (0, 1], got {max_share}")
        words = len(embeddings) - len(excluded)
        if not 1 <= neighbours < words:
            raise ValueError(f"`neighbours` must be >= 1 and fewer than the {words} words, got {neighbours}")
        self.max_share, self.neighbours = max_share, neighbours
        self.directions = torch.nn.functional.normalize(embeddings.detach().float(), dim=-1)
        self.replaceable = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
        self.replaceable[list(excluded)] = False
        # Filled as tokens come up; most of a vocabulary never does.
        self.nearest = torch.full((len(embeddings), neighbours), -1, device=embeddings.device)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A variant of `input_ids`, `[batch, seq_len]`; draws from torch's random numbers."""
        share = self.max_share * torch.rand(len(input_ids), 1, device=input_ids.device)
        chosen = (torch.rand(input_ids.shape, device=input_ids.device) < share) & self.replaceable[input_ids]
        tokens = input_ids[chosen]
        self._find_nearest(tokens.unique())
        pick = torch.randint(self.neighbours, tokens.shape, device=tokens.device)
        return input_ids.masked_scatter(chosen, self.nearest[tokens, pick])

    def _find_nearest(self, tokens: torch.Tensor) -> None:
        new = tokens[self.nearest[tokens, 0] < 0]
        if not len(new):
            return
        similarity = (self.directions[new] @ self.directions.T).masked_fill(~self.replaceable, -torch.inf)
        similarity.scatter_(1, new[:, None], -torch.inf)
        self.nearest[new] = similarity.topk(self.neighbours).indices
