"""The compiled kernels for the CPU: currents to spikes in one pass over memory, forward and backward.

The library is built from `csrc/` by `pip install` where a C compiler is at hand. Without it (also where this code came
from the Hub and the package is not installed) `available()` is False and the neurons run on torch's own operations,
with the same results. `SNN_BERT_CPU_KERNELS=0` in the environment does the same by hand.

The library holds each kernel at several levels of the instruction set and takes the highest that the processor has.
`SNN_BERT_CPU_LEVEL=plain`, `avx2`, `avx512` or `amx` in the environment is the highest that it may take.

The kernels are registered as torch operators, so that `torch.compile` and tools that follow a model through its
operators see them.
"""

import ctypes
import itertools
import os
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

FILENAME = "_cpu_kernels.shared"
# The same number stands in csrc/kernels.h; it changes with every structure and signature there.
KERNELS_VERSION = 5
# The levels of the instruction set, lowest first: csrc/levels.h has them in this order. `avx512` and `amx` differ in
# int8 products only.
CPU_LEVELS = ("plain", "avx2", "avx512", "amx")
LEVEL_VARIABLE = "SNN_BERT_CPU_LEVEL"
SURROGATE_INDEX = {"atan": 0, "sigmoid": 1, "triangle": 2, "rectangle": 3}


# What each operator from currents to spikes takes and gives, whatever device it is for.
FORWARD_SCHEMA = (
    "(Tensor current, Tensor? mask, Tensor v_threshold, Tensor decay_forward, Tensor decay_backward, Tensor reset, "
    "bool normalize, int reset_iterations, bool ternary) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_spikes, Tensor current, Tensor? mask, Tensor v_threshold, Tensor decay_forward, "
    "Tensor decay_backward, Tensor reset, bool normalize, int reset_iterations, bool ternary, str surrogate, "
    "float alpha) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Neuron(ctypes.Structure):
    """`struct neuron` of csrc/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "channels", "groups")),
        *((name, ctypes.c_void_p) for name in ("current", "mask", "v_threshold")),
        *((name, ctypes.c_void_p) for name in ("decay_forward", "decay_backward", "reset")),
        *((name, ctypes.c_int32) for name in ("normalize", "reset_iterations", "ternary", "surrogate")),
        ("alpha", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("spikes", "packed", "grad_spikes", "grad_current")),
        *((name, ctypes.c_void_p) for name in ("grad_v_threshold", "grad_decay_forward", "grad_decay_backward")),
        ("grad_reset", ctypes.c_void_p),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, or `None` where there are none, and a sentence that says which and why; it is logged.

    Raises:
        ValueError: if the environment asks for a level that does not exist.
    """
    allowed = os.environ.get(LEVEL_VARIABLE) or CPU_LEVELS[-1]
    _check_level(f"{LEVEL_VARIABLE} in the environment", allowed)
    kernels, log, words = None, logger.info, ""
    path = Path(__file__).parent / FILENAME
    if os.environ.get("SNN_BERT_CPU_KERNELS") == "0":
        words = "SNN-BERT's CPU kernels are switched off by SNN_BERT_CPU_KERNELS=0"
    elif not path.exists():
        words = "SNN-BERT's CPU kernels are not installed: its neurons run on torch's operations, more slowly"
    else:
        try:
            kernels = ctypes.CDLL(str(path))
            version = kernels.kernels_version()
        except (OSError, AttributeError) as error:
            kernels, log = None, logger.warning
            words = f"SNN-BERT's CPU kernels cannot be loaded and torch's operations run instead: {error}"
        else:
            if version == KERNELS_VERSION:
                kernels.cap_cpu_level(CPU_LEVELS.index(allowed))
                words = f"SNN-BERT runs on the CPU kernels in {path}"
            else:
                kernels, log = None, logger.warning
                words = (
                    f"SNN-BERT's CPU kernels in {path} have the version {version} in place of {KERNELS_VERSION} and "
                    "torch's operations run instead: install the package again"
                )
    log(words)
    return kernels, words


def _check_level(name: str, level: str) -> None:
    if level not in CPU_LEVELS:
        raise ValueError(f"{name} must be one of {list(CPU_LEVELS)}, got {level!r}")


# Loaded after torch, whose threads the kernels then share.
_LIBRARY, _WHY = _load()


def available() -> bool:
    """Whether there are compiled kernels."""
    return _LIBRARY is not None


def _free_namespace() -> str:
    """A namespace for operators that no other copy of this code uses in this process.

    Code from the Hub and the package may be there side by side. Whoever registers an operator again takes it from the
    copy that did so before, whose next call of it would crash.
    """
    names = ("snn_bert" if number == 1 else f"snn_bert_{number}" for number in itertools.count(1))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "bpsn_forward"))


NAMESPACE = _free_namespace()


def cap_cpu_level(level: str) -> None:
    """Set the highest level of the instruction set that the kernels may use, for the whole process.

    An event-driven model keeps the crossover rates that were measured when it was made, so set the level before.

    Args:
        level: `"plain"`, `"avx2"`, `"avx512"` or `"amx"`. One that the processor lacks allows all that it has.

    Raises:
        ValueError: if there is no such level.
    """
    _check_level("`level`", level)
    if _LIBRARY is not None:
        _LIBRARY.cap_cpu_level(CPU_LEVELS.index(level))


def cpu_level() -> str | None:
    """The level of the instruction set that the kernels run at; `None` where there are no kernels."""
    return None if _LIBRARY is None else CPU_LEVELS[_LIBRARY.cpu_level()]


def highest_cpu_level() -> str | None:
    """The highest level that this processor, its system and the kernels have; `None` where there are no kernels."""
    return None if _LIBRARY is None else CPU_LEVELS[_LIBRARY.highest_cpu_level()]


def kernel_facts() -> dict[str, str]:
    """Whether there are kernels, at what level they run in this process, and why, in words."""
    facts = {"kernels": _WHY}
    level, highest = cpu_level(), highest_cpu_level()
    if level is not None and highest is not None:
        facts["level"] = level
        facts["why this level"] = (
            "the highest of processor and kernels"
            if level == highest
            else f"capped, by {LEVEL_VARIABLE} or `cap_cpu_level`; processor and kernels have {highest}"
        )
    return facts


def _run(name: str, **values) -> None:
    """Call a kernel on a `struct neuron` of numbers and tensors; the tensors are contiguous."""
    fields = {key: x.data_ptr() if isinstance(x, torch.Tensor) else x for key, x in values.items()}
    assert _LIBRARY is not None  # whoever calls an operator has asked `available`
    if getattr(_LIBRARY, name)(ctypes.byref(_Neuron(**fields)), ctypes.c_int32(torch.get_num_threads())):
        raise MemoryError(f"{name}: no memory for sequences of {values['tokens']} tokens")


def _inputs(
    current: torch.Tensor,
    mask: torch.Tensor | None,
    v_threshold: torch.Tensor,
    decay_forward: torch.Tensor,
    decay_backward: torch.Tensor,
    reset: torch.Tensor,
) -> dict[str, int | torch.Tensor | None]:
    """The part of `struct neuron` that both kernels read. The values own the memory that the kernels see."""
    batch, tokens, channels = current.shape
    return {
        "batch": batch,
        "tokens": tokens,
        "channels": channels,
        "groups": decay_forward.shape[0],
        "current": current.contiguous(),
        "mask": None if mask is None else (mask != 0).to(torch.uint8).contiguous(),
        "v_threshold": v_threshold.contiguous(),
        "decay_forward": decay_forward.contiguous(),
        "decay_backward": decay_backward.contiguous(),
        "reset": reset.contiguous(),
    }


def packed_shape(shape: torch.Size, ternary: bool) -> tuple[int, ...]:
    """Shape of the packed form of spikes `[..., channels]`: bytes of eight channels, once for each sign."""
    return (2 if ternary else 1, *shape[:-1], (shape[-1] + 7) // 8)


@torch.library.custom_op(f"{NAMESPACE}::bpsn_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def bpsn_forward(
    current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary
):
    """Spikes of a `BPSN`, as floats and packed.

    `current` is `[batch, seq_len, channels]`, `mask` `[batch, seq_len]`, `v_threshold` `[channels]`, the decays and
    the reset `[groups]`; all but the mask are float32 on the CPU, and the channels of a group a multiple of 8.
    """
    inputs = _inputs(current, mask, v_threshold, decay_forward, decay_backward, reset)
    spikes = torch.empty(current.shape)
    packed = torch.empty(packed_shape(current.shape, ternary), dtype=torch.uint8)
    _run(
        "bpsn_forward",
        **inputs,
        normalize=normalize,
        reset_iterations=reset_iterations,
        ternary=ternary,
        spikes=spikes,
        packed=packed,
    )
    return spikes, packed


@bpsn_forward.register_fake
def fake_bpsn_forward(
    current, mask, v_threshold, decay_forward, decay_backward, reset, normalize, reset_iterations, ternary
):
    packed = current.new_empty(packed_shape(current.shape, ternary), dtype=torch.uint8)
    return torch.empty_like(current, memory_format=torch.contiguous_format), packed


@torch.library.custom_op(f"{NAMESPACE}::bpsn_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def bpsn_backward(
    grad_spikes,
    current,
    mask,
    v_threshold,
    decay_forward,
    decay_backward,
    reset,
    normalize,
    reset_iterations,
    ternary,
    surrogate,
    alpha,
):
    """Gradients to the current, the threshold, both decays and the reset; arguments as for `bpsn_forward`."""
    inputs = _inputs(current, mask, v_threshold, decay_forward, decay_backward, reset)
    batch, _, channels = current.shape
    groups = decay_forward.shape[0]
    outputs = {
        "grad_current": torch.empty(current.shape),
        "grad_v_threshold": torch.empty(batch, channels),
        "grad_decay_forward": torch.empty(batch, groups),
        "grad_decay_backward": torch.empty(batch, groups),
        "grad_reset": torch.empty(batch, groups),
    }
    _run(
        "bpsn_backward",
        **inputs,
        **outputs,
        grad_spikes=grad_spikes.contiguous(),
        normalize=normalize,
        reset_iterations=reset_iterations,
        ternary=ternary,
        surrogate=SURROGATE_INDEX[surrogate],
        alpha=alpha,
    )
    grad_current, *of_parameters = outputs.values()
    return grad_current, *(grad.sum(0) for grad in of_parameters)


@bpsn_backward.register_fake
def fake_bpsn_backward(grad_spikes, current, mask, v_threshold, decay_forward, decay_backward, reset, *settings):
    grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
    return grad_current, *(torch.empty_like(x) for x in (v_threshold, decay_forward, decay_backward, reset))
