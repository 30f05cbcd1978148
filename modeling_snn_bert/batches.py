"""Batches that follow from the seed and their number alone: a run that is resumed sees what it would have seen.

`RowBatches` and `DrawnBatches` make them, each process its own. `Batches` is what a run goes through:
`DistillationTrainer` takes it as its `train_dataset`.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import TrainingArguments

Batch = dict[str, torch.Tensor]
# Makes the batch of a number, or of a step.
BatchOf = Callable[[int], Batch]
Row = Mapping[str, Any]
Collate = Callable[[list[Row]], Mapping[str, torch.Tensor]]
# Rows of a data set are sorted by length among so many batches.
WINDOW = 20


class Batches(Dataset):
    """The batches of a whole run in their order, ready for the model.

    Args:
        batch_of: makes this process' batch of a number.
        count: how many there are, from 0 on.
    """

    def __init__(self, batch_of: BatchOf, count: int) -> None:
        self.batch_of, self.count = batch_of, count

    @classmethod
    def of_run(cls, batch_of: BatchOf, args: "TrainingArguments", per_epoch: int | None = None) -> "Batches":
        """The batches of the run of `args`, which get `max_steps` for their epochs of `per_epoch` batches."""
        if per_epoch is not None and args.max_steps <= 0:
            args.max_steps = max(1, math.ceil(args.num_train_epochs * per_epoch / args.gradient_accumulation_steps))
        if args.max_steps < 1:
            raise ValueError(f"--max_steps must be >= 1, got {args.max_steps}")
        return cls(batch_of, args.max_steps * args.gradient_accumulation_steps)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        return self.batch_of(number)


class RowBatches:
    """Batches of tokenised rows, in another order in each epoch.

    Rows of like length go together, which saves padding; the last batch of an epoch may be smaller.

    Args:
        rows: rows with `input_ids`.
        collate: makes a batch of a list of rows.
        batch_size: rows that a process takes at a time.
        seed: seed of the order.
        part, parts: which of how many processes this is.
    """

    def __init__(
        self, rows: Iterable[Row], collate: Collate, batch_size: int, seed: int, part: int = 0, parts: int = 1
    ) -> None:
        self.rows, self.collate, self.seed, self.part, self.parts = list(rows), collate, seed, part, parts
        self.global_batch_size = batch_size * parts
        self.per_epoch = math.ceil(len(self.rows) / self.global_batch_size)
        self._epoch = -1

    def __call__(self, number: int) -> Batch:
        """This process' batch number `number`, counted from the first epoch on."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        indices = self._batches[place]
        # A last batch that the processes cannot share evenly is filled up with its own rows.
        indices = [indices[i % len(indices)] for i in range(math.ceil(len(indices) / self.parts) * self.parts)]
        return dict(self.collate([self.rows[i] for i in indices[self.part :: self.parts]]))

    def _order(self, epoch: int) -> list[list[int]]:
        lengths = [len(row["input_ids"]) for row in self.rows]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return batches_by_length(lengths, self.global_batch_size, generator)


def batches_in_order(rows: Sequence[Row], collate: Collate, batch_size: int) -> Iterator[Batch]:
    """Each row once, in the order of the rows; the last batch may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield dict(collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))]))


def batches_by_length(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """The rows of an epoch as batches of their numbers, in a random order; rows of like length go together.

    They are sorted by length among `WINDOW` batches at a time; the last batch may be smaller.
    """
    order, window = torch.randperm(len(lengths), generator=generator).tolist(), WINDOW * batch_size
    groups = [sorted(order[i : i + window], key=lengths.__getitem__) for i in range(0, len(order), window)]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class DrawnBatches:
    """Batches of rows that are drawn one by one and without end.

    So many rows as fill `WINDOW` batches are drawn at a time, sorted by length and cut into batches, which saves
    padding; the batches come in a random order. `SIDE_BY_SIDE` windows take turns, so that the workers of a DataLoader,
    which take turns as well, need not all draw every window: 2, 4 or 8 of them share the work.

    Args:
        draw: draws a row with `input_ids`; all that is random in it comes from its argument.
        collate: makes a batch of a list of rows.
        batch_size: rows of a batch.
        seed: seed of the draws.
        part: number of this process; each draws rows of its own.
    """

    WINDOW = 16
    SIDE_BY_SIDE = 8

    def __init__(
        self, draw: Callable[[random.Random], Row], collate: Collate, batch_size: int, seed: int, part: int = 0
    ) -> None:
        self.draw, self.collate, self.batch_size, self.seed, self.part = draw, collate, batch_size, seed, part
        self._windows: dict[int, tuple[int, list[list[Row]]]] = {}

    def __call__(self, number: int) -> Batch:
        """This process' batch number `number`, counted over the whole run."""
        turn, side = divmod(number, self.SIDE_BY_SIDE)
        window, place = divmod(turn, self.WINDOW)
        window = window * self.SIDE_BY_SIDE + side
        if self._windows.get(side, (None,))[0] != window:
            self._windows[side] = window, self._draw_window(window)
        return dict(self.collate(self._windows[side][1][place]))

    def _draw_window(self, window: int) -> list[list[Row]]:
        rng = random.Random(f"{self.seed}, {self.part}, {window}")
        rows = [self.draw(rng) for _ in range(self.WINDOW * self.batch_size)]
        rows.sort(key=lambda row: len(row["input_ids"]))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rng.shuffle(batches)
        return batches


def alternating(labelled: BatchOf, drawn: BatchOf, share: int) -> BatchOf:
    """A batch of `labelled`, then `share` of `drawn`, and so on."""

    def batch_of(number: int) -> Batch:
        before, place = divmod(number, share + 1)
        return labelled(before) if place == 0 else drawn(number - before - 1)

    return batch_of
