"""The compiled kernels of event-driven inference: lists of spikes, sums of weight rows, attention between spikes.

They are part of the library that `cpu_kernels` loads, and take and give what csrc/event_driven.h says. Packed spikes
are `[signs, batch, seq_len, channels / 8]` as in `packed_spikes`.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import nn

from .cpu_kernels import _LIBRARY, _Neuron

WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
# The layouts of weights: one for the events of each type, and one of int8 for dense products on tiles.
TILES = "int8_tiles"
LAYOUTS = {**WEIGHT_TYPES, TILES: 3}
# Output columns of a block, of which an input's weights fill one cache line of int8 or two of the others; the kernels
# keep such a block in the cache.
COLUMNS = {"float32": 32, "bfloat16": 64, "int8": 64, TILES: 64}
# A tile of weights is so many inputs of so many columns.
TILE_INPUTS, TILE_COLUMNS = 64, 16
# A view may start anywhere, where the kernels want a cache line.
BLOCK_ALIGNMENT = 64
LIST_SLACK = 64
# A list entry is 16 bits wide.
MAX_INPUTS = 65536
MAX_HEAD_SIZE = 512
# What a kernel returns that was asked for tiles where there are none.
NO_TILES = 2


class _SpikeLists(ctypes.Structure):
    """`struct spike_lists`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "stride")),
        ("lists", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("indices", "counts", "packed")),
    ]


class _Product(ctypes.Structure):
    """`struct product`."""

    _fields_ = [
        ("outputs", ctypes.c_int64),
        ("weight_type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "addend", "result")),
    ]


class _Attention(ctypes.Structure):
    """`struct attention`."""

    _fields_ = [
        ("head_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "gain", "offset")),
        ("scaling", ctypes.c_float),
        ("context", ctypes.c_void_p),
    ]


class SpikeLists(NamedTuple):
    """The active inputs of each row, and how many there are in all. `struct` points into the tensors."""

    struct: _SpikeLists
    tensors: tuple[torch.Tensor, ...]
    spikes: int

    @property
    def firing_rate(self) -> float:
        """Share of the inputs that fire."""
        return self.spikes / (self.struct.rows * self.struct.inputs)


class PackedSpikes:
    """Packed spikes `[signs, batch, seq_len, channels / 8]`, a row per token; counted and listed if that is needed."""

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed
        rows, inputs = packed[0, ..., 0].numel(), 8 * packed.shape[-1]
        self.struct = _SpikeLists(rows, inputs, 0, len(packed), None, None, packed.data_ptr())

    @functools.cached_property
    def firing_rate(self) -> float:
        """Share of the inputs that fire."""
        packed = ctypes.c_void_p(self.packed.data_ptr()), ctypes.c_int64(self.packed.numel())
        return _kernel("count_packed_spikes")(*packed, _threads()) / (self.struct.rows * self.struct.inputs)

    @functools.cached_property
    def lists(self) -> SpikeLists:
        """The lists of the rows."""
        return list_packed_spikes(self.packed)


class BlockedWeights(NamedTuple):
    """The weights `[outputs, inputs]` of a product in one of the `LAYOUTS`, with what belongs to them."""

    layout: str
    outputs: int
    blocks: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None


class NeuronParameters(NamedTuple):
    """What the kernels need to know of a `BPSN`."""

    groups: int
    v_threshold: torch.Tensor
    decay_forward: torch.Tensor
    decay_backward: torch.Tensor
    reset: torch.Tensor
    normalize: bool
    reset_iterations: int
    ternary: bool


def tiles_available() -> bool:
    """Whether this processor has AMX, with the compiled kernels for it, and they may use it."""
    return _LIBRARY is not None and bool(_LIBRARY.has_spike_tiles())


def _kernel(name: str):
    kernel = getattr(_LIBRARY, name)
    if name.startswith(("list_", "count_")):
        kernel.restype = ctypes.c_int64
    return kernel


def _threads() -> ctypes.c_int32:
    return ctypes.c_int32(torch.get_num_threads())


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def block_weights(
    weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, weight_dtype: str
) -> BlockedWeights:
    """The layout of csrc/event_linear.c from weights `[outputs, inputs]` of the dtype named by `weight_dtype`.

    A 32-bit word of a cache line holds two bfloat16 columns or four int8 columns that lie 16 apart.
    """
    outputs, inputs = weight.shape
    columns = COLUMNS[weight_dtype]
    filling = -outputs % columns
    if filling:
        weight = nn.functional.pad(weight, (0, 0, 0, filling))
    if weight_dtype == "float32":
        blocks = weight.view(-1, columns, inputs).transpose(1, 2)
    elif weight_dtype == "bfloat16":
        blocks = weight.view(-1, 2, 2, columns // 4, inputs).permute(0, 4, 1, 3, 2)
    else:
        fours = weight.view(-1, 4, columns // 4, inputs).to(torch.int16)
        fours[:, ::2] += 128
        blocks = fours.to(torch.uint8).permute(0, 3, 2, 1)
    return _blocked(weight_dtype, outputs, blocks, filling, scale, bias)


def tile_weights(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> BlockedWeights:
    """The layout of csrc/spike_tiles.c from int8 weights `[outputs, inputs]`."""
    outputs, inputs = weight.shape
    filling = -outputs % COLUMNS[TILES]
    weight = nn.functional.pad(weight, (0, -inputs % TILE_INPUTS, 0, filling))
    # [groups of columns, 16 columns, steps, 16 rows of a tile, 4 inputs]
    tiles = weight.view(-1, TILE_COLUMNS, weight.shape[1] // TILE_INPUTS, TILE_INPUTS // 4, 4)
    return _blocked(TILES, outputs, tiles.permute(0, 2, 3, 1, 4), filling, scale, bias)


def _blocked(
    layout: str,
    outputs: int,
    blocks: torch.Tensor,
    filling: int,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> BlockedWeights:
    """`blocks` in memory as the kernels want them, with `scale` and `bias` of the columns filled up too."""
    blocks = blocks.contiguous()
    if blocks.data_ptr() % BLOCK_ALIGNMENT:
        blocks = blocks.clone()
    filled = [None if x is None else nn.functional.pad(x.float(), (0, filling)) for x in (scale, bias)]
    return BlockedWeights(layout, outputs, blocks, *filled)


def _empty_lists(rows: int, inputs: int, ternary: bool) -> tuple[_SpikeLists, torch.Tensor, torch.Tensor]:
    lists, stride = 1 + ternary, inputs + LIST_SLACK
    indices = torch.empty(lists * rows * stride, dtype=torch.int16)
    counts = torch.empty(lists * rows, dtype=torch.int32)
    return _SpikeLists(rows, inputs, stride, lists, indices.data_ptr(), counts.data_ptr(), None), indices, counts


def list_float_spikes(spikes: torch.Tensor, ternary: bool) -> SpikeLists:
    """Lists of the rows of `spikes`, `[rows, inputs]`, with the packed spikes for products on tiles, if there are any.

    Raises:
        ValueError: if an entry is not 0 or 1 (or, with `ternary`, -1).
    """
    spikes = spikes.float().contiguous()
    rows, inputs = spikes.shape
    struct, *tensors = _empty_lists(rows, inputs, ternary)
    if tiles_available():
        tensors.append(torch.empty(1 + ternary, rows, (inputs + 7) // 8, dtype=torch.uint8))
        struct.packed = tensors[-1].data_ptr()
    listed = _kernel("list_float_spikes")(ctypes.byref(struct), ctypes.c_void_p(spikes.data_ptr()), _threads())
    if listed < 0:
        raise not_spikes(ternary)
    return SpikeLists(struct, tuple(tensors), listed)


def not_spikes(ternary: bool) -> ValueError:
    """The error of a product whose input is not made of spikes."""
    values = "-1, 0 and 1" if ternary else "0 and 1"
    return ValueError(
        f"an event-driven Linear adds up weights and takes spikes only, the values {values}: its input holds others. "
        "Use `dense(model)` for real-valued inputs"
    )


def list_packed_spikes(packed: torch.Tensor) -> SpikeLists:
    """Lists of packed spikes `[signs, ..., channels / 8]`, one row per token."""
    signs, tokens, width = len(packed), packed[0, ..., 0].numel(), packed.shape[-1]
    struct, indices, counts = _empty_lists(tokens, 8 * width, signs == 2)
    listed = _kernel("list_packed_spikes")(ctypes.byref(struct), ctypes.c_void_p(packed.data_ptr()), _threads())
    return SpikeLists(struct, (indices, counts), listed)


def list_packed_columns(packed: torch.Tensor) -> SpikeLists:
    """Lists of the transposed spikes: for each channel the tokens, of at most `MAX_INPUTS`, at which it fires."""
    signs, tokens, width = len(packed), packed[0, ..., 0].numel(), packed.shape[-1]
    struct, indices, counts = _empty_lists(8 * width, tokens, signs == 2)
    listed = _kernel("list_packed_columns")(ctypes.byref(struct), ctypes.c_void_p(packed.data_ptr()), _threads())
    return SpikeLists(struct, (indices, counts), listed)


def _product(weights: BlockedWeights, addend: torch.Tensor | None, result: torch.Tensor | None) -> _Product:
    return _Product(
        weights.outputs,
        LAYOUTS[weights.layout],
        weights.blocks.data_ptr(),
        _pointer(weights.scale),
        _pointer(weights.bias),
        _pointer(addend),
        _pointer(result),
    )


def event_linear(
    spikes: SpikeLists | PackedSpikes, weights: BlockedWeights, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """`[rows, outputs]`: for each row the sum of the weights of its active inputs, plus bias and `addend`.

    Products by events take lists, those on tiles packed spikes, or lists of floats, which have them as well.
    """
    result = torch.empty(spikes.struct.rows, weights.outputs)
    product = _product(weights, addend, result)
    _call("event_linear", spikes.struct, product)
    return result


def _neuron(
    neuron: NeuronParameters,
    shape: tuple[int, int, int],
    mask: torch.Tensor | None,
    current: torch.Tensor | None,
    packed: torch.Tensor,
) -> _Neuron:
    batch, tokens, channels = shape
    return _Neuron(
        batch=batch,
        tokens=tokens,
        channels=channels,
        groups=neuron.groups,
        current=_pointer(current),
        mask=_pointer(mask),
        v_threshold=neuron.v_threshold.data_ptr(),
        decay_forward=neuron.decay_forward.data_ptr(),
        decay_backward=neuron.decay_backward.data_ptr(),
        reset=neuron.reset.data_ptr(),
        normalize=neuron.normalize,
        reset_iterations=neuron.reset_iterations,
        ternary=neuron.ternary,
        packed=packed.data_ptr(),
    )


def _empty_packed(neuron: NeuronParameters, batch: int, tokens: int, channels: int) -> torch.Tensor:
    return torch.empty(1 + neuron.ternary, batch, tokens, channels // 8, dtype=torch.uint8)


def _call(name: str, *arguments: ctypes.Structure) -> None:
    failed = _kernel(name)(*(ctypes.byref(x) for x in arguments), _threads())
    if failed == NO_TILES:
        raise RuntimeError(f"{name}: weights laid out for AMX, which this processor lacks or which is not allowed")
    if failed:
        raise MemoryError(f"{name}: no memory for the scratch space of a sequence")


def neuron_spikes(current: torch.Tensor, mask: torch.Tensor | None, neuron: NeuronParameters) -> torch.Tensor:
    """Packed spikes of a neuron from `current`, `[batch, seq_len, channels]`, float32 and contiguous."""
    batch, tokens, channels = current.shape
    packed = _empty_packed(neuron, batch, tokens, channels)
    _call("bpsn_forward", _neuron(neuron, (batch, tokens, channels), mask, current, packed))
    return packed


def linear_neuron_spikes(
    spikes: SpikeLists | PackedSpikes,
    weights: BlockedWeights,
    batch: int,
    mask: torch.Tensor | None,
    neuron: NeuronParameters,
) -> torch.Tensor:
    """Packed spikes of a neuron behind a product, from `spikes` as `event_linear` takes them.

    The currents between them never leave the cache.
    """
    tokens = spikes.struct.rows // batch
    packed = _empty_packed(neuron, batch, tokens, weights.outputs)
    behind = _neuron(neuron, (batch, tokens, weights.outputs), mask, None, packed)
    _call("event_linear_bpsn", spikes.struct, _product(weights, None, None), behind)
    return packed


def fits_blocks(layout: str, outputs: int, groups: int) -> bool:
    """Whether `linear_neuron_spikes` can do a product of this size: blocks and channel groups must fit."""
    columns, width = COLUMNS[layout], outputs // groups
    return width % 8 == 0 and (columns % width == 0 or width % columns == 0)


def attention_spikes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    neuron: NeuronParameters,
) -> torch.Tensor:
    """Packed spikes of the neuron behind softmax attention between packed spikes, with a channel group per head."""
    _, batch, tokens, width = query.shape
    channels = 8 * width
    packed = _empty_packed(neuron, batch, tokens, channels)
    attention = _Attention(
        channels // neuron.groups,
        *(x.data_ptr() for x in (query, key, value, gain, offset)),
        scaling,
        None,
    )
    _call("event_attention", attention, _neuron(neuron, (batch, tokens, channels), mask, None, packed))
    return packed
