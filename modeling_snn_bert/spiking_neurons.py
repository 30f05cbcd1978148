"""Spiking neurons over a sequence of tokens (token = time-step): BPSN and the baselines LIF and PSN.

All neurons share one interface: input currents `[batch, seq_len, channels]` and an attention mask `[batch, seq_len]`
in, spikes of the same shape and dtype out. Spikes are in {0, 1}, or in {-1, 0, 1} with `spike_type="ternary"`, and
are 0 at masked tokens. Channels are cut into `num_groups` blocks of consecutive channels; decays and resets are
learned per group, thresholds per channel.
"""

import math
from typing import Any

import torch
from torch import nn

from .bpsn import bpsn, is_for_cpu_kernel, membrane_potential
from .cpu_kernels import warn_if_missing
from .leaky_integration import check_sequence, silence, widen
from .neuron_settings import BPSNParameters, BPSNSettings, check_bpsn, check_decay, check_neuron
from .packed_spikes import attach_packed, pack, packed_form
from .surrogate_gradients import fire


class SpikingNeuron(nn.Module):
    """What every neuron here has: a threshold per channel, a spike function, and the checks of its arguments.

    Subclasses define `spikes(current, attention_mask)` and the initial values of their parameters.

    Args:
        num_channels: channels of the current.
        num_groups: blocks of channels that share decays and reset; it divides the channels.
        v_threshold: initial threshold, in units of the potential.
        surrogate, surrogate_alpha: the surrogate gradient (see `surrogate_gradients`).
        spike_type: `"binary"` or `"ternary"`.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        v_threshold: float = 1.0,
        surrogate: str = "atan",
        surrogate_alpha: float = 2.0,
        spike_type: str = "binary",
    ) -> None:
        super().__init__()
        if num_channels < 1 or num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"`num_groups` must divide `num_channels`, both positive; got {num_groups} groups for {num_channels}"
            )
        check_neuron(
            v_threshold=v_threshold, surrogate=surrogate, surrogate_alpha=surrogate_alpha, spike_type=spike_type
        )
        self.num_channels = num_channels
        self.num_groups = num_groups
        self.initial_v_threshold = v_threshold
        self.surrogate = surrogate
        self.surrogate_alpha = surrogate_alpha
        self.spike_type = spike_type
        self.v_threshold = nn.Parameter(torch.empty(num_channels))

    def initial_values(self) -> dict[str, float]:
        """The value that each parameter starts from, by its name."""
        return {"v_threshold": self.initial_v_threshold}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for name, value in self.initial_values().items():
            getattr(self, name).fill_(value)

    def forward(self, current: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The spikes that the class describes.

        Args:
            current (`[batch, seq_len, num_channels]`, floating point): input current.
            attention_mask (`[batch, seq_len]`, bool or numeric): 1 at valid tokens, 0 at padding.

        Returns:
            Spikes of the shape and dtype of `current`, 0 at masked tokens. In training their packed form is attached
            (see `packed_spikes`). In autocast on a GPU a current in float32 is rounded to autocast's dtype first, as
            the input of a Linear is: half the bytes to move. On a CPU, whose kernels take float32, it is not.

        Raises:
            ValueError: if a shape is wrong, or is none that this neuron can take.
            TypeError: if `current` is not floating point.
        """
        self.check_current(current, attention_mask)
        if current.is_cuda and current.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            current = current.to(torch.get_autocast_dtype("cuda"))
        spikes = self.spikes(current, attention_mask)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and packed_form(spikes) is None:
            attach_packed(spikes, pack(spikes.detach(), self.spike_type == "ternary"))
        return spikes

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`forward` on arguments that have been checked."""
        raise NotImplementedError

    def fire(self, potential: torch.Tensor, v_threshold: torch.Tensor) -> torch.Tensor:
        """Spikes where the potential reaches the threshold; ternary neurons also fire -1 at its mirror image."""
        return fire(potential, v_threshold, self.surrogate, self.surrogate_alpha, self.spike_type == "ternary")

    def check_current(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Raise an error that names the argument unless the shapes are those that this neuron takes."""
        check_sequence(current, attention_mask)
        if current.shape[-1] != self.num_channels:
            raise ValueError(f"`current` must have {self.num_channels} channels, got {list(current.shape)}")

    def per_channel(self, value: torch.Tensor) -> torch.Tensor:
        """A value per group, `[groups]`, repeated for each channel of its group, `[channels]`."""
        return value.repeat_interleave(self.num_channels // self.num_groups)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {self.num_groups}, surrogate={self.surrogate!r}, spike_type={self.spike_type!r}"


class BPSN(SpikingNeuron):
    """The Bidirectional Parallel Spiking Neuron.

    Its membrane potential is a leaky mean of the currents of all valid tokens, earlier ones through
    `decay_forward` and later ones through `decay_backward`, and its spikes are found for all tokens at once. A
    provisional spike at one token lowers the potential at its neighbours (the soft reset), which keeps a charged
    neuron from firing without end:

        v[t]  = sum_j a[t, j] m[j] I[j] / n[t]
        s0[t] = H(v[t] - v_threshold)
        r[t]  = sum_{j != t} a[t, j] m[j] s0[j] / n[t]
        s[t]  = H(v[t] - reset * r[t] - v_threshold)

    with `a`, `m` and `n` of `leaky_integration`. The last two lines are one step of the fixed-point iteration whose
    limit, for a forward-only neuron without normalisation and with `reset = v_threshold`, is the spike train of the
    leaky integrate-and-fire neuron with soft reset. The idea of the neuron is that of Su et al., "SNN-BERT", Neural
    Networks 180, 2024, whose equations are not public; these are this project's own.

    Args:
        num_channels, num_groups, v_threshold, surrogate, surrogate_alpha, spike_type: as for `SpikingNeuron`.
        decay: initial decay per token in both directions, in (0, 1).
        reset: initial strength of the reset, >= 0.
        reset_iterations: sweeps of the reset; 0 switches it off. The sweeps alternate: an odd one starts from too
            many spikes and an even one from too few, so with a strong reset a few more sweeps are not better.
        normalize: divide by `n[t]`. Without it the potential is a plain leaky sum.
        bidirectional: integrate in both directions; otherwise from earlier to later tokens only.
        implementation: how the integration is computed (see `leaky_integration`).

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        decay: float = 0.05,
        reset: float = 0.05,
        reset_iterations: int = 1,
        normalize: bool = True,
        bidirectional: bool = True,
        implementation: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(num_channels, num_groups, **common)
        check_bpsn(decay=decay, reset=reset, reset_iterations=reset_iterations, implementation=implementation)
        self.initial_decay = decay
        self.initial_reset = reset
        self.reset_iterations = reset_iterations
        self.normalize = normalize
        self.bidirectional = bidirectional
        self.implementation = implementation
        self.decay_forward_logit = nn.Parameter(torch.empty(num_groups))
        if bidirectional:
            self.decay_backward_logit = nn.Parameter(torch.empty(num_groups))
        if reset_iterations:
            # Used through its absolute value: never negative, exact, with a gradient everywhere (see `BPSNParameters`).
            self.reset_strength = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def initial_values(self) -> dict[str, float]:
        values = super().initial_values()
        values["decay_forward_logit"] = logit(self.initial_decay)
        if self.bidirectional:
            values["decay_backward_logit"] = logit(self.initial_decay)
        if self.reset_iterations:
            values["reset_strength"] = self.initial_reset
        return values

    @property
    def learned(self) -> BPSNParameters:
        """The parameters, of which some neurons lack some."""
        backward = self.decay_backward_logit if self.bidirectional else None
        reset = self.reset_strength if self.reset_iterations else None
        return BPSNParameters(self.v_threshold, self.decay_forward_logit, backward, reset)

    @property
    def settings(self) -> BPSNSettings:
        """What says, beside the parameters, how spikes follow from currents."""
        return BPSNSettings(
            self.normalize,
            self.reset_iterations,
            self.spike_type == "ternary",
            self.surrogate,
            self.surrogate_alpha,
            self.implementation,
        )

    @property
    def decay_forward(self) -> torch.Tensor:
        """Decay per token from earlier to later tokens, `[groups]`."""
        return self.learned.decay_forward

    @property
    def decay_backward(self) -> torch.Tensor:
        """Decay per token from later to earlier tokens, `[groups]`; zeros if the neuron looks forward only."""
        return self.learned.decay_backward

    @property
    def soft_reset(self) -> torch.Tensor:
        """Strength of the soft reset, `[groups]`; zeros if it is switched off."""
        return self.learned.reset

    def membrane_potential(self, current: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The potential `v` before any reset.

        Args:
            current (`[batch, seq_len, channels]`): input current.
            attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.

        Returns:
            `[batch, seq_len, channels]` in the dtype of `current`, 0 at masked tokens.
        """
        self.check_current(current, attention_mask)
        return membrane_potential(current, attention_mask, self.learned, self.settings)

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        learned, settings = self.learned, self.settings
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and is_for_cpu_kernel(current, learned, settings):
            warn_if_missing()
        spikes, packed = bpsn(current, attention_mask, learned, settings)
        return spikes if packed is None else attach_packed(spikes, packed)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, reset_iterations={self.reset_iterations}, normalize={self.normalize}, "
            f"bidirectional={self.bidirectional}"
        )


class LIF(SpikingNeuron):
    """The leaky integrate-and-fire neuron with soft reset, stepped one after the other (the baseline).

        v[t] = decay * (v[t - 1] - v_threshold * s[t - 1]) + I[t],    s[t] = H(v[t] - v_threshold)

    The reset carries no gradient. With `num_timesteps=None` the time-steps are the tokens (individual coding). With
    a number, the batch holds that many copies of the input, `[num_timesteps * batch, seq_len, channels]` with the
    time-step as the slowest index, and the neuron of each token steps through them (repeat coding).

    Args:
        num_channels, num_groups, v_threshold, decay, surrogate, surrogate_alpha, spike_type: as for `SpikingNeuron`.
        num_timesteps: time-steps of the repeat coding, or `None` to step through the tokens.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, num_channels: int, num_groups: int, *, decay: float = 0.5, num_timesteps: int | None = None, **common: Any
    ) -> None:
        super().__init__(num_channels, num_groups, **common)
        check_decay(decay)
        if num_timesteps is not None and num_timesteps < 1:
            raise ValueError(f"`num_timesteps` must be >= 1 or None, got {num_timesteps}")
        self.initial_decay = decay
        self.num_timesteps = num_timesteps
        self.decay_logit = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def initial_values(self) -> dict[str, float]:
        return {**super().initial_values(), "decay_logit": logit(self.initial_decay)}

    @property
    def decay(self) -> torch.Tensor:
        """Decay per time-step, `[groups]`."""
        return torch.sigmoid(widen(self.decay_logit))

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.num_timesteps is None:
            time_dim, steps = 1, widen(current)
        else:
            if current.shape[0] % self.num_timesteps:
                raise ValueError(
                    f"`current` must hold {self.num_timesteps} time-steps along the batch, got {list(current.shape)}"
                )
            time_dim, steps = 0, widen(current).unflatten(0, (self.num_timesteps, -1))
        mask = current.new_ones(current.shape[:2]) if attention_mask is None else attention_mask
        silent = (mask == 0).reshape(*steps.shape[:-1], 1)
        steps = steps.masked_fill(silent, 0)
        decay = self.per_channel(self.decay.to(steps.dtype))
        v_threshold = self.v_threshold.to(steps.dtype)
        charge = torch.zeros_like(steps.select(time_dim, 0))
        spikes = []
        for step, is_silent in zip(steps.unbind(time_dim), silent.unbind(time_dim), strict=True):
            potential = decay * charge + step
            # A masked token neither fires nor resets.
            spikes.append(self.fire(potential, v_threshold).masked_fill(is_silent, 0))
            charge = potential - v_threshold.detach() * spikes[-1].detach()
        return torch.stack(spikes, time_dim).reshape(current.shape).to(current.dtype)


class PSN(SpikingNeuron):
    """The Parallel Spiking Neuron with a learned `T x T` matrix and no reset (the baseline).

        v = W I,    s[t] = H(v[t] - v_threshold)

    with `W` shared by all channels, as in Fang et al., "Parallel Spiking Neurons with High Efficiency and Ability to
    Learn Long-term Dependencies", NeurIPS 2023. Its length is fixed. `W` starts as the identity.

    Args:
        num_channels, num_groups, v_threshold, surrogate, surrogate_alpha, spike_type: as for `SpikingNeuron`.
        length: the number of tokens `T` that it takes.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, num_channels: int, num_groups: int, *, length: int, **common: Any) -> None:
        super().__init__(num_channels, num_groups, **common)
        if length < 1:
            raise ValueError(f"`length` must be >= 1, got {length}")
        self.length = length
        self.weight = nn.Parameter(torch.empty(length, length))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.copy_(torch.eye(self.length))

    def spikes(self, current: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if current.shape[1] != self.length:
            raise ValueError(
                f"a PSN has weights for exactly {self.length} tokens, got seq_len = {current.shape[1]}: pad or cut "
                "the input to that length, or use a neuron that takes any length (neuron_type='bpsn')"
            )
        x = silence(widen(current), attention_mask)
        with torch.autocast(x.device.type, enabled=False):
            potential = torch.einsum("tj,bjc->btc", self.weight.to(x.dtype), x)
        spikes = self.fire(potential, self.v_threshold.to(x.dtype))
        return silence(spikes, attention_mask).to(current.dtype)


def logit(decay: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(decay / (1 - decay))
