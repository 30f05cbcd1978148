"""DistillationTrainer: its losses against those of a loop, its batches, its log."""

import pytest
import torch
from small_bert import bert_fixture
from transformers import BertForSequenceClassification, BertModel, Trainer, TrainerCallback

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.batches import Batches
from modeling_snn_bert.distillation import (
    attention_loss,
    embedding_loss,
    hidden_state_loss,
    label_and_logit_loss,
    logit_loss,
    parameter_groups,
)
from modeling_snn_bert.muon import MuonAdamW
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments

bert = bert_fixture(BertModel)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}


@pytest.fixture
def batch(tokenizer, texts):
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    return {**batch, "labels": torch.arange(len(texts)) % 2}


@pytest.fixture
def make_trainer(tmp_path, bert):
    """A function that makes the trainer of a student with a target for its firing rates."""

    def make(batches=(), student_class=SNNBertForSequenceClassification, teacher=True, **settings):
        torch.manual_seed(0)
        config = SNNBertConfig.from_pretrained(bert, firing_rate_target=0.01, firing_rate_weight=0.3, **STILL)
        classes = {SNNBertForSequenceClassification: BertForSequenceClassification, SNNBertModel: BertModel}
        taught = classes[student_class].from_pretrained(bert, attn_implementation="eager") if teacher else None
        arguments = DistillationTrainingArguments(
            tmp_path, use_cpu=True, max_steps=len(batches) or 1, save_strategy="no", disable_tqdm=True, **settings
        )
        model = student_class.from_pretrained(bert, config=config)
        dataset = Batches(lambda number: dict(batches[number]), len(batches))
        return DistillationTrainer(model, arguments, teacher=taught, train_dataset=dataset)

    return make


@pytest.mark.parametrize("bf16", [True, False])
def test_the_teacher_computes_as_the_student_does(make_trainer, batch, bf16):
    """In bfloat16 if that is asked for; the losses are in float32 all the same."""
    seen = []
    trainer = make_trainer([batch], bf16=bf16, hidden_weight=1.0)
    for model in (trainer.model, trainer.teacher):
        linear = model.bert.encoder.layer[0].intermediate.dense
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.add_part = lambda name, value: seen.append(value.dtype) or value
    trainer.train()
    assert seen == [torch.bfloat16 if bf16 else torch.float32] * 2 + [torch.float32] * 3


WEIGHTS = {"logit_weight": 0.7, "temperature": 3.0, "hidden_weight": 0.5, "attention_weight": 0.2}


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loss_is_the_sum_of_its_parts(make_trainer, batch, labelled):
    """However little the labels count beside the teacher, or not at all, the penalty has its whole weight."""
    trainer = make_trainer(**WEIGHTS)
    inputs = batch if labelled else {name: x for name, x in batch.items() if name != "labels"}
    model, extras = trainer.model.train(), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        outputs = model(**inputs, **extras)
        wanted = trainer.teacher(**{name: x for name, x in inputs.items() if name != "labels"}, **extras)
        loss = trainer.compute_loss(model, inputs)
    penalty = outputs.firing_rate_penalty
    if labelled:
        expected = label_and_logit_loss(outputs, wanted.logits, 0.7, firing_rate_weight=0.3, temperature=3.0)
        labels = outputs.loss - 0.3 * penalty
        logits = logit_loss(outputs.logits, wanted.logits, 3.0)
        torch.testing.assert_close(expected, 0.3 * labels + 0.7 * logits + 0.3 * penalty)
    else:
        expected = logit_loss(outputs.logits, wanted.logits, 3.0) + 0.3 * penalty
    expected = expected + 0.5 * hidden_state_loss(outputs.hidden_states, wanted.hidden_states, batch["attention_mask"])
    expected = expected + 0.2 * attention_loss(outputs.attentions, wanted.attentions, batch["attention_mask"])
    torch.testing.assert_close(loss, expected)
    assert penalty > 0


def test_a_model_with_a_head_is_taught_embeddings(make_trainer, batch):
    trainer = make_trainer(logit_weight=0.7, embedding_weight=2.0)
    plain = make_trainer(logit_weight=0.7)
    inputs, mask = {name: x for name, x in batch.items() if name != "labels"}, batch["attention_mask"]
    with torch.no_grad():
        loss, without = (x.compute_loss(x.model.train(), batch) for x in (trainer, plain))
        states = trainer.model.base_model(**inputs).last_hidden_state
        wanted = trainer.teacher.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(loss, without + 2 * embedding_loss(states, wanted, mask))
    assert loss > without


def test_one_sentence_has_no_variance_to_learn_embeddings_by(make_trainer, batch):
    trainer, plain = make_trainer(embedding_weight=2.0), make_trainer()
    one = {name: x[:1] for name, x in batch.items()}
    with torch.no_grad():
        loss, without = (x.compute_loss(x.model.train(), one) for x in (trainer, plain))
    torch.testing.assert_close(loss, without)


def test_a_model_without_a_head_is_taught(make_trainer, batch):
    trainer = make_trainer(student_class=SNNBertModel, hidden_weight=1.0, embedding_weight=2.0)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    model, mask = trainer.model.train(), batch["attention_mask"]
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        wanted = trainer.teacher(**inputs, output_hidden_states=True)
        loss = trainer.compute_loss(model, inputs)
    expected = hidden_state_loss(outputs.hidden_states, wanted.hidden_states, mask)
    expected = expected + 2 * embedding_loss(outputs.last_hidden_state, wanted.last_hidden_state, mask)
    torch.testing.assert_close(loss, expected + 0.3 * outputs.firing_rate_penalty)


def test_batches_are_taken_in_their_order(make_trainer, batch):
    """Each once, accumulated by their mean, as in a loop; parts of the loss and tokens are logged."""
    batches = [{name: x[i : i + 2] for name, x in batch.items()} for i in (0, 2, 1, 3)]
    trainer = make_trainer(
        batches, gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, lr_scheduler_type="constant",
        hidden_weight=1.0,
    )  # fmt: skip
    trainer.args.max_steps = 2
    loop = make_trainer(hidden_weight=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(loop.model, 1e-3, weight_decay=0.01))
    for pair in (batches[:2], batches[2:]):
        for part in pair:
            (loop.compute_loss(loop.model.train(), part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trainer.train()
    for (name, found), wanted in zip(trainer.model.named_parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"head_loss", "hidden_state_loss", "firing_rate_penalty"} <= first.keys()
    tokens = [sum(int(part["attention_mask"].sum()) for part in batches[:count]) for count in (2, 4)]
    assert [first["num_input_tokens_seen"], second["num_input_tokens_seen"]] == tokens
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


def test_figures_of_the_callers_own(make_trainer, batch):
    """They are logged with the model's mode left as it was, and are what a file of results has."""
    trainer = make_trainer([batch])
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics)

    def figures_of(model):
        assert not model.training and not torch.is_grad_enabled()
        return {"loss": 2.0}

    trainer.figures_of = figures_of
    trainer.add_callback(Watch())
    trainer.train()
    results = trainer.results()
    assert seen == [{"eval_loss": 2.0}] and results["evaluation"] == seen[0] and results["steps"] == 1
    assert trainer.model.training and results["training_tokens"] == int(batch["attention_mask"].sum())
    assert trainer.results()["evaluation"] == seen[0] and len(seen) == 1


def test_answers_come_in_the_order_of_the_rows(make_trainer):
    """Rows of like length go together, and each process' part comes back to its place."""
    rows = [{"input_ids": [number] * length} for number, length in enumerate((3, 1, 2, 1, 3))]
    trainer = make_trainer(per_device_eval_batch_size=2)
    lengths = []

    def collate(part):
        lengths.append([len(row["input_ids"]) for row in part])
        return {"numbers": torch.tensor([row["input_ids"][0] for row in part])}

    assert trainer.answers(rows, collate, lambda batch: batch["numbers"].tolist()) == [0, 1, 2, 3, 4]
    assert lengths == [[1, 1], [2, 3], [3]]


def test_frozen_embeddings_do_not_move(make_trainer, batch):
    trainer = make_trainer([batch], freeze_embeddings=True, learning_rate=1e-2)
    before = {name: x.clone() for name, x in trainer.model.named_parameters()}
    assert trainer.train_as_told() > 0 and trainer.run_of_seed(1.0, {})["last_step"] == 1
    same = {name: torch.equal(x, before[name]) for name, x in trainer.model.named_parameters()}
    assert all(same[name] for name in same if ".embeddings." in name) and not all(same.values())


def test_muon_moves_the_weights_that_take_spikes(make_trainer, batch):
    """By as much as its rate says; the rest as without it."""
    moved = []
    for settings in ({}, {"muon_learning_rate": 1e-2}):
        trainer = make_trainer([batch], learning_rate=1e-3, weight_decay=0.0, **settings)
        before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, MuonAdamW) == bool(settings)
        moved.append({name: (x.detach() - before[name]) for name, x in trainer.model.named_parameters()})
    adamw, muon = moved
    matrices = {name for name in muon if ".layer." in name and muon[name].dim() == 2}
    assert len(matrices) == 6 * trainer.model.config.num_hidden_layers
    for name in muon:
        if name in matrices:
            # The entries are of the size of the weights, times what a gradient of a few tokens leaves of its rank.
            assert 1e-3 < muon[name].norm() / before[name].norm() < 2e-2, name
        else:
            torch.testing.assert_close(muon[name], adamw[name], msg=name)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_muon_needs_whole_matrices(make_trainer, monkeypatch, engine):
    plain = Trainer.create_accelerator_and_postprocess

    def create(trainer):
        plain(trainer)
        setattr(trainer, engine, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match="`muon_learning_rate` needs whole matrices in each process"):
        make_trainer(muon_learning_rate=1e-2)


def test_a_run_that_is_not_to_train(make_trainer, batch):
    trainer = make_trainer([batch], do_train=False)
    assert trainer.train_as_told() == 0 and trainer.state.global_step == 0


def test_a_loss_that_is_not_finite_ends_the_run(make_trainer, batch):
    trainer = make_trainer([batch] * 3, logging_steps=1)
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="training has diverged at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"teacher": False, "hidden_weight": 1.0}, "`hidden_weight` needs a teacher", id="teacher"),
        pytest.param({"attention_weight": -1.0}, "`attention_weight` must be >= 0", id="weight"),
        pytest.param({"logit_weight": 1.5}, "`logit_weight` must lie in", id="logits"),
        pytest.param({"muon_learning_rate": 0.0}, "`muon_learning_rate` must be positive", id="muon"),
        pytest.param({"muon_learning_rate": 1e-3, "optim": "adafactor"}, "must be one of adamw_torch", id="optim"),
        pytest.param({"temperature": 0.0}, "`temperature` must be positive", id="temperature"),
    ],
)
def test_bad_settings(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)
