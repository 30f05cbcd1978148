"""How alike two sentences are, against loops over pairs and tokens."""

import math

import pytest
import torch
from pair_similarity import PAIR_LOSSES, SCALE, SIMILARITIES, embedding_loss, ranking_loss, squared_loss

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


def test_embedding_loss_is_that_of_a_loop(states):
    hidden, mask = states
    generator = torch.Generator().manual_seed(1)
    wanted = torch.where(mask[..., None] != 0, torch.randn(hidden.shape, generator=generator), -1e3)
    means, targets = (
        torch.stack([row[valid != 0].mean(0) for row, valid in zip(x, mask, strict=True)]) for x in (hidden, wanted)
    )
    variance = sum(((row - targets.mean(0)) ** 2).mean() for row in targets) / len(targets)
    error = sum(((one - two) ** 2).mean() for one, two in zip(means, targets, strict=True)) / len(targets)
    torch.testing.assert_close(embedding_loss(hidden, wanted, mask), error / variance)
    assert embedding_loss(wanted, wanted, mask) == 0


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


def test_ranking_loss_is_that_of_a_loop():
    similarities, labels = torch.tensor([0.9, 0.2, 0.5, 0.4]), torch.tensor([0.2, 0.2, 0.8, 1.0])
    terms = [
        math.exp(SCALE * float(similarities[j] - similarities[i]))
        for i in range(4)
        for j in range(4)
        if labels[i] > labels[j]
    ]
    assert ranking_loss(similarities, labels).item() == pytest.approx(math.log(1 + sum(terms)), rel=1e-5)


def test_ranking_loss_of_labels_that_are_all_alike_is_zero():
    similarities = torch.rand(4, requires_grad=True)
    loss = ranking_loss(similarities, torch.ones(4))
    loss.backward()
    assert loss.item() == 0 and similarities.grad.eq(0).all()


def test_squared_loss():
    assert squared_loss(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])).item() == pytest.approx(0.125)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_have_gradients(name):
    similarities = torch.tensor([0.9, 0.2, 0.5], requires_grad=True)
    PAIR_LOSSES[name](similarities, torch.tensor([0.0, 1.0, 0.5])).backward()
    assert similarities.grad.isfinite().all() and similarities.grad.ne(0).any()
