"""Files of texts and labels as people have them: each is read as it was meant, or refused with file, line and cure."""

import csv
import gzip
import io
import json
import re

import pytest

from modeling_snn_bert.text_files import MAX_CHARACTERS, Row, numbered_texts, read_labelled, read_texts

TEXTS = [
    "A joy, from start to end.",
    'She said "no", and left.',
    "Two lines:\nthe second.",
    "Überraschend schön \u2013 ½ €",
    "So good 😀👩‍👩‍👧 🇫🇷",
    "Bells \x07 and\x0btabs\x0c and \x1c \x85 \u2028 marks",
    "plain",
    " spaces around ",
    "漢字とかな",
    "x" * 2000,
    "-1",
    "'=1+1'",
]
LABELS = ["good", "bad"] * 6


def table(texts=TEXTS, labels=LABELS, delimiter=",", end="\r\n", header=("text", "label")):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerows([header, *zip(texts, labels, strict=True)])
    return file.getvalue()


def objects(texts=TEXTS, labels=LABELS):
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


PLAIN = [text.replace("\n", " ") for text in TEXTS]
WESTERN = ["déjà vu", "naïve “quotes”", "5 €", *"abcdefghi"]
# The file's name, its content, the encoding to be given, and the texts that it holds.
GOOD = {
    "crlf": ("x.csv", table().encode(), "utf-8", TEXTS),
    "lf": ("x.csv", table(end="\n").encode(), "utf-8", TEXTS),
    "cr": ("x.csv", table(PLAIN, end="\r").encode(), "utf-8", PLAIN),
    "byte_order_mark": ("x.csv", table().encode("utf-8-sig"), "utf-8", TEXTS),
    "upper_case_suffix": ("X.CSV", table().encode(), "utf-8", TEXTS),
    "semicolons": ("x.csv", table(delimiter=";").encode(), "utf-8", TEXTS),
    "tabs_in_csv": ("x.csv", table(delimiter="\t").encode(), "utf-8", TEXTS),
    "vertical_bars": ("x.csv", table(delimiter="|").encode(), "utf-8", TEXTS),
    "separator_said": ("x.csv", ("sep=;\r\n" + table(delimiter=";")).encode("utf-8-sig"), "utf-8", TEXTS),
    "columns_without_a_name": (
        "x.csv",
        "".join(f"7,{line},,\r\n" for line in table(PLAIN).split("\r\n")[:-1]).replace("7", "", 1).encode(),
        "utf-8",
        PLAIN,
    ),
    "blank_lines": ("x.csv", table(end="\n\n").replace("text,", "\n\n text ,", 1).encode(), "utf-8", TEXTS),
    "tsv": ("x.tsv", ("text\tlabel\n" + "".join(f"{t}\tgood\n{t}?\tbad\n" for t in PLAIN[:6])).encode(), "utf-8", None),
    "utf-16": ("x.csv", table().encode("utf-16"), "utf-16", TEXTS),
    "cp1252": ("x.csv", table(WESTERN).encode("cp1252"), "cp1252", WESTERN),
    "json": ("x.json", json.dumps(objects()).encode(), "utf-8", TEXTS),
    "jsonl": (
        "x.jsonl",
        "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in objects()).encode("utf-8-sig"),
        "utf-8",
        TEXTS,
    ),
    "more_columns": (
        "x.csv",
        "".join(f"7,{line}" for line in table(PLAIN).rstrip().replace("\r\n", "\r\n\0").split("\0")).encode(),
        "utf-8",
        PLAIN,
    ),
}
ROWS = "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(12))
# The file's name, its content, and what the error says; the file's name is in each.
BAD = {
    "empty": ("x.csv", b"", "x.csv is empty"),
    "only_a_byte_order_mark": ("x.csv", b"\xef\xbb\xbf\r\n", "x.csv is empty"),
    "only_quotation_marks": ("x.csv", b'""', "x.csv is empty"),
    "header_only": ("x.csv", b"text,label\n", "x.csv has no rows below its header"),
    "two_rows": ("x.csv", b"text,label\na,0\nb,1\n", "x.csv has 2 rows with a text and a label: give at least 10"),
    "no_header": ("x.csv", b"so good,1\nso bad,0\n" * 9, "none of the columns ['so good', '1'] is known to hold"),
    "columns_of_unknown_names": ("x.csv", b"a,b,c\n1,2,3\n", "name the column by --text_column (the first line"),
    "two_columns_of_texts": ("x.csv", b"text,Review,label\n1,2,3\n", "['text', 'Review'] may all hold the texts"),
    "no_labels": ("x.csv", b"text,n,m\n1,2,3\n", "name the column by --label_column"),
    "header_names_one_twice": ("x.csv", b"text,text,label\n1,2,3\n", "line 1: the header must name each column once"),
    "a_comma_without_quotation_marks": (
        "x.csv", b"text,label\nfine,1\n\nso, so,0\n",
        "line 4: has 3 cells, but the header names 2 ('text', 'label'): put quotation",
    ),
    "a_space_before_a_quotation_mark": (
        "x.csv", b'label, text\n1, "so, so"\n', "line 2: has 3 cells, but the header names 2 ('label', 'text'): take o",
    ),
    "a_line_above_the_header": (
        "x.csv", b"# of today\ntext,label\nfine,1\n", "line 2: has 2 cells, but the header names 1 ('# of today'): put",
    ),
    "a_cell_missing": ("x.csv", b"text,label\nfine\n", "line 2: has 1 cells, but the header names 2"),
    "a_tab_too_many": ("x.tsv", b"text\tlabel\na\tb\t1\n", "but the header names 2 ('text', 'label'): take tabs out"),
    "a_quotation_mark_never_closed": (
        "x.csv", b'text,label\nfine,1\n"so good,1\n' + b"more,0\n" * 20, "line 3: unexpected end of data: close each",
    ),
    "a_quotation_mark_inside": ("x.csv", b'text,label\n"so "good"",1\n', "line 2: ',' expected after '\"': close each"),
    "10_megabytes_in_a_cell": (
        "x.csv", b"text,label\nfine,1\n" + b"word " * 2_000_000 + b",1\n", "line 3: has a text of more than 131,072",
    ),
    "10_megabytes_in_an_object": (
        "x.jsonl", b'{"text": "' + b"a" * 10_000_000 + b'", "label": 1}\n', "line 1: has a text of more than 131,072",
    ),
    "latin_1": ("x.csv", b"text,label\nfine,1\ncaf\xe9,0\n", "line 3: byte 0xe9 is not utf-8"),
    "utf-16_not_said": ("x.csv", table().encode("utf-16"), "line 1: byte 0xff is not utf-8 (invalid start byte): save"),
    "utf-16_without_a_mark": ("x.csv", table(PLAIN).encode("utf-16-le")[:60], "line 1: holds a NUL character: remove"),
    "nul": ("x.csv", b"text,label\nfine,1\na\0b,0\n", "line 3: holds a NUL character: remove it"),
    "utf-32_not_said": ("x.csv", table().encode("utf-32"), "or give its encoding, perhaps --encoding utf-32"),
    "a_spreadsheet_renamed": (
        "x.csv", b"PK\x03\x04\x14\x00\x06\x00\x08\x00\xb7\xd1", "x.csv is a spreadsheet (.xlsx) or another zip archive",
    ),
    "an_old_spreadsheet_renamed": ("x.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "x.csv is a spreadsheet (.xls): save the t"),
    "parquet_renamed": ("x.csv", b"PAR1\x15\x04\x15", "x.csv is a Parquet file: write the table as .csv or .jsonl"),
    "packed": ("x.csv", gzip.compress(table().encode()), "x.csv is packed: unpack it first"),
    "a_spreadsheet": ("x.xlsx", b"PK\x03\x04", "must be a .txt, .csv, .tsv, .json or .jsonl file"),
    "no_columns": ("x.txt", b"a\nb\n", "x.txt has no labels: give a .csv"),
    "one_label": (
        "x.csv", ROWS.replace("a\n", "b\n").join(("text,label\n", "")).encode(),
        "every row from line 2 to line 13 has the label 'b' in the column 'label'",
    ),
    "a_label_in_another_case": (
        "x.csv", f"text,label\n{ROWS}t,A\nu,A\n".encode(), "the labels 'a' (line 2) and 'A' (line 14) look alike: wri",
    ),
    "a_label_with_what_is_not_seen": (
        "x.csv", f"text,label\n{ROWS}t,a\u200b\n".encode(), "'a' (line 2) and 'a\\u200b' (line 14) look alike",
    ),
    "measurements": (
        "x.csv", b"text;label\n" + b"".join(b"a;%d,5\n" % i for i in range(12)),
        "x.csv, line 2: the column 'label' holds 12 different numbers with decimals, such as 0,5, which are no labels",
    ),
    "a_label_misspelt": ("x.csv", f"text,label\n{ROWS}t,bb\n".encode(), "occur once only 'bb' (line 14): correct or"),
    "a_label_for_each_row": (
        "x.csv", b"text,label\n" + b"".join(b"a,%d\n" % i for i in range(1001)), "holds 1,001 different labels in 1,00",
    ),
    "json_cut": ("x.json", b'[{"text": "a", "label"', "x.json is not JSON"),
    "json_line_cut": ("x.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "x.jsonl, line 2 is not JSON"),
    "json_nested": ("x.json", b"[" * 200_000, "x.json is not JSON that can be read: it is nested too deeply"),
    "json_of_texts": ("x.json", b'["a", "b"]', "row 1: must be an object with a text and a label, got 'a'"),
    "json_without_a_key": ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: has no column 'label'"),
    "json_text_of_a_number": ("x.jsonl", b'{"text": 3, "label": 1}\n', "line 1: must hold a text, got 3"),
    "json_label_of_a_list": ("x.jsonl", b'{"text": "a", "label": [1]}\n', "line 1: the label must be a text"),
    "json_half_a_surrogate": ("x.jsonl", b'{"text": "\\ud83d", "label": 1}\n', "line 1: holds half of a surrogate"),
}  # fmt: skip


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", GOOD)
def test_good_files(tmp_path, name):
    filename, content, encoding, texts = GOOD[name]
    rows = read_labelled(write(tmp_path, filename, content), encoding=encoding)
    assert rows.names == ["bad", "good"] and rows.labels == [1, 0] * 6
    assert rows.texts == (texts or [text + mark for text in PLAIN[:6] for mark in ("", "?")])
    assert (rows.text_column, rows.label_column, rows.left_out) == ("text", "label", [])


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    filename, content, message = BAD[name]
    path = write(tmp_path, filename, content)
    with pytest.raises(ValueError) as caught:
        read_labelled(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9"], ["9", "10"]),
        (["1.0", "0"], ["0", "1"]),
        (["-1", "+1"], ["-1", "+1"]),
        (["1.5", "1"], ["1", "1.5"]),
        (["10", "nan"], ["10", "nan"]),
        (["1e3", "9"], ["1e3", "9"]),
        ([" pos ", "neg"], ["neg", "pos"]),
        (["0 😀", "1 漢"], ["0 😀", "1 漢"]),
    ],
)
def test_labels(tmp_path, labels, names):
    rows = read_labelled(write(tmp_path, "x.csv", table(labels=labels * 6).encode()))
    assert rows.names == names
    assert [rows.names[i] for i in rows.labels[:2]] == [label.strip().removesuffix(".0") for label in labels]


def test_labels_of_json(tmp_path):
    for labels, names in (([2, 10], ["2", "10"]), ([True, False], ["False", "True"]), ([1.0, 0.5], ["0.5", "1"])):
        content = "\n".join(json.dumps(row) for row in objects(labels=labels * 6)).encode()
        assert read_labelled(write(tmp_path, "x.jsonl", content)).names == names


@pytest.mark.parametrize(
    ("header", "options", "found"),
    [
        (("Review", "Sentiment"), {}, ("Review", "Sentiment")),
        (("words", "label"), {}, ("words", "label")),
        (("text", "kind"), {}, ("text", "kind")),
        (("a", "b"), {"text_column": "a", "label_column": "b"}, ("a", "b")),
        (("text", "label"), {"text_column": "label", "label_column": "text"}, ("label", "text")),
    ],
)
def test_columns(tmp_path, header, options, found):
    labels = LABELS if found[0] == header[0] else [f"{i % 2}" for i in range(12)]
    texts = TEXTS if found[0] == header[0] else ["one", "two"] * 6
    rows = read_labelled(write(tmp_path, "x.csv", table(texts, labels, header=header).encode()), **options)
    assert (rows.text_column, rows.label_column) == found


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path, "x.csv", table().encode())
    with pytest.raises(
        ValueError, match=r"has no column 'review', only \['text', 'label'\]: name one of them by --text"
    ):
        read_labelled(path, "review")
    with pytest.raises(ValueError, match="both are to be in 'text'"):
        read_labelled(path, "text", "text")


PAIRS = [(text, f"{text} or not") for text in PLAIN]
PAIR_HEADER = ("premise", "hypothesis", "label")


def pair_table(header=PAIR_HEADER):
    rows = [header, *((*pair, label) for pair, label in zip(PAIRS, LABELS, strict=True))]
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize(
    ("header", "options"),
    [
        (PAIR_HEADER, {}),
        (PAIR_HEADER, {"text_column": "premise", "label_column": "label"}),
        (("sentence", "text", "kind"), {"label_column": "kind"}),
    ],
)
def test_pairs(tmp_path, header, options):
    """The second column is never taken for the first one, and the first one is found without it."""
    path = write(tmp_path, "x.csv", (pair_table(header) + ",alone,good\r\nalone, ,bad\r\n").encode())
    rows = read_labelled(path, **options, text_pair_column=header[1])
    assert rows.texts == PAIRS and rows.labels == [1, 0] * 6 and rows.left_out == ["line 14", "line 15"]
    assert (rows.text_column, rows.text_pair_column, rows.label_column) == header
    column = options.get("text_column", header[0])
    assert [row.value for row in numbered_texts(path, column, text_pair_column=header[1])] == PAIRS


def test_pairs_of_json(tmp_path):
    content = "\n".join(json.dumps({"text": first, "other": second}) for first, second in PAIRS)
    path = write(tmp_path, "x.jsonl", content.encode())
    assert [row.value for row in numbered_texts(path, None, text_pair_column="other")] == PAIRS


# The file's name, its content, the columns of texts, of labels and of second texts, and what the error says.
BAD_PAIRS = {
    "no_such_column": (
        "x.csv", pair_table(), (None, None, "b"),
        "has no column 'b', only ['premise', 'hypothesis', 'label']: name one of them by --text_pair_column",
    ),
    "the_column_of_texts_again": (
        "x.csv", pair_table(), ("premise", None, "premise"), "--text_pair_column must name a column of its own, 'premi",
    ),
    "the_column_of_labels_again": (
        "x.csv", pair_table(), (None, "label", "label"), "--text_pair_column must name a column of its own, 'label' is",
    ),
    "a_key_missing": (
        "x.jsonl", '{"text": "a", "b": "c", "label": 1}\n{"text": "a", "label": 1}\n', (None, None, "b"),
        "line 2: has no column 'b', only ['text', 'label']: name one by --text_pair_column",
    ),
    "a_number": (
        "x.jsonl", '{"text": "a", "b": 3, "label": 1}\n', (None, None, "b"), "line 1: must hold a text, got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs(tmp_path, name):
    filename, content, (text, label, second), message = BAD_PAIRS[name]
    path = write(tmp_path, filename, content.encode())
    with pytest.raises(ValueError) as caught:
        read_labelled(path, text, label, text_pair_column=second)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(("name", "place"), [("x.txt", "line 1"), ("x.json", "row 1")])
def test_pairs_of_files_without_columns(tmp_path, name, place):
    path = write(tmp_path, name, b'["a", "b"]')
    with pytest.raises(ValueError, match=f"{place}: must have two columns for --text_pair_column, got one text: give"):
        numbered_texts(path, None, text_pair_column="b")


def test_rows_that_are_left_out(tmp_path):
    content = table() + " ,good\r\n,\r\nsomething,\r\n"
    rows = read_labelled(write(tmp_path, "x.csv", content.encode()))
    assert rows.texts == TEXTS
    # The third text has a line break, so line 13 is the twelfth row's.
    assert rows.left_out == ["line 15", "line 16", "line 17"]


def test_places(tmp_path):
    path = write(tmp_path, "x.csv", b'\ntext\n\n"two\nlines"\nlast\n')
    assert numbered_texts(path, None) == [Row("line 4", "two\nlines"), Row("line 6", "last")]
    path = write(tmp_path, "x.txt", "\ufeffone\r\n\r\n \u2028two\x85\rthree".encode())
    assert numbered_texts(path, None) == [Row("line 1", "one"), Row("line 3", " \u2028two\x85"), Row("line 4", "three")]


def test_the_longest_text(tmp_path):
    text = "a" * MAX_CHARACTERS
    for name in ("x.txt", "x.csv"):
        path = write(tmp_path, name, f"text\n{text}\n".encode())
        assert read_texts(path, "text")[-1] == text
        path.write_text(f"text\n{text}a\n")
        with pytest.raises(ValueError, match="line 2: has a text of more than 131,072 characters"):
            read_texts(path, "text")


GOOD_TEXTS = {
    "x.txt": "the old clock\n\nit rained\n",
    "x.csv": 'sentence,label\n"the ""old"" clock, again",1\nit rained,0\n',
    "x.tsv": 'sentence\tlabel\nthe "old clock\t1\nit rained\t0\n',
    "x.json": '[{"sentence": "the old clock"}, {"sentence": "it rained"}]',
    "x.jsonl": '{"sentence": "the old clock"}\n{"sentence": "it rained"}\n',
    "list.json": '["the old clock", "it rained"]',
}
BAD_TEXTS = {
    "x.pdf": ("a", "must be a .txt, .csv, .tsv, .json or .jsonl file"),
    "x.txt": ("\n \n", "holds no texts"),
    "x.csv": ("text\na\n", "line 2: has no column 'sentence', only ['text']"),
    "x.json": ("{", "is not JSON"),
    "x.jsonl": ('{"sentence": 3}', "line 1: must hold a text, got 3"),
    "numbers.json": ("[1, 2]", "row 1: must hold a text, got 1"),
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
def test_texts(tmp_path, name):
    (tmp_path / name).write_text(GOOD_TEXTS[name])
    texts = read_texts(tmp_path / name, "sentence")
    first = {"x.csv": 'the "old" clock, again', "x.tsv": 'the "old clock'}.get(name, "the old clock")
    assert texts == [first, "it rained"]


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(tmp_path, name):
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_texts(tmp_path / name, "sentence")
