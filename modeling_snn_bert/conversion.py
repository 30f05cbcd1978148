"""From a trained BERT, or MPNet, to an SNN-BERT: calibration, layer by layer, on a few batches of real text.

Each neuron layer gets the thresholds at which it fires at the wanted rate on the spikes of the layers before it.
Then the Linear that it feeds is fitted to spikes. The value `x` that a spike `s` stands for is decoded per channel as
`offset + slope * s`, the least-squares line (for binary spikes: the means of `x` where the neuron is silent and where
it fires), and folded into the Linear, `W' = W diag(slope)` and `b' = b + W offset`. A ridge regression on all
channels at once then corrects `W'` towards what the BERT computes at that place. Nothing is added at run time.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias, cast

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, MPNetModel, MPNetPreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging

from . import modeling_snn_bert
from .batches import Batch
from .configuration_snn_bert import SNNBertConfig
from .layer_places import LINEARS
from .modeling_snn_bert import SNNBertLayer, SNNBertModel, SNNBertPreTrainedModel
from .mpnet import LINEAR_NAMES, layer_output, settings_of, weights_of
from .spiking_neurons import SpikingNeuron

# What is converted.
Original: TypeAlias = BertPreTrainedModel | MPNetPreTrainedModel

# By `model_type`, how the names of their classes begin; and by the name of a head, how they go on.
FAMILIES = {"bert": "Bert", "mpnet": "MPNet"}
HEADS = {"Model": "Model"} | {
    head: f"For{head}"
    for head in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
}
SPIKING_CLASSES: dict[type[Original], type[SNNBertPreTrainedModel]] = {
    getattr(transformers, f"{family}{head}"): getattr(modeling_snn_bert, f"SNNBert{head}")
    for family in FAMILIES.values()
    for head in HEADS.values()
    if hasattr(transformers, f"{family}{head}")
}

# The settings that an SNN-BERT and a BERT of the same shape have in common.
SHAPE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
    "type_vocab_size hidden_act layer_norm_eps pad_token_id"
).split()
BISECTION_STEPS = 10
# The range of a whole layer is some ten times that of a channel.
LAYER_BISECTION_STEPS = 14
# Thresholds need fewer tokens than the regressions: 2,000 put a rate of 0.2 within 0.01.
THRESHOLD_TOKENS = 2000


@torch.no_grad()
def convert_bert(
    bert: Original,
    batches: Iterable[Mapping[str, torch.Tensor]],
    firing_rate: float = 0.2,
    *,
    ridge: float = 0.5,
    threshold_per: str = "channel",
    **settings,
) -> SNNBertPreTrainedModel:
    """A spiking copy of `bert`, with thresholds and weights calibrated on `batches`.

    Args:
        bert: a `BertModel` or a BERT with one of the heads that SNN-BERT has, or the same of MPNet; it is not changed.
            An MPNet's relative position bias goes with it, and its position embeddings but those of padding.
        batches: what the tokenizer returns, as tensors `[batch, seq_len]`: `input_ids`, and if there are any
            `attention_mask` and `token_type_ids`; other keys are ignored. Some 10,000 tokens are enough.
        firing_rate: the share of valid tokens at which each channel of each neuron layer shall fire, in (0, 1).
        ridge: weight of the ridge penalty, relative to the spikes' mean variance, that holds the regression to the
            decoded weights; `float("inf")` leaves it out.
        threshold_per: `"channel"` gives each channel the threshold at which it fires at that rate; `"layer"` gives all
            channels of a neuron layer the same, at which the layer does. Training is free to move them apart.
        settings: settings of `SNNBertConfig` to change, such as `spike_type="ternary"` or `neuron_type="lif"`.

    Returns:
        The SNN-BERT with the same head, on the device of `bert`, in evaluation mode.

    Raises:
        TypeError: if `bert` is neither a BERT nor an MPNet, or has a head that SNN-BERT lacks.
        ValueError: if `batches` is empty or without `input_ids`, or an argument is outside its range.
    """
    if type(bert) not in SPIKING_CLASSES:
        known = ", ".join(model_class.__name__ for model_class in SPIKING_CLASSES)
        raise TypeError(f"`bert` must be one of {known}; got {type(bert).__name__}")
    if not 0 < firing_rate < 1:
        raise ValueError(f"`firing_rate` must lie in (0, 1), got {firing_rate}")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must be >= 0, got {ridge}")
    if threshold_per not in ("channel", "layer"):
        raise ValueError(f'`threshold_per` must be "channel" or "layer", got {threshold_per!r}')
    how = _Calibration(firing_rate, ridge, threshold_per)
    model = initialize_from_bert(bert, **settings)
    was_training = bert.training
    bert.eval()
    try:
        _calibrate(bert.base_model, model.base_model, _checked_batches(batches, bert.device), how)
    finally:
        bert.train(was_training)
    return model


def initialize_from_bert(bert: Original, **settings) -> SNNBertPreTrainedModel:
    """An uncalibrated SNN-BERT with the weights of `bert`, in evaluation mode; arguments as for `convert_bert`."""
    fields = {field.name for field in dataclasses.fields(SNNBertConfig)}
    inherited = {k: v for k, v in bert.config.to_dict().items() if k in fields and k != "architectures"}
    is_mpnet = isinstance(bert, MPNetPreTrainedModel)
    if is_mpnet:
        inherited |= settings_of(bert)
    config = SNNBertConfig(**{**inherited, **settings})
    config._attn_implementation = bert.config._attn_implementation
    model = SPIKING_CLASSES[type(bert)](config).to(bert.device, bert.dtype)
    weights = weights_of(bert) if is_mpnet else bert.state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not is_neuron_parameter(key)]
    if missing or unexpected:
        raise ValueError(f"`bert` does not have the weights of a BERT: missing {missing}, unexpected {unexpected}")
    return model.eval()


def bert_config(config: SNNBertConfig) -> BertConfig:
    """The configuration of a BERT of the same shape."""
    return BertConfig(**{name: getattr(config, name) for name in SHAPE})


def is_neuron_parameter(name: str) -> bool:
    """Whether a parameter of that name belongs to a neuron; a BERT checkpoint lacks these and nothing else."""
    module, _, parameter = name.rpartition(".")
    return module.endswith("neuron") or parameter in ("query_gain", "query_offset")


def _checked_batches(batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> list[Batch]:
    checked = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"each of `batches` must hold `input_ids`, got the keys {sorted(batch)}")
        names = ("input_ids", "attention_mask", "token_type_ids")
        tensors = {name: batch[name].to(device) for name in names if batch.get(name) is not None}
        # Multiple choice: the choices are sequences like any other.
        checked.append({name: x.reshape(-1, x.shape[-1]) for name, x in tensors.items()})
    if not checked:
        raise ValueError("`batches` must hold at least one batch")
    return checked


class _Calibration(NamedTuple):
    """The arguments of `convert_bert` of these names."""

    firing_rate: float
    ridge: float
    threshold_per: str


def _calibrate(bert: BertModel | MPNetModel, model: SNNBertModel, batches: list[Batch], how: _Calibration) -> None:
    copies = model.config.num_timesteps
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches]
    teacher_states = [bert.embeddings(b["input_ids"], token_type_ids=b.get("token_type_ids")) for b in batches]
    states = [x.repeat(copies, 1, 1) for x in teacher_states]
    layers = cast(Iterable[SNNBertLayer], model.encoder.layer)
    pairs = list(zip(bert.encoder.layer, layers, strict=True))
    for teacher_layer, layer in logging.tqdm(pairs, desc="calibrate", unit="layer"):
        targets = _Targets(bert, teacher_layer, teacher_states, masks)
        token_masks = [mask.repeat(copies, 1) for mask in masks]
        states = _LayerCalibration(model, layer, targets, token_masks, how).run(states)
        teacher_states = targets.outputs


class _Targets:
    """What one BERT layer computes on the calibration batches, at the places that the spiking layer imitates."""

    def __init__(
        self, bert: BertModel | MPNetModel, layer: nn.Module, states: list[torch.Tensor], masks: list[torch.Tensor]
    ) -> None:
        names = LINEAR_NAMES if isinstance(bert, MPNetModel) else {name: name for name in LINEARS}
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}
        self.results: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}
        self.outputs: list[torch.Tensor] = []
        handles = [layer.get_submodule(names[name]).register_forward_hook(self._record(name)) for name in self.inputs]
        try:
            for state, mask in zip(states, masks, strict=True):
                pairs = create_bidirectional_mask(config=bert.config, inputs_embeds=state, attention_mask=mask)
                if isinstance(bert, MPNetModel):
                    self.outputs.append(layer_output(bert, layer, state, pairs))
                    continue
                output = layer(state, attention_mask=pairs)
                self.outputs.append(output[0] if isinstance(output, tuple) else output)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str):
        def hook(module, args, output):
            self.inputs[name].append(args[0])
            self.results[name].append(output)

        return hook


@dataclasses.dataclass
class _LayerCalibration:
    """Calibrates one spiking layer; `run` takes the states that enter it and returns those that leave it."""

    model: SNNBertModel
    layer: SNNBertLayer
    targets: _Targets
    masks: list[torch.Tensor]
    how: _Calibration

    def __post_init__(self) -> None:
        self.copies = self.model.config.num_timesteps
        tokens = torch.stack([mask.sum() for mask in self.masks]).cumsum(0) / self.copies
        self.sample_size = min(int((tokens < THRESHOLD_TOKENS).sum()) + 1, len(self.masks))

    def run(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        attention, layer = self.layer.attention.self, self.layer
        spikes = self.calibrate_neuron(attention.neuron, states)
        for name in ("query", "key", "value"):
            self.fit(f"attention.self.{name}", spikes)
        decoding = {}
        for name in ("query", "key", "value"):
            currents = [getattr(attention, name)(s) for s in spikes]
            projected = self.calibrate_neuron(getattr(attention, f"{name}_neuron"), currents)
            wanted = self.targets.results[f"attention.self.{name}"]
            decoding[name] = decode(self.valid(projected), self.valid_targets(wanted))
        # A key's offset adds the same number to all scores of a query, which the softmax takes out again. A value's
        # slope and offset pass through the average over keys and are part of what the output projection is fitted to.
        slope, offset = decoding["query"]
        key_slope, _ = decoding["key"]
        attention.query_gain.copy_(slope * key_slope)
        attention.query_offset.copy_(offset * key_slope)

        contexts = [
            attention(state, self.model.encoder.attention_mask(state, mask), mask)[0]
            for state, mask in zip(states, self.masks, strict=True)
        ]
        block = layer.attention.output
        spikes = self.calibrate_neuron(block.neuron, contexts)
        self.fit("attention.output.dense", spikes, residual=(states, self.targets.inputs["attention.self.query"]))
        states = [block(c, state, mask) for c, state, mask in zip(contexts, states, self.masks, strict=True)]

        spikes = self.calibrate_neuron(layer.intermediate.neuron, states)
        self.fit("intermediate.dense", spikes)
        currents = [layer.intermediate.dense(s) for s in spikes]
        spikes = self.calibrate_neuron(layer.output.neuron, currents)
        self.fit("output.dense", spikes, residual=(states, self.targets.inputs["intermediate.dense"]))
        return [
            layer.output(current, state, mask)
            for current, state, mask in zip(currents, states, self.masks, strict=True)
        ]

    def calibrate_neuron(self, neuron: SpikingNeuron, currents: list[torch.Tensor]) -> list[torch.Tensor]:
        """Set the thresholds for the wanted firing rate, by bisection, and return the spikes.

        Bisection, because a neuron with a reset fires less often than its potential exceeds the threshold.
        """
        sample = self.sample_size
        valid = self.valid(currents[:sample])
        # A leaky sum without normalisation can exceed its largest current, by 1 / (1 - decay) at the most.
        reach = 1.0 if getattr(neuron, "normalize", False) else 4.0
        low, high = valid.amin(0), valid.amax(0)
        low, high = torch.minimum(low, low * reach), torch.maximum(high, high * reach)
        if neuron.spike_type == "ternary":
            low, high = torch.zeros_like(low), torch.maximum(low.abs(), high.abs())
        is_shared = self.how.threshold_per == "layer"
        if is_shared:
            low, high = low.min().expand_as(low), high.max().expand_as(high)
        for _ in range(LAYER_BISECTION_STEPS if is_shared else BISECTION_STEPS):
            neuron.v_threshold.copy_((low + high) / 2)
            rate = self.valid(self.spikes(neuron, currents[:sample])).abs().mean(0)
            too_quiet = (rate.mean() if is_shared else rate) < self.how.firing_rate
            high = torch.where(too_quiet, neuron.v_threshold, high)
            low = torch.where(too_quiet, low, neuron.v_threshold)
        # The loud side of the bracket: a channel that fires a little too often beats a dead one.
        neuron.v_threshold.copy_(low)
        return self.spikes(neuron, currents)

    def fit(
        self,
        name: str,
        spikes: list[torch.Tensor],
        residual: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> None:
        """Fit the Linear `name` on spikes to what BERT's Linear of that name gives on its real-valued input.

        With `residual`, the spiking and the BERT layer's residual stream, the target is BERT's sum with its own
        stream, so that the fit also mends the error that the spiking stream carries.
        """
        linear = cast(nn.Linear, self.layer.get_submodule(name))
        x = self.valid(spikes)
        slope, offset = decode(x, self.valid_targets(self.targets.inputs[name]))
        linear.bias.add_(linear.weight @ offset)
        linear.weight.mul_(slope)
        if self.how.ridge == float("inf"):
            return
        wanted = self.valid_targets(self.targets.results[name])
        if residual is not None:
            wanted = wanted + self.valid_targets(residual[1]) - self.valid(residual[0])
        change, shift = ridge_regression(x, wanted - linear(x), self.how.ridge)
        linear.weight.add_(change)
        linear.bias.add_(shift)

    def spikes(self, neuron: SpikingNeuron, currents: list[torch.Tensor]) -> list[torch.Tensor]:
        return [neuron(current, mask) for current, mask in zip(currents, self.masks, strict=False)]

    def valid(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The valid tokens of these (first) batches, `[tokens, channels]`."""
        return torch.cat([x[mask != 0] for x, mask in zip(tensors, self.masks, strict=False)])

    def valid_targets(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The same for BERT's tensors, once per time-step of the repeat coding."""
        return self.valid([x.repeat(self.copies, 1, 1) for x in tensors])


def decode(spikes: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and offset, each `[channels]`, of the least-squares line from spikes to values, both `[tokens, channels]`.

    For binary spikes that is `offset = c0`, `slope = c1 - c0` with the means `c0`, `c1` of the values where the spike
    is 0 and 1. A channel whose spikes never change decodes to its mean.
    """
    centered = spikes - spikes.mean(0)
    variance = centered.square().mean(0)
    slope = torch.where(variance > 0, (centered * values).mean(0) / variance.clamp(min=1e-12), 0.0)
    return slope, values.mean(0) - slope * spikes.mean(0)


def ridge_regression(x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[outputs, inputs]` and bias `[outputs]` of the ridge regression from `x` to `y`, `[tokens, ...]` each.

    The penalty is `ridge` times the mean variance of the inputs; the bias is not penalised. Solved in float64.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    centered = (x - mean_x).double()
    gram = centered.T @ centered / len(x)
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
    gram.diagonal().add_(penalty)
    moment = centered.T @ (y - mean_y).double() / len(x)
    weights = torch.linalg.solve(gram, moment).T.to(x.dtype)
    return weights, mean_y - weights @ mean_x
