"""Blocks of text, and the scripts that distil and that train masked LMs on them, on a small random BERT."""

import argparse
import json
import lzma

import numpy as np
import pytest
import torch
from example_scripts import interrupt_after, refused, run_script
from safetensors.torch import load_file
from small_bert import bert_fixture, write_half_precision
from text_blocks import TextBlocks, sources, token_file, tokenize_sources
from transformers import BertForMaskedLM

from modeling_snn_bert import SNNBertForMaskedLM, SNNBertModel

bert = bert_fixture(BertForMaskedLM)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(texts * 20), encoding="utf-8")
    return path


def text_arguments(*files, column="text", tokens=None):
    return argparse.Namespace(
        train_file=[str(file) for file in files],
        dataset_name=None,
        dataset_config_name=None,
        text_column=column,
        max_text_tokens=tokens,
    )


@pytest.fixture
def make_blocks(tmp_path, tokenizer):
    """A function that makes `TextBlocks` of 8 tokens from the ids 0 to `count`."""

    def make(count=300, held_out=4, **settings):
        np.arange(count, dtype=np.int32).tofile(tmp_path / "tokens.bin")
        return TextBlocks(tmp_path / "tokens.bin", tokenizer, 8, validation_blocks=held_out, **settings)

    return make


@pytest.mark.parametrize("kind", ["txt", "txt.xz", "csv", "tsv", "jsonl"])
def test_kinds_of_text_files(tmp_path, tokenizer, kind):
    rows = ["the quick fox", "null is a film", "the old clock"]
    path = tmp_path / f"text.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"review": row}) for row in rows))
    elif kind in ("csv", "tsv"):
        mark = "\t" if kind == "tsv" else ","
        path.write_text("\n".join([f"number{mark}review", *(f"{i}{mark}{row}" for i, row in enumerate(rows))]))
    else:
        (lzma.open if kind.endswith("xz") else open)(path, "wb").write("\n".join(rows).encode())
    args = text_arguments(path, column="review")
    file = token_file(args, tokenizer, tmp_path / "out")
    wanted = [i for row in rows for i in (*tokenizer(row, add_special_tokens=False)["input_ids"], 3)]
    assert tokenizer.sep_token_id == 3 and np.fromfile(file, dtype=np.int32).tolist() == wanted
    # What is there is not made again, and other text is another file.
    before = file.stat().st_mtime_ns
    assert token_file(args, tokenizer, tmp_path / "out").stat().st_mtime_ns == before
    assert token_file(text_arguments(path, column="review", tokens=5), tokenizer, tmp_path / "out") != file
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_a_missing_text_column_is_named(tmp_path, tokenizer):
    (tmp_path / "text.csv").write_text("review\nthe fox\n")
    with pytest.raises(ValueError, match=r"no column 'text', only .'review'.*--text_column"):
        token_file(text_arguments(tmp_path / "text.csv"), tokenizer, tmp_path)
    assert not list(tmp_path.glob("tokens*"))


def test_sources_share_the_tokens(tmp_path, tokenizer):
    """Each source gives as many tokens as the others until it has nothing left."""
    (tmp_path / "a.txt").write_text("\n".join(["the the the"] * 400))
    (tmp_path / "b.txt").write_text("\n".join(["fox fox fox"] * 4000))
    streams = sources(text_arguments(tmp_path / "a.txt", tmp_path / "b.txt"))
    ids = [i for document in tokenize_sources(streams, tokenizer, 4000) for i in document]
    the, fox = (ids.count(tokenizer.convert_tokens_to_ids(word)) for word in ("the", "fox"))
    assert len(ids) == 4000 and the == 1200 and fox == 1800


def test_short_batches(make_blocks):
    """Some training batches are cut to one shorter length each; the order, and what is held out, stay as they were."""
    blocks, whole = make_blocks(short_probability=0.5), make_blocks()
    blocks.blocks = whole.blocks = np.arange(20 * 50, dtype=np.int32).reshape(50, 20)
    lengths = set()
    for step in range(40):
        batch, wanted = blocks.batch(step, 3), whole.batch(step, 3)
        length = batch["input_ids"].shape[1]
        lengths.add(length)
        assert batch["token_type_ids"].shape == batch["input_ids"].shape == (3, length)
        assert torch.equal(batch["input_ids"][:, : length - 1], wanted["input_ids"][:, : length - 1])
        assert torch.equal(batch["input_ids"], blocks.batch(step, 3)["input_ids"])
        assert (batch["input_ids"][:, -1] == blocks.sep_id).all()
    assert min(lengths) >= 8 and max(lengths) == 22 and len(lengths) > 5
    assert all(batch["input_ids"].shape[1] == 22 for batch in blocks.validation(2))


def test_every_block_once_an_epoch(make_blocks):
    """The blocks of an epoch are all but the held-out ones, whatever the processes; each epoch has its own order."""
    blocks = make_blocks(seed=1)
    count = len(blocks.training)
    assert count == 300 // 6 - 4

    def epoch(number, batch_size, parts):
        steps = range(number * count // (batch_size * parts), (number + 1) * count // (batch_size * parts))
        batches = [blocks.batch(step, batch_size, part, parts) for step in steps for part in range(parts)]
        return torch.cat([batch["input_ids"] for batch in batches])

    first, second = epoch(0, 2, 1), epoch(1, 2, 1)
    assert first.shape == (46, 8) and (first[:, 0] == blocks.cls_id).all() and (first[:, -1] == blocks.sep_id).all()
    held_out = torch.cat([batch["input_ids"] for batch in blocks.validation(3)])
    everything = torch.cat([first, held_out])[:, 1:-1]
    assert torch.equal(everything.flatten().sort().values, torch.arange(300))
    assert not torch.equal(first, second) and torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(first, epoch(0, 1, 2))
    other = make_blocks(seed=2)
    assert not torch.equal(other.batch(0, 4)["input_ids"], blocks.batch(0, 4)["input_ids"])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in other.validation(4)]), held_out)
    parts = [batch["input_ids"] for part in range(2) for batch in blocks.validation(1, part, 2)]
    assert torch.equal(torch.cat(parts).sort(0).values, held_out.sort(0).values)


def test_pairs_have_two_segments(make_blocks):
    blocks = make_blocks(pair_probability=0.5)
    batch = blocks.batch(0, 40)
    assert torch.equal(batch["token_type_ids"], blocks.batch(0, 40)["token_type_ids"])
    pairs = batch["token_type_ids"].any(1)
    assert 5 < pairs.sum() < 35
    for ids, types in zip(batch["input_ids"][pairs], batch["token_type_ids"][pairs], strict=True):
        first_of_second = int(types.argmax())
        assert ids[first_of_second - 1] == blocks.sep_id and types[first_of_second:].all()
        assert 3 <= first_of_second < 7
    assert not make_blocks(pair_probability=0.0).batch(0, 40)["token_type_ids"].any()


def test_too_little_text_is_refused(make_blocks):
    with pytest.raises(ValueError, match="has 20 tokens, 3 blocks of 8: too few to hold out 4"):
        make_blocks(count=20)


COMMON = ["--max_seq_length", 16, "--per_device_train_batch_size", 8, "--validation_blocks", 8]


def results(folder, script):
    return json.loads((folder / f"{script}_results.json").read_text())


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_distillation(tmp_path, bert, text_file, tokenizer, texts, assert_spikes_flow):
    """The loss on held-out text falls, and the folder loads as a checkpoint with its tokenizer."""
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--max_train_steps", 20, "--learning_rate", 2e-3, "--eval_steps", 1, "--pair_probability", 0.3]
    arguments += ["--attention_weight", 0.1, "--config_overrides", "decay=0.1,spike_type=ternary"]
    run_script("distill_bert", *arguments, "--freeze_embeddings", "--output_dir", output)
    report = results(output, "distillation")
    losses = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0] and report["evaluation"]["eval_loss"] == losses[-1]
    assert 0 < report["evaluation"]["eval_firing_rate"] < 1
    assert report["training_tokens"] == 20 * 8 * 16 and report["arguments"]["pair_probability"] == 0.3
    assert "attention_loss" in report["log"][-2] and report["environment"]["torch"] == torch.__version__
    student = SNNBertModel.from_pretrained(output)
    assert student.config.spike_type == "ternary" and student.config.decay == 0.1
    teacher = load_file(bert / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher)
    inputs = type(tokenizer).from_pretrained(output)(texts, padding=True, return_tensors="pt")
    assert_spikes_flow(student.eval(), **inputs)


def test_distillation_resumes_exactly(tmp_path, bert, text_file):
    """Interrupted and resumed, also towards an earlier end before the decay has begun: the same weights."""
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--lr_scheduler_type", "warmup_stable_decay", "--num_warmup_steps", 2, "--num_decay_steps", 2]
    arguments += ["--checkpointing_steps", 2, "--checkpoints_total_limit", 1, "--pair_probability", 0.5]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("distill_bert", *arguments, "--max_train_steps", 6, "--output_dir", whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate_loop.TrainingLoop._save", interrupt_after(4))
        with pytest.raises(KeyboardInterrupt):
            run_script("distill_bert", *arguments, "--max_train_steps", 100, "--output_dir", parts)
    assert [path.name for path in parts.glob("step_*")] == ["step_4"] and not list(parts.glob("partial*"))
    resume = ["--resume_from_checkpoint", parts / "step_4", "--max_train_steps", 6]
    run_script("distill_bert", *arguments, *resume, "--output_dir", parts)
    assert_same_weights(whole, parts)
    one, other = results(whole, "distillation"), results(parts, "distillation")
    assert one["evaluation"] == other["evaluation"] and one["training_tokens"] == other["training_tokens"]


def test_distillation_goes_on_from_a_student(tmp_path, bert, text_file):
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    run_script("distill_bert", *arguments, "--max_train_steps", 10, "--output_dir", tmp_path / "first")
    start = ["--student_name_or_path", tmp_path / "first", "--max_train_steps", 1, "--learning_rate", 1e-9]
    run_script("distill_bert", *arguments, *start, "--output_dir", tmp_path / "second")
    first, second = (results(tmp_path / name, "distillation")["evaluation"] for name in ("first", "second"))
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-3)


def test_distillation_of_the_mean_embedding(tmp_path, bert, text_file):
    """With its weight the embeddings come closer to the teacher's than without, from one start."""
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--max_train_steps", 30, "--learning_rate", 1e-3, "--logging_steps", 1, "--threshold_per", "layer"]
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
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--calibration_tokens", 256]
    arguments += ["--learning_rate", 1e-3, "--logging_steps", 1]
    run_script("distill_bert", *arguments, "--max_train_steps", 10, "--output_dir", tmp_path / "first")
    quiet = ["--student_name_or_path", tmp_path / "first", "--config_overrides", "firing_rate_target=0.1"]
    run_script("distill_bert", *arguments, *quiet, "--max_train_steps", 30, "--output_dir", tmp_path / "quiet")
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
    for precision in ("no", "bf16"):
        run_script(
            "distill_bert",
            *[*arguments, "--max_train_steps", 2, "--mixed_precision", precision, "--output_dir", tmp_path / precision],
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
    arguments += ["--max_train_steps", 24, "--learning_rate", 3e-3, "--eval_steps", 12, "--checkpointing_steps", 8]
    arguments += ["--config_overrides", "hidden_size=48,intermediate_size=64"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("run_mlm_no_trainer", *arguments, "--output_dir", whole)
    report = results(whole, "mlm")
    assert report["evaluation"]["eval_loss"] < np.log(len(tokenizer)) - 0.15
    assert report["evaluation"]["eval_perplexity"] == pytest.approx(np.exp(report["evaluation"]["eval_loss"]))
    assert SNNBertForMaskedLM.from_pretrained(whole).config.hidden_size == 48
    parts.mkdir()
    (whole / "step_16").rename(parts / "step_16")
    run_script("run_mlm_no_trainer", *arguments, "--resume_from_checkpoint", parts / "step_16", "--output_dir", parts)
    assert_same_weights(whole, parts)
    assert results(parts, "mlm")["evaluation"] == report["evaluation"]


def test_masked_lm_from_a_bert(tmp_path, bert, text_file):
    arguments = ["--model_name_or_path", bert, "--train_file", text_file, *COMMON, "--max_train_steps", 2]
    run_script("run_mlm_no_trainer", *arguments, "--convert", "--output_dir", tmp_path / "out")
    assert SNNBertForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_size == 32


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        pytest.param("distill_bert", [], "give either --train_file or --dataset_name", id="no-text"),
        pytest.param("distill_bert", ["--train_file", "no.txt"], "there is no file no.txt", id="no-file"),
        pytest.param("distill_bert", ["--train_file", "FILE", "--firing_rate", 1], "--firing_rate must", id="rate"),
        pytest.param(
            "distill_bert", ["--train_file", "FILE", "--max_seq_length", 128], "must be at most 64", id="length"
        ),
        pytest.param(
            "distill_bert",
            ["--train_file", "FILE", "--num_decay_steps", 3],
            "flag of --lr_scheduler_type warmup_stable_decay",
            id="decay",
        ),
        pytest.param("distill_bert", ["--train_file", "FILE", "--push_to_hub"], "--hub_token", id="hub"),
        pytest.param("distill_bert", ["--train_file", "FILE", "--embedding_weight", -1], "must be >= 0", id="weight"),
        pytest.param(
            "distill_bert",
            ["--train_file", "FILE", "--embedding_weight", 1, "--per_device_train_batch_size", 1],
            "--per_device_train_batch_size must be >= 2",
            id="one-block",
        ),
        pytest.param("run_mlm_no_trainer", ["--train_file", "FILE"], "must be of the type 'snn_bert'", id="bert"),
        pytest.param(
            "run_mlm_no_trainer", ["--train_file", "FILE", "--mlm_probability", 0], "--mlm_probability", id="mask"
        ),
    ],
)
def test_refused(tmp_path, bert, text_file, capsys, monkeypatch, script, arguments, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    arguments = [text_file if argument == "FILE" else argument for argument in arguments]
    output = tmp_path / "out"
    assert message in refused(capsys, script, "--model_name_or_path", bert, "--output_dir", output, *arguments)
    assert not (output / "model.safetensors").exists()
