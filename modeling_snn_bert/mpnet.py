"""An MPNet in an SNN-BERT's terms: settings, weights under a BERT's names, and what one of its layers computes.

An MPNet is a BERT's encoder with a relative position bias, without token types, and with position embeddings that begin
behind those of padding. The dense layer and tanh of its sequence classifier's head are a BERT's pooler.
"""

from typing import Any

import torch
from torch import nn
from transformers import MPNetForMaskedLM, MPNetModel, MPNetPreTrainedModel

from .layer_places import LINEARS

# An MPNet computes with so many buckets, and this distance for the last one, whatever its configuration says.
NUM_BUCKETS, MAX_DISTANCE = 32, 128
# Parts of a weight's name and what a BERT calls them, of which the first that fits is replaced.
NAMES = {
    ".attention.attn.q.": ".attention.self.query.",
    ".attention.attn.k.": ".attention.self.key.",
    ".attention.attn.v.": ".attention.self.value.",
    ".attention.attn.o.": ".attention.output.dense.",
    ".attention.LayerNorm.": ".attention.output.LayerNorm.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.": "cls.predictions.",
    "classifier.dense.": "bert.pooler.dense.",
    "classifier.out_proj.": "classifier.",
}
# The Linears of a layer by a BERT's names.
LINEAR_NAMES = {
    name: next((own.strip(".") for own, other in NAMES.items() if other.strip(".") == name), name) for name in LINEARS
}


def first_position(mpnet: MPNetPreTrainedModel) -> int:
    """The position embedding of a sequence's first token."""
    return mpnet.base_model.embeddings.padding_idx + 1


def settings_of(mpnet: MPNetPreTrainedModel) -> dict[str, Any]:
    """The settings of `SNNBertConfig` that differ from those of the same name of the MPNet.

    Raises:
        ValueError: if the position bias has another number of buckets than an MPNet computes with.
    """
    config = mpnet.config
    if config.relative_attention_num_buckets != NUM_BUCKETS:
        raise ValueError(
            f"`relative_attention_num_buckets` of an MPNet must be {NUM_BUCKETS}, which it computes with in any case; "
            f"got {config.relative_attention_num_buckets}"
        )
    settings = {
        "max_position_embeddings": config.max_position_embeddings - first_position(mpnet),
        "relative_attention_max_distance": MAX_DISTANCE,
        "type_vocab_size": 1,
        "pad_token_id": mpnet.base_model.embeddings.padding_idx,
    }
    # The head of its masked LM has this activation, whatever that of the encoder is.
    return {**settings, "hidden_act": "gelu"} if isinstance(mpnet, MPNetForMaskedLM) else settings


def weights_of(mpnet: MPNetPreTrainedModel) -> dict[str, torch.Tensor]:
    """The MPNet's weights as those of the BERT with the same head, with token types that add nothing."""
    weights = {_name(name): weight for name, weight in mpnet.state_dict().items()}
    base = "" if isinstance(mpnet, MPNetModel) else "bert."
    positions = f"{base}embeddings.position_embeddings.weight"
    weights[positions] = weights[positions][first_position(mpnet) :]
    words = mpnet.base_model.embeddings.word_embeddings.weight
    weights[f"{base}embeddings.token_type_embeddings.weight"] = torch.zeros_like(words[:1])
    return weights


def _name(name: str) -> str:
    for own, other in NAMES.items():
        if own in name:
            name = name.replace(own, other)
            break
    return f"bert.{name.removeprefix('mpnet.')}" if name.startswith("mpnet.") else name


def layer_output(
    mpnet: MPNetModel, layer: nn.Module, states: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What a layer makes of `states`, `[batch, seq_len, hidden]`, with the mask that is added to the scores."""
    return layer(states, attention_mask, mpnet.encoder.compute_position_bias(states))[0]
