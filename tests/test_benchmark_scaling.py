"""The table of what many devices take: its counts against a model, its arithmetic by hand, and the command."""

import argparse
import json
import sys

import pytest
import scaling
import torch
import training
from registry import Settings

from modeling_snn_bert import SNNBertForMaskedLM


def settings(**overrides):
    defaults = {
        "devices": [1, 4],
        "text_gigabytes": 1.0,
        "bytes_per_token": 4.0,
        "epochs": 2.0,
        "efficiency": 0.5,
    }
    return argparse.Namespace(**{**defaults, **overrides})


def test_counts_are_those_of_the_model(make_config):
    config = make_config()
    model = SNNBertForMaskedLM(config)
    sizes = scaling.sizes_of(config)
    assert sizes.parameters == model.num_parameters()
    layer = sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    embeddings = sum(p.numel() for p in model.bert.embeddings.parameters())
    assert sizes.largest_unit == max(layer, embeddings)
    assert sizes.logit_bytes == 120 * 10


@pytest.mark.parametrize("spike_type", ["binary", "ternary"])
def test_activation_bytes_are_what_training_keeps(make_config, spike_type):
    config = make_config(attn_implementation="sdpa", hidden_dropout_prob=0.1, spike_type=spike_type)
    layer = SNNBertForMaskedLM(config).train().bert.encoder.layer[0]
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    states = torch.randn(8, 64, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        layer(states)
    # Weights and the neurons' few numbers per group do not grow with the batch.
    measured = sum(x.untyped_storage().nbytes() for x in kept.values() if tuple(x.shape)[-3:-1] == (8, 64))
    # Two differences to a GPU: a dropout on a CPU keeps its noise in bfloat16 in place of a bool, and what the
    # attention keeps (its result, and the packed queries, keys and values) is hidden from these hooks by its own.
    packed = 3 * config.hidden_size // 8 * (2 if spike_type == "ternary" else 1)
    attention = packed + 2 * config.hidden_size + 4 * config.num_attention_heads
    on_a_cpu = scaling.layer_activation_bytes(config) + 2 * config.hidden_size - attention
    assert measured == 8 * 64 * on_a_cpu


def test_rows_by_hand(make_config):
    config = make_config()
    sizes = scaling.sizes_of(config)
    one, four = scaling.scaling_table(config, scaling.Speed(8, 16, 1000.0), settings()).rows
    # 1 GB / 4 bytes, twice over, at 1,000 tokens a second.
    assert one["hours"] == pytest.approx(0.5e9 / 1000 / 3600)
    assert four["tokens_per_second"] == 4 * 1000 * 0.5 and four["hours"] == pytest.approx(0.5e9 / 2000 / 3600)
    assert one["traffic_gigabytes"] == 0 and one["link_gigabytes_per_second"] == 0
    assert four["traffic_gigabytes"] == pytest.approx(2 * 0.75 * 4 * sizes.parameters / 1e9)
    activations = 8 * 16 * (sizes.activation_bytes + sizes.logit_bytes)
    assert four["ddp_gigabytes"] == one["ddp_gigabytes"] == pytest.approx((16 * sizes.parameters + activations) / 1e9)
    fsdp = 16 * sizes.parameters / 4 + 2 * 2 * sizes.largest_unit + activations
    assert four["fsdp_gigabytes"] == pytest.approx(fsdp / 1e9)
    assert four["link_gigabytes_per_second"] == pytest.approx(four["traffic_gigabytes"] / (2 / 3 * 128 / 1000))
    assert four["read_megabytes_per_second"] == pytest.approx(2 * 2000 / 1e6)


def test_assumptions_are_marked(make_config):
    """Of a measured speed only what one device does is known; of an assumed one not even that."""
    config = make_config()
    measured = scaling.scaling_table(config, scaling.Speed(8, 16, 1000.0, "a step on a machine"), settings())
    assumed = scaling.scaling_table(config, scaling.Speed(8, 16, 1000.0), settings())
    speed_columns = {"tokens_per_second", "read_megabytes_per_second"}
    many = {"hours", "link_gigabytes_per_second", *speed_columns}
    for table, one in ((measured, {"hours"}), (assumed, {"hours", *speed_columns})):
        marked = [{name for name, x in row.items() if isinstance(x, scaling.Assumed)} for row in table.rows]
        assert marked == [one, many]
    assert "(measured)" in measured.title and "a step on a machine" in measured.markdown()
    assert (
        "(assumed*)" in assumed.title
        and "| 4 | 2000* |" in assumed.markdown()
        and "| 1 | 1000 |" in measured.markdown()
    )


@pytest.fixture
def measurement(tmp_path):
    """A function that writes what `run.py training` would, with changes to the row of SNN-BERT and the settings."""
    shape = scaling.Shape(2, 64, 128, 4, 4, 32, 1000)

    def write(quick=False, **changes):
        row = {
            "subject": "snn_bert",
            "variant": "masked LM",
            "shape": shape._asdict(),
            "milliseconds": {"median": 64.0},
        }
        bert = {**row, "subject": "bert", "milliseconds": {"median": 1.0}}
        result = {
            "benchmark": "training",
            "environment": {"cpu": "a processor", "threads": 2},
            "settings": {"quick": quick},
            "tables": [{"title": "a step", "rows": [bert, {**row, **changes}]}],
        }
        path = tmp_path / "training.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        return path

    return write


def test_a_measured_speed_is_read(measurement):
    ((config, speed),) = scaling.measured_speeds(measurement())
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 64, 1000)
    assert (speed.batch_size, speed.length) == (4, 32) and speed.tokens_per_second == pytest.approx(4 * 32 / 0.064)
    assert speed.measured == "a step on a processor, 2 threads"


def test_what_is_no_measurement_is_refused(measurement, tmp_path):
    with pytest.raises(ValueError, match="--quick"):
        scaling.measured_speeds(measurement(quick=True))
    with pytest.raises(ValueError, match="holds no step of snn_bert in masked language modelling"):
        scaling.measured_speeds(measurement(variant="plain"))
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is not a file that `benchmarks/run.py` wrote"):
            scaling.measured_speeds(tmp_path / name)


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs the command in this process: its exit code, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, arguments)])
        try:
            scaling.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr()

    return run


def test_the_command(command, measurement):
    code, printed = command("--tokens_per_second", 10000)
    assert code == 0 and "### 109.6 M parameters, 64 x 128 tokens" in printed.out and "| 512 |" in printed.out
    code, printed = command("--measured", measurement(), "--devices", 1, 2)
    assert code == 0 and "2,000 tokens/s a device (measured)" in printed.out
    wrong = {
        "--tokens_per_second must be positive, got -1.0": ["--tokens_per_second", -1],
        "--efficiency must lie in (0, 1], got 2.0": ["--tokens_per_second", 1, "--efficiency", 2],
        "--length comes from the file of --measured": ["--measured", "x.json", "--length", 8],
        "one of the arguments --measured --tokens_per_second is required": [],
    }
    for message, arguments in wrong.items():
        code, printed = command(*arguments)
        assert code == 2 and message in printed.err
    code, _ = command("--measured", "missing.json")
    assert "missing.json is not a file" in code


def test_the_benchmark_writes_what_is_read(tmp_path):
    """The row that `run.py` writes has what `measured_speeds` looks for, and its loss is that of masked tokens."""
    shape = training.QUICK
    step = training.TrainingStep("snn_bert", shape, 0, training.MASKED_LM)
    assert 0 < (step.labels != -100).float().mean() < 0.5
    step()
    assert 0 < step.firing_rate() < 1
    (table,) = training.BENCHMARK.sections["step_mlm_384"](
        Settings(sections=(), subjects=("snn_bert", "bert"), quick=True, threads=1, repeats=2, seed=0)
    )
    result = {"benchmark": "training", "environment": {"cpu": "x", "threads": 1}, "settings": {"quick": False}}
    path = tmp_path / "training.json"
    path.write_text(json.dumps({**result, "tables": [table.to_dict()]}), encoding="utf-8")
    ((config, speed),) = scaling.measured_speeds(path)
    assert config.hidden_size == shape.hidden_size and speed.tokens_per_second > 0
