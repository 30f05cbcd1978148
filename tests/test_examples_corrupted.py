"""The script that labels sentences of a text, and corrupted copies of them."""

import pytest
from example_scripts import refused, run_script
from glue_tasks import TaskArguments
from made_text import make_text


def test_script(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(make_text(60), encoding="utf-8")
    arguments = ["--train_file", tmp_path / "a.txt", tmp_path / "b.txt", "--max_sentences", 40]
    arguments += ["--validation_sentences", 8]
    for seed, output in ((0, "one"), (0, "again"), (1, "other")):
        run_script("corrupted_sentences", *arguments, "--seed", seed, "--output_dir", tmp_path / output)
    files = {output: (tmp_path / output / "CoLA" / "train.tsv").read_bytes() for output in ("one", "again", "other")}
    assert files["one"] == files["again"] != files["other"]

    _, data = TaskArguments(task_name="cola", data_dir=str(tmp_path / "one")).load()
    assert len(data["train"]) == 64 and len(data["validation"]) == 16
    for rows in data.values():
        assert rows["label"] == [1, 0] * (len(rows) // 2)
        assert all(good != bad for good, bad in zip(rows["sentence"][::2], rows["sentence"][1::2], strict=True))
    assert not list((tmp_path / "one").rglob(".*"))


def test_shares_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(300), encoding="utf-8")
    (tmp_path / "b.txt").write_text(make_text(300).replace("The", "Every"), encoding="utf-8")
    arguments = ["--train_file", tmp_path / "a.txt", tmp_path / "b.txt", "--source_shares", 0.9, 0.1]
    arguments += ["--max_sentences", 200, "--validation_sentences", 5]
    run_script("corrupted_sentences", *arguments, "--output_dir", tmp_path / "out")
    _, data = TaskArguments(task_name="cola", data_dir=str(tmp_path / "out")).load()
    good = [text for rows in data.values() for text in rows["sentence"][::2]]
    assert len(good) == 200 and 0 < sum(text.startswith("every") for text in good) <= 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param([], "--train_file", id="no-text"),
        pytest.param(["--train_file", "missing.txt"], "there is no file missing.txt", id="missing"),
        pytest.param(["--train_file", "{text}", "--source_shares", 0.5, 0.5], "must be 1 positive", id="shares"),
        pytest.param(["--train_file", "{text}", "--source_shares", 0.9], "add up to 1", id="sum"),
        pytest.param(["--train_file", "{text}", "--max_sentences", 5], "--validation_sentences", id="held-out"),
        pytest.param(["--train_file", "{text}", "--validation_sentences", 0], ">= 1", id="none-held-out"),
        pytest.param(["--train_file", "{text}", "--max_sentences", 5000], "too few", id="too-few"),
    ],
)
def test_refuses(tmp_path, capsys, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text(make_text(10), encoding="utf-8")
    arguments = [text if x == "{text}" else x for x in arguments]
    assert message in refused(capsys, "corrupted_sentences", *arguments, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
