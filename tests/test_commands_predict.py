"""`snn-bert predict`: labels for the texts of a file, in their order."""

import csv
import json

import pytest
import test_text_files
import torch
from command_line import run_command

from modeling_snn_bert import SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.commands.classifier import TextClassifier
from modeling_snn_bert.commands.predict import predict_all, shown


@pytest.fixture
def model(make_config):
    return SNNBertForSequenceClassification(make_config(id2label={0: "dull", 1: "joy", 2: "so, so"})).eval()


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def expected(model, tokenizer, texts):
    """The probabilities of each text, of the dense model and one text at a time."""
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in texts]


def test_files(checkpoint, texts, expected, model, tmp_path, assert_spikes_flow, tokenizer):
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    assert_spikes_flow(model, **tokenizer(texts, padding=True, return_tensors="pt"))
    for suffix in (".csv", ".jsonl"):
        out = tmp_path / "new" / f"out{suffix}"
        result = run_command("predict", checkpoint, tmp_path / "texts.txt", "--output_file", out, "--batch_size", 4)
        assert f"6 predictions written to {out}" in result.stdout
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
        assert [row["text"] for row in rows] == texts
        assert [row["place"] for row in rows] == [f"line {2 * i + 1}" for i in range(6)]
        for row, scores in zip(rows, expected, strict=True):
            assert float(row["score"]) == pytest.approx(max(scores), abs=1e-5)
            assert row["label"] == model.config.id2label[scores.index(max(scores))]
        assert [path.name for path in out.parent.iterdir() if path != out] == (["out.csv"] * (suffix == ".jsonl"))


@pytest.fixture
def pairs(texts, tmp_path):
    """A file of pairs, one of which lacks a text, and the pairs that are whole."""
    pairs = [*zip(texts, reversed(texts), strict=True)]
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("a", "b"), ("alone", ""), *pairs])
    return tmp_path / "pairs.csv", pairs


def test_pairs(checkpoint, model, tokenizer, pairs, tmp_path, assert_spikes_flow):
    path, pairs = pairs
    with torch.no_grad():
        batches = [tokenizer(*pair, return_tensors="pt") for pair in pairs]
        expected = [model(**batch).logits.softmax(-1)[0].tolist() for batch in batches]
    assert all(batch["token_type_ids"].max() == 1 for batch in batches)
    assert_spikes_flow(model, **batches[0])
    columns = ["--text_column", "a", "--text_pair_column", "b"]
    for suffix in (".csv", ".jsonl"):
        out = tmp_path / f"out{suffix}"
        run_command("predict", checkpoint, path, *columns, "--output_file", out, "--batch_size", 4)
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
        assert [(row["text"], row["text_pair"]) for row in rows] == pairs and rows[0]["place"] == "line 3"
        for row, scores in zip(rows, expected, strict=True):
            assert float(row["score"]) == pytest.approx(max(scores), abs=1e-5)
            assert row["label"] == model.config.id2label[scores.index(max(scores))]
    lines = run_command("predict", checkpoint, path, *columns).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [" | ".join(map(shown, pair)) for pair in pairs]


@pytest.mark.parametrize(
    ("reads_pairs", "arguments", "message"),
    [
        (True, [], "was trained on pairs of texts: give --text_pair_column, got None"),
        (False, ["--text_pair_column", "b"], "was trained on single texts: leave out --text_pair_column, got 'b'"),
    ],
)
def test_a_model_knows_what_it_reads(model, checkpoint, pairs, reads_pairs, arguments, message):
    model.config.reads_pairs = reads_pairs
    model.config.save_pretrained(checkpoint)
    result = run_command("predict", checkpoint, pairs[0], "--text_column", "a", *arguments, exit_code=1)
    assert message in " ".join(result.stderr.split()) and not result.stdout


def test_terminal(checkpoint, texts, expected, tmp_path):
    (tmp_path / "texts.csv").write_text("n,Review\n" + "".join(f'1,"{text}"\n' for text in texts))
    lines = run_command("predict", checkpoint, tmp_path / "texts.csv").stdout.splitlines()
    assert [line.split("  ")[-1].removesuffix("...") for line in lines] == [text[:80] for text in texts]
    assert [float(line[8:13]) for line in lines] == pytest.approx([max(scores) for scores in expected], abs=6e-4)


def test_batches_and_order_change_nothing(model, tokenizer, texts, expected):
    classifier = TextClassifier(model, tokenizer)
    for batch_size in (1, 4, 100):
        found = predict_all(classifier, texts * 3, batch_size)
        torch.testing.assert_close(torch.tensor([p.scores for p in found]), torch.tensor(expected * 3))


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_a_length_without_room_for_a_text_is_refused(model, tokenizer, texts, max_length):
    with pytest.raises(ValueError, match=f"`max_length` must be >= 3 for texts, got {max_length}"):
        TextClassifier(model, tokenizer, max_length=max_length)(texts)


def test_texts_that_are_odd(checkpoint, tmp_path):
    texts = ["\x07\x1b[2J", "😀👩\u200d👩", "漢字", "\u200b", "a" * 100_000, "word " * 20_000, "\u2028"]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts), encoding="utf-8")
    lines = run_command("predict", checkpoint, path).stdout.splitlines()
    assert len(lines) == sum(bool(text.strip()) for text in texts) and "\x1b" not in "".join(lines)


def test_shown():
    assert shown("a\x1b[2J\nb\u2028c") == "a?[2J b c"
    assert shown("x" * 90) == "x" * 80 + "..."


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_other_weights(checkpoint, tmp_path, weight_dtype, texts):
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    result = run_command("predict", checkpoint, tmp_path / "texts.txt", "--weight_dtype", weight_dtype)
    assert len(result.stdout.splitlines()) == 6


# Exit code, arguments after `predict`, and what the message must say. {…} are filled with paths.
BAD_PREDICTIONS = {
    "no_such_file": (2, ["{model}", "no.txt"], "no.txt"),
    "file_of_another_kind": (
        2,
        ["{model}", "{texts}", "--output_file", "x.xlsx"],
        "must end in .csv or .jsonl, got x.",
    ),
    "weights_of_another_kind": (
        2,
        ["{model}", "{texts}", "--weight_dtype", "int4"],
        "must be one of float32, bfloat16",
    ),
    "max_length_2": (
        2,
        ["{model}", "{texts}", "--max_length", "2"],
        "Invalid value for '--max_length': must be >= 3, got 2",
    ),
    "max_length_4_for_pairs": (
        2,
        ["{model}", "{columns}", "--text_column", "a", "--text_pair_column", "b", "--max_length", "4"],
        "Invalid value for --max_length: must be >= 5 for pairs of texts, got 4",
    ),
    "pairs_of_lines": (
        1,
        ["{model}", "{texts}", "--text_pair_column", "b"],
        "line 1: must have two columns for --text_pair_column, got one text: give a .csv",
    ),
    "empty_file": (1, ["{model}", "{empty}"], "is empty: it holds no texts"),
    "columns_of_unknown_names": (1, ["{model}", "{columns}"], "name the column by --text_column"),
    "no_such_model": (1, ["./nowhere", "{texts}"], "nowhere"),
    "another_head": (1, ["{encoder}", "{texts}"], "must be a classifier of texts, it is a SNNBertModel: make one with"),
    "regression": (1, ["{regression}", "{texts}"], "must give one label of several to a text, its problem_type is"),
}


def test_bad_predictions(checkpoint, make_config, tokenizer, tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)
    places = {"model": checkpoint}
    for name, model in (
        ("encoder", SNNBertModel(make_config())),
        ("regression", SNNBertForSequenceClassification(make_config(num_labels=1, problem_type="regression"))),
    ):
        places[name] = tmp_path / name
        model.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    for name, filename, content in (
        ("texts", "x.txt", "a"), ("empty", "empty.csv", ""), ("columns", "c.csv", "a,b\n1,2\n"),
    ):  # fmt: skip
        places[name] = tmp_path / filename
        places[name].write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, (exit_code, arguments, message) in BAD_PREDICTIONS.items():
        with subtests.test(name):
            result = run_command("predict", *(a.format(**places) for a in arguments), exit_code=exit_code)
            assert message in " ".join(result.stderr.split()) and not result.stdout
            assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_good_files(checkpoint, tmp_path, subtests):
    for name, (filename, content, encoding, _) in test_text_files.GOOD.items():
        with subtests.test(name):
            path = test_text_files.write(tmp_path, filename, content)
            result = run_command("predict", checkpoint, path, "--encoding", encoding)
            assert len(result.stdout.splitlines()) == 12
            path.unlink()
