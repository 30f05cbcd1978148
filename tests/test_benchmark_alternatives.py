"""benchmarks/alternatives.py on small random models: each subject that is there gets its row, the others a reason."""

import importlib
import json
import sys

import pytest
import torch
from glue_files import write_glue
from small_bert import bert_fixture
from transformers import BertModel

from modeling_snn_bert import SNNBertModel

bert = bert_fixture(BertModel)
# What needs no package beside those of the tests.
PRESENT = ["minilm_float32", "minilm_onnx_int8", "snn_dense", "snn_int8"]
OPTIONAL = ["openvino", "nncf", "model2vec"]


@pytest.fixture
def alternatives(monkeypatch):
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    return importlib.import_module("alternatives")


@pytest.fixture
def arguments(bert, tokenizer, make_config, tmp_path):
    config = make_config(vocab_size=len(tokenizer), intermediate_size=64)
    torch.manual_seed(0)
    SNNBertModel(config).save_pretrained(tmp_path / "snn")
    tokenizer.save_pretrained(tmp_path / "snn")
    folders = {"data_dir": write_glue(tmp_path / "glue", "stsb"), "bert": bert, "snn_bert": tmp_path / "snn"}
    folders |= {"model_dir": tmp_path / "models", "output_dir": tmp_path / "results"}
    options = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
    return [*options, "--sentences", "8", "--repeats", "2", "--threads", "1"]


@pytest.mark.slow
def test_all_that_is_there(alternatives, arguments, tmp_path, capsys):
    subjects = [name for name in alternatives.SUBJECTS if name != "minilm_bfloat16"]
    alternatives.main([*arguments, "--subjects", *subjects, "--figures", "accuracy", "speed", "energy"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "alternatives.json").read_text())
    rows = {row["subject"]: row for row in result["tables"][0]["rows"]}
    assert list(rows) == PRESENT
    for name in set(subjects) - set(PRESENT):
        assert f"{alternatives.SUBJECTS[name].label} is left out: import of" in printed
    for name, row in rows.items():
        assert row["label"] in printed
        assert -100 <= row["correlation"] <= 100 and row["correlation"] != 0
        assert row["disk_megabytes"] > 0 and "peak_mebibytes" not in row
        for size in (1, 32):
            assert row[f"sentences_per_second_{size}"]["repeats"] == 2
            assert row[f"sentences_per_second_{size}"]["median"] > 0
        assert row["speedup_32"]["median"] == 1 if name == "minilm_float32" else row["speedup_32"]["median"] > 0
    assert 0.9 < rows["minilm_onnx_int8"]["mean_cosine"] < 1
    energy = {name: row["arithmetic_microjoules"] for name, row in rows.items() if "arithmetic_microjoules" in row}
    assert 0 < energy["minilm_onnx_int8"] < energy["minilm_float32"] and energy["snn_int8"] > 0
    assert "snn_dense" not in energy  # its products skip nothing

    # The models are kept; those of another BERT are not taken for this one's.
    built = (tmp_path / "models" / "snn-bert").stat().st_mtime_ns
    alternatives.main([*arguments, "--subjects", "snn_int8", "--figures", "memory"])
    [row] = json.loads((tmp_path / "results" / "alternatives.json").read_text())["tables"][0]["rows"]
    assert row["peak_mebibytes"] > 0 and "correlation" not in row
    assert (tmp_path / "models" / "snn-bert").stat().st_mtime_ns == built
    with pytest.raises(SystemExit, match="holds models made of"):
        alternatives.main([*arguments, "--bert", str(tmp_path / "snn")])


def test_static_embeddings_are_counted_by_their_additions(alternatives, arguments, tokenizer, tmp_path):
    module = alternatives.StaticEmbedding(tokenizer._tokenizer, embedding_dim=10)
    sources = alternatives.Sources(tmp_path, tmp_path / "snn", ())
    found = alternatives.energies(sources, {"static": [module]}, ["the old dog", "the fox"])["static"]
    # 2.5 words of 10 numbers: an addition each; a division for each of the sum's numbers.
    assert found["arithmetic_microjoules"] == pytest.approx((25 * 0.9 + 10 * 3.7) / 1e6)
    assert found["memory_microjoules"] == pytest.approx(4 * 25 * 162.5 / 1e6)


def test_a_runtime_that_computes_something_else(alternatives):
    class Encoder:
        def __init__(self, seed):
            self.generator = torch.Generator().manual_seed(seed)

        def encode(self, texts, **settings):
            return torch.randn(len(texts), 100, generator=self.generator)

    encoders = {name: Encoder(seed) for seed, name in enumerate(["minilm_float32", "minilm_onnx_int8"])}
    with pytest.raises(RuntimeError, match=r"minilm_onnx_int8 has a mean cosine of .* it is another model"):
        alternatives.cosines_with_reference(encoders, ["a"] * 4)


def test_models_of_different_shapes(alternatives, arguments, make_config, tmp_path):
    SNNBertModel(make_config(num_hidden_layers=1)).save_pretrained(tmp_path / "snn")
    with pytest.raises(SystemExit, match="must have the same shape"):
        alternatives.main(arguments)


def test_bad_arguments(alternatives, arguments, capsys):
    with pytest.raises(SystemExit):
        alternatives.main([*arguments, "--sentences", "0"])
    assert "--sentences must be >= 1, got 0" in capsys.readouterr().err
