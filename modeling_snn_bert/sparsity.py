"""Sparsity control: a penalty on firing rates above a target, for the training loss.

Energy and event-driven speed both follow the firing rate, so the target moves a model along the line of accuracy
against cost. With the rate `r` of each neuron layer, its spikes per channel, valid token and time-step,

    penalty = mean over neuron layers of max(0, r / firing_rate_target - 1)^2

It is relative, so that one weight serves all targets; it leaves a layer below the target alone; and it holds the mean
of a layer rather than every channel, so that channels that matter may fire often. Its gradient reaches thresholds,
decays and weights through the surrogate.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .spike_observer import Firing, SpikeObserver

PENALTY_IS_MISSING = (
    "`firing_rate_target` is set, but the loss of this training step does not hold the penalty on firing rates: it was "
    "not computed by the model's head. Give Trainer `compute_loss_func=loss_with_penalty(...)`, or add "
    "`config.firing_rate_weight * outputs.firing_rate_penalty` to the loss (docs/fine_tuning.md shows both), or set "
    "`firing_rate_target` to None."
)


class SpikeCount(torch.autograd.Function):
    """Number of spikes in a tensor of any shape, as a scalar; a spike of -1 counts as one.

    Saves no tensor of floats: nothing for binary spikes, signs as bytes for ternary ones. They are kept on the context
    and not by `save_for_backward`, since gradient checkpointing runs the layer again without counting and wants to
    see the same tensors saved both times.
    """

    @staticmethod
    def forward(ctx, spikes: torch.Tensor, ternary: bool) -> torch.Tensor:
        ctx.shape, ctx.dtype = spikes.shape, spikes.dtype
        ctx.signs = spikes.to(torch.int8) if ternary else None
        return torch.count_nonzero(spikes).to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_count: torch.Tensor):
        grad_count = grad_count.to(ctx.dtype)
        if ctx.signs is None:
            return grad_count.expand(ctx.shape), None
        return ctx.signs * grad_count, None


class FiringRateRecorder(SpikeObserver):
    """While it is entered, counts the spikes of every neuron layer of `model`, with gradients.

    Args:
        model: a model with neurons.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Spikes, channels, and tokens with padding of each neuron layer.
        self.counts: list[tuple[torch.Tensor, int, int]] = []
        # Of the first layer that a gradient can reach, for `warn_unless_counted`.
        self.spikes: torch.Tensor | None = None
        self.without_gradient = False
        # What stands before a neuron; not the pooler, which may train without the neurons.
        self.trains = [
            parameter for name, part in model.named_children() if name != "pooler" for parameter in part.parameters()
        ]

    def see(self, firing: Firing) -> None:
        spikes, neuron = firing.spikes, firing.neuron
        if self.spikes is None and spikes.requires_grad:
            self.spikes = spikes
        # Re-entrant checkpointing runs a layer without a graph first, and again, with one, after the loss is made.
        self.without_gradient |= not torch.is_grad_enabled()
        count = SpikeCount.apply(spikes, neuron.spike_type == "ternary")
        self.counts.append((count, neuron.num_channels, spikes.shape[0] * spikes.shape[1]))

    def rates(self, attention_mask: torch.Tensor | None = None, num_timesteps: int = 1) -> list[torch.Tensor]:
        """The firing rate of every neuron layer, as scalars.

        Args:
            attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.
            num_timesteps: time-steps of the repeat coding.

        Raises:
            RuntimeError: if spikes carry no gradient although something of the model trains, as under re-entrant
                checkpointing.
        """
        wanted = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.trains)
        if wanted and self.without_gradient:
            raise RuntimeError(
                "the firing rates carry no gradient, so `firing_rate_target` would have no effect: use gradient "
                "checkpointing with `gradient_checkpointing_kwargs={'use_reentrant': False}`"
            )
        valid = None if attention_mask is None else (num_timesteps * attention_mask.sum()).clamp(min=1).float()
        return [count / (channels * (tokens if valid is None else valid)) for count, channels, tokens in self.counts]


def firing_rate_penalty(rates: Sequence[torch.Tensor], firing_rate_target: float) -> torch.Tensor:
    """The mean over neuron layers of `max(0, rate / firing_rate_target - 1) ** 2`.

    Args:
        rates: the firing rate of every neuron layer, as scalars or tensors whose mean it is (`firing_rates` of the
            models' outputs, for sequences of equal length).
        firing_rate_target: > 0.

    Returns:
        A scalar; 1 if every neuron layer fires twice as often as it should.

    Raises:
        ValueError: if there are no rates or the target is not positive.
    """
    if not rates:
        raise ValueError("`rates` must hold at least one neuron layer's firing rate")
    if not firing_rate_target > 0:
        raise ValueError(f"`firing_rate_target` must be positive, got {firing_rate_target}")
    excess = torch.stack([rate.float().mean() for rate in rates]) / firing_rate_target - 1
    return excess.clamp(min=0).square().mean()


def warn_unless_counted(penalty: torch.Tensor, spikes: torch.Tensor | None) -> None:
    """Warn at the end of the backward pass if it reached `spikes` and the penalty was no part of the loss.

    A head adds the penalty to the loss that it computes itself. A loss that is computed elsewhere (label smoothing,
    weighted classes, a loss function of one's own) leaves it out unless its author adds it, and nothing else shows it.

    Args:
        penalty: of this forward pass.
        spikes: of a neuron layer, which the gradient of every loss passes; None if none carries a gradient.
    """
    if spikes is None or not penalty.requires_grad or torch.compiler.is_compiling():
        return
    counted = False

    def count(grad: torch.Tensor) -> None:
        nonlocal counted
        counted = True

    def check() -> None:
        if not counted:
            warnings.warn(PENALTY_IS_MISSING, UserWarning, stacklevel=2)

    penalty.register_hook(count)
    # Only at the end of the pass is it known what it has reached.
    spikes.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(check))


def share_of_labels(
    labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs: Any
) -> torch.Tensor | float:
    """The part of a batch's labels that `labels` holds; 1 unless the loss is a sum over `num_items_in_batch`.

    Such losses are added up over the micro-batches and processes, and nobody divides them by their number. With this
    share the penalties of all of them add up to a mean, weighted as the loss is.
    """
    if num_items_in_batch is None:
        return 1.0
    count = (labels != -100).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(count.device)
    return count / num_items_in_batch


def add_penalty(
    loss: torch.Tensor, outputs: Any, firing_rate_weight: float, share: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """`loss` with the penalty on firing rates, if a model's outputs have one.

    Args:
        loss: a scalar.
        outputs: of an SNN-BERT; those of another model have no penalty.
        firing_rate_weight: as in the model's configuration.
        share: the part that `loss` is of the batch's, as of `share_of_labels`.
    """
    penalty = getattr(outputs, "firing_rate_penalty", None)
    return loss if penalty is None else loss + share * firing_rate_weight * penalty


def loss_with_penalty(
    compute_loss: Callable[..., torch.Tensor], firing_rate_weight: float
) -> Callable[..., torch.Tensor]:
    """A loss function for `Trainer(compute_loss_func=...)` that counts the penalty on firing rates.

    Args:
        compute_loss: takes a model's outputs, the labels and `num_items_in_batch`, and returns the loss: a sum over
            the labels divided by `num_items_in_batch`, or their mean where that is `None`.
        firing_rate_weight: as in the model's configuration.

    Returns:
        A function of these arguments. Without a penalty in the outputs, as in evaluation, it is `compute_loss`.
    """

    def compute(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = compute_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        return add_penalty(loss, outputs, firing_rate_weight, share_of_labels(labels, num_items_in_batch))

    return compute
