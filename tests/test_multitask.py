"""A classifier with several heads: where they lie, and their losses by hand."""

import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.distillation import logit_loss
from modeling_snn_bert.fine_tuning import label_names
from modeling_snn_bert.multitask import (
    Head,
    MultitaskTrainer,
    heads_logit_loss,
    heads_settings,
    keep_head,
    label_loss,
    logits_by_head,
    order_head,
    renew_heads,
    renew_other_head,
    rows_of_all,
    take_over,
)
from modeling_snn_bert.trainer import DistillationTrainingArguments

NAMES = ("first", "score", "pairs")
# Two classes of single texts, a regression on pairs, two classes of pairs.
HEADS = [
    Head("first", ("no", "yes"), False, False),
    Head("score", ("score",), True, True),
    Head("pairs", ("same", "other"), False, True),
]


def make_bert(heads=HEADS, **settings):
    small = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(**{**small, "intermediate_size": 48, **heads_settings(heads), **settings})
    return BertForSequenceClassification(config).eval()


def test_heads_are_told_by_the_labels():
    config = make_bert().config
    assert [head.logits_of(config) for head in HEADS] == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert config.id2label[2] == "score:score" and config.label2id["pairs:same"] == 3
    turned = make_bert(HEADS[::-1]).config
    assert [head.logits_of(turned) for head in HEADS] == [slice(3, 5), slice(2, 3), slice(0, 2)]
    for of_one_task in (BertConfig(), BertConfig(id2label={0: "firstly:no", 1: "first"})):
        assert all(list(of_one_task.id2label)[head.logits_of(of_one_task)] == [] for head in HEADS)
    for head in HEADS:
        head.check(config, "here")
    with pytest.raises(
        ValueError, match=r"here must have a head for other, with the labels \['other:no', 'other:yes'\]; its"
    ):
        HEADS[0]._replace(name="other").check(config, "here")
    # As a program that sorts keys as texts leaves it.
    config.id2label = {i: config.id2label[i] for i in (3, 0, 4, 2, 1)}
    assert [head.logits_of(config) for head in HEADS] == [slice(0, 2), slice(2, 3), slice(3, 5)]
    for head in HEADS:
        head.check(config, "here")
    config.id2label[0] = "first:bad"
    with pytest.raises(ValueError, match="must have a head for first"):
        HEADS[0].check(config, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=NAMES)
def test_one_head_is_kept(tmp_path, head, dtype):
    """It gives the same logits, and is saved and loaded as a model of one task."""
    model = make_bert().to(dtype)
    inputs = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    with torch.no_grad():
        wanted = model(**inputs).logits[:, head.logits_of(model.config)]
    keep_head(model, head)
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    for kept in (model, again):
        with torch.no_grad():
            torch.testing.assert_close(kept(**inputs).logits, wanted)
        assert kept.num_labels == kept.config.num_labels == wanted.shape[1]
        assert kept.config.id2label == dict(enumerate(head.labels))
    labels = torch.tensor([1.0, 0.0]) if head.is_regression else torch.tensor([1, 0])
    assert again(**inputs, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match="must have a head for other"):
        keep_head(make_bert(), head._replace(name="other"))


def test_heads_are_renewed():
    model = make_bert(initializer_range=0.3)
    before = model.classifier.weight.clone()
    renew_heads(model)
    assert not (model.classifier.weight == before).any() and not model.classifier.bias.any()
    assert 0.2 < model.classifier.weight.std() < 0.4


@pytest.mark.parametrize("with_teacher", [True, False])
def test_trainer_takes_rows_of_several_tasks(tmp_path, tokenizer, texts, with_teacher):
    """As they are drawn, from any Trainer's dataset. A teacher needs no labels, and is not disturbed by them."""
    torch.manual_seed(0)
    ids = [tokenizer(text, truncation=True, max_length=16) for text in texts]
    draw = rows_of_all([[{**row, "labels": label % 2} for label, row in enumerate(ids)] for _ in HEADS])
    rows = [draw(random.Random(seed)) for seed in range(8)]
    arguments = DistillationTrainingArguments(
        tmp_path, use_cpu=True, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="no"
    )
    model, teacher = (make_bert(vocab_size=len(tokenizer), initializer_range=0.2) for _ in range(2))
    trainer = MultitaskTrainer(
        model,
        arguments,
        heads=HEADS,
        teacher=teacher if with_teacher else None,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1] < log[0]


def test_a_trainer_refuses_models_without_the_heads(tmp_path, tokenizer):
    arguments = DistillationTrainingArguments(tmp_path, use_cpu=True)
    model, other = make_bert(), make_bert(HEADS[:2])
    with pytest.raises(ValueError, match="the model must have a head for pairs"):
        MultitaskTrainer(other, arguments, heads=HEADS)
    with pytest.raises(ValueError, match="the model must have a head for pairs"):
        MultitaskTrainer(model, arguments, heads=HEADS, teacher=other, processing_class=tokenizer)
    with pytest.raises(ValueError, match="`processing_class` must be the student's tokenizer"):
        MultitaskTrainer(model, arguments, heads=HEADS, teacher=model)
    between = HEADS[0]._replace(labels=("no", "between", "yes"))
    model.config.id2label = dict(enumerate(["first:no", "score:score", "first:yes", "pairs:same", "pairs:other"]))
    with pytest.raises(ValueError, match="the model must have a head for first"):
        MultitaskTrainer(model, arguments, heads=[between])


def test_a_teachers_embeddings_and_heads_are_taken_over():
    """Each head to its place, wherever the teacher has it."""
    model, teacher = make_bert(), make_bert(HEADS[::-1])
    query = model.bert.encoder.layer[0].attention.self.query.weight.clone()
    take_over(model, teacher, HEADS)
    for part in ("embeddings", "pooler"):
        own, taught = (x.bert.get_submodule(part).state_dict() for x in (model, teacher))
        assert all(torch.equal(own[name], taught[name]) for name in own)
    assert torch.equal(model.classifier.weight, teacher.classifier.weight[[3, 4, 2, 0, 1]])
    assert torch.equal(model.classifier.bias, teacher.classifier.bias[[3, 4, 2, 0, 1]])
    assert torch.equal(query, model.bert.encoder.layer[0].attention.self.query.weight)


def test_tasks_are_drawn_by_the_root_of_their_size():
    tasks = [[{"labels": label, "size": size} for label in range(size)] for size in (64, 32, 16)]
    draw, rng = rows_of_all(tasks), random.Random(0)
    rows = [draw(rng) for _ in range(2000)]
    shares = [sum(row["task"] == index for row in rows) / len(rows) for index in range(3)]
    roots = [64**0.5, 32**0.5, 16**0.5]
    assert shares == pytest.approx([root / sum(roots) for root in roots], abs=0.04)
    assert all(row["size"] == 64 >> row["task"] and isinstance(row["labels"], float) for row in rows)
    assert {row["labels"] for row in rows if row["task"] == 2} == set(range(16))


def test_a_head_is_put_in_the_order_of_the_labels():
    """By the names of its logits; names that are none of the labels leave it as it is."""
    model = make_bert(HEADS[2:]).eval()
    weight, bias = model.classifier.weight.clone(), model.classifier.bias.clone()
    for names in (["same", "other"], ["LABEL_0", "LABEL_1"], ["other", "third"]):
        order_head(model, dict(enumerate(names)), ["same", "other"])
        assert torch.equal(model.classifier.weight, weight) and torch.equal(model.classifier.bias, bias)
    order_head(model, {0: "other", 1: "same"}, ["same", "other"])
    assert torch.equal(model.classifier.weight, weight.flip(0)) and torch.equal(model.classifier.bias, bias.flip(0))
    # In whatever case, unless labels differ in nothing else.
    assert order_head(model, {0: "OTHER", 1: "Same"}, ["same", "other"])
    assert torch.equal(model.classifier.weight, weight)
    assert order_head(model, {0: "a", 1: "A"}, ["A", "a"])
    assert torch.equal(model.classifier.weight, weight.flip(0))


@pytest.mark.parametrize(
    ("saved", "is_kept"),
    [
        (["dull", "joy", "so"], True),
        (["SO", "Dull", "joy"], True),
        (["LABEL_0", "LABEL_1", "LABEL_2"], True),
        (["a:dull", "a:joy", "b:so"], False),
    ],
)
def test_a_head_is_kept_for_its_own_labels_only(make_config, tmp_path, saved, is_kept):
    """In whatever order and case they were saved, or without names; one of others is renewed, the encoder is not."""
    before = SNNBertForSequenceClassification(make_config(id2label=dict(enumerate(saved))))
    before.save_pretrained(tmp_path)
    labels = ["dull", "joy", "so"]
    model = SNNBertForSequenceClassification.from_pretrained(tmp_path, **label_names(labels))
    told = renew_other_head(model, PreTrainedConfig.get_config_dict(tmp_path)[0], "a path")
    assert told == (
        None
        if is_kept
        else f"the head of a path is for other labels ({str(saved)[1:-1]}): a new one is random until trained"
    )
    weights, old = model.state_dict(), before.state_dict()
    heads = [weights.pop(name) for name in ("classifier.weight", "classifier.bias")]
    old_heads = [old.pop(name) for name in ("classifier.weight", "classifier.bias")]
    assert all(torch.equal(weights[name], old[name]) for name in old)
    order = [1, 2, 0] if saved[0] == "SO" else [0, 1, 2]
    assert torch.equal(heads[0], old_heads[0][order]) == is_kept and torch.isfinite(heads[0]).all()
    assert list(model.config.id2label.values()) == labels


def test_label_loss_is_the_mean_over_rows():
    logits, labels = torch.randn(5, 5, requires_grad=True), torch.tensor([1.0, 2.5, 0.0, 1.0, 0.0])
    of_head = torch.tensor([0, 1, 2, 2, 0])
    wanted = [
        torch.nn.functional.cross_entropy(logits[row, :2], torch.tensor(label)) for row, label in ((0, 1), (4, 0))
    ]
    wanted += [
        torch.nn.functional.cross_entropy(logits[row, 3:], torch.tensor(label)) for row, label in ((2, 0), (3, 1))
    ]
    wanted += [(logits[1, 2] - 2.5).square()]
    loss = label_loss(logits_by_head(logits, HEADS, make_bert().config), labels, of_head, HEADS)
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    # A row teaches its own head alone.
    assert (logits.grad[1] != 0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_logit_loss_of_each_head_is_on_the_rows_it_can_read(temperature):
    """A teacher may have its heads in another order; rows of one kind alone teach the heads of that kind."""
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    pair = torch.tensor([True, False, True, True, False, True])
    student_heads = logits_by_head(student, HEADS, make_bert().config)
    teacher_heads = logits_by_head(teacher, HEADS, make_bert(HEADS[::-1]).config)
    loss = heads_logit_loss(student_heads, teacher_heads, pair, HEADS, temperature)
    single, both = ~pair, pair
    wanted = 2 / 6 * logit_loss(student[single][:, :2], teacher[single][:, 3:], temperature)
    wanted = wanted + 4 / 6 * logit_loss(student[both][:, 2:3], teacher[both][:, 2:3], temperature)
    wanted = wanted + 4 / 6 * logit_loss(student[both][:, 3:], teacher[both][:, :2], temperature)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert not student.grad[single][:, 2:].any() and not student.grad[both][:, :2].any()
    assert student.grad[single][:, :2].all() and student.grad[both][:, 2:].all()
    only = heads_logit_loss(student_heads, teacher_heads, torch.zeros(6, dtype=torch.bool), HEADS)
    torch.testing.assert_close(only, logit_loss(student[:, :2], teacher[:, 3:]))
