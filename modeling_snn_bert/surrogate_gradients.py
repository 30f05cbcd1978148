"""The Heaviside step of a spiking neuron and the surrogate gradients that stand in for its derivative.

A spiking neuron fires where its membrane potential reaches the threshold, `spike = H(v - v_threshold)`. The
derivative of the step `H` is zero nearly everywhere, so backpropagation uses a *surrogate*: a narrow bump around the
threshold. Every surrogate here has unit area, so it is the derivative of a smooth step from 0 to 1, and `alpha` sets
how narrow it is (a larger `alpha` is closer to the true step).

To add a surrogate, write its derivative as a function of `(x, alpha)` and enter it in `SURROGATES`: the neurons and
the configuration take their choices from there.
"""

import math
from collections.abc import Callable

import torch


def atan(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Derivative of `atan(pi/2 * alpha * x) / pi + 1/2`: `(alpha / 2) / (1 + (pi/2 * alpha * x)^2)`.

    Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", ICCV 2021. Heavy tails: every potential gets some gradient.
    """
    return (math.pi / 2 * alpha * x).square_().add_(1).reciprocal_().mul_(alpha / 2)


def sigmoid(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Derivative of the logistic function `S(alpha * x)`: `alpha * S(alpha x) * (1 - S(alpha x))`.

    Source: Zenke and Ganguli, "SuperSpike", Neural Computation 2018, who follow the same idea with a fast sigmoid;
    the logistic form is the one in Neftci, Mostafa and Zenke, IEEE Signal Processing Magazine 2019.
    """
    step = torch.sigmoid(alpha * x)
    return alpha * step * (1 - step)


def triangle(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """A tent of height `alpha` and half-width `1 / alpha`: `alpha * max(0, 1 - alpha * |x|)`.

    Source: Esser et al., "Convolutional Networks for Fast, Energy-Efficient Neuromorphic Computing", PNAS 2016, and
    Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", NeurIPS 2018.
    """
    return alpha * (1 - alpha * x.abs()).clamp(min=0)


def rectangle(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """A box of height `alpha` and half-width `1 / (2 alpha)`: `alpha * [|x| < 1 / (2 alpha)]`.

    Source: Wu et al., "Spatio-Temporal Backpropagation for Training High-Performance Spiking Neural Networks",
    Frontiers in Neuroscience 2018.
    """
    return alpha * (x.abs() < 1 / (2 * alpha)).to(x.dtype)


SURROGATES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "atan": atan,
    "sigmoid": sigmoid,
    "triangle": triangle,
    "rectangle": rectangle,
}


class HeavisideWithSurrogate(torch.autograd.Function):
    """`H(x)`, 1 where `x >= 0` and 0 elsewhere; its backward pass multiplies by `SURROGATES[surrogate](x, alpha)`."""

    @staticmethod
    def forward(x: torch.Tensor, surrogate: str, alpha: float) -> torch.Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.surrogate, ctx.alpha = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (x,) = ctx.saved_tensors
        return grad_output * SURROGATES[ctx.surrogate](x, ctx.alpha), None, None


def heaviside(x: torch.Tensor, surrogate: str = "atan", alpha: float = 2.0) -> torch.Tensor:
    """The Heaviside step with a surrogate gradient.

    Args:
        x (any shape, floating point): membrane potential minus threshold.
        surrogate: a key of `SURROGATES`.
        alpha: sharpness of the surrogate, > 0, in 1 / units of `x`.

    Returns:
        A tensor like `x` with values in {0, 1}; `H(0) = 1`.

    Raises:
        ValueError: if `surrogate` is not known or `alpha` is not positive.
    """
    check_surrogate(surrogate, alpha)
    return HeavisideWithSurrogate.apply(x, surrogate, float(alpha))


def fire(
    potential: torch.Tensor, v_threshold: torch.Tensor, surrogate: str, alpha: float, ternary: bool
) -> torch.Tensor:
    """Spikes where the potential reaches the threshold; ternary neurons also fire -1 at its mirror image."""
    spikes = heaviside(potential - v_threshold, surrogate, alpha)
    return spikes - heaviside(-potential - v_threshold, surrogate, alpha) if ternary else spikes


def check_surrogate(surrogate: str, alpha: float) -> None:
    """Raise a `ValueError` that names the argument unless `surrogate` is known and `alpha` is positive and finite."""
    if surrogate not in SURROGATES:
        raise ValueError(f"`surrogate` must be one of {sorted(SURROGATES)}, got {surrogate!r}")
    # Not by `math.isfinite`, which torch.compile cannot trace once a second width has made the number a symbol.
    if not 0 < alpha < math.inf:
        raise ValueError(f"`surrogate_alpha` must be positive and finite, got {alpha}")
