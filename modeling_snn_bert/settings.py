"""Settings of `SNNBertConfig` as users write them on a command line (`spike_type=ternary,decay=0.1`), and flags."""

import dataclasses
import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from .configuration_snn_bert import SNNBertConfig

# A comma within a value, as in a list, is followed by no name.
BETWEEN_SETTINGS = re.compile(r",(?=\w+=)")


def parse_settings(words: str | Sequence[str] | None) -> dict[str, Any]:
    """`"spike_type=ternary,decay=0.1"`, or several such words, as a dictionary of settings of `SNNBertConfig`.

    A value is JSON, or else the word itself. Whether it fits its setting is checked where a configuration is made.

    Raises:
        ValueError: for a word without `=`, and for a name that is no setting.
    """
    known = {field.name for field in dataclasses.fields(SNNBertConfig)}
    own = sorted(known & set(SNNBertConfig.__annotations__))
    settings: dict[str, Any] = {}
    for word in [words] if isinstance(words, str) else words or ():
        for part in BETWEEN_SETTINGS.split(word):
            name, separator, text = part.partition("=")
            if not separator:
                raise ValueError(f"must have the form NAME=VALUE, got {part!r}")
            if name not in known:
                raise ValueError(f"{name!r} is none of the settings {', '.join(own)}")
            try:
                settings[name] = json.loads(text)
            except json.JSONDecodeError:
                # A word is itself; Python's spelling of the constants is taken too.
                settings[name] = {"True": True, "False": False, "None": None}.get(text, text)
    return settings


@dataclass
class ConversionArguments:
    """How a BERT becomes an SNN-BERT; `HfArgumentParser` makes flags of it."""

    firing_rate: float = HfArg(default=0.2, help="firing rate at calibration")
    config_overrides: str | None = HfArg(
        default=None, aliases=["--setting"], help="settings of SNNBertConfig: spike_type=ternary,decay=0.1"
    )

    def __post_init__(self) -> None:
        if not 0 < self.firing_rate < 1:
            raise ValueError(f"--firing_rate must lie in (0, 1), got {self.firing_rate}")
        self.settings()

    def settings(self) -> dict[str, Any]:
        """The settings of `SNNBertConfig` that the flags change."""
        try:
            return parse_settings(self.config_overrides)
        except ValueError as error:
            raise ValueError(f"--config_overrides: {error}") from error


def refuse_given(parser: ArgumentParser, names: Sequence[str], why: str) -> None:
    """Raise a `ValueError`, `--name why`, if the command line has one of these flags, which would do nothing.

    That a flag has its default says nothing of whether it was given.
    """
    unset = object()
    given, _ = parser.parse_known_args(namespace=Namespace(**dict.fromkeys(names, unset)))
    for name in names:
        if getattr(given, name) is not unset:
            raise ValueError(f"--{name} {why}")
