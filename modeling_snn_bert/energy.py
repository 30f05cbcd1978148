"""What a forward pass costs on real text: firing rates, additions and multiplications, their energy, and pictures.

Counts are per sentence, over its valid tokens only. Convention of the field: an accumulate (AC, an addition that a
spike causes) costs 0.9 pJ and a multiply-accumulate (MAC) 4.6 pJ in float32 at 45 nm (Horowitz, "Computing's energy
problem", ISSCC 2014). Memory traffic is not part of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .configuration_snn_bert import SNNBertConfig
from .modeling_snn_bert import SNNBertPreTrainedModel
from .spiking_neurons import SpikingNeuron

PICOJOULES_PER_AC = 0.9
PICOJOULES_PER_MAC = 4.6

# The neuron layers of an encoder layer, in the order in which they fire.
NEURON_PLACES = {
    "attention.self.neuron": "attention input",
    "attention.self.query_neuron": "query",
    "attention.self.key_neuron": "key",
    "attention.self.value_neuron": "value",
    "attention.output.neuron": "attention output",
    "intermediate.neuron": "MLP input",
    "output.neuron": "MLP hidden",
}


@dataclass
class OperationCount:
    """Operations of one kind of computation in a mean sentence.

    Attributes:
        name: what is computed.
        additions: ACs.
        multiplications: MACs.
        is_matrix_product: whether it is one of the matrix products, which are all that many papers count.
    """

    name: str
    additions: float = 0.0
    multiplications: float = 0.0
    is_matrix_product: bool = False

    @property
    def picojoules(self) -> float:
        """Energy of the arithmetic at 45 nm."""
        return self.additions * PICOJOULES_PER_AC + self.multiplications * PICOJOULES_PER_MAC


class SpikeStatistics(NamedTuple):
    """What `measure_spikes` returns.

    rates: one `[channels]` tensor per neuron layer, the mean firing rate over all valid tokens.
    spikes: for each sentence, the number of spikes of each neuron layer per time-step, `[sentences, neuron layers]`.
    lengths: valid tokens of each sentence, `[sentences]`.
    """

    rates: list[torch.Tensor]
    spikes: torch.Tensor
    lengths: torch.Tensor


@torch.no_grad()
def measure_spikes(model: SNNBertPreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> SpikeStatistics:
    """Run `model` in evaluation mode on `batches`, as from a tokenizer, and count the spikes at valid tokens.

    Raises:
        TypeError: if `model` is not an SNN-BERT.
        ValueError: if `batches` is empty.
    """
    if not isinstance(model, SNNBertPreTrainedModel):
        raise TypeError(f"`model` must be an SNN-BERT, got {type(model).__name__}")
    encoder = model.base_model
    was_training = encoder.training
    encoder.eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    spikes, lengths = [], []
    totals: list[torch.Tensor] = []
    try:
        for batch in batches:
            inputs = {name: batch[name].to(encoder.device) for name in names if batch.get(name) is not None}
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            rates = encoder(**inputs, output_firing_rates=True).firing_rates
            tokens = mask.sum(-1, keepdim=True).double()
            counts = [rate.double() * tokens for rate in rates]
            totals = (
                [c.sum(0) for c in counts]
                if not totals
                else [t + c.sum(0) for t, c in zip(totals, counts, strict=True)]
            )
            spikes.append(torch.stack([c.sum(-1) for c in counts], dim=-1))
            lengths.append(tokens[:, 0])
    finally:
        encoder.train(was_training)
    if not lengths:
        raise ValueError("`batches` must hold at least one batch")
    all_lengths = torch.cat(lengths)
    return SpikeStatistics([total / all_lengths.sum() for total in totals], torch.cat(spikes), all_lengths)


def operation_counts(model: SNNBertPreTrainedModel, statistics: SpikeStatistics) -> list[OperationCount]:
    """Operations of the mean sentence, one row per kind of computation.

    A Linear adds one row of its weights per incoming spike, and its bias. A key's spike adds one component of the
    query to the score with every token, a value's spike one attention weight to the context of every token. The
    neurons, norms, the softmax and the read-out multiply, and are counted apart.

    Args:
        model: the SNN-BERT that `statistics` was measured on.
        statistics: from `measure_spikes`.
    """
    config = model.config
    lengths = statistics.lengths
    tokens = lengths.mean().item()
    pairs = lengths.square().mean().item()
    steps = config.num_timesteps
    modules = dict(model.base_model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, SpikingNeuron)]

    linears = OperationCount("linear layers", is_matrix_product=True)
    scores = OperationCount("attention scores (q k)", is_matrix_product=True)
    contexts = OperationCount("attention contexts (weights v)", is_matrix_product=True)
    neurons = OperationCount("neurons")
    for index, name in enumerate(names):
        neuron = modules[name]
        per_sentence = statistics.spikes[:, index]
        additions, multiplications = _neuron_operations(config, tokens)
        neurons.additions += additions * neuron.num_channels * tokens
        neurons.multiplications += multiplications * neuron.num_channels * tokens
        if name.endswith("key_neuron"):
            scores.additions += (per_sentence * lengths).mean().item()
        elif name.endswith("value_neuron"):
            contexts.additions += (per_sentence * lengths).mean().item()
        elif not name.endswith("query_neuron"):
            parent = modules[name.rsplit(".", 1)[0]]
            for linear in parent.children():
                if isinstance(linear, nn.Linear):
                    spikes = per_sentence.mean().item()
                    linears.additions += (spikes + tokens) * linear.out_features
    width, layers = config.hidden_size, config.num_hidden_layers
    rows = [
        linears,
        scores,
        contexts,
        neurons,
        OperationCount("gain of the queries", multiplications=layers * width * tokens),
    ]
    if config.attention_type == "softmax":
        # Per score: scaling, exponential and division count as multiplications, the sum as an addition.
        elements = layers * config.num_attention_heads * pairs
        rows.append(OperationCount("softmax", additions=elements, multiplications=3 * elements))
    norms = 2 * layers * width * tokens
    rows += [
        # Per element: mean and shift are additions; variance, division and gain are multiplications.
        OperationCount("layer norms", additions=2 * norms, multiplications=3 * norms),
        OperationCount("residual connections", additions=norms),
    ]
    for row in rows:
        row.additions *= steps
        row.multiplications *= steps
    embedded = width * tokens
    rows.append(OperationCount("embeddings", additions=4 * embedded, multiplications=3 * embedded))
    read_out = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".encoder." not in f".{name}"]
    rows.append(OperationCount("read-out", multiplications=sum(m.in_features * m.out_features for m in read_out)))
    return rows


def _neuron_operations(config: SNNBertConfig, tokens: float) -> tuple[float, float]:
    """Additions and multiplications of one neuron at one token (and time-step)."""
    if config.neuron_type == "lif":
        return 2.0, 1.0
    if config.neuron_type == "psn":
        return 1.0, tokens
    integration = (2 if config.bidirectional else 1) + (1 if config.normalize else 0)
    # A sweep of the reset integrates the spikes, scales the result, subtracts it and compares again.
    sweeps = config.reset_iterations
    return 1.0 + 2.0 * sweeps, integration * (1.0 + sweeps) + sweeps


def bert_multiplications(config, lengths: torch.Tensor) -> float:
    """MACs in the matrix products of a BERT's encoder of the same shape, for the mean of sentences of `lengths`."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    per_token = 4 * width * width + 2 * width * inner
    return layers * (per_token * lengths.mean().item() + 2 * width * lengths.square().mean().item())


def plot_firing_rates(rates: Sequence[torch.Tensor], names: Sequence[str], path: str | Path) -> None:
    """Draw a heat map of firing rates: one row per neuron layer, its channels from the busiest to the quietest.

    Args:
        rates: one `[channels]` tensor per neuron layer.
        names: their names, as from `model.neuron_names()`.
        path: the image file to write.
    """
    import matplotlib.pyplot as plt

    columns = max(len(rate) for rate in rates)
    rows = []
    for rate in rates:
        ordered = rate.float().cpu().sort(descending=True).values
        index = torch.arange(columns) * len(ordered) // columns
        rows.append(ordered[index])
    labels = [f"{short_name(name)}   {rate.float().mean().item():.2f}" for name, rate in zip(names, rates, strict=True)]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.19 * len(rows)), layout="constrained")
    image = axes.imshow(torch.stack(rows).numpy(), aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xticks([0, columns - 1], ["busiest neuron", "quietest neuron"], fontsize=8)
    axes.set_title("Firing rate of every neuron, layer by layer (mean rate beside the name)", fontsize=10)
    figure.colorbar(image, ax=axes, label="spikes per token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_spikes(
    spikes: Sequence[torch.Tensor], names: Sequence[str], tokens: Sequence[str], path: str | Path, *, channels: int = 96
) -> None:
    """Draw the spikes of one sentence: its tokens along the x-axis, the first `channels` neurons of each layer up.

    Args:
        spikes: one `[seq_len, channels]` tensor per panel.
        names: the panels' neuron layers.
        tokens: the sentence's tokens, `seq_len` of them.
        path: the image file to write.
        channels: how many neurons of each layer to show.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(spikes), 1, figsize=(2 + 0.42 * len(tokens), 2.2 * len(spikes)), sharex=True, layout="constrained"
    )
    for axes, spike, name in zip(panels if len(spikes) > 1 else [panels], spikes, names, strict=True):
        shown = spike[:, :channels].cpu()
        for value, color in ((1, "tab:blue"), (-1, "tab:red")):
            token, channel = torch.where(shown == value)
            axes.scatter(token, channel, s=5, marker="s", color=color, linewidths=0)
        axes.set_xlim(-0.5, len(tokens) - 0.5)
        axes.set_ylim(-1, shown.shape[1])
        axes.set_ylabel("neuron", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{short_name(name)}: {spike.abs().float().mean().item():.2f} spikes per token", fontsize=9)
        axes.vlines([t + 0.5 for t in range(len(tokens) - 1)], -1, shown.shape[1], color="0.9", linewidth=0.5)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=9)
    figure.suptitle("Each square is a spike; a token is a time-step", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def short_name(name: str) -> str:
    """`encoder.layer.3.attention.self.query_neuron` as `layer 3, query`."""
    parts = name.split(".")
    layer = parts[parts.index("layer") + 1]
    return f"layer {layer}, {NEURON_PLACES['.'.join(parts[parts.index('layer') + 2 :])]}"
