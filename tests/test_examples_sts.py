"""The script that trains sentence encoders, on a small random BERT and made-up pairs."""

import json
import random

import pytest
import torch
from example_scripts import refused, run_script, tokenizers_loaded
from sentence_transformers import SentenceTransformer
from small_bert import bert_fixture, write_half_precision
from transformers import BertConfig, BertModel

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.distillation import mean_embeddings

WORDS = ["river", "fox", "film", "night", "clock", "dog"]


bert = bert_fixture(BertModel)


@pytest.fixture(scope="module")
def snn_bert(tmp_path_factory, bert, tokenizer, texts):
    folder = tmp_path_factory.mktemp("snn_bert")
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    convert_bert(BertModel.from_pretrained(bert), [batch]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    """Pairs of two words each; the score says how many they share."""
    generator = random.Random(0)
    for name, count in (("train", 48), ("dev", 24)):
        rows = []
        for _ in range(count):
            first, second = generator.sample(WORDS, 2), generator.sample(WORDS, 2)
            score = 2.5 * len({*first} & {*second})
            rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": score})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "dev.jsonl"]


def test_trains_a_sentence_encoder(tmp_path, snn_bert, bert, pairs, tokenizer, texts):
    write_half_precision(tmp_path / "half", bert, tokenizer)
    arguments = [*pairs, "--model_name_or_path", snn_bert, "--teacher_name_or_path", tmp_path / "half"]
    arguments += ["--embedding_weight", 0.01]
    arguments += ["--learning_rate", 3e-3, "--num_train_epochs", 12, "--per_device_train_batch_size", 16]
    run_script("run_sts", *arguments, "--seeds", 1, 2, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["seeds"] == [1, 2] and results["standard_deviation"]["combined"] is not None
    for run in results["runs"]:
        losses = [entry["score_loss"] for entry in run["log"] if "score_loss" in entry]
        # A random BERT takes all sentences for alike.
        assert losses[-1] < 0.8 * losses[0] and set(run["before_training"]) == set(run["metrics"]) == set(
            results["mean"]
        )
        assert run["last_step"] == 36
        assert run["energy"]["sequences"] == 48 and 0 < run["energy"]["mean_firing_rate"] < 1
        assert run["energy"]["picojoules"]["SNN-BERT"]["matrix_products"] > 0
    # Mean pooling is what SentenceTransformer takes by itself, so the saved folder gives the embeddings of the script.
    encoder = SentenceTransformer(str(tmp_path / "out" / "seed_1"), device="cpu")
    model = SNNBertModel.from_pretrained(tmp_path / "out" / "seed_1")
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    assert all(0 < rate.mean() < 1 for rate in model(**batch, output_firing_rates=True).firing_rates)
    with torch.no_grad():
        embeddings = mean_embeddings(model(**batch).last_hidden_state, batch["attention_mask"])
        torch.testing.assert_close(encoder.encode(texts, convert_to_tensor=True), embeddings)


def test_a_firing_rate_target_counts(tmp_path, snn_bert, pairs, tokenizer):
    """It is that of the configuration, as in the other scripts."""
    model = SNNBertModel.from_pretrained(snn_bert)
    model.config.firing_rate_target = 0.05
    model.save_pretrained(tmp_path / "quiet")
    tokenizer.save_pretrained(tmp_path / "quiet")
    rates = []
    for start in (snn_bert, tmp_path / "quiet"):
        arguments = [*pairs, "--model_name_or_path", start, "--max_steps", 12, "--learning_rate", 1e-3]
        run_script("run_sts", *arguments, "--output_dir", tmp_path / f"out-{len(rates)}")
        (run,) = json.loads((tmp_path / f"out-{len(rates)}" / "results.json").read_text())["runs"]
        rates.append(run["energy"]["mean_firing_rate"])
    assert 0.01 < rates[1] < 0.7 * rates[0]


def test_a_bert_is_trained_alike(tmp_path, bert, pairs):
    arguments = [*pairs, "--model_name_or_path", bert, "--max_steps", 1]
    run_script("run_sts", *arguments, "--output_dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["results.json"]
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["energy"] is None


def test_a_bert_that_it_has_written_teaches(tmp_path, bert, snn_bert, pairs):
    steps = [*pairs, "--max_steps", 2, "--logging_steps", 1]
    run_script("run_sts", *steps, "--model_name_or_path", bert, "--output_dir", tmp_path / "teacher")
    taught = ["--model_name_or_path", snn_bert, "--teacher_name_or_path", tmp_path / "teacher" / "seed_0"]
    with tokenizers_loaded() as paths:
        run_script("run_sts", *steps, *taught, "--seeds", 0, 1, "--output_dir", tmp_path / "student")
    assert paths == [str(snn_bert), str(tmp_path / "teacher" / "seed_0")]
    run, _ = json.loads((tmp_path / "student" / "results.json").read_text())["runs"]
    losses = [entry["embedding_loss"] for entry in run["log"] if "embedding_loss" in entry]
    assert len(losses) == 2 and min(losses) > 0
    assert run["energy"]["mean_firing_rate"] > 0


@pytest.mark.parametrize("labels", [(0, 1), ("not_entailment", "entailment"), ("other", "same")])
@pytest.mark.parametrize("similarity", ["cosine", "second_in_first"])
def test_labels_are_told_apart_by_a_threshold(tmp_path, bert, capsys, labels, similarity):
    for name, count in (("train", 40), ("dev", 20)):
        pairs = [(i, WORDS[i % 6], WORDS[(i + i % 2) % 6]) for i in range(count)]
        rows = [{"sentence1": one, "sentence2": two, "label": labels[1 - i % 2]} for i, one, two in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "dev.jsonl"]
    arguments += ["--model_name_or_path", bert, "--no_do_train"]
    arguments += ["--similarity", similarity]
    run_script("run_sts", *arguments, "--output_dir", tmp_path / "out")
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["metrics"]["accuracy"] == 1 and run["metrics"]["threshold"] < 1
    assert run["before_training"] is None and run["last_step"] == 0
    message = refused(capsys, "run_sts", *arguments, "--max_score", 5.0, "--output_dir", tmp_path / "scored")
    assert "--max_score is for pairs with scores, these have labels" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--max_score", 2.5], "scores must lie in [0, 2.5] (--max_score), train has 5.0", id="score"),
        pytest.param(["--max_score", 0], "--max_score must be positive", id="max-score"),
        pytest.param(["--embedding_weight", -1], "`embedding_weight` must be >= 0", id="weight"),
        *(
            pytest.param([f"--{name}", 0.5], f"not used by the HfArgumentParser: ['--{name}', '0.5']", id=name)
            for name in ("logit_weight", "temperature", "hidden_weight", "attention_weight", "relation_weight")
        ),
        pytest.param(["--embedding_weight", 1.0], "--embedding_weight needs --teacher_name_or_path", id="no-teacher"),
        pytest.param(["--energy_samples", -1], "--energy_samples must be >= 0", id="energy"),
        pytest.param(["--seeds", 1, 1], "must differ", id="seeds"),
    ],
)
def test_refuses(tmp_path, bert, pairs, capsys, arguments, message):
    common = [*pairs, "--model_name_or_path", bert, "--output_dir", tmp_path / "out"]
    assert message in refused(capsys, "run_sts", *common, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_width_is_refused_before_the_data_are_read(tmp_path, bert, tokenizer, capsys):
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1)).save_pretrained(
        tmp_path / "b"
    )
    tokenizer.save_pretrained(tmp_path / "b")
    arguments = ["--data_dir", "nowhere", "--model_name_or_path", bert, "--teacher_name_or_path", tmp_path / "b"]
    message = refused(capsys, "run_sts", *arguments, "--output_dir", tmp_path / "out")
    assert "the teacher's hidden_size must be the model's, 32; it is 48" in message
