"""What a teacher with a tokenizer of its own reads: the same tokens by other numbers, or the texts cut anew."""

import random

import pytest
import torch
from small_bert import write_mpnet
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DataCollatorWithPadding,
    DistilBertTokenizer,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    T5Config,
)

from modeling_snn_bert.distillation import relation_loss
from modeling_snn_bert.teacher_inputs import (
    FOR_TEACHER,
    PLACES,
    CollateAligned,
    CollateForTeacher,
    collate_for_teacher,
    longest_input,
)
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledRows


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("mpnet")
    write_mpnet(folder, tokenizer, MPNetForSequenceClassification, hidden_size=48)
    return folder


@pytest.fixture(scope="module")
def mpnet_tokenizer(mpnet, tokenizer):
    own = AutoTokenizer.from_pretrained(mpnet)
    assert own("the fox")["input_ids"] != tokenizer("the fox")["input_ids"]
    return own


def drawn_rows(tokenizer, texts, count=8):
    """Single texts and pairs, with their texts; short ones, of which nothing is cut off."""
    short = [" ".join(text.split()[:5]) for text in texts]
    rows = UnlabelledRows([short], [], [], tokenizer, 64, single_share=0.5, with_texts=True)
    rng = random.Random(0)
    return [rows(rng) for _ in range(count)]


def texts_of(row):
    return row["texts"] if isinstance(row["texts"], tuple) else (row["texts"],)


def without_texts(rows):
    return [{name: x for name, x in row.items() if name != "texts"} for row in rows]


def of_teacher(batch):
    return {name.removeprefix(FOR_TEACHER): x for name, x in batch.items() if name.startswith(FOR_TEACHER)}


def distilbert(tokenizer):
    """The tokenizer of a DistilBERT: a BERT's token ids, and no token types."""
    return DistilBertTokenizer(vocab=tokenizer.get_vocab(), model_input_names=["input_ids", "attention_mask"])


class TestAligned:
    def test_is_what_the_teachers_tokenizer_gives(self, tokenizer, mpnet_tokenizer, texts):
        rows = drawn_rows(tokenizer, texts)
        batch = CollateAligned(DataCollatorWithPadding(tokenizer), tokenizer, mpnet_tokenizer)(without_texts(rows))
        taught = of_teacher(batch)
        assert set(taught) == {"input_ids", "attention_mask", PLACES}
        assert 0 < int(batch["token_type_ids"].any(1).sum()) < len(rows)
        for row, ids, valid, places in zip(
            rows, *(taught[x] for x in ("input_ids", "attention_mask", PLACES)), strict=True
        ):
            wanted = mpnet_tokenizer(*texts_of(row))["input_ids"]
            assert ids[valid == 1].tolist() == wanted and valid.sum() == len(wanted)
            assert (ids[valid == 0] == mpnet_tokenizer.pad_token_id).all()
            # Each token of the student stands at its place.
            mine = tokenizer.convert_ids_to_tokens(row["input_ids"])
            theirs = mpnet_tokenizer.convert_ids_to_tokens(ids[places][: len(mine)])
            names = {"[CLS]": "<s>", "[SEP]": "</s>"}
            assert theirs == [names.get(token, token) for token in mine]

    def test_single_texts_alone_get_no_column_more(self, tokenizer, mpnet_tokenizer):
        collate = CollateAligned(DataCollatorWithPadding(tokenizer), tokenizer, mpnet_tokenizer)
        batch = collate([dict(tokenizer("the fox")), dict(tokenizer("the quick brown fox"))])
        assert of_teacher(batch)["input_ids"].shape == batch["input_ids"].shape

    def test_a_teacher_without_token_types(self, tokenizer, texts):
        rows = drawn_rows(tokenizer, texts)
        collate = collate_for_teacher(DataCollatorWithPadding(tokenizer), tokenizer, distilbert(tokenizer))
        batch = collate(without_texts(rows))
        taught = of_teacher(batch)
        assert set(taught) == {"input_ids", "attention_mask", PLACES}
        assert torch.equal(taught["input_ids"], batch["input_ids"])

    def test_a_teacher_with_token_types(self, tokenizer, texts):
        """Of a student without: as the teacher's tokenizer gives them."""
        own = distilbert(tokenizer)
        rows = drawn_rows(own, texts)
        assert "token_type_ids" not in rows[0]
        batch = collate_for_teacher(DataCollatorWithPadding(own), own, tokenizer)(without_texts(rows))
        wanted = tokenizer.pad([tokenizer(*texts_of(row)) for row in rows], return_tensors="pt")
        taught = of_teacher(batch)
        assert all(torch.equal(taught[name], x) for name, x in wanted.items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda vocabulary: {"do_lower_case": False}, "they cut .The Tokenizers", id="case"),
            pytest.param(
                lambda vocabulary: {"vocab": {x: i for i, x in enumerate(sorted(vocabulary)[:-3])}},
                "3 of the student's tokens are none of the teacher's",
                id="fewer",
            ),
            pytest.param(
                lambda vocabulary: {"vocab": {**vocabulary, "covid": len(vocabulary)}},
                "1 of the teacher's tokens are none of the student's",
                id="more",
            ),
        ],
    )
    def test_refuses_tokenizers_that_cut_otherwise(self, tokenizer, change, message):
        vocabulary = tokenizer.get_vocab()
        other = BertTokenizer(**{"vocab": vocabulary, **change(vocabulary)})
        with pytest.raises(ValueError, match=f"must cut texts as the student's does, but {message}"):
            collate_for_teacher(DataCollatorWithPadding(tokenizer), tokenizer, other)

    def test_refuses_fewer_separators(self, tokenizer, mpnet_tokenizer):
        other = BertTokenizer(vocab={**mpnet_tokenizer.get_vocab(), **tokenizer.get_vocab()})
        with pytest.raises(ValueError, match="the teacher's puts fewer separators"):
            CollateAligned(DataCollatorWithPadding(mpnet_tokenizer), mpnet_tokenizer, other)


class TestCollateForTeacher:
    def test_texts_are_cut_anew(self, tokenizer, mpnet_tokenizer, texts):
        rows = drawn_rows(tokenizer, texts)
        batch = CollateForTeacher(DataCollatorWithPadding(tokenizer), mpnet_tokenizer, 64)(rows)
        taught = of_teacher(batch)
        assert set(taught) == {"input_ids", "attention_mask"}
        for row, ids, valid in zip(rows, taught["input_ids"], taught["attention_mask"], strict=True):
            assert ids[valid == 1].tolist() == mpnet_tokenizer(*texts_of(row))["input_ids"]
            assert row["input_ids"] == tokenizer(*texts_of(row))["input_ids"]


def test_longest_input(mpnet):
    """An MPNet's first token has the position 2, of 66."""
    assert longest_input(AutoConfig.from_pretrained(mpnet)) == 64
    assert longest_input(BertConfig(max_position_embeddings=64)) == 64
    assert longest_input(RobertaConfig(max_position_embeddings=66)) == 64
    assert longest_input(T5Config()) is None


class TestChoice:
    def test_the_students_inputs_if_they_do(self, tokenizer):
        collate = DataCollatorWithPadding(tokenizer)
        assert collate_for_teacher(collate, tokenizer, tokenizer) is collate

    def test_texts_only_where_tokens_do_not_fit(self, tokenizer, mpnet_tokenizer):
        collate = DataCollatorWithPadding(tokenizer)
        cased = BertTokenizer(vocab=mpnet_tokenizer.get_vocab(), do_lower_case=False)
        assert isinstance(collate_for_teacher(collate, tokenizer, mpnet_tokenizer, 24), CollateAligned)
        assert isinstance(collate_for_teacher(collate, tokenizer, cased, 24), CollateForTeacher)
        for options in ({"max_seq_length": 24, "aligned": True}, {}):
            with pytest.raises(ValueError, match="must cut texts as the student's does"):
                collate_for_teacher(collate, tokenizer, cased, **options)


def test_the_trainer_compares_the_same_tokens(tmp_path, tokenizer, mpnet, mpnet_tokenizer, texts):
    """Where the teacher has one separator more, its states of the second text stand one place further on."""
    rows = without_texts(drawn_rows(tokenizer, texts))
    batch = CollateAligned(DataCollatorWithPadding(tokenizer), tokenizer, mpnet_tokenizer)(rows)
    arguments = DistillationTrainingArguments(tmp_path, use_cpu=True, relation_weight=2.0, logit_weight=0)
    teacher = MPNetForSequenceClassification.from_pretrained(mpnet)
    student = MPNetModel.from_pretrained(mpnet).eval()
    trainer = DistillationTrainer(student, arguments, teacher=teacher)
    wanted = trainer.ask_teacher(batch, output_hidden_states=True)
    states = torch.stack([x[y] for x, y in zip(wanted.hidden_states[-1], batch[FOR_TEACHER + PLACES], strict=True)])
    # Turned around by an orthogonal matrix in each part, the relations are the teacher's.
    turn = torch.block_diag(*[torch.linalg.qr(torch.randn(12, 12))[0] for _ in range(4)])
    same = relation_loss(states @ turn, states, batch["attention_mask"], relation_heads=4)
    assert same < 1e-6
    outputs = student(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    loss = trainer.add_losses(outputs, wanted, batch)
    wanted_loss = relation_loss(outputs.hidden_states[-1], states, batch["attention_mask"], relation_heads=4)
    torch.testing.assert_close(loss, 2 * wanted_loss)
    assert loss > 1e-3
