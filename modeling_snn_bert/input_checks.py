"""Checks of what a model is given: each error names the argument, what was given and what is wanted."""

import torch

from .configuration_snn_bert import SNNBertConfig


def values_can_be_read(x: torch.Tensor) -> bool:
    """Whether looking at values is possible (not while tracing) and free (not where it would stall a GPU)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def check_inputs(
    config: SNNBertConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> torch.Tensor:
    """Raise an error that names the argument, what was given and what is wanted. Values are checked on a CPU only.

    Returns whichever of `input_ids` and `inputs_embeds` was given.
    """
    if input_ids is not None and inputs_embeds is None:
        given = input_ids
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have the shape [batch, seq_len], got {list(input_ids.shape)}")
        shape = input_ids.shape
    elif inputs_embeds is not None and input_ids is None:
        given = inputs_embeds
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"`inputs_embeds` must have the shape [batch, seq_len, {config.hidden_size}], "
                f"got {list(inputs_embeds.shape)}"
            )
        shape = inputs_embeds.shape[:-1]
    else:
        raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
    if shape[1] == 0 or shape[0] == 0:
        raise ValueError(f"the batch must hold at least one sequence of at least one token, got {list(shape)}")
    if position_ids is None and shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"the sequences have {shape[1]} tokens, but the model has {config.max_position_embeddings} position "
            "embeddings: truncate the input (`truncation=True, max_length=...` in the tokenizer)"
        )
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"`attention_mask` must have the shape [batch, seq_len] = {list(shape)}, got {list(attention_mask.shape)}: "
            "the neurons need to know which tokens are valid, so masks per pair of tokens are not supported"
        )
    for name, ids, upper in (
        ("input_ids", input_ids, config.vocab_size),
        ("position_ids", position_ids, config.max_position_embeddings),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        if ids is None:
            continue
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`{name}` must be int64 or int32, got {ids.dtype}")
        if ids.shape not in (shape, (1, shape[1]), shape[1:]):
            raise ValueError(f"`{name}` must have the shape [batch, seq_len] = {list(shape)}, got {list(ids.shape)}")
        if values_can_be_read(ids):
            low, high = ids.aminmax()
            if low < 0 or high >= upper:
                raise ValueError(f"`{name}` must lie in [0, {upper}), got values from {low.item()} to {high.item()}")
    if (
        attention_mask is not None
        and attention_mask.dtype != torch.bool
        and values_can_be_read(attention_mask)
        and bool(((attention_mask != 0) & (attention_mask != 1)).any())
    ):
        raise ValueError("`attention_mask` must hold 1 at valid tokens and 0 at padding only")
    if inputs_embeds is not None and values_can_be_read(inputs_embeds):
        valid = inputs_embeds if attention_mask is None else inputs_embeds[attention_mask != 0]
        if not bool(valid.isfinite().all()):
            raise ValueError("`inputs_embeds` holds NaN or infinite values at valid tokens")
    return given


def check_labels(labels: torch.Tensor, shape: torch.Size, num_labels: int, ignore_index: int | None = None) -> None:
    """Raise a clear error unless `labels` has `shape` and values in [0, num_labels), or `ignore_index`."""
    if labels.dtype != torch.int64:
        raise TypeError(f"`labels` must be int64 classes, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"`labels` must have the shape {list(shape)}, got {list(labels.shape)}")
    if values_can_be_read(labels):
        wrong = (labels < 0) | (labels >= num_labels)
        if ignore_index is not None:
            wrong = wrong & (labels != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"`labels` must lie in [0, {num_labels}), the number of classes of the model, "
                f"got {labels[wrong][0].item()}: load the model with the right `num_labels`"
            )


def check_sequence_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str | None) -> None:
    """The same for a sequence classifier, whose labels depend on the type of its problem."""
    batch, num_labels = logits.shape
    is_integer = labels.dtype in (torch.long, torch.int)
    if problem_type == "single_label_classification" or (problem_type is None and num_labels > 1 and is_integer):
        if not is_integer:
            raise TypeError(f"`labels` of a single-label classifier must be integer classes, got {labels.dtype}")
        check_labels(labels.reshape(-1), logits.shape[:1], num_labels)
        return
    if not labels.is_floating_point() and (problem_type == "multi_label_classification" or num_labels > 1):
        raise TypeError(f"`labels` of a multi-label classifier or a regression must be floats, got {labels.dtype}")
    if labels.shape != logits.shape and not (num_labels == 1 and labels.shape == (batch,)):
        raise ValueError(f"`labels` must have the shape {[batch, num_labels]}, got {list(labels.shape)}")
