"""The scripts that distil and that train masked LMs on text, on a small random BERT."""

import json

import numpy as np
import pytest
import torch
from example_scripts import interrupted_after, refused, run_script
from safetensors.torch import load_file
from small_bert import bert_fixture, write_half_precision, write_mpnet
from transformers import AutoTokenizer, BertForMaskedLM, MPNetModel

from modeling_snn_bert import SNNBertForMaskedLM, SNNBertModel
from modeling_snn_bert.publishing import choose_files

bert = bert_fixture(BertForMaskedLM)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SNN_BERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(texts * 20), encoding="utf-8")
    return path


COMMON = ["--max_seq_length", 16, "--per_device_train_batch_size", 8, "--validation_blocks", 8]


def results(folder, script):
    return json.loads((folder / f"{script}_results.json").read_text())


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_distillation(tmp_path, cache, bert, text_file, tokenizer, texts, assert_spikes_flow):
    """The loss on held-out text falls, and the folder loads as a checkpoint with its tokenizer, and can be sent."""
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += [
        "--max_steps",
        20,
        "--learning_rate",
        2e-3,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--pair_probability",
        0.3,
    ]
    arguments += ["--attention_weight", 0.1, "--config_overrides", "decay=0.1,spike_type=ternary"]
    run_script("distill_bert", *arguments, "--freeze_embeddings", "--output_dir", output)
    report = results(output, "distillation")
    losses = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry and entry["step"]]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0] and report["evaluation"]["eval_loss"] == losses[-1]
    assert 0 < report["evaluation"]["eval_firing_rate"] < 1
    assert report["training_tokens"] == 20 * 8 * 16 and report["arguments"]["pair_probability"] == 0.3
    assert (
        any("attention_loss" in entry for entry in report["log"])
        and report["environment"]["torch"] == torch.__version__
    )
    # The tokens of the text are no part of the model.
    files, _, problems = choose_files(output)
    assert output / "model.safetensors" in files and not problems
    (tokens,) = (cache / "tokens").iterdir()
    assert tokens.name.startswith("tokens-") and tokens.stat().st_size > 0
    student = SNNBertModel.from_pretrained(output)
    assert student.config.spike_type == "ternary" and student.config.decay == 0.1
    teacher = load_file(bert / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher)
    inputs = type(tokenizer).from_pretrained(output)(texts, padding=True, return_tensors="pt")
    assert_spikes_flow(student.eval(), **inputs)


@pytest.mark.parametrize("attention_weight", [0, 0.1])
def test_distillation_of_an_mpnet(tmp_path, text_file, tokenizer, texts, assert_spikes_flow, attention_weight):
    """Its states, with its tokenizer's pairs, are learned as a BERT's are."""
    mpnet, output = tmp_path / "mpnet", tmp_path / "out"
    write_mpnet(mpnet, tokenizer, MPNetModel, initializer_range=0.2)
    arguments = ["--model_name_or_path", mpnet, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--max_steps", 40, "--learning_rate", 2e-3, "--pair_probability", 0.3, "--freeze_embeddings"]
    arguments += ["--attention_weight", attention_weight]
    run_script("distill_bert", *arguments, "--output_dir", output)
    report = results(output, "distillation")
    before, after = (report[name]["eval_loss"] for name in ("before_training", "evaluation"))
    assert after < 0.9 * before
    student = SNNBertModel.from_pretrained(output)
    assert student.config.relative_attention_num_buckets == 32
    bias = load_file(mpnet / "model.safetensors")["encoder.relative_attention_bias.weight"]
    moved = (student.encoder.relative_attention_bias.weight - bias).abs().max()
    assert 1e-4 < moved < 0.2
    inputs = AutoTokenizer.from_pretrained(output)(texts, padding=True, return_tensors="pt")
    assert_spikes_flow(student.eval(), **inputs)


def test_distillation_resumes_exactly(tmp_path, bert, text_file):
    """Interrupted and resumed, also towards an earlier end before the decay has begun: the same weights."""
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", 2]
    arguments += ["--lr_scheduler_kwargs", '{"num_decay_steps": 2, "decay_type": "linear"}']
    arguments += ["--save_steps", 2, "--save_total_limit", 1, "--pair_probability", 0.5]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("distill_bert", *arguments, "--max_steps", 6, "--output_dir", whole)
    with interrupted_after(4):
        run_script("distill_bert", *arguments, "--max_steps", 100, "--output_dir", parts)
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-4"]
    resume = ["--resume_from_checkpoint", parts / "checkpoint-4", "--max_steps", 6]
    run_script("distill_bert", *arguments, *resume, "--output_dir", parts)
    assert_same_weights(whole, parts)
    one, other = results(whole, "distillation"), results(parts, "distillation")
    assert one["evaluation"] == other["evaluation"] and one["training_tokens"] == other["training_tokens"]


def test_distillation_goes_on_from_a_student(tmp_path, bert, text_file):
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON]
    run_script("distill_bert", *arguments, "--max_steps", 10, "--output_dir", tmp_path / "first")
    start = ["--student_name_or_path", tmp_path / "first", "--max_steps", 1, "--learning_rate", 1e-9]
    run_script("distill_bert", *arguments, *start, "--output_dir", tmp_path / "second")
    first, second = (results(tmp_path / name, "distillation")["evaluation"] for name in ("first", "second"))
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-3)


def test_distillation_of_the_mean_embedding(tmp_path, bert, text_file):
    """With its weight the embeddings come closer to the teacher's than without, from one start."""
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--max_steps", 30, "--learning_rate", 1e-3, "--logging_steps", 1, "--threshold_per", "layer"]
    reports = {}
    for weight in (0, 10):
        output = tmp_path / str(weight)
        run_script("distill_bert", *arguments, "--embedding_weight", weight, "--output_dir", output)
        reports[weight] = results(output, "distillation")
    errors = {weight: report["evaluation"]["eval_embedding_loss"] for weight, report in reports.items()}
    assert errors[10] < 0.9 * errors[0]
    losses = [entry["embedding_loss"] for entry in reports[10]["log"] if "embedding_loss" in entry]
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert not any("embedding_loss" in entry for entry in reports[0]["log"])


def test_distillation_towards_a_firing_rate(tmp_path, bert, text_file):
    """A target in the configuration, of a student to go on from as well, is part of the loss and stays in it."""
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON]
    arguments += ["--learning_rate", 1e-3, "--logging_steps", 1]
    run_script("distill_bert", *arguments, "--max_steps", 10, "--output_dir", tmp_path / "first")
    quiet = ["--student_name_or_path", tmp_path / "first", "--config_overrides", "firing_rate_target=0.1"]
    run_script("distill_bert", *arguments, *quiet, "--max_steps", 30, "--output_dir", tmp_path / "quiet")
    first, report = results(tmp_path / "first", "distillation"), results(tmp_path / "quiet", "distillation")
    assert 0.05 < report["evaluation"]["eval_firing_rate"] < 0.7 * first["evaluation"]["eval_firing_rate"]
    penalties = [entry["firing_rate_penalty"] for entry in report["log"] if "firing_rate_penalty" in entry]
    assert len(penalties) == 30 and penalties[-1] < 0.1 * penalties[0]
    assert not any("firing_rate_penalty" in entry for entry in first["log"])
    assert SNNBertModel.from_pretrained(tmp_path / "quiet").config.firing_rate_target == 0.1


def test_bfloat16(tmp_path, bert, text_file, tokenizer):
    """Autocast is on in training and for the dev figure, and the weights that are kept are float32, in any case."""
    write_half_precision(tmp_path / "half", bert, tokenizer)
    arguments = [
        "--model_name_or_path",
        tmp_path / "half",
        "--train_file",
        text_file,
        *COMMON,
        "--calibration_tokens",
        256,
    ]
    for name, precision in (("no", []), ("bf16", ["--bf16", "--use_cpu"])):
        run_script(
            "distill_bert",
            *[*arguments, "--max_steps", 2, *precision, "--output_dir", tmp_path / name],
        )
    wide, narrow = (results(tmp_path / name, "distillation")["evaluation"]["eval_loss"] for name in ("no", "bf16"))
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.1)
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


@pytest.mark.slow
def test_masked_lm_from_scratch_resumes_exactly(tmp_path, bert, text_file, tokenizer, make_config):
    """Learns the frequent tokens at the least; masks, dropout and order go on where they stopped."""
    make_config(hidden_dropout_prob=0.1).save_pretrained(tmp_path / "config")
    arguments = ["--config_name", tmp_path / "config", "--tokenizer_name", bert, "--train_file", text_file, *COMMON]
    arguments += [
        "--max_steps",
        24,
        "--learning_rate",
        3e-3,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        12,
        "--save_steps",
        8,
    ]
    arguments += ["--config_overrides", "hidden_size=48,intermediate_size=64"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("run_mlm", *arguments, "--output_dir", whole)
    report = results(whole, "mlm")
    assert report["evaluation"]["eval_loss"] < np.log(len(tokenizer)) - 0.15
    assert report["evaluation"]["eval_perplexity"] == pytest.approx(np.exp(report["evaluation"]["eval_loss"]))
    assert SNNBertForMaskedLM.from_pretrained(whole).config.hidden_size == 48
    parts.mkdir()
    (whole / "checkpoint-16").rename(parts / "checkpoint-16")
    run_script("run_mlm", *arguments, "--resume_from_checkpoint", parts / "checkpoint-16", "--output_dir", parts)
    assert_same_weights(whole, parts)
    assert results(parts, "mlm")["evaluation"] == report["evaluation"]


def test_masked_lm_from_a_bert(tmp_path, bert, text_file):
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--max_steps", 2]
    run_script("run_mlm", *arguments, "--convert", "--output_dir", tmp_path / "out")
    assert SNNBertForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_size == 32


LOGIT_FLAGS = ["--logit_weight", "--temperature"]
STATE_FLAGS = ["--hidden_weight", "--attention_weight", "--embedding_weight", "--relation_weight"]
# Flags that a script does not have, and those that do nothing beside others, at their defaults too.
UNKNOWN = {"distill_bert": LOGIT_FLAGS, "run_mlm": LOGIT_FLAGS + STATE_FLAGS}
CONVERSION_FLAGS = {"--firing_rate": 0.2, "--calibration_tokens": 10_000}
IDLE = [
    ("run_mlm", [], CONVERSION_FLAGS, "needs --convert"),
    (
        "distill_bert",
        ["--student_name_or_path", "OTHER"],
        {**CONVERSION_FLAGS, "--threshold_per": "channel"},
        "is of a new student",
    ),
]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        pytest.param("distill_bert", [], "give either --train_file or --dataset_name", id="no-text"),
        pytest.param(
            "distill_bert",
            ["--train_file", "FILE", "--dataset_config_name", "en"],
            "--dataset_config_name needs --dataset_name",
            id="no-dataset",
        ),
        pytest.param("distill_bert", ["--train_file", "no.txt"], "there is no file no.txt", id="no-file"),
        pytest.param("distill_bert", ["--train_file", "FILE", "--firing_rate", 1], "--firing_rate must", id="rate"),
        pytest.param(
            "distill_bert", ["--train_file", "FILE", "--max_seq_length", 128], "must be at most 64", id="length"
        ),
        pytest.param("distill_bert", ["--train_file", "FILE", "--embedding_weight", -1], "must be >= 0", id="weight"),
        pytest.param(
            "distill_bert",
            ["--train_file", "FILE", "--embedding_weight", 1, "--per_device_train_batch_size", 1],
            "--per_device_train_batch_size must be >= 2",
            id="one-block",
        ),
        pytest.param("run_mlm", ["--train_file", "FILE"], "must be of the type 'snn_bert'", id="bert"),
        pytest.param("run_mlm", ["--train_file", "FILE", "--mlm_probability", 0], "--mlm_probability", id="mask"),
        *(
            pytest.param(
                script, ["--train_file", "FILE", flag, 1], f"HfArgumentParser: ['{flag}', '1']", id=script + flag
            )
            for script, flags in UNKNOWN.items()
            for flag in flags
        ),
        *(
            pytest.param(
                script, ["--train_file", "FILE", *mode, flag, value], f"{flag} {why}", id=f"{script}{flag}-idle"
            )
            for script, mode, flags, why in IDLE
            for flag, value in flags.items()
        ),
        *(
            pytest.param(script, ["--train_file", "FILE", *COMMON, *mode], message, id=f"{script}-{message}")
            for script, mode, message in (
                ("distill_bert", ["--student_name_or_path", "OTHER"], "vocab_size"),
                ("distill_bert", ["--setting", "spike_type=odd"], "spike_type"),
                ("run_mlm", ["--convert", "--setting", "spike_type=odd"], "spike_type"),
            )
        ),
    ],
)
def test_refused(tmp_path, cache, bert, text_file, make_config, capsys, script, arguments, message):
    """Before any work: no text is tokenised."""
    SNNBertModel(make_config()).save_pretrained(tmp_path / "other")
    names = {"FILE": text_file, "OTHER": tmp_path / "other"}
    arguments = [names.get(argument, argument) for argument in arguments]
    output = tmp_path / "out"
    assert message in refused(capsys, script, "--model_name_or_path", bert, "--output_dir", output, *arguments)
    assert not (output / "model.safetensors").exists() and not cache.exists()
