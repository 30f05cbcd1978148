"""Weights of event-driven products: what they are rounded to, and whether they are still what they were."""

import pytest
import torch
from torch import nn

from modeling_snn_bert import event_weights
from modeling_snn_bert.event_weights import MadeOf, Snapshot, round_weights, rounded_floats


def test_rounding_to_int8():
    weight = torch.randn(30, 200)
    weight[3] = 0
    quantized, scale = round_weights(weight, "int8")
    assert quantized.dtype == torch.int8 and quantized.abs().max() == 127
    error = (quantized.float() * scale[:, None] - weight).abs()
    assert bool((error <= scale[:, None] / 2 + 1e-7).all()) and not error[3].any()


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
def test_rounding_twice_changes_nothing(weight_dtype):
    once = rounded_floats(torch.randn(30, 200), weight_dtype)
    torch.testing.assert_close(rounded_floats(once, weight_dtype), once)


def test_what_is_made_is_made_once_for_the_same_weights():
    weight, made, things = nn.Parameter(torch.randn(4, 3)), [], MadeOf()

    def get(name):
        return things.get(name, [weight, None], lambda: made.append(name) or weight.detach().clone())

    first = get("a")
    assert get("a") is first and get("b") is get("b") and made == ["a", "b"]
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(get("a"), first + 1) and torch.equal(get("b"), get("a")) and made == ["a", "b", "a", "b"]


@pytest.mark.parametrize("copies_on_write", [True, False])
def test_a_snapshot_reads_only_what_it_must(monkeypatch, copies_on_write):
    """Weights in memory of torch's own are seen to be unchanged by where they lie; others are compared."""
    monkeypatch.setattr(event_weights, "COPIES_ON_WRITE", copies_on_write)
    tensors = [nn.Parameter(torch.randn(4, 3)), None]
    snapshot = Snapshot(tensors)
    assert snapshot.is_in_place(tensors) == copies_on_write and snapshot.still_holds(tensors)
    # To the same values in another place: followed.
    tensors[0].data = tensors[0].data.clone()
    assert not snapshot.is_in_place(tensors)
    assert snapshot.still_holds(tensors) and snapshot.is_in_place(tensors) == copies_on_write
    tensors[0].data.mul_(2)
    assert not snapshot.still_holds(tensors)
    tensors[0].data.div_(2)
    assert snapshot.still_holds(tensors) and not snapshot.still_holds([tensors[0].double(), None])
    assert not snapshot.still_holds([tensors[0], torch.zeros(4)])
