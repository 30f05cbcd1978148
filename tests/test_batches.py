"""Batches that follow from seed and number."""

import itertools
import random

import pytest
import torch
from transformers import DataCollatorWithPadding, TrainingArguments

from modeling_snn_bert.batches import Batches, DrawnBatches, RowBatches, alternating, batches_in_order
from modeling_snn_bert.unlabelled_data import UnlabelledRows

SENTENCES = [
    "the old fox is here .",
    "the fox is old .",
    "it rained all night .",
    "fox",
    "nobody knew why it stopped .",
]


@pytest.fixture
def rows(tokenizer):
    pairs = list(itertools.pairwise(SENTENCES))
    return UnlabelledRows([SENTENCES], SENTENCES, pairs, tokenizer, 48, single_share=0.3)


@pytest.fixture
def labelled(tokenizer):
    generator = random.Random(0)
    texts = [" ".join(generator.choices("the old fox is here".split(), k=1 + i % 9)) for i in range(170)]
    return [{**tokenizer(text), "labels": i} for i, text in enumerate(texts)]


def test_every_row_once_an_epoch(labelled, tokenizer):
    """In an order of its own, and from the number alone; rows of like length go together."""
    batches = RowBatches(labelled, DataCollatorWithPadding(tokenizer), 8, seed=3)
    assert batches.per_epoch == 22
    found = [batches(number) for number in range(44)]
    epochs = [torch.cat([batch["labels"] for batch in found[i : i + 22]]) for i in (0, 22)]
    assert not torch.equal(*epochs)
    assert all(torch.equal(epoch.sort().values, torch.arange(170)) for epoch in epochs)
    assert sorted(len(batch["labels"]) for batch in found[:22]) == [2, *[8] * 21]
    again = RowBatches(labelled, DataCollatorWithPadding(tokenizer), 8, seed=3)
    for number in (43, 0, 22):
        assert all(torch.equal(x, found[number][name]) for name, x in again(number).items())
    other = RowBatches(labelled, DataCollatorWithPadding(tokenizer), 8, seed=4)
    assert not torch.equal(torch.cat([other(number)["labels"] for number in range(22)]), epochs[0])
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in found[:22])
    assert padding < 0.2 * sum(batch["attention_mask"].numel() for batch in found[:22])


def test_processes_share_a_batch(labelled, tokenizer):
    """Together they have the rows of one process with batches as large; the last one is filled up."""
    collate = DataCollatorWithPadding(tokenizer)
    whole = RowBatches(labelled[:169], collate, 8, seed=3)
    parts = [RowBatches(labelled[:169], collate, 4, seed=3, part=part, parts=2) for part in range(2)]
    for number in range(whole.per_epoch):
        rows = torch.cat([batches(number)["labels"] for batches in parts])
        assert set(rows.tolist()) == set(whole(number)["labels"].tolist()) and len(rows) % 2 == 0


def test_batches_take_turns():
    batch_of = alternating(lambda number: {"labelled": number}, lambda number: {"drawn": number}, 2)
    batches = Batches(batch_of, 7)
    assert len(batches) == 7
    found = [batches[number] for number in range(7)]
    assert found == [
        {"labelled": 0},
        {"drawn": 0},
        {"drawn": 1},
        {"labelled": 1},
        {"drawn": 2},
        {"drawn": 3},
        {"labelled": 2},
    ]


def test_batches_follow_from_seed_and_step(rows, tokenizer):
    """In any order, by processes of their own; a window of batches is cut out of sorted rows."""

    def batches(seed=0, part=0):
        return DrawnBatches(rows, DataCollatorWithPadding(tokenizer), 4, seed, part)

    one, again = batches(), batches()
    forwards = [one(number) for number in range(260)]
    for number in (259, 0, 17, 16, 3, 128, 127):
        assert all(torch.equal(x, forwards[number][name]) for name, x in again(number).items())
    for other in (batches(seed=1), batches(part=1)):
        assert any(other(number)["input_ids"].tolist() != forwards[number]["input_ids"].tolist() for number in (0, 1))
    # A window of one side.
    lengths = [batch["attention_mask"].sum(1) for batch in forwards[5:128:8]]
    assert len(lengths) == 16
    ordered = sorted(lengths, key=lambda rows: int(rows.sum()))
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(ordered))
    assert [int(x.max()) for x in lengths] != [int(x.max()) for x in ordered]
    pairs = torch.cat([batch["token_type_ids"].any(1) for batch in forwards])
    assert len(pairs) == 1040 and 0.5 < pairs.float().mean() < 0.9


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_that_take_turns_draw_each_window_once(rows, tokenizer, workers):
    windows = []
    for worker in range(workers):
        batches = DrawnBatches(rows, DataCollatorWithPadding(tokenizer), 2, 0)
        draw = batches._draw_window
        batches._draw_window = lambda window, draw=draw: windows.append(window) or draw(window)
        for number in range(worker, 256, workers):
            batches(number)
    assert sorted(windows) == list(range(16))


def test_the_batches_of_a_run(tmp_path):
    """Epochs become steps, unless the run has steps; accumulated batches are counted."""
    made = []
    epochs = TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=1.5, gradient_accumulation_steps=2)
    batches = Batches.of_run(lambda number: made.append(number) or {"number": number}, epochs, per_epoch=5)
    assert epochs.max_steps == 4 and len(batches) == 8 and batches[7] == {"number": 7} and made == [7]
    steps = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=3)
    assert len(Batches.of_run(made.append, steps, per_epoch=5)) == 3 and steps.max_steps == 3


def test_batches_in_order():
    rows = [{"input_ids": [i]} for i in range(5)]
    batches = list(batches_in_order(rows, lambda part: {"ids": [row["input_ids"][0] for row in part]}, 2))
    assert [batch["ids"] for batch in batches] == [[0, 1], [2, 3], [4]]
