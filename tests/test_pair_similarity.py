"""How alike two sentences are, against loops over pairs and tokens."""

import pytest
import torch

from modeling_snn_bert.pair_similarity import SIMILARITIES, best_threshold

LENGTHS = [(3, 5), (1, 1), (7, 2), (7, 7)]


@pytest.fixture
def states():
    """Hidden states and mask of four pairs, what stands at padding being large."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2 * len(LENGTHS), 7, 6, generator=generator)
    mask = torch.zeros(2 * len(LENGTHS), 7, dtype=torch.long)
    for side in (0, 1):
        for pair, lengths in enumerate(LENGTHS):
            mask[side * len(LENGTHS) + pair, : lengths[side]] = 1
    return torch.where(mask[..., None] != 0, states, 1e3), mask


def sentences(states, mask):
    """The valid tokens' states of the first and of the second sentence of each pair."""
    rows = [row[valid != 0] for row, valid in zip(states, mask, strict=True)]
    return list(zip(rows[: len(LENGTHS)], rows[len(LENGTHS) :], strict=True))


def cosine_of(one, two):
    return float(one @ two / (one.norm() * two.norm()))


def found(tokens, among):
    return sum(max(cosine_of(token, other) for other in among) for token in tokens) / len(tokens)


NAIVE = {
    "cosine": lambda first, second: cosine_of(first.mean(0), second.mean(0)),
    "second_in_first": lambda first, second: found(second, first),
    "max_sim": lambda first, second: (found(first, second) + found(second, first)) / 2,
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_is_that_of_a_loop(states, name):
    wanted = [NAIVE[name](first, second) for first, second in sentences(*states)]
    torch.testing.assert_close(SIMILARITIES[name](*states), torch.tensor(wanted))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_keeps_its_precision_under_autocast(states, name):
    hidden, mask = states
    with torch.autocast("cpu", torch.bfloat16):
        under = SIMILARITIES[name](hidden, mask)
    torch.testing.assert_close(under, SIMILARITIES[name](hidden, mask))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_no_gradient_at_padding(states, name):
    hidden, mask = states[0].clone().requires_grad_(), states[1]
    SIMILARITIES[name](hidden, mask).sum().backward()
    assert hidden.grad[mask == 0].eq(0).all() and hidden.grad[mask != 0].ne(0).any()


def test_a_part_of_a_sentence_is_found_in_it(states):
    hidden = states[0][:1]
    both = torch.cat([hidden, hidden])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 3:] = 0
    assert SIMILARITIES["second_in_first"](both, mask).item() == pytest.approx(1)
    assert SIMILARITIES["max_sim"](both, mask).item() < 0.99


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([(0.1, 0), (0.2, 0), (0.6, 1), (0.8, 1)], 0.4),
        ([(0.1, 0), (0.2, 1), (0.6, 0), (0.8, 1), (0.9, 1)], 0.15),
        ([(0.3, 0), (0.3, 1), (0.5, 1)], 0.3 - 1),
        ([(0.3, 1)], 0.3 - 1),
        ([(0.3, 0)], 0.8),
    ],
)
def test_best_threshold(pairs, wanted):
    assert best_threshold(pairs) == pytest.approx(wanted)
