"""What the commands share: options, messages and folders."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import transformers
import typer
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion import FAMILIES, HEADS, Original, is_neuron_parameter
from ..loading import load_model, too_short
from ..modeling_snn_bert import SNNBertForSequenceClassification, SNNBertPreTrainedModel

Loaded = TypeVar("Loaded", bound=PreTrainedModel)

# What bad files, settings and checkpoints raise. Anything else is a bug here, and deserves its traceback.
FAILURES = (ImportError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError)


def at_least(least: int) -> Callable[[int | None], int | None]:
    """A callback of an option that refuses lower numbers."""

    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise typer.BadParameter(f"must be >= {least}, got {value}")
        return value

    return check


at_least_one = at_least(1)
# Tokens of a text at least: one of it, and two special ones.
long_enough = at_least(3)


def fraction(value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"must lie in (0, 1), got {value}")
    return value


def text_encoding(value: str) -> str:
    """The name of an encoding of text that Python knows, else a usage error."""
    try:
        "a".encode(value)
    except (LookupError, ValueError) as error:
        raise typer.BadParameter(f"must be an encoding such as utf-8 or cp1252, got {value!r}") from error
    return value


# Settings of an option or argument that is a file to read.
READABLE: dict[str, Any] = {"exists": True, "dir_okay": False, "readable": True, "show_default": False}
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="An SNN-BERT checkpoint: a folder or a Hub id.", show_default=False)
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, for a checkpoint on the Hub.")]
DataFile = Annotated[
    Path,
    typer.Option(
        "--data_file",
        help="Texts of the task: .txt (a line each), .csv or .tsv with a header, .json or .jsonl.",
        **READABLE,
    ),
]
TextColumn = Annotated[str, typer.Option("--text_column", help="Name of the column of texts.")]
FoundTextColumn = Annotated[
    str | None, typer.Option("--text_column", help="The column of texts (default: found by its name).")
]
TextPairColumn = Annotated[
    str | None,
    typer.Option("--text_pair_column", help="The column of second texts, for pairs of texts (default: single texts)."),
]
Encoding = Annotated[
    str, typer.Option("--encoding", callback=text_encoding, help="How the file spells characters, such as cp1252.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max_length", callback=long_enough, help="Cut texts at so many tokens (default: what the model takes)."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch_size", callback=at_least_one, help="Texts that run at once.")]
FiringRate = Annotated[
    float, typer.Option("--firing_rate", callback=fraction, help="Spikes per token to calibrate each neuron to.")
]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns a failure into a message and exit code 1."""
    try:
        yield
    except FAILURES as error:
        if os.environ.get("SNN_BERT_TRACEBACK"):
            raise
        # Of a folder that is not there transformers passes on only what the Hub's client says of its name.
        is_no_name = isinstance(error.__cause__, HFValidationError)
        lost = "there is no such folder, nor may a name on the Hub be so: " if is_no_name else ""
        typer.echo(f"Error: {lost}{error}", err=True)
        raise typer.Exit(1) from error


def check_output_folder(path: Path, overwrite: bool, hint: str) -> None:
    """Raise a usage error about the argument `hint` unless `path` is free, or holds a checkpoint to be replaced."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not (path / "config.json").is_file():
            raise typer.BadParameter(f"{path} exists and is no checkpoint: name a new folder", param_hint=hint)
        if not overwrite:
            raise typer.BadParameter(f"{path} exists: name a new folder, or give --overwrite", param_hint=hint)


def check_max_length(max_length: int | None, tokenizer: PreTrainedTokenizerBase, pairs: bool) -> None:
    """Raise a usage error if `--max_length` leaves no room for a token of each text."""
    wrong = None if max_length is None else too_short(max_length, tokenizer, pairs)
    if wrong:
        raise typer.BadParameter(wrong, param_hint="--max_length")


def load(model_name_or_path: str, revision: str | None) -> tuple[SNNBertPreTrainedModel, PreTrainedTokenizerBase]:
    """An SNN-BERT and its tokenizer."""
    model = load_model(model_name_or_path, revision)
    return model.eval(), AutoTokenizer.from_pretrained(
        model_name_or_path, revision=revision or "main", trust_remote_code=False
    )


def load_bert(model_name_or_path: str, head: str | None, revision: str | None, **settings) -> Original:
    """The BERT, or MPNet, of a checkpoint, with `head` (one of `HEADS`) or the head that it was saved with.

    `settings` are further arguments of `from_pretrained`.

    Raises:
        ValueError: if it is neither, or has a head that SNN-BERT lacks.
        OSError: if there is no such checkpoint.
    """
    config = PreTrainedConfig.get_config_dict(model_name_or_path, revision=revision)[0]
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{model_name_or_path} must be a BERT or an MPNet, its model_type is {model_type!r}")
    family = FAMILIES[model_type]
    own = (config.get("architectures") or [f"{family}Model"])[0].removeprefix(family).removeprefix("For")
    if head is None and own not in HEADS:
        raise ValueError(
            f"{model_name_or_path} has the head {own!r}, which SNN-BERT lacks: give --head with one of "
            f"{', '.join(HEADS)}"
        )
    model_class = getattr(transformers, family + HEADS[head or own])
    return load_weights(model_class, model_name_or_path, revision, **settings).eval()


def load_weights(model_class: type[Loaded], model_name_or_path: str, revision: str | None, **settings) -> Loaded:
    """`model_class` with the weights of a checkpoint; those that it lacks are named, in place of transformers' table.

    `settings` are further arguments of `from_pretrained`.

    Raises:
        ValueError: if it lacks some of the encoder.
        OSError: if there is no such checkpoint.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, loading = model_class.from_pretrained(
            model_name_or_path, revision=revision or "main", output_loading_info=True, **settings
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    # A weight of another shape is new as well.
    missing = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    new = sorted(name for name in missing if not is_neuron_parameter(name))
    if any(".encoder." in f".{name}" for name in new):
        raise ValueError(f"{model_name_or_path} lacks weights of the encoder: {', '.join(new[:5])}")
    if new:
        typer.echo(f"not in {model_name_or_path}, and so random until trained: {', '.join(new)}", err=True)
    return model


def load_classifier(
    model_name_or_path: str, revision: str | None
) -> tuple[SNNBertForSequenceClassification, PreTrainedTokenizerBase]:
    """A classifier of one label per text, and its tokenizer.

    Raises:
        ValueError: if the checkpoint is of another kind.
        OSError: if there is none.
    """
    model, tokenizer = load(model_name_or_path, revision)
    if not isinstance(model, SNNBertForSequenceClassification):
        raise ValueError(
            f"{model_name_or_path} must be a classifier of texts, it is a {type(model).__name__}: "
            "make one with `snn-bert train`"
        )
    if model.config.problem_type not in (None, "single_label_classification") or model.config.num_labels < 2:
        raise ValueError(
            f"{model_name_or_path} must give one label of several to a text, its problem_type is "
            f"{model.config.problem_type!r} with {model.config.num_labels} labels"
        )
    return model, tokenizer
