"""What the neurons are set to: the ranges of their settings, and the types in which those of a `BPSN` travel.

The configuration and the neurons check a setting by the same function.
"""

import math
from typing import NamedTuple

import torch

from .leaky_integration import check_implementation, widen
from .surrogate_gradients import check_surrogate

SPIKE_TYPES = ("binary", "ternary")


class BPSNValues(NamedTuple):
    """The numbers of a `BPSN`'s equations, in the dtype that it integrates in, and in the order of its operators."""

    v_threshold: torch.Tensor
    decay_forward: torch.Tensor
    decay_backward: torch.Tensor
    reset: torch.Tensor


class BPSNParameters(NamedTuple):
    """What a `BPSN` trains: a threshold per channel, and for each group its decays as logits and its reset.

    A kernel may read them as they are; whoever computes with their values takes `values`.
    """

    v_threshold: torch.Tensor
    decay_forward_logit: torch.Tensor
    # `None` for a neuron that looks forward only, and for one without a reset.
    decay_backward_logit: torch.Tensor | None
    reset_strength: torch.Tensor | None

    @property
    def decay_forward(self) -> torch.Tensor:
        return torch.sigmoid(widen(self.decay_forward_logit))

    @property
    def decay_backward(self) -> torch.Tensor:
        if self.decay_backward_logit is None:
            return torch.zeros_like(self.decay_forward_logit)
        return torch.sigmoid(widen(self.decay_backward_logit))

    @property
    def reset(self) -> torch.Tensor:
        if self.reset_strength is None:
            return torch.zeros_like(self.decay_forward_logit)
        # Not `abs()`, whose gradient at 0 is 0: a reset that starts there could never grow.
        return torch.where(self.reset_strength < 0, -self.reset_strength, self.reset_strength)

    def values(self, dtype: torch.dtype) -> BPSNValues:
        """The numbers of the equations, differentiably."""
        values = self.v_threshold, self.decay_forward, self.decay_backward, self.reset
        return BPSNValues(*(x.to(dtype) for x in values))


class BPSNSettings(NamedTuple):
    """The settings of a `BPSN` that say how its spikes follow from currents and parameters; see there."""

    normalize: bool = True
    reset_iterations: int = 1
    ternary: bool = False
    surrogate: str = "atan"
    surrogate_alpha: float = 2.0
    implementation: str = "auto"


def check_neuron(*, v_threshold: float, surrogate: str, surrogate_alpha: float, spike_type: str) -> None:
    """Raise a `ValueError` that names the setting unless those that every neuron has are in their ranges."""
    if not math.isfinite(v_threshold):
        raise ValueError(f"`v_threshold` must be finite, got {v_threshold}")
    check_surrogate(surrogate, surrogate_alpha)
    if spike_type not in SPIKE_TYPES:
        raise ValueError(f"`spike_type` must be one of {list(SPIKE_TYPES)}, got {spike_type!r}")


def check_decay(decay: float) -> None:
    """The same for the decay: it must be the sigmoid of a logit."""
    if not 0 < decay < 1:
        raise ValueError(f"`decay` must lie in (0, 1), got {decay}")


def check_bpsn(*, decay: float, reset: float, reset_iterations: int, implementation: str) -> None:
    """The same for the settings of a `BPSN`."""
    check_decay(decay)
    if not (math.isfinite(reset) and reset >= 0):
        raise ValueError(f"`reset` must be finite and >= 0, got {reset}")
    if reset_iterations < 0:
        raise ValueError(f"`reset_iterations` must be >= 0, got {reset_iterations}")
    check_implementation(implementation)
