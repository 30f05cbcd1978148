"""The command `snn-bert`: train, run and serve a spiking classifier, convert a BERT, and look at an SNN-BERT.

Exit codes: 0 if all went well, 2 for a command line that makes no sense, 1 for anything that fails later, such as a
checkpoint that cannot be read. Errors are one message on stderr; SNN_BERT_TRACEBACK=1 shows where they come from.
"""

import json
import math
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoTokenizer

from . import __version__
from .atomic_writes import folder_written_whole
from .commands.common import (
    HEADS,
    BatchSize,
    DataFile,
    Encoding,
    FiringRate,
    MaxLength,
    Model,
    Revision,
    TextColumn,
    at_least_one,
    check_output_folder,
    load,
    load_bert,
    reported,
)
from .commands.predict import predict
from .commands.serve import serve
from .commands.train import train
from .conversion import convert_bert, initialize_from_bert, is_neuron_parameter
from .cpu_kernels import kernel_facts
from .energy import energy_report, measure_spikes, measured_energy
from .energy.joules import find_counters
from .energy.plots import RASTER_TOKENS, import_pyplot, plot_spikes, raster_panels
from .layer_places import place_of, short_name
from .loading import load_model, predicted, tokenized_batches
from .modeling_snn_bert import SNNBertForSequenceClassification, SNNBertForTokenClassification, SNNBertPreTrainedModel
from .settings import parse_settings
from .spike_observer import named_neurons
from .text_files import read_texts

TOKEN_WIDTH = 16
MaxSamples = Annotated[
    int, typer.Option("--max_samples", callback=at_least_one, help="Use only the first so many texts.")
]

app = typer.Typer(
    help="Train, run and serve a spiking text classifier, convert a BERT, and look at what an SNN-BERT does and costs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script. Ends the process with an exit code."""
    # As Ctrl-C does, so that no half-written folder is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(prog_name="snn-bert")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snn-bert {__version__} (torch {torch.__version__}, transformers {transformers.__version__})")
        raise typer.Exit


@app.callback(epilog="snn-bert COMMAND --help has examples. SNN_BERT_TRACEBACK=1 shows where an error comes from.")
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    # The bars of a checkpoint that loads in a second would only stand between the lines of the output.
    transformers.utils.logging.disable_progress_bar()


@app.command(
    epilog="Example: snn-bert convert my-bert my-snn-bert --data_file train.tsv --firing_rate 0.15 "
    "--setting spike_type=ternary"
)
def convert(
    bert: Annotated[
        str, typer.Argument(metavar="BERT", help="A BERT checkpoint: a folder or a Hub id.", show_default=False)
    ],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", help="The folder to write, whole or not at all.", show_default=False)
    ],
    data_file: DataFile,
    text_column: TextColumn = "sentence",
    encoding: Encoding = "utf-8",
    firing_rate: FiringRate = 0.2,
    head: Annotated[
        str | None, typer.Option("--head", help=f"One of {', '.join(HEADS)} (default: the checkpoint's own).")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            "--config_overrides",
            metavar="NAME=VALUE",
            help="Settings of SNNBertConfig, with commas between them; may be given several times.",
        ),
    ] = None,
    max_samples: MaxSamples = 512,
    max_length: MaxLength = None,
    batch_size: BatchSize = 16,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in the folder.")] = False,
) -> None:
    """Convert a BERT, or an MPNet, to an SNN-BERT, calibrated on your text.

    Thresholds are set for the wanted firing rate, and the weights are fitted to spikes, layer by layer. Some 10,000
    tokens are enough. Fine-tune or distil the result to win back accuracy.
    """
    if head is not None and head not in HEADS:
        raise typer.BadParameter(f"must be one of {', '.join(HEADS)}, got {head!r}", param_hint="--head")
    check_output_folder(output_dir, overwrite, "OUTPUT_DIR")
    try:
        settings = parse_settings(setting)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--setting") from error
    with reported():
        texts = read_texts(data_file, text_column, encoding)[:max_samples]
        model = load_bert(bert, head, revision)
        tokenizer = AutoTokenizer.from_pretrained(bert, revision=revision or "main")
        # An uncalibrated copy knows what batches the spiking model takes, and refuses bad settings before the work.
        batches = tokenized_batches(initialize_from_bert(model, **settings), tokenizer, texts, batch_size, max_length)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        typer.echo(f"calibrating on {len(texts):,} texts, {tokens:,} tokens")
        if tokens < 5000:
            typer.echo("Warning: some 10,000 tokens give a better calibration", err=True)
        spiking = convert_bert(model, batches, firing_rate, **settings)
        rates = measure_spikes(spiking, batches[: math.ceil(128 / batch_size)]).rates
        with folder_written_whole(output_dir) as temporary:
            spiking.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    means = [rate.mean().item() for rate in rates]
    typer.echo(f"firing rate {sum(means) / len(means):.3f} (neuron layers from {min(means):.3f} to {max(means):.3f})")
    typer.echo(f"{type(spiking).__name__} written to {output_dir}")


@app.command(epilog="Example: snn-bert energy my-snn-bert --data_file validation.tsv --output_dir outputs/energy")
def energy(
    model: Model,
    data_file: DataFile,
    text_column: TextColumn = "sentence",
    encoding: Encoding = "utf-8",
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="An SNN-BERT with repeat coding to measure on the same texts.")
    ] = None,
    max_samples: MaxSamples = 256,
    max_length: MaxLength = None,
    batch_size: BatchSize = 16,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the report goes.")] = Path("outputs/energy"),
    plots: Annotated[bool, typer.Option("--plots/--no_plots", help="Draw the pictures (needs matplotlib).")] = True,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also measure joules by the processor's counters (RAPL); takes half a minute."),
    ] = False,
    revision: Revision = None,
) -> None:
    """Count operations and energy on real text, beside a BERT's.

    Writes report.html, report.md, report.json and pictures of energy, firing rates and spikes, and prints the report.
    """
    with reported():
        if plots:
            import_pyplot()
        try:
            counters = find_counters() if measure else None
        except RuntimeError as error:
            raise RuntimeError(f"{error}; or leave out --measure: the estimates need no counters") from error
        texts = read_texts(data_file, text_column, encoding)[:max_samples]
        snn_bert, tokenizer = load(model, revision)
        rival = load_model(baseline) if baseline else None
        batches = tokenized_batches(snn_bert, tokenizer, texts, batch_size, max_length)
        report = energy_report(snn_bert, batches, baseline=rival)
        if counters is not None:
            report.measured = measured_energy(snn_bert, batches, counters)
        tokens = tokenizer.convert_ids_to_tokens(report.statistics.example_ids)
        files = report.save(output_dir, tokens=tokens, plots=plots)
    typer.echo(report.to_markdown())
    typer.echo(f"written to {output_dir}: {', '.join(file.name for file in files)}")


@app.command(
    epilog='Examples: snn-bert spikes my-snn-bert "a joy from start to end" --layer 0; '
    'snn-bert spikes my-snn-bert "a joy" --output_file spikes.png'
)
def spikes(
    model: Model,
    sentence: Annotated[str, typer.Argument(metavar="SENTENCE", help="The sentence.", show_default=False)],
    layer: Annotated[
        list[int] | None,
        typer.Option(
            "--layer", help="Show all neuron layers of this encoder layer, the first is 0; may be given several times."
        ),
    ] = None,
    channels: Annotated[
        int, typer.Option("--channels", callback=at_least_one, help="Neurons of each neuron layer to show.")
    ] = 96,
    output_file: Annotated[
        Path | None, typer.Option("--output_file", help="A picture to write, such as spikes.png, in place of text.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Show where the neurons fire in a sentence: in the terminal, or as a picture.

    A token is a time-step: each line of the raster is a token and each column a neuron. By default it shows a neuron
    layer near the input, one in the middle and one near the output.
    """
    if not sentence.strip():
        raise typer.BadParameter("must hold at least one word", param_hint="SENTENCE")
    if output_file is not None and output_file.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"must end in .png, .svg or .pdf, got {output_file}", param_hint="--output_file")
    with reported():
        if output_file is not None:
            import_pyplot()
        snn_bert, tokenizer = load(model, revision)
        names = snn_bert.neuron_names()
        panels = chosen_panels(names, layer)
        (batch,) = tokenized_batches(snn_bert, tokenizer, [sentence], 1)
        statistics = measure_spikes(snn_bert, [batch])
        tokens = tokenizer.convert_ids_to_tokens(statistics.example_ids)
        prediction = predicted(snn_bert, batch)
        rasters = [statistics.example_spikes[i] for i in panels]
        if output_file is not None:
            plot_spikes(rasters, [names[i] for i in panels], tokens, output_file, channels=channels)
    if prediction is not None:
        typer.echo(prediction_text(snn_bert, prediction))
    if output_file is not None:
        cut = f" (the first {RASTER_TOKENS} of {len(tokens)} tokens)" if len(tokens) > RASTER_TOKENS else ""
        typer.echo(f"written to {output_file}{cut}")
        return
    for raster, index in zip(rasters, panels, strict=True):
        rate = raster.abs().float().mean().item()
        typer.echo(f"\n{short_name(names[index])}: {rate:.3f} spikes per token, {raster.shape[1]} neurons")
        for line in raster_lines(raster[:, :channels], tokens):
            typer.echo(line)


@app.command(epilog="Example: snn-bert info my-snn-bert --json")
def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="An SNN-BERT checkpoint: a folder or a Hub id.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    revision: Revision = None,
) -> None:
    """Show the kernels in use and, of a checkpoint, head, sizes, parameters, neurons and their settings."""
    with reported():
        facts = {} if model is None else checkpoint_facts(load_model(model, revision))
    facts["CPU"] = kernel_facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        typer.echo(section)
        width = max(map(len, values))
        for name, value in values.items():
            typer.echo(f"  {name:<{width}}  {fact_text(value)}")


app.command(epilog="Example: snn-bert train --data reviews.csv --model my-bert --output my-model --text_column review")(
    train
)
app.command(epilog="Example: snn-bert predict my-model texts.txt --output_file predictions.csv")(predict)
app.command(
    epilog="""Example: snn-bert serve my-model --port 8000, and then: curl 127.0.0.1:8000/predict -H
    'Content-Type: application/json' -d '{"texts": ["a joy"]}'"""
)(serve)


def chosen_panels(names: Sequence[str], layers: Sequence[int] | None) -> list[int]:
    """Indices of the neuron layers to show: all of the given encoder layers, or three by default.

    Raises:
        ValueError: for an encoder layer that the model does not have.
    """
    if not layers:
        return raster_panels(names)
    places = [place_of(name) for name in names]
    count = 1 + max(layer for layer, _ in places)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"--layer must lie in [0, {count}), the layers of the model, got {layer}")
    return [index for layer in layers for index, (other, _) in enumerate(places) if other == layer]


def prediction_text(model: SNNBertPreTrainedModel, prediction: dict[str, float] | str) -> str:
    """What `predicted` gives for a reader: all labels if several may hold, else the likeliest."""
    if isinstance(prediction, str):
        return f"value: {prediction}"
    if model.config.problem_type == "multi_label_classification":
        return "labels: " + ", ".join(f"{label} ({score:.3f})" for label, score in prediction.items())
    label, score = max(prediction.items(), key=lambda item: item[1])
    return f"label: {label} ({score:.3f})"


def raster_lines(spikes: torch.Tensor, tokens: Sequence[str]) -> list[str]:
    """A line for each token: its name, then a mark for each spike and a dot for each neuron that is silent.

    Args:
        spikes (`[tokens, channels]`): a spike of -1 is shown by `-`.
        tokens: the names.
    """
    try:
        "█·…".encode(sys.stdout.encoding or "ascii")
        marks = {0: "·", 1: "█", -1: "-"}
    except UnicodeEncodeError:
        marks = {0: ".", 1: "#", -1: "-"}
    lines = []
    for token, row in zip(tokens, spikes.tolist(), strict=True):
        # Control characters would move the cursor; wide characters take two columns.
        name = "".join(c if c.isprintable() else "?" for c in token)[:TOKEN_WIDTH]
        width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name)
        lines.append(name + " " * (TOKEN_WIDTH - width + 1) + "".join(marks[int(value)] for value in row))
    return lines


def fact_text(value: Any) -> str:
    """A value of `checkpoint_facts` for a reader."""
    if isinstance(value, dict):
        return "{mean:.4g} on average, from {min:.4g} to {max:.4g}".format(**value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def checkpoint_facts(model: SNNBertPreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `info` shows, by section."""
    config = model.config
    neurons = dict(named_neurons(model))
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_neurons = sum(count for name, count in parameters.items() if is_neuron_parameter(name))
    settings = "hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings vocab_size"
    firing = (
        "neuron_type coding num_timesteps psn_length attention_type spike_type reset_iterations normalize "
        "bidirectional surrogate surrogate_alpha firing_rate_target firing_rate_weight"
    )
    facts: dict[str, dict[str, Any]] = {
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameters.values()),
            "parameters of neurons": of_neurons,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "sizes": {name: getattr(config, name) for name in settings.split()},
        "firing settings": {name: getattr(config, name) for name in firing.split()},
        "neurons": {
            "neuron layers": len(neurons),
            "neurons": sum(neuron.num_channels for neuron in neurons.values()),
            "kinds": [f"{count} {kind}" for kind, count in Counter(type(n).__name__ for n in neurons.values()).items()],
        },
    }
    for attribute in ("v_threshold", "decay", "decay_forward", "decay_backward", "soft_reset"):
        values = [getattr(n, attribute).detach().float().flatten() for n in neurons.values() if hasattr(n, attribute)]
        if values:
            x = torch.cat(values)
            facts["neurons"][attribute] = {"mean": x.mean().item(), "min": x.min().item(), "max": x.max().item()}
    if isinstance(model, (SNNBertForSequenceClassification, SNNBertForTokenClassification)):
        facts["model"]["labels"] = list(config.id2label.values())
    return facts
