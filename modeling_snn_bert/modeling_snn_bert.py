"""SNN-BERT: a BERT whose encoder multiplies its weights with spikes only.

Module and parameter names are BERT's own, so a BERT checkpoint's weights load with nothing renamed. A neuron stands
in front of every matrix product: the module named `neuron` beside a `dense` is the one that feeds it, and
`query_neuron`, `key_neuron` and `value_neuron` turn the projections into spikes.

Inside the model two masks have two names: `token_mask`, `[batch, seq_len]`, bool, True at valid tokens, is for the
neurons (whose public argument is called `attention_mask`, and takes numbers too); `attention_mask` is what transformers
makes of it for its attention. What users give as `attention_mask` becomes a `token_mask` in `SNNBertModel.forward`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertPooler,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# transformers 5.4 copies from a folder only the modules that this file names, and not those that they name in turn: so
# those stand here too.
from .atomic_writes import written_whole  # noqa: F401
from .attention import packed_attention, spiking_attention
from .bpsn import BACKENDS  # noqa: F401
from .bpsn_in_place import PIECE  # noqa: F401
from .bpsn_segments_triton import SEGMENT  # noqa: F401
from .bpsn_triton import MAX_TOKENS  # noqa: F401
from .checksums import VerifiedWeights
from .configuration_snn_bert import SNNBertConfig
from .cpu_kernels import KERNELS_VERSION  # noqa: F401
from .event_driven import RunsWhole, dense, event_driven, part_of_layer, round_products
from .event_kernels import WEIGHT_TYPES  # noqa: F401
from .event_weights import round_weights  # noqa: F401
from .initial_currents import InitialCurrents
from .input_checks import check_inputs, check_labels, check_sequence_labels, values_can_be_read
from .layer_places import PLACES  # noqa: F401
from .leaky_integration import IMPLEMENTATIONS  # noqa: F401
from .neuron_settings import SPIKE_TYPES  # noqa: F401
from .outputs import (
    SNNBertMaskedLMOutput,
    SNNBertModelOutput,
    SNNBertMultipleChoiceOutput,
    SNNBertQuestionAnsweringOutput,
    SNNBertSequenceClassifierOutput,
    SNNBertTokenClassifierOutput,
    firing_rate,
    recorded,
)
from .packed_spikes import SpikingLinear, affine, can_keep_packed, keep_packed, spiking_linears
from .packed_spikes_triton import takes_packed  # noqa: F401
from .relative_position import bucket_starts, relative_position_bias
from .sparsity import FiringRateRecorder, add_penalty, firing_rate_penalty, share_of_labels, warn_unless_counted
from .spike_observer import named_neurons
from .spiking_neurons import BPSN, LIF, PSN, SpikingNeuron
from .surrogate_gradients import SURROGATES  # noqa: F401
from .triton_tiles import takes  # noqa: F401


def build_neuron(config: SNNBertConfig, num_channels: int, v_threshold: float) -> SpikingNeuron:
    """The neuron layer that `config` asks for, with one channel group per attention head."""
    common: dict[str, Any] = {
        "v_threshold": v_threshold,
        "surrogate": config.surrogate,
        "surrogate_alpha": config.surrogate_alpha,
        "spike_type": config.spike_type,
    }
    if config.neuron_type == "lif":
        num_timesteps = config.num_timesteps if config.coding == "repeat" else None
        return LIF(num_channels, config.num_attention_heads, decay=config.decay, num_timesteps=num_timesteps, **common)
    if config.neuron_type == "psn":
        assert config.psn_length is not None  # the configuration has checked it
        return PSN(num_channels, config.num_attention_heads, length=config.psn_length, **common)
    return BPSN(
        num_channels,
        config.num_attention_heads,
        decay=config.decay,
        reset=config.reset,
        reset_iterations=config.reset_iterations,
        normalize=config.normalize,
        bidirectional=config.bidirectional,
        implementation=config.integration,
        **common,
    )


def default_position_ids(inputs: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `[batch or 1, seq_len]`, counted over valid tokens, so that left padding does not shift a sentence."""
    if token_mask is None:
        return torch.arange(inputs.shape[1], device=inputs.device)[None]
    return (token_mask.long().cumsum(-1) - 1).clamp(min=0)


class SNNBertEmbeddings(nn.Module):
    """Word, position and token-type embeddings, as in BERT."""

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(embeddings.shape[:-1], dtype=torch.long, device=embeddings.device)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


@part_of_layer
class SNNBertSelfAttention(nn.Module):
    """Multi-head attention between spikes.

    Keys and values are spikes. Of the queries' spikes the affine `query_gain * spike + query_offset`, per channel,
    enters the product: it gives the attention its sharpness, and the product with binary keys still needs additions
    only.
    """

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.gradient_checkpointing = False
        currents = InitialCurrents(config)
        hidden_size = config.hidden_size
        self.neuron = build_neuron(config, hidden_size, currents.normed())
        self.query = SpikingLinear(hidden_size, hidden_size)
        self.key = SpikingLinear(hidden_size, hidden_size)
        self.value = SpikingLinear(hidden_size, hidden_size)
        self.query_neuron = build_neuron(config, hidden_size, currents.linear(hidden_size))
        self.key_neuron = build_neuron(config, hidden_size, currents.linear(hidden_size))
        self.value_neuron = build_neuron(config, hidden_size, currents.linear(hidden_size))
        self.query_gain = nn.Parameter(torch.ones(hidden_size))
        self.query_offset = nn.Parameter(torch.zeros(hidden_size))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spikes = self.neuron(hidden_states, token_mask)
        query, key, value = spiking_linears((self.query, self.key, self.value), spikes)
        query = self.query_neuron(query, token_mask)
        key = self.key_neuron(key, token_mask)
        value = self.value_neuron(value, token_mask)
        # A checkpointed layer keeps nothing inside it.
        packs = not self.gradient_checkpointing and can_keep_packed(query, key, value)
        with keep_packed(query, key, value) if packs else nullcontext() as kept_affine:
            gain, offset = self.query_gain.to(query.dtype), self.query_offset.to(query.dtype)
            query = (kept_affine or affine)(query, gain, offset)
            context, weights = self._attention_function(query, token_mask, packs)(
                self,
                *(x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query, key, value)),
                attention_mask,
                dropout=self.dropout.p if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        return context.flatten(2).contiguous(), weights

    def _attention_function(self, query: torch.Tensor, token_mask: torch.Tensor | None, packs: bool) -> Callable:
        """One of the functions of `attention`, or transformers' own, which all have the same interface."""
        if self.config.attention_type == "spiking":
            return partial(spiking_attention, token_mask=token_mask)
        # As in transformers' own models: the setting has a public setter, and no getter.
        implementation = self.config._attn_implementation
        # There sdpa would fall back on keeping three numbers for each pair of tokens.
        drops_on_cpu = self.training and 0 < self.dropout.p < 1 and query.device.type == "cpu"
        if packs and drops_on_cpu and implementation == "sdpa":
            return packed_attention
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


@part_of_layer
class SNNBertOutput(nn.Module):
    """What ends attention and MLP: a neuron, a projection of its spikes, dropout, residual connection and norm.

    In the MLP the neuron stands in the activation's place.
    """

    def __init__(self, config: SNNBertConfig, width: int, v_threshold: float) -> None:
        super().__init__()
        self.neuron = build_neuron(config, width, v_threshold)
        self.dense = SpikingLinear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, current: torch.Tensor, residual: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(self.neuron(current, token_mask))))


@part_of_layer
class SNNBertAttention(nn.Module):
    """Self-attention and its output block."""

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.self = SNNBertSelfAttention(config)
        self.output = SNNBertOutput(config, config.hidden_size, InitialCurrents(config).context())

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = self.self(hidden_states, attention_mask, token_mask, **kwargs)
        return self.output(context, hidden_states, token_mask), weights


@part_of_layer
class SNNBertIntermediate(nn.Module):
    """The MLP's first projection, behind a neuron."""

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.neuron = build_neuron(config, config.hidden_size, InitialCurrents(config).normed())
        self.dense = SpikingLinear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        return self.dense(self.neuron(hidden_states, token_mask))


class SNNBertLayer(RunsWhole, GradientCheckpointingLayer):
    """One encoder layer: attention, then MLP, on a real-valued residual stream."""

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.attention = SNNBertAttention(config)
        self.intermediate = SNNBertIntermediate(config)
        currents = InitialCurrents(config)
        self.output = SNNBertOutput(config, config.intermediate_size, currents.linear(config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.runner is not None and self.runner.takes(self, hidden_states, attention_mask, token_mask, **kwargs):
            return self.runner(self, hidden_states, attention_mask, token_mask)
        hidden_states, _ = self.attention(hidden_states, attention_mask, token_mask, **kwargs)
        return self.output(self.intermediate(hidden_states, token_mask), hidden_states, token_mask)


class SNNBertEncoder(nn.Module):
    """The stack of layers, and the position bias that they share.

    With repeat coding it runs on `num_timesteps` copies of its input and averages them.
    """

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([SNNBertLayer(config) for _ in range(config.num_hidden_layers)])
        num_buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embedding(num_buckets, config.num_attention_heads) if num_buckets else None
        self._bucket_starts = bucket_starts(num_buckets, config.relative_attention_max_distance) if num_buckets else ()

    def attention_mask(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        """What the attention of each layer takes as `attention_mask`, from `token_mask`, `[batch, seq_len]`.

        With a position bias it is that, in the model's dtype, and for softmax attention its lowest number at masked
        keys: `[1 or batch, heads, seq_len, seq_len]`. It is a tensor of its own and no part of `kwargs`, so that
        gradient checkpointing of either kind hands its gradient on.
        """
        if self.relative_attention_bias is None:
            if self.config.attention_type == "spiking":
                return None
            return create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask)
        implementation = self.config._attn_implementation
        if "flash" in implementation or "flex" in implementation:
            raise ValueError(
                "`relative_attention_num_buckets` needs an attention that adds a bias per head, "
                f'`attn_implementation` "eager" or "sdpa"; got {implementation!r}'
            )
        length, device = hidden_states.shape[1], hidden_states.device
        bias = relative_position_bias(self.relative_attention_bias, length, self._bucket_starts, device)
        if token_mask is None or self.config.attention_type == "spiking":
            return bias
        return bias.masked_fill(token_mask[:, None, None] == 0, torch.finfo(bias.dtype).min)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        num_timesteps = self.config.num_timesteps
        if num_timesteps > 1:
            hidden_states = hidden_states.repeat(num_timesteps, 1, 1)
            token_mask = None if token_mask is None else token_mask.repeat(num_timesteps, 1)
        attention_mask = self.attention_mask(hidden_states, token_mask)
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, token_mask, **kwargs)
        if num_timesteps > 1:
            hidden_states = hidden_states.unflatten(0, (num_timesteps, -1)).mean(0)
        return hidden_states


class SNNBertPooler(BertPooler):
    """A dense layer and tanh on the first valid token, which is not at index 0 under left padding."""

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        if token_mask is None:
            first = hidden_states[:, 0]
        else:
            index = token_mask.long().argmax(dim=1)
            # Not `len(index)`, which an exported graph would take for a constant.
            first = hidden_states[torch.arange(index.shape[0], device=index.device), index]
        return self.activation(self.dense(first))


class SNNBertPreTrainedModel(VerifiedWeights):
    """What every SNN-BERT model shares: initialisation, outputs that can be recorded, and the list of neurons."""

    config: SNNBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SNNBertEmbeddings", "SNNBertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": SNNBertLayer,
        "attentions": SNNBertSelfAttention,
        "spikes": OutputRecorder(SpikingNeuron, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikingNeuron):
            for name, value in module.initial_values().items():
                init.constant_(getattr(module, name), value)
            if isinstance(module, PSN):
                init.copy_(module.weight, torch.eye(module.length))
        elif isinstance(module, SNNBertSelfAttention):
            init.ones_(module.query_gain)
            init.zeros_(module.query_offset)
        elif isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)

    def neuron_names(self) -> list[str]:
        """Names of the neuron layers, in the order of `firing_rates` and `spikes` in the outputs."""
        return list(dict(named_neurons(self)))

    def to_event_driven(self, weight_dtype: str = "float32", *, dense_above: float | None = None):
        """Turn this model into its event-driven form, in place, and return it; see `event_driven.event_driven`.

        A method, so that it is at hand as well where the code came with a checkpoint and no package is installed.
        """
        return event_driven(self, weight_dtype, dense_above=dense_above)

    def round_products(self, weight_dtype: str):
        """Round the weights of the encoder's products in place, and return the model; see
        `event_driven.round_products`."""
        return round_products(self, weight_dtype)

    def to_dense(self):
        """Undo `to_event_driven`, in place, and return the model."""
        return dense(self)


@auto_docstring(custom_intro="The SNN-BERT encoder, with hidden states and the pooled first token as outputs.")
class SNNBertModel(SNNBertPreTrainedModel):
    def __init__(self, config: SNNBertConfig, add_pooling_layer: bool = True) -> None:
        r"""
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether to add a pooling layer.
        """
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = SNNBertEmbeddings(config)
        self.encoder = SNNBertEncoder(config)
        self.pooler = SNNBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_firing_rates: bool | None = None,
        output_spikes: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertModelOutput:
        r"""
        output_firing_rates (`bool`, *optional*):
            Whether to return the firing rates of every neuron layer. Defaults to `config.output_firing_rates`.
        output_spikes (`bool`, *optional*):
            Whether to return the spikes of every neuron layer. Defaults to `config.output_spikes`.
        """
        if output_firing_rates is None:
            output_firing_rates = self.config.output_firing_rates
        if output_spikes is None:
            output_spikes = self.config.output_spikes
        given = check_inputs(self.config, input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds)
        token_mask = None if attention_mask is None else attention_mask != 0
        if token_mask is not None and values_can_be_read(token_mask) and bool(token_mask.all()):
            # Without padding the neurons have less to do.
            token_mask = None
        target = self.config.firing_rate_target
        recorder = FiringRateRecorder(self) if self.training and target is not None else None
        # Said in so many words, so that a layer knows whether someone looks at what happens inside it.
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        with recorder or nullcontext():
            outputs = self._encode(
                input_ids,
                token_mask,
                token_type_ids,
                default_position_ids(given, token_mask) if position_ids is None else position_ids,
                inputs_embeds,
                output_spikes=output_spikes or output_firing_rates,
                return_dict=True,
                **kwargs,
            )
        if recorder is not None and target is not None:
            rates = recorder.rates(token_mask, self.config.num_timesteps)
            penalty = firing_rate_penalty(rates, target)
            warn_unless_counted(penalty, recorder.spikes)
            outputs["firing_rate_penalty"] = penalty
        if output_firing_rates:
            firing_rates = tuple(
                firing_rate(spikes, token_mask, self.config.num_timesteps) for spikes in outputs.spikes
            )
            spikes = outputs.spikes if output_spikes else None
            # Built anew: a ModelOutput that once held a value keeps it as an item when the attribute is set to None.
            outputs = SNNBertModelOutput(**{**outputs, "firing_rates": firing_rates, "spikes": spikes})
        return outputs

    # Recorded as transformers' own models do it, which holds in several threads and in a compiled graph. Hooks of a
    # `SpikeObserver` would see the calls of other threads.
    @capture_outputs
    def _encode(
        self,
        input_ids: torch.LongTensor | None,
        token_mask: torch.Tensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.FloatTensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SNNBertModelOutput:
        """The forward pass proper, around which hidden states, attentions and spikes are recorded."""
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden_states = self.encoder(hidden_states, token_mask, **kwargs)
        return SNNBertModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states, token_mask) if self.pooler is not None else None,
        )


def classifier_dropout(config: SNNBertConfig) -> float:
    """Dropout in front of a classifier: its own setting, or that of the encoder."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


@auto_docstring(custom_intro="SNN-BERT with a masked language modelling head.")
class SNNBertForMaskedLM(SNNBertPreTrainedModel):
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__(config)
        self.bert = SNNBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertMaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, in `[0, config.vocab_size)`; -100 is ignored.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index=-100)
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
            loss = add_penalty(loss, outputs, self.config.firing_rate_weight, share_of_labels(labels, **kwargs))
        return SNNBertMaskedLMOutput(loss=loss, logits=logits, **recorded(outputs))


@auto_docstring(custom_intro="SNN-BERT with a sequence classification or regression head on the pooled output.")
class SNNBertForSequenceClassification(SNNBertPreTrainedModel):
    # The loss is a mean over sequences, so Trainer must divide by the number of accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = SNNBertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertSequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Integer classes in `[0, num_labels)`; real numbers for regression (`num_labels=1`); or zeros and ones as
            floats, one per label, for multi-label classification.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            check_sequence_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            loss = add_penalty(loss, outputs, self.config.firing_rate_weight)
        return SNNBertSequenceClassifierOutput(loss=loss, logits=logits, **recorded(outputs))


@auto_docstring(custom_intro="SNN-BERT with a token classification head, for example for named entities.")
class SNNBertForTokenClassification(SNNBertPreTrainedModel):
    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = SNNBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertTokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Classes of the tokens, in `[0, num_labels)`; -100 is ignored.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:-1], self.num_labels, ignore_index=-100)
            loss = self.loss_function(logits, labels, self.config, **kwargs)
            loss = add_penalty(loss, outputs, self.config.firing_rate_weight, share_of_labels(labels, **kwargs))
        return SNNBertTokenClassifierOutput(loss=loss, logits=logits, **recorded(outputs))


@auto_docstring(custom_intro="SNN-BERT with a span classification head for extractive question answering.")
class SNNBertForQuestionAnswering(SNNBertPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__(config)
        self.bert = SNNBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertQuestionAnsweringOutput:
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if (start_positions is None) != (end_positions is None):
            raise ValueError("`start_positions` and `end_positions` must be given together")
        if start_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
            loss = add_penalty(loss, outputs, self.config.firing_rate_weight)
        return SNNBertQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **recorded(outputs)
        )


@auto_docstring(custom_intro="SNN-BERT with a multiple choice head: a score for each of several continuations.")
class SNNBertForMultipleChoice(SNNBertPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: SNNBertConfig) -> None:
        super().__init__(config)
        self.bert = SNNBertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SNNBertMultipleChoiceOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`):
            Token ids of every choice. The other inputs have the same leading two dimensions.
        token_type_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Segment of each token.
        position_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Position of each token.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, num_choices, seq_len, hidden_size)`, *optional*):
            Embeddings in place of `input_ids`.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the right choice.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.dim() < (3 if inputs_embeds is None else 4):
            raise ValueError(
                "`input_ids` must have the shape [batch, num_choices, seq_len] (or `inputs_embeds` one dimension "
                f"more), got {None if given is None else list(given.shape)}"
            )
        num_choices = given.shape[1]
        flat = [
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        outputs = self.bert(*flat, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(given.shape[0], num_choices)
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:1], num_choices)
            loss = nn.functional.cross_entropy(logits, labels)
            loss = add_penalty(loss, outputs, self.config.firing_rate_weight)
        return SNNBertMultipleChoiceOutput(loss=loss, logits=logits, **recorded(outputs))


__all__ = [
    "SNNBertForMaskedLM",
    "SNNBertForMultipleChoice",
    "SNNBertForQuestionAnswering",
    "SNNBertForSequenceClassification",
    "SNNBertForTokenClassification",
    "SNNBertModel",
    "SNNBertPreTrainedModel",
]
