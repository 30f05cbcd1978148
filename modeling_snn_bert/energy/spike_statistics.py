"""What the neurons of an SNN-BERT do on real text: spikes per sequence, firing rates, and how long they go on firing.

Only valid tokens count. The numbers come from forward hooks, neuron layer by neuron layer, so that no more than one
layer's spikes are kept at a time.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..loading import INPUT_NAMES
from ..modeling_snn_bert import SNNBertPreTrainedModel
from ..spike_observer import Firing, SpikeObserver
from ..spiking_neurons import BPSN, LIF, SpikingNeuron, logit

# A neuron that fires at more than this share of the valid tokens counts as firing without interruption.
UNINTERRUPTED_RATE = 0.95


@dataclasses.dataclass
class RunLengths:
    """How long neurons fire without a pause, over all neuron layers.

    Attributes:
        name: which neuron it is.
        channels: how many neurons were looked at, in all neuron layers.
        firing_rate: spikes per valid token and channel.
        mean: mean length, in time-steps, of the runs of consecutive spikes.
        percentile_99: the length that 99 % of the runs do not exceed.
        uninterrupted: share of the channels that fire at over 95 % of the valid tokens.
    """

    name: str
    channels: int
    firing_rate: float
    mean: float
    percentile_99: int
    uninterrupted: float


@dataclasses.dataclass
class SpikeStatistics:
    """What `measure_spikes` returns.

    Attributes:
        names: the neuron layers, as from the model's `neuron_names()`.
        rates: one `[channels]` tensor per neuron layer, spikes per valid token (and time-step).
        spikes: spikes of each neuron layer in each sequence, `[sequences, neuron layers]`, per time-step.
        lengths: valid tokens of each sequence, `[sequences]`.
        key_value_pairs: for each sequence and encoder layer the pairs of a key's and a value's spike in the same head
            and token, `[sequences, layers]`, per time-step: the additions of `k^T v` in spiking attention.
        read_out: name and, per sequence, rows that entered it, of each Linear outside the encoder, `{name: rows}`.
        run_lengths: of the model's own neurons and of others that were fed the same currents; empty if not asked for.
        example_ids: token ids of the first sequence, without padding.
        example_spikes: its spikes, `[tokens, channels]` per neuron layer (the first time-step's with repeat coding).
    """

    names: list[str]
    rates: list[torch.Tensor]
    spikes: torch.Tensor
    lengths: torch.Tensor
    key_value_pairs: torch.Tensor
    read_out: dict[str, float]
    run_lengths: list[RunLengths]
    example_ids: list[int]
    example_spikes: list[torch.Tensor]


@torch.no_grad()
def measure_spikes(
    model: SNNBertPreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], *, run_lengths: bool = False
) -> SpikeStatistics:
    """Run `model` in evaluation mode on `batches` and count the spikes at valid tokens.

    Args:
        model: an SNN-BERT with any head.
        batches: what the tokenizer returns, as tensors `[batch, seq_len]` (`[batch, num_choices, seq_len]` for
            multiple choice, where every choice counts as a sequence): `input_ids`, and if there are any
            `attention_mask`, `token_type_ids`, `position_ids`; other keys are ignored.
        run_lengths: whether to measure runs of uninterrupted firing too, which takes several times as long.

    Raises:
        TypeError: if `model` is not an SNN-BERT.
        ValueError: if `batches` is empty, a batch has no `input_ids`, or a sequence has no valid token.
        RuntimeError: if the neurons of `model` were not called once per forward pass.
    """
    if not isinstance(model, SNNBertPreTrainedModel):
        raise TypeError(f"`model` must be an SNN-BERT, got {type(model).__name__}")
    was_training = model.training
    model.eval()
    try:
        with _SpikeCounter(model, run_lengths) as counter:
            for batch in logging.tqdm(batches, desc="measure spikes", unit="batch"):
                if "input_ids" not in batch:
                    raise ValueError(f"each of `batches` must hold `input_ids`, got the keys {sorted(batch)}")
                inputs = {name: batch[name] for name in INPUT_NAMES if batch.get(name) is not None}
                counter.count({name: x.to(model.device) for name, x in inputs.items()})
    finally:
        model.train(was_training)
    return counter.statistics()


class _SpikeCounter(SpikeObserver):
    """The sums over what the neurons do, and over what enters the Linears outside the encoder."""

    def __init__(self, model: SNNBertPreTrainedModel, run_lengths: bool) -> None:
        super().__init__(model)
        self.model, self.with_run_lengths = model, run_lengths
        self.names = model.neuron_names()
        self.steps = model.config.num_timesteps
        # A tensor for each batch; spikes and pairs by the name of the neuron layer.
        self.lengths: list[torch.Tensor] = []
        self.spikes: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.key_value_pairs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.totals: dict[str, torch.Tensor] = {}
        self.read_out: dict[str, float] = {}
        self.runs: dict[str, _Runs] = {}
        self.example_ids: list[int] = []
        self.example_spikes: dict[str, torch.Tensor] = {}
        # Of the batch that is running.
        self.mask = torch.empty(0)
        self.key_spikes = torch.empty(0)

    def start(self) -> None:
        super().start()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and ".encoder." not in f".{name}":
                self.handles.append(module.register_forward_hook(functools.partial(self._count_rows, name)))

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        self.mask = mask.reshape(-1, mask.shape[-1]) != 0
        if not bool(self.mask.any(-1).all()):
            raise ValueError("every sequence in `batches` must have at least one valid token (`attention_mask` 1)")
        if not self.lengths:
            self.example_ids = ids.reshape(-1, ids.shape[-1])[0][self.mask[0]].tolist()
        self.model(**inputs)
        seen = [name for name in self.names if len(self.spikes[name]) == len(self.lengths) + 1]
        if seen != self.names:
            raise RuntimeError(
                f"spikes were seen from {len(seen)} of the {len(self.names)} neuron layers: measure the "
                "model in its plain form, not compiled and not converted to another way of inference"
            )
        self.lengths.append(self.mask.sum(-1).double())

    def see(self, firing: Firing) -> None:
        name, spikes = firing.name, firing.spikes
        # The time-steps of the repeat coding apart: [time-steps, batch, seq_len, channels].
        fired = (spikes != 0).unflatten(0, (self.steps, -1)) & self.mask[..., None]
        if not self.lengths:
            self.example_spikes[name] = spikes[0][self.mask[0]].to(torch.int8).cpu()
        counts = fired.sum((0, 2)).double() / self.steps
        self.spikes[name].append(counts.sum(-1))
        self.totals[name] = self.totals.get(name, 0) + counts.sum(0)
        if name.endswith("key_neuron"):
            self.key_spikes = self._per_head(fired)
        elif name.endswith("value_neuron"):
            pairs = (self.key_spikes * self._per_head(fired)).sum((0, 2, 3))
            self.key_value_pairs[name].append(pairs.double() / self.steps)
        if self.with_run_lengths:
            self._count_runs(firing, fired)

    def _per_head(self, fired: torch.Tensor) -> torch.Tensor:
        return fired.unflatten(-1, (self.model.config.num_attention_heads, -1)).sum(-1)

    def _count_rows(self, name: str, module: nn.Linear, args, output: torch.Tensor) -> None:
        # A Linear on all tokens has an output of three dimensions, one on a token per sequence has two.
        rows = self.mask.sum().item() if output.dim() > 2 else output.shape[0]
        self.read_out[name] = self.read_out.get(name, 0.0) + rows

    def _count_runs(self, firing: Firing, fired: torch.Tensor) -> None:
        """Runs along time, which are the tokens, or the time-steps of each token with repeat coding."""
        neuron, current = firing.neuron, firing.current.unflatten(0, (self.steps, -1))
        mask: torch.Tensor | None = self.mask
        if self.steps > 1:
            current, fired = (x.permute(1, 2, 0, 3)[self.mask] for x in (current, fired))
            mask = None
        else:
            current, fired = current[0], fired[0]
        trains = {"this model's neurons": fired}
        # A soft reset by a threshold at or below zero would charge a neuron. So others are compared where it is
        # positive, and the model's own neurons are listed for those channels too.
        channels = neuron.v_threshold > 0
        trains["this model's neurons, threshold > 0"] = fired[..., channels]
        for title, other in comparison_neurons(neuron, self.model.config.decay).items():
            trains[f"{title}, threshold > 0"] = (other(current, mask) != 0)[..., channels]
        for title, train in trains.items():
            self.runs.setdefault(title, _Runs()).add(firing.name, train)

    def statistics(self) -> SpikeStatistics:
        if not self.lengths:
            raise ValueError("`batches` must hold at least one batch")
        lengths = torch.cat(self.lengths)
        return SpikeStatistics(
            names=self.names,
            rates=[self.totals[name] / lengths.sum() for name in self.names],
            spikes=torch.stack([torch.cat(self.spikes[name]) for name in self.names], -1),
            lengths=lengths,
            key_value_pairs=torch.stack([torch.cat(pairs) for pairs in self.key_value_pairs.values()], -1),
            read_out={name: rows / len(lengths) for name, rows in self.read_out.items()},
            run_lengths=[runs.summary(title, lengths.sum() * self.steps) for title, runs in self.runs.items()],
            example_ids=self.example_ids,
            example_spikes=[self.example_spikes[name] for name in self.names],
        )


class _Runs:
    """How often each run length occurs, and how often each channel fires."""

    def __init__(self) -> None:
        self.histogram = torch.zeros(1, dtype=torch.long)
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, layer: str, fired: torch.Tensor) -> None:
        """Add `fired`, `[rows, time, channels]`."""
        # The shorter one is filled up with zeros.
        self.histogram = pad_sequence([self.histogram, run_length_histogram(fired).cpu()]).sum(1)
        self.counts[layer] = self.counts.get(layer, 0) + fired.sum((0, 1)).cpu()

    def summary(self, name: str, time_steps: torch.Tensor) -> RunLengths:
        """All that was added, in so many valid time-steps."""
        rates = torch.cat([count / time_steps.cpu() for count in self.counts.values()])
        runs = self.histogram.sum()
        if not len(rates) or not runs:
            return RunLengths(name, len(rates), 0.0, 0.0, 0, 0.0)
        mean = (self.histogram * torch.arange(len(self.histogram))).sum() / runs
        cumulative = self.histogram.cumsum(0)
        percentile = int((cumulative >= 0.99 * runs).nonzero()[0])
        uninterrupted = (rates > UNINTERRUPTED_RATE).double().mean().item()
        return RunLengths(name, len(rates), rates.mean().item(), mean.item(), percentile, uninterrupted)


def run_length_histogram(fired: torch.Tensor) -> torch.Tensor:
    """How many runs of consecutive spikes there are of each length.

    Args:
        fired (`[rows, time, channels]`): whether the neuron fires, as bool.

    Returns:
        `[time + 1]`; entry `n` is the number of runs of exactly `n` time-steps (entry 0 is 0).
    """
    trains = nn.functional.pad(fired.transpose(1, 2).flatten(0, 1).to(torch.int8), (1, 1))
    change = trains.diff(dim=-1)
    # Row by row, the n-th start belongs to the n-th end.
    starts, ends = (change == 1).nonzero()[:, 1], (change == -1).nonzero()[:, 1]
    return torch.bincount(ends - starts, minlength=fired.shape[1] + 1)


@torch.no_grad()
def comparison_neurons(neuron: SpikingNeuron, decay: float) -> dict[str, SpikingNeuron]:
    """Neurons with the thresholds and decays of `neuron` but another reset or none; each is fed token by token.

    Args:
        neuron: a neuron of the model.
        decay: for a neuron that has no decay of its own (PSN).
    """
    settings: dict[str, Any] = {name: getattr(neuron, name) for name in ("num_channels", "num_groups", "spike_type")}
    bidirectional = isinstance(neuron, BPSN) and neuron.bidirectional
    no_reset: dict[str, Any] = {"reset_iterations": 0, "bidirectional": bidirectional}
    neurons: dict[str, SpikingNeuron] = {}
    if isinstance(neuron, BPSN) and neuron.normalize:
        neurons["without reset"] = BPSN(**settings, **no_reset)
    neurons["without reset and normalisation"] = BPSN(**settings, **no_reset, normalize=False)
    if not isinstance(neuron, LIF):
        neurons["LIF"] = LIF(**settings, decay=decay)
    # The logits of the decays, under the name that each class gives them.
    own = {name.replace("_forward", ""): value for name, value in neuron.named_parameters()}
    for other in neurons.values():
        other.to(neuron.v_threshold)
        for name, value in other.named_parameters():
            source = own.get(name.replace("_forward", ""))
            if source is not None:
                value.copy_(source)
            elif "decay" in name:
                value.fill_(logit(decay))
    return neurons
