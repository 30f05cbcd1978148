"""The benchmarks, run as a user runs them, on tiny shapes; and the helpers that they measure with."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import measure
import pytest
import torch
from example_scripts import refused, run_script

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a quick run of both benchmarks wrote, by benchmark and section, without spikingjelly."""
    folder = tmp_path_factory.mktemp("benchmarks")
    sections = ["peers", "implementations", "length", "step_384", "memory_384"]
    subjects = ["bpsn", "lif", "psn", "snn_bert", "bert"]
    arguments = ["--quick", "--repeats", 3, "--threads", 1, "--output_dir", folder]
    result = run("neuron", "training", *arguments, "--sections", *sections, "--subjects", *subjects)
    assert result.returncode == 0, result.stderr
    assert "| bpsn | " in result.stdout and "| snn_bert | " in result.stdout
    # A complete run of a benchmark gives it its bare name, a part of it names its sections.
    names = {"neuron": "neuron.json", "training": "training-step_384-memory_384.json"}
    assert {path.name for path in folder.iterdir()} == set(names.values())
    return {name: json.loads((folder / file).read_text(encoding="utf-8")) for name, file in names.items()}


def rows(result, section):
    found = [row for table in result["tables"] if table["section"] == section for row in table["rows"]]
    assert found, f"no rows of {section}"
    return found


def assert_spread(values):
    assert values["repeats"] == len(values["samples"]) == 3
    assert 0 < min(values["samples"]) <= values["q1"] <= values["median"] <= values["q3"] <= max(values["samples"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neuron", "training"])
def test_results_name_what_they_depend_on(results, name):
    import transformers

    import modeling_snn_bert

    environment = results[name]["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["transformers"] == transformers.__version__
    assert environment["snn-bert"] == modeling_snn_bert.__version__
    assert environment["threads"] == 1 and environment["seed"] == 0 and environment["device"] == "cpu"
    assert environment["cpu"] and environment["date"] and len(environment["snn_bert_sources"]) == 12
    assert results[name]["settings"]["repeats"] == 3 and results[name]["settings"]["quick"]
    assert results[name]["seconds"] > 0


@pytest.mark.slow
def test_neurons(results):
    peers = rows(results["neuron"], "peers")
    assert {row["subject"] for row in peers} == {"bpsn", "lif", "psn"}
    for row in peers:
        assert_spread(row["milliseconds"])
        assert_spread(row["reference_over_subject"])
        assert 0 < row["firing_rate"] < 1
        if row["subject"] == "bpsn":
            assert row["reference_over_subject"]["samples"] == [1, 1, 1]

    implementations = rows(results["neuron"], "implementations")
    assert {row["implementation"] for row in implementations} >= {"naive", "toeplitz", "chunked", "auto"}
    for row in implementations:
        assert_spread(row["milliseconds"])
        assert_spread(row["over_auto"])

    lengths = rows(results["neuron"], "length")
    assert [row["length"] for row in lengths] == [8, 16, 32]
    for row in lengths:
        assert_spread(row["nanoseconds_per_token"])
        assert_spread(row["over_shortest"])
        assert 0 < row["firing_rate"] < 1


@pytest.mark.slow
def test_training(results):
    by_section = {section: rows(results["training"], section) for section in ("step_384", "memory_384")}
    for row in by_section["step_384"]:
        assert_spread(row["milliseconds"])
        assert_spread(row["subject_over_reference"])
        products = zip(row["subject_over_reference"]["samples"], row["reference_over_subject"]["samples"], strict=True)
        assert all(math.isclose(a * b, 1) for a, b in products)
    state = {}
    for row in by_section["memory_384"]:
        state[row["subject"]] = row["state_bytes"]
        assert row["peak_bytes"] > 0 and row["subject_over_reference"] > 0
        assert math.isclose(row["subject_over_reference"] * row["reference_over_subject"], 1)
    # Weights, gradients and AdamW's two moments in float32; SNN-BERT has its neurons' parameters on top of BERT's.
    assert state["bert"] < state["snn_bert"] < 1.1 * state["bert"]
    for section in by_section.values():
        assert {row["subject"] for row in section} == {"snn_bert", "bert"}
        for row in section:
            assert row["firing_rate"] is None if row["subject"] == "bert" else 0 < row["firing_rate"] < 1


def test_list(capsys):
    run_script("run", "--list")
    output = capsys.readouterr().out
    for word in ("neuron:", "training:", "peers", "memory_768", "spikingjelly_lif", "lif_repeat4"):
        assert word in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neurons"], "no benchmark is named neurons; there are gpu, inference, neuron, training"),
        (["neuron", "--sections", "step_384"], "--sections leaves nothing of neuron"),
        (["neuron", "--subjects", "bpsn", "robert"], "--subjects robert: there are"),
        (["--repeats", "0"], "--repeats must be >= 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, "run", *arguments, "--output_dir", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_missing_spikingjelly_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    arguments = ["neuron", "--quick", "--sections", "peers", "--output_dir", tmp_path / "results"]
    message = refused(capsys, "run", *arguments)
    assert "pip install --no-deps spikingjelly loguru" in message and "--subjects bpsn" in message
    assert not (tmp_path / "results").exists()


def test_interleaved_seconds():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    samples = measure.interleaved_seconds({"a": lambda: call("a", 0.03), "b": lambda: call("b", 0.06)}, repeats=4)
    # A warm-up of each, then rounds whose order rotates.
    assert order == [*"ab", *"ab", *"ba", *"ab", *"ba"]
    assert all(seconds >= 0.03 for seconds in samples["a"]) and all(seconds >= 0.06 for seconds in samples["b"])
    with pytest.raises(ValueError, match="`repeats`"):
        measure.interleaved_seconds({"a": time.sleep}, repeats=0)


def test_ratio_is_taken_round_by_round():
    # A machine that is ten times slower in the second round changes the times but not the ratios.
    result = measure.ratio({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 3.0]}, "b", "a")
    assert result["samples"] == [2, 2, 1] and result["median"] == 2 and result["q1"] == 1.5


def test_peak_allocated_bytes_is_exact():
    before = torch.zeros(1_000_000)

    def call():
        a = before + 1  # 4 MB held
        b = a.double()  # 12 MB
        del a  # 8 MB
        c = b.half()  # 10 MB
        del b, c

    assert measure.peak_allocated_bytes(call) == pytest.approx(12_000_000, abs=1000)


def test_peak_resident_bytes_agrees():
    def call():
        torch.ones(16, 1_000_000)

    peak = measure.peak_resident_bytes(call)
    if peak is None:
        pytest.skip("the kernel does not let a process reset the peak of its resident memory")
    assert peak == pytest.approx(64_000_000, rel=0.1)


def test_dead_neurons_are_no_subject():
    assert measure.check_firing_rate("a layer", 0.25) == 0.25
    for rate in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="a layer has the firing rate"):
            measure.check_firing_rate("a layer", rate)
