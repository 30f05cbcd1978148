"""The distilled checkpoint: its packed form, and the one that the repository keeps."""

import hashlib

import pytest
import torch
from distilled_checkpoint import ENCODER_FILE, HUB_CONFIGS, NAMES, RESULTS_FILE, main, pack, unpack
from safetensors.torch import load_file
from small_bert import write_bert
from transformers import BertModel

from modeling_snn_bert import (
    SNNBertConfig,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.event_driven import round_products


@pytest.fixture
def bert(tmp_path, tokenizer):
    write_bert(tmp_path / "bert", tokenizer, BertModel)
    return BertModel.from_pretrained(tmp_path / "bert")


@pytest.fixture
def distilled(tmp_path, bert, tokenizer, texts):
    """A folder with a model whose encoder has moved."""
    model = convert_bert(bert, [dict(tokenizer(texts, padding=True, return_tensors="pt"))], spike_type="ternary")
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "distilled")
    return tmp_path / "distilled"


def test_what_is_packed_comes_back_rounded(tmp_path, bert, distilled, tokenizer, texts):
    pack(distilled, tmp_path / "packed", bert)
    model, same_tokenizer = unpack(tmp_path / "packed", bert)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab() and model.config.spike_type == "ternary"
    wanted = round_products(SNNBertModel.from_pretrained(distilled), "int8").state_dict()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
    outputs = model(**tokenizer(texts, padding=True, return_tensors="pt"), output_firing_rates=True)
    assert all(0 < rate.abs().mean() < 1 for rate in outputs.firing_rates)
    # A second time nothing changes: the weights are rounded already.
    model.save_pretrained(tmp_path / "again")
    pack(tmp_path / "again", tmp_path / "packed_again", bert)
    one, other = (load_file(tmp_path / name / ENCODER_FILE) for name in ("packed", "packed_again"))
    matrices = [name for name, x in one.items() if x.dtype == torch.int8]
    assert len(matrices) == 2 * 6 and all(torch.equal(one[name], other[name]) for name in matrices)


def test_heads_and_a_trained_pooler_come_back(tmp_path, bert, distilled, tokenizer, texts):
    """As they were, beside an encoder that is rounded; the results of the run go along."""
    names = ["tone:bad", "tone:good", "score:score"]
    config = SNNBertConfig.from_pretrained(distilled, id2label=dict(enumerate(names)))
    model = SNNBertForSequenceClassification.from_pretrained(distilled, config=config)
    with torch.no_grad():
        model.bert.pooler.dense.bias += 0.1
    model.save_pretrained(tmp_path / "heads")
    (tmp_path / "heads" / RESULTS_FILE).write_text("{}")
    pack(tmp_path / "heads", tmp_path / "packed", bert)
    assert (tmp_path / "packed" / RESULTS_FILE).is_file()
    again, _ = unpack(tmp_path / "packed", bert)
    assert list(again.config.id2label.values()) == names
    for part in ("classifier.weight", "classifier.bias", "bert.pooler.dense.bias"):
        assert torch.equal(again.get_parameter(part), model.get_parameter(part))
    wanted = round_products(model.eval(), "int8")(**tokenizer(texts, padding=True, return_tensors="pt"))
    outputs = again(**tokenizer(texts, padding=True, return_tensors="pt"), output_firing_rates=True)
    torch.testing.assert_close(outputs.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert all(0 < rate.abs().mean() < 1 for rate in outputs.firing_rates)


def test_trained_embeddings_cannot_be_packed(tmp_path, bert, distilled):
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight += 0.1
    with pytest.raises(ValueError, match=r"word_embeddings.weight in .* train with --freeze_embeddings"):
        pack(distilled, tmp_path / "packed", bert)
    assert not (tmp_path / "packed").exists()


def test_other_heads_cannot_be_packed(tmp_path, bert, distilled):
    SNNBertForTokenClassification.from_pretrained(distilled).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"must hold one of SNNBertModel, .*, it holds SNNBertForTokenClassification"):
        pack(tmp_path / "tokens", tmp_path / "packed", bert)
    assert not (tmp_path / "packed").exists()


def test_damaged_or_foreign_files_are_named(tmp_path, bert, distilled):
    pack(distilled, tmp_path / "packed", bert)
    file = tmp_path / "packed" / ENCODER_FILE
    SNNBertConfig.from_pretrained(tmp_path / "packed", num_hidden_layers=3).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=f"{ENCODER_FILE}, its configuration and the BERT do not fit together"):
        unpack(tmp_path / "packed", bert)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{ENCODER_FILE} is damaged"):
        unpack(tmp_path / "packed", bert)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {ENCODER_FILE} in"):
        unpack(tmp_path / "packed", bert)


def test_a_folder_that_is_none_ends_the_program(tmp_path, monkeypatch, bert, capsys):
    monkeypatch.setattr("distilled_checkpoint.bert_of_checkpoint", lambda: bert)
    assert main(["--pack", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_file_is_small_and_whole(name):
    """It holds every tensor of the encoder, and of the heads, in the configuration's shapes; the card has its hash."""
    file = HUB_CONFIGS / name / ENCODER_FILE
    assert file.stat().st_size < 12e6
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (file.parent / "README.md").read_text(encoding="utf-8")
    config = SNNBertConfig.from_pretrained(HUB_CONFIGS / name)
    with torch.device("meta"):
        model = SNNBertForSequenceClassification(config)
    shapes = {name: x.shape for name, x in model.base_model.state_dict().items()}
    more = {name: x.shape for name, x in model.state_dict().items() if name.startswith("classifier.")}
    more |= {name: shape for name, shape in shapes.items() if name.startswith("pooler.")}
    shapes |= more
    tensors = load_file(file)
    matrices = {name for name, shape in shapes.items() if name.startswith("encoder.") and len(shape) == 2}
    wanted = {name for name in shapes if name.startswith("encoder.")} | {f"{name}.scale" for name in matrices}
    has_heads = config.architectures == ["SNNBertForSequenceClassification"]
    assert set(tensors) == (wanted | set(more) if has_heads else wanted)
    for name, x in tensors.items():
        assert x.isfinite().all() and x.shape == shapes.get(name, x.shape), name
        assert x.dtype == (torch.int8 if name in matrices else torch.float32)
        if name in matrices:
            assert tensors[f"{name}.scale"].shape == x.shape[:1] and x.float().std() > 5
