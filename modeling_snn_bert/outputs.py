"""What the models return: transformers' outputs, and beside them what the neurons did."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


@dataclass
class SpikingOutput:
    """What the neurons did, beside the fields of transformers' output of the same kind.

    Args:
        firing_rates (`tuple(torch.FloatTensor)`, *optional*, returned with `output_firing_rates=True`):
            One `[batch, channels]` tensor per neuron layer (the model's `neuron_names()` names them): the mean number
            of spikes per valid token.
        spikes (`tuple(torch.FloatTensor)`, *optional*, returned with `output_spikes=True`):
            One `[batch, seq_len, channels]` tensor per neuron layer, `[num_timesteps * batch, ...]` with repeat
            coding.
        firing_rate_penalty (`torch.FloatTensor` of shape `()`, *optional*, returned while training with a target):
            How far the firing rates exceed `config.firing_rate_target`, before `config.firing_rate_weight`; it is part
            of a head's loss.
    """

    firing_rates: tuple[torch.FloatTensor, ...] | None = None
    spikes: tuple[torch.FloatTensor, ...] | None = None
    firing_rate_penalty: torch.FloatTensor | None = None


# The mixin comes first: then its fields come last. `auto_docstring` reads a class's own docstring only.
@dataclass
class SNNBertModelOutput(SpikingOutput, BaseModelOutputWithPooling):
    __doc__ = SpikingOutput.__doc__


@dataclass
class SNNBertMaskedLMOutput(SpikingOutput, MaskedLMOutput):
    __doc__ = SpikingOutput.__doc__


@dataclass
class SNNBertSequenceClassifierOutput(SpikingOutput, SequenceClassifierOutput):
    __doc__ = SpikingOutput.__doc__


@dataclass
class SNNBertTokenClassifierOutput(SpikingOutput, TokenClassifierOutput):
    __doc__ = SpikingOutput.__doc__


@dataclass
class SNNBertQuestionAnsweringOutput(SpikingOutput, QuestionAnsweringModelOutput):
    __doc__ = SpikingOutput.__doc__


@dataclass
class SNNBertMultipleChoiceOutput(SpikingOutput, MultipleChoiceModelOutput):
    __doc__ = SpikingOutput.__doc__


def recorded(outputs: SNNBertModelOutput) -> dict[str, Any]:
    """What a head passes on from the base model's outputs."""
    names = ("hidden_states", "attentions", "firing_rates", "spikes", "firing_rate_penalty")
    return {name: outputs.get(name) for name in names}


def firing_rate(spikes: torch.Tensor, token_mask: torch.Tensor | None, num_timesteps: int = 1) -> torch.Tensor:
    """Mean number of spikes per valid token (and time-step), `[batch, channels]`.

    Args:
        spikes (`[num_timesteps * batch, seq_len, channels]`): spikes, 0 at masked tokens; -1 counts as one.
        token_mask (`[batch, seq_len]`, bool): True at valid tokens, False at padding.
        num_timesteps: time-steps of the repeat coding.
    """
    count = spikes.abs().sum(1)
    if num_timesteps > 1:
        count = count.unflatten(0, (num_timesteps, -1)).mean(0)
    if token_mask is None:
        return count / spikes.shape[1]
    return count / token_mask.sum(-1, keepdim=True).clamp(min=1).to(count.dtype)
