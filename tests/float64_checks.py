"""What the tests of BPSN in float32 on a CPU share: neurons, masks, and the comparison with float64."""

import copy

import torch

from modeling_snn_bert import BPSN
from modeling_snn_bert.leaky_integration import divide_by_group, leaky_sum, silence, total_weight


def make_neuron(channels, groups, seed=0, **settings):
    """A neuron with its own value for each group and channel, as it would be after training."""
    generator = torch.Generator().manual_seed(seed)
    neuron = BPSN(channels, groups, **settings)
    with torch.no_grad():
        for name, parameter in neuron.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            low, high = {"v_threshold": (0.1, 0.7), "reset_strength": (-0.6, 1.2)}.get(name, (-2.5, 1.5))
            parameter.copy_(low + (high - low) * noise)
    return neuron


def random_mask(kind, batch, length):
    t, row = torch.arange(length).expand(batch, -1), torch.arange(batch)[:, None]
    return {
        "none": None,
        "right": (t < max(1, length // 2) + row).long(),
        "left": (t >= length // 3).float(),
        "holes": (3 * t + row) % 4 != 0,
        "all_masked": torch.zeros(batch, length, dtype=torch.bool),
    }[kind]


@torch.no_grad()
def decided(neuron, x, mask, margin=1e-4):
    """Whether each channel of each row is away from its threshold at all tokens and in all sweeps, `[batch, channels]`.

    Elsewhere float32 and float64 may rightly disagree on a spike, and by the reset on its neighbours.
    """
    f, b = neuron.decay_forward, neuron.decay_backward
    n = total_weight(x, f, b, mask, "chunked") if neuron.normalize else torch.ones(1, 1, f.shape[0], dtype=x.dtype)
    potential = divide_by_group(leaky_sum(silence(x, mask), f, b, "chunked"), n)
    reset = neuron.per_channel(neuron.soft_reset)
    near, now = torch.zeros_like(x, dtype=torch.bool), potential
    for _ in range(neuron.reset_iterations + 1):
        near |= ((now - neuron.v_threshold).abs() < margin) | ((now + neuron.v_threshold).abs() < margin)
        spikes = silence(neuron.fire(now, neuron.v_threshold), mask)
        received = divide_by_group(leaky_sum(spikes, f, b, "chunked") - spikes, n)
        now = potential - reset * received
    return ~silence(near, mask).any(1)


def compare(neuron, shape, mask, min_clear=0.5):
    """Spikes and gradients of the float32 kernel against torch's operations in float64.

    `min_clear` is the share of channels that must be away from their thresholds for this to say something.
    """
    batch, length, channels = shape
    generator = torch.Generator().manual_seed(length)
    current = torch.randn(batch, length, channels, generator=generator) + 0.2
    exact = copy.deepcopy(neuron).double()
    exact.implementation = "chunked"
    clear = decided(exact, current.double(), mask)
    assert clear.float().mean() > min_clear
    grad = torch.randn(shape, generator=generator) * clear[:, None]
    x, x64 = current.clone().requires_grad_(), current.double().requires_grad_()
    spikes, wanted = neuron(x, mask), exact(x64, mask)
    agree = (spikes == wanted) | ~clear[:, None]
    assert agree.all()
    names, parameters = zip(*neuron.named_parameters(), strict=True)
    got = torch.autograd.grad(spikes, [x, *parameters], grad)
    expected = torch.autograd.grad(wanted, [x64, *exact.parameters()], grad.double())
    for name, a, e in zip(["current", *names], got, expected, strict=True):
        # A parameter's gradient is a sum over all tokens in which much cancels.
        tolerance = 2e-4
        if name == "current":
            a, e, tolerance = a * clear[:, None], e * clear[:, None], 2e-5
        scale = max(e.abs().max().item(), 1e-3)
        error = (a.double() - e).abs().max().item() / scale
        assert error < tolerance, f"the gradient of {name} is off by {error}"
    return spikes
