"""The command `snn-bert`: most of it in this process, and once as a user starts it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from command_line import run_command
from small_bert import write_bert, write_mpnet
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    MPNetForSequenceClassification,
    MPNetTokenizer,
)
from typer.testing import CliRunner

from modeling_snn_bert import (
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
    cli,
    cpu_kernels,
)
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.energy.joules import find_counters


@pytest.fixture
def snn_bert():
    """A function that runs the command and returns its result: exit_code, stdout, stderr."""
    return run_command


@pytest.fixture
def bert(tokenizer, tmp_path):
    """A folder with a small BERT classifier; beside it stands texts.txt."""
    settings = {"intermediate_size": 48, "max_position_embeddings": 64, "id2label": {0: "dull", 1: "joy"}}
    write_bert(tmp_path / "bert", tokenizer, BertForSequenceClassification, **settings)
    return tmp_path / "bert"


@pytest.fixture
def texts_file(texts, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(make_config, tokenizer, tmp_path):
    config = make_config(id2label={0: "dull", 1: "joy"})
    SNNBertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestConvert:
    def test_is_convert_bert(self, snn_bert, bert, texts_file, texts, tokenizer, tmp_path, assert_spikes_flow):
        result = snn_bert("convert", bert, tmp_path / "out", "--data_file", texts_file, "--firing_rate", 0.3)
        assert "6 texts" in result.stdout and "SNNBertForSequenceClassification written to" in result.stdout
        model = SNNBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
        rates = assert_spikes_flow(model, **inputs)
        assert 0.2 < sum(rates.values()) / len(rates) < 0.4
        expected = convert_bert(BertForSequenceClassification.from_pretrained(bert), [inputs], 0.3)
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
        assert model.config.id2label == {0: "dull", 1: "joy"}
        assert {path.name for path in tmp_path.iterdir()} == {"bert", "texts.txt", "out"}

    def test_an_mpnet_with_its_tokenizer(self, snn_bert, texts_file, texts, tokenizer, tmp_path, assert_spikes_flow):
        write_mpnet(tmp_path / "mpnet", tokenizer, MPNetForSequenceClassification)
        result = snn_bert("convert", tmp_path / "mpnet", tmp_path / "out", "--data_file", texts_file)
        assert "SNNBertForSequenceClassification written to" in result.stdout and "random" not in result.stderr
        model = SNNBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        assert model.config.relative_attention_num_buckets == 32
        ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "mpnet"))
        assert type(ours) is type(theirs) is MPNetTokenizer
        inputs = ours(texts, texts[::-1], padding=True, return_tensors="pt")
        assert inputs["input_ids"].tolist() == theirs(texts, texts[::-1], padding=True)["input_ids"]
        assert (inputs["input_ids"] == model.config.pad_token_id).equal(inputs["attention_mask"] == 0)
        assert_spikes_flow(model, **inputs)

    def test_settings_and_head(self, snn_bert, bert, texts_file, tmp_path):
        settings = [
            "--setting",
            "spike_type=ternary",
            "--setting",
            "reset_iterations=0",
            "--setting",
            "normalize=False",
        ]
        result = snn_bert(
            "convert", bert, tmp_path / "out", "--data_file", texts_file, "--head", "TokenClassification", *settings
        )
        assert "random until trained" not in result.stderr  # the classifier has the same name and shape
        model = SNNBertForTokenClassification.from_pretrained(tmp_path / "out")
        config = model.config
        assert (config.spike_type, config.reset_iterations, config.normalize) == ("ternary", 0, False)

    def test_a_neuron_of_one_length(self, snn_bert, bert, texts_file, tmp_path):
        settings = ["--setting", "neuron_type=psn", "--setting", "psn_length=16"]
        snn_bert("convert", bert, tmp_path / "out", "--data_file", texts_file, "--head", "Model", *settings)
        assert SNNBertModel.from_pretrained(tmp_path / "out").config.psn_length == 16

    def test_a_new_head_is_said_to_be_random(self, snn_bert, bert, texts_file, tmp_path):
        BertModel.from_pretrained(bert).save_pretrained(bert)
        command = ["convert", bert, tmp_path / "out", "--data_file", texts_file]
        result = snn_bert(*command, "--head", "SequenceClassification")
        assert "random until trained: classifier.bias, classifier.weight" in result.stderr

    def test_overwrite(self, snn_bert, bert, texts_file, tmp_path):
        command = ["convert", bert, tmp_path / "out", "--data_file", texts_file]
        (tmp_path / "out").mkdir()  # an empty folder is as good as none
        snn_bert(*command)
        (tmp_path / "out" / "stale.txt").write_text("of the last run")
        assert "--overwrite" in snn_bert(*command, exit_code=2).stderr
        snn_bert(*command, "--overwrite")
        assert not (tmp_path / "out" / "stale.txt").exists()

    def test_a_folder_of_other_things_is_never_replaced(self, snn_bert, bert, texts_file, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis.tex").write_text("x")
        command = ["convert", bert, tmp_path / "precious", "--data_file", texts_file, "--overwrite"]
        assert "is no checkpoint" in snn_bert(*command, exit_code=2).stderr
        assert (tmp_path / "precious" / "thesis.tex").exists()

    def test_a_failure_while_saving_leaves_the_old_folder(self, snn_bert, bert, texts_file, tmp_path, monkeypatch):
        command = ["convert", bert, tmp_path / "out", "--data_file", texts_file]
        snn_bert(*command)
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

        def fail(self, folder, **kwargs):
            (folder / "config.json").write_text("{")
            raise OSError("No space left on device")

        monkeypatch.setattr(SNNBertForSequenceClassification, "save_pretrained", fail)
        result = snn_bert(*command, "--overwrite", exit_code=1)
        assert "No space left on device" in result.stderr
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert {path.name for path in tmp_path.iterdir()} == {"bert", "texts.txt", "out"}


class TestEnergy:
    def test_report(self, snn_bert, checkpoint, texts_file, tmp_path):
        out = tmp_path / "deep" / "out"
        result = snn_bert(
            "energy", checkpoint, "--data_file", texts_file, "--output_dir", out, "--max_samples", 2, "--batch_size", 1
        )
        numbers = json.loads((out / "report.json").read_text())
        assert numbers["sequences"] == 2 and numbers["model"] == "SNNBertForSequenceClassification"
        assert (out / "report.md").read_text().strip() in result.stdout
        assert {path.name for path in out.iterdir()} == set(
            "report.html report.md report.json energy.png firing_rates.png spikes.png".split()
        )

    def test_joules_are_measured_or_refused_before_any_work(self, snn_bert, checkpoint, texts_file, tmp_path):
        try:
            find_counters()
        except RuntimeError as error:
            wanted, code = str(error), 1
        else:
            wanted, code = "## Measured on this machine", 0
        out = tmp_path / "out"
        command = ["energy", checkpoint, "--data_file", texts_file, "--output_dir", out, "--no_plots", "--measure"]
        result = snn_bert(*command, exit_code=code)
        assert wanted in (result.stderr if code else result.stdout) and out.exists() == (code == 0)
        assert code == 0 or "leave out --measure: the estimates need no counters" in result.stderr

    def test_baseline(self, snn_bert, checkpoint, make_config, texts_file, tmp_path):
        config = make_config(neuron_type="lif", coding="repeat", num_timesteps=4)
        SNNBertForSequenceClassification(config).save_pretrained(tmp_path / "repeat")
        result = snn_bert(
            "energy", checkpoint, "--data_file", texts_file, "--baseline", tmp_path / "repeat", "--no_plots",
            "--output_dir", tmp_path / "out",
        )  # fmt: skip
        assert "LIF, repeat coding, 4 time-steps" in result.stdout
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "report.json"}


class TestSpikes:
    def test_terminal(self, snn_bert, checkpoint, tokenizer):
        sentence = "The quick brown fox jumps."
        result = snn_bert("spikes", checkpoint, sentence, "--layer", 1, "--channels", 24)
        model = SNNBertForSequenceClassification.from_pretrained(checkpoint).eval()
        inputs = tokenizer(sentence, return_tensors="pt")
        outputs = model(**inputs, output_spikes=True)
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        label = model.config.id2label[outputs.logits.argmax().item()]
        assert result.stdout.startswith(f"label: {label} (")
        blocks = result.stdout.split("\n\n")[1:]
        assert len(blocks) == 7
        for block, spikes in zip(blocks, outputs.spikes[7:], strict=True):
            title, *lines = block.strip().split("\n")
            assert f"{spikes.mean().item():.3f} spikes per token" in title
            marks = [line[-24:] for line in lines]
            assert [line.split()[0] for line in lines] == [token[: cli.TOKEN_WIDTH] for token in tokens]
            shown = torch.tensor([[mark in "█#" for mark in line] for line in marks])
            assert torch.equal(shown.float(), spikes[0, :, :24])
        assert 0 < outputs.spikes[7].mean() < 1

    def test_picture(self, snn_bert, checkpoint, tmp_path):
        path = tmp_path / "new" / "spikes.png"
        result = snn_bert("spikes", checkpoint, "she reads " * 40, "--output_file", path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"written to {path} (the first 48 of 64 tokens)" in result.stdout

    def test_odd_tokens(self, monkeypatch):
        lines = cli.raster_lines(torch.tensor([[1, 0, -1]] * 2), ["a\x1b[2Jb", "漢字"])
        assert [line.split()[-1] for line in lines] in (["█·-"] * 2, ["#.-"] * 2)
        assert not any("\x1b" in line for line in lines)


class TestInfo:
    def test_json(self, snn_bert, checkpoint):
        facts = json.loads(snn_bert("info", checkpoint, "--json").stdout)
        model = SNNBertForSequenceClassification.from_pretrained(checkpoint)
        assert facts["model"]["parameters"] == model.num_parameters()
        # A BERT of the same shape has none of these.
        own = sum(p.numel() for p in model.parameters())
        bert = BertForSequenceClassification(
            BertConfig(**{name: getattr(model.config, name) for name in facts["sizes"]}, num_labels=2)
        )
        assert facts["model"]["parameters of neurons"] == own - bert.num_parameters()
        assert facts["model"]["labels"] == ["dull", "joy"]
        assert facts["neurons"]["neuron layers"] == 14 and facts["neurons"]["kinds"] == ["14 BPSN"]
        assert facts["neurons"]["neurons"] == 2 * (6 * 32 + 48)
        assert facts["neurons"]["decay_forward"]["mean"] == pytest.approx(0.05)

    def test_text(self, snn_bert, checkpoint):
        printed = snn_bert("info", checkpoint).stdout
        assert re.search(r"spike_type +binary", printed) and re.search(r"neuron layers +14", printed)

    def test_of_the_processor_alone(self, snn_bert):
        assert json.loads(snn_bert("info", "--json").stdout) == {"CPU": cpu_kernels.kernel_facts()}
        assert cpu_kernels.kernel_facts()["kernels"] in snn_bert("info").stdout

    def test_other_heads_and_neurons(self, snn_bert, make_config, tmp_path):
        SNNBertModel(make_config(neuron_type="psn", psn_length=16)).save_pretrained(tmp_path)
        facts = json.loads(snn_bert("info", tmp_path, "--json").stdout)
        assert "labels" not in facts["model"] and facts["neurons"]["kinds"] == ["14 PSN"]


# Exit code, arguments after the command, and what the message must say. {…} are filled with paths.
BAD_COMMANDS = {
    "no_such_command": (2, ["fly"], "No such command"),
    "no_model": (2, ["spikes"], "Missing argument"),
    "no_such_option": (2, ["info", "{model}", "--colour"], "No such option"),
    "no_data_file": (2, ["energy", "{model}"], "--data_file"),
    "missing_data_file": (2, ["energy", "{model}", "--data_file", "no.txt"], "no.txt"),
    "data_file_is_a_folder": (2, ["energy", "{model}", "--data_file", "{model}"], "directory"),
    "max_samples_0": (2, ["energy", "{model}", "--data_file", "{texts}", "--max_samples", "0"], "must be >= 1, got 0"),
    "batch_size_word": (2, ["energy", "{model}", "--data_file", "{texts}", "--batch_size", "x"], "valid integer"),
    "max_length_0": (2, ["energy", "{model}", "--data_file", "{texts}", "--max_length", "0"], "must be >= 3, got 0"),
    "data_file_of_another_kind": (1, ["energy", "{model}", "--data_file", "{pdf}"], "must be a .txt, .csv, .tsv"),
    "data_file_not_utf8": (1, ["energy", "{model}", "--data_file", "{binary}"], "utf-8"),
    "no_such_column": (
        1, ["energy", "{model}", "--data_file", "{rows}", "--text_column", "text"],
        "line 2: has no column 'text', only ['sentence']: name one by --text_column",
    ),
    "baseline_without_repeat": (
        1, ["energy", "{model}", "--data_file", "{texts}", "--baseline", "{model}"], "must have `coding='repeat'`",
    ),
    "model_missing": (1, ["info", "./nowhere"], "nowhere"),
    "model_is_a_bert": (1, ["info", "{bert}"], "must be an SNN-BERT checkpoint, its model_type is 'bert'"),
    "weights_truncated": (1, ["info", "{truncated}"], "is damaged or no safetensors file"),
    "config_broken": (1, ["info", "{broken}"], "JSON"),
    "setting_impossible": (1, ["info", "{impossible}"], "`num_timesteps` must be 1"),
    "layer_too_high": (1, ["spikes", "{model}", "a", "--layer", "2"], "--layer must lie in [0, 2)"),
    "layer_negative": (1, ["spikes", "{model}", "a", "--layer", "-1"], "--layer must lie in [0, 2)"),
    "sentence_empty": (2, ["spikes", "{model}", " "], "must hold at least one word"),
    "picture_of_another_kind": (2, ["spikes", "{model}", "a", "--output_file", "a.txt"], "must end in .png"),
    "channels_0": (2, ["spikes", "{model}", "a", "--channels", "0"], "must be >= 1, got 0"),
    "firing_rate_0": (2, ["convert", "{bert}", "out", "--data_file", "{texts}", "--firing_rate", "0"], "lie in (0, 1)"),
    "firing_rate_nan": (
        2, ["convert", "{bert}", "out", "--data_file", "{texts}", "--firing_rate", "nan"], "lie in (0, 1), got nan",
    ),
    "head_unknown": (2, ["convert", "{bert}", "out", "--data_file", "{texts}", "--head", "x"], "must be one of Model"),
    "head_that_is_not_ours": (1, ["convert", "{nsp}", "out", "--data_file", "{texts}"], "which SNN-BERT lacks"),
    "not_a_bert": (1, ["convert", "{distil}", "out", "--data_file", "{texts}"], "its model_type is 'distilbert'"),
    "an_snn_bert": (1, ["convert", "{model}", "out", "--data_file", "{texts}"], "its model_type is 'snn_bert'"),
    "setting_without_value": (
        2, ["convert", "{bert}", "out", "--data_file", "{texts}", "--setting", "decay"], "NAME=VALUE, got 'decay'",
    ),
    "setting_unknown": (
        2, ["convert", "{bert}", "out", "--data_file", "{texts}", "--setting", "decoy=1"], "'decoy' is none of",
    ),
    "setting_of_a_wrong_type": (
        1, ["convert", "{bert}", "out", "--data_file", "{texts}", "--setting", "decay=fast"], "decay",
    ),
    "setting_out_of_range": (
        1, ["convert", "{bert}", "out", "--data_file", "{texts}", "--setting", "decay=2"], "`decay` must lie in (0, 1)",
    ),
    "output_is_a_file": (2, ["convert", "{bert}", "{texts}", "--data_file", "{texts}"], "name a new folder"),
}  # fmt: skip


@pytest.fixture
def places(bert, checkpoint, texts_file, tmp_path):
    """The paths that stand in `BAD_COMMANDS`."""
    paths = {"bert": bert, "model": checkpoint, "texts": texts_file}
    for name, content in (("x.pdf", b"a"), ("x.txt", b"\xff\xfe\xfa"), ("x.csv", b"sentence\na\n")):
        (tmp_path / name).write_bytes(content)
    paths |= {"pdf": tmp_path / "x.pdf", "binary": tmp_path / "x.txt", "rows": tmp_path / "x.csv"}
    for name, config in (("nsp", None), ("distil", DistilBertConfig())):
        paths[name] = tmp_path / name
        if config is not None:
            config.save_pretrained(tmp_path / name)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertForNextSentencePrediction(config).save_pretrained(tmp_path / "nsp")
    weights, config = (checkpoint / name for name in ("model.safetensors", "config.json"))
    for name, bad_weights, bad_config in (
        ("truncated", weights.read_bytes()[:100], config.read_text()),
        ("broken", weights.read_bytes(), config.read_text()[:50]),
        ("impossible", weights.read_bytes(), json.dumps({**json.loads(config.read_text()), "num_timesteps": 4})),
    ):
        paths[name] = tmp_path / name
        paths[name].mkdir()
        (paths[name] / "model.safetensors").write_bytes(bad_weights)
        (paths[name] / "config.json").write_text(bad_config)
    return paths


def test_bad_commands(snn_bert, places, tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, (exit_code, arguments, message) in BAD_COMMANDS.items():
        with subtests.test(name):
            result = snn_bert(*(argument.format(**places) for argument in arguments), exit_code=exit_code)
            # Long messages of the parser are broken into lines.
            assert message in " ".join(result.stderr.split())
            assert not result.stdout and "Traceback" not in result.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_traceback_on_request(checkpoint, monkeypatch):
    monkeypatch.setenv("SNN_BERT_TRACEBACK", "1")
    result = CliRunner().invoke(cli.app, ["spikes", str(checkpoint), "a", "--layer", "7"])
    assert isinstance(result.exception, ValueError)


def test_help(snn_bert):
    commands = {"convert", "energy", "spikes", "info", "train", "predict", "serve"}
    assert commands <= set(snn_bert("--help").stdout.split())
    for command in commands:
        printed = snn_bert(command, "-h").stdout
        assert f"snn-bert {command} {'--data' if command == 'train' else 'my-'}" in printed and "Example" in printed
    assert "Usage" in snn_bert(exit_code=2).output  # no command at all


def test_version(snn_bert):
    assert re.match(r"snn-bert \d+\.\d+\.\d+ \(torch ", snn_bert("--version").stdout)


def test_without_matplotlib(snn_bert, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = snn_bert("spikes", checkpoint, "a", "--output_file", tmp_path / "a.png", exit_code=1)
    assert "pip install matplotlib" in result.stderr
    snn_bert("spikes", checkpoint, "a")


RUN = """
import runpy, sys
for arguments in (["spikes", {model!r}, "She reads."], ["info", "./nowhere"]):
    sys.argv = ["snn-bert", *arguments]
    try:
        runpy.run_module("modeling_snn_bert", run_name="__main__")
    except SystemExit as stop:
        print("exit code", stop.code)
"""


@pytest.mark.slow
def test_as_a_module(checkpoint):
    """In a process of its own, with an output that takes ASCII only."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", RUN.format(model=str(checkpoint))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "#" in result.stdout and result.stdout.isascii()
    assert re.findall(r"exit code (\d)", result.stdout) == ["0", "1"]
    assert "Error: " in result.stderr and "Traceback" not in result.stderr
