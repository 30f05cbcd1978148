"""The benchmark for a GPU, as far as it goes without one; and all of it, on tiny shapes, where there is one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from example_scripts import refused

from modeling_snn_bert import bpsn_triton

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


def test_a_bandwidth_that_is_none(tmp_path, capsys):
    message = refused(capsys, "run", "gpu", "--sections", "floors", "--bandwidth", 0, "--output_dir", tmp_path)
    assert "--bandwidth must be positive and finite, got 0.0" in message


def test_kernels_that_overlap_keep_the_gpu_busy_once():
    spans = [(10, 20), (12, 15), (18, 30), (40, 45), (44, 50)]
    runs = [gpu.KernelRun("k", start, end) for start, end in spans]
    assert gpu.busy_nanoseconds(reversed(runs)) == 20 + 10
    assert gpu.busy_nanoseconds([]) == 0


def test_largest_kernels_come_first():
    lengths = [("small", 10**6), ("large", 4 * 10**6), ("many", 2 * 10**6), ("many", 3 * 10**6)] * 2
    runs = [gpu.KernelRun(name, 5, 5 + length) for name, length in lengths]
    rows = gpu.largest_kernels(runs, steps=2, number=2)
    assert [row["kernel"] for row in rows] == ["many", "large"]
    assert [row["launches"] for row in rows] == [2, 1]
    assert [row["milliseconds"] for row in rows] == [5, 4]
    assert [row["share"] for row in rows] == [0.5, 0.4]


def test_shapes_are_those_of_the_targets():
    settings = gpu.Settings((), (), quick=False, threads=1, repeats=1, seed=0, lengths=(64, 128, 512, 4096))
    training = {(s.num_layers, s.hidden_size, s.batch_size, s.length) for s in gpu.training_shapes(settings)}
    assert training == {(12, 768, 256, 128), (12, 768, 64, 512), (12, 768, 8, 4096), (6, 384, 64, 64)}
    inference = {(s.num_layers, s.batch_size, s.length) for s in gpu.inference_shapes(settings)}
    batches = {(layers, batch, 128) for layers in (6, 12) for batch in (1, 32, 256)}
    assert inference == batches | {(12, 64, 512), (12, 8, 4096)}
    with pytest.raises(SystemExit, match="--lengths must be of 64, 128"):
        gpu.chosen_lengths(dataclasses.replace(settings, lengths=(100,)))


def test_other_tiles_are_of_sizes_that_fit_and_leave_no_trace():
    for length in (64, 128, 256, 512):
        choices = gpu.tile_choices(length)
        assert bpsn_triton.FORWARD_TILES[length] in choices and bpsn_triton.BACKWARD_TILES[length] in choices
        before = bpsn_triton.BACKWARD_TILES[length]
        with gpu.using_tile(length, (64, 16)):
            assert bpsn_triton.FORWARD_TILES[length] == (64, 16) == bpsn_triton.BACKWARD_TILES[length]
        assert bpsn_triton.BACKWARD_TILES[length] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measures(tmp_path):
    result = run("--quick", "--repeats", 2, "--subjects", "snn_bert", "bert", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    tables = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["tables"]
    sections = {"floors", "neuron", "tiles", "training", "profile", "masked_lm", "inference"}
    assert {table["section"] for table in tables} == sections
    for table in tables:
        for row in table["rows"]:
            for key in ("microseconds", "milliseconds"):
                figure = row.get(key, 1)
                assert (figure["median"] if isinstance(figure, dict) else figure) > 0
