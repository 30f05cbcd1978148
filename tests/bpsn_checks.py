"""What the tests of the GPU's kernels share: neurons, masks, and the comparison with the definition."""

import copy
import os

import pytest
import torch

from modeling_snn_bert import BPSN, triton_tiles
from modeling_snn_bert.packed_spikes import pack, packed_form, unpack
from modeling_snn_bert.surrogate_gradients import SURROGATES

ON_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(
    ON_GPU or not triton_tiles._AVAILABLE or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter is for machines with triton, without a GPU, and with TRITON_INTERPRET=1",
)
needs_gpu = pytest.mark.skipif(not (ON_GPU and triton_tiles._AVAILABLE), reason="no CUDA device, or no triton")


def make_neuron(channels, groups, **settings):
    """A BPSN with its own value for each group and channel."""
    neuron = BPSN(channels, groups, surrogate_alpha=1.5, **settings)
    with torch.no_grad():
        neuron.v_threshold.uniform_(0.1, 0.7)
        for name, parameter in neuron.named_parameters():
            if name.endswith("logit"):
                parameter.uniform_(-2.5, 1.5)
            elif name == "reset_strength":
                parameter.uniform_(-0.7, 1.3)
    return neuron


def masks(batch, length):
    t, row = torch.arange(length).expand(batch, -1), torch.arange(batch)[:, None]
    return {
        "none": None,
        "right": t < length - 3 * (row + 1),
        "left": t >= 2 + 5 * row,
        "holes": (t * 5 + row) % 3 != 0,
        "row-all-masked": (row > 0).expand(-1, length),
    }


def run(neuron, current, mask, weight):
    """Spikes, their packed form, and the gradients to the current and to each parameter."""
    current = current.clone().requires_grad_()
    spikes = neuron(current, mask)
    inputs = (current, *neuron.parameters())
    return spikes.detach(), packed_form(spikes), torch.autograd.grad(spikes, inputs, weight.to(spikes.dtype))


def reference_of(neuron):
    """The same neuron by its definition, in float64."""
    reference = copy.deepcopy(neuron).double()
    reference.implementation = "naive"
    return reference


def check(neuron, current, mask=None):
    """The kernels against the definition. The seeds leave no potential within a rounding error of its threshold."""
    assert triton_tiles.takes(current)
    weight = torch.randn(current.shape).to(current.dtype)
    spikes, packed, gradients = run(neuron, current, mask, weight)
    # In the reference, nothing may come from what stands in the padding.
    clean = current if mask is None else current.masked_fill(~mask[..., None], 0)
    wanted, _, wanted_gradients = run(reference_of(neuron), clean.double(), mask, weight.double())
    valid = wanted if mask is None else wanted[mask]
    assert 0 < valid.abs().mean() < 1
    assert spikes.dtype == current.dtype and torch.equal(spikes.double(), wanted)
    ternary = neuron.spike_type == "ternary"
    assert not ternary or (wanted.min() == -1 and wanted.max() == 1)
    assert torch.equal(packed, pack(wanted, ternary))
    assert torch.equal(unpack(packed, current.shape[-1], current.dtype), spikes)
    half = current.dtype != torch.float32
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        assert expected.abs().sum() > 0
        scale = expected.abs().max().item()
        # Half precision rounds the gradient to the current twice.
        tolerance = 4 * torch.finfo(current.dtype).eps if half else 5e-6
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)
    return spikes


def check_one_token():
    """Spikes, bits and gradients of sequences of one token, by hand."""
    neuron = make_neuron(16, 2)
    current = torch.randn(2, 1, 16) + 0.3
    spikes, packed, gradients = run(neuron, current, None, torch.ones(2, 1, 16))
    assert 0 < spikes.mean() < 1
    # Alone, a token is its own mean and receives no reset.
    assert torch.equal(spikes, (current >= neuron.v_threshold).float())
    assert torch.equal(packed, pack(spikes, False))
    slope = SURROGATES["atan"](current - neuron.v_threshold, 1.5).detach()
    torch.testing.assert_close(gradients[0], slope)
    torch.testing.assert_close(gradients[1], -slope.sum((0, 1)))
    assert all((gradient == 0).all() for gradient in gradients[2:])


def check_on_gpu(neuron, length, dtype, batches=(3, 1)):
    """The kernels on a GPU against the scans in float64, with no mask, each of `masks`, and other batch sizes."""
    neuron = neuron.cuda()
    reference = copy.deepcopy(neuron).double()
    reference.implementation = "chunked"
    channels = neuron.num_channels
    # A batch of 1 is one that Triton would take for a constant.
    for batch in batches:
        current = (torch.randn(batch, length, channels, device="cuda") + 0.1).to(dtype)
        weight = torch.randn(batch, length, channels, device="cuda").to(dtype)
        for name, mask in masks(batch, length).items():
            if mask is not None and not mask.any():
                continue
            mask = None if mask is None else mask.cuda()
            spikes, packed, gradients = run(neuron, current, mask, weight)
            wanted, _, wanted_gradients = run(reference, current.double(), mask, weight.double())
            assert 0 < wanted.abs().mean() < 1 or length == 1, name
            assert torch.equal(unpack(packed, channels, dtype), spikes), name
            # A potential within a rounding error of its threshold may fall on either side.
            assert (spikes.double() != wanted).double().mean() < 1e-4, name
            for got, expected in zip(gradients, wanted_gradients, strict=True):
                tolerance = 1e-3 if dtype == torch.float32 else 2e-2
                assert (got.double() - expected).norm() <= tolerance * expected.norm() + 1e-6, name
