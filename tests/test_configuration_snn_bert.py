"""The configuration: round trips, strict types, and a clear error for every impossible setting."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig

import modeling_snn_bert
from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.configuration_snn_bert import AUTO_MAP

REPEAT = {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 4}
VALID = {
    "defaults": {},
    "psn": {"neuron_type": "psn", "psn_length": 128},
    "lif": {"neuron_type": "lif", "decay": 0.5},
    "repeat": REPEAT,
    "spiking_ternary": {"attention_type": "spiking", "spike_type": "ternary"},
    "plain_bpsn": {"normalize": False, "bidirectional": False, "reset_iterations": 0},
    "surrogate": {"surrogate": "triangle", "surrogate_alpha": 4, "v_threshold": -1, "reset": 0},
    "bert": {"hidden_size": 48, "classifier_dropout": 0.2, "pad_token_id": None, "tie_word_embeddings": False},
    "labels": {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "problem_type": "single_label_classification"},
    "outputs": {"reads_pairs": True, "output_firing_rates": True, "output_spikes": True, "output_hidden_states": True},
    "integration": {"integration": "chunked"},
    "sparsity": {"firing_rate_target": 0.1, "firing_rate_weight": 0},
}
IMPOSSIBLE = {
    "no_words": ({"vocab_size": 0, "pad_token_id": None}, "`vocab_size` must be >= 1, got 0"),
    "no_width": ({"hidden_size": 0}, "`hidden_size` must be >= 1"),
    "no_layers": ({"num_hidden_layers": 0}, "`num_hidden_layers` must be >= 1"),
    "no_heads": ({"num_attention_heads": 0}, "`num_attention_heads` must be >= 1"),
    "negative_intermediate": ({"intermediate_size": -4}, "`intermediate_size` must be >= 1"),
    "no_positions": ({"max_position_embeddings": 0}, "`max_position_embeddings` must be >= 1"),
    "no_token_types": ({"type_vocab_size": 0}, "`type_vocab_size` must be >= 1"),
    "heads_do_not_divide_width": ({"hidden_size": 100}, "`hidden_size` must be a multiple of `num_attention_heads`"),
    "heads_do_not_divide_mlp": ({"intermediate_size": 37}, "`intermediate_size` must be a multiple of"),
    "dropout_above_1": ({"hidden_dropout_prob": 1.5}, "`hidden_dropout_prob` must lie in [0, 1], got 1.5"),
    "attention_dropout_below_0": ({"attention_probs_dropout_prob": -0.1}, "must lie in [0, 1], got -0.1"),
    "classifier_dropout_nan": ({"classifier_dropout": float("nan")}, "`classifier_dropout` must lie in [0, 1]"),
    "initializer_range_0": ({"initializer_range": 0}, "`initializer_range` must be positive and finite"),
    "initializer_range_nan": ({"initializer_range": float("nan")}, "`initializer_range` must be positive"),
    "layer_norm_eps_negative": ({"layer_norm_eps": -1e-12}, "`layer_norm_eps` must be positive and finite"),
    "pad_token_outside_vocab": ({"pad_token_id": 30522}, "`pad_token_id` must lie in [0, vocab_size), got 30522"),
    "pad_token_negative": ({"pad_token_id": -1}, "`pad_token_id` must lie in [0, vocab_size), got -1"),
    "threshold_nan": ({"v_threshold": float("nan")}, "`v_threshold` must be finite, got nan"),
    "threshold_infinite": ({"v_threshold": float("inf")}, "`v_threshold` must be finite, got inf"),
    "decay_0": ({"decay": 0}, "`decay` must lie in (0, 1), got 0"),
    "decay_1": ({"decay": 1.0}, "`decay` must lie in (0, 1), got 1.0"),
    "decay_nan": ({"decay": float("nan")}, "`decay` must lie in (0, 1), got nan"),
    "reset_negative": ({"reset": -0.1}, "`reset` must be finite and >= 0, got -0.1"),
    "reset_infinite": ({"reset": float("inf")}, "`reset` must be finite and >= 0, got inf"),
    "reset_iterations_negative": ({"reset_iterations": -1}, "`reset_iterations` must be >= 0, got -1"),
    "surrogate_unknown": ({"surrogate": "step"}, "`surrogate` must be one of ['atan', "),
    "surrogate_alpha_0": ({"surrogate_alpha": 0.0}, "`surrogate_alpha` must be positive and finite, got 0.0"),
    "rate_target_0": ({"firing_rate_target": 0}, "`firing_rate_target` must be None or lie in (0, 1), got 0"),
    "rate_target_1": ({"firing_rate_target": 1.0}, "`firing_rate_target` must be None or lie in (0, 1), got 1.0"),
    "rate_target_nan": ({"firing_rate_target": float("nan")}, "`firing_rate_target` must be None or lie in (0, 1)"),
    "rate_weight_negative": ({"firing_rate_weight": -1}, "`firing_rate_weight` must be finite and >= 0, got -1"),
    "rate_weight_infinite": ({"firing_rate_weight": float("inf")}, "`firing_rate_weight` must be finite and >= 0"),
    "integration_unknown": ({"integration": "fast"}, "must be 'auto' or one of ["),
    "buckets_odd": (
        {"relative_attention_num_buckets": 7},
        "`relative_attention_num_buckets` must be 0 or an even number >= 4, got 7",
    ),
    "buckets_negative": ({"relative_attention_num_buckets": -4}, "must be 0 or an even number >= 4, got -4"),
    "distance_too_small": (
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 8},
        "`relative_attention_max_distance` must exceed a quarter of `relative_attention_num_buckets`, got 8 and 32",
    ),
    "repeat_with_bpsn": ({"coding": "repeat", "num_timesteps": 4}, "needs `neuron_type='lif'`, got 'bpsn'"),
    "repeat_with_psn": ({**REPEAT, "neuron_type": "psn"}, "needs `neuron_type='lif'`, got 'psn'"),
    "repeat_once": ({**REPEAT, "num_timesteps": 1}, "needs `num_timesteps` >= 2 (4 is usual), got 1"),
    "individual_with_time_steps": ({"num_timesteps": 4}, "`num_timesteps` must be 1 with `coding='individual'`"),
    "individual_without_time_steps": ({"num_timesteps": 0}, "`num_timesteps` must be 1 with `coding='individual'`"),
    "psn_without_length": ({"neuron_type": "psn"}, "`neuron_type='psn'` needs `psn_length`"),
    "psn_too_long": ({"neuron_type": "psn", "psn_length": 513}, "in [1, max_position_embeddings = 512]; got 513"),
    "psn_length_0": ({"neuron_type": "psn", "psn_length": 0}, "in [1, max_position_embeddings = 512]; got 0"),
    "length_without_psn": ({"psn_length": 128}, "`psn_length` is for `neuron_type='psn'` only, got 128"),
    "lif_unnormalized": (
        {"neuron_type": "lif", "normalize": False},
        "`normalize` is a setting of `neuron_type='bpsn'`",
    ),
    "lif_forward_only": ({"neuron_type": "lif", "bidirectional": False}, "must stay True with 'lif', got False"),
    "psn_with_sweeps": (
        {"neuron_type": "psn", "psn_length": 8, "reset_iterations": 2},
        "`reset_iterations` is a setting of `neuron_type='bpsn'` and must stay 1 with 'psn', got 2",
    ),
}
WRONG_TYPES = {
    "vocab_size": "30522",
    "hidden_size": 768.0,
    "hidden_act": 3,
    "hidden_dropout_prob": "0.1",
    "tie_word_embeddings": "yes",
    "neuron_type": "izhikevich",
    "coding": "rate",
    "num_timesteps": None,
    "psn_length": 4.5,
    "attention_type": None,
    "relative_attention_num_buckets": 8.0,
    "relative_attention_max_distance": None,
    "spike_type": "unary",
    "surrogate": None,
    "surrogate_alpha": "2",
    "v_threshold": None,
    "decay": [0.1],
    "reset": "small",
    "reset_iterations": 1.5,
    "normalize": "no",
    "bidirectional": None,
    "integration": 1,
    "firing_rate_target": "0.1",
    "firing_rate_weight": None,
    "reads_pairs": "yes",
    "output_firing_rates": "yes",
    "output_spikes": None,
}


def without_labels_as_text(settings):
    """JSON's keys are strings."""
    return {name: value for name, value in settings.items() if name != "id2label"}


@pytest.mark.parametrize("settings", VALID.values(), ids=VALID)
class TestRoundTrip:
    def test_save_and_load(self, tmp_path, settings):
        config = SNNBertConfig(**settings)
        config.save_pretrained(tmp_path)
        for loaded in (SNNBertConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is SNNBertConfig
            assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        for name, value in settings.items():
            assert getattr(loaded, name) == value

    def test_json(self, settings):
        config = SNNBertConfig(**settings)
        text = json.loads(config.to_json_string(use_diff=False))
        assert SNNBertConfig(**text).to_dict() == config.to_dict()
        for name, value in without_labels_as_text(settings).items():
            assert text[name] == value

    def test_the_whole_auto_map_is_saved(self, tmp_path, settings):
        SNNBertConfig(**settings).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize(("settings", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
class TestImpossibleSettings:
    def test_refused_at_init(self, settings, message):
        with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
            SNNBertConfig(**settings)

    def test_refused_in_a_file(self, tmp_path, settings, message):
        text = {**SNNBertConfig().to_dict(), **settings}
        (tmp_path / "config.json").write_text(json.dumps(text))
        with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
            SNNBertConfig.from_pretrained(tmp_path)

    def test_refused_at_save(self, tmp_path, settings, message):
        config = SNNBertConfig()
        for name, value in settings.items():
            setattr(config, name, value)
        with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
            config.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES.items(), ids=WRONG_TYPES)
class TestWrongTypes:
    def test_refused_at_init(self, name, value):
        with pytest.raises(StrictDataclassError, match=name):
            SNNBertConfig(**{name: value})

    def test_refused_when_set(self, name, value):
        with pytest.raises(StrictDataclassError, match=name):
            setattr(SNNBertConfig(), name, value)


def test_an_int_is_taken_for_a_float():
    config = SNNBertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=1, v_threshold=2, reset=1)
    assert (config.hidden_dropout_prob, config.v_threshold) == (0, 2)


def test_settings_are_keywords_only():
    with pytest.raises((TypeError, ValueError), match="positional"):
        SNNBertConfig(30522)


def test_defaults_are_those_of_bert():
    ours, theirs = SNNBertConfig().to_dict(), BertConfig().to_dict()
    different = {name for name, value in theirs.items() if name in ours and ours[name] != value}
    assert different <= {"model_type"}
    assert {"vocab_size", "hidden_size", "layer_norm_eps", "max_position_embeddings"} <= ours.keys() & theirs.keys()


class TestAutoMap:
    def test_names_every_public_model(self):
        public = {name for name in modeling_snn_bert.__all__ if re.fullmatch(r"SNNBert(Config|Model|For\w+)", name)}
        assert {path.split(".")[1] for path in AUTO_MAP.values()} == public

    def test_an_entry_of_the_user_is_kept(self, tmp_path):
        config = SNNBertConfig(auto_map={"AutoTokenizer": "tokenization.MyTokenizer"})
        assert config.auto_map == {**AUTO_MAP, "AutoTokenizer": "tokenization.MyTokenizer"}
        config.save_pretrained(tmp_path)
        assert SNNBertConfig.from_pretrained(tmp_path).auto_map == config.auto_map

    def test_configs_do_not_share_one_map(self):
        SNNBertConfig().auto_map["AutoModel"] = "changed"
        assert SNNBertConfig().auto_map == AUTO_MAP


def test_evaluation_does_not_gather_spikes():
    assert set(SNNBertConfig.keys_to_ignore_at_inference) == {"firing_rates", "spikes", "firing_rate_penalty"}
