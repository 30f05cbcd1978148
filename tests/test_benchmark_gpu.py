"""The benchmark for a GPU, as far as it goes without one; and all of it, on tiny shapes, where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(RUN), "gpu", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_floors_are_bytes_over_bandwidth(tmp_path):
    result = run("--sections", "floors", "--bandwidth", 2, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "at 2 TB/s" in result.stdout and "not measured" in result.stdout
    (table,) = json.loads((tmp_path / "gpu-floors.json").read_text(encoding="utf-8"))["tables"]
    shapes = [row["shape"] for row in table["rows"]]
    assert [256, 128, 768] in shapes and [1, 32768, 3072] in shapes
    for row in table["rows"]:
        batch, tokens, channels = row["shape"]
        current = 2 * batch * tokens * channels
        spikes = current + batch * tokens * channels // 8
        assert row["forward_megabytes"] * 1e6 == pytest.approx(current + spikes)
        assert row["backward_megabytes"] * 1e6 == pytest.approx(3 * current)
        for name in ("forward", "backward"):
            assert row[f"{name}_microseconds"] == pytest.approx(row[f"{name}_megabytes"] / 2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    result = run("--quick", "--output_dir", tmp_path)
    assert result.returncode == 1
    assert "section `neuron` of the benchmark `gpu` needs a CUDA device" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bandwidth_that_is_none(tmp_path):
    result = run("--sections", "floors", "--bandwidth", 0, "--output_dir", tmp_path)
    assert result.returncode == 2 and "--bandwidth must be positive and finite, got 0.0" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measures(tmp_path):
    result = run("--quick", "--repeats", 2, "--subjects", "snn_bert", "bert", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    tables = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["tables"]
    assert {table["section"] for table in tables} == {"floors", "neuron", "training", "masked_lm", "inference"}
    for table in tables:
        for row in table["rows"]:
            for key in ("microseconds", "milliseconds"):
                assert key not in row or row[key]["median"] > 0
