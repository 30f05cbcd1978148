"""Pictures of what the neurons do and of what it costs. They need matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..atomic_writes import written_whole
from ..layer_places import place_of, short_name
from .operation_counts import ModelCost

# Of a sentence, so many tokens fit side by side.
RASTER_TOKENS = 48
# One colour per part, so that the same part looks the same in every picture; matrix products are blue.
PART_COLORS = {
    "Linear": "#1f4e8c",
    "QK^T": "#4a86c8",
    "attention x V": "#9dc3e6",
    "neurons": "#d9622b",
    "softmax": "#e8b04a",
    "position bias": "#c9a227",
    "attention scaling": "#f2d28a",
    "query gain and offset": "#b07aa1",
    "LayerNorm": "#59a14f",
    "residual": "#9bcf8f",
    "biases": "#8c8c8c",
    "embeddings": "#76b7b2",
    "mean over time-steps": "#c9c9c9",
    "pooler": "#7f6a5a",
    "classifier": "#4d4d4d",
}


def import_pyplot():
    """`matplotlib.pyplot`, drawing into files only.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: `pip install matplotlib`, or leave them out") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: str | Path) -> None:
    """Write the image whole or not at all, and close the figure."""
    try:
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=130)
    finally:
        import_pyplot().close(figure)


def plot_energy(costs: Sequence[ModelCost], path: str | Path) -> None:
    """Draw the energy of the arithmetic: of the first model layer by layer and part by part, and of all models.

    Args:
        costs: the model's, then those of the models that it is compared with.
        path: the image file to write.
    """
    plt = import_pyplot()
    own = costs[0]
    layers = sorted({row.layer for row in own.rows if row.layer is not None})
    columns = ["in", *map(str, layers), "out"]
    energies = {part.part: [0.0] * len(columns) for part in own.by_part()}
    for row in own.rows:
        column = row.layer + 1 if row.layer is not None else 0 if row.part == "embeddings" else len(columns) - 1
        energies[row.part][column] += row.picojoules / 1e6
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5), width_ratios=(1.5, 1), layout="constrained", gridspec_kw={"wspace": 0.06}
    )
    bottom = [0.0] * len(columns)
    for part, heights in energies.items():
        left.bar(columns, heights, bottom=bottom, label=part, color=PART_COLORS[part], width=0.8)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    left.set_xlabel("embeddings, encoder layers, read-out")
    left.set_ylabel("uJ per sequence (45 nm, arithmetic only)")
    left.set_title(f"{own.name}, layer by layer", fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    names = [cost.name.replace(" with ", "\nwith ").replace(", zeros", ",\nzeros") for cost in costs]
    products = [cost.matrix_product_picojoules / 1e6 for cost in costs]
    others = [cost.picojoules / 1e6 - product for cost, product in zip(costs, products, strict=True)]
    right.barh(names, products, color=PART_COLORS["Linear"], label="matrix products")
    right.barh(names, others, left=products, color="0.7", label="all other arithmetic")
    for index, cost in enumerate(costs):
        energy = cost.picojoules / 1e6
        text = f" {energy:,.0f}" if energy >= 100 else f" {energy:.3g}"
        right.text(energy, index, text, va="center", fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.14)
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel("uJ per sequence")
    right.set_title("all models, the same sequences", fontsize=11)
    right.legend(fontsize=8, loc="lower right", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_firing_rates(rates: Sequence[torch.Tensor], names: Sequence[str], path: str | Path) -> None:
    """Draw a heat map of firing rates: one row per neuron layer, its channels from the busiest to the quietest.

    Args:
        rates: one `[channels]` tensor per neuron layer.
        names: their names, as from `model.neuron_names()`.
        path: the image file to write.
    """
    plt = import_pyplot()

    columns = max(len(rate) for rate in rates)
    rows = []
    for rate in rates:
        ordered = rate.float().cpu().sort(descending=True).values
        index = torch.arange(columns) * len(ordered) // columns
        rows.append(ordered[index])
    labels = [f"{short_name(name)}   {rate.float().mean().item():.2f}" for name, rate in zip(names, rates, strict=True)]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.19 * len(rows)), layout="constrained")
    shown = torch.stack(rows)
    # Up to the busiest neuron's rate, in steps of a tenth: most rates are far below 1.
    highest = max(math.ceil(10 * shown.max().item()) / 10, 0.1)
    image = axes.imshow(shown.numpy(), aspect="auto", vmin=0, vmax=highest, cmap="magma", interpolation="nearest")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xticks([0, columns - 1], ["busiest neuron", "quietest neuron"], fontsize=8)
    axes.set_title("Firing rate of every neuron, layer by layer (mean rate beside the name)", fontsize=10)
    figure.colorbar(image, ax=axes, label="spikes per token")
    save_figure(figure, path)


def plot_spikes(
    spikes: Sequence[torch.Tensor], names: Sequence[str], tokens: Sequence[str], path: str | Path, *, channels: int = 96
) -> None:
    """Draw the spikes of one sentence: its first `RASTER_TOKENS` tokens to the right, `channels` neurons a layer up.

    Args:
        spikes: one `[seq_len, channels]` tensor per panel.
        names: the panels' neuron layers.
        tokens: the sentence's tokens, `seq_len` of them.
        path: the image file to write.
        channels: how many neurons of each layer to show.
    """
    plt = import_pyplot()
    spikes, tokens = [spike[:RASTER_TOKENS] for spike in spikes], tokens[:RASTER_TOKENS]
    figure, panels = plt.subplots(
        len(spikes), 1, figsize=(max(6, 2 + 0.42 * len(tokens)), 2.2 * len(spikes)), sharex=True, layout="constrained"
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
    save_figure(figure, path)


def raster_panels(names: Sequence[str]) -> list[int]:
    """Three neuron layers for a raster: near the input, in the middle and near the output."""
    layers = 1 + max(place_of(name)[0] for name in names)
    shown = (0, "attention.self.neuron"), (layers // 2, "output.neuron"), (layers - 1, "attention.output.neuron")
    indices = {(layer, place.neuron): index for index, (layer, place) in enumerate(map(place_of, names))}
    return [indices[panel] for panel in shown]
