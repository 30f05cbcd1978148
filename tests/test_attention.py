"""Attention: each function against its formula."""

from types import SimpleNamespace

import pytest
import torch
from test_packed_spikes import gradients, random_spikes

from modeling_snn_bert import attention
from modeling_snn_bert.attention import KeepBits, packed_attention, spiking_attention
from modeling_snn_bert.packed_spikes import attach_packed, keep_packed, pack, unpack


def test_spiking_attention_by_its_definition():
    query, key, value = (torch.randint(0, 2, (2, 3, 5, 4)).double() for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    key, value = key * mask[:, None, :, None], value * mask[:, None, :, None]
    expected = torch.zeros(2, 5, 3, 4).double()
    for row in range(2):
        for head in range(3):
            for t in range(5):
                for j in range(5):
                    weight = (query[row, head, t] * key[row, head, j]).sum() * 0.5 / mask[row].sum()
                    expected[row, t, head] += weight * value[row, head, j]
    for implementation in ("eager", "sdpa"):
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))
        found, weights = spiking_attention(module, query, key, value, None, 0.5, token_mask=mask)
        torch.testing.assert_close(found, expected)
        assert (weights is not None) == (implementation == "eager")
        bias = torch.randn(1, 3, 5, 5).double()
        found, weights = spiking_attention(module, query, key, value, bias, 0.5, token_mask=mask)
        term = torch.einsum("hij,bhjd->bihd", bias[0], value) / mask.sum(-1)[:, None, None, None]
        torch.testing.assert_close(found, expected + term)
        assert weights is None or not weights.transpose(1, 3)[mask == 0].any()


class TestPackedAttention:
    """Attention with dropout that keeps bits, against its formula under autograd with the same dropout."""

    @pytest.mark.parametrize("ternary", [False, True])
    @pytest.mark.parametrize("masked", [False, True, "bias", "bias per sequence"])
    @pytest.mark.parametrize("shape, heads", [((1, 1, 8), 1), ((3, 7, 16), 2), ((5, 40, 24), 3)], ids=str)
    def test_is_its_formula(self, monkeypatch, shape, heads, masked, ternary):
        # Several pieces, the last one smaller.
        monkeypatch.setattr(attention, "ATTENTION_PIECE", 2 * heads * shape[1] ** 2)
        batch, length, channels = shape
        spikes = [random_spikes(*shape, ternary=ternary, dtype=torch.float64).requires_grad_() for _ in range(3)]
        affine = [torch.rand(channels, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., 2 * length // 3 + 1 :] = False
        biases = []
        if isinstance(masked, str):
            rows = batch if masked == "bias per sequence" else 1
            biases = [torch.randn(rows, heads, length, length, dtype=torch.float64, requires_grad=True)]
        grad = torch.randn(shape, dtype=torch.float64)

        def formula(query, key, value, gain, offset, *bias):
            keep, contexts = KeepBits(0.2), []
            for first in range(0, batch, 2):
                q, k, v = (
                    x[first : first + 2].unflatten(-1, (heads, -1)).transpose(1, 2)
                    for x in (query * gain + offset, key, value)
                )
                scores = (q @ k.transpose(2, 3)) * 0.7
                if bias:
                    scores = scores + (bias[0] if len(bias[0]) == 1 else bias[0][first : first + 2])
                elif masked:
                    scores = scores.masked_fill(~mask[first : first + 2], float("-inf"))
                weights = scores.softmax(-1)
                bits = unpack(keep.draw(weights.shape), weights.numel(), torch.float64)[: weights.numel()]
                contexts.append((weights * bits.view_as(weights) / (1 - 13107 / 65536)) @ v)
            return torch.cat(contexts).transpose(1, 2).flatten(2)

        def packed(query, key, value, gain, offset, *bias):
            for x in (query, key, value):
                attach_packed(x, pack(x.detach(), ternary))
            with keep_packed(query, key, value) as affine:
                q, k, v = (
                    x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (affine(query, gain, offset), key, value)
                )
                added = bias[0] if bias else mask if masked else None
                context, weights = packed_attention(None, q, k, v, added, 0.7, 0.2)
            assert weights is None and context.shape == (batch, length, heads, channels // heads)
            # What is kept is other memory, made of bits.
            for kept, x in zip(context.grad_fn.saved_tensors, (q, k, v), strict=False):
                assert torch.equal(kept, x) and kept.data_ptr() != x.data_ptr()
            return context.flatten(2)

        results = []
        for function in (formula, packed):
            torch.manual_seed(3)
            results.append(gradients(function, [*spikes, *affine, *biases], grad))
        (wanted, wanted_grads), (got, got_grads) = results
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        for a, b in zip(got_grads, wanted_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("dropout", [0.0001, 0.1, 0.5, 0.99])
    def test_dropout(self, dropout):
        keep, ones = KeepBits(dropout), torch.ones(40, 50, 101)
        dropped = keep.apply(ones, keep.draw(ones.shape))
        assert set(dropped.unique().tolist()) <= {0.0, torch.tensor(keep.scale).item()}
        deviation = (dropout * (1 - dropout) / ones.numel()) ** 0.5
        assert abs((dropped == 0).float().mean().item() - dropout) < 5 * deviation + 1e-5
        # Neighbours, also those of one draw, are independent.
        kept = (dropped != 0).float().flatten()
        for lag in (1, 2, 3, 4):
            both = (kept[lag:] * kept[:-lag]).mean().item()
            assert abs(both - kept.mean().item() ** 2) < 6 * deviation
