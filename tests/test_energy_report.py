"""The energy report: its baseline and its files."""

import base64
import json
import sys

import pytest
import torch

from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.layer_places import LINEARS


def test_baseline(make_with_batches):
    model, batches = make_with_batches()
    baseline, _ = make_with_batches(neuron_type="lif", coding="repeat", num_timesteps=4)
    report = energy_report(model, iter(batches), baseline=baseline)
    own = energy_report(baseline, batches, run_lengths=False).cost
    assert report.baseline.matrix_product_picojoules == own.matrix_product_picojoules
    ratio = report.matrix_product_ratios()["repeat coding"]
    assert ratio == pytest.approx(own.matrix_product_picojoules / report.cost.matrix_product_picojoules) and ratio > 1
    assert f"{ratio:.2f} (measured" in report.to_markdown()
    with pytest.raises(ValueError, match=r"`baseline` must have `coding='repeat'`, got 'individual'"):
        energy_report(model, batches, baseline=model)
    with pytest.raises(TypeError, match="`baseline` must be an SNN-BERT, got Linear"):
        energy_report(model, batches, baseline=torch.nn.Linear(2, 2))


def test_report_files(make_with_batches, tmp_path, tokenizer):
    model, batches = make_with_batches(firing_rate_target=0.3)
    report = energy_report(model, batches)
    tokens = tokenizer.convert_ids_to_tokens(report.statistics.example_ids)
    files = report.save(tmp_path / "new", tokens=tokens)
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(f.name for f in files)
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert numbers == json.loads(report.to_json())
    assert numbers["settings"]["firing_rate_target"] == 0.3
    own = numbers["costs"][0]
    assert own["arithmetic_picojoules"] == pytest.approx(sum(row["picojoules"] for row in numbers["rows"]))
    assert sum(part["picojoules"] for part in own["parts"]) == pytest.approx(own["arithmetic_picojoules"])
    text = (tmp_path / "new" / "report.md").read_text()
    assert text == report.to_markdown()
    for part in ("Linear", "QK^T", "attention x V", "neurons", "softmax", "LayerNorm", "embeddings", "pooler"):
        assert f"| {part} |" in text
    for layer in range(2):
        for linear in LINEARS:
            assert f"| layer {layer}, {linear} |" in text
    for picture in ("energy", "firing_rates", "spikes"):
        assert (tmp_path / "new" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        encoded = base64.b64encode((tmp_path / "new" / f"{picture}.png").read_bytes()).decode()
        assert encoded in (tmp_path / "new" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"`tokens` must name the \d+ tokens of the first sequence, got 1"):
        report.save(tmp_path, tokens=["x"])


def test_pictures_without_matplotlib(make_with_batches, tmp_path, monkeypatch):
    model, batches = make_with_batches()
    report = energy_report(model, batches, run_lengths=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [f.name for f in report.save(tmp_path / "out", plots=False)] == ["report.md", "report.json", "report.html"]
