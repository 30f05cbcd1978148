"""Spikes from one bit each to floats on a GPU: one Triton kernel, which writes the dtype that a product takes."""

import torch

from .triton_tiles import constexpr, jit, kernel_in_operator, on_device_of, register_fake, takes, tl, triton_operator

# Bytes of a program, each of which becomes eight spikes.
BYTES = 256


def takes_packed(packed: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel unpacks these spikes to `dtype`."""
    return takes(packed.new_empty(0, dtype=dtype))


@jit
def _unpack(packed, spikes, size, width, channels, WHOLE: constexpr, TERNARY: constexpr, BYTES: constexpr):
    """`size` bytes of each sign, `width` a row, to rows of `channels` spikes; `WHOLE` if that is 8 times `width`."""
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = tl.arange(0, BYTES)[:, None]
    bit = tl.arange(0, 8)[None, :]
    there = start + byte < size
    values = (tl.load(packed + start + byte, mask=there, other=0).to(tl.int32) >> bit) & 1
    if TERNARY:
        values -= (tl.load(packed + size + start + byte, mask=there, other=0).to(tl.int32) >> bit) & 1
    values = values.to(tl.float32).to(spikes.dtype.element_ty)
    if WHOLE:
        tl.store(spikes + 8 * start + (8 * byte + bit), values, mask=there)
    else:
        channel = 8 * ((start + byte) % width) + bit
        tl.store(spikes + (start + byte) // width * channels + channel, values, mask=there & (channel < channels))


@triton_operator("unpack_triton")
def unpack_triton(packed: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """`unpack` of `packed_spikes` on a GPU, to float32, bfloat16 or float16."""
    spikes = _new_spikes(packed, channels, dtype)
    if spikes.numel():
        packed = packed.contiguous()
        size = packed.numel() // packed.shape[0]
        with on_device_of(packed):
            kernel_in_operator(_unpack)[(-(-size // BYTES),)](
                packed,
                spikes,
                size,
                packed.shape[-1],
                channels,
                WHOLE=8 * packed.shape[-1] == channels,
                TERNARY=packed.shape[0] == 2,
                BYTES=BYTES,
                num_warps=4,
            )
    return spikes


def _new_spikes(packed: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return packed.new_empty((*packed.shape[1:-1], channels), dtype=dtype)


register_fake(unpack_triton, _new_spikes)
