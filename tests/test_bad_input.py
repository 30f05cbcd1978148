"""Bad input gives an error that names what is wrong; it never gives a wrong number or a crash."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_snn_bert import (
    BPSN,
    LIF,
    PSN,
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)

BATCH, LENGTH, WIDTH, VOCAB, POSITIONS = 2, 6, 32, 120, 64
IDS = torch.arange(10, 10 + BATCH * LENGTH).view(BATCH, LENGTH)
ONES = torch.ones_like(IDS)
EMBEDS = torch.zeros(BATCH, LENGTH, WIDTH)
CHOICES = IDS.view(BATCH, 2, 3)
NAN, INF = EMBEDS.clone().index_fill(2, torch.tensor(3), torch.nan), EMBEDS - torch.inf
PSN_SETTINGS = {"neuron_type": "psn", "psn_length": 8}
MULTI_LABEL, SINGLE_LABEL = ({"problem_type": f"{kind}_label_classification"} for kind in ("multi", "single"))


def with_value(value, like=IDS):
    changed = like.clone()
    changed[1, 2] = value
    return changed


BAD_INPUTS = {
    "nothing": ({}, ValueError, "exactly one of `input_ids` and `inputs_embeds`"),
    "ids_and_embeds": (
        {"input_ids": IDS, "inputs_embeds": EMBEDS},
        ValueError,
        "exactly one of `input_ids` and `inputs_embeds`",
    ),
    "ids_without_batch": (
        {"input_ids": IDS[0]},
        ValueError,
        "`input_ids` must have the shape [batch, seq_len], got [6]",
    ),
    "ids_with_three_dimensions": ({"input_ids": CHOICES}, ValueError, "[batch, seq_len], got [2, 2, 3]"),
    "ids_of_float": ({"input_ids": IDS.float()}, TypeError, "`input_ids` must be int64 or int32, got torch.float32"),
    "ids_of_bool": ({"input_ids": IDS > 0}, TypeError, "`input_ids` must be int64 or int32, got torch.bool"),
    "ids_negative": ({"input_ids": with_value(-1)}, ValueError, "`input_ids` must lie in [0, 120), got values from -1"),
    "ids_too_high": ({"input_ids": with_value(VOCAB)}, ValueError, "`input_ids` must lie in [0, 120), got values from"),
    "no_rows": ({"input_ids": IDS[:0]}, ValueError, "at least one sequence of at least one token, got [0, 6]"),
    "no_tokens": ({"input_ids": IDS[:, :0]}, ValueError, "at least one sequence of at least one token, got [2, 0]"),
    "too_long": (
        {"input_ids": torch.ones(1, POSITIONS + 1).long()},
        ValueError,
        "65 tokens, but the model has 64 position embeddings: truncate the input",
    ),
    "embeds_too_long": ({"inputs_embeds": torch.zeros(1, 65, WIDTH)}, ValueError, "65 tokens, but the model has 64"),
    "embeds_without_batch": ({"inputs_embeds": EMBEDS[0]}, ValueError, "[batch, seq_len, 32], got [6, 32]"),
    "embeds_of_another_width": (
        {"inputs_embeds": EMBEDS[..., :16]},
        ValueError,
        "[batch, seq_len, 32], got [2, 6, 16]",
    ),
    "embeds_nan": ({"inputs_embeds": NAN}, ValueError, "`inputs_embeds` holds NaN or infinite values"),
    "embeds_infinite": ({"inputs_embeds": INF}, ValueError, "`inputs_embeds` holds NaN or infinite values"),
    "mask_of_another_length": (
        {"input_ids": IDS, "attention_mask": ONES[:, 1:]},
        ValueError,
        "`attention_mask` must have the shape [batch, seq_len] = [2, 6], got [2, 5]",
    ),
    "mask_of_one_row": ({"input_ids": IDS, "attention_mask": ONES[:1]}, ValueError, "= [2, 6], got [1, 6]"),
    "mask_per_pair": (
        {"input_ids": IDS, "attention_mask": ONES[:, None].repeat(1, LENGTH, 1)},
        ValueError,
        "masks per pair of tokens are not supported",
    ),
    "mask_additive": (
        {"input_ids": IDS, "attention_mask": (1.0 - ONES) * -1e9 - 1e9},
        ValueError,
        "`attention_mask` must hold 1 at valid tokens and 0 at padding only",
    ),
    "mask_of_twos": ({"input_ids": IDS, "attention_mask": 2 * ONES}, ValueError, "1 at valid tokens and 0 at padding"),
    "mask_nan": ({"input_ids": IDS, "attention_mask": ONES * torch.nan}, ValueError, "1 at valid tokens and 0 at"),
    "token_type_too_high": (
        {"input_ids": IDS, "token_type_ids": 2 * ONES},
        ValueError,
        "`token_type_ids` must lie in [0, 2), got values from 2 to 2",
    ),
    "token_type_negative": ({"input_ids": IDS, "token_type_ids": -ONES}, ValueError, "must lie in [0, 2)"),
    "token_type_of_float": (
        {"input_ids": IDS, "token_type_ids": ONES.float()},
        TypeError,
        "`token_type_ids` must be int64 or int32, got torch.float32",
    ),
    "token_type_of_another_length": (
        {"input_ids": IDS, "token_type_ids": ONES[:, 1:]},
        ValueError,
        "`token_type_ids` must have the shape [batch, seq_len] = [2, 6], got [2, 5]",
    ),
    "position_of_more_rows": (
        {"input_ids": IDS[:1], "position_ids": ONES},
        ValueError,
        "`position_ids` must have the shape [batch, seq_len] = [1, 6], got [2, 6]",
    ),
    "position_too_high": (
        {"input_ids": IDS, "position_ids": with_value(POSITIONS)},
        ValueError,
        "`position_ids` must lie in [0, 64)",
    ),
    "position_negative": ({"input_ids": IDS, "position_ids": -ONES}, ValueError, "`position_ids` must lie in [0, 64)"),
}
BAD_LABELS = {
    "class_too_high": (
        SNNBertForSequenceClassification,
        {},
        {"labels": torch.tensor([0, 3])},
        ValueError,
        "`labels` must lie in [0, 3), the number of classes of the model, got 3: load the model with the right",
    ),
    "class_negative": (
        SNNBertForSequenceClassification,
        {},
        {"labels": torch.tensor([0, -100])},
        ValueError,
        "`labels` must lie in [0, 3)",
    ),
    "class_missing": (SNNBertForSequenceClassification, {}, {"labels": torch.tensor([1])}, ValueError, "shape [2]"),
    "class_of_int32": (
        SNNBertForSequenceClassification,
        {},
        {"labels": torch.tensor([0, 1]).int()},
        TypeError,
        "`labels` must be int64 classes, got torch.int32",
    ),
    "class_of_bool": (SNNBertForSequenceClassification, {}, {"labels": ONES[0, :2] > 0}, TypeError, "got torch.bool"),
    "single_label_of_float": (
        SNNBertForSequenceClassification,
        SINGLE_LABEL,
        {"labels": torch.tensor([0.0, 1.0])},
        TypeError,
        "`labels` of a single-label classifier must be integer classes, got torch.float32",
    ),
    "multi_label_of_int": (
        SNNBertForSequenceClassification,
        MULTI_LABEL,
        {"labels": torch.ones(2, 3).long()},
        TypeError,
        "must be floats, got torch.int64",
    ),
    "multi_label_of_another_width": (
        SNNBertForSequenceClassification,
        MULTI_LABEL,
        {"labels": torch.ones(2, 4)},
        ValueError,
        "`labels` must have the shape [2, 3], got [2, 4]",
    ),
    "multi_label_flattened": (
        SNNBertForSequenceClassification,
        MULTI_LABEL,
        {"labels": torch.ones(6)},
        ValueError,
        "`labels` must have the shape [2, 3], got [6]",
    ),
    "regression_of_another_size": (
        SNNBertForSequenceClassification,
        {"num_labels": 1},
        {"labels": torch.ones(3)},
        ValueError,
        "`labels` must have the shape [2, 1], got [3]",
    ),
    "token_labels_of_float": (
        SNNBertForTokenClassification,
        {},
        {"labels": ONES.float()},
        TypeError,
        "`labels` must be int64 classes, got torch.float32",
    ),
    "token_label_too_high": (
        SNNBertForTokenClassification,
        {},
        {"labels": with_value(3, 0 * ONES)},
        ValueError,
        "`labels` must lie in [0, 3), the number of classes of the model, got 3",
    ),
    "token_label_negative": (
        SNNBertForTokenClassification,
        {},
        {"labels": with_value(-1, 0 * ONES)},
        ValueError,
        "`labels` must lie in [0, 3), the number of classes of the model, got -1",
    ),
    "token_labels_of_another_length": (
        SNNBertForTokenClassification,
        {},
        {"labels": ONES[:, 1:]},
        ValueError,
        "`labels` must have the shape [2, 6], got [2, 5]",
    ),
    "masked_lm_label_too_high": (
        SNNBertForMaskedLM,
        {},
        {"labels": with_value(VOCAB)},
        ValueError,
        "`labels` must lie in [0, 120)",
    ),
    "masked_lm_labels_of_one_row": (SNNBertForMaskedLM, {}, {"labels": IDS[:1]}, ValueError, "the shape [2, 6]"),
    "start_without_end": (
        SNNBertForQuestionAnswering,
        {},
        {"start_positions": torch.tensor([0, 1])},
        ValueError,
        "`start_positions` and `end_positions` must be given together",
    ),
    "end_without_start": (
        SNNBertForQuestionAnswering,
        {},
        {"end_positions": torch.tensor([0, 1])},
        ValueError,
        "`start_positions` and `end_positions` must be given together",
    ),
    "positions_of_more_rows": (
        SNNBertForQuestionAnswering,
        {},
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([0, 1, 2])},
        ValueError,
        "batch_size (2)",
    ),
    "choice_of_float": (
        SNNBertForMultipleChoice,
        {},
        {"input_ids": CHOICES, "labels": torch.ones(2)},
        TypeError,
        "`labels` must be int64 classes, got torch.float32",
    ),
    "choice_too_high": (
        SNNBertForMultipleChoice,
        {},
        {"input_ids": CHOICES, "labels": torch.tensor([0, 2])},
        ValueError,
        "`labels` must lie in [0, 2)",
    ),
    "choices_without_their_dimension": (
        SNNBertForMultipleChoice,
        {},
        {"input_ids": IDS},
        ValueError,
        "`input_ids` must have the shape [batch, num_choices, seq_len]",
    ),
    "choices_of_embeddings_of_one_dimension_less": (
        SNNBertForMultipleChoice,
        {},
        {"inputs_embeds": torch.ones(2, 6, 32)},
        ValueError,
        "(or `inputs_embeds` one dimension more), got [2, 6, 32]",
    ),
    "choices_missing": (SNNBertForMultipleChoice, {}, {"input_ids": None}, ValueError, "got None"),
}
BAD_LENGTHS = {
    "psn_too_short": (LENGTH, "a PSN has weights for exactly 8 tokens, got seq_len = 6"),
    "psn_too_long": (10, "a PSN has weights for exactly 8 tokens, got seq_len = 10"),
}
BAD_CURRENTS = {
    "two_dimensions": (torch.zeros(8, 4), None, ValueError, "`current` must have the shape [batch, seq_len, channels]"),
    "integers": (torch.zeros(1, 8, 4).long(), None, TypeError, "`current` must be floating point, got torch.int64"),
    "no_tokens": (torch.zeros(1, 0, 4), None, ValueError, "at least one token"),
    "other_channels": (torch.zeros(1, 8, 6), None, ValueError, "`current` must have 4 channels, got [1, 8, 6]"),
    "mask_too_short": (torch.zeros(1, 8, 4), torch.ones(1, 7), ValueError, "`attention_mask` must have the shape"),
}
NEURONS = {"bpsn": lambda: BPSN(4, 2), "lif": lambda: LIF(4, 2), "psn": lambda: PSN(4, 2, length=8)}
BAD_NEURONS = {
    "groups_do_not_divide": (lambda: BPSN(6, 4), "`num_groups` must divide `num_channels`"),
    "no_groups": (lambda: LIF(4, 0), "`num_groups` must divide `num_channels`"),
    "threshold_nan": (lambda: PSN(4, 2, length=8, v_threshold=float("nan")), "`v_threshold` must be finite"),
    "decay_1": (lambda: BPSN(4, 2, decay=1.0), "`decay` must lie in (0, 1), got 1.0"),
    "lif_decay_0": (lambda: LIF(4, 2, decay=0.0), "`decay` must lie in (0, 1), got 0.0"),
    "reset_negative": (lambda: BPSN(4, 2, reset=-1.0), "`reset` must be finite and >= 0"),
    "sweeps_negative": (lambda: BPSN(4, 2, reset_iterations=-1), "`reset_iterations` must be >= 0"),
    "surrogate": (lambda: LIF(4, 2, surrogate="none"), "`surrogate` must be one of"),
    "spike_type": (lambda: LIF(4, 2, spike_type="analog"), "`spike_type` must be one of ['binary', 'ternary']"),
    "time_steps_0": (lambda: LIF(4, 2, num_timesteps=0), "`num_timesteps` must be >= 1 or None"),
    "length_0": (lambda: PSN(4, 2, length=0), "`length` must be >= 1, got 0"),
}


@pytest.fixture
def call(make_config):
    def run(model_class, inputs, **settings):
        return model_class(make_config(**{"num_labels": 3, **settings})).eval()(**inputs)

    return run


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("model_class", [SNNBertModel, SNNBertForTokenClassification])
def test_bad_inputs(call, model_class, inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(model_class, inputs)


@pytest.mark.parametrize(("model_class", "settings", "inputs", "error", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels(call, model_class, settings, inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(model_class, {"input_ids": IDS, **inputs}, **settings)


@pytest.mark.parametrize(("length", "message"), BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_a_length_that_a_psn_does_not_have(call, length, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(SNNBertModel, {"input_ids": torch.ones(2, length).long()}, **PSN_SETTINGS)


@pytest.mark.parametrize(("current", "mask", "error", "message"), BAD_CURRENTS.values(), ids=BAD_CURRENTS)
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
def test_bad_currents(neuron, current, mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        neuron()(current, mask)


@pytest.mark.parametrize(("build", "message"), BAD_NEURONS.values(), ids=BAD_NEURONS)
def test_bad_neurons(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_batch_that_is_no_multiple_of_the_time_steps():
    with pytest.raises(ValueError, match="must hold 4 time-steps along the batch"):
        LIF(4, 2, num_timesteps=4)(torch.zeros(6, 3, 4))


@pytest.mark.parametrize("name", ["inputs_embeds", "input_ids"])
def test_what_stands_at_masked_tokens_may_be_anything(make_config, name):
    """NaN, too, as long as it is in padding."""
    model = SNNBertModel(make_config()).eval()
    mask = ONES.clone()
    mask[:, 4:] = 0
    clean, junk = (EMBEDS, EMBEDS.clone()) if name == "inputs_embeds" else (IDS, IDS.clone())
    junk[:, 4:] = torch.nan if name == "inputs_embeds" else 7
    outputs = [model(**{name: x}, attention_mask=mask).last_hidden_state[:, :4] for x in (clean, junk)]
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(folder, name, size):
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def set_byte(folder, position):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def save_with_nan(folder):
    model = SNNBertForSequenceClassification.from_pretrained(folder)
    model.bert.encoder.layer[1].output.neuron.v_threshold.data[0] = torch.nan
    model.save_pretrained(folder)


# What is done to a good checkpoint, what `from_pretrained` is given besides, and the error.
NO_JSON = "not a valid JSON"
BAD_CHECKPOINTS = {
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), {}, OSError, "model.safetensors"),
    "weights_empty": (
        lambda folder: cut(folder, "model.safetensors", 0),
        {},
        ValueError,
        "is damaged or no safetensors",
    ),
    "weights_of_4_bytes": (lambda folder: cut(folder, "model.safetensors", 4), {}, ValueError, "is damaged or no safe"),
    "weights_cut_in_the_header": (
        lambda folder: cut(folder, "model.safetensors", 100),
        {},
        ValueError,
        "is damaged or",
    ),
    "weights_cut": (
        lambda folder: cut(folder, "model.safetensors", 40_000),
        {},
        ValueError,
        "is damaged: its weights are not those that were saved, by the SHA-256 in its metadata",
    ),
    "weights_with_a_flipped_bit": (
        lambda folder: set_byte(folder, -1000),
        {},
        ValueError,
        "is damaged: its weights are not those that were saved, by the SHA-256 in its metadata",
    ),
    "weights_header_with_a_flipped_bit": (lambda folder: set_byte(folder, 600), {}, ValueError, "is damaged"),
    "weights_of_text": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        {},
        ValueError,
        "model.safetensors is damaged or no safetensors file",
    ),
    "weights_with_NaN": (
        save_with_nan,
        {},
        ValueError,
        "the weights hold NaN or infinite values in bert.encoder.layer.1.output.neuron.v_threshold",
    ),
    "weights_of_another_size": (lambda folder: change_config(folder, intermediate_size=64), {}, RuntimeError, "size"),
    "weights_of_another_vocabulary": (lambda folder: change_config(folder, vocab_size=130), {}, RuntimeError, "size"),
    "weights_of_fewer_labels": (lambda folder: None, {"num_labels": 5}, RuntimeError, "size"),
    "config_cut": (lambda folder: cut(folder, "config.json", 50), {}, OSError, NO_JSON),
    "config_empty": (lambda folder: cut(folder, "config.json", 0), {}, OSError, NO_JSON),
    "config_with_a_wrong_type": (
        lambda folder: change_config(folder, reset_iterations="one"),
        {},
        StrictDataclassError,
        "Field 'reset_iterations' expected int, got str (value: 'one')",
    ),
    "config_with_an_impossible_setting": (
        lambda folder: change_config(folder, num_timesteps=4),
        {},
        StrictDataclassError,
        "`num_timesteps` must be 1",
    ),
    "attention_that_does_not_exist": (
        lambda folder: None,
        {"attn_implementation": "no_such_attention"},
        ValueError,
        "no_such_attention",
    ),
    "more_layers_than_there_are": (
        lambda folder: None,
        {"num_hidden_layers": 3},
        ValueError,
        "holds no weights of the encoder layers 2 (counted from 0): ask for as many layers as there are",
    ),
    "a_pickle_only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        {"use_safetensors": True},
        OSError,
        "model.safetensors",
    ),
}


@pytest.fixture
def checkpoint(make_config, tmp_path):
    SNNBertForSequenceClassification(make_config(num_labels=3)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("change", "settings", "error", "message"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_bad_checkpoints(checkpoint, change, settings, error, message):
    change(checkpoint)
    with pytest.raises(error, match=re.escape(message)):
        SNNBertForSequenceClassification.from_pretrained(checkpoint, **settings)


class TestCheckpointFiles:
    def test_no_such_folder(self, tmp_path):
        with pytest.raises(OSError, match="no_such_folder"):
            SNNBertForSequenceClassification.from_pretrained(tmp_path / "no_such_folder")

    def test_config_missing(self, checkpoint):
        (checkpoint / "config.json").unlink()
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForSequenceClassification.from_pretrained(checkpoint)

    def test_another_number_of_labels_on_purpose(self, checkpoint):
        settings = {"num_labels": 5, "ignore_mismatched_sizes": True}
        loaded = SNNBertForSequenceClassification.from_pretrained(checkpoint, **settings)
        assert loaded.classifier.out_features == 5

    def test_weights_of_another_neuron_are_reported(self, checkpoint):
        change_config(checkpoint, neuron_type="lif")
        _, info = SNNBertForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
        assert any(name.endswith("decay_logit") for name in info["missing_keys"])
        assert any(name.endswith("decay_forward_logit") for name in info["unexpected_keys"])


def trained_tokenizer(folder):
    """A tokenizer of more tokens than the model of `checkpoint` has embeddings."""
    words = [" ".join(f"{a}{b}{c}" for c in "abcdefghij") for a in "klmnopq" for b in "rstuvwxyz"]
    return AutoTokenizer.from_pretrained(folder).train_new_from_iterator(words, 400)


# What is done to the folder of a model that could be sent, the options, the exit code, and what the script says.
BAD_PUSHES = {
    "no_repository": (lambda folder: None, [], 2, "--repo_id is required, except with --dry_run"),
    "a_licence_without_a_card": (
        lambda folder: None,
        ["--dry_run", "--license", "mit"],
        2,
        "--license goes into the card that --report writes",
    ),
    "an_empty_message": (
        lambda folder: None,
        ["--dry_run", "--commit_message", " "],
        2,
        "--commit_message must not be empty",
    ),
    "no_folder": (shutil.rmtree, ["--dry_run"], 1, "name one that save_pretrained wrote"),
    "a_report_that_is_missing": (
        lambda folder: None,
        ["--dry_run", "--report", "no_such_report.json"],
        1,
        "--report no_such_report.json cannot be read",
    ),
    "a_report_of_something_else": (
        lambda folder: (folder.parent / "report.json").write_text('{"loss": 1}'),
        ["--dry_run", "--report", "report.json"],
        1,
        "`report` must be the report.json of examples/quickstart.py or of",
    ),
    "a_report_that_is_a_list": (
        lambda folder: (folder.parent / "report.json").write_text('["accuracy", "energy"]'),
        ["--dry_run", "--report", "report.json"],
        1,
        "or of `snn-bert energy`, got ['accuracy', 'energy']",
    ),
    "no_name_of_a_repository": (lambda folder: None, ["--dry_run", "--repo_id", "a/b/c"], 1, "'a/b/c'"),
    "a_report_that_is_no_JSON": (
        lambda folder: (folder.parent / "report.json").write_text("{"),
        ["--dry_run", "--report", "report.json"],
        1,
        "--report report.json cannot be read, or is not JSON",
    ),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ["--dry_run"], 1, "config.json"),
    "another_kind_of_model": (
        lambda folder: change_config(folder, model_type="bert"),
        ["--dry_run"],
        1,
        "config.json must be an SNN-BERT's, with the model_type 'snn_bert'",
    ),
    "another_class": (
        lambda folder: change_config(folder, architectures=["BertModel"]),
        ["--dry_run"],
        1,
        "must name one of SNN-BERT's classes in `architectures`, got 'BertModel'",
    ),
    "an_incomplete_auto_map": (
        lambda folder: change_config(folder, auto_map={"AutoModel": "modeling_snn_bert.SNNBertModel"}),
        ["--dry_run"],
        1,
        "`auto_map` in config.json lacks AutoConfig",
    ),
    "no_safetensors": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["--dry_run"],
        1,
        "there is no model.safetensors: weights are sent as safetensors only",
    ),
    "damaged_weights": (lambda folder: set_byte(folder, -1000), ["--dry_run"], 1, "is damaged"),
    "weights_with_NaN": (save_with_nan, ["--dry_run"], 1, "the weights hold NaN or infinite values"),
    "weights_of_another_neuron": (
        lambda folder: change_config(folder, neuron_type="lif"),
        ["--dry_run"],
        1,
        "parameters are not in the weights: bert.encoder.layer.0.attention.output.neuron.decay_logit",
    ),
    "a_pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        ["--dry_run"],
        1,
        "pytorch_model.bin is or may be a pickle, which can run code where it is opened: delete it",
    ),
    "a_pickle_in_a_subfolder": (
        lambda folder: (folder / "more").mkdir() or (folder / "more" / "x.PKL").write_bytes(b""),
        ["--dry_run"],
        1,
        "more/x.PKL is or may be a pickle",
    ),
    "a_link_out_of_the_folder": (
        lambda folder: (folder / "notes.txt").symlink_to("/etc/hostname"),
        ["--dry_run"],
        1,
        "notes.txt is a link to a file outside the folder",
    ),
    "no_tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["--dry_run"],
        1,
        "there is no tokenizer: `tokenizer.save_pretrained(folder)` puts it beside the model",
    ),
    "a_tokenizer_of_more_tokens": (
        lambda folder: trained_tokenizer(folder).save_pretrained(folder),
        ["--dry_run"],
        1,
        "tokens, but the model only 120 embeddings",
    ),
    "a_module_missing": (
        lambda folder: (folder / "surrogate_gradients.py").unlink(),
        ["--dry_run"],
        1,
        "the code lacks surrogate_gradients.py: save the model again",
    ),
    "no_code": (
        lambda folder: (folder / "modeling_snn_bert.py").unlink(),
        ["--dry_run"],
        1,
        "the code lacks modeling_snn_bert.py: save the model again",
    ),
    "no_card": (
        lambda folder: (folder / "README.md").unlink(),
        ["--dry_run"],
        1,
        "there is no model card (README.md): --report writes one",
    ),
    "a_card_without_metadata": (
        lambda folder: (folder / "README.md").write_text("# A model"),
        ["--dry_run"],
        1,
        "README.md has no metadata between lines of ---",
    ),
    "a_card_to_be_filled_in": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\nTO BE FILLED IN"),
        ["--dry_run"],
        1,
        "README.md still says TO BE FILLED IN",
    ),
    "an_adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ["--dry_run"],
        1,
        "this is a PEFT adapter, not a model",
    ),
}


@pytest.fixture(scope="module")
def push_to_hub():
    """The module examples/push_to_hub.py."""
    path = Path(__file__).resolve().parents[1] / "examples" / "push_to_hub.py"
    spec = importlib.util.spec_from_file_location("push_to_hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ready(checkpoint, tokenizer):
    """A folder that could be sent."""
    tokenizer.save_pretrained(checkpoint)
    card_data = ModelCardData(library_name="transformers", license="apache-2.0")
    ModelCard.from_template(card_data, template_str="---\n{{ card_data }}\n---\n# A model\n").save(
        checkpoint / "README.md"
    )
    return checkpoint


def test_no_card_is_written_to_a_folder_that_is_no_model(tmp_path, push_to_hub, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    (tmp_path / "report.json").write_text('{"accuracy": {}, "energy": {}}')
    assert push_to_hub.main(["--model_name_or_path", "mine", "--report", "report.json", "--dry_run"]) == 1
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_a_folder_that_could_be_sent(ready, push_to_hub, capsys):
    assert push_to_hub.main(["--model_name_or_path", str(ready), "--dry_run"]) == 0
    assert "nothing was sent (--dry_run)" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "options", "code", "message"), BAD_PUSHES.values(), ids=BAD_PUSHES)
def test_bad_pushes(ready, push_to_hub, capsys, monkeypatch, change, options, code, message):
    change(ready)
    monkeypatch.chdir(ready.parent)
    try:
        returned = push_to_hub.main(["--model_name_or_path", str(ready), *options])
    except SystemExit as stop:
        returned = stop.code
    assert returned == code
    assert message in capsys.readouterr().err
