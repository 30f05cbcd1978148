"""Configuration of SNN-BERT."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# transformers 5.4 copies only the modules that this file names: so those that neuron_settings names stand here too.
from .leaky_integration import IMPLEMENTATIONS  # noqa: F401
from .neuron_settings import check_bpsn, check_neuron
from .surrogate_gradients import SURROGATES  # noqa: F401

AUTO_MAP = {
    "AutoConfig": "configuration_snn_bert.SNNBertConfig",
    "AutoModel": "modeling_snn_bert.SNNBertModel",
    "AutoModelForMaskedLM": "modeling_snn_bert.SNNBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_snn_bert.SNNBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_snn_bert.SNNBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_snn_bert.SNNBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_snn_bert.SNNBertForMultipleChoice",
}


@strict
class SNNBertConfig(PreTrainedConfig):
    r"""
    The architecture of an SNN-BERT: BERT's own settings, and those of its spiking neurons.

    Args:
        vocab_size and the other settings of `BertConfig`:
            `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`, `hidden_act`,
            `hidden_dropout_prob`, `attention_probs_dropout_prob`, `max_position_embeddings`, `type_vocab_size`,
            `initializer_range`, `layer_norm_eps`, `pad_token_id`, `classifier_dropout` and `tie_word_embeddings` are
            as there. `hidden_act` is used by the masked-LM head only: in the encoder a neuron stands in the
            activation's place. `hidden_size` and `intermediate_size` must be multiples of `num_attention_heads`,
            because the neurons have one channel group per head.
        neuron_type (`"bpsn"`, `"lif"` or `"psn"`, defaults to `"bpsn"`):
            The neuron in front of every matrix product; `"lif"` and `"psn"` are baselines.
        coding (`"individual"` or `"repeat"`, defaults to `"individual"`):
            `"individual"`: a token is a time-step. `"repeat"` (needs `neuron_type="lif"`): the whole input is entered
            again at each of `num_timesteps` time-steps, and the outputs are averaged.
        num_timesteps (`int`, defaults to 1):
            Time-steps of the repeat coding, at least 2 there (4 is usual); 1 with individual coding.
        psn_length (`int`, *optional*):
            The fixed sequence length of `neuron_type="psn"`; must be `None` otherwise.
        attention_type (`"softmax"` or `"spiking"`, defaults to `"softmax"`):
            `"spiking"` drops the softmax: `q (k^T v)` divided by the number of valid tokens.
        relative_attention_num_buckets (`int`, defaults to 0):
            Buckets, an even number of at least 4 (MPNet has 32), of distances between a query and a key: each head has
            a bias for each, shared by all layers and added to the scores (see `relative_position`). With spiking
            attention the term `bias v`, divided by the number of valid tokens, is added. 0: no such bias. Needs
            `attn_implementation` `"eager"` or `"sdpa"`.
        relative_attention_max_distance (`int`, defaults to 128):
            Distance from which on all keys share the last bucket, more than a quarter of the buckets.
        spike_type (`"binary"` or `"ternary"`, defaults to `"binary"`):
            Spikes in {0, 1} or in {-1, 0, 1}.
        surrogate (`str`, defaults to `"atan"`):
            A key of `surrogate_gradients.SURROGATES`.
        surrogate_alpha (`float`, defaults to 2.0):
            Sharpness of the surrogate, > 0.
        v_threshold (`float`, defaults to 1.0):
            Initial threshold in standard deviations of the current that a freshly initialised model has there, so
            that spikes flow whatever `initializer_range` is.
        decay (`float`, defaults to 0.05):
            Initial decay per token (per time-step with repeat coding), in (0, 1).
        reset (`float`, defaults to 0.05):
            Initial strength of BPSN's soft reset, >= 0.
        reset_iterations (`int`, defaults to 1):
            Sweeps of BPSN's soft reset; 0 switches it off.
        normalize (`bool`, defaults to `True`):
            Whether BPSN's potential is a weighted mean of the currents (`True`) or their leaky sum.
        bidirectional (`bool`, defaults to `True`):
            Whether BPSN integrates in both directions.
        integration (`str`, defaults to `"auto"`):
            How BPSN's integration is computed, see `leaky_integration`; the results are the same.
        firing_rate_target (`float`, *optional*):
            The firing rate, in (0, 1), above which training penalises a neuron layer (see `sparsity`): lower means
            less energy and faster event-driven inference, and at some point less accuracy. `None` sets no target.
        firing_rate_weight (`float`, defaults to 1.0):
            Weight of that penalty in the training loss of every head, >= 0.
        reads_pairs (`bool`, *optional*):
            Whether a classifier was trained on pairs of texts (`True`) or on single ones (`False`); `None` does not
            say. The models take both all the same: the command line asks for what is wanted.
        output_firing_rates, output_spikes (`bool`, defaults to `False`):
            Whether the models return firing rates, or the spikes themselves, by default.

    Raises:
        ValueError, `huggingface_hub.errors.StrictDataclassError`: for a setting of the wrong type or outside its
            range, and for settings that exclude each other.
    """

    model_type = "snn_bert"
    keys_to_ignore_at_inference = ["firing_rates", "spikes", "firing_rate_penalty"]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True

    neuron_type: Literal["bpsn", "lif", "psn"] = "bpsn"
    coding: Literal["individual", "repeat"] = "individual"
    num_timesteps: int = 1
    psn_length: int | None = None
    attention_type: Literal["softmax", "spiking"] = "softmax"
    relative_attention_num_buckets: int = 0
    relative_attention_max_distance: int = 128
    spike_type: Literal["binary", "ternary"] = "binary"
    surrogate: str = "atan"
    surrogate_alpha: float | int = 2.0
    v_threshold: float | int = 1.0
    decay: float | int = 0.05
    reset: float | int = 0.05
    reset_iterations: int = 1
    normalize: bool = True
    bidirectional: bool = True
    integration: str = "auto"
    firing_rate_target: float | int | None = None
    firing_rate_weight: float | int = 1.0
    reads_pairs: bool | None = None
    output_firing_rates: bool = False
    output_spikes: bool = False

    def __post_init__(self, **kwargs):
        # The whole map, whatever head is saved, so that every Auto class can load the checkpoint.
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse settings that are outside their range or that exclude each other. Runs at init and at save."""
        super().validate_architecture()
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % self.num_attention_heads:
                raise ValueError(
                    f"`{name}` must be a multiple of `num_attention_heads` (one channel group per head), got "
                    f"{getattr(self, name)} and {self.num_attention_heads}"
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` must lie in [0, vocab_size), got {self.pad_token_id}")
        buckets, max_distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets and (buckets < 4 or buckets % 2):
            raise ValueError(f"`relative_attention_num_buckets` must be 0 or an even number >= 4, got {buckets}")
        if max_distance <= buckets // 4:
            raise ValueError(
                "`relative_attention_max_distance` must exceed a quarter of `relative_attention_num_buckets`, got "
                f"{max_distance} and {buckets}"
            )
        self._validate_neurons()

    def _validate_neurons(self):
        check_neuron(
            v_threshold=self.v_threshold,
            surrogate=self.surrogate,
            surrogate_alpha=self.surrogate_alpha,
            spike_type=self.spike_type,
        )
        check_bpsn(
            decay=self.decay,
            reset=self.reset,
            reset_iterations=self.reset_iterations,
            implementation=self.integration,
        )
        if self.firing_rate_target is not None and not 0 < self.firing_rate_target < 1:
            raise ValueError(f"`firing_rate_target` must be None or lie in (0, 1), got {self.firing_rate_target}")
        if not (math.isfinite(self.firing_rate_weight) and self.firing_rate_weight >= 0):
            raise ValueError(f"`firing_rate_weight` must be finite and >= 0, got {self.firing_rate_weight}")
        if self.coding == "repeat":
            if self.neuron_type != "lif":
                raise ValueError(
                    "`coding='repeat'` steps a neuron through time-steps and needs `neuron_type='lif'`, "
                    f"got {self.neuron_type!r}"
                )
            if self.num_timesteps < 2:
                raise ValueError(f"`coding='repeat'` needs `num_timesteps` >= 2 (4 is usual), got {self.num_timesteps}")
        elif self.num_timesteps != 1:
            raise ValueError(
                "`num_timesteps` must be 1 with `coding='individual'`, where the tokens are the time-steps; "
                f"got {self.num_timesteps}"
            )
        if self.neuron_type == "psn":
            if self.psn_length is None or not 1 <= self.psn_length <= self.max_position_embeddings:
                raise ValueError(
                    "`neuron_type='psn'` needs `psn_length`, its one sequence length, in [1, max_position_embeddings "
                    f"= {self.max_position_embeddings}]; got {self.psn_length}"
                )
        elif self.psn_length is not None:
            raise ValueError(f"`psn_length` is for `neuron_type='psn'` only, got {self.psn_length}")
        if self.neuron_type != "bpsn":
            for name, default in (("normalize", True), ("bidirectional", True), ("reset_iterations", 1)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}` is a setting of `neuron_type='bpsn'` and must stay {default} with "
                        f"{self.neuron_type!r}, got {getattr(self, name)}"
                    )


__all__ = ["SNNBertConfig"]
