"""Text as blocks of tokens."""

import json
import lzma

import numpy as np
import pytest
import torch
from small_bert import write_mpnet
from transformers import AutoTokenizer, MPNetModel

from modeling_snn_bert.text_blocks import Separators, TextArguments, TextBlocks, token_file, tokenize_sources


def text_arguments(*files, column="text", tokens=None):
    return TextArguments(train_file=[str(file) for file in files], text_column=column, max_text_tokens=tokens)


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
    assert not list((tmp_path / "out").glob(".*"))


def test_a_missing_text_column_is_named(tmp_path, tokenizer):
    (tmp_path / "text.csv").write_text("review\nthe fox\n")
    with pytest.raises(ValueError, match=r"no column 'text', only .'review'.*--text_column"):
        token_file(text_arguments(tmp_path / "text.csv"), tokenizer, tmp_path)
    assert not list(tmp_path.glob("tokens*"))


def test_sources_share_the_tokens(tmp_path, tokenizer):
    """Each source gives as many tokens as the others until it has nothing left."""
    (tmp_path / "a.txt").write_text("\n".join(["the the the"] * 400))
    (tmp_path / "b.txt").write_text("\n".join(["fox fox fox"] * 4000))
    streams = text_arguments(tmp_path / "a.txt", tmp_path / "b.txt").documents()
    ids = [i for document in tokenize_sources(streams, tokenizer, 4000) for i in document]
    the, fox = (ids.count(tokenizer.convert_tokens_to_ids(word)) for word in ("the", "fox"))
    assert len(ids) == 4000 and the == 1200 and fox == 1800


def test_short_batches(make_blocks):
    """Some training batches are cut to one shorter length each; the order, and what is held out, stay as they were."""
    blocks, whole = make_blocks(short_probability=0.5), make_blocks()
    blocks.blocks = whole.blocks = np.arange(20 * 50, dtype=np.int32).reshape(50, 20)
    blocks.length = whole.length = 22
    lengths = set()
    for step in range(40):
        batch, wanted = blocks.batch(step, 3), whole.batch(step, 3)
        length = batch["input_ids"].shape[1]
        lengths.add(length)
        assert batch["token_type_ids"].shape == batch["input_ids"].shape == (3, length)
        assert torch.equal(batch["input_ids"][:, : length - 1], wanted["input_ids"][:, : length - 1])
        assert torch.equal(batch["input_ids"], blocks.batch(step, 3)["input_ids"])
        assert (batch["input_ids"][:, -1] == blocks.separators.sep_id).all()
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
    assert first.shape == (46, 8)
    assert (first[:, 0] == blocks.separators.cls_id).all() and (first[:, -1] == blocks.separators.sep_id).all()
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
        assert ids[first_of_second - 1] == blocks.separators.sep_id and types[first_of_second:].all()
        assert 3 <= first_of_second < 7
    assert not make_blocks(pair_probability=0.0).batch(0, 40)["token_type_ids"].any()


def test_too_little_text_is_refused(make_blocks):
    with pytest.raises(ValueError, match="has 20 tokens, 3 blocks of 8: too few to hold out 4"):
        make_blocks(count=20)


def test_calibration_takes_the_first_blocks(make_blocks):
    blocks = make_blocks(count=6000)
    (one,), two = blocks.calibration(1), blocks.calibration(2048)
    assert one["input_ids"].shape == (128, 8) and len(two) == 2
    assert torch.equal(one["input_ids"], blocks.batch(0, 128)["input_ids"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({}, "give either --train_file or --dataset_name", id="no-text"),
        pytest.param({"train_file": ["no.txt"]}, "--train_file: there is no file no.txt", id="no-file"),
        pytest.param({"train_file": [__file__]}, "--train_file must be one of .txt", id="kind"),
        pytest.param({"dataset_name": "x", "max_seq_length": 7}, "--max_seq_length must be >= 8, got 7", id="length"),
        pytest.param({"dataset_name": "x", "max_text_tokens": 0}, "--max_text_tokens must be >= 1", id="tokens"),
        pytest.param({"dataset_name": "x", "validation_blocks": 0}, "--validation_blocks must be >= 1", id="held-out"),
        pytest.param({"dataset_name": "x", "pair_probability": 2.0}, "--pair_probability must lie in", id="pairs"),
    ],
)
def test_arguments_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        TextArguments(**settings)


def test_pairs_are_those_of_the_tokenizer(make_blocks, tokenizer, tmp_path):
    """An MPNet's have two separators between the texts, and no token types."""
    write_mpnet(tmp_path / "mpnet", tokenizer, MPNetModel)
    mpnet = AutoTokenizer.from_pretrained(tmp_path / "mpnet")
    for own, special in ((tokenizer, [3]), (mpnet, [2, 2])):
        separators = Separators(own)
        wanted = own("the fox", "a dog")
        a, b = (own(text, add_special_tokens=False)["input_ids"] for text in ("the fox", "a dog"))
        assert wanted["input_ids"] == [separators.cls_id, *a, *special, *b, separators.sep_id]
        assert separators.between == len(special)
        assert separators.has_token_types == ("token_type_ids" in wanted)
    blocks = make_blocks(count=1200, pair_probability=0.5)
    blocks.separators = Separators(mpnet)
    batch = blocks.batch(0, 40)
    assert set(batch) == {"input_ids"}
    # The ids of the text are 0, 1, 2, ..., so its own 2 is in one block at most.
    inner = (batch["input_ids"][:, 1:-1] == 2).sum(1)
    assert 5 < (inner == 2).sum() < 35 and set(inner.tolist()) <= {0, 1, 2}
    assert (batch["input_ids"][:, 0] == 0).all() and (batch["input_ids"][:, -1] == 2).all()
