"""The compiled kernels of event-driven inference: lists of spikes, sums of weight rows, attention between spikes.

They are part of the library that `cpu_kernels` loads, and take and give what csrc/event_driven.h says. Packed spikes
are `[signs, batch, seq_len, channels / 8]` as in `packed_spikes`.
"""

import ctypes
import functools

import torch
from torch import nn

from .cpu_kernels import _LIBRARY, _Neuron, check_groups, checked_pointer
from .neuron_settings import BPSNSettings, BPSNValues

WEIGHT_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
# The layouts of weights: one for the events of each type, and one of int8 for dense products on tiles.
TILES = "int8_tiles"
LAYOUTS = {**WEIGHT_TYPES, TILES: 3}
# Output columns of a block, of which an input's weights fill one cache line of int8 or two of the others; the kernels
# keep such a block in the cache.
COLUMNS = {"float32": 32, "bfloat16": 64, "int8": 64, TILES: 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8, TILES: torch.int8}
# A tile of weights is so many inputs of so many columns.
TILE_INPUTS, TILE_COLUMNS = 64, 16
# The kernels want a block to start at a cache line.
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


class SpikeLists:
    """The active inputs of each row, listed by the kernel of that name from spikes as floats or packed.

    `struct` points into memory that the object owns. With `packs` the kernel writes the packed spikes as well.
    """

    def __init__(
        self, kernel: str, spikes: torch.Tensor, rows: int, inputs: int, signs: int, packs: bool = False
    ) -> None:
        is_float = kernel == "list_float_spikes"
        source = checked_pointer("spikes", spikes, torch.float32 if is_float else torch.uint8, spikes.shape)
        if spikes.numel() * (1 if is_float else 8) != rows * inputs * (1 if is_float else signs):
            raise ValueError(f"`spikes` must hold {rows} rows of {inputs} inputs, got {list(spikes.shape)}")
        if inputs > MAX_INPUTS:
            raise ValueError(f"a list of spikes is over at most {MAX_INPUTS} inputs, got {inputs}")
        stride = inputs + LIST_SLACK
        indices = torch.empty(signs * rows * stride, dtype=torch.int16)
        counts = torch.empty(signs * rows, dtype=torch.int32)
        packed = torch.empty(signs, rows, (inputs + 7) // 8, dtype=torch.uint8) if packs else None
        self.tensors = indices, counts, packed
        pointers = (None if x is None else x.data_ptr() for x in self.tensors)
        self.struct = _SpikeLists(rows, inputs, stride, signs, *pointers)
        # Negative if there is something else than spikes.
        self.spikes: int = _kernel(kernel)(ctypes.byref(self.struct), ctypes.c_void_p(source), _threads())

    @property
    def firing_rate(self) -> float:
        """Share of the inputs that fire."""
        return self.spikes / (self.struct.rows * self.struct.inputs)


class PackedSpikes:
    """Packed spikes `[signs, batch, seq_len, channels / 8]`, a row per token; counted and listed if that is needed."""

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed
        address = checked_pointer("packed", packed, torch.uint8, packed.shape)
        signs, rows, inputs = _packed_rows(packed)
        self.struct = _SpikeLists(rows, inputs, 0, signs, None, None, address)

    @functools.cached_property
    def firing_rate(self) -> float:
        """Share of the inputs that fire."""
        packed = ctypes.c_void_p(self.struct.packed), ctypes.c_int64(self.packed.numel())
        return _kernel("count_packed_spikes")(*packed, _threads()) / (self.struct.rows * self.struct.inputs)

    @functools.cached_property
    def lists(self) -> SpikeLists:
        """The lists of the rows."""
        return list_packed_spikes(self.packed)


class BlockedWeights:
    """The weights of a product as csrc/event_linear.c wants them, with what belongs to them.

    A 32-bit word of a cache line holds two bfloat16 columns or four int8 columns that lie 16 apart. `TILES` is the
    layout of csrc/spike_tiles.c, of int8 weights. All is copied, and filled up to whole blocks.

    Args:
        weight: `[outputs, inputs]`, of the dtype that `layout` names.
        scale, bias: `[outputs]`, or `None`; int8 needs a scale and the others take none.
        layout: one of `LAYOUTS`.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, layout: str
    ) -> None:
        if (scale is not None) != (layout in ("int8", TILES)):
            raise ValueError(f"`scale` belongs to int8 weights, and to no others, got {layout}")
        self.layout = layout
        self.outputs, self.inputs = weight.shape
        columns = COLUMNS[layout]
        filling = -self.outputs % columns
        filling_inputs = -self.inputs % TILE_INPUTS if layout == TILES else 0
        if filling or filling_inputs:
            weight = nn.functional.pad(weight, (0, filling_inputs, 0, filling))
        outputs, inputs = weight.shape
        if layout == "float32":
            blocks = weight.reshape(-1, columns, inputs).transpose(1, 2)
        elif layout == "bfloat16":
            blocks = weight.reshape(-1, 2, 2, columns // 4, inputs).permute(0, 4, 1, 3, 2)
        elif layout == "int8":
            fours = weight.reshape(-1, 4, columns // 4, inputs).to(torch.int16)
            fours[:, ::2] += 128
            blocks = fours.to(torch.uint8).permute(0, 3, 2, 1)
        else:
            # [groups of columns, 16 columns, steps, 16 rows of a tile, 4 inputs]
            tiles = weight.reshape(-1, TILE_COLUMNS, inputs // TILE_INPUTS, TILE_INPUTS // 4, 4)
            blocks = tiles.permute(0, 2, 3, 1, 4)
        # A copy in any case: the weights themselves belong to somebody else.
        blocks = blocks.clone(memory_format=torch.contiguous_format).view(-1)
        address = checked_pointer("weight", blocks, DTYPES[layout], (outputs * inputs,))
        if address % BLOCK_ALIGNMENT:
            raise ValueError(f"blocks of weights must start at a multiple of {BLOCK_ALIGNMENT} bytes")
        # The memory that `struct` points to.
        self.tensors = (
            blocks,
            *(None if x is None else nn.functional.pad(x.float(), (0, filling)) for x in (scale, bias)),
        )
        of_columns = zip(("scale", "bias"), self.tensors[1:], strict=True)
        pointers = [x if x is None else checked_pointer(name, x, torch.float32, (outputs,)) for name, x in of_columns]
        self.struct = _Product(self.outputs, LAYOUTS[layout], address, *pointers, None, None)


class NeuronParameters:
    """What the kernels need to know of a `BPSN`: copies of the numbers of its equations, and its settings."""

    def __init__(self, values: BPSNValues, settings: BPSNSettings) -> None:
        self.channels, self.groups = values.v_threshold.numel(), values.decay_forward.numel()
        self.ternary = settings.ternary
        check_groups(self.channels, self.groups)
        # Copies, so that nobody else can free or change what the kernels read.
        self.tensors = [x.detach().clone().float().contiguous() for x in values]
        shapes = ((self.channels,), *3 * ((self.groups,),))
        pointers = {
            name: checked_pointer(name, x, torch.float32, shape)
            for name, x, shape in zip(values._fields, self.tensors, shapes, strict=True)
        }
        self.struct = _Neuron(
            channels=self.channels,
            groups=self.groups,
            normalize=settings.normalize,
            reset_iterations=settings.reset_iterations,
            ternary=settings.ternary,
            **pointers,
        )


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


def _packed_rows(packed: torch.Tensor) -> tuple[int, int, int]:
    """Signs, rows and inputs of packed spikes `[signs, ..., channels / 8]`."""
    if packed.dim() < 2 or packed.shape[0] not in (1, 2):
        raise ValueError(f"packed spikes must be [1 or 2, ..., channels / 8], got {list(packed.shape)}")
    return packed.shape[0], packed.shape[1:-1].numel(), 8 * packed.shape[-1]


def list_float_spikes(spikes: torch.Tensor, ternary: bool) -> SpikeLists:
    """Lists of the rows of `spikes`, `[rows, inputs]`, with the packed spikes for products on tiles, if there are any.

    Raises:
        ValueError: if an entry is not 0 or 1 (or, with `ternary`, -1).
    """
    spikes = spikes.float().contiguous()
    rows, inputs = spikes.shape
    lists = SpikeLists("list_float_spikes", spikes, rows, inputs, 1 + ternary, packs=tiles_available())
    if lists.spikes < 0:
        raise not_spikes(ternary)
    return lists


def not_spikes(ternary: bool) -> ValueError:
    """The error of a product whose input is not made of spikes."""
    values = "-1, 0 and 1" if ternary else "0 and 1"
    return ValueError(
        f"an event-driven Linear adds up weights and takes spikes only, the values {values}: its input holds others. "
        "Use `dense(model)` for real-valued inputs"
    )


def list_packed_spikes(packed: torch.Tensor) -> SpikeLists:
    """Lists of packed spikes `[signs, ..., channels / 8]`, one row per token."""
    signs, tokens, channels = _packed_rows(packed)
    return SpikeLists("list_packed_spikes", packed, tokens, channels, signs)


def list_packed_columns(packed: torch.Tensor) -> SpikeLists:
    """Lists of the transposed spikes: for each channel the tokens, of at most `MAX_INPUTS`, at which it fires."""
    signs, tokens, channels = _packed_rows(packed)
    return SpikeLists("list_packed_columns", packed, channels, tokens, signs)


def _product(spikes: SpikeLists | PackedSpikes, weights: BlockedWeights) -> _Product:
    """A copy of the structure of `weights`, which `spikes` must fit."""
    if spikes.struct.inputs != weights.inputs:
        raise ValueError(f"the spikes have {spikes.struct.inputs} channels, but the weights {weights.inputs} inputs")
    if not (spikes.struct.packed if weights.layout == TILES else spikes.struct.indices):
        raise ValueError(f"weights in the layout {weights.layout} take other spikes than {type(spikes).__name__}")
    return _Product.from_buffer_copy(weights.struct)


def event_linear(
    spikes: SpikeLists | PackedSpikes, weights: BlockedWeights, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """`[rows, outputs]`: for each row the sum of the weights of its active inputs, plus bias and `addend`.

    Products by events take lists, those on tiles packed spikes, or lists of floats, which have them as well. `addend`
    is `[rows, outputs]`, float32 and contiguous.
    """
    result = torch.empty(spikes.struct.rows, weights.outputs)
    product = _product(spikes, weights)
    if addend is not None:
        product.addend = checked_pointer("addend", addend, torch.float32, result.shape)
    product.result = result.data_ptr()
    _call("event_linear", spikes.struct, product)
    return result


def _neuron(
    neuron: NeuronParameters, batch: int, tokens: int, channels: int, mask: torch.Tensor | None
) -> tuple[_Neuron, torch.Tensor]:
    """The structure of `neuron` for currents `[batch, tokens, channels]`, and the packed spikes that it is to write."""
    if neuron.channels != channels:
        raise ValueError(f"the neuron has {neuron.channels} channels, but its currents {channels}")
    packed = torch.empty(1 + neuron.ternary, batch, tokens, channels // 8, dtype=torch.uint8)
    struct = _Neuron.from_buffer_copy(neuron.struct)
    struct.batch, struct.tokens, struct.packed = batch, tokens, packed.data_ptr()
    struct.mask = None if mask is None else checked_pointer("mask", mask, torch.uint8, (batch, tokens))
    return struct, packed


def _call(name: str, *arguments: ctypes.Structure) -> None:
    failed = _kernel(name)(*(ctypes.byref(x) for x in arguments), _threads())
    if failed == NO_TILES:
        raise RuntimeError(f"{name}: weights laid out for AMX, which this processor lacks or which is not allowed")
    if failed:
        raise MemoryError(f"{name}: no memory for the scratch space of a sequence")


def neuron_spikes(current: torch.Tensor, mask: torch.Tensor | None, neuron: NeuronParameters) -> torch.Tensor:
    """Packed spikes of a neuron from `current`, `[batch, seq_len, channels]`, float32 and contiguous."""
    batch, tokens, channels = current.shape
    struct, packed = _neuron(neuron, batch, tokens, channels, mask)
    struct.current = checked_pointer("current", current, torch.float32, current.shape)
    _call("bpsn_forward", struct)
    return packed


def linear_neuron_spikes(
    spikes: SpikeLists | PackedSpikes,
    weights: BlockedWeights,
    batch: int,
    mask: torch.Tensor | None,
    neuron: NeuronParameters,
) -> torch.Tensor:
    """Packed spikes of a neuron behind a product, from `spikes` as `event_linear` takes them.

    The currents between them never leave the cache. The product must be one that `fits_blocks`.
    """
    tokens, rest = divmod(spikes.struct.rows, batch)
    if rest:
        raise ValueError(f"`batch` must divide the {spikes.struct.rows} rows of the spikes, got {batch}")
    if not fits_blocks(weights.layout, weights.outputs, neuron.groups):
        raise ValueError(f"{neuron.groups} groups of {weights.outputs} channels and blocks of columns do not fit")
    behind, packed = _neuron(neuron, batch, tokens, weights.outputs, mask)
    _call("event_linear_bpsn", spikes.struct, _product(spikes, weights), behind)
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
    signs, batch, tokens, width = query.shape
    channels = 8 * width
    struct, packed = _neuron(neuron, batch, tokens, channels, mask)
    if signs != 1 + neuron.ternary or channels // neuron.groups > MAX_HEAD_SIZE:
        raise ValueError(
            f"`query` must be [{1 + neuron.ternary}, batch, seq_len, channels / 8] with heads of at most "
            f"{MAX_HEAD_SIZE} channels, got {list(query.shape)} and {neuron.groups} heads"
        )
    spikes = {"query": query, "key": key, "value": value}
    affine = {"gain": gain, "offset": offset}
    attention = _Attention(
        channels // neuron.groups,
        *(checked_pointer(name, x, torch.uint8, query.shape) for name, x in spikes.items()),
        *(checked_pointer(name, x, torch.float32, (channels,)) for name, x in affine.items()),
        scaling,
        None,
    )
    _call("event_attention", attention, struct)
    return packed
