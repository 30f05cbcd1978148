"""`snn-bert train`: a spiking classifier of the texts in a file, with a report and a model card."""

import hashlib
import math
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, set_seed

from ..atomic_writes import folder_written_whole
from ..configuration_snn_bert import SNNBertConfig
from ..fine_tuning import (
    DISTILLATION_STEPS,
    LABELS_RATE,
    NO_DROPOUT,
    TAUGHT_RATE,
    Recipe,
    classifier_settings,
    train_classifier,
    write_report,
)
from ..modeling_snn_bert import SNNBertForSequenceClassification
from ..text_files import Labelled, parts, read_labelled, shortened
from .common import (
    READABLE,
    Encoding,
    FiringRate,
    FoundTextColumn,
    Revision,
    TextPairColumn,
    at_least_one,
    check_max_length,
    check_output_folder,
    fraction,
    load_bert,
    load_weights,
    long_enough,
    reported,
)

# Without --steps and --epochs: so many steps, but no row more often than that.
DEFAULT_STEPS, DEFAULT_EPOCHS = 300, 10
# More rows than these would make the evaluation longer and hardly more exact.
MAX_HELD_OUT = 2000


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"must be > 0, got {value}")
    return value


def train(
    data: Annotated[
        Path,
        typer.Option("--data", help="Texts with labels: .csv or .tsv with a header, .json or .jsonl.", **READABLE),
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="A BERT or an SNN-BERT to start from: a folder or a Hub id.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="The folder to write, whole or not at all.", show_default=False)
    ],
    text_column: FoundTextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: Annotated[
        str | None, typer.Option("--label_column", help="The column of labels (default: found by its name).")
    ] = None,
    encoding: Encoding = "utf-8",
    held_out: Annotated[
        float, typer.Option("--held_out", callback=fraction, help="Share of the texts to score on, not to learn from.")
    ] = 0.2,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            callback=at_least_one,
            help=f"Steps of fine-tuning (default: {DEFAULT_STEPS}, of few rows at most {DEFAULT_EPOCHS} epochs).",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", callback=_positive, help="The same in passes through the texts.")
    ] = None,
    distillation_steps: Annotated[
        int, typer.Option("--distillation_steps", min=0, help="Steps after the conversion of a BERT, without labels.")
    ] = DISTILLATION_STEPS,
    batch_size: Annotated[
        int, typer.Option("--batch_size", callback=at_least_one, help="Texts of a step.")
    ] = Recipe.batch_size,
    max_length: Annotated[
        int,
        typer.Option(
            "--max_length", callback=long_enough, help="Cut texts at so many tokens, in the served model too."
        ),
    ] = 128,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning_rate",
            callback=_positive,
            help=f"Of the SNN-BERT (default: {TAUGHT_RATE:g} if a BERT teaches it, {LABELS_RATE:g} from labels alone).",
        ),
    ] = Recipe.learning_rate,
    bert_learning_rate: Annotated[
        float, typer.Option("--bert_learning_rate", callback=_positive, help="Of the BERT.")
    ] = Recipe.bert_learning_rate,
    firing_rate: FiringRate = Recipe.firing_rate,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split, the order and the new weights.")] = 0,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in the folder.")] = False,
) -> None:
    """Train a spiking text classifier on your own texts, or pairs of texts, and labels.

    A BERT is fine-tuned, converted, and teaches its copy; an SNN-BERT is fine-tuned. The folder holds the model, its
    code, a model card and a report (report.html, report.md, report.json), and can go to the Hub as it is. Runs on a
    GPU if there is one.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter("give either --steps or --epochs", param_hint="--epochs")
    check_output_folder(output, overwrite, "--output")
    with reported():
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError('training needs accelerate: pip install "snn-bert[train]"') from error
        started = time.perf_counter()
        rows = read_labelled(data, text_column, label_column, encoding, text_pair_column)
        training, validation = split(rows, held_out, seed)
        describe(data, rows, len(training), len(validation))
        config = PreTrainedConfig.get_config_dict(model, revision=revision)[0]
        kind = config.get("model_type")
        if kind not in ("bert", SNNBertConfig.model_type):
            raise ValueError(f"--model must be a BERT or an SNN-BERT, the model_type of {model} is {kind!r}")
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
        check_max_length(max_length, tokenizer, pairs=text_pair_column is not None)
        set_seed(seed)
        # The folder is made before the work: where nothing can be written is known at once.
        with folder_written_whole(output) as folder:
            settings = classifier_settings(rows.names)
            start: PreTrainedModel
            if kind == "bert":
                start = load_bert(model, "SequenceClassification", revision, **settings)
            else:
                start = load_snn_bert(model, revision, **settings)
            # Its module imports the Trainer, for which the other commands would wait.
            from ..multitask import renew_other_head

            new_head = renew_other_head(start, config, model)
            if new_head is not None:
                typer.echo(new_head, err=True)
            tokenizer.model_max_length = min(
                max_length, start.config.max_position_embeddings, tokenizer.model_max_length
            )
            columns = {**tokenizer(rows.texts, truncation=True), "labels": rows.labels}
            tokenized = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            cut = sum(len(row["input_ids"]) == tokenizer.model_max_length for row in tokenized)
            if cut:
                note = f"{cut:,} texts reach {tokenizer.model_max_length} tokens, and what is beyond is not read"
                typer.echo(f"{note} (--max_length)", err=True)
            per_epoch = math.ceil(len(training) / batch_size)
            if steps is None:
                wanted = None if epochs is None else max(1, round(epochs * per_epoch))
                steps = wanted or min(DEFAULT_STEPS, DEFAULT_EPOCHS * per_epoch)
            recipe = Recipe(batch_size, firing_rate, distillation_steps, learning_rate, bert_learning_rate, seed=seed)
            learned, held = ([tokenized[i] for i in part] for part in (training, validation))
            trained = train_classifier(Accelerator(), start, learned, held, tokenizer, recipe, steps)
            trained.model.config.reads_pairs = text_pair_column is not None
            trained.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            trained.results["seconds"]["all"] = time.perf_counter() - started
            trained.results.update(
                {
                    "command": shlex.join(["snn-bert", *sys.argv[1:]]),
                    "base_model": None if Path(model).exists() else model,
                    "dataset": {"name": data.name, "split": "held out"},
                    "columns": {
                        "text": rows.text_column,
                        "text_pair": rows.text_pair_column,
                        "label": rows.label_column,
                    },
                    "labels": {name: rows.labels.count(i) for i, name in enumerate(rows.names)},
                    "rows_left_out": rows.left_out,
                    "max_length": tokenizer.model_max_length,
                }
            )
            report = write_report(trained, folder, folder, f"SNN-BERT on {data.name}")
    typer.echo(report)
    accuracy = trained.results["accuracy"]
    if accuracy["SNN-BERT"] <= accuracy["majority class"]:
        rate = trained.results["learning_rates"]["SNN-BERT"]
        typer.echo(
            "Warning: it is no better than to give every text the commonest label. Add texts, train longer (--steps) "
            f"or at a lower --learning_rate (it was {rate:g}), and see whether the labels follow from the texts",
            err=True,
        )
    typer.echo(f"written to {output}: try it by `snn-bert serve {shlex.quote(str(output))}`")


def split(rows: Labelled, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The rows to learn from and those that are held out, each in the order of the file.

    Of each label the same share is held out, at least one text of it. Texts that are equal but for case and spaces are
    on the same side.

    Raises:
        ValueError: if all rows of a label hold the same text.
    """
    # The label of a text that stands there twice is that of its first row.
    of_label: dict[int, dict[str, list[int]]] = {}
    first: dict[str, int] = {}
    for i, (text, label) in enumerate(zip(rows.texts, rows.labels, strict=True)):
        # A text without its runs of spaces has no line break, so that one parts a pair.
        alike = "\n".join(" ".join(part.lower().split()) for part in parts(text))
        key = hashlib.sha256(alike.encode()).hexdigest()
        of_label.setdefault(first.setdefault(key, label), {}).setdefault(key, []).append(i)
    share = min(share, MAX_HELD_OUT / len(rows.texts))
    held: list[int] = []
    for label, groups in sorted(of_label.items()):
        if len(groups) < 2:
            raise ValueError(
                f"all rows with the label {rows.names[label]!r} hold the same text: add others, since one is to be "
                "learned from and one held out"
            )
        keys = sorted(groups)
        random.Random(f"{seed} {label}").shuffle(keys)
        chosen = keys[: min(max(1, round(share * len(keys))), len(keys) - 1)]
        held += [i for key in chosen for i in groups[key]]
    missing = [name for i, name in enumerate(rows.names) if i not in of_label]
    if missing:
        raise ValueError(
            f"each text with the label {shortened(map(repr, missing))} stands in an earlier row with another label: "
            "correct the labels of these rows"
        )
    out = set(held)
    return [i for i in range(len(rows.texts)) if i not in out], sorted(out)


def describe(path: Path, rows: Labelled, training: int, validation: int) -> None:
    """Print what was found in the file, and what was left out."""
    counts = Counter(rows.labels)
    labels = shortened(f"{name!r} {counts[i]:,}" for i, name in enumerate(rows.names))
    what = f"texts in the column {rows.text_column!r}"
    if rows.text_pair_column is not None:
        what = f"pairs of texts in the columns {rows.text_column!r} and {rows.text_pair_column!r}"
    typer.echo(
        f"{path.name}: {len(rows.texts):,} {what}, {len(rows.names)} labels in "
        f"{rows.label_column!r} ({labels}); {training:,} to learn from, {validation:,} held out"
    )
    if rows.left_out:
        typer.echo(
            f"Warning: {len(rows.left_out):,} rows without a text or a label are left out: {shortened(rows.left_out)}",
            err=True,
        )


def load_snn_bert(model_name_or_path: str, revision: str | None, **settings) -> SNNBertForSequenceClassification:
    """The SNN-BERT of a checkpoint with a classifier, new if it has none of so many labels."""
    model = load_weights(SNNBertForSequenceClassification, model_name_or_path, revision, **settings, **NO_DROPOUT)
    if model.config.psn_length is not None:
        raise ValueError(
            f"{model_name_or_path} takes texts of exactly {model.config.psn_length} tokens (its neurons are PSN): "
            "train a model with neuron_type 'bpsn' or 'lif'"
        )
    return model
