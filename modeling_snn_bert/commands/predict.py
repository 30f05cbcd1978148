"""`snn-bert predict`: the labels of the texts in a file."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

from ..atomic_writes import written_whole
from ..text_files import Row, Text, numbered_texts, parts
from .classifier import Prediction, TextClassifier, WeightDtype
from .common import (
    READABLE,
    BatchSize,
    Encoding,
    FoundTextColumn,
    MaxLength,
    Model,
    Revision,
    TextPairColumn,
    check_max_length,
    load_classifier,
    reported,
)

# Of a text, so many characters are shown in the terminal.
SHOWN = 80


def predict(
    model: Model,
    data_file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Texts: .txt (a line each), .csv or .tsv with a header, .json or .jsonl.",
            **READABLE,
        ),
    ],
    text_column: FoundTextColumn = None,
    text_pair_column: TextPairColumn = None,
    encoding: Encoding = "utf-8",
    output_file: Annotated[
        Path | None, typer.Option("--output_file", help="A .csv or .jsonl file to write, in place of the terminal.")
    ] = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    weight_dtype: WeightDtype = "float32",
    revision: Revision = None,
) -> None:
    """Say which label each text of a file gets, and how likely it is.

    Inference is event-driven, on the CPU. Blank lines get no label, nor do pairs that lack a text; the place of each
    text in the file is kept.
    """
    if output_file is not None and output_file.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter(f"must end in .csv or .jsonl, got {output_file}", param_hint="--output_file")
    with reported():
        rows = numbered_texts(data_file, text_column, encoding, text_pair_column)
        if output_file is not None:
            output_file.parent.mkdir(parents=True, exist_ok=True)
        classifier = TextClassifier(*load_classifier(model, revision), weight_dtype, max_length)
        if classifier.reads_pairs is not None and classifier.reads_pairs != (text_pair_column is not None):
            wanted = "pairs of texts: give" if classifier.reads_pairs else "single texts: leave out"
            raise ValueError(f"{model} was trained on {wanted} --text_pair_column, got {text_pair_column!r}")
        check_max_length(max_length, classifier.tokenizer, pairs=text_pair_column is not None)
        predictions = predict_all(classifier, [row.value for row in rows], batch_size, progress=output_file is not None)
        if output_file is not None:
            write_whole(output_file, rows, predictions)
    if output_file is None:
        width = max(map(len, classifier.labels))
        for row, prediction in zip(rows, predictions, strict=True):
            typer.echo(
                f"{prediction.label:<{width}}  {prediction.score:.3f}  {' | '.join(map(shown, parts(row.value)))}"
            )
    else:
        typer.echo(f"{len(rows):,} predictions written to {output_file}")


def predict_all(
    classifier: TextClassifier, texts: Sequence[Text], batch_size: int, *, progress: bool = False
) -> list[Prediction]:
    """The predictions of `texts` in their order. Texts of like length run together, since padding takes time."""
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, parts(texts[i]))))
    found: dict[int, Prediction] = {}
    with tqdm(total=len(texts), desc="predict", unit="text", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found.update(zip(chosen, classifier([texts[i] for i in chosen]), strict=True))
            bar.update(len(chosen))
    return [found[i] for i in range(len(texts))]


def write_whole(path: Path, rows: Sequence[Row], predictions: Sequence[Prediction]) -> None:
    """Write the predictions beside their texts as .csv or .jsonl, whole or not at all."""
    table = [
        (row.place, p.label, round(p.score, 6), *parts(row.value)) for row, p in zip(rows, predictions, strict=True)
    ]
    names = ("place", "label", "score", "text", "text_pair")[: len(table[0])]
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([names, *table])
        else:
            file.writelines(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in table)


def shown(text: str) -> str:
    """The beginning of `text` on one line, of characters that the terminal can print without moving its cursor."""
    start = " ".join(text[: SHOWN + 1].split())
    cut = "..." if len(text) > SHOWN else ""
    printable = "".join(c if c.isprintable() else "?" for c in start[:SHOWN]) + cut
    encoding = sys.stdout.encoding or "ascii"
    return printable.encode(encoding, "replace").decode(encoding)
