"""Texts, and texts with labels, from the files that people have: .txt, .csv, .tsv, .json and .jsonl.

What cannot be read as it was meant is an error that names the file, the line and the cure; no row is guessed at.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
# A cell longer than this is a quotation mark that was never closed, and no text that a model reads to its end. It is
# the csv module's own limit, for the other kinds of file too.
MAX_CHARACTERS = 131_072
# A column of one of these names, in whatever case, is taken for what it says if it is the only one.
TEXT_COLUMNS = "text texts sentence review comment message content body tweet document question utterance".split()
LABEL_COLUMNS = "label labels sentiment class category target intent topic rating stars polarity".split()
# Labels beyond these numbers are numbers to be predicted, or names of the rows.
MIN_LABELS, MAX_LABELS = 2, 1000
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
# Below it there is nothing to learn from, and nothing to hold out.
MIN_ROWS = 10
# Of labels that are numbers with decimals there are more than these where they are measurements.
MAX_FRACTIONS = 10
FRACTION = re.compile(r"[+-]?\d*[.,]\d+", re.ASCII)
# So many lines are named in a message.
NAMED_LINES = 5
# How files begin that are no text, whatever they are called; and what to do with them.
PACKED = "is packed: unpack it first"
NO_TEXT = {
    b"PK\x03\x04": "is a spreadsheet (.xlsx) or another zip archive: save the table as .csv, in UTF-8",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet (.xls): save the table as .csv, in UTF-8",
    b"PAR1": "is a Parquet file: write the table as .csv or .jsonl",
    b"\x1f\x8b": PACKED,
    b"BZh": PACKED,
    b"\xfd7zXZ": PACKED,
    b"\x28\xb5\x2f\xfd": PACKED,
}
# How files of other encodings begin; the longer mark goes first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")
# A line that spreadsheets write, and read, to say what parts the cells.
SEPARATOR = re.compile(r"sep=([,;\t|])\r?\n")
# What a model reads as one input: a text, or two of them.
Text = str | tuple[str, str]


class Row(NamedTuple):
    """A row of a file: where it stands (such as `"line 3"`), and its cells by column or the text that it is."""

    place: str
    value: Any


class Labelled(NamedTuple):
    """What `read_labelled` returns.

    Args:
        texts: the texts, or the pairs of texts, none of them blank.
        labels: of each, the index of its label in `names`.
        names: the different labels as text, in order: of their values if all are numbers, else of the alphabet.
        text_column, label_column: where they stood.
        left_out: the places of the rows without a text or a label.
        text_pair_column: where the second texts stood, `None` for single texts.
    """

    texts: list[Text]
    labels: list[int]
    names: list[str]
    text_column: str
    label_column: str
    left_out: list[str]
    text_pair_column: str | None = None


def read_texts(path: Path, text_column: str | None, encoding: str = "utf-8") -> list[str]:
    """The texts of a file without the blank ones; arguments and errors as for `numbered_texts`."""
    return [row.value for row in numbered_texts(path, text_column, encoding)]


def parts(text: Text) -> tuple[str, ...]:
    """The one text, or the two."""
    return (text,) if isinstance(text, str) else text


def numbered_texts(
    path: Path, text_column: str | None, encoding: str = "utf-8", text_pair_column: str | None = None
) -> list[Row]:
    """The texts of a file with their places: .txt (a line each), .csv or .tsv with a header, .json or .jsonl.

    Args:
        path: the file. A .json file is an array of objects or strings, a .jsonl file has one in each line. A .tsv file
            does not quote, as GLUE's do not.
        text_column: the column or key of the texts; `None` looks for one of `TEXT_COLUMNS`.
        encoding: of the file, a name that Python knows.
        text_pair_column: the column or key of the second texts, which makes each row's value a pair; it is not guessed.

    Raises:
        ValueError: if the file is of another kind, is not what its name says, or has no texts.
        OSError: if it cannot be read.
    """
    rows = read_rows(path, encoding)
    if rows and isinstance(rows[0].value, dict):
        columns = _without_pair(path, list(rows[0].value), text_pair_column, text_column)
        if text_column is None:
            text_column = find_column(path, columns, None, TEXT_COLUMNS, "text")
    texts = [Row(row.place, _texts(path, row, text_column, text_pair_column)) for row in rows]
    texts = [row for row in texts if _is_whole(row.value)]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def read_labelled(
    path: Path,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str = "utf-8",
    text_pair_column: str | None = None,
) -> Labelled:
    """The texts of a file and their labels; arguments as for `numbered_texts`.

    Rows without a text or a label are left out, and their places are returned.

    Raises:
        ValueError: if the file is not what its name says, the columns cannot be told, there are fewer than `MIN_ROWS`
            rows, fewer than 2 or more than `MAX_LABELS` labels, one that occurs once only, two that look alike, or
            measurements in their place.
        OSError: if it cannot be read.
    """
    if path.suffix.lower() == ".txt":
        raise ValueError(f"{path} has no labels: give a .csv, .tsv, .json or .jsonl file with a column for them")
    rows = read_rows(path, encoding)
    if not rows:
        raise ValueError(f"{path} has no rows below its header: add a text and its label in each line")
    for row in rows:
        if not isinstance(row.value, dict):
            raise ValueError(f"{path}, {row.place}: must be an object with a text and a label, got {row.value!r}")
    columns = _without_pair(path, list(rows[0].value), text_pair_column, text_column, label_column)
    if text_column is None and label_column is None and len(columns) == 2:
        # The one that is not the labels is the texts, and the other way round.
        texts, labels = ([name for name in columns if name.lower() in known] for known in (TEXT_COLUMNS, LABEL_COLUMNS))
        if len(labels) == 1 and not texts:
            text_column = columns[1 - columns.index(labels[0])]
        elif len(texts) == 1 and not labels:
            label_column = columns[1 - columns.index(texts[0])]
    text_column = find_column(path, columns, text_column, TEXT_COLUMNS, "text")
    label_column = find_column(path, columns, label_column, LABEL_COLUMNS, "label")
    if text_column == label_column:
        raise ValueError(f"{path}: texts and labels must be in two columns, both are to be in {text_column!r}")
    kept: list[tuple[str, Text, str]] = []
    left_out = []
    for row in rows:
        text, label = _texts(path, row, text_column, text_pair_column), _label(path, row, label_column)
        if _is_whole(text) and label:
            kept.append((row.place, text, label))
        else:
            left_out.append(row.place)
    names = _label_names(path, label_column, kept)
    index = {name: i for i, name in enumerate(names)}
    return Labelled(
        [text for _, text, _ in kept],
        [index[label] for *_, label in kept],
        names,
        text_column,
        label_column,
        left_out,
        text_pair_column,
    )


def find_column(path: Path, columns: Sequence[str], wanted: str | None, known: Sequence[str], what: str) -> str:
    """The column named `wanted`, or without it the only one whose name is one of `known`.

    Raises:
        ValueError: if there is none, or there are several.
    """
    option = f"--{what}_column"
    if wanted is not None:
        check_columns(path, columns, wanted, advice=f": name one of them by {option}")
        return wanted
    found = [name for name in columns if name.lower() in known]
    if len(found) != 1:
        several = f"{found} may all hold" if found else f"none of the columns {list(columns)} is known to hold"
        raise ValueError(
            f"{path}: {several} the {what}s: name the column by {option} (the first line must be a header)"
        )
    return found[0]


def check_columns(what: object, columns: Collection[str], *wanted: str | None, advice: str = "") -> None:
    """Raise a `ValueError` that begins with `what` if one of the `wanted` columns is not among `columns`."""
    for name in wanted:
        if name not in columns:
            raise ValueError(f"{what} has no column {name!r}, only {list(columns)}{advice}")


def read_rows(path: Path, encoding: str = "utf-8", header: Sequence[str] | None = None) -> list[Row]:
    """The rows of a file with their places. Blank lines are none; arguments and errors as for `numbered_texts`.

    `header` names the columns of a .csv or .tsv file that has no line for them.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a .txt, .csv, .tsv, .json or .jsonl file")
    text = _decoded(path, encoding)
    if not text.strip():
        raise ValueError(f"{path} is empty: it holds no texts")
    if suffix in (".csv", ".tsv"):
        return list(_table(path, text, suffix, header))
    # Lines end where files' lines end, and not at the other marks that `str.splitlines` takes, which texts may hold.
    lines = [Row(f"line {number}", line.rstrip("\n")) for number, line in enumerate(io.StringIO(text, None), 1)]
    lines = [row for row in lines if row.value.strip()]
    if suffix == ".txt":
        return lines
    if text.lstrip().startswith("["):
        values = _parsed(path, "", text)
        return [Row(f"row {number}", value) for number, value in enumerate(values, 1)]
    return [Row(row.place, _parsed(path, f", {row.place}", row.value)) for row in lines]


def _decoded(path: Path, encoding: str) -> str:
    """The file's text without a byte order mark."""
    content = path.read_bytes()
    if any(byte < 9 or byte > 126 for byte in content[:64]):
        for start, what in NO_TEXT.items():
            if content.startswith(start):
                raise ValueError(f"{path} {what}")
    try:
        text = content.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = next((name for mark, name in MARKS.items() if content.startswith(mark)), "cp1252")
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start : error.start + 1].hex()} is not {encoding} "
            f"({error.reason}): save the file as UTF-8, or give its encoding, perhaps --encoding {guess}"
        ) from error
    except UnicodeError as error:
        raise ValueError(f"{path} is not {encoding} ({error}): save it as UTF-8, or give its --encoding") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: holds a NUL character: remove it, or give the encoding, perhaps --encoding utf-16-le"
        )
    return text


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}{place} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}{place} is not JSON that can be read: it is nested too deeply") from error


def _table(path: Path, text: str, suffix: str, header: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a .csv or .tsv file, below its header if none is given."""
    if suffix == ".tsv":
        # GLUE's tab-separated files do not quote.
        reader = csv.reader(io.StringIO(text, ""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        said = SEPARATOR.match(text)
        delimiter = said[1] if said else _delimiter(text)
        # The lines keep their numbers.
        text = "\n" + text[said.end() :] if said else text
        reader = csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
    rows = _checked_rows(path, reader)
    told = "there must be "
    if header is None:
        told = "the header names "
        place, names = next(rows, ("", []))
        if not names:
            raise ValueError(f"{path} is empty: it holds no texts")
        header = [name.strip() for name in names]
        named = [name for name in header if name]
        if len(set(named)) < len(named):
            raise ValueError(
                f"{path}, {place}: the header must name each column once, got {header}: rename or remove one of those "
                "that are called alike"
            )
    for place, cells in rows:
        if len(cells) != len(header):
            cure = "put quotation marks around a text that holds a comma or a line break"
            if suffix == ".tsv":
                cure = "take tabs out of the texts"
            elif any(cell.startswith(' "') for cell in cells):
                cure = "take out the spaces before quotation marks"
            columns = shortened(map(repr, header))
            raise ValueError(f"{path}, {place}: has {len(cells)} cells, but {told}{len(header)} ({columns}): {cure}")
        # Columns without a name are the numbers of rows, or the empty ones that spreadsheets add.
        yield Row(place, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def _delimiter(text: str) -> str:
    """A comma; or what the header has in its place, as tables of countries with a decimal comma do."""
    header = text.lstrip().splitlines()[0]
    return "," if "," in header else max(",;\t|", key=header.count)


def _checked_rows(path: Path, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """The rows of a `csv.reader` that are not blank, with the places where they begin."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "limit" in str(error):
                raise ValueError(_too_long(path, f"line {line}")) from error
            cure = "close each quotation mark, and double one that is inside a cell"
            raise ValueError(f"{path}, line {line}: {error}: {cure}") from error
        if cells is None:
            return
        if cells and not (len(cells) == 1 and not cells[0].strip()):
            yield f"line {line}", cells


def _too_long(path: Path, place: str) -> str:
    return (
        f"{path}, {place}: has a text of more than {MAX_CHARACTERS:,} characters: shorten it, or close the quotation "
        "mark that opens there"
    )


def _without_pair(path: Path, columns: list[str], text_pair_column: str | None, *others: str | None) -> list[str]:
    """The columns in which texts and labels may be; `others` are those that are named for them."""
    if text_pair_column is None:
        return columns
    check_columns(path, columns, text_pair_column, advice=": name one of them by --text_pair_column")
    if text_pair_column in others:
        raise ValueError(
            f"{path}: --text_pair_column must name a column of its own, {text_pair_column!r} is that of the texts or "
            "labels"
        )
    return [name for name in columns if name != text_pair_column]


def _is_whole(text: Text) -> bool:
    return all(part.strip() for part in parts(text))


def _texts(path: Path, row: Row, column: str | None, pair_column: str | None) -> Text:
    """The text of a row, or its two texts; they may be blank."""
    if pair_column is None:
        return _text(path, row, column)
    if not isinstance(row.value, dict):
        raise ValueError(
            f"{path}, {row.place}: must have two columns for --text_pair_column, got one text: give a .csv, .tsv, "
            ".json or .jsonl file, or leave the option out"
        )
    return _text(path, row, column), _text(path, row, pair_column, "--text_pair_column")


def _text(path: Path, row: Row, column: str | None, option: str = "--text_column") -> str:
    value = row.value
    if isinstance(value, dict):
        check_columns(f"{path}, {row.place}:", value, column, advice=f": name one by {option}")
        value = value[column]
    if not isinstance(value, str):
        raise ValueError(f"{path}, {row.place}: must hold a text, got {value!r}")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(_too_long(path, row.place))
    if not is_unicode(value):
        raise ValueError(f"{path}, {row.place}: holds half of a surrogate pair, which is no character: remove it")
    return value


def is_unicode(text: str) -> bool:
    """Whether `text` can be written down: JSON's escapes can make a string that cannot."""
    return SURROGATE.search(text) is None


def _label(path: Path, row: Row, column: str) -> str:
    """The label of a row as text, empty if there is none. A whole number has no decimal point: 1.0 is 1."""
    check_columns(f"{path}, {row.place}:", row.value, column)
    value = row.value[column]
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"{path}, {row.place}: the label must be a text or a number, got {value!r}")
    text = str(value).strip()
    return text.split(".")[0] if NUMBER.fullmatch(text) and not text.partition(".")[2].strip("0") else text


def _label_names(path: Path, column: str, rows: Sequence[tuple[str, Text, str]]) -> list[str]:
    """The different labels of `rows`, each with its place, text and label, in order."""
    if len(rows) < MIN_ROWS:
        raise ValueError(f"{path} has {len(rows)} rows with a text and a label: give at least {MIN_ROWS}, better 1,000")
    places: dict[str, list[str]] = {}
    for place, _, label in rows:
        places.setdefault(label, []).append(place)
    if len(places) < MIN_LABELS:
        raise ValueError(
            f"{path}: every row from {rows[0][0]} to {rows[-1][0]} has the label {rows[0][2]!r} in the column "
            f"{column!r}: add rows of another label, or name the right column by --label_column"
        )
    fractions = [label for label in places if FRACTION.fullmatch(label)]
    if len(fractions) > MAX_FRACTIONS:
        raise ValueError(
            f"{path}, {places[fractions[0]][0]}: the column {column!r} holds {len(fractions):,} different numbers with "
            f"decimals, such as {fractions[0]}, which are no labels: write a label for each range of them (such as low "
            "and high), or name the right column by --label_column"
        )
    if len(places) > MAX_LABELS:
        raise ValueError(
            f"{path}: the column {column!r} holds {len(places):,} different labels in {len(rows):,} rows, more than "
            f"{MAX_LABELS:,}: name the right column by --label_column"
        )
    alike: dict[str, str] = {}
    for label, found in places.items():
        # But for case, runs of spaces, and what is not seen, such as a byte order mark.
        seen = "".join(c for c in " ".join(label.casefold().split()) if c.isprintable())
        other = alike.setdefault(seen, label)
        if other != label:
            raise ValueError(
                f"{path}: in the column {column!r} the labels {other!r} ({places[other][0]}) and {label!r} "
                f"({found[0]}) look alike: write them alike if they are one label, else name them so that they differ"
            )
    single = [f"{label!r} ({found[0]})" for label, found in places.items() if len(found) == 1]
    if single:
        raise ValueError(
            f"{path}: in the column {column!r} occur once only {shortened(single)}: correct or remove these rows, or "
            "add others of these labels (one is learned from and one held out)"
        )
    if all(NUMBER.fullmatch(label) for label in places):
        return sorted(places, key=float)
    return sorted(places)


def shortened(items: Iterable[str]) -> str:
    """The first few of `items`, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - NAMED_LINES:,} more" if len(items) > NAMED_LINES else ""
    return ", ".join(items[:NAMED_LINES]) + more
