"""Fine-tuning by Trainer and by Accelerate, and on data from files: what their users rely on."""

import csv
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, load_dataset
from heads import HEADS
from penalty_training import NUM_ROWS, build_data, build_model, one_step
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from modeling_snn_bert import (
    SNNBertForSequenceClassification,
)
from modeling_snn_bert.fine_tuning import bert_autocast, finetune, teach

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left():
    yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def examples(head, rows=8, length=12):
    """Examples for a head, in which micro-batches have different numbers of labelled tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 2, length) if head == "choice" else (rows, length)
    ids = torch.randint(5, 120, shape, generator=generator)
    mask = torch.ones_like(ids)
    columns = {"input_ids": ids, "attention_mask": mask}
    if head in ("masked_lm", "token"):
        labelled = torch.arange(length) < torch.randint(1, length, (rows, 1), generator=generator)
        columns["labels"] = torch.where(labelled, ids if head == "masked_lm" else ids % 2, -100)
    elif head == "question":
        columns["start_positions"], columns["end_positions"] = ids[:, 0] % 6, 6 + ids[:, 1] % 6
    else:
        columns["labels"] = ids.flatten(1)[:, 0] % 2
    return Dataset.from_dict({name: x.tolist() for name, x in columns.items()}).with_format("torch")


def arguments(folder, **settings):
    defaults = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 5e-3}
    return TrainingArguments(str(folder), **{**defaults, **settings})


def weights(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
def test_trainers_accumulation_gives_the_gradient_of_one_batch(make_config, assert_spikes_flow, tmp_path, head):
    data = examples(head)
    steps = []
    for micro_batches in (1, 4):
        torch.manual_seed(0)
        model = HEADS[head](make_config())
        before = weights(model)
        # Plain gradient descent at a rate of 1, not clipped: a step is the gradient.
        trainer = Trainer(
            model,
            arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=8 // micro_batches,
                gradient_accumulation_steps=micro_batches,
                train_sampling_strategy="sequential",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
            ),
            train_dataset=data,
        )
        trainer.train()
        steps.append({name: x - before[name] for name, x in weights(model).items()})
    inputs = {name: data[:][name] for name in ("input_ids", "attention_mask")}
    assert_spikes_flow(HEADS[head](make_config()).eval(), **inputs)
    assert max(x.abs().max() for x in steps[0].values()) > 1e-2
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_leaves_the_firing_rate_penalty_as_in_one_batch(tmp_path, head):
    whole, accumulated = (one_step(head, tmp_path, NUM_ROWS // steps, steps) for steps in (1, 4))
    without = one_step(head, tmp_path, NUM_ROWS, 1, firing_rate_target=None)
    thresholds = [name for name in whole if name.endswith("v_threshold")]
    assert max((whole[name] - without[name]).abs().max() for name in thresholds) > 0.1
    for name, step in whole.items():
        torch.testing.assert_close(accumulated[name], step, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("head", ["masked_lm", "token"])
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "int"])
def test_a_loop_that_passes_num_items_in_batch_gets_the_loss_of_one_batch(head, as_tensor):
    model, data = build_model(head), build_data(head)[:]
    items = (data["labels"] != -100).sum()
    micro_batches = [{name: x[i : i + 2] for name, x in data.items()} for i in range(0, NUM_ROWS, 2)]
    losses = [model(**x, num_items_in_batch=items if as_tensor else items.item()).loss for x in micro_batches]
    outputs = model(**data)
    assert outputs.firing_rate_penalty > 1
    torch.testing.assert_close(sum(losses), outputs.loss, rtol=1e-4, atol=1e-4)


class WithPenalty(Trainer):
    """The guide's: weighted classes, and the penalty."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 2.0]))
        if outputs.firing_rate_penalty is not None:
            loss = loss + self.model.config.firing_rate_weight * outputs.firing_rate_penalty
        return (loss, outputs) if return_outputs else loss


class WithoutPenalty(Trainer):
    """With labels passed on, so that the head's loss is there and is not the one that is used."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], torch.tensor([1.0, 2.0]))
        return (loss, outputs) if return_outputs else loss


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


LOSSES_FROM_ELSEWHERE = {
    "label_smoothing": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": own_loss}),
    "subclass": (WithoutPenalty, {}, {}),
}


@pytest.mark.parametrize(("kind", "settings", "options"), LOSSES_FROM_ELSEWHERE.values(), ids=LOSSES_FROM_ELSEWHERE)
def test_a_loss_without_the_penalty_is_told_of(tmp_path, kind, settings, options):
    trainer = kind(
        build_model("sequence"),
        arguments(tmp_path, max_steps=1, **settings),
        train_dataset=build_data("sequence"),
        **options,
    )
    with pytest.warns(UserWarning, match="does not hold the penalty on firing rates"):
        trainer.train()


@pytest.mark.parametrize("kind", [Trainer, WithPenalty])
def test_a_loss_with_the_penalty_is_not(tmp_path, recwarn, kind):
    trainer = kind(build_model("sequence"), arguments(tmp_path, max_steps=2), train_dataset=build_data("sequence"))
    trainer.train()
    assert not [str(x.message) for x in recwarn if "penalty" in str(x.message)]


def test_trainer_resumes_bit_for_bit(make_config, tmp_path):
    runs = {}
    for name, resume in (("unbroken", None), ("resumed", str(tmp_path / "unbroken" / "checkpoint-3"))):
        torch.manual_seed(0)
        model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.1, **DROPOUT))
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
        trainer = Trainer(
            model, arguments(tmp_path / name, **settings), train_dataset=examples("sequence", rows=20), callbacks=[]
        )
        trainer.train(resume_from_checkpoint=resume)
        runs[name] = weights(model), [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(set(runs["unbroken"][1])) == 6 and runs["resumed"][1][-3:] == runs["unbroken"][1][-3:]
    for name, x in runs["unbroken"][0].items():
        assert torch.equal(runs["resumed"][0][name], x), name
    assert not list(tmp_path.glob("**/pytorch_model.bin"))


def test_trainer_evaluates_stops_early_and_loads_the_best_model(make_config, tmp_path):
    data = examples("sequence", rows=16)
    # The labels of the evaluation are turned round, so what training learns makes it worse from some point on.
    wrong = data.map(lambda row: {"labels": 1 - row["labels"]})
    model = SNNBertForSequenceClassification(make_config())
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=60,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_total_limit=3,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            per_device_train_batch_size=8,
        ),
        train_dataset=data,
        eval_dataset=wrong,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    history = [(x["eval_loss"], x["step"]) for x in trainer.state.log_history if "eval_loss" in x]
    best, step = min(history)
    assert trainer.state.global_step == step + 4 < 60
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(best, rel=1e-5) and metrics["eval_accuracy"] <= 1
    # Evaluation gathers the logits and nothing else, although the outputs hold more.
    model.config.output_firing_rates = True
    assert trainer.predict(wrong).predictions.shape == (16, 2)


def test_trainer_in_bfloat16(make_config, tmp_path):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.1))
    before = weights(model)
    trainer = Trainer(model, arguments(tmp_path, max_steps=20, bf16=True), train_dataset=examples("sequence"))
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0]
    after = weights(model)
    assert {x.dtype for x in after.values()} == {torch.float32}
    assert sum(not torch.equal(x, before[name]) for name, x in after.items()) > 0.9 * len(after)


def test_accelerate_accumulates_in_bfloat16(make_config):
    # bfloat16 rounds each micro-batch alike, so that the sums agree to the accumulation's own rounding.
    gradients = []
    for micro_batches in (1, 4):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=micro_batches)
        model = SNNBertForSequenceClassification(make_config()).train()
        loader = DataLoader(examples("sequence"), batch_size=8 // micro_batches)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        before = weights(model)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        gradients.append({name: before[name] - x for name, x in weights(model).items()})
        no_state = (AcceleratorState, GradientState, PartialState)
        for kind in no_state:
            kind._reset_state()
    largest = max(x.abs().max() for x in gradients[0].values())
    assert largest > 1e-2
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 0.02 * largest, name


ROWS = [
    ("null", 0),
    ('he said "stop', 1),
    ("one, two; three", 0),
    ("NA", 1),
    ('a "quoted" end"', 0),
]


@pytest.fixture
def files(tmp_path):
    """The same rows as a tab-separated file without quoting, as GLUE's are, as CSV and as JSON lines."""
    tsv, table, lines = (tmp_path / f"train.{suffix}" for suffix in ("tsv", "csv", "json"))
    tsv.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS), encoding="utf-8")
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("sentence", "label"), *ROWS])
    rows = [json.dumps({"sentence": text, "label": label}) for text, label in ROWS]
    lines.write_text("\n".join(rows), encoding="utf-8")
    return {
        "tsv": ("csv", tsv, {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
        "csv": ("csv", table, {"keep_default_na": False}),
        "json": ("json", lines, {}),
    }


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "json"])
def test_training_on_files(make_config, tokenizer, files, tmp_path, kind, streaming):
    builder, path, options = files[kind]
    cache = str(tmp_path / "cache")
    data = load_dataset(builder, data_files=str(path), split="train", streaming=streaming, cache_dir=cache, **options)
    assert [(row["sentence"], row["label"]) for row in data] == ROWS

    def encode(rows):
        return {**tokenizer(rows["sentence"], truncation=True), "labels": rows["label"]}

    data = data.map(encode, batched=True, remove_columns=["sentence", "label"])
    torch.manual_seed(0)
    model = SNNBertForSequenceClassification(make_config())
    before = weights(model)
    trainer = Trainer(
        model,
        arguments(tmp_path / "run", max_steps=3, per_device_train_batch_size=2),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert any(not torch.equal(x, before[name]) for name, x in weights(model).items())


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64"}, None),
        (None, None),
    ],
)
def test_a_bert_is_in_bfloat16_where_the_cpu_has_the_instructions(monkeypatch, features, wanted):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if features is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)

    def dtype_inside(accelerator):
        with bert_autocast(accelerator):
            return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    accelerator = Accelerator(cpu=True)
    assert dtype_inside(accelerator) == wanted
    # What the user said by `accelerate launch --mixed_precision` counts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert dtype_inside(accelerator) is None


def test_a_bert_trains_and_teaches_in_bfloat16_and_its_student_in_float32(make_config, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    config = make_config()
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    shape |= {name: getattr(config, name) for name in ("num_attention_heads", "intermediate_size")}
    bert = BertForSequenceClassification(BertConfig(**shape, num_labels=config.num_labels))
    student = SNNBertForSequenceClassification(config)
    dtypes = {"bert": [], "student": []}
    for name, model in (("bert", bert), ("student", student)):
        model.classifier.register_forward_hook(lambda _, inputs, logits, n=name: dtypes[n].append(logits.dtype))
    batch = {name: torch.tensor(column[:]) for name, column in examples("sequence").with_format(None).to_dict().items()}
    accelerator = Accelerator(cpu=True)
    finetune(accelerator, bert, lambda step: batch, steps=2, learning_rate=1e-3)
    settings = {"learning_rate": 1e-3, "logit_weight": 0.5, "distillation_steps": 1, "finetuning_steps": 1}
    teach(accelerator, student, bert, lambda step: batch, **settings)
    finetune(accelerator, student, lambda step: batch, steps=1, learning_rate=1e-3)
    assert dtypes == {"bert": [torch.bfloat16] * 4, "student": [torch.float32] * 3}
    # Nothing of it is left in the model.
    bert(**batch)
    assert dtypes["bert"][-1] == torch.float32 and "forward" not in vars(bert)
