"""GLUE's files and figures, and the scripts that fine-tune on them, on a small random BERT and made-up rows."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from example_scripts import EXAMPLES, interrupted_after, refused, run_script, tokenizers_loaded
from glue_files import write_glue
from glue_tasks import (
    METRICS_FROM,
    TASKS,
    TaskArguments,
    attention_implementation,
    checked_rows,
    fitting_length,
    guess_task,
    score,
)
from safetensors.torch import load_file
from small_bert import bert_fixture, write_half_precision, write_mpnet
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetForSequenceClassification,
    MPNetModel,
)

from modeling_snn_bert.trainer import DistillationTrainer

bert = bert_fixture(BertModel)


@pytest.mark.parametrize("name", list(TASKS))
def test_glue_files(tmp_path, name):
    task, data = TaskArguments(task_name=name, data_dir=str(write_glue(tmp_path, name))).load()
    assert set(data) == {"train", *task.validation_files}
    assert len(data["train"]) == 40 and all(len(data[split]) == 12 for split in task.validation_files)
    rows = data["train"]
    assert rows.column_names == [*task.columns, "label"]
    assert set(rows["label"]) == ({0.0, 5.0} if task.is_regression else {0, 1})
    # Quotes and the word "null" are text.
    assert any('"old' in text for text in rows[task.columns[0]])
    assert any("null" in text for text in rows[task.columns[0]])
    assert all(isinstance(text, str) for text in rows[task.columns[0]])


def test_the_task_folder_itself_will_do(tmp_path):
    folder = write_glue(tmp_path, "rte") / "RTE"
    assert len(TaskArguments(task_name="rte", data_dir=str(folder)).load()[1]["train"]) == 40


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param(
            "cola",
            lambda text: text.replace("\tx\t", "\t"),
            r"train\.tsv, line 1: has 3 cells, but there must be 4",
            id="columns",
        ),
        pytest.param("sst2", lambda text: text.replace("sentence", "text"), "no column 'sentence'", id="column"),
        pytest.param(
            "rte", lambda text: text.replace("not_entailment", "no"), "must be one of .* got 'no'", id="label"
        ),
        pytest.param("sst2", lambda text: text[:-2] + "2\n", "got '2'", id="index"),
        pytest.param(
            "stsb", lambda text: text.replace("5.000", "high"), "must be a finite number, got 'high'", id="number"
        ),
        pytest.param("stsb", lambda text: text.replace("5.000", "nan"), "must be a finite number, got 'nan'", id="nan"),
        pytest.param(
            "mrpc",
            lambda text: text + "1\ta\n1\ta\tb\tc\td\te\n",
            r"line 42: has 2 cells, but the header names 4",
            id="ragged",
        ),
        pytest.param("sst2", lambda text: text.splitlines()[0], "has no rows", id="empty"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, change, message):
    folder = write_glue(tmp_path, name)
    file = folder / TASKS[name].folder / "train.tsv"
    file.write_text(change(file.read_text(encoding="utf-8-sig")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TaskArguments(task_name=name, data_dir=str(folder)).load()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.tsv of SST-2"):
        TaskArguments(task_name="sst2", data_dir=str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match=r"No such file.*a\.csv"):
        TaskArguments(train_file=str(tmp_path / "a.csv"), validation_file=str(tmp_path / "b.csv")).load()


def test_own_files(tmp_path):
    rows = [{"text": f"row {i}", "label": ("calm", "loud", "mute")[i % 3]} for i in range(6)]
    paths = {}
    for split in ("train", "validation"):
        paths[f"{split}_file"] = str(tmp_path / f"{split}.jsonl")
        Path(paths[f"{split}_file"]).write_text("\n".join(map(json.dumps, rows)))
    task, data = TaskArguments(**paths).load()
    assert task.labels == ("calm", "loud", "mute") and task.columns == ("text",) and task.metrics == ("accuracy",)
    assert list(data["validation"]["label"]) == [0, 1, 2, 0, 1, 2]

    Path(paths["train_file"]).write_text("\n".join(json.dumps({**row, "label": 0.5}) for row in rows))
    with pytest.raises(ValueError, match="validation data of regression must be a finite number, got 'calm'"):
        TaskArguments(**paths).load()
    with pytest.raises(ValueError, match="no column 'grade'"):
        TaskArguments(**paths, label_column="grade").load()
    with pytest.raises(ValueError, match="together"):
        TaskArguments(train_file=paths["train_file"]).load()
    with pytest.raises(ValueError, match="one of cola, sst2"):
        TaskArguments(task_name="glue", **paths).load()


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("2", "10", "2", "1"), ("1", "2", "10")),
        (("0.5", "2", "1", "0"), ()),
        (("1", "x", "0.5", "x"), ("0.5", "1", "x")),
    ],
)
def test_what_is_learned_follows_from_the_labels_of_a_table(tmp_path, suffix, labels, wanted):
    """Whole numbers are classes in their order, other numbers a regression, and a text of digits is a text."""
    path = tmp_path / f"rows.{suffix}"
    mark = {"csv": ",", "tsv": "\t"}[suffix]
    rows = [("sentence", "label"), *(("12", label) for label in labels)]
    path.write_text("\n".join(mark.join(row) for row in rows), encoding="utf-8")
    task, data = TaskArguments(train_file=str(path), validation_file=str(path)).load()
    assert task.labels == wanted and task.is_regression == (not wanted)
    assert list(data["train"]["sentence"]) == ["12"] * 4
    found = [float(label) if task.is_regression else wanted.index(label) for label in labels]
    assert list(data["train"]["label"]) == found


def test_a_number_among_numbers_is_no_index(tmp_path):
    """A label that only the validation rows have is refused; where a feature says so, a number is an index."""
    rows = [{"text": f"row {i}", "label": str(1 + i % 2)} for i in range(4)]
    for name, last in (("train", "2"), ("validation", "0")):
        content = "\n".join(json.dumps(row) for row in [*rows, {"text": "last", "label": last}])
        (tmp_path / f"{name}.jsonl").write_text(content)
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    with pytest.raises(ValueError, match=r"row 4 of the validation data .* must be one of \['1', '2'\].*got '0'"):
        TaskArguments(**files).load()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    task = guess_task(DatasetDict(train=data), None, "label")
    assert task.labels == ("1", "2") and list(checked_rows(data, task, "train")["label"]) == [0, 1]


def test_scores_by_hand():
    logits = [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    labels = [0, 1, 0, 1]
    # One of each: true and false positive, true and false negative.
    assert score(TASKS["sst2"], logits, labels) == {"accuracy": 0.5}
    assert score(TASKS["mrpc"], logits, labels) == {"f1": 0.5, "accuracy": 0.5}
    assert score(TASKS["cola"], logits, labels) == {"matthews_correlation": 0.0, "accuracy": 0.5}
    figures = score(TASKS["stsb"], [[1.0], [2.0], [9.0]], [1.0, 2.0, 3.0])
    # Deviations (-3, -2, 5) and (-1, 0, 1): 8 / sqrt(38 * 2).
    assert figures["spearman"] == pytest.approx(1) and figures["pearson"] == pytest.approx(8 / 76**0.5)
    assert figures["combined"] == pytest.approx((figures["pearson"] + figures["spearman"]) / 2)
    assert score(TASKS["stsb"], [[1.0], [1.0]], [0.0, 5.0])["combined"] == 0
    with pytest.raises(ValueError, match="NaN"):
        score(TASKS["sst2"], [[float("nan"), 0.0]], [0])


BASE = ["--task_name", "sst2", "--per_device_train_batch_size", 8, "--learning_rate", 3e-3, "--energy_samples", 4]


def read(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_trainer(tmp_path, bert):
    """A BERT is converted, learns a rule from files, and the results say how; the energy follows the spikes."""
    glue = write_glue(tmp_path / "glue", "sst2")
    output = tmp_path / "out"
    arguments = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--convert", "--num_train_epochs", 8]
    run_script("run_glue", *arguments, "--seeds", 0, 1, "--output_dir", output)
    results = read(output)
    assert results["seeds"] == [0, 1] and len(results["runs"]) == 2
    assert results["mean"]["accuracy"] >= 0.9
    assert results["standard_deviation"]["accuracy"] is not None and results["taken_at"] == "last step"
    assert results["rows"] == {"train": 40, "validation": 12}
    assert "scikit-learn" in results["metrics_from"] and results["arguments"]["num_train_epochs"] == 8
    run = results["runs"][0]
    assert run["last_step"] == 40 and run["log"][-1]["eval_accuracy"] == run["metrics"]["accuracy"]
    rates = run["energy"]["firing_rates"]
    assert len(rates) == 14 and all(0 < rate < 1 for rate in rates.values())
    assert run["energy"]["picojoules"]["SNN-BERT"]["matrix_products"] > 0
    config = json.loads((output / "seed_1" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_no_steps_evaluate_the_model_as_it_is(tmp_path, bert):
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--data_dir", glue, "--energy_samples", 0]
    train = ["--model_name_or_path", bert, "--convert", "--max_steps", 15, "--output_dir", tmp_path / "trained"]
    run_script("run_glue", *common, *train)
    trained = tmp_path / "trained" / "seed_0"
    evaluate = ["--model_name_or_path", trained, "--no_do_train", "--output_dir", tmp_path / "again"]
    run_script("run_glue", *common, *evaluate)
    assert read(tmp_path / "again")["mean"] == read(tmp_path / "trained")["mean"]
    assert read(tmp_path / "again")["runs"][0]["last_step"] == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "again" / "seed_0"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_checkpoints(tmp_path, bert, tokenizer):
    """Model and teacher from the Hub are often in half precision; they are trained in float32 all the same."""
    glue = write_glue(tmp_path / "glue", "sst2")
    write_half_precision(tmp_path / "half", bert, tokenizer)
    common = [*BASE, "--data_dir", glue, "--bf16", "--use_cpu", "--max_steps", 2]
    run_script("run_glue", *common, "--model_name_or_path", tmp_path / "half", "--output_dir", tmp_path / "teacher")
    write_half_precision(tmp_path / "half_teacher", tmp_path / "teacher" / "seed_0", tokenizer)
    run_script(
        "run_glue",
        *[*common, "--model_name_or_path", tmp_path / "half", "--convert"],
        *["--teacher_name_or_path", tmp_path / "half_teacher", "--hidden_weight", 1, "--output_dir", tmp_path / "out"],
    )
    for folder in ("teacher", "out"):
        weights = load_file(tmp_path / folder / "seed_0" / "model.safetensors")
        assert all(value.dtype == torch.float32 for value in weights.values())
    assert 0 < read(tmp_path / "out")["runs"][0]["energy"]["mean_firing_rate"] < 1


@pytest.mark.slow
def test_resumes_exactly(tmp_path, bert):
    """Interrupted after some steps and resumed: the same weights and figures, bit for bit, and dropout is on."""
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--convert", "--gradient_accumulation_steps", 2]
    common += [
        "--save_steps",
        2,
        "--num_train_epochs",
        2,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
        "--seeds",
        3,
        4,
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("run_glue", *common, "--output_dir", whole)
    assert read(whole)["runs"][0]["last_step"] == 5

    with interrupted_after(4):
        run_script("run_glue", *common, "--output_dir", parts)
    assert not (parts / "results.json").exists()
    run_script(
        "run_glue", *common, "--output_dir", parts, "--resume_from_checkpoint", parts / "seed_3" / "checkpoint-4"
    )
    for seed in (3, 4):
        one = load_file(whole / f"seed_{seed}" / "model.safetensors")
        other = load_file(parts / f"seed_{seed}" / "model.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert read(whole)["mean"] == read(parts)["mean"]
    first, second = load_file(whole / "seed_3" / "model.safetensors"), load_file(whole / "seed_4" / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, bert):
    """Two processes: the same batches shared out, the same results but for rounding."""
    glue = write_glue(tmp_path / "glue", "sst2", rows=40)
    common = ["--task_name", "sst2", "--data_dir", glue, "--model_name_or_path", bert, "--learning_rate", 1e-4]
    common += ["--num_train_epochs", 1, "--per_device_eval_batch_size", 5, "--save_steps", 2]
    # The random numbers of dropout are each process' own.
    (bert / "config.json").write_text((bert / "config.json").read_text().replace('_prob": 0.1', '_prob": 0.0'))
    run_script("run_glue", *common, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += [EXAMPLES / "run_glue.py", *common, "--per_device_train_batch_size", 4]
    command += ["--output_dir", tmp_path / "two"]
    # Without the variable Accelerate would look for a GPU.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["runs"][0]["last_step"] == two["runs"][0]["last_step"] == 5
    assert one["runs"][0]["training_tokens"] == two["runs"][0]["training_tokens"]
    assert one["rows"] == two["rows"] and one["mean"] == pytest.approx(two["mean"], abs=0.1)
    weights = [load_file(tmp_path / name / "seed_0" / "model.safetensors") for name in ("one", "two")]
    start = load_file(bert / "model.safetensors")
    for name, value in weights[0].items():
        # Weights move by some 2e-4, far more than they differ; a key's bias has no gradient but rounding errors.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-6)
    moved = weights[0]["bert.encoder.layer.0.output.dense.weight"] - start["encoder.layer.0.output.dense.weight"]
    assert moved.abs().max() > 2e-4


def test_a_finished_seed_is_kept_only_with_the_same_flags(tmp_path, bert, capsys):
    glue = write_glue(tmp_path / "glue", "sst2")
    output = tmp_path / "out"
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--max_steps", 2, "--output_dir", output]
    run_script("run_glue", *common, "--save_steps", 1, "--seeds", 0)
    written = (output / "seed_0" / "model.safetensors").stat().st_mtime_ns
    resume = ["--resume_from_checkpoint", output / "seed_0" / "checkpoint-2", "--save_steps", 1]
    run_script("run_glue", *common, *resume, "--seeds", 0, 1)
    assert (output / "seed_0" / "model.safetensors").stat().st_mtime_ns == written
    assert read(output)["seeds"] == [0, 1] and read(output)["runs"][0]["energy"] is None
    message = refused(capsys, "run_glue", *common, *resume, "--weight_decay", 0.5)
    assert "other flags (weight_decay)" in message


def test_teacher(tmp_path, bert):
    """With the teacher's logits alone the student learns the teacher's classes, not the labels."""
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--data_dir", glue, "--num_train_epochs", 8, "--seeds", 0]
    run_script("run_glue", *common, "--model_name_or_path", bert, "--output_dir", tmp_path / "teacher")
    assert read(tmp_path / "teacher")["mean"]["accuracy"] >= 0.9
    swapped = glue / "SST-2" / "train.tsv"
    swapped.write_text(
        "\n".join(line[:-1] + {"0": "1", "1": "0"}.get(line[-1], line[-1]) for line in swapped.read_text().splitlines())
    )
    student = [
        *common,
        "--model_name_or_path",
        bert,
        "--convert",
        "--teacher_name_or_path",
        tmp_path / "teacher/seed_0",
    ]
    student += ["--logit_weight", 1.0, "--hidden_weight", 0.1, "--attention_weight", 0.1]
    student += ["--config_overrides", "attention_probs_dropout_prob=0"]
    run_script("run_glue", *student, "--output_dir", tmp_path / "student")
    assert read(tmp_path / "student")["mean"]["accuracy"] >= 0.9


def test_labels_in_another_order(tmp_path, bert):
    """A teacher, and a model, whose logits have the task's labels in another order, are what they are."""
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--data_dir", glue, "--num_train_epochs", 8, "--seeds", 0, "--energy_samples", 0]
    run_script("run_glue", *common, "--model_name_or_path", bert, "--output_dir", tmp_path / "right")
    assert read(tmp_path / "right")["mean"]["accuracy"] >= 0.9
    model = BertForSequenceClassification.from_pretrained(tmp_path / "right" / "seed_0")
    linear = model.classifier
    linear.weight.data, linear.bias.data = linear.weight.data.flip(0), linear.bias.data.flip(0)
    model.config.id2label = dict(enumerate(list(model.config.id2label.values())[::-1]))
    model.save_pretrained(tmp_path / "turned")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "turned")
    turned = ["--model_name_or_path", tmp_path / "turned", "--no_do_train", "--output_dir", tmp_path / "again"]
    run_script("run_glue", *common, *turned)
    assert read(tmp_path / "again")["mean"] == read(tmp_path / "right")["mean"]
    student = ["--model_name_or_path", bert, "--convert", "--teacher_name_or_path", tmp_path / "turned"]
    run_script("run_glue", *common, *student, "--logit_weight", 1.0, "--output_dir", tmp_path / "student")
    assert read(tmp_path / "student")["mean"]["accuracy"] >= 0.9


def test_inputs_are_cut_at_what_the_models_take(tmp_path, bert, tokenizer):
    """A pair takes one token more of an MPNet that has as many positions."""
    write_mpnet(tmp_path / "mpnet", tokenizer, MPNetForSequenceClassification)
    teacher_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mpnet")
    assert fitting_length(32, tokenizer, str(bert), teacher_tokenizer) == 32
    assert fitting_length(128, tokenizer, str(bert)) == 64
    assert fitting_length(128, tokenizer, str(bert), teacher_tokenizer) == 63
    glue = write_glue(tmp_path / "glue", "mrpc")
    for file in (glue / "MRPC").iterdir():
        file.write_text(file.read_text("utf-8").replace("river", 40 * "river "), encoding="utf-8")
    common = ["--task_name", "mrpc", "--data_dir", glue, "--model_name_or_path", bert, "--max_steps", 2, "--seeds", 0]
    common += ["--teacher_name_or_path", tmp_path / "mpnet", "--energy_samples", 0]
    run_script("run_glue", *common, "--output_dir", tmp_path / "out")
    assert read(tmp_path / "out")["runs"][0]["last_step"] == 2


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_teacher_with_other_tokens(tmp_path, bert, tokenizer, task, capsys):
    """An MPNet is fine-tuned, and teaches its logits and the relations between its tokens."""
    glue = write_glue(tmp_path / "glue", task)
    write_mpnet(tmp_path / "mpnet", tokenizer, MPNetModel)
    common = ["--task_name", task, "--data_dir", glue, "--num_train_epochs", 8, "--per_device_train_batch_size", 8]
    common += ["--learning_rate", 5e-3, "--seeds", 0, "--energy_samples", 8]
    run_script("run_glue", *common, "--model_name_or_path", tmp_path / "mpnet", "--output_dir", tmp_path / "teacher")
    figure = next(iter(read(tmp_path / "teacher")["mean"].values()))
    assert figure >= 0.8
    common += ["--model_name_or_path", bert, "--convert", "--teacher_name_or_path", tmp_path / "teacher" / "seed_0"]
    taught = ["--logit_weight", 1.0, "--relation_weight", 1.0]
    run_script("run_glue", *common, *taught, "--output_dir", tmp_path / "student")
    results = read(tmp_path / "student")
    log = [entry["relation_loss"] for entry in results["runs"][0]["log"] if "relation_loss" in entry]
    assert next(iter(results["mean"].values())) >= 0.8 and 0 < log[-1] < 0.9 * log[0]
    assert results["runs"][0]["energy"]["mean_firing_rate"] > 0
    message = refused(capsys, "run_glue", *common, "--hidden_weight", 1, "--output_dir", tmp_path / "states")
    assert "--teacher_name_or_path must have the vocabulary of the model" in message
    assert "give --hidden_weight 0" in message


@pytest.fixture
def unlabelled_file(tmp_path):
    """Text of the words that the made-up rows have, and whose first word says what they are."""
    generator = random.Random(1)
    words = ["river", "null", "film", "night"]
    lines = [" ".join([generator.choice(("fox", "dog")), *generator.choices(words, k=7)]) + "." for _ in range(60)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_unlabelled_batches(tmp_path, bert, unlabelled_file, task):
    """They come between those with labels, are of the task's kind, and teach what the teacher knows."""
    glue = write_glue(tmp_path / "glue", task)
    common = ["--task_name", task, "--per_device_train_batch_size", 8, "--learning_rate", 5e-3, "--data_dir", glue]
    common += ["--model_name_or_path", bert, "--seeds", 0, "--energy_samples", 0]
    run_script("run_glue", *common, "--num_train_epochs", 8, "--output_dir", tmp_path / "teacher")
    teacher = tmp_path / "teacher" / "seed_0"
    seen = []

    class Watched(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if model.training:
                is_pair = bool(inputs["token_type_ids"].any(1).all())
                seen.append(("labels" in inputs, is_pair, float(loss)))
            return (loss, outputs) if return_outputs else loss

    common += ["--convert", "--teacher_name_or_path", teacher, "--hidden_weight", 0.1, "--num_train_epochs", 3]
    common += ["--unlabelled_file", unlabelled_file, "--unlabelled_batches", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run_glue.DistillationTrainer", Watched)
        run_script("run_glue", *common, "--output_dir", tmp_path / "out")
    # 40 rows are 5 batches, and three times as many come between them.
    assert [labelled for labelled, _, _ in seen] == [True, False, False, False] * 15
    assert all(pairs == (task == "stsb") for _, pairs, _ in seen)
    assert read(tmp_path / "out")["runs"][0]["last_step"] == 60
    losses = [loss for labelled, _, loss in seen if not labelled]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_unlabelled_rows_are_padded_too(tmp_path, bert, unlabelled_file):
    """PSN takes one length only."""
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--seeds", 0]
    run_script("run_glue", *common, "--max_steps", 1, "--output_dir", tmp_path / "teacher")
    common += ["--teacher_name_or_path", tmp_path / "teacher" / "seed_0", "--unlabelled_file", unlabelled_file]
    common += ["--convert", "--setting", "neuron_type=psn,psn_length=24", "--max_seq_length", 24, "--pad_to_max_length"]
    run_script("run_glue", *common, "--max_steps", 3, "--output_dir", tmp_path / "out")
    run = read(tmp_path / "out")["runs"][0]
    assert run["last_step"] == 3 and 0 < run["energy"]["mean_firing_rate"] < 1


@pytest.mark.slow
def test_unlabelled_batches_resume_exactly(tmp_path, bert, unlabelled_file):
    glue = write_glue(tmp_path / "glue", "sst2")
    run_script(
        "run_glue",
        *[*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--max_steps", 2, "--seeds", 0],
        *["--output_dir", tmp_path / "teacher"],
    )
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--convert", "--max_steps", 9]
    common += ["--teacher_name_or_path", tmp_path / "teacher" / "seed_0", "--unlabelled_file", unlabelled_file]
    common += ["--save_steps", 3, "--seeds", 5]
    run_script("run_glue", *common, "--output_dir", tmp_path / "whole")
    with interrupted_after(6):
        run_script("run_glue", *common, "--output_dir", tmp_path / "parts")
    resume = ["--resume_from_checkpoint", tmp_path / "parts" / "seed_5" / "checkpoint-6"]
    run_script("run_glue", *common, "--output_dir", tmp_path / "parts", *resume)
    one, other = (load_file(tmp_path / name / "seed_5" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [[], ["--convert"]], ids=["bert", "snn-bert"])
def test_frozen_embeddings_stay_as_they_are(tmp_path, bert, kind):
    glue = write_glue(tmp_path / "glue", "sst2", rows=24)
    common = [*BASE, "--data_dir", glue, "--num_train_epochs", 1, "--seeds", 0, "--model_name_or_path", bert, *kind]
    run_script("run_glue", *common, "--freeze_embeddings", "--output_dir", tmp_path / "out")
    run_script("run_glue", *common, "--output_dir", tmp_path / "free")
    before = load_file(bert / "model.safetensors")
    for folder, is_kept in (("out", True), ("free", False)):
        after = load_file(tmp_path / folder / "seed_0" / "model.safetensors")
        same = {name: torch.equal(after[f"bert.{name}"], x) for name, x in before.items() if "pooler" not in name}
        names = [name for name in same if name.startswith("embeddings.")]
        assert len(names) == 5 and all(same[name] for name in names) == is_kept
        assert not any(same[name] for name in same if name.endswith("dense.weight"))


def test_another_neuron(tmp_path, bert):
    """A pair task and a regression, another neuron, exact resumption, and the same results file."""
    glue = write_glue(tmp_path / "glue", "stsb", rows=24)
    common = ["--task_name", "stsb", "--data_dir", glue, "--model_name_or_path", bert, "--convert"]
    common += [
        "--use_cpu",
        "--per_device_train_batch_size",
        8,
        "--learning_rate",
        2e-3,
        "--report_to",
        "none",
    ]
    common += ["--config_overrides", "neuron_type=lif,coding=repeat,num_timesteps=2", "--energy_samples", 4]
    common += ["--num_train_epochs", 2, "--save_steps", 4, "--disable_tqdm", "True", "--seeds", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("run_glue", *common, "--output_dir", whole)
    results = read(whole)
    assert set(results["mean"]) == {"combined", "pearson", "spearman"} and results["seeds"] == [1]
    assert results["standard_deviation"]["combined"] is None and results["runs"][0]["last_step"] == 6
    assert all(0 < rate < 1 for rate in results["runs"][0]["energy"]["firing_rates"].values())
    config = json.loads((whole / "seed_1" / "config.json").read_text())
    assert config["neuron_type"] == "lif" and config["num_timesteps"] == 2 and config["problem_type"] == "regression"

    (parts / "seed_1").mkdir(parents=True)
    (whole / "seed_1" / "checkpoint-4").rename(parts / "seed_1" / "checkpoint-4")
    run_script("run_glue", *common, "--output_dir", parts, "--resume_from_checkpoint", "true")
    one, other = (load_file(folder / "seed_1" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read(parts)["mean"] == results["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--config_overrides", "decays=0.1"], "'decays' is none of the settings", id="override"),
        pytest.param(["--config_overrides", "decay=much", "--convert"], "decay", id="override-type"),
        pytest.param(["--setting", "firing_rate_target=low", "--convert"], "firing_rate_target", id="override-number"),
        pytest.param(["--logit_weight", 2], "`logit_weight` must lie in", id="weight"),
        *(
            pytest.param([f"--{name}", value], f"--{name} needs --{what}", id=f"{name}-idle")
            for name, value, what in (
                ("logit_weight", 0.5, "teacher_name_or_path"),
                ("temperature", 2.0, "teacher_name_or_path"),
                ("hidden_weight", 1, "teacher_name_or_path"),
                ("unlabelled_batches", 4, "unlabelled_file"),
                ("unlabelled_sentences", 60_000, "unlabelled_file"),
                ("firing_rate", 0.2, "convert"),
            )
        ),
        pytest.param(["--unlabelled_file", __file__ + "x"], "there is no file", id="unlabelled-missing"),
        pytest.param(["--unlabelled_file", __file__], "--unlabelled_file must be one of .txt", id="unlabelled-kind"),
        pytest.param(["--unlabelled_file", "{text}"], "--unlabelled_file needs --teacher", id="unlabelled-no-teacher"),
        pytest.param(
            ["--unlabelled_file", "{text}", "--teacher_name_or_path", "{bert}"],
            "has no sentences",
            id="unlabelled-short",
        ),
        pytest.param(["--unlabelled_sentences", 0], "--unlabelled_sentences must be >= 1", id="unlabelled-sentences"),
        pytest.param(["--unlabelled_batches", 0], "--unlabelled_batches must be >= 1", id="unlabelled-batches"),
        pytest.param(["--seeds", 1, 1], "must differ", id="seeds"),
        pytest.param(["--setting", "spike_type=ternary"], "give --convert", id="settings-of-a-bert"),
        pytest.param(["--task_name", "glue"], "must be one of cola", id="task"),
        pytest.param(["--text_column", "text"], "the columns of sst2 are ['sentence', 'label']: leave out", id="text"),
        pytest.param(["--label_column", "grade"], "the columns of sst2 are ['sentence', 'label']: leave", id="label"),
        pytest.param(["--dataset_config_name", "en"], "--dataset_config_name needs --dataset_name", id="no-dataset"),
        pytest.param(["--resume_from_checkpoint", "nowhere"], "is not a checkpoint", id="checkpoint"),
        pytest.param(["--setting", "neuron_type=psn,psn_length=128", "--convert"], "--pad_to_max_length", id="psn"),
    ],
)
def test_refuses(tmp_path, bert, capsys, arguments, message):
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--output_dir", tmp_path / "out"]
    (tmp_path / "text.txt").write_text("Too short.")
    arguments = [{"{text}": tmp_path / "text.txt", "{bert}": bert}.get(x, x) for x in arguments]
    assert message in refused(capsys, "run_glue", *common, *arguments)
    assert not (tmp_path / "out" / "results.json").exists()


def test_attention_weights_under_dropout_are_refused(tmp_path, bert, capsys):
    glue = write_glue(tmp_path / "glue", "sst2")
    arguments = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--output_dir", tmp_path / "out", "--convert"]
    arguments += ["--teacher_name_or_path", bert, "--attention_weight", 0.1]
    arguments += ["--config_overrides", "attention_probs_dropout_prob=0.1"]
    message = refused(capsys, "run_glue", *arguments)
    assert "a dropout of 0.1 would be applied: give --config_overrides attention_probs_dropout_prob=0" in message


def test_attention_weights_of_other_models_are_refused(tmp_path, bert, tokenizer, capsys):
    """Which dropout they have, and whether a teacher's weights compare with theirs, is not known."""
    glue = write_glue(tmp_path / "glue", "sst2")
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    arguments = [*BASE, "--data_dir", glue, "--output_dir", tmp_path / "out", "--attention_weight", 0.1]
    arguments += ["--model_name_or_path", tmp_path / "other"]
    message = refused(capsys, "run_glue", *arguments, "--teacher_name_or_path", bert)
    assert "--attention_weight takes an SNN-BERT, a BERT or an MPNet" in message


def test_a_teacher_without_a_head_is_refused(tmp_path, bert, capsys):
    glue = write_glue(tmp_path / "glue", "sst2")
    arguments = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--output_dir", tmp_path / "out"]
    with tokenizers_loaded() as paths:
        message = refused(capsys, "run_glue", *arguments, "--teacher_name_or_path", bert)
    assert "--teacher_name_or_path must be a classifier" in message and "lacks classifier.bias" in message
    assert paths == [str(bert)] * 2  # the student's and the teacher's, once each


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        pytest.param("stsb", [], "the labels ['score']; its labels are ['LABEL_0', 'LABEL_1']", id="number"),
        pytest.param(
            "rte",
            ["not_equivalent", "equivalent"],
            "on rte, with the labels ['entailment', 'not_entailment']; its",
            id="names",
        ),
        # What comes next is seen in place of a teacher that teaches: it has no head.
        pytest.param("rte", ["Not_entailment", "ENTAILMENT"], "must be a classifier", id="case-and-order"),
        pytest.param("rte", ["LABEL_0", "LABEL_1"], "must be a classifier", id="unnamed"),
    ],
)
def test_a_teacher_of_another_task_is_refused(tmp_path, bert, tokenizer, capsys, task, labels, message):
    model = BertModel.from_pretrained(bert, **({"id2label": dict(enumerate(labels))} if labels else {}))
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    glue = write_glue(tmp_path / "glue", task)
    arguments = ["--model_name_or_path", bert, "--data_dir", glue, "--output_dir", tmp_path / "out"]
    arguments += ["--teacher_name_or_path", tmp_path / "teacher"]
    assert message in refused(capsys, "run_glue", *arguments, "--task_name", task)


def test_the_plain_loop(tmp_path, bert):
    """It gives what Trainer gives without dropout, bit for bit, and resumes exactly with it."""
    glue = write_glue(tmp_path / "glue", "sst2")
    common = [*BASE, "--model_name_or_path", bert, "--data_dir", glue, "--convert", "--gradient_accumulation_steps", 2]
    common += ["--num_train_epochs", 2]
    still = ["--config_overrides", "hidden_dropout_prob=0,attention_probs_dropout_prob=0"]
    run_script("run_glue", *common, *still, "--output_dir", tmp_path / "trainer")
    run_script("run_glue_no_trainer", *common, *still, "--output_dir", tmp_path / "loop")
    assert_same_weights(tmp_path / "trainer" / "seed_0", tmp_path / "loop")
    results = json.loads((tmp_path / "loop" / "all_results.json").read_text())
    assert results["steps"] == 5
    assert results["metrics"]["validation_accuracy"] == read(tmp_path / "trainer")["mean"]["accuracy"]
    assert 0 < results["energy"]["mean_firing_rate"] < 1

    run_script("run_glue_no_trainer", *common, "--checkpointing_steps", 2, "--output_dir", tmp_path / "whole")
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "step_2", "--output_dir", tmp_path / "parts"]
    run_script("run_glue_no_trainer", *common, *resume)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    evaluate = ["--model_name_or_path", tmp_path / "whole", "--max_train_steps", 0, "--output_dir", tmp_path / "again"]
    run_script("run_glue_no_trainer", *BASE, "--data_dir", glue, *evaluate)
    again, whole = (json.loads((tmp_path / x / "all_results.json").read_text()) for x in ("again", "whole"))
    assert again["metrics"] == whole["metrics"] and again["steps"] == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "again")


def test_the_plain_loop_refuses_a_firing_rate_without_a_conversion(tmp_path, bert, capsys):
    arguments = [*BASE, "--model_name_or_path", bert, "--output_dir", tmp_path / "out", "--firing_rate", 0.2]
    assert "--firing_rate needs --convert" in refused(capsys, "run_glue_no_trainer", *arguments)


@pytest.mark.parametrize(
    ("weights", "device", "dropout", "wanted"),
    [(False, "cpu", 0.0, "eager"), (False, "cpu", 0.1, None), (False, "cuda", 0.0, None), (True, "cuda", 0.1, "eager")],
)
def test_attention_in_training(weights, device, dropout, wanted):
    assert attention_implementation(weights, torch.device(device), dropout) == wanted


def test_metrics_are_named():
    assert METRICS_FROM.startswith("scikit-learn ")
