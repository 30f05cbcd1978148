"""Inference whose cost follows the firing rate: a Linear on spikes is a sum over the inputs that fire.

`event_driven(model)` turns an SNN-BERT in evaluation mode into that form and `dense(model)` turns it back. Parameters,
their names and the checkpoint that `save_pretrained` writes stay as they are; only the way in which the encoder's
products are computed changes. With the compiled kernels a whole layer runs from spikes to spikes: attention and neurons
take and give single bits, and a projection's currents meet their neuron in the cache. Without them the products run on
`torch.nn.functional.embedding_bag` and its int8 relative.

A processor with AMX multiplies whole tiles of spikes and int8 weights faster than it adds up the weights of those that
fire, but at the lowest rates. There int8 products are dense, and give the very same sums.

Weights are rounded to `weight_dtype`; spikes are exact in each. int8 is symmetric with a scale per output channel, and
its sums are exact integers. Where a product meets more spikes than the measured rate at which a dense product becomes
the faster one, the dense one runs, with the same rounded weights.
"""

import functools
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import nn
from transformers.utils import logging, output_capturing

from .cpu_kernels import available, warn_if_missing
from .event_kernels import (
    MAX_HEAD_SIZE,
    MAX_INPUTS,
    WEIGHT_TYPES,
    BlockedWeights,
    NeuronParameters,
    PackedSpikes,
    SpikeLists,
    attention_spikes,
    block_weights,
    event_linear,
    fits_blocks,
    linear_neuron_spikes,
    list_float_spikes,
    neuron_spikes,
    not_spikes,
    tile_weights,
    tiles_available,
)
from .modeling_snn_bert import SNNBertLayer
from .packed_spikes import pack, unpack
from .spiking_neurons import BPSN

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# The neurons of a layer by name, each with a Linear beside it.
Parts: TypeAlias = tuple[tuple[str, nn.Module, nn.Module | None], ...]

# The Linears of an encoder layer, by the place of their shared input.
PRODUCTS = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)
# How the crossover to the dense product is measured: on this many tokens, from two rates, as the best of some repeats.
CROSSOVER_TOKENS = 512
CROSSOVER_RATES = (0.05, 0.3)
CROSSOVER_REPEATS = 7


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
        TypeError: if there is no encoder layer of an SNN-BERT in `model`.
        ValueError: if an argument is outside its range, the model is in training mode, or it is not on the CPU.
    """
    _check_weight_dtype(weight_dtype)
    if dense_above is not None and not 0 <= dense_above <= 1:
        raise ValueError(f"`dense_above` must lie in [0, 1] or be None, got {dense_above}")
    layers = _layers(model)
    if model.training or any(layer.training for layer in layers):
        raise ValueError("`model` is in training mode and event-driven products have no gradient: call `model.eval()`")
    devices = {parameter.device.type for layer in layers for parameter in layer.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"event-driven inference runs on the CPU, but `model` is on {sorted(devices)}")
    warn_if_missing()
    dense(model)
    on_kernels = available()
    for layer in layers:
        ternary = layer.attention.self.config.spike_type == "ternary"
        for names in PRODUCTS:
            shared = SharedLists(ternary, on_kernels)
            for name in names:
                linear = _linear(layer, name)
                shape = (linear.in_features, linear.out_features)
                rate = crossover_rate(*shape, weight_dtype, on_kernels) if dense_above is None else dense_above
                state = EventDrivenProduct(weight_dtype, rate, shared, type(linear))
                linear.__class__ = EventDrivenLinear
                cast(EventDrivenLinear, linear).product = state
        state_of_layer = LayerState(type(layer))
        layer.__class__ = EventDrivenLayer
        cast(EventDrivenLayer, layer).event_driven = state_of_layer
    path = "compiled kernels" if on_kernels else "torch's embedding_bag (no compiled kernels)"
    on_tiles = " on AMX" if on_kernels and weight_dtype == "int8" and tiles_available() else ""
    rates = dense_rates(model)
    logger.info(f"event-driven inference on {path}, {weight_dtype} weights, dense{on_tiles} above the rates {rates}")
    return model


def dense(model: Model) -> Model:
    """Turn an event-driven `model` back into the dense one that it was, in place, and return it.

    A model that is dense already is left as it is.
    """
    for module in model.modules():
        if isinstance(module, EventDrivenLinear):
            dense_class = module.product.dense_class
            del module.product
            module.__class__ = dense_class
        elif isinstance(module, EventDrivenLayer):
            dense_class = module.event_driven.dense_class
            del module.event_driven
            module.__class__ = dense_class
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
        for name in (name for names in PRODUCTS for name in names):
            linear = _linear(layer, name)
            linear.weight.copy_(rounded_floats(linear.weight, weight_dtype))
    return model


def is_event_driven(model: nn.Module) -> bool:
    """Whether `event_driven` has been called on `model`, and not `dense` since."""
    return any(isinstance(module, EventDrivenLinear) for module in model.modules())


def dense_rates(model: nn.Module) -> dict[str, float]:
    """The firing rate above which a product runs dense, for each size `inputs x outputs` in an event-driven model."""
    return {
        f"{module.in_features}x{module.out_features}": round(module.product.dense_above, 3)
        for module in model.modules()
        if isinstance(module, EventDrivenLinear)
    }


def _layers(model: nn.Module) -> list[SNNBertLayer]:
    layers = [module for module in model.modules() if isinstance(module, SNNBertLayer)]
    if not layers:
        raise TypeError(
            f"`model` must be an SNN-BERT, whose products take spikes; there is none in {type(model).__name__}"
        )
    return layers


def _check_weight_dtype(weight_dtype: str) -> None:
    if weight_dtype not in WEIGHT_TYPES:
        raise ValueError(f"`weight_dtype` must be one of {list(WEIGHT_TYPES)}, got {weight_dtype!r}")


def _linear(layer: SNNBertLayer, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    # A Linear that an adapter has wrapped stands one level deeper.
    linear = getattr(linear, "base_layer", linear)
    if not isinstance(linear, nn.Linear) or linear.in_features > MAX_INPUTS:
        raise TypeError(f"{name} must be a Linear of at most {MAX_INPUTS} inputs, got {type(linear).__name__}")
    return linear


def stamp(*tensors: torch.Tensor | None) -> tuple:
    """Changes whenever one of `tensors` is replaced, moved or written to, as far as torch keeps count."""
    return tuple(
        None if x is None else (x.data_ptr(), x.dtype, None if x.is_inference() else x._version) for x in tensors
    )


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


class SharedLists:
    """The lists of the last input, for all products that take it. Copies and pickles start empty."""

    def __init__(self, ternary: bool, on_kernels: bool) -> None:
        self.ternary = ternary
        self.on_kernels = on_kernels
        self.last: tuple[weakref.ref, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def of(self, spikes: torch.Tensor) -> "SpikeLists | Bags":
        """Lists of `spikes`, `[..., inputs]`, one per row; made once for one tensor object."""
        last = self.last
        if last is not None and last[0]() is spikes:
            return last[1]
        rows = spikes.detach().flatten(0, -2)
        lists = list_float_spikes(rows, self.ternary) if self.on_kernels else Bags(rows, self.ternary)
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
    """What an `EventDrivenLinear` has beside its parameters: the settings, and its weights in the layouts in use.

    The layouts are made when they are first needed, and again when a parameter has changed.
    """

    def __init__(self, weight_dtype: str, dense_above: float, shared: SharedLists, dense_class: type) -> None:
        self.weight_dtype = weight_dtype
        self.dense_above = dense_above
        self.shared = shared
        self.dense_class = dense_class
        # What the parameters were, and the layouts that were made of them. Both change at once, for other threads.
        self._layouts: tuple[tuple, dict[str, Any]] = (), {}

    def _layout(self, name: str, linear: nn.Linear, make: Callable[[torch.Tensor, torch.Tensor | None], Any]) -> Any:
        made_for = stamp(linear.weight, linear.bias)
        known_for, layouts = self._layouts
        if made_for != known_for:
            layouts = {}
            self._layouts = made_for, layouts
        if name not in layouts:
            # Weights that are made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                layouts[name] = make(*round_weights(linear.weight, self.weight_dtype))
        return layouts[name]

    def blocked(self, linear: nn.Linear) -> BlockedWeights:
        """The weights for the compiled kernels."""
        bias = None if linear.bias is None else linear.bias.detach()
        return self._layout("blocked", linear, lambda w, scale: block_weights(w, scale, bias, self.weight_dtype))

    def tiled(self, linear: nn.Linear) -> BlockedWeights | None:
        """The int8 weights for dense products on AMX, where there is that."""
        if self.weight_dtype != "int8" or not self.shared.on_kernels or not tiles_available():
            return None
        bias = None if linear.bias is None else linear.bias.detach()
        return self._layout("tiled", linear, lambda w, scale: tile_weights(w, cast(torch.Tensor, scale), bias))

    def runs_by_events(self, spikes: SpikeLists | PackedSpikes | Bags) -> bool:
        """Whether that is the faster product at the firing rate of `spikes`."""
        return self.dense_above >= 1 or (self.dense_above > 0 and spikes.firing_rate <= self.dense_above)

    def kernel_operands(
        self, linear: nn.Linear, spikes: PackedSpikes
    ) -> tuple[SpikeLists | PackedSpikes, BlockedWeights | None]:
        """Spikes and weights as the faster kernel takes them; no weights where torch's dense product is faster."""
        if self.runs_by_events(spikes):
            return spikes.lists, self.blocked(linear)
        return spikes, self.tiled(linear)

    def run(self, linear: nn.Linear, spikes: torch.Tensor) -> torch.Tensor:
        """`[..., outputs]` in float32 from `spikes`, `[..., inputs]`, by whichever product is faster at their rate."""
        lists = self.shared.of(spikes)
        if isinstance(lists, Bags):
            by_events = self.runs_by_events(lists)
            result = self._run_bags(linear, lists) if by_events else self.run_dense(linear, spikes.flatten(0, -2))
        else:
            weights = self.blocked(linear) if self.runs_by_events(lists) else self.tiled(linear)
            rows = spikes.flatten(0, -2)
            result = self.run_dense(linear, rows) if weights is None else event_linear(lists, weights)
        return result.unflatten(0, spikes.shape[:-1])

    def run_dense(self, linear: nn.Linear, spikes: torch.Tensor) -> torch.Tensor:
        """The dense product of `[rows, inputs]` spikes with the rounded weights.

        With int8 weights it is exact before the scale. bfloat16 weights are widened where the sums by events are in
        float32 too; a bfloat16 product, whose result is rounded, would move spikes. `embedding_bag` rounds its sums as
        well, so beside it the bfloat16 product is taken.
        """
        bias = linear.bias
        if self.weight_dtype == "float32" or (self.weight_dtype == "bfloat16" and self.shared.on_kernels):
            weight = self._layout("dense", linear, lambda w, _: w.float())
            return nn.functional.linear(spikes.float(), weight, None if bias is None else bias.float())
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
            table, scale = self._layout("table", linear, lambda w, scale: (_quantized_table(w), scale))
            result = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                table, indices, offsets, mode=0, per_sample_weights=signs
            )
            result = result.mul_(scale)
        else:
            table = self._layout("table", linear, lambda w, _: w.t().contiguous())
            signs = None if signs is None else signs.to(table.dtype)
            result = nn.functional.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=signs).float()
        return result if linear.bias is None else result + linear.bias

    def rounded(self, linear: nn.Linear) -> torch.Tensor:
        """The rounded weights as floats."""
        return rounded_floats(linear.weight, self.weight_dtype)


def _quantized_table(weight: torch.Tensor) -> torch.Tensor:
    """int8 weights `[outputs, inputs]` as the rows of a table of torch's own format for quantized embeddings.

    A row is the bytes `w + 128` and, as two floats, the scale 1 and the offset -128.
    """
    rows = (weight.t().to(torch.int16) + 128).to(torch.uint8)
    tail = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(rows), 8)
    return torch.cat((rows, tail), dim=1)


class _WithoutGradient(torch.autograd.Function):
    """The event-driven product, with an error in place of a gradient that would silently be missing."""

    @staticmethod
    def forward(ctx, spikes: torch.Tensor, weight: torch.Tensor, linear: "EventDrivenLinear") -> torch.Tensor:
        return linear.product.run(linear, spikes)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("event-driven inference has no gradients: call `dense(model)` before training")


class EventDrivenLinear(nn.Linear):
    """A Linear whose input is spikes, computed as a sum over those that fire. `event_driven` makes it from a Linear.

    `forward` takes spikes `[..., inputs]` and returns `[..., outputs]` in their dtype.

    Raises:
        ValueError: if the input is not made of spikes.
        RuntimeError: in training mode, or away from the CPU.
    """

    product: EventDrivenProduct

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("event-driven inference has no training mode: call `dense(model)` before training")
        if input.device.type != "cpu" or self.weight.device.type != "cpu":
            raise RuntimeError("event-driven inference runs on the CPU: call `dense(model)` before moving the model")
        if input.shape[-1] != self.in_features:
            raise ValueError(f"the input must have {self.in_features} channels, got {list(input.shape)}")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # Lists have no fixed length, so a graph holds the dense product of the same weights.
            return nn.functional.linear(input, self.product.rounded(self).to(input.dtype), self.bias)
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return _WithoutGradient.apply(input, self.weight, self).to(input.dtype)
        return self.product.run(self, input).to(input.dtype)

    def extra_repr(self) -> str:
        product = self.product
        return f"{super().extra_repr()}, weight_dtype={product.weight_dtype!r}, dense_above={product.dense_above:.3f}"


class LayerState:
    """What an `EventDrivenLayer` has beside its modules: its dense class, and its neurons' parameters."""

    def __init__(self, dense_class: type) -> None:
        self.dense_class = dense_class
        self._neurons: dict[str, tuple[tuple, NeuronParameters]] = {}

    def neuron(self, name: str, neuron: BPSN) -> NeuronParameters:
        """The parameters of `neuron` as the kernels take them, computed again when one of them has changed."""
        # The same as `parameters()`, which takes longer than a small layer's products.
        made_for = stamp(*neuron._parameters.values())
        known = self._neurons.get(name)
        if known is None or known[0] != made_for:
            with torch.inference_mode(False), torch.no_grad():
                values = (neuron.v_threshold, neuron.decay_forward, neuron.decay_backward, neuron.soft_reset)
                v_threshold, decay_forward, decay_backward, reset = (x.detach().float().contiguous() for x in values)
            parameters = NeuronParameters(
                neuron.num_groups,
                v_threshold,
                decay_forward,
                decay_backward,
                reset,
                neuron.normalize,
                neuron.reset_iterations,
                neuron.spike_type == "ternary",
            )
            known = made_for, parameters
            self._neurons[name] = known
        return known[1]


class EventDrivenLayer(SNNBertLayer):
    """An encoder layer that runs from spikes to spikes on the compiled kernels. `event_driven` makes it.

    It goes through its modules one by one, as the dense layer does, wherever someone looks at what happens in between
    (spikes or attentions are asked for, a hook is registered, a gradient may be wanted), where a module is not what the
    kernels compute (another neuron, an adapter, attention without softmax, another dtype), or without kernels.
    """

    event_driven: LayerState

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        parts = self._parts()
        if not self._can_run_whole(hidden_states, parts):
            return super().forward(hidden_states, attention_mask, token_mask, **kwargs)
        mask = None if token_mask is None else (token_mask != 0).to(torch.uint8).contiguous()
        return self._run_whole(hidden_states.contiguous(), mask, parts)

    def _can_run_whole(self, hidden_states: torch.Tensor, parts: Parts) -> bool:
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
            or hidden_states.dtype != torch.float32
            or hidden_states.device.type != "cpu"
            or hidden_states.shape[1] >= MAX_INPUTS
            or not available()
        ):
            return False
        attention = self.attention.self
        if attention.config.attention_type != "softmax" or attention.head_size > MAX_HEAD_SIZE:
            return False
        for name, neuron, linear in parts:
            if type(neuron) is not BPSN or neuron.implementation not in ("auto", "chunked"):
                return False
            if neuron.v_threshold.dtype != torch.float32 or neuron.num_channels // neuron.num_groups % 8:
                return False
            if linear is not None and (type(linear) is not EventDrivenLinear or not linear.product.shared.on_kernels):
                return False
            if name == "context" and neuron.num_groups * attention.head_size != neuron.num_channels:
                return False
        return not self._is_observed()

    def _parts(self) -> Parts:
        """The neurons, each with the Linear whose currents it receives, or that its spikes feed."""
        attention, context, middle, output = self.attention.self, self.attention.output, self.intermediate, self.output
        return (
            ("input", attention.neuron, None),
            ("query", attention.query_neuron, attention.query),
            ("key", attention.key_neuron, attention.key),
            ("value", attention.value_neuron, attention.value),
            ("context", context.neuron, context.dense),
            ("mlp_input", middle.neuron, middle.dense),
            ("mlp_hidden", output.neuron, output.dense),
        )

    def _is_observed(self) -> bool:
        collector = getattr(output_capturing, "_active_collector", None)
        asked_for = collector.get() if collector is not None else None
        if asked_for is not None and ("spikes" in asked_for or "attentions" in asked_for):
            return True
        # By hand, since `modules()` takes longer than a small layer's products.
        inside = [module for module in self._modules.values() if module is not None]
        for module in inside:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                # transformers leaves its own hooks in place; they do nothing unless asked for, which is checked above.
                if getattr(hook, "__module__", None) != output_capturing.__name__:
                    return True
            inside += [child for child in module._modules.values() if child is not None]
        return False

    def _run_whole(self, states: torch.Tensor, mask: torch.Tensor | None, parts: Parts) -> torch.Tensor:
        attention, after = self.attention.self, self.attention.output
        of_layer = self.event_driven
        neuron = {name: of_layer.neuron(name, cast(BPSN, module)) for name, module, _ in parts}

        spikes = neuron_spikes(states, mask, neuron["input"])
        shared = PackedSpikes(spikes)
        query, key, value = (
            self._spikes_behind(linear, shared, mask, neuron[name])
            for name, linear in (("query", attention.query), ("key", attention.key), ("value", attention.value))
        )
        gain, offset = attention.query_gain.detach(), attention.query_offset.detach()
        spikes = attention_spikes(query, key, value, gain, offset, attention.scaling, mask, neuron["context"])
        states = after.LayerNorm(self._add_product(after.dense, PackedSpikes(spikes), states))

        spikes = neuron_spikes(states, mask, neuron["mlp_input"])
        spikes = self._spikes_behind(self.intermediate.dense, PackedSpikes(spikes), mask, neuron["mlp_hidden"])
        return self.output.LayerNorm(self._add_product(self.output.dense, PackedSpikes(spikes), states))

    def _spikes_behind(
        self,
        linear: nn.Linear,
        spikes: PackedSpikes,
        mask: torch.Tensor | None,
        neuron: NeuronParameters,
    ) -> torch.Tensor:
        """Packed spikes of `neuron` behind `linear`."""
        product = cast(EventDrivenLinear, linear).product
        batch, tokens = spikes.packed.shape[1:3]
        inputs, weights = product.kernel_operands(linear, spikes)
        if weights is None:
            current = product.run_dense(linear, _floats(spikes.packed))
        elif fits_blocks(weights.layout, linear.out_features, neuron.groups):
            return linear_neuron_spikes(inputs, weights, batch, mask, neuron)
        else:
            current = event_linear(inputs, weights)
        return neuron_spikes(current.view(batch, tokens, -1), mask, neuron)

    def _add_product(self, linear: nn.Linear, spikes: PackedSpikes, states: torch.Tensor) -> torch.Tensor:
        """`states` plus the product of `spikes`."""
        product = cast(EventDrivenLinear, linear).product
        inputs, weights = product.kernel_operands(linear, spikes)
        if weights is None:
            return states + product.run_dense(linear, _floats(spikes.packed)).view_as(states)
        return event_linear(inputs, weights, states).view_as(states)


def _floats(packed: torch.Tensor) -> torch.Tensor:
    return unpack(packed, 8 * packed.shape[-1], torch.float32).flatten(0, -2)


def crossover_rate(inputs: int, outputs: int, weight_dtype: str, on_kernels: bool) -> float:
    """The firing rate in [0, 1] at which the event-driven and the dense product of this size take the same time."""
    return _measure_crossover(inputs, outputs, weight_dtype, on_kernels, torch.get_num_threads())


@functools.cache
def _measure_crossover(inputs: int, outputs: int, weight_dtype: str, on_kernels: bool, threads: int) -> float:
    """Timed on random weights and spikes; the time of the event-driven product is a line over the rate.

    With kernels as a whole layer runs: by events the packed spikes are listed first, and for a dense product they are
    widened, which tiles do by themselves.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        # Packed spikes come in whole bytes.
        inputs += -inputs % 8
        linear = nn.Linear(inputs, outputs)
        product = EventDrivenProduct(weight_dtype, 1.0, SharedLists(False, on_kernels), nn.Linear)
        batches = [(torch.rand(CROSSOVER_TOKENS, inputs) < rate).float() for rate in CROSSOVER_RATES]

    calls: list[Callable[[], torch.Tensor]]
    if on_kernels:
        packed = [pack(spikes, False)[:, None] for spikes in batches]

        def on_kernels_by_events(packed: torch.Tensor) -> torch.Tensor:
            return event_linear(PackedSpikes(packed).lists, product.blocked(linear))

        def on_kernels_dense(packed: torch.Tensor) -> torch.Tensor:
            spikes, weights = PackedSpikes(packed), product.tiled(linear)
            return product.run_dense(linear, _floats(packed)) if weights is None else event_linear(spikes, weights)

        calls = [functools.partial(on_kernels_by_events, x) for x in packed]
        calls.append(functools.partial(on_kernels_dense, packed[0]))
    else:

        def by_events(spikes: torch.Tensor) -> torch.Tensor:
            # A view is a new tensor object, so the lists are made again.
            return product.run(linear, spikes.view_as(spikes))

        calls = [functools.partial(by_events, spikes) for spikes in batches]
        calls.append(lambda: product.run_dense(linear, batches[0]))
    best = [float("inf")] * len(calls)
    with torch.no_grad():
        # In turns, so that whatever else runs on the machine for a while hits all of them.
        for repeat in range(1 + CROSSOVER_REPEATS):
            for k, call in enumerate(calls):
                started = time.perf_counter()
                call()
                if repeat:
                    best[k] = min(best[k], time.perf_counter() - started)
    low, high, dense_seconds = best
    slope = max(high - low, 1e-9) / (CROSSOVER_RATES[1] - CROSSOVER_RATES[0])
    return min(max(CROSSOVER_RATES[0] + (dense_seconds - low) / slope, 0.0), 1.0)


__all__ = ["EventDrivenLinear", "dense", "event_driven", "is_event_driven", "round_products"]
