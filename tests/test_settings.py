"""Settings of the configuration as words of a command line."""

import argparse

import pytest

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.settings import parse_settings, refuse_given


def test_settings_have_the_types_of_the_configuration():
    text = "decay=0.1,reset_iterations=0,bidirectional=False,spike_type=ternary,firing_rate_target=0.1,psn_length=64"
    wanted = {"decay": 0.1, "reset_iterations": 0, "bidirectional": False, "spike_type": "ternary"}
    wanted |= {"firing_rate_target": 0.1, "psn_length": 64}
    found = parse_settings(text)
    assert found == wanted and all(type(found[name]) is type(value) for name, value in wanted.items())
    assert parse_settings("firing_rate_target=0.2") == {"firing_rate_target": 0.2}
    assert parse_settings(None) == {}
    # One grammar: with commas, in several words, or both.
    assert parse_settings(["decay=0.1,reset_iterations=0", "bidirectional=False"]) == parse_settings(
        "decay=0.1,reset_iterations=0,bidirectional=False"
    )


def test_a_value_may_hold_commas():
    assert parse_settings('id2label={"0": "bad", "1": "good"},decay=0.5') == {
        "id2label": {"0": "bad", "1": "good"},
        "decay": 0.5,
    }
    SNNBertConfig(**parse_settings("hidden_dropout_prob=0,firing_rate_target=None"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("decay", "NAME=VALUE, got 'decay'"), ("decay=0.1,decoy=1", "'decoy' is none of the settings")],
)
def test_bad_settings(text, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(text)


@pytest.mark.parametrize("words", [["--rate", "0.2"], ["--rate=0.2"], ["--speed", "0.2"], ["--whole"]])
def test_a_given_flag_is_told_from_its_default(monkeypatch, words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", "--speed", type=float, default=0.2)
    parser.add_argument("--whole", action="store_true")
    monkeypatch.setattr("sys.argv", ["script", *words])
    with pytest.raises(ValueError, match=f"--{'whole' if words == ['--whole'] else 'rate'} needs another"):
        refuse_given(parser, ["rate", "whole"], "needs another")
    monkeypatch.setattr("sys.argv", ["script"])
    refuse_given(parser, ["rate", "whole"], "needs another")
