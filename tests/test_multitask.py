"""A classifier with several heads: their losses by hand, and what a teacher of another kind reads."""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, MPNetTokenizer

from modeling_snn_bert.distillation import logit_loss
from modeling_snn_bert.multitask import CollateForTeacher, Head, MultitaskTrainer, heads_logit_loss, label_loss
from modeling_snn_bert.trainer import DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledRows

# Two classes of single texts, a regression on pairs, two classes of pairs; and the same in a model in another order.
HEADS = [Head(slice(0, 2), False, False), Head(slice(2, 3), True, True), Head(slice(3, 5), False, True)]
TEACHER_HEADS = [Head(slice(3, 5), False, False), Head(slice(2, 3), True, True), Head(slice(0, 2), False, True)]


def make_bert(vocab_size):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=vocab_size, num_labels=5, **small)).eval()


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
    loss = label_loss(logits, labels, of_head, HEADS)
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    # A row teaches its own head alone.
    assert (logits.grad[1] != 0).tolist() == [False, False, True, False, False]


def test_logit_loss_of_each_head_is_on_the_rows_it_can_read():
    """A teacher may have its heads in another order; rows of one kind alone teach the heads of that kind."""
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    pair = torch.tensor([True, False, True, True, False, True])
    loss = heads_logit_loss(student, teacher, pair, HEADS, TEACHER_HEADS)
    single, both = ~pair, pair
    wanted = 2 / 6 * logit_loss(student[single][:, :2], teacher[single][:, 3:])
    wanted = wanted + 4 / 6 * logit_loss(student[both][:, 2:3], teacher[both][:, 2:3])
    wanted = wanted + 4 / 6 * logit_loss(student[both][:, 3:], teacher[both][:, :2])
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert not student.grad[single][:, 2:].any() and not student.grad[both][:, :2].any()
    assert student.grad[single][:, :2].all() and student.grad[both][:, 2:].all()
    only = heads_logit_loss(student, teacher, torch.zeros(6, dtype=torch.bool), HEADS, TEACHER_HEADS)
    torch.testing.assert_close(only, logit_loss(student[:, :2], teacher[:, 3:]))


def test_the_teacher_reads_the_same_rows(tmp_path, tokenizer, texts):
    """By its own tokenizer, single texts and pairs in one batch; other teachers read the student's batch."""
    # Short ones: nothing is cut off, which the two tokenizers would do differently.
    short = [" ".join(text.split()[:5]) for text in texts]
    rows = UnlabelledRows([short], [], [], tokenizer, 24, single_share=0.5, with_texts=True)
    words = [word for word in sorted(tokenizer.get_vocab()) if not word.startswith("[")]
    (tmp_path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "<unk>", "[UNK]", *words, "<mask>"]))
    own = MPNetTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=64)
    collate = CollateForTeacher(DataCollatorWithPadding(tokenizer), own, 24)
    rng = random.Random(0)
    drawn = [rows(rng) for _ in range(8)]
    both = collate(drawn)
    arguments = DistillationTrainingArguments(tmp_path, use_cpu=True)
    trainer = MultitaskTrainer(
        make_bert(len(tokenizer)), arguments, heads=HEADS, teacher=make_bert(len(own)), teacher_heads=HEADS
    )
    read = []
    trainer.teacher.register_forward_pre_hook(lambda model, args, kwargs: read.append(kwargs), with_kwargs=True)
    trainer.ask_teacher(both)
    batch, wanted = {name: x for name, x in both.items() if not name.startswith("teacher_")}, read[0]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"} and set(wanted) == {
        "input_ids",
        "attention_mask",
    }
    assert 0 < int(batch["token_type_ids"].any(1).sum()) < 8
    for row, ids, valid in zip(drawn, wanted["input_ids"], wanted["attention_mask"], strict=True):
        texts = row["texts"] if isinstance(row["texts"], tuple) else (row["texts"],)
        assert ids[valid == 1].tolist() == own(*texts, truncation=True, max_length=24)["input_ids"]
        assert row["input_ids"] == tokenizer(*texts, truncation=True, max_length=24)["input_ids"]
    trainer.teacher = make_bert(len(tokenizer))
    trainer.teacher.register_forward_pre_hook(lambda model, args, kwargs: read.append(kwargs), with_kwargs=True)
    trainer.ask_teacher(batch)
    assert all(torch.equal(x, batch[name]) for name, x in read[1].items())
