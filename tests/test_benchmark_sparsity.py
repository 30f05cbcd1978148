"""The benchmark of accuracy against energy and speed, run as a user runs it, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from example_scripts import refused
from small_bert import bert_fixture
from transformers import BertModel

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sparsity.py"
bert = bert_fixture(BertModel)


@pytest.mark.slow
def test_a_short_run(tmp_path, bert, texts):
    targets = ["none", "0.1"]
    rows = [f'"{text}",{"ab"[i % 2]}' for i, text in enumerate(texts)] * 4
    arguments = ["--model_name_or_path", bert, "--targets", *targets, "--repeats", 2, "--threads", 1]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]), encoding="utf-8")
        arguments += [f"--{split}_file", tmp_path / f"{split}.csv"]
    arguments += ["--distillation_steps", 1, "--steps", 1, "--batch_size", 4]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "outputs" / "benchmarks"
    (table,) = json.loads((folder / "sparsity.json").read_text())["tables"]
    assert [row["target"] for row in table["rows"]] == targets
    for row in table["rows"]:
        assert 0 < row["firing_rate"] < 1 and 0 <= row["accuracy"] <= 1
        assert 0 < row["matrix_product_microjoules"] < row["microjoules"]
        assert all(0 <= row[f"labels_changed_{dtype}"] <= 1 for dtype in ("bfloat16", "int8"))
        assert row["event_driven_milliseconds"]["repeats"] == 2 and row["dense_milliseconds"]["median"] > 0
    quiet, busy = table["rows"][1], table["rows"][0]
    assert quiet["firing_rate"] < busy["firing_rate"]
    assert quiet["matrix_product_microjoules"] < busy["matrix_product_microjoules"]
    assert (folder / "sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "2"], "--targets must be `none` or lie in (0, 1), got '2'"),
        (["--targets", "low"], "got 'low'"),
        (["--train_file", "x.csv"], "must be given together"),
        (["--convert", "--student_name_or_path", "x"], "give either --convert or --student_name_or_path"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert message in refused(capsys, "sparsity", *arguments)
