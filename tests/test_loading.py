"""Models from checkpoints of any head, and batches of texts."""

import json

import pytest
import torch
from heads import MODELS
from transformers import BertConfig, BertModel

from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.loading import load_model, tokenized_batches


@pytest.mark.parametrize("head", MODELS.values(), ids=MODELS)
def test_checkpoint_of_every_head(make_with_batches, head, tmp_path, tokenizer, texts):
    model, batches = make_with_batches(head)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is head
    wanted, got = (energy_report(m, batches, run_lengths=False).to_dict() for m in (model, loaded))
    assert wanted == got


def test_other_checkpoints_are_refused(make_with_batches, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="must be an SNN-BERT checkpoint, its model_type is 'bert'"):
        load_model(str(tmp_path / "bert"))
    model, _ = make_with_batches()
    model.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "architectures": ["SNNBertForNothing"]}))
    with pytest.raises(ValueError, match="names the architecture 'SNNBertForNothing', which is none of"):
        load_model(str(tmp_path / "own"))
    with pytest.raises(OSError, match="nothing"):
        load_model(str(tmp_path / "nothing"))


def test_batches(make_with_batches, tokenizer, texts):
    model, batches = make_with_batches()
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    rows = [
        ids[mask == 1].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert rows == tokenizer(texts)["input_ids"]
    (short,) = tokenized_batches(model, tokenizer, texts, 6, max_length=5)
    assert short["input_ids"].shape == (6, 5)
    pairs = [(text, text) for text in texts]
    for cut, length, message in ((texts, 2, ">= 3 for texts, got 2"), (pairs, 4, ">= 5 for pairs of texts, got 4")):
        with pytest.raises(ValueError, match=f"`max_length` must be {message}"):
            tokenized_batches(model, tokenizer, cut, 6, max_length=length)
        assert tokenized_batches(model, tokenizer, cut, 6, max_length=length + 1)[0]["input_ids"].shape[1] == length + 1
    # No longer than the model takes, and of one length for a neuron that takes no other.
    (cut,) = tokenized_batches(model, tokenizer, [" ".join(texts * 9)], 1, max_length=1000)
    assert cut["input_ids"].shape == (1, model.config.max_position_embeddings)
    _, batches = make_with_batches(neuron_type="psn", psn_length=32)
    assert all(batch["input_ids"].shape[1] == 32 for batch in batches)
    choice, batches = make_with_batches(MODELS["choice"])
    assert batches[0]["input_ids"].shape[:2] == (4, 1)
    with torch.no_grad():
        assert choice(**batches[0]).logits.shape == (4, 1)
