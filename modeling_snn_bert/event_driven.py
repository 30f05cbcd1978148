"""Inference whose cost follows the firing rate: a Linear on spikes is a sum over the inputs that fire.

`event_driven(model)` turns an SNN-BERT in evaluation mode into that form and `dense(model)` turns it back. Modules,
parameters and the checkpoint that `save_pretrained` writes stay as they are: each encoder layer and each of its Linears
holds a `runner` that it asks in its forward pass, and `dense` takes it away. With the compiled kernels a whole layer
runs from spikes to spikes: attention and neurons take and give single bits, and a projection's currents meet their
neuron in the cache. Without them the products run on `torch.nn.functional.embedding_bag` and its int8 relative.

A processor with AMX multiplies whole tiles of spikes and int8 weights faster than it adds up the weights of those that
fire, but at the lowest rates. There int8 products are dense, and give the very same sums.

Weights are rounded to `weight_dtype`; spikes are exact in each. int8 is symmetric with a scale per output channel, and
its sums are exact integers. Where a product meets more spikes than the measured rate at which a dense product becomes
the faster one, the dense one runs, with the same rounded weights.
"""

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .cpu_kernels import PLAIN_TYPES, available, cpu_level, warn_if_missing
from .event_kernels import (
    MAX_HEAD_SIZE,
    MAX_INPUTS,
    TILES,
    WEIGHT_TYPES,
    BlockedWeights,
    NeuronParameters,
    PackedSpikes,
    SpikeLists,
    attention_spikes,
    event_linear,
    fits_blocks,
    linear_neuron_spikes,
    list_float_spikes,
    neuron_spikes,
    not_spikes,
    tiles_available,
)
from .event_weights import MadeOf, own_memory, quantized_table, round_weights, rounded_floats
from .layer_places import LINEARS, PLACES
from .packed_spikes import SpikingLinear, affine, calls_run_forward_alone, pack, unpack
from .spiking_neurons import BPSN

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# Where a layer's neurons and Linears stand.
NEURON_PATHS = [place.neuron.split(".") for place in PLACES]
LINEAR_PATHS = [name.split(".") for name in LINEARS]
# How the crossover to the dense product is measured: on this many tokens, from two rates, as the best of some repeats.
CROSSOVER_TOKENS = 512
CROSSOVER_RATES = (0.05, 0.3)
CROSSOVER_REPEATS = 7
# The kernels stand for the `forward` of these classes.
FORWARDS: dict[type, Callable] = {kind: kind.forward for kind in (SpikingLinear, BPSN, nn.LayerNorm, nn.Dropout)}
# The attention of these is what the kernels compute.
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


class RunsWhole:
    """What an encoder layer inherits so that it can be run whole: `event_driven` sets the runner that it asks."""

    runner: "EventDrivenLayer | None" = None


def part_of_layer(kind: type[nn.Module]) -> type[nn.Module]:
    """Mark a class of modules inside an encoder layer, as a decorator: the kernels stand for its `forward`."""
    FORWARDS[kind] = kind.forward
    return kind


def event_driven(model: Model, weight_dtype: str = "float32", *, dense_above: float | None = None) -> Model:
    """Turn `model` into its event-driven form, in place.

    Args:
        model: an SNN-BERT with any head, or a module that holds one, on the CPU and in evaluation mode.
        weight_dtype: what the weights of the encoder's products are rounded to: `"float32"` (not at all),
            `"bfloat16"` or `"int8"` (symmetric, a scale per output channel). The parameters keep their values.
        dense_above: the firing rate in [0, 1] above which a product runs dense. `None` measures for each size of
            product the rate at which the dense one is as fast; that takes about a second and is done once a process.

    Returns:
        `model` itself. Its results have no gradient: a backward pass through a product raises a `RuntimeError`.

    Raises:
        TypeError: if there is no encoder layer of an SNN-BERT in `model`, or its weights are no plain tensors.
        ValueError: if an argument is outside its range, the model is in training mode, or it is not on the CPU.
    """
    _check_weight_dtype(weight_dtype)
    if dense_above is not None and not 0 <= dense_above <= 1:
        raise ValueError(f"`dense_above` must lie in [0, 1] or be None, got {dense_above}")
    layers = _layers(model)
    if model.training or any(layer.training for layer in layers):
        raise ValueError("`model` is in training mode and event-driven products have no gradient: call `model.eval()`")
    for layer in layers:
        for name, parameter in layer.named_parameters():
            _check_plain(name, parameter)
            if parameter.device.type != "cpu":
                raise ValueError(
                    f"event-driven inference runs on the CPU, but `model` is on {parameter.device.type!r}: move it to "
                    "the CPU, and offload weights after that"
                )
        _products(layer)
    warn_if_missing()
    dense(model)
    for layer in layers:
        for parameter in layer.parameters():
            own_memory(parameter)
        layer.runner = EventDrivenLayer()
        for place in PLACES:
            shared = SharedLists(layer.attention.self.config.spike_type == "ternary")
            for name in place.linears:
                _linear(layer, name).runner = EventDrivenProduct(weight_dtype, dense_above, shared)
    path = "compiled kernels" if available() else "torch's embedding_bag (no compiled kernels)"
    on_tiles = " on AMX" if weight_dtype == "int8" and tiles_available() else ""
    rates = dense_rates(model)
    logger.info(f"event-driven inference on {path}, {weight_dtype} weights, dense{on_tiles} above the rates {rates}")
    return model


def dense(model: Model) -> Model:
    """Turn an event-driven `model` back into the dense one that it was, in place, and return it.

    A model that is dense already is left as it is.
    """
    for module in model.modules():
        if isinstance(module, SpikingLinear | RunsWhole) and module.runner is not None:
            del module.runner
    return model


@torch.no_grad()
def round_products(model: Model, weight_dtype: str) -> Model:
    """Replace the weights of the encoder's products by what `weight_dtype` makes of them, in place.

    A neuron fires or not by however little its potential misses the threshold, so the smallest rounding moves some
    spikes, which move others in the layers behind. A model that is rounded before it is evaluated has that behind it:
    dense in float32 and event-driven with `weight_dtype` weights it then has the same weights. Parameters keep their
    dtype; rounding a second time changes nothing (for int8, nothing beyond the last bit).

    Args:
        model: an SNN-BERT with any head, or a module that holds one, dense or event-driven, on any device.
        weight_dtype: `"float32"` (which does nothing), `"bfloat16"` or `"int8"`, as for `event_driven`.

    Returns:
        `model` itself.

    Raises:
        TypeError: if there is no encoder layer of an SNN-BERT in `model`.
        ValueError: if `weight_dtype` is none of these.
    """
    _check_weight_dtype(weight_dtype)
    for layer in _layers(model):
        for linear in _products(layer):
            linear.weight.copy_(rounded_floats(linear.weight, weight_dtype))
    return model


def is_event_driven(model: nn.Module) -> bool:
    """Whether `event_driven` has been called on `model`, and not `dense` since."""
    return any(isinstance(module, EventDrivenLinear) for module in model.modules())


def dense_rates(model: nn.Module) -> dict[str, float]:
    """The firing rate above which a product runs dense, for each size `inputs x outputs` in an event-driven model."""
    return {
        f"{module.in_features}x{module.out_features}": round(module.runner.dense_rate(module), 3)
        for module in model.modules()
        if isinstance(module, EventDrivenLinear)
    }


def _layers(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, RunsWhole)]
    if not layers:
        raise TypeError(
            f"`model` must be an SNN-BERT, whose products take spikes; there is none in {type(model).__name__}"
        )
    return layers


def _check_weight_dtype(weight_dtype: str) -> None:
    if weight_dtype not in WEIGHT_TYPES:
        raise ValueError(f"`weight_dtype` must be one of {list(WEIGHT_TYPES)}, got {weight_dtype!r}")


def _check_plain(name: str, x: torch.Tensor) -> None:
    if type(x) not in PLAIN_TYPES:
        raise TypeError(
            f"event-driven inference needs plain tensors, but {name} is {type(x).__name__}: load the model without "
            "quantization, then `to_event_driven('int8')` rounds its weights itself"
        )


def _linear(layer: nn.Module, name: str) -> SpikingLinear:
    linear = layer.get_submodule(name)
    # A Linear that an adapter has wrapped stands one level deeper.
    linear = getattr(linear, "base_layer", linear)
    if not isinstance(linear, SpikingLinear) or linear.in_features > MAX_INPUTS:
        raise TypeError(f"{name} must be a SpikingLinear of at most {MAX_INPUTS} inputs, got {type(linear).__name__}")
    return linear


def _products(layer: nn.Module) -> list[SpikingLinear]:
    return [_linear(layer, name) for name in LINEARS]


class SharedLists:
    """The lists of the last input, for all products that take it. Copies and pickles start empty."""

    def __init__(self, ternary: bool) -> None:
        self.ternary = ternary
        self.last: tuple[weakref.ref, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def of(self, spikes: torch.Tensor) -> "SpikeLists | Bags":
        """Lists of `spikes`, `[..., inputs]`, one per row; made once for one tensor object."""
        last = self.last
        if last is not None and last[0]() is spikes:
            return last[1]
        rows = spikes.detach().flatten(0, -2)
        lists = list_float_spikes(rows, self.ternary) if available() else Bags(rows, self.ternary)
        if spikes.is_inference() or not spikes.requires_grad:
            self.last = weakref.ref(spikes, self._forget), lists
        return lists

    def _forget(self, reference: weakref.ref) -> None:
        if self.last is not None and self.last[0] is reference:
            self.last = None


class Bags:
    """The lists of `[rows, inputs]` spikes as `embedding_bag` takes them, made when they are first needed."""

    def __init__(self, spikes: torch.Tensor, ternary: bool) -> None:
        magnitudes = spikes.abs() if ternary else spikes
        active = int(magnitudes.count_nonzero())
        if active != int((magnitudes == 1).sum()):
            raise not_spikes(ternary)
        self._spikes, self._ternary = spikes, ternary
        self.firing_rate = active / max(spikes.numel(), 1)

    @functools.cached_property
    def listed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Indices of the active inputs, row after row; where each row starts among them; their signs if ternary."""
        rows, inputs = self._spikes.shape
        flat = self._spikes.reshape(-1)
        active = flat.bool().nonzero().squeeze(1)
        offsets = torch.searchsorted(active, torch.arange(rows) * inputs)
        return active.remainder(inputs), offsets, flat[active].float() if self._ternary else None


class EventDrivenProduct:
    """The runner of a `SpikingLinear`: it adds up the weights of those of its inputs that fire.

    A call takes the module and spikes `[..., inputs]` and returns `[..., outputs]` in their dtype.

    Args:
        weight_dtype: `"float32"`, `"bfloat16"` or `"int8"`.
        dense_above: the firing rate above which the product runs dense, or `None` to measure it.
        shared: the lists of the input, shared by all products of the same spikes.

    Raises:
        ValueError: if the input is not made of spikes.
        TypeError: if the weights are no plain tensor.
        RuntimeError: in training mode, or away from the CPU.
    """

    def __init__(self, weight_dtype: str, dense_above: float | None, shared: SharedLists) -> None:
        self.weight_dtype = weight_dtype
        self.dense_above = dense_above
        self.shared = shared
        self._measured: float | None = None
        self._layouts = MadeOf()

    def __reduce__(self) -> tuple:
        # A copy knows the settings, and nothing of what has been measured or computed.
        return EventDrivenProduct, (self.weight_dtype, self.dense_above, self.shared)

    def __str__(self) -> str:
        above = "measured" if self.dense_above is None else self.dense_above
        return f"event-driven, weight_dtype={self.weight_dtype!r}, dense_above={above}"

    def __call__(self, linear: SpikingLinear, spikes: torch.Tensor) -> torch.Tensor:
        if linear.training:
            raise RuntimeError("event-driven inference has no training mode: call `dense(model)` before training")
        weight = linear.weight
        _check_plain("a weight", weight)
        if spikes.device.type != "cpu" or weight.device.type != "cpu":
            raise RuntimeError("event-driven inference runs on the CPU: call `dense(model)` before moving the model")
        if spikes.shape[-1] != linear.in_features:
            raise ValueError(f"the input must have {linear.in_features} channels, got {list(spikes.shape)}")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # Lists have no fixed length, so a graph holds the dense product of the same weights.
            return nn.functional.linear(spikes, rounded_floats(weight, self.weight_dtype).to(spikes.dtype), linear.bias)
        trained = (spikes, weight, linear.bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained):
            return _WithoutGradient.apply(linear, *trained).to(spikes.dtype)
        return self.run(linear, spikes).to(spikes.dtype)

    def dense_rate(self, linear: nn.Linear) -> float:
        """The firing rate above which the product of `linear` runs dense."""
        if self.dense_above is not None:
            return self.dense_above
        if self._measured is None:
            machine = cpu_level() if available() else None, torch.get_num_threads()
            self._measured = crossover_rate(linear.in_features, linear.out_features, self.weight_dtype, *machine)
        return self._measured

    def _layout(self, name: str, linear: nn.Linear, make: Callable[[torch.Tensor, torch.Tensor | None], Any]) -> Any:
        def made() -> Any:
            return make(*round_weights(linear.weight, self.weight_dtype))

        return self._layouts.get(name, [linear.weight, linear.bias], made)

    def blocked(self, linear: nn.Linear) -> BlockedWeights:
        """The weights for the compiled kernels."""
        return self._layout(
            "blocked", linear, lambda w, scale: BlockedWeights(w, scale, linear.bias, self.weight_dtype)
        )

    def tiled(self, linear: nn.Linear) -> BlockedWeights | None:
        """The int8 weights for dense products on AMX, where there is that."""
        if self.weight_dtype != "int8" or not available() or not tiles_available():
            return None
        return self._layout("tiled", linear, lambda w, scale: BlockedWeights(w, scale, linear.bias, TILES))

    def runs_by_events(self, linear: nn.Linear, spikes: "SpikeLists | PackedSpikes | Bags") -> bool:
        """Whether that is the faster product at the firing rate of `spikes`."""
        rate = self.dense_rate(linear)
        return rate >= 1 or (rate > 0 and spikes.firing_rate <= rate)

    def kernel_operands(
        self, linear: nn.Linear, spikes: PackedSpikes
    ) -> tuple[SpikeLists | PackedSpikes, BlockedWeights | None]:
        """Spikes and weights as the faster kernel takes them; no weights where torch's dense product is faster."""
        if self.runs_by_events(linear, spikes):
            return spikes.lists, self.blocked(linear)
        return spikes, self.tiled(linear)

    def run_packed(self, linear: nn.Linear, spikes: PackedSpikes, addend: torch.Tensor | None = None) -> torch.Tensor:
        """`[rows, outputs]` in float32 from packed spikes, plus `addend` of that shape, by the faster product."""
        inputs, weights = self.kernel_operands(linear, spikes)
        if weights is not None:
            return event_linear(inputs, weights, addend)
        result = self.run_dense(linear, unpack(spikes.packed, linear.in_features, torch.float32).flatten(0, -2))
        return result if addend is None else result.add_(addend)

    def run(self, linear: nn.Linear, spikes: torch.Tensor) -> torch.Tensor:
        """`[..., outputs]` in float32 from `spikes`, `[..., inputs]`, by whichever product is faster at their rate."""
        lists, rows = self.shared.of(spikes), spikes.flatten(0, -2)
        by_events = self.runs_by_events(linear, lists)
        if isinstance(lists, Bags):
            result = self._run_bags(linear, lists) if by_events else self.run_dense(linear, rows)
        else:
            weights = self.blocked(linear) if by_events else self.tiled(linear)
            result = self.run_dense(linear, rows) if weights is None else event_linear(lists, weights)
        return result.unflatten(0, spikes.shape[:-1])

    def run_dense(self, linear: nn.Linear, spikes: torch.Tensor) -> torch.Tensor:
        """The dense product of `[rows, inputs]` spikes with the rounded weights.

        With int8 weights it is exact before the scale. bfloat16 weights are widened where the sums by events are in
        float32 too; a bfloat16 product, whose result is rounded, would move spikes. `embedding_bag` rounds its sums as
        well, so beside it the bfloat16 product is taken.
        """
        bias = linear.bias
        if self.weight_dtype == "float32" or (self.weight_dtype == "bfloat16" and available()):
            # float32 weights are the parameter itself, of which no copy is kept.
            is_float32 = self.weight_dtype == "float32"
            weight = linear.weight if is_float32 else self._layout("dense", linear, lambda w, _: w.float())
            return nn.functional.linear(spikes.float(), weight.float(), None if bias is None else bias.float())
        if self.weight_dtype == "bfloat16":
            weight = self._layout("dense", linear, lambda w, _: w)
            result = nn.functional.linear(spikes.bfloat16(), weight).float()
        else:
            weight, scale = self._layout("dense", linear, lambda w, scale: (w.t(), scale))
            result = torch._int_mm(spikes.to(torch.int8), weight).float().mul_(scale)
        return result if bias is None else result.add_(bias)

    def _run_bags(self, linear: nn.Linear, bags: Bags) -> torch.Tensor:
        indices, offsets, signs = bags.listed
        if self.weight_dtype == "int8":
            table, scale = self._layout("table", linear, lambda w, scale: (quantized_table(w), scale))
            result = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                table, indices, offsets, mode=0, per_sample_weights=signs
            )
            result = result.mul_(scale)
        else:
            table = self._layout("table", linear, lambda w, _: w.t().clone(memory_format=torch.contiguous_format))
            signs = None if signs is None else signs.to(table.dtype)
            result = nn.functional.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=signs).float()
        return result if linear.bias is None else result + linear.bias


class _WithoutGradient(torch.autograd.Function):
    """The event-driven product, with an error in place of a gradient that would silently be missing."""

    @staticmethod
    def forward(ctx, linear: SpikingLinear, spikes: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
        return linear.runner.run(linear, spikes)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("event-driven inference has no gradients: call `dense(model)` before training")


class _HasRunner(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, SpikingLinear) and instance.runner is not None


class EventDrivenLinear(SpikingLinear, metaclass=_HasRunner):
    """For `isinstance` only: a Linear of an event-driven model is one."""


class EventDrivenLayer:
    """The runner of an encoder layer: on the compiled kernels it runs from spikes to spikes.

    The layer goes through its modules one by one, as the dense one does, wherever someone looks at what happens in
    between (spikes or attentions are asked for, a hook is registered, a `forward` replaced, a gradient may be wanted),
    where a module is not what the kernels compute (another neuron, an adapter, attention without softmax, another
    dtype), or without kernels.

    The kernel for attention adds no position bias. In a model that has one torch computes the attention, on spikes as
    floats, between the kernels of the steps in front of it and behind it.
    """

    def __init__(self) -> None:
        # Of each neuron, as the kernels take them.
        self._parameters: dict[str, MadeOf] = {}

    def __reduce__(self) -> tuple:
        return EventDrivenLayer, ()

    def takes(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        *,
        output_attentions: bool | None = True,
        output_spikes: bool | None = True,
        is_causal: bool | None = None,
        **kwargs,
    ) -> bool:
        """Whether the layer can run whole. What the call does not decline by name may be asked for by a hook."""
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or layer.training
            or is_causal
            or not _is_on_cpu(hidden_states)
            or hidden_states.dtype != torch.float32
            or hidden_states.shape[1] >= MAX_INPUTS
            or not available()
            or not _is_plain(layer, bool(output_attentions or output_spikes))
        ):
            return False
        attention = layer.attention.self
        config = attention.config
        if config.attention_type != "softmax" or config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            return False
        if attention.head_size > MAX_HEAD_SIZE:
            return False
        if config.relative_attention_num_buckets:
            # It holds bias and mask.
            if attention_mask is None or not _is_on_cpu(attention_mask) or attention_mask.dtype != torch.float32:
                return False
        elif attention_mask is not None and token_mask is None:
            return False
        for neuron in _modules_at(layer, NEURON_PATHS):
            if neuron.implementation not in ("auto", "chunked"):
                return False
            if not _is_on_cpu(neuron.v_threshold) or neuron.v_threshold.dtype != torch.float32:
                return False
            if neuron.num_channels // neuron.num_groups % 8:
                return False
        context = layer.attention.output.neuron
        if context.num_groups * attention.head_size != context.num_channels:
            return False
        linears = _modules_at(layer, LINEAR_PATHS)
        return all(linear.runner is not None and _is_on_cpu(linear.weight) for linear in linears)

    def __call__(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        mask = None if token_mask is None else (token_mask != 0).to(torch.uint8).contiguous()
        bias = attention_mask if layer.attention.self.config.relative_attention_num_buckets else None
        states = hidden_states.contiguous()
        attention, after = layer.attention.self, layer.attention.output
        neuron = {
            place.neuron: self._neuron(place.neuron, module)
            for place, module in zip(PLACES, _modules_at(layer, NEURON_PATHS), strict=True)
        }

        spikes = neuron_spikes(states, mask, neuron["attention.self.neuron"])
        shared = PackedSpikes(spikes)
        query, key, value = (
            self._spikes_behind(getattr(attention, name), shared, mask, neuron[f"attention.self.{name}_neuron"])
            for name in ("query", "key", "value")
        )
        gain, offset = attention.query_gain.contiguous(), attention.query_offset.contiguous()
        context = neuron["attention.output.neuron"]
        if bias is None:
            spikes = attention_spikes(query, key, value, gain, offset, attention.scaling, mask, context)
        else:
            spikes = neuron_spikes(_biased_attention(attention, query, key, value, bias), mask, context)
        states = after.LayerNorm(_add_product(after.dense, spikes, states))

        spikes = neuron_spikes(states, mask, neuron["intermediate.neuron"])
        spikes = self._spikes_behind(layer.intermediate.dense, PackedSpikes(spikes), mask, neuron["output.neuron"])
        return layer.output.LayerNorm(_add_product(layer.output.dense, spikes, states))

    def _neuron(self, name: str, neuron: BPSN) -> NeuronParameters:
        """The parameters of `neuron` as the kernels take them."""

        made = self._parameters.setdefault(name, MadeOf())
        # The same as `parameters()`, which takes longer than a small layer's products.
        tensors = list(neuron._parameters.values())
        return made.get("", tensors, lambda: NeuronParameters(neuron.learned.values(torch.float32), neuron.settings))

    def _spikes_behind(
        self,
        linear: SpikingLinear,
        spikes: PackedSpikes,
        mask: torch.Tensor | None,
        neuron: NeuronParameters,
    ) -> torch.Tensor:
        """Packed spikes of `neuron` behind `linear`."""
        batch, tokens = spikes.packed.shape[1:3]
        inputs, weights = linear.runner.kernel_operands(linear, spikes)
        if weights is not None and fits_blocks(weights.layout, linear.out_features, neuron.groups):
            return linear_neuron_spikes(inputs, weights, batch, mask, neuron)
        current = linear.runner.run_packed(linear, spikes)
        return neuron_spikes(current.view(batch, tokens, -1), mask, neuron)


def _add_product(linear: SpikingLinear, spikes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`states` plus the product of packed spikes."""
    return linear.runner.run_packed(linear, PackedSpikes(spikes), states.flatten(0, -2)).view_as(states)


def _is_on_cpu(x: torch.Tensor) -> bool:
    return type(x) in PLAIN_TYPES and x.is_cpu


def _is_plain(layer: nn.Module, asked: bool) -> bool:
    """Whether each module inside `layer` does what its class does, nobody looks at it, and it is not in training mode.

    transformers leaves its recording hooks in place. They do nothing unless `asked` for spikes or attentions.
    """
    if not calls_run_forward_alone():
        return False
    # By hand, since `modules()` takes longer than a small layer's products.
    inside = list(layer._modules.values())
    for module in inside:
        if module is None or FORWARDS.get(type(module)) is not type(module).forward:
            return False
        if "forward" in module.__dict__ or module.training or module._forward_pre_hooks:
            return False
        for hook in module._forward_hooks.values():
            if asked or getattr(hook, "__module__", None) != OutputRecorder.__module__:
                return False
        inside += module._modules.values()
    return True


def _modules_at(layer: Any, paths: Sequence[list[str]]) -> list[Any]:
    """The modules of `layer` at `paths`. By hand, since `get_submodule` takes longer than a small layer's products."""
    return [functools.reduce(lambda module, name: module._modules[name], path, layer) for path in paths]


def _biased_attention(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The context `[batch, seq_len, channels]` of packed spikes, with `bias` added to the scores."""
    query, key, value = (unpack(x, 8 * x.shape[-1], torch.float32) for x in (query, key, value))
    query = affine(query, attention.query_gain, attention.query_offset)
    q, k, v = (x.unflatten(-1, (-1, attention.head_size)).transpose(1, 2) for x in (query, key, value))
    context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scaling)
    return context.transpose(1, 2).flatten(2).contiguous()


@functools.cache
def crossover_rate(inputs: int, outputs: int, weight_dtype: str, level: str | None, threads: int) -> float:
    """The firing rate in [0, 1] at which the event-driven and the dense product of this size take the same time.

    Timed on random weights and spikes, once for a level of the kernels (`None` without them) and a number of threads,
    which are those of the process. The time of the event-driven product is a line over the rate. With kernels it is
    timed as a whole layer runs: by events the packed spikes are listed first, and for a dense product they are widened,
    which tiles do by themselves.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        # Packed spikes come in whole bytes.
        inputs += -inputs % 8
        linear = SpikingLinear(inputs, outputs)
        by_events, densely = (EventDrivenProduct(weight_dtype, above, SharedLists(False)) for above in (1.0, 0.0))
        batches = [(torch.rand(CROSSOVER_TOKENS, inputs) < rate).float() for rate in CROSSOVER_RATES]

    def run(product: EventDrivenProduct, spikes: torch.Tensor) -> None:
        if level is None:
            # A view is a new tensor object, so the lists are made again.
            product.run(linear, spikes.view_as(spikes))
        else:
            product.run_packed(linear, PackedSpikes(spikes))

    if level is not None:
        batches = [pack(spikes, False)[:, None] for spikes in batches]
    runs = (by_events, batches[0]), (by_events, batches[1]), (densely, batches[0])
    best = [float("inf")] * len(runs)
    with torch.no_grad():
        # In turns, so that whatever else runs on the machine for a while hits all of them.
        for repeat in range(1 + CROSSOVER_REPEATS):
            for k, (product, spikes) in enumerate(runs):
                started = time.perf_counter()
                run(product, spikes)
                if repeat:
                    best[k] = min(best[k], time.perf_counter() - started)
    low, high, dense_seconds = best
    slope = max(high - low, 1e-9) / (CROSSOVER_RATES[1] - CROSSOVER_RATES[0])
    return min(max(CROSSOVER_RATES[0] + (dense_seconds - low) / slope, 0.0), 1.0)


__all__ = ["EventDrivenLinear", "dense", "event_driven", "is_event_driven", "round_products"]
