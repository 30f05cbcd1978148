"""One encoder with a head for each of several tasks: which heads, their figures, and the script that trains it."""

import json
import random

import pytest
import torch
from example_scripts import interrupted_after, refused, run_script, tokenizers_loaded
from glue_files import write_glue
from glue_tasks import TASKS, load_for_task, several_heads
from safetensors.torch import load_file
from small_bert import bert_fixture, write_half_precision, write_mpnet
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MPNetModel,
)

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.multitask import heads_settings, keep_head

NAMES = ["sst2", "stsb", "rte"]
SOME_TASKS = [TASKS[name] for name in NAMES]
SCRIPT = "run_multitask"
bert = bert_fixture(BertModel)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for name, rows in zip(NAMES, (64, 32, 16), strict=True):
        write_glue(folder, name, rows)
    return folder


@pytest.fixture(scope="module")
def snn_bert(tmp_path_factory, bert, tokenizer, texts):
    folder = tmp_path_factory.mktemp("snn_bert")
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    convert_bert(BertModel.from_pretrained(bert), [batch]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words, generator = ["fox", "dog", "river", "null", "film", "night"], random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(generator.choices(words, k=8)) + "." for _ in range(60)), encoding="utf-8")
    return path


def common(glue):
    return ["--tasks", *NAMES, "--data_dir", glue, "--per_device_train_batch_size", 8, "--max_seq_length", 32]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, bert, glue):
    folder = tmp_path_factory.mktemp("teacher")
    arguments = ["--model_name_or_path", bert, "--learning_rate", 3e-3, "--max_steps", 80]
    run_script(SCRIPT, *common(glue), *arguments, "--output_dir", folder)
    return folder


def read(folder):
    return json.loads((folder / "results.json").read_text())


def write_bert(folder, tasks, **settings):
    small = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings |= heads_settings([task.head for task in tasks])
    model = BertForSequenceClassification(BertConfig(**small, intermediate_size=48, **settings))
    model.save_pretrained(folder)
    return model


def test_heads_of_the_tasks(tmp_path):
    config = write_bert(tmp_path, SOME_TASKS[::-1]).config
    assert config.id2label[2] == "stsb:score" and config.label2id["rte:entailment"] == 0
    assert several_heads(config) == NAMES[::-1]
    # Labels of one task may have a colon too.
    for of_one_task in (BertConfig(), BertConfig(id2label={0: "alarm:set", 1: "alarm:stop"})):
        assert several_heads(of_one_task) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_task_is_loaded(tmp_path, name):
    model, task = write_bert(tmp_path, SOME_TASKS), TASKS[name]
    loaded = load_for_task(str(tmp_path), task)
    own = task.head.logits_of(model.config)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight[own])
    assert loaded.config.id2label == dict(enumerate(task.labels or ("score",))) and several_heads(loaded.config) == []


def test_a_task_that_is_not_among_them_gets_a_new_head(tmp_path):
    model = write_bert(tmp_path, SOME_TASKS)
    # Also where other heads have as many logits.
    three = write_bert(tmp_path / "three", [TASKS["stsb"], TASKS["sst2"]])
    loaded = load_for_task(str(tmp_path / "three"), TASKS["mnli"])
    assert not (loaded.classifier.weight == three.classifier.weight).any()
    loaded = load_for_task(str(tmp_path), TASKS["mnli"])
    assert loaded.classifier.weight.shape == (3, 32)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(loaded.state_dict()[query], model.state_dict()[query])


@pytest.mark.parametrize(
    ("name", "is_kept"), [("rte", True), ("qnli", True), ("wnli", True), ("mrpc", False), ("mnli", False)]
)
def test_the_head_of_one_task_is_kept_for_its_labels_only(tmp_path, caplog, name, is_kept):
    """Not by their number: RTE's two labels are QNLI's too, and WNLI's in another order, and not those of MRPC."""
    model = write_bert(tmp_path / "several", SOME_TASKS)
    keep_head(model, TASKS["rte"].head)
    model.save_pretrained(tmp_path / "rte")
    loaded = load_for_task(str(tmp_path / "rte"), TASKS[name])
    weight = model.classifier.weight.flip(0) if name == "wnli" else model.classifier.weight
    assert torch.equal(loaded.classifier.weight, weight) == is_kept
    assert loaded.config.id2label == dict(enumerate(TASKS[name].labels))
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(loaded.state_dict()[query], model.state_dict()[query])
    told = "rte is for other labels ('entailment', 'not_entailment'): a new one is random until trained"
    assert (told in caplog.text) == (name == "mrpc")


def test_labels_teach_every_task(teacher):
    """Figures of each task in the results; the folder is an ordinary classifier with all heads."""
    results = read(teacher)
    figures = results["evaluation"]
    scores = [figures[f"eval_{name}"] for name in ("sst2_accuracy", "stsb_combined", "rte_accuracy")]
    assert scores[0] >= 0.9 and scores[1] >= 0.8 and figures["eval_average"] == pytest.approx(sum(scores) / 3)
    assert results["tasks"] == NAMES and results["steps"] == 80
    model = BertForSequenceClassification.from_pretrained(teacher)
    assert several_heads(model.config) == NAMES


@pytest.mark.slow
def test_a_student_learns_from_the_teacher_alone(tmp_path, snn_bert, teacher, glue, text_file):
    """By its states, attention and logits on rows without labels; embeddings and heads start as the teacher's."""
    arguments = [*common(glue), "--model_name_or_path", snn_bert, "--teacher_name_or_path", teacher]
    arguments += [
        "--unlabelled_file",
        text_file,
        "--attention_weight",
        0.2,
        "--freeze_embeddings",
        "--logging_steps",
        5,
    ]
    run_script(SCRIPT, *arguments, "--no_do_train", "--output_dir", tmp_path / "before")
    run_script(SCRIPT, *arguments, "--max_steps", 100, "--learning_rate", 3e-3, "--output_dir", tmp_path / "after")
    log = [entry for entry in read(tmp_path / "after")["log"] if "loss" in entry]
    for name in ("head_loss", "hidden_state_loss", "attention_loss"):
        assert log[-1][name] < 0.9 * log[0][name]
    assert read(tmp_path / "after")["evaluation"]["eval_average"] > 0.75
    start, end, taught = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "before", tmp_path / "after", teacher)
    )
    assert torch.equal(start["classifier.weight"], taught["classifier.weight"])
    assert not torch.equal(end["classifier.weight"], taught["classifier.weight"])
    for name in (name for name in taught if name.startswith("bert.embeddings.")):
        assert torch.equal(end[name], taught[name])
    # One of its heads goes on by the script for one task.
    one = ["--task_name", "rte", "--data_dir", glue, "--model_name_or_path", tmp_path / "after", "--seeds", 0]
    one += ["--teacher_name_or_path", teacher, "--energy_samples", 4]
    run_script("run_glue", *one, "--no_do_train", "--output_dir", tmp_path / "rte")
    run = read(tmp_path / "rte")["runs"][0]
    assert run["metrics"]["accuracy"] == read(tmp_path / "after")["evaluation"]["eval_rte_accuracy"]
    assert 0 < run["energy"]["mean_firing_rate"] < 1
    assert SNNBertForSequenceClassification.from_pretrained(tmp_path / "rte" / "seed_0").config.num_labels == 2


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory, tokenizer):
    """A model of another kind and size, whose tokenizer gives other ids."""
    folder = tmp_path_factory.mktemp("mpnet")
    write_mpnet(folder, tokenizer, MPNetModel, hidden_size=48, num_hidden_layers=1)
    return folder


@pytest.mark.slow
def test_a_teacher_of_another_kind_teaches_its_logits(tmp_path, bert, mpnet, glue, text_file):
    arguments = [*common(glue), "--learning_rate", 3e-3, "--logging_steps", 5]
    own = ["--model_name_or_path", mpnet, "--freeze_embeddings", "--max_steps", 120]
    run_script(SCRIPT, *arguments, *own, "--output_dir", tmp_path / "mpnet")
    assert read(tmp_path / "mpnet")["evaluation"]["eval_sst2_accuracy"] >= 0.9
    arguments += ["--model_name_or_path", bert, "--teacher_name_or_path", tmp_path / "mpnet", "--hidden_weight", 0]
    arguments += ["--unlabelled_file", text_file, "--max_steps", 80]
    run_script(SCRIPT, *arguments, "--output_dir", tmp_path / "bert")
    results = read(tmp_path / "bert")
    losses = [entry["head_loss"] for entry in results["log"] if "head_loss" in entry]
    assert losses[-1] < 0.5 * losses[0] and results["evaluation"]["eval_sst2_accuracy"] >= 0.9


@pytest.mark.slow
def test_a_student_made_of_an_mpnet(tmp_path, mpnet, glue, text_file, texts):
    """It learns the states and logits of an MPNet with heads, whose embeddings and heads it starts with."""
    own, start, taught = AutoTokenizer.from_pretrained(mpnet), tmp_path / "start", tmp_path / "taught"
    batch = dict(own(texts, padding=True, return_tensors="pt"))
    convert_bert(MPNetModel.from_pretrained(mpnet), [batch]).save_pretrained(start)
    own.save_pretrained(start)
    arguments = [*common(glue), "--model_name_or_path", mpnet, "--learning_rate", 3e-3, "--max_steps", 60]
    run_script(SCRIPT, *arguments, "--output_dir", taught)
    arguments = [*common(glue), "--model_name_or_path", start, "--teacher_name_or_path", taught, "--freeze_embeddings"]
    arguments += ["--unlabelled_file", text_file, "--logging_steps", 5, "--attention_weight", 0.1]
    run_script(SCRIPT, *arguments, "--max_steps", 80, "--learning_rate", 3e-3, "--output_dir", tmp_path / "student")
    log = [entry for entry in read(tmp_path / "student")["log"] if "loss" in entry]
    for name in ("head_loss", "hidden_state_loss", "attention_loss"):
        assert log[-1][name] < 0.9 * log[0][name]
    student = SNNBertForSequenceClassification.from_pretrained(tmp_path / "student")
    weights = load_file(taught / "model.safetensors")
    for name, first in (("word", 0), ("position", 2)):
        found = student.bert.embeddings.get_submodule(f"{name}_embeddings").weight
        assert torch.equal(found, weights[f"mpnet.embeddings.{name}_embeddings.weight"][first:])
    # One of its heads goes on with the teacher's.
    one = ["--task_name", "rte", "--data_dir", glue, "--model_name_or_path", tmp_path / "student", "--seeds", 0]
    one += ["--teacher_name_or_path", taught, "--hidden_weight", 1, "--unlabelled_file", text_file, "--max_steps", 2]
    run_script("run_glue", *one, "--energy_samples", 4, "--output_dir", tmp_path / "rte")
    run = read(tmp_path / "rte")["runs"][0]
    assert run["last_step"] == 2 and 0 < run["energy"]["mean_firing_rate"] < 1
    assert SNNBertForSequenceClassification.from_pretrained(tmp_path / "rte" / "seed_0").config.num_labels == 2


@pytest.mark.slow
def test_resumes_exactly_also_to_another_end(tmp_path, snn_bert, teacher, glue, text_file):
    """A run at a constant rate is resumed, and a fall branches off one of its checkpoints."""
    arguments = [*common(glue), "--model_name_or_path", snn_bert, "--teacher_name_or_path", teacher, "--seed", 1]
    arguments += ["--unlabelled_file", text_file, "--lr_scheduler_type", "warmup_stable_decay", "--logging_steps", 1]
    arguments += ["--warmup_steps", 2, "--save_steps", 4]
    constant = ["--max_steps", 12, "--lr_scheduler_kwargs", '{"num_decay_steps": 1, "decay_type": "linear"}']
    run_script(SCRIPT, *arguments, *constant, "--output_dir", tmp_path / "whole")
    with interrupted_after(8):
        run_script(SCRIPT, *arguments, *constant, "--output_dir", tmp_path / "parts")
    resume = ["--resume_from_checkpoint", tmp_path / "parts" / "checkpoint-8"]
    run_script(SCRIPT, *arguments, *constant, *resume, "--output_dir", tmp_path / "parts")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    fall = ["--max_steps", 12, "--lr_scheduler_kwargs", '{"num_decay_steps": 4, "decay_type": "linear"}']
    run_script(SCRIPT, *arguments, *fall, *resume, "--output_dir", tmp_path / "fall")
    rates = [entry["learning_rate"] for entry in read(tmp_path / "fall")["log"] if "learning_rate" in entry]
    assert rates == pytest.approx([0, 5e-5, *[1e-4] * 7, 7.5e-5, 5e-5, 2.5e-5])
    assert read(tmp_path / "fall")["log"][:8] == read(tmp_path / "parts")["log"][:8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--tasks", "rte", "rte"], "--tasks must differ", id="tasks"),
        pytest.param(["--max_seq_length", 4], "--max_seq_length must be >= 5", id="length"),
        pytest.param(["--single_share", 2], "--single_share must lie in", id="share"),
        pytest.param(["--hidden_weight", -1], "`hidden_weight` must be >= 0", id="weight"),
        pytest.param(
            ["--unlabelled_file", "{text}"], "--unlabelled_file needs --teacher_name_or_path", id="no-teacher"
        ),
        *(
            pytest.param([f"--{name}", value], f"--{name} needs --teacher_name_or_path", id=f"{name}-idle")
            for name, value in (
                ("temperature", 2.0),
                ("hidden_weight", 1.0),
                ("attention_weight", 1),
                ("unlabelled_sentences", 60_000),
                ("single_share", 0.35),
            )
        ),
        pytest.param(["--logit_weight", 0.5], "HfArgumentParser: ['--logit_weight', '0.5']", id="logits"),
        pytest.param(["--max_steps", 0], "--max_steps must be >= 1", id="steps"),
        pytest.param(["--unlabelled_sentences", 0], "--unlabelled_sentences must be >= 1", id="sentences"),
        pytest.param(["--teacher_name_or_path", "{bert}"], "must have a head for sst2", id="heads"),
        pytest.param(
            ["--teacher_name_or_path", "{other}"], "of the type 'snn_bert': give --hidden_weight 0", id="kind"
        ),
        pytest.param(
            ["--model_name_or_path", "{teacher}", "--tasks", "rte", "stsb", "sst2"], "in this order", id="order"
        ),
        pytest.param(
            ["--model_name_or_path", "{mpnet}", "--teacher_name_or_path", "{teacher}", "--hidden_weight", 0],
            "a BERT or an SNN-BERT learns from a teacher",
            id="student",
        ),
        pytest.param(["--data_dir", "nowhere"], "there is no train.tsv", id="data"),
    ],
)
def test_refuses(tmp_path, capsys, bert, snn_bert, mpnet, teacher, glue, text_file, arguments, message):
    settings = heads_settings([task.head for task in SOME_TASKS])
    SNNBertForSequenceClassification.from_pretrained(snn_bert, **settings).save_pretrained(tmp_path / "other")
    names = {"{text}": text_file, "{bert}": bert, "{other}": tmp_path / "other", "{teacher}": teacher, "{mpnet}": mpnet}
    arguments = [names.get(x, x) for x in arguments]
    output = ["--output_dir", tmp_path / "out"]
    assert message in refused(capsys, SCRIPT, *common(glue), "--model_name_or_path", bert, *output, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_teachers_tokenizer_is_loaded_once(tmp_path, bert, teacher, glue):
    arguments = ["--model_name_or_path", bert, "--teacher_name_or_path", teacher, "--max_steps", 1]
    with tokenizers_loaded() as paths:
        run_script(SCRIPT, *common(glue), *arguments, "--output_dir", tmp_path / "out")
    assert paths == [str(bert), str(teacher)]
    assert read(tmp_path / "out")["steps"] == 1


def test_half_precision_is_trained_in_full(tmp_path, bert, tokenizer, glue):
    write_half_precision(tmp_path / "half", bert, tokenizer)
    arguments = ["--model_name_or_path", tmp_path / "half", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    run_script(SCRIPT, *common(glue), *arguments)
    assert all(x.dtype == torch.float32 for x in load_file(tmp_path / "out" / "model.safetensors").values())
