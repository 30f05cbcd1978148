"""The Heaviside step and its surrogate gradients against independent formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_snn_bert.spiking_neurons import BPSN
from modeling_snn_bert.surrogate_gradients import SURROGATES, check_surrogate, heaviside

ALPHAS = (0.5, 1.0, 2.0, 5.0)

# Each surrogate is the derivative of one of these smooth steps from 0 to 1.
SMOOTH_STEPS = {
    "atan": lambda x, alpha: torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5,
    "sigmoid": lambda x, alpha: 1 / (1 + torch.exp(-alpha * x)),
    "triangle": lambda x, alpha: (lambda z: 0.5 + z - z * z.abs() / 2)((alpha * x).clamp(-1, 1)),
    "rectangle": lambda x, alpha: (alpha * x + 0.5).clamp(0, 1),
}
PEAKS = {"atan": 1 / 2, "sigmoid": 1 / 4, "triangle": 1.0, "rectangle": 1.0}

every_surrogate = pytest.mark.parametrize("surrogate", sorted(SURROGATES))
every_alpha = pytest.mark.parametrize("alpha", ALPHAS, ids=lambda alpha: f"alpha={alpha}")


def surrogate_gradient(x, surrogate, alpha, grad_output=None):
    x = x.detach().clone().requires_grad_()
    spikes = heaviside(x, surrogate, alpha)
    spikes.backward(torch.ones_like(spikes) if grad_output is None else grad_output)
    return x.grad


def test_every_surrogate_has_a_reference():
    assert set(SURROGATES) == set(SMOOTH_STEPS) == set(PEAKS)


@every_surrogate
@every_alpha
def test_is_the_derivative_of_its_smooth_step(surrogate, alpha):
    x = torch.linspace(-4.0137, 4.0091, 1001, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(SMOOTH_STEPS[surrogate](x, alpha).sum(), x)
    torch.testing.assert_close(SURROGATES[surrogate](x.detach(), alpha), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(surrogate_gradient(x, surrogate, alpha), expected, rtol=1e-10, atol=1e-12)


@every_surrogate
@every_alpha
def test_has_unit_area(surrogate, alpha):
    u = torch.linspace(-14, 14, 400_001, dtype=torch.float64)
    x = torch.sinh(u) / alpha
    area = torch.trapezoid(SURROGATES[surrogate](x, alpha), x)
    assert area.item() == pytest.approx(1, abs=1e-4)


@every_surrogate
@every_alpha
def test_is_symmetric_with_its_peak_at_zero(surrogate, alpha):
    x = torch.linspace(0, 6, 601, dtype=torch.float64)
    right, left = SURROGATES[surrogate](x, alpha), SURROGATES[surrogate](-x, alpha)
    torch.testing.assert_close(right, left, rtol=1e-12, atol=1e-15)
    assert right[0].item() == pytest.approx(PEAKS[surrogate] * alpha)
    assert (right.diff() <= 1e-15).all() and (right >= 0).all()
    assert right[-1] < right[0]


@every_surrogate
@every_alpha
def test_alpha_narrows_and_heightens(surrogate, alpha):
    # Away from the rectangle's edge at 1/2, where the last bit of the product decides.
    x = torch.linspace(-3.003, 3.001, 501, dtype=torch.float64)
    torch.testing.assert_close(SURROGATES[surrogate](x, alpha), alpha * SURROGATES[surrogate](alpha * x, 1.0))


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_values_and_dtype(surrogate, dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-math.inf, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, math.inf], dtype=dtype)
    spikes = heaviside(x, surrogate)
    assert spikes.dtype == dtype
    assert spikes.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


@every_surrogate
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_backward_multiplies_the_incoming_gradient(surrogate, dtype, tolerance):
    alpha = 2.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, generator=generator, dtype=torch.float64).to(dtype)
    grad_output = torch.randn(3, 50, generator=generator, dtype=torch.float64).to(dtype)
    gradient = surrogate_gradient(x, surrogate, alpha, grad_output)
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(SMOOTH_STEPS[surrogate](exact, alpha).sum(), exact)
    assert gradient.dtype == dtype
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(gradient.double(), grad_output.double() * slope, rtol=tolerance, atol=tolerance)


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_finite_however_far_the_potential(surrogate, dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, -top, -100.0, 0.0, 100.0, top, math.inf], dtype=dtype)
    gradient = surrogate_gradient(x, surrogate, 10.0)
    assert gradient.isfinite().all()
    assert gradient[3] == gradient.max() > 0
    assert gradient[0] == gradient[-1] == 0


def test_defaults_are_atan_with_alpha_2():
    x = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(heaviside(x).sum(), x)
    torch.testing.assert_close(gradient, surrogate_gradient(x, "atan", 2.0))


@every_surrogate
def test_spikes_need_no_gradient_to_flow(surrogate):
    assert not heaviside(torch.randn(4), surrogate).requires_grad
    with torch.no_grad():
        assert not heaviside(torch.randn(4, requires_grad=True), surrogate).requires_grad


@every_surrogate
@every_alpha
def test_ternary_spikes_use_it_at_both_thresholds(surrogate, alpha):
    generator = torch.Generator().manual_seed(0)
    neuron = BPSN(6, 2, spike_type="ternary", surrogate=surrogate, surrogate_alpha=alpha)
    potential = torch.randn(40, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    v_threshold = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    spikes = neuron.fire(potential, v_threshold)
    smooth = SMOOTH_STEPS[surrogate](potential - v_threshold, alpha)
    smooth = smooth - SMOOTH_STEPS[surrogate](-potential - v_threshold, alpha)
    assert set(spikes.unique().tolist()) == {-1, 0, 1}
    for got, expected in zip(
        torch.autograd.grad(spikes.sum(), (potential, v_threshold)),
        torch.autograd.grad(smooth.sum(), (potential, v_threshold)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@every_surrogate
def test_compiles_without_a_graph_break(surrogate):
    compiled = torch.compile(lambda x: heaviside(x, surrogate, 3.0), fullgraph=True, backend="aot_eager")
    x = torch.linspace(-1, 1, 21, requires_grad=True)
    spikes = compiled(x)
    (gradient,) = torch.autograd.grad(spikes.sum(), x)
    assert 0 < spikes.mean() < 1
    assert torch.equal(spikes, heaviside(x, surrogate, 3.0))
    torch.testing.assert_close(gradient, surrogate_gradient(x, surrogate, 3.0))


@pytest.mark.parametrize("check", [check_surrogate, lambda *a: heaviside(torch.zeros(2), *a)], ids=["check", "step"])
@pytest.mark.parametrize(
    ("surrogate", "alpha", "name"),
    [
        pytest.param("erf", 2.0, "`surrogate`", id="unknown"),
        pytest.param("", 2.0, "`surrogate`", id="empty"),
        pytest.param("atan", 0.0, "`surrogate_alpha`", id="alpha=0"),
        pytest.param("atan", -1.0, "`surrogate_alpha`", id="alpha<0"),
        pytest.param("atan", math.inf, "`surrogate_alpha`", id="alpha=inf"),
        pytest.param("atan", math.nan, "`surrogate_alpha`", id="alpha=nan"),
    ],
)
def test_bad_arguments_are_named(check, surrogate, alpha, name):
    with pytest.raises(ValueError, match=name):
        check(surrogate, alpha)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    x=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    alpha=st.floats(0.01, 100),
)
def test_any_potential_spikes_in_0_1_with_a_bounded_gradient(x, surrogate, alpha):
    x = torch.tensor(x, dtype=torch.float64)
    spikes = heaviside(x, surrogate, alpha)
    gradient = surrogate_gradient(x, surrogate, alpha)
    assert torch.equal(spikes, (x >= 0).double())
    assert (gradient >= 0).all() and (gradient <= PEAKS[surrogate] * alpha * (1 + 1e-12)).all()
