"""Weights as event-driven products have them: rounded, and whatever is made of them, for as long as they stay so."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Tensors: TypeAlias = Sequence[torch.Tensor | None]

# torch's own functions for copies that are made on write. Where one is missing, `Snapshot` copies for real.
lazy_clone: Any = getattr(torch, "_lazy_clone", None)
data_address: Any = getattr(torch._C, "_data_address", None)
use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
COPIES_ON_WRITE = None not in (lazy_clone, data_address, use_count)
# Held while something is made of weights, or a snapshot of them is taken.
_MAKING = threading.Lock()


def round_weights(weight: torch.Tensor, weight_dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`weight`, `[outputs, inputs]`, in the given dtype; for int8 also the scale per output, `[outputs]`.

    The largest weight of a channel becomes 127 times its scale.
    """
    weight = weight.detach().float()
    if weight_dtype == "bfloat16":
        return weight.bfloat16(), None
    if weight_dtype == "float32":
        return weight, None
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def rounded_floats(weight: torch.Tensor, weight_dtype: str) -> torch.Tensor:
    """`weight` after rounding, as floats."""
    rounded, scale = round_weights(weight, weight_dtype)
    return rounded.float() if scale is None else rounded.float() * scale[:, None]


def quantized_table(weight: torch.Tensor) -> torch.Tensor:
    """int8 weights `[outputs, inputs]` as the rows of a table of torch's own format for quantized embeddings.

    A row is the bytes `w + 128` and, as two floats, the scale 1 and the offset -128.
    """
    rows = (weight.t().to(torch.int16) + 128).to(torch.uint8)
    tail = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(rows), 8)
    return torch.cat((rows, tail), dim=1)


def own_memory(x: torch.Tensor) -> None:
    """Move `x` to memory of torch's own if it lies in another library's, as after loading a safetensors file.

    Memory that other processes share stays where it is.
    """
    if COPIES_ON_WRITE and not x.is_shared():
        try:
            lazy_clone(x.detach())
        except RuntimeError:
            x.data = x.detach().clone()


def _holders(x: torch.Tensor) -> int:
    """How many hold the memory of `x`."""
    return use_count(x.untyped_storage()._cdata)


# What that is for a tensor whose memory nobody else holds.
HELD_ONCE = _holders(torch.empty(1)) if COPIES_ON_WRITE else 0


class Snapshot:
    """What some tensors held at one time, and whether they still do, whoever wrote to them and in whatever way.

    A copy that torch makes on write shares the memory of its tensor until someone writes to that, also through `.data`:
    then the tensor moves. So what lies in the same place holds the same, and nothing has to be read. torch copies so
    only what lies in memory of its own; and where others hold the memory too, one of them might write behind torch's
    back (a NumPy array does). There the copy is a real one and is compared number by number.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.addresses: list[tuple | None] | None = None
        self.copies: Tensors = []
        if not self._share(tensors):
            self.copies = [None if x is None else x.detach().clone() for x in tensors]

    def _share(self, tensors: Tensors) -> bool:
        if not COPIES_ON_WRITE or any(x is not None and _holders(x) > HELD_ONCE for x in tensors):
            return False
        try:
            copies = [None if x is None else lazy_clone(x.detach()) for x in tensors]
        except RuntimeError:
            return False
        self.copies, self.addresses = copies, self._places(tensors)
        return True

    @staticmethod
    def _places(tensors: Tensors) -> list[tuple | None]:
        # `data_ptr` would count as a write.
        return [
            None if x is None else (data_address(x), x.storage_offset(), x.dtype, x.shape, x.stride()) for x in tensors
        ]

    def is_in_place(self, tensors: Tensors) -> bool:
        """Whether `tensors` still share the memory of their copies."""
        return self.addresses is not None and self.addresses == self._places(tensors)

    def still_holds(self, tensors: Tensors) -> bool:
        """Whether `tensors` hold what they did. Those that have only moved are followed."""
        if self.is_in_place(tensors):
            return True
        if not all(_equal(x, y) for x, y in zip(tensors, self.copies, strict=True)):
            return False
        self._share(tensors)
        return True


def _equal(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)


class MadeOf:
    """Things that are made of tensors when they are first asked for, and again when the tensors have changed."""

    def __init__(self) -> None:
        # Both change at once, for other threads.
        self._state: tuple[Snapshot | None, dict[str, Any]] = None, {}

    def get(self, name: str, tensors: Tensors, make: Callable[[], Any]) -> Any:
        """What `make` makes of `tensors`; `name` tells it from other things made of the same tensors."""
        snapshot, things = self._state
        if snapshot is not None and name in things and snapshot.is_in_place(tensors):
            return things[name]
        # What is made in inference mode could not be used outside it.
        with _MAKING, torch.inference_mode(False), torch.no_grad():
            snapshot, things = self._state
            if snapshot is None or not snapshot.still_holds(tensors):
                snapshot, things = Snapshot(tensors), {}
            if name not in things:
                things[name] = make()
            self._state = snapshot, things
            return things[name]
