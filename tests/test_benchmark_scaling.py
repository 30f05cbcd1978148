"""The table of what many devices take: its counts against a model, its arithmetic by hand, and the command."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_snn_bert import SNNBertForMaskedLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import scaling  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def settings(**overrides):
    defaults = {
        "tokens_per_second": 1000.0,
        "devices": [1, 4],
        "text_gigabytes": 1.0,
        "bytes_per_token": 4.0,
        "epochs": 2.0,
        "batch_size": 8,
        "length": 16,
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
    one, four = scaling.scaling_table(config, settings()).rows
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


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py")]
    result = subprocess.run([*command, "--tokens_per_second", "10000"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "### 109.6 M parameters" in result.stdout
    assert "| 512 |" in result.stdout
    wrong = subprocess.run([*command, "--tokens_per_second", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "--tokens_per_second must be positive, got -1.0" in wrong.stderr
