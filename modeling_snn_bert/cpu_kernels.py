"""The compiled kernels for the CPU: currents to spikes in one pass over memory, forward and backward.

The library comes with the package's wheel, or is built from `csrc/` by `pip install` where a C compiler is at hand.
Code that came from the Hub has none beside it, and takes that of an installed package whose version fits. Without any
`available()` is False and the neurons run on torch's own operations, with the same results. `SNN_BERT_CPU_KERNELS=0` in
the environment does the same by hand.

The library holds each kernel at several levels of the instruction set and takes the highest that the processor has.
`SNN_BERT_CPU_LEVEL=plain`, `avx2`, `avx512` or `amx` in the environment is the highest that it may take.

The kernels are registered as torch operators, so that `torch.compile` and tools that follow a model through its
operators see them.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FILENAME = "_cpu_kernels.shared"
# The same number stands in csrc/kernels.h; it changes with every structure and signature there.
KERNELS_VERSION = 5
# The package that has them, and the first number of its version, for code that came from the Hub without it.
PACKAGE = "modeling_snn_bert"
MAJOR_VERSION = 0
# The levels of the instruction set, lowest first: csrc/levels.h has them in this order. `avx512` and `amx` differ in
# int8 products only.
CPU_LEVELS = ("plain", "avx2", "avx512", "amx")
LEVEL_VARIABLE = "SNN_BERT_CPU_LEVEL"
SWITCH = "SNN_BERT_CPU_KERNELS"
# At 6 x 384 and 12 x 768: the subjects snn_bert and snn_bert_torch of `benchmarks/run.py training --sections step_384
# step_768`, event_int8 and torch_int8 of `benchmarks/run.py inference --sections 6x384 12x768`.
WITHOUT_KERNELS = (
    "Without them a training step takes twice as long and event-driven inference five times as long. To have them, "
    "install a wheel of snn-bert for this platform, or its sources where there is a C compiler; "
    f"{SWITCH}=0 in the environment says that this is meant"
)
SURROGATE_INDEX = {"atan": 0, "sigmoid": 1, "triangle": 2, "rectangle": 3}
# A kernel reads the memory of these types; a subclass may keep its numbers in another form, or nowhere.
PLAIN_TYPES = (torch.Tensor, nn.Parameter)

# What each operator from currents to spikes takes and gives, whatever device it is for.
_NEURON = (
    "Tensor current, Tensor? mask, Tensor v_threshold, Tensor decay_forward, Tensor decay_backward, Tensor reset, "
    "bool normalize, int reset_iterations, bool ternary"
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
FORWARD_SCHEMA = f"({_NEURON}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor grad_spikes, {_NEURON}, str surrogate, float alpha) -> {_GRADIENTS}"


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
    kernels, log = None, logger.info
    if os.environ.get(SWITCH) == "0":
        words = f"SNN-BERT's CPU kernels are switched off by {SWITCH}=0"
    elif (found := _find()) is None:
        words = "SNN-BERT's CPU kernels are not installed: its neurons run on torch's operations, more slowly"
    else:
        try:
            kernels = _open(*found)
        except (OSError, AttributeError, ImportError) as error:
            log = logger.warning
            words = f"SNN-BERT's CPU kernels cannot be loaded and torch's operations run instead: {error}"
        else:
            kernels.cap_cpu_level(CPU_LEVELS.index(allowed))
            words = f"SNN-BERT runs on the CPU kernels in {found[0]}"
    log(words)
    return kernels, words


def _find() -> tuple[Path, str | None] | None:
    """The library's file: the one beside this module, or else the installed package's, with the package's version.

    The package is not imported for that, which would make its classes the ones that the Auto classes load.
    """
    beside = Path(__file__).parent / FILENAME
    if beside.exists():
        return beside, None
    try:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is not None and spec.origin is not None and not Path(spec.origin).with_name(FILENAME).exists():
            # Started in a clone, Python finds the sources there before the package that was installed from them.
            sources = Path(spec.origin).resolve().parents[1]
            others = [folder for folder in sys.path if Path(folder).resolve() != sources]
            spec = importlib.machinery.PathFinder.find_spec(PACKAGE, others)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    module = Path(spec.origin)
    installed = module.with_name(FILENAME)
    if not installed.exists():
        return None
    version = re.search(r'^__version__ = "([^"]+)"$', module.read_text(encoding="utf-8"), re.MULTILINE)
    return installed, "unknown" if version is None else version[1]


def _open(path: Path, package_version: str | None) -> ctypes.CDLL:
    """The kernels in `path`, once it is sure that this code can call them.

    Raises:
        OSError, AttributeError: if there are none in the file.
        ImportError: if they are of another version.
    """
    if package_version is not None and package_version.split(".")[0] != str(MAJOR_VERSION):
        raise ImportError(f"{path} is of snn-bert {package_version}, and this code is of snn-bert {MAJOR_VERSION}")
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        # The library takes the OpenMP runtime that torch has loaded, which not every build of torch shows to others.
        if "undefined symbol" not in str(error):
            raise
        _show_openmp()
        kernels = ctypes.CDLL(str(path))
    version = kernels.kernels_version()
    if version != KERNELS_VERSION:
        raise ImportError(
            f"{path} has the version {version} in place of {KERNELS_VERSION}: install the package that this code is of"
        )
    return kernels


def _show_openmp() -> None:
    """Let libraries that are loaded from now on find the OpenMP runtime in this process, torch's before any other.

    Without one in the process the system's is loaded.
    """
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="surrogateescape") if maps.exists() else ""
    runtimes = re.findall(r" (/.*/lib(?:gomp|i?omp)[^/]*)$", text, re.MULTILINE)
    folder = str(Path(torch.__file__).parent)
    runtime = min(runtimes, key=lambda path: not path.startswith(folder), default="libgomp.so.1")
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)


def _check_level(name: str, level: str) -> None:
    if level not in CPU_LEVELS:
        raise ValueError(f"{name} must be one of {list(CPU_LEVELS)}, got {level!r}")


# Loaded after torch, whose threads the kernels then share.
_LIBRARY, _WHY = _load()


def available() -> bool:
    """Whether there are compiled kernels."""
    return _LIBRARY is not None


@functools.cache
def warn_if_missing() -> None:
    """Log a warning if there are no kernels and nobody has switched them off; at the first call and never again."""
    if not available() and os.environ.get(SWITCH) != "0":
        logger.warning(f"{_WHY}. {WITHOUT_KERNELS}")


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


def levels_here() -> tuple[str, ...]:
    """The levels that `highest_cpu_level` allows, lowest first; empty where there are no kernels."""
    highest = highest_cpu_level()
    return () if highest is None else CPU_LEVELS[: CPU_LEVELS.index(highest) + 1]


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


def checked_pointer(name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of `x`, once it is sure that a kernel may read it as what it expects.

    Raises:
        TypeError: if `x` is no plain tensor.
        ValueError: if it is not contiguous memory of the CPU, or of another dtype or shape.
    """
    if type(x) not in PLAIN_TYPES:
        raise TypeError(f"`{name}` must be a plain tensor, got {type(x).__name__}")
    if x.is_cpu and x.dtype == dtype and x.shape == shape and x.is_contiguous():
        address = x.data_ptr()
        # A storage that was freed by `resize_(0)` has none.
        if address or not x.numel():
            return address
    is_contiguous = x.layout == torch.strided and x.is_contiguous()
    raise ValueError(
        f"`{name}` must be a contiguous {dtype} tensor of the shape {list(shape)} in the CPU's memory, got "
        f"{'' if is_contiguous else 'not contiguous '}{x.dtype} {list(x.shape)} on {x.device}"
    )


def check_groups(channels: int, groups: int) -> None:
    """The kernels pack group by group, in whole bytes."""
    if groups < 1 or channels < groups or channels % groups or channels // groups % 8:
        raise ValueError(f"the channels of a group must be a multiple of 8, got {channels} channels in {groups} groups")


def _run(name: str, **values) -> None:
    """Call a kernel on a `struct neuron` of numbers and tensors, which `_inputs` has checked."""
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
    normalize: bool,
    reset_iterations: int,
    ternary: bool,
    *,
    grad_spikes: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The part of `struct neuron` that both kernels read. The values own the memory that the kernels see."""
    if current.dim() != 3:
        raise ValueError(f"`current` must be [batch, seq_len, channels], got {list(current.shape)}")
    batch, tokens, channels = current.shape
    groups = decay_forward.numel()
    check_groups(channels, groups)
    per_group = {"decay_forward": decay_forward, "decay_backward": decay_backward, "reset": reset}
    tensors = {"current": current, "v_threshold": v_threshold, **per_group}
    shapes = {"current": current.shape, "v_threshold": (channels,), **dict.fromkeys(per_group, (groups,))}
    if mask is not None:
        tensors["mask"], shapes["mask"] = (mask != 0).to(torch.uint8), (batch, tokens)
    if grad_spikes is not None:
        tensors["grad_spikes"], shapes["grad_spikes"] = grad_spikes, current.shape
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    for name, x in tensors.items():
        checked_pointer(name, x, torch.uint8 if name == "mask" else torch.float32, shapes[name])
    settings = {"normalize": normalize, "reset_iterations": reset_iterations, "ternary": ternary}
    return {"batch": batch, "tokens": tokens, "channels": channels, "groups": groups, **tensors, **settings}


def empty_spikes(current: torch.Tensor, ternary: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the spikes of `current`, and for their packed form: bytes of eight channels, once for each sign."""
    shape = (1 + ternary, *current.shape[:-1], (current.shape[-1] + 7) // 8)
    packed = current.new_empty(shape, dtype=torch.uint8)
    return torch.empty_like(current, memory_format=torch.contiguous_format), packed


def _check_one_device(*tensors: torch.Tensor | None) -> None:
    """One operand on the meta device leads here, and what is returned for the others would be memory of no content."""
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"currents and parameters of a neuron must be on one device, got {sorted(devices)}")


@torch.library.custom_op(f"{NAMESPACE}::bpsn_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def bpsn_forward(current, *neuron):
    """Spikes of a `BPSN`, as floats and packed; arguments as in `FORWARD_SCHEMA`.

    `current` is `[batch, seq_len, channels]`, `mask` `[batch, seq_len]`, `v_threshold` `[channels]`, the decays and
    the reset `[groups]`; all but the mask are float32 on the CPU, and the channels of a group a multiple of 8.
    """
    inputs = _inputs(current, *neuron)
    spikes, packed = empty_spikes(current, inputs["ternary"])
    _run("bpsn_forward", **inputs, spikes=spikes, packed=packed)
    return spikes, packed


@bpsn_forward.register_fake
def fake_bpsn_forward(current, mask, v_threshold, decay_forward, decay_backward, reset, *settings):
    _check_one_device(current, mask, v_threshold, decay_forward, decay_backward, reset)
    return empty_spikes(current, ternary=settings[-1])


@torch.library.custom_op(f"{NAMESPACE}::bpsn_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def bpsn_backward(grad_spikes, current, *others):
    """Gradients to the current, the threshold, both decays and the reset; arguments as in `BACKWARD_SCHEMA`."""
    *neuron, surrogate, alpha = others
    inputs = _inputs(current, *neuron, grad_spikes=grad_spikes)
    batch, channels, groups = (inputs[name] for name in ("batch", "channels", "groups"))
    outputs = {
        "grad_current": torch.empty(current.shape),
        "grad_v_threshold": torch.empty(batch, channels),
        "grad_decay_forward": torch.empty(batch, groups),
        "grad_decay_backward": torch.empty(batch, groups),
        "grad_reset": torch.empty(batch, groups),
    }
    _run("bpsn_backward", **inputs, **outputs, surrogate=SURROGATE_INDEX[surrogate], alpha=alpha)
    grad_current, *of_parameters = outputs.values()
    return grad_current, *(grad.sum(0) for grad in of_parameters)


@bpsn_backward.register_fake
def fake_bpsn_backward(grad_spikes, current, mask, v_threshold, decay_forward, decay_backward, reset, *settings):
    _check_one_device(grad_spikes, current, mask, v_threshold, decay_forward, decay_backward, reset)
    grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
    return grad_current, *(torch.empty_like(x) for x in (v_threshold, decay_forward, decay_backward, reset))
