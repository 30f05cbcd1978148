"""A demonstration of SNN-BERT for the browser: the label, the spikes, the firing rates and the energy of a sentence.

    python examples/space/app.py outputs/quickstart/model

or, as on a Hugging Face Space, `python app.py` with the checkpoint (a folder or a Hub id) in SNN_BERT_MODEL. Visitors
may name other checkpoints on the Hub; these run on the package's own code and never on code from their repository.
"""

import argparse
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

# Before gradio is imported: it would report home otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import pandas as pd
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from modeling_snn_bert.commands.common import FAILURES
from modeling_snn_bert.commands.common import load as load_with_tokenizer
from modeling_snn_bert.energy import EnergyReport, energy_report
from modeling_snn_bert.energy.plots import RASTER_TOKENS, plot_spikes, raster_panels
from modeling_snn_bert.energy.tables import CONVENTIONS, comparison_section
from modeling_snn_bert.layer_places import place_of
from modeling_snn_bert.loading import predicted, tokenized_batches

EXAMPLES = [
    "A gripping, beautifully acted film that stays with you for days.",
    "Two hours of clumsy jokes and not one of them lands.",
    "The plot is thin, but the music and the two leads make it a pleasure.",
]
MAX_CHARACTERS = 2000
OVERVIEW = "near the input, in the middle, near the output"
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#headline {font-size: 1.05rem}
#raster img {object-fit: contain; background: white}
"""


def build(default: str) -> gr.Blocks:
    """The page; `default` is the checkpoint that it starts with, a folder or a Hub id, or empty."""

    def analyse(sentence: str, checkpoint: str, shown: str) -> tuple:
        checkpoint = checkpoint.strip() or default
        check_request(sentence, checkpoint, default)
        try:
            model, tokenizer = load(checkpoint)
            (batch,) = tokenized_batches(model, tokenizer, [sentence], 1)
            report = energy_report(model, [batch], run_lengths=False)
            label = predicted(model, batch)
        except FAILURES as error:
            raise gr.Error(f"{Path(checkpoint).name if checkpoint == default else checkpoint}: {error}") from error
        tokens = tokenizer.convert_ids_to_tokens(report.statistics.example_ids)
        choices = [OVERVIEW, *(f"all neuron layers of layer {i}" for i in range(model.config.num_hidden_layers))]
        # Another checkpoint may have fewer layers than the one before.
        shown = shown if shown in choices else OVERVIEW
        raster = draw_raster(report, tokens, choices.index(shown) - 1)
        return (
            gr.Label(label, visible=label is not None),
            headline(report, len(tokens), checkpoint),
            gr.Dropdown(choices=choices, value=shown),
            raster,
            firing_rate_frame(report),
            energy_plot(report),
            energy_table(report),
        )

    with gr.Blocks(title="SNN-BERT", analytics_enabled=False) as page:
        gr.Markdown(
            "# SNN-BERT\nA BERT whose matrix products run on binary spikes: type a sentence and see where its neurons "
            "fire, and what that costs beside a BERT of the same shape."
        )
        with gr.Row():
            with gr.Column(scale=3):
                sentence = gr.Textbox(label="Sentence", value=EXAMPLES[0], lines=2, max_length=MAX_CHARACTERS)
                checkpoint = gr.Textbox(
                    label="Checkpoint",
                    info="An SNN-BERT on the Hugging Face Hub, such as owner/name; empty for this demo's own.",
                    placeholder=Path(default).name or "owner/name",
                )
                button = gr.Button("Show the spikes", variant="primary")
                gr.Examples(EXAMPLES, sentence, label="Try one of these")
            with gr.Column(scale=2):
                label = gr.Label(label="What the model says", num_top_classes=5)
                summary = gr.Markdown(elem_id="headline")
        shown = gr.Dropdown([OVERVIEW], value=OVERVIEW, label="Neuron layers to show", interactive=True)
        raster = gr.Image(
            label="Raster of the spikes", show_label=False, format="png", interactive=False, elem_id="raster",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Row():
            rates = gr.BarPlot(
                x="layer", y="spikes per token", title="Firing rate of each encoder layer", height=320,
                x_title="encoder layer", y_lim=[0, None],
            )  # fmt: skip
            energies = gr.BarPlot(
                x="model", y="uJ", color="part", title="Energy of this sentence", height=320,
                y_title="uJ (45 nm, arithmetic)", x_title="", x_label_angle=-25,
                color_map={"matrix products": "#1f4e8c", "all other arithmetic": "#b9c3cf"},
            )  # fmt: skip
        with gr.Accordion("The figures, and what is counted", open=False):
            table = gr.Markdown()
        request: dict[str, Any] = {
            "fn": analyse,
            "inputs": [sentence, checkpoint, shown],
            "outputs": [label, summary, shown, raster, rates, energies, table],
        }
        button.click(**request, api_name="analyse")
        sentence.submit(**request, api_visibility="private")
        shown.input(**request, api_visibility="private")
    return page


def check_request(sentence: str, checkpoint: str, default: str) -> None:
    """Refuse what cannot work, and what a visitor has no business with.

    Raises:
        gr.Error: for an empty or an overlong sentence, for no checkpoint, and for a checkpoint that is neither the
            demo's own nor a Hub id.
    """
    if not sentence.strip():
        raise gr.Error("Type a sentence first.", title="No sentence")
    if len(sentence) > MAX_CHARACTERS:
        raise gr.Error(f"At most {MAX_CHARACTERS:,} characters, this has {len(sentence):,}.", title="Too long")
    if not checkpoint:
        raise gr.Error("Name a checkpoint on the Hub, such as owner/name.", title="No checkpoint")
    if checkpoint == default:
        return
    try:
        validate_repo_id(checkpoint)
        # A visitor must not look around in the folders of the server.
        is_id = checkpoint.count("/") == 1 and not Path(checkpoint).exists()
    except HFValidationError:
        is_id = False
    if not is_id:
        raise gr.Error(f"{checkpoint!r} is no Hub id, which looks like owner/name.", title="Checkpoint")


# Model and tokenizer of a checkpoint. It runs no code from there, so that a visitor may name any repository.
load = functools.lru_cache(maxsize=2)(functools.partial(load_with_tokenizer, revision=None))


def draw_raster(report: EnergyReport, tokens: list[str], layer: int) -> Image.Image:
    """The picture of the spikes in all neuron layers of an encoder layer, or in three of the whole model (-1)."""
    names, spikes = report.statistics.names, report.statistics.example_spikes
    panels = raster_panels(names) if layer < 0 else [i for i, name in enumerate(names) if place_of(name)[0] == layer]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spikes.png")
        plot_spikes([spikes[i] for i in panels], [names[i] for i in panels], tokens, path)
        with Image.open(path) as image:
            return image.convert("RGB")


def headline(report: EnergyReport, tokens: int, checkpoint: str) -> str:
    """The result in two sentences."""
    own, bert = report.cost, report.bert
    int8 = next(cost for cost in report.costs if cost.name == "BERT, int8")
    rates = list(report.firing_rates().values())
    lines = [
        f"**{own.picojoules / 1e6:,.2f} uJ** for this sentence, where a float32 BERT of the same shape takes "
        f"{bert.picojoules / 1e6:,.2f} uJ: **{bert.picojoules / own.picojoules:.1f} times less**. An int8 BERT "
        f"takes {int8.picojoules / 1e6:,.2f} uJ. Counted are all arithmetic operations, neurons and softmax included, "
        "at a published price each; memory traffic is not.",
        f"A neuron fires at **{sum(rates) / len(rates):.1%}** of the tokens on average.",
        f"<small>{report.model}, {Path(checkpoint).name}, {tokens} tokens</small>",
    ]
    if tokens > RASTER_TOKENS:
        lines.append(f"The picture shows the first {RASTER_TOKENS} tokens.")
    return "\n\n".join(lines)


def firing_rate_frame(report: EnergyReport) -> pd.DataFrame:
    """A row for each encoder layer: the mean over its neuron layers."""
    layers: dict[int, list[float]] = {}
    for name, rate in report.firing_rates().items():
        layers.setdefault(place_of(name)[0], []).append(rate)
    rows = [(str(layer), sum(rates) / len(rates)) for layer, rates in layers.items()]
    return pd.DataFrame(rows, columns=["layer", "spikes per token"])


def energy_plot(report: EnergyReport) -> gr.BarPlot:
    """A bar for each model, in the order of the report and with names that fit below it."""
    rows, names = [], []
    for cost in report.costs:
        names.append(cost.name.replace("BERT with 1-bit activations", "1-bit"))
        products = cost.matrix_product_picojoules / 1e6
        rows.append((names[-1], "matrix products", products))
        rows.append((names[-1], "all other arithmetic", cost.picojoules / 1e6 - products))
    return gr.BarPlot(pd.DataFrame(rows, columns=["model", "part", "uJ"]), sort=names)


def energy_table(report: EnergyReport) -> str:
    """The energies and the firing rates as tables, with what is counted."""
    rates = ["## Mean firing rate of each neuron layer, in spikes per token", "", *report.firing_rate_table()]
    return "\n".join([*comparison_section(report.costs), *rates, CONVENTIONS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_name_or_path", nargs="?", default=os.environ.get("SNN_BERT_MODEL", ""),
        help="an SNN-BERT: folder or Hub id (default: SNN_BERT_MODEL)",
    )  # fmt: skip
    parser.add_argument("--server_port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args()
    if args.model_name_or_path:
        try:
            load(args.model_name_or_path)
        except FAILURES as error:
            parser.error(str(error))
    # No fonts from elsewhere: the page must not tell another server who looks at it.
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    build(args.model_name_or_path).launch(
        server_port=args.server_port, theme=gr.themes.Soft(**fonts), css=CSS, ssr_mode=False, show_error=True
    )


if __name__ == "__main__":
    main()
