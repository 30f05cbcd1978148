"""Thresholds per layer and rotations, as the benchmark makes them: what they change, and what they leave alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_bert import bert_fixture
from transformers import BertModel

from modeling_snn_bert.conversion import convert_bert

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import calibration_variants as variants  # noqa: E402

sys.path.remove(str(BENCHMARKS))

bert = bert_fixture(BertModel)


@pytest.fixture
def batches(tokenizer, texts):
    return [dict(tokenizer(texts, padding=True, return_tensors="pt"))]


@pytest.mark.parametrize("size", [1, 6, 32, 384])
def test_the_rotation_is_orthogonal(size):
    rotation = variants.hadamard_rotation(size)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size))
    block = next(2**power for power in range(20, -1, -1) if size % 2**power == 0)
    assert all(int((row != 0).sum()) == block for row in rotation)


def test_without_a_rotation_it_is_the_library(bert, batches, monkeypatch, assert_spikes_flow):
    """Rotated neurons, turned by nothing, are calibrated and run as the library's are; turned, they are others."""
    model = BertModel.from_pretrained(bert).eval()
    plain, rotated = convert_bert(model, batches), variants.with_rotation(model, batches)
    monkeypatch.setattr(variants, "hadamard_rotation", torch.eye)
    same = variants.with_rotation(model, batches)
    assert_spikes_flow(same, **batches[0])
    with torch.no_grad():
        wanted, found, other = (x(**batches[0]).last_hidden_state for x in (plain, same, rotated))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(other, wanted, atol=1e-2)
    for layer in rotated.encoder.layer:
        turned = [name for name, module in layer.named_modules() if isinstance(module, variants.Rotated)]
        assert turned == ["attention.self.neuron", "attention.output.neuron", "intermediate.neuron"]


def test_thresholds_of_a_layer_stay_alike(bert, batches, assert_spikes_flow):
    model = variants.with_layer_thresholds(BertModel.from_pretrained(bert), batches, 0.2).train()
    assert_spikes_flow(model.eval(), **batches[0])
    before = [neuron.v_threshold[0].item() for neuron in variants.neurons(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(**batches[0]).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [neuron.v_threshold for neuron in variants.neurons(model)]
    assert all(torch.equal(x, x[:1].expand_as(x)) for x in after)
    assert sum(abs(x[0].item() - y) > 1e-3 for x, y in zip(after, before, strict=True)) > len(before) / 2


def test_the_command(tmp_path, bert, texts, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(texts * 20), encoding="utf-8")
    arguments = [
        "--model_name_or_path",
        bert,
        "--train_file",
        text,
        "--max_seq_length",
        16,
        "--calibration_tokens",
        256,
    ]
    arguments += ["--per_device_train_batch_size", 8, "--validation_blocks", 8, "--max_steps", 3]
    variants.main([*map(str, arguments), "--seeds", "3", "4", "--output_dir", str(tmp_path / "out")])
    runs = json.loads((tmp_path / "out" / "calibration_variants.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(name, x) for name in variants.VARIANTS for x in (3, 4)]
    for run in runs:
        assert 0 < run["trained"]["firing_rate"] < 1 and 0 < run["calibrated"]["loss"] != run["trained"]["loss"]
    assert len({run["calibrated"]["loss"] for run in runs}) == 6
    assert "| layer_thresholds |" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_student_to_go_on_from_is_refused(tmp_path, bert, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text", encoding="utf-8")
    with pytest.raises(SystemExit):
        variants.main(["--train_file", str(text), "--student_name_or_path", str(bert), "--output_dir", str(tmp_path)])
    assert "leave out --student_name_or_path" in capsys.readouterr().err


def test_a_threshold_for_all_variants_is_refused(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text", encoding="utf-8")
    with pytest.raises(SystemExit):
        variants.main(["--train_file", str(text), "--threshold_per", "layer", "--output_dir", str(tmp_path)])
    assert "--threshold_per is what the variants are about" in capsys.readouterr().err
