"""Watching neurons while a model runs. This is the one place that hooks them; counters are what is made of it."""

import functools
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from .spiking_neurons import SpikingNeuron


class Firing(NamedTuple):
    """What a neuron layer did in one call.

    Attributes:
        name: as from the model's `neuron_names()`.
        neuron: the module.
        current: what it received, `[batch, seq_len, channels]`.
        token_mask: nonzero at valid tokens, `[batch, seq_len]`, or `None` if all are.
        spikes: what it gave, `[batch, seq_len, channels]`, 0 at tokens that are not valid.
    """

    name: str
    neuron: SpikingNeuron
    current: torch.Tensor
    token_mask: torch.Tensor | None
    spikes: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor | int:
        """The number of valid tokens."""
        if self.token_mask is None:
            return self.spikes.shape[0] * self.spikes.shape[1]
        return torch.count_nonzero(self.token_mask)


class SpikeObserver:
    """Calls `see` for each neuron layer of `model` that runs, from `start` to `stop` or while it is entered.

    Neurons that the kernels of event-driven inference or a compiled graph stand for do not run.

    Args:
        model: a model with neurons.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = named_neurons(model)
        self.handles: list[Any] = []

    def see(self, firing: Firing) -> None:
        """What a counter does with it."""
        raise NotImplementedError

    def start(self) -> None:
        self.handles += [
            neuron.register_forward_hook(functools.partial(self._hook, name), with_kwargs=True)
            for name, neuron in self.neurons
        ]

    def stop(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def _hook(self, name: str, neuron: SpikingNeuron, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(("current", "attention_mask"), args, strict=False)) | kwargs
        spikes = output[0] if isinstance(output, tuple) else output
        self.see(Firing(name, neuron, given["current"], given.get("attention_mask"), spikes))


def named_neurons(model: nn.Module) -> list[tuple[str, SpikingNeuron]]:
    """The neuron layers of `model` in the order in which they fire, and their names.

    A neuron that PEFT trains stands there twice under one name, as it was and as it is trained; one of the two runs.
    """
    copies = re.compile(r"\.(original_module|modules_to_save\.[^.]+)$")
    modules = model.named_modules()
    return [(copies.sub("", name), module) for name, module in modules if isinstance(module, SpikingNeuron)]
