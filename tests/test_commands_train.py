"""`snn-bert train`: from a file of texts and labels to a folder that can be served and sent to the Hub."""

import csv
import json
import signal
import subprocess
import sys

import pytest
import test_text_files
import torch
from command_line import run_command
from huggingface_hub import ModelCard
from small_bert import bert_fixture, write_mpnet
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, MPNetModel

from modeling_snn_bert import SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.commands import train as train_module
from modeling_snn_bert.commands.train import split
from modeling_snn_bert.conversion import convert_bert, initialize_from_bert
from modeling_snn_bert.fine_tuning import macro_f1
from modeling_snn_bert.text_files import Labelled

bert = bert_fixture(BertModel)
SHORT = ["--steps", 3, "--distillation_steps", 2, "--batch_size", 4]


@pytest.fixture
def data(tmp_path):
    """A file of 40 rows; the words of a class are its own."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(("review", "sentiment"))
        for i in range(40):
            words = ("the quick brown fox", "an old, empty wagon")[i % 2]
            writer.writerow((f"{words} {'abcdefghij'[i // 4]}", ("joy", "dull")[i % 2]))
        writer.writerow(("", "joy"))
    return path


@pytest.fixture
def snn_bert(bert, tokenizer, texts, tmp_path):
    """A folder with an SNN-BERT encoder."""
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    convert_bert(BertModel.from_pretrained(bert), [batch]).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_from_a_bert(bert, data, tmp_path, assert_spikes_flow, texts):
    out = tmp_path / "new" / "out"
    result = run_command("train", "--data", data, "--model", bert, "--output", out, *SHORT)
    assert (
        "40 texts in the column 'review', 2 labels in 'sentiment' ('dull' 20, 'joy' 20); 32 to learn" in result.stdout
    )
    assert "1 rows without a text or a label are left out: line 42" in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["training_sentences"], report["validation_sentences"]) == (32, 8)
    assert (report["finetuning_steps"], report["distillation_steps"]) == (3, 2)
    assert report["accuracy"].keys() == report["macro_f1"].keys() == {"SNN-BERT", "BERT", "majority class"}
    assert report["accuracy"]["majority class"] == 0.5 and report["macro_f1"]["majority class"] == pytest.approx(1 / 3)
    assert report["learning_rates"] == {"SNN-BERT": 1e-3, "BERT": 5e-5}
    assert f"not in {bert}, and so random until trained: classifier.bias, classifier.weight" in result.stderr
    assert "LOAD REPORT" not in result.stderr
    assert report["labels"] == {"dull": 20, "joy": 20} and report["rows_left_out"] == ["line 42"]
    assert (out / "report.md").read_text().strip() in result.stdout
    assert "<h1>SNN-BERT on" in (out / "report.html").read_text(encoding="utf-8")
    card = ModelCard.load(out / "README.md")
    (score,) = card.data.eval_results
    assert score.metric_value == report["accuracy"]["SNN-BERT"] and score.dataset_name == "reviews.csv"
    # All that the Hub needs, and nothing else is left beside the folder.
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_snn_bert.py", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name in ("cli.py", "commands", "fine_tuning.py")]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model = SNNBertForSequenceClassification.from_pretrained(out).eval()
    assert model.config.id2label == {0: "dull", 1: "joy"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == 64  # the BERT's, which is less than --max_length
    assert_spikes_flow(model, **tokenizer(texts, padding=True, return_tensors="pt"))


def test_what_it_learns(bert, data, tmp_path):
    """Classes that differ in every word are told apart, by both models."""
    command = ["train", "--data", data, "--model", bert, "--output", tmp_path / "out", "--batch_size", 8]
    result = run_command(*command, "--epochs", 15, "--bert_learning_rate", 2e-3, "--distillation_steps", 10)
    assert "no better than" not in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["finetuning_steps"] == 60
    assert report["accuracy"]["BERT"] == report["accuracy"]["SNN-BERT"] == 1


def test_from_an_snn_bert(snn_bert, data, tmp_path):
    before = SNNBertModel.from_pretrained(snn_bert)
    result = run_command("train", "--data", data, "--model", snn_bert, "--output", tmp_path / "out", *SHORT)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"].keys() == {"SNN-BERT", "majority class"} and report["distillation_steps"] == 0
    assert report["learning_rates"] == {"SNN-BERT": 1e-4}
    is_guess = report["accuracy"]["SNN-BERT"] <= report["accuracy"]["majority class"]
    assert ("it is no better than to give every text the commonest label" in result.stderr) == is_guess
    assert "BERT, same steps" not in (tmp_path / "out" / "report.md").read_text()
    after = SNNBertForSequenceClassification.from_pretrained(tmp_path / "out")
    name = "encoder.layer.0.output.dense.weight"
    difference = (after.bert.get_parameter(name) - before.get_parameter(name)).abs().max()
    assert 0 < difference < 0.1  # trained, from that encoder on
    # Once more from a classifier, with labels of other number.
    rows = data.read_text(encoding="utf-8").replace("joy", "fun", 10)
    data.write_text(rows, encoding="utf-8")
    run_command("train", "--data", data, "--model", tmp_path / "out", "--output", tmp_path / "three", *SHORT)
    model = SNNBertForSequenceClassification.from_pretrained(tmp_path / "three")
    assert list(model.config.id2label.values()) == ["dull", "fun", "joy"]


@pytest.fixture
def pairs(tmp_path):
    """A file of 40 pairs, and one without a second text."""
    seconds, labels = ("it ran", "the sun"), ("yes", "no")
    rows = [(f"the {'abcdefghij'[i // 4]} {('fox', 'dog')[i % 2]}", seconds[i % 2], labels[i % 2]) for i in range(40)]
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("premise", "hypothesis", "label"), *rows, ("alone", " ", "yes")])
    return tmp_path / "pairs.csv"


def test_pairs(bert, pairs, tmp_path, monkeypatch):
    """What is trained on is both texts; the model, its card and its reports say so; and predict takes it from there."""
    seen = []

    def spy(accelerator, start, training, validation, *args):
        seen.extend([*training, *validation])
        return train_classifier(accelerator, start, training, validation, *args)

    train_classifier = train_module.train_classifier
    monkeypatch.setattr(train_module, "train_classifier", spy)
    out, columns = tmp_path / "out", ["--text_column", "premise", "--text_pair_column", "hypothesis"]
    result = run_command("train", "--data", pairs, *columns, "--model", bert, "--output", out, *SHORT)
    assert "40 pairs of texts in the columns 'premise' and 'hypothesis', 2 labels in 'label'" in result.stdout
    assert "1 rows without a text or a label are left out: line 42" in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = tokenizer("the a fox", "it ran")
    assert 1 in wanted["token_type_ids"]
    assert sum({name: row[name] for name in wanted} == dict(wanted) for row in seen) == 2
    report = json.loads((out / "report.json").read_text())
    assert report["columns"] == {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    assert "32 training and 8 validation pairs" in (out / "report.md").read_text()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "training pairs" in card and "It reads two texts in one input" in card
    model = SNNBertForSequenceClassification.from_pretrained(out)
    assert model.config.reads_pairs is True
    assert len(run_command("predict", out, pairs, *columns).stdout.splitlines()) == 40
    # The next task may be one of single texts, with other labels, though as many.
    single = ["--data", pairs, "--text_column", "premise", "--label_column", "hypothesis"]
    result = run_command("train", *single, "--model", out, "--output", tmp_path / "single", *SHORT)
    assert SNNBertForSequenceClassification.from_pretrained(tmp_path / "single").config.reads_pairs is False
    assert f"the head of {out} is for other labels ('no', 'yes')" in result.stderr
    assert "training sentences" in (tmp_path / "single" / "README.md").read_text(encoding="utf-8")


def test_the_seed_decides(bert, data, tmp_path):
    def weights(seed):
        out = tmp_path / f"{seed}"
        run_command(
            "train", "--data", data, "--model", bert, "--output", out, *SHORT, "--seed", seed, "--overwrite"
        )  # fmt: skip
        return SNNBertForSequenceClassification.from_pretrained(out).state_dict()

    first, second, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_a_failure_leaves_nothing(bert, data, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(train_module, "write_report", fail)
    command = ["train", "--data", data, "--model", bert, "--output", tmp_path / "new" / "out", *SHORT]
    assert "No space left" in run_command(*command, exit_code=1).stderr
    assert not list((tmp_path / "new").iterdir())


def listen_to_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_stopping_it_leaves_nothing(bert, data, tmp_path, signal_name):
    command = ["train", "--data", data, "--model", bert, "--output", tmp_path / "new" / "out", "--steps", 100_000]
    command = [sys.executable, "-m", "modeling_snn_bert", *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs its commands in the background has them ignore SIGINT, and their children inherit that.
    with subprocess.Popen(command, **pipes, preexec_fn=listen_to_sigint) as process:
        try:
            # The bar ends no line, and is drawn again at each step.
            seen = ""
            while "1/100000" not in seen:
                part = process.stderr.read(1)
                assert part, seen
                seen += part
            assert list((tmp_path / "new").iterdir())
            process.send_signal(getattr(signal, signal_name))
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (130, 128 + signal.SIGTERM)
    assert not list((tmp_path / "new").iterdir())


def test_a_diverged_model_is_not_written(bert, data, tmp_path):
    command = ["train", "--data", data, "--model", bert, "--output", tmp_path / "out", *SHORT]
    result = run_command(*command, "--bert_learning_rate", 1e38, exit_code=1)
    assert "training diverged" in result.stderr and "--bert_learning_rate" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_accelerate(bert, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    command = ["train", "--data", data, "--model", bert, "--output", tmp_path / "out"]
    assert 'pip install "snn-bert[train]"' in run_command(*command, exit_code=1).stderr


def test_bad_files(bert, tmp_path, subtests):
    for name, (filename, content, message) in test_text_files.BAD.items():
        with subtests.test(name):
            path = test_text_files.write(tmp_path, filename, content)
            result = run_command("train", "--data", path, "--model", bert, "--output", tmp_path / "out", exit_code=1)
            assert message in " ".join(result.stderr.split()) and str(path) in result.stderr
            assert not result.stdout and not (tmp_path / "out").exists()
            path.unlink()


# Exit code, arguments after those that are right, and what the message must say. {…} are filled with paths.
BAD_TRAINING = {
    "no_such_file": (2, ["--data", "no.csv"], "no.csv"),
    "steps_and_epochs": (2, ["--steps", "3", "--epochs", "1"], "give either --steps or --epochs"),
    "epochs_0": (2, ["--epochs", "0"], "must be > 0, got 0.0"),
    "held_out_1": (2, ["--held_out", "1"], "must lie in (0, 1), got 1.0"),
    "encoding_unknown": (2, ["--encoding", "utf-9"], "must be an encoding such as utf-8 or cp1252, got 'utf-9'"),
    "encoding_of_bytes": (2, ["--encoding", "base64"], "must be an encoding such as utf-8 or cp1252, got 'base64'"),
    "encoding_wrong": (1, ["--encoding", "utf-16"], "reviews.csv"),
    "column_unknown": (1, ["--text_column", "text"], "has no column 'text', only ['review', 'sentiment']: name one of"),
    "pair_column_unknown": (
        1,
        ["--text_pair_column", "text"],
        "has no column 'text', only ['review', 'sentiment']: name one of them by --text_pair_column",
    ),
    "pair_column_of_labels": (
        1,
        ["--text_pair_column", "sentiment", "--label_column", "sentiment"],
        "--text_pair_column must name a column of its own, 'sentiment' is that of",
    ),
    "max_length_2": (2, ["--max_length", "2"], "must be >= 3, got 2"),
    "too_short_for_pairs": (
        2,
        ["--data", "{pairs}", "--text_pair_column", "text_pair", "--max_length", "4"],
        "must be >= 5 for pairs of texts, got 4",
    ),
    "too_short_for_pairs_of_an_mpnet_tokenizer": (
        2,
        ["--model", "{mpnet}", "--data", "{pairs}", "--text_pair_column", "text_pair", "--max_length", "5"],
        "must be >= 6 for pairs of texts, got 5",
    ),
    "no_such_model": (1, ["--model", "./nowhere"], "nowhere"),
    "no_such_folder": (
        1,
        ["--model", "{tmp_path}/nowhere"],
        "there is no such folder, nor may a name on the Hub be so",
    ),
    "model_of_another_kind": (1, ["--model", "{distil}"], "--model must be a BERT or an SNN-BERT, the model_type of"),
    "model_of_one_length": (1, ["--model", "{psn}"], "takes texts of exactly 16 tokens (its neurons are PSN)"),
    "output_in_use": (2, ["--output", "{distil}"], "exists: name a new folder, or give --overwrite"),
    "output_of_other_things": (2, ["--output", "{tmp_path}"], "exists and is no checkpoint: name a new folder"),
}


def test_bad_training(bert, data, tmp_path, tokenizer, make_config, monkeypatch, subtests):
    from transformers import DistilBertConfig

    monkeypatch.chdir(tmp_path)
    DistilBertConfig().save_pretrained(tmp_path / "distil")
    SNNBertModel(make_config(neuron_type="psn", psn_length=16)).save_pretrained(tmp_path / "psn")
    tokenizer.save_pretrained(tmp_path / "psn")
    # An SNN-BERT that was made of an MPNet has its tokenizer.
    write_mpnet(tmp_path / "mpnet", tokenizer, MPNetModel)
    initialize_from_bert(MPNetModel.from_pretrained(tmp_path / "mpnet")).save_pretrained(tmp_path / "mpnet")
    rows = ["text,text_pair,label", *(f"a {i},b,{'cd'[i % 2]}" for i in range(12))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    places = {name: tmp_path / name for name in ("distil", "psn", "mpnet")}
    places |= {"pairs": tmp_path / "pairs.csv", "tmp_path": tmp_path}
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, (exit_code, arguments, message) in BAD_TRAINING.items():
        with subtests.test(name):
            right = ["train", "--data", data, "--model", bert, "--output", "out"]
            wrong = [argument.format(**places) for argument in arguments]
            result = run_command(*right, *wrong, exit_code=exit_code)
            # The parser breaks long messages into lines.
            assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == before


class TestSplit:
    def rows(self, texts, labels):
        names = sorted(set(labels))
        return Labelled(texts, [names.index(label) for label in labels], names, "text", "label", [])

    def test_shares(self):
        rows = self.rows([f"t{i}" for i in range(100)], ["a"] * 80 + ["b"] * 18 + ["c"] * 2)
        training, held = split(rows, 0.2, 0)
        assert sorted(training + held) == list(range(100))
        assert [sum(rows.labels[i] == label for i in held) for label in range(3)] == [16, 4, 1]
        assert split(rows, 0.2, 0) == (training, held) != split(rows, 0.2, 1)

    def test_every_label_is_on_both_sides(self):
        rows = self.rows([f"t{i}" for i in range(40)], ["a", "b"] * 20)
        for share in (0.001, 0.999):
            for side in split(rows, share, 0):
                assert {rows.labels[i] for i in side} == {0, 1}

    def test_equal_texts_are_on_one_side(self):
        rows = self.rows([f"{'The' if i % 3 else 'the'}  t{i // 4}" for i in range(80)], ["a", "b"] * 40)
        rows = rows._replace(labels=[i // 4 % 2 for i in range(80)])
        training, held = split(rows, 0.3, 0)
        sides = [{rows.texts[i].lower() for i in side} for side in (training, held)]
        assert not sides[0] & sides[1] and len(held) == 24

    def test_equal_pairs_are_on_one_side(self):
        """Both texts count: of each pair there are two, and pairs that share a text only are apart."""
        pairs = [(f"{'The' if i % 2 else 'the'}  fox", f"T{i // 2} {'' if i % 2 else ' '}ran") for i in range(80)]
        rows = self.rows(pairs, ["a", "b"] * 40)._replace(labels=[i // 2 % 2 for i in range(80)])
        training, held = split(rows, 0.25, 0)
        assert len(held) == 20 and all(i ^ 1 in held for i in held) and sorted(training + held) == list(range(80))
        # Where a pair is cut into two texts matters.
        rows = self.rows([("a b", "c"), ("a", "b c")] * 6, ["a", "b"] * 6)
        with pytest.raises(ValueError, match="all rows with the label 'a' hold the same text"):
            split(rows, 0.2, 0)

    def test_many_rows(self):
        rows = self.rows([f"t{i}" for i in range(20_000)], ["a", "b"] * 10_000)
        assert len(split(rows, 0.5, 0)[1]) == train_module.MAX_HELD_OUT

    def test_labels_that_cannot_be_split(self):
        with pytest.raises(ValueError, match="all rows with the label 'b' hold the same text"):
            split(self.rows([*"cdefghijk", "x", "X "], ["a"] * 9 + ["b"] * 2), 0.2, 0)
        with pytest.raises(
            ValueError, match="each text with the label 'b' stands in an earlier row with another label"
        ):
            split(self.rows([*"cdefghijk", "c", "d"], ["a"] * 9 + ["b"] * 2), 0.2, 0)


def test_macro_f1():
    sklearn = pytest.importorskip("sklearn.metrics")
    right, found = torch.randint(0, 4, (2, 200))
    assert macro_f1(found, right) == pytest.approx(sklearn.f1_score(right, found, average="macro"))
    assert macro_f1(torch.zeros(4).long(), torch.tensor([0, 0, 0, 1])) == pytest.approx((6 / 7) / 2)


def test_the_teacher_is_that_of_the_report(bert, data, tmp_path):
    """The BERT that is compared with is the given one, fine-tuned: its head has the file's labels."""
    BertForSequenceClassification.from_pretrained(bert, num_labels=5).save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "five")
    run_command("train", "--data", data, "--model", tmp_path / "five", "--output", tmp_path / "out", *SHORT)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = BertForSequenceClassification.from_pretrained(bert, num_labels=2).num_parameters()
    assert report["parameters"]["BERT"] == expected < report["parameters"]["SNN-BERT"]
