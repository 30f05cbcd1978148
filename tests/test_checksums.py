"""Damaged checkpoints are refused or load the same model; what cannot be seen is written down here, too."""

import logging
import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.checksums import SUM_KEY, check_checksums, write_checksums

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
positions = st.floats(0, 1, exclude_max=True)


@pytest.fixture
def saved(make_config, tmp_path):
    """A folder with a checkpoint, and the model."""
    model = SNNBertForSequenceClassification(make_config(num_labels=3)).eval()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


@pytest.fixture
def sharded(make_config, tmp_path):
    model = SNNBertForSequenceClassification(make_config(num_labels=3)).eval()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded", model


def load(folder):
    return SNNBertForSequenceClassification.from_pretrained(folder)


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)


@contextmanager
def restored(path):
    """The file is what it was, also after a failure; yields its bytes."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        path.write_bytes(content)


def refused_or_same(folder, model, caplog):
    """The outcome of a load; a model that differs without a word fails the test."""
    caplog.clear()
    try:
        loaded = load(folder)
    except Exception as error:
        assert str(error), "an error without a message"
        return "refused"
    assert same_weights(loaded, model)
    if loaded.config.to_diff_dict() != model.config.to_diff_dict():
        assert "has changed since the weights beside it were saved" in caplog.text
        return "warned"
    return "same"


@pytest.fixture
def log(caplog):
    """`caplog`, which sees transformers' messages too."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    ours = logging.getLogger("modeling_snn_bert")
    ours.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    ours.removeHandler(caplog.handler)


class TestSums:
    def test_saved_in_the_file_itself(self, saved):
        folder, model = saved
        with safe_open(folder / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt" and re.fullmatch("[0-9a-f]{64}", metadata[SUM_KEY])
        assert check_checksums(folder)
        assert same_weights(load(folder), model)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    def test_sharded(self, sharded):
        folder, model = sharded
        assert check_checksums(folder)
        assert same_weights(load(folder), model)

    def test_written_once(self, saved):
        folder, _ = saved
        before = (folder / "model.safetensors").read_bytes()
        write_checksums(folder)
        assert (folder / "model.safetensors").read_bytes() == before

    def test_another_program_s_file_passes_unchecked(self, saved):
        folder, model = saved
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
        assert not check_checksums(folder)
        assert same_weights(load(folder), model)

    def test_adapter_only(self, saved, tmp_path):
        folder, _ = saved
        (tmp_path / "adapter").mkdir()
        shutil.copy(folder / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors")
        assert check_checksums(tmp_path / "adapter")


class TestFuzz:
    """Every flip and cut is refused, or leaves the model as it was."""

    @FUZZ
    @given(position=positions, bit=st.integers(0, 7))
    def test_flipped_weights(self, saved, log, position, bit):
        folder, model = saved
        path = folder / "model.safetensors"
        with restored(path):
            flip(path, position, bit)
            assert refused_or_same(folder, model, log) in ("refused", "same")

    @FUZZ
    @given(position=positions, bit=st.integers(0, 7))
    def test_flipped_header(self, saved, log, position, bit):
        folder, model = saved
        path = folder / "model.safetensors"
        with restored(path) as content:
            header = 8 + int.from_bytes(content[:8], "little")
            flip(path, position * header / len(content), bit)
            assert refused_or_same(folder, model, log) in ("refused", "same")

    @FUZZ
    @given(position=positions)
    def test_truncated_weights(self, saved, log, position):
        folder, model = saved
        path = folder / "model.safetensors"
        with restored(path) as content:
            path.write_bytes(content[: int(position * len(content))])
            assert refused_or_same(folder, model, log) == "refused"

    @FUZZ
    @given(position=positions, bit=st.integers(0, 7))
    def test_flipped_configuration(self, saved, log, position, bit):
        folder, model = saved
        path = folder / "config.json"
        with restored(path):
            flip(path, position, bit)
            refused_or_same(folder, model, log)

    @FUZZ
    @given(position=positions)
    def test_truncated_configuration(self, saved, log, position):
        folder, model = saved
        path = folder / "config.json"
        with restored(path) as content:
            content = content.rstrip()
            path.write_bytes(content[: int(position * len(content))])
            assert refused_or_same(folder, model, log) == "refused"

    @FUZZ
    @given(position=positions, bit=st.integers(0, 7))
    def test_flipped_index(self, sharded, log, position, bit):
        folder, model = sharded
        path = folder / "model.safetensors.index.json"
        with restored(path):
            flip(path, position, bit)
            assert refused_or_same(folder, model, log) == "refused"


class TestLayers:
    """A configuration of more layers than the checkpoint has."""

    def test_misspelt_setting(self, saved):
        # One flipped bit; transformers takes the default, 12, and would fill ten layers with random numbers.
        folder, _ = saved
        path = folder / "config.json"
        path.write_text(path.read_text().replace("num_hidden_layers", "num_hidden_layeRs"))
        with pytest.raises(ValueError, match=r"`num_hidden_layers` is 12, but .* of the encoder layers 2, 3, 4, 5,"):
            load(folder)

    def test_of_a_bert(self, make_config, tmp_path):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = make_config()
        BertModel(BertConfig(**{name: getattr(config, name) for name in names})).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"`num_hidden_layers` is 3, but .* no weights of the encoder layers 2 "):
            SNNBertForSequenceClassification.from_pretrained(tmp_path, num_hidden_layers=3)

    def test_fewer_layers_are_a_choice(self, saved):
        folder, model = saved
        small = SNNBertForSequenceClassification.from_pretrained(folder, num_hidden_layers=1)
        weights = model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in small.state_dict().items())


def test_a_flip_in_a_file_without_a_sum_is_not_seen(saved):
    """What safetensors itself does, and the reason for the sums."""
    folder, model = saved
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert not same_weights(load(folder), model)


class TestSwapped:
    def other(self, saved, tmp_path, **settings):
        """A second checkpoint, of other weights and settings."""
        _, model = saved
        config = type(model.config)(**{**model.config.to_dict(), **settings})
        torch.manual_seed(1)
        other = SNNBertForSequenceClassification(config).eval()
        other.save_pretrained(tmp_path / "other")
        return tmp_path / "other", other

    def test_configuration_of_another_shape(self, saved, tmp_path):
        folder, _ = saved
        other, _ = self.other(saved, tmp_path, intermediate_size=64)
        shutil.copy(other / "config.json", folder)
        with pytest.raises(RuntimeError, match=r"size|mismatch"):
            load(folder)

    def test_configuration_of_another_neuron_setting_is_told(self, saved, tmp_path, log):
        folder, model = saved
        other, _ = self.other(saved, tmp_path, reset_iterations=3)
        shutil.copy(other / "config.json", folder)
        assert refused_or_same(folder, model, log) == "warned"

    def test_configuration_in_place_of_weights_and_the_reverse(self, saved):
        folder, _ = saved
        config, weights = folder / "config.json", folder / "model.safetensors"
        text, content = config.read_bytes(), weights.read_bytes()
        weights.write_bytes(text)
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            load(folder)
        config.write_bytes(content)
        with pytest.raises((OSError, ValueError, UnicodeDecodeError)):
            load(folder)

    def test_shards_exchanged_with_one_another(self, sharded, log):
        folder, model = sharded
        first, second, *_ = sorted(folder.glob("model-*.safetensors"))
        first.rename(folder / "waiting")
        second.rename(first)
        (folder / "waiting").rename(second)
        assert refused_or_same(folder, model, log) in ("refused", "same")

    def test_a_shard_of_another_save(self, sharded, tmp_path):
        folder, _ = sharded
        _, other = self.other(sharded, tmp_path)
        other.save_pretrained(tmp_path / "other", max_shard_size="40KB")
        name = sorted(path.name for path in folder.glob("model-*.safetensors"))[0]
        shutil.copy(tmp_path / "other" / name, folder)
        with pytest.raises(ValueError, match="do not belong together"):
            load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.neuron.v_threshold", "bert.encoder.layer.0.attention.self.query.weight"]
)
def test_weights_that_are_not_numbers(saved, name, value):
    """They can be saved and their sum is right, so it takes a check of its own."""
    folder, model = saved
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=re.escape(f"NaN or infinite values in {name}")):
        load(folder)


def test_every_auto_class_is_protected(saved):
    folder, _ = saved
    flip(folder / "model.safetensors", 0.9, 3)
    with pytest.raises(ValueError, match="is damaged"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_one_file_and_shards_of_two_saves_are_refused(make_config, tmp_path):
    old, new = (SNNBertForSequenceClassification(make_config(num_labels=3)).eval() for _ in range(2))
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size="40KB")
    with pytest.raises(ValueError, match="the weights of two saves"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert check_checksums(tmp_path) and same_weights(load(tmp_path), new)


def test_one_file_after_shards_is_loaded(sharded, make_config):
    folder, _ = sharded
    new = SNNBertForSequenceClassification(make_config(num_labels=3)).eval()
    new.save_pretrained(folder)
    assert check_checksums(folder) and same_weights(load(folder), new)
