"""Losses that teach an SNN-BERT what its BERT teacher does, and the optimiser's parameter groups."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from .conversion import is_neuron_parameter
from .packed_spikes import SpikingLinear
from .sparsity import add_penalty


def check_same_shape(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless both have the same vocabulary size and hidden states of the same number and width."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(student, name) != getattr(teacher, name):
            raise ValueError(
                f"the student must have the {name} of its teacher, {getattr(teacher, name)}; "
                f"it has {getattr(student, name)}"
            )


def hidden_state_loss(
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error of the hidden states at valid tokens, in units of the teacher's variance, averaged over layers.

    Args:
        student_states: one `[batch, seq_len, hidden]` tensor per layer, as from `output_hidden_states=True`. The
            first one, the embeddings, is left out of the loss. With repeat coding, `[num_timesteps * batch, ...]`
            states are averaged over the time-steps first.
        teacher_states: the same of the teacher.
        attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.

    Returns:
        A scalar; 1 is what predicting the teacher's mean would give.

    Raises:
        ValueError: if the two have different numbers of layers or shapes.
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(
            f"student and teacher must have as many hidden states, got {len(student_states)} and {len(teacher_states)}"
        )
    losses = []
    for student, teacher in _pairs("states", student_states[1:], teacher_states[1:]):
        variance = _mean_over_tokens((teacher - _mean_over_tokens(teacher, attention_mask)).square(), attention_mask)
        error = _mean_over_tokens((student - teacher).square(), attention_mask)
        losses.append(error.mean() / variance.mean().clamp(min=1e-6))
    return torch.stack(losses).mean()


def _pairs(
    what: str, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Student and teacher of each layer in float32, a student with repeat coding averaged over its time-steps."""
    for student, teacher in zip(students, teachers, strict=True):
        student = _averaged(student, teacher.shape[0])
        if student.shape != teacher.shape:
            raise ValueError(
                f"student and teacher {what} must agree in shape, got {list(student.shape)} and {list(teacher.shape)}"
            )
        yield student.float(), teacher.float()


def _averaged(student: torch.Tensor, batch: int) -> torch.Tensor:
    """The mean over time-steps of what a student with repeat coding gives for `batch` rows."""
    if student.shape[0] != batch and student.shape[0] % batch == 0:
        return student.unflatten(0, (-1, batch)).mean(0)
    return student


def _mean_over_tokens(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of `x`, `[batch, seq_len, ...]`, over valid tokens.

    By a sum and not by picking them out: that would make a GPU wait for their number.
    """
    if attention_mask is None:
        return x.flatten(0, 1).mean(0)
    valid = (attention_mask != 0).unflatten(1, (-1, *[1] * (x.dim() - 2)))
    return torch.where(valid, x, 0).sum((0, 1)) / valid.sum().clamp(min=1)


def attention_loss(
    student_attentions: Sequence[torch.Tensor],
    teacher_attentions: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's attention weights from the teacher's, per valid query and head.

    Args:
        student_attentions, teacher_attentions: one `[batch, heads, seq_len, seq_len]` tensor per layer, as from
            `output_attentions=True` with `attn_implementation="eager"`; each row sums to 1. With repeat coding the
            student's, `[num_timesteps * batch, ...]`, are averaged over the time-steps first.
        attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.

    Returns:
        A scalar in nats, the mean over layers.

    Raises:
        ValueError: if the two have different numbers of layers or shapes, or hold no weights at all.
    """
    if not student_attentions or len(student_attentions) != len(teacher_attentions or ()):
        raise ValueError(
            "student and teacher must have as many attention weights, at least one layer's, got "
            f"{len(student_attentions or ())} and {len(teacher_attentions or ())}: load both with "
            "`attn_implementation='eager'`"
        )
    losses = []
    for student, teacher in _pairs("attentions", student_attentions, teacher_attentions):
        student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
        # Weights of 0, at padding, are the teacher's as well and must not become -inf times 0.
        divergence = torch.xlogy(teacher, teacher) - teacher * student.clamp(min=1e-9).log()
        losses.append(_mean_over_tokens(divergence.sum(-1), attention_mask).mean())
    return torch.stack(losses).mean()


def relation_loss(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    relation_heads: int,
) -> torch.Tensor:
    """Squared error of the student's relations between tokens, in units of the variance of the teacher's.

    The states are cut into `relation_heads` parts. A relation is the cosine between a part of one token and that of
    another one of the same row, both less the mean over the batch's tokens: student and teacher need not be equally
    wide, nor have states of one scale.

    Sources: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation", 2021, for relations in parts;
    Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, for the squared error of normalised products.
    (MiniLMv2's softmax over scaled products says little here: in the last layer of a sentence encoder it is almost
    uniform.)

    Args:
        student_states (`[batch, seq_len, hidden]`): hidden states of a layer. With repeat coding, `[num_timesteps *
            batch, ...]` states are averaged over the time-steps first.
        teacher_states (`[batch, seq_len, teacher_hidden]`): those of a layer of the teacher, at the same tokens.
        attention_mask (`[batch, seq_len]`): 1 at valid tokens, 0 at padding.
        relation_heads: parts that the states are cut into.

    Returns:
        A scalar; 1 is what predicting the mean of the teacher's relations would give.

    Raises:
        ValueError: if the states are of other tokens, or a width is no multiple of `relation_heads`.
    """
    batch, seq_len = teacher_states.shape[:2]
    if attention_mask is None:
        attention_mask = teacher_states.new_ones(batch, seq_len, dtype=torch.long)
    valid = attention_mask != 0
    # Each two valid tokens, one before the other: a token's relation to itself says nothing.
    counted = (valid[:, :, None] & valid[:, None]).triu(1)[:, None]

    def relations(states: torch.Tensor) -> torch.Tensor:
        if relation_heads < 1 or states.shape[-1] % relation_heads:
            raise ValueError(
                f"`relation_heads` must divide the width of the states, {states.shape[-1]}, got {relation_heads}"
            )
        states = states.float()
        centred = (states - _mean_over_tokens(states, attention_mask)).unflatten(-1, (relation_heads, -1))
        parts = nn.functional.normalize(centred.transpose(1, 2), dim=-1)
        return parts @ parts.transpose(-1, -2)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.where(counted, 0).sum() / (relation_heads * counted.sum()).clamp(min=1)

    student_states = _averaged(student_states, batch)
    if student_states.shape[:2] != (batch, seq_len):
        raise ValueError(
            "student and teacher states must be of the same tokens, got "
            f"{list(student_states.shape)} and {list(teacher_states.shape)}"
        )
    with torch.autocast(student_states.device.type, enabled=False):
        student, teacher = relations(student_states), relations(teacher_states)
    # A few tokens may be related all alike.
    return mean((student - teacher).square()) / mean((teacher - mean(teacher)).square()).clamp(min=1e-2)


def mean_embeddings(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of each sentence's valid tokens, `[sentences, hidden]`, in float32 under autocast too.

    Args:
        states (`[sentences, seq_len, hidden]`): hidden states.
        attention_mask (`[sentences, seq_len]`): 1 at valid tokens, 0 at padding.
    """
    valid = attention_mask[..., None].to(torch.float32)
    return (states.float() * valid).sum(1) / valid.sum(1)


def embedding_loss(
    student_states: torch.Tensor, teacher_states: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Squared error of the mean embeddings, in units of the variance of the teacher's over the sentences.

    Args:
        student_states, teacher_states (`[sentences, seq_len, hidden]`): last hidden states, of two sentences or more:
            one has no variance.
        attention_mask (`[sentences, seq_len]`): 1 at valid tokens, 0 at padding.

    Raises:
        ValueError: if the states differ in shape.
    """
    if student_states.shape != teacher_states.shape:
        raise ValueError(
            f"states must agree in shape, got {list(student_states.shape)} and {list(teacher_states.shape)}"
        )
    student, teacher = mean_embeddings(student_states, attention_mask), mean_embeddings(teacher_states, attention_mask)
    return (student - teacher).square().mean() / (teacher - teacher.mean(0)).square().mean().clamp(min=1e-6)


def logit_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """The mean of `logit_losses` over the rows."""
    return logit_losses(student_logits, teacher_logits, temperature).mean()


def logit_losses(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """Kullback-Leibler divergence of the softened class probabilities, times `temperature ** 2`, of each row: `[...]`.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015. With one logit
    (regression) it is the squared error.

    Args:
        student_logits, teacher_logits (`[..., classes]`): logits before the softmax.
        temperature: > 0.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits must agree in shape, got {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}")
    # A teacher's are in bfloat16 under autocast.
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    if student_logits.shape[-1] == 1:
        return nn.functional.mse_loss(student_logits, teacher_logits, reduction="none")[..., 0]
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2


def label_and_logit_loss(
    outputs: SequenceClassifierOutput,
    teacher_logits: torch.Tensor,
    logit_weight: float,
    *,
    firing_rate_weight: float = 0.0,
    temperature: float = 2.0,
) -> torch.Tensor:
    """The labels' loss of a head and `logit_loss` on its teacher, weighted.

    The head's loss holds the penalty on firing rates, if there is a target. That keeps its weight, however little the
    labels count.

    Args:
        outputs: of the student's head, with the labels' loss.
        teacher_logits: as for `logit_loss`.
        logit_weight: share of the teacher's logits, in [0, 1]; the labels have the rest.
        firing_rate_weight: that of the student's configuration.
        temperature: as for `logit_loss`.

    Raises:
        ValueError: if `outputs` has no loss, or an argument is outside its range.
    """
    if outputs.loss is None:
        raise ValueError("`outputs` must have a loss: call the student with `labels`")
    if not 0 <= logit_weight <= 1:
        raise ValueError(f"`logit_weight` must lie in [0, 1], got {logit_weight}")
    loss = (1 - logit_weight) * outputs.loss + logit_weight * logit_loss(outputs.logits, teacher_logits, temperature)
    return add_penalty(loss, outputs, logit_weight * firing_rate_weight)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    neuron_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    muon_learning_rate: float | None = None,
) -> list[dict]:
    """Parameter groups for a torch optimiser: weights with weight decay; biases and norms without; neurons apart.

    Thresholds and logits of decays are of unit scale, where weights are of the order of 0.05, so with an optimiser
    that moves every parameter by about the learning rate the neurons hardly move at the weights' rate.

    Args:
        model: an SNN-BERT, or any module (a BERT has no neurons and gets two groups).
        learning_rate: for everything but the neurons, > 0.
        neuron_learning_rate: for the neurons; defaults to 10 times `learning_rate`.
        weight_decay: for the weights of Linears and embeddings, >= 0.
        muon_learning_rate: for the weights that take spikes, which are then a group for the Muon of `MuonAdamW`: the
            share of their size by which a step moves them. `None` leaves them among the other weights.

    Raises:
        ValueError: if a number is outside its range, or Muon has no weights to move.
    """
    if neuron_learning_rate is None:
        neuron_learning_rate = 10 * learning_rate
    rates = [x for x in (learning_rate, neuron_learning_rate, muon_learning_rate) if x is not None]
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"learning rates must be positive, got {' and '.join(map(str, rates))}")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must be >= 0, got {weight_decay}")
    groups: list[dict] = [
        {"params": [], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [], "lr": neuron_learning_rate, "weight_decay": 0.0},
        {"params": [], "lr": muon_learning_rate, "weight_decay": weight_decay, "muon": True},
    ]
    weights, others, neurons, matrices = (group["params"] for group in groups)
    of_spikes = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SpikingLinear)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_neuron_parameter(name):
            neurons.append(parameter)
        elif muon_learning_rate is not None and name in of_spikes:
            matrices.append(parameter)
        else:
            (weights if parameter.dim() > 1 else others).append(parameter)
    if muon_learning_rate is not None and not matrices:
        raise ValueError(f"`muon_learning_rate` is for weights that take spikes; {type(model).__name__} trains none")
    return [group for group in groups if group["params"]]
