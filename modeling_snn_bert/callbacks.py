"""Firing rates while `transformers.Trainer` trains: for its reporters, its log history and its progress bar.

trainer.add_callback(FiringRateCallback(trainer))
"""

import logging
import math

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from .layer_places import short_name
from .spike_observer import Firing, SpikeObserver, named_neurons

logger = logging.getLogger(__name__)


class FiringRateCallback(TrainerCallback):
    """Logs the firing rates of the training batches at which Trainer logs.

    Each record holds `firing_rate`, the mean over all neuron layers, and `firing_rate_layer_0` and so on, the mean over
    the neuron layers of that encoder layer; it goes the way of the loss, to whatever `report_to` names. The progress
    bar shows the mean. Rates are spikes per valid token, channel and time-step, of the steps that log and no others:
    at all other steps nothing is measured, so training goes at its usual speed. Under several processes they are
    those of the batch of process 0.

    Args:
        trainer: the Trainer to which the callback is added.
        per_neuron: whether to log each neuron layer too, such as `firing_rate_layer_0_query`.

    Raises:
        ValueError: if the Trainer's model has no spiking neurons.
    """

    def __init__(self, trainer: Trainer, *, per_neuron: bool = False) -> None:
        model = trainer.model
        if model is not None and not named_neurons(model):
            raise ValueError(
                f"the model of `trainer` must have spiking neurons, such as an SNN-BERT, got {type(model).__name__}"
            )
        self.trainer, self.per_neuron = trainer, per_neuron
        self.step_of_epoch = 0
        self.meter: _FiringRateMeter | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.step_of_epoch = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.step_of_epoch += 1
        self._stop()
        if self._will_log(args, state, kwargs["train_dataloader"]):
            self.meter = _FiringRateMeter(kwargs["model"])
            self.meter.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.meter is not None:
            self.meter.stop()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # The record of the rates is logged from within that of the loss: Trainer would skip the loss if something
        # else were logged at the end of the step.
        meter, self.meter = self.meter, None
        if meter is None:
            return
        rates = meter.rates()
        if not rates:
            logger.warning("no neuron layer ran in plain form (is the model compiled?): no firing rates are logged")
            return
        self.trainer.log(self._record(rates))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                mean = sum(rates.values()) / len(rates)
                callback.training_bar.set_postfix(firing_rate=f"{mean:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._stop()

    def _will_log(self, args: TrainingArguments, state: TrainerState, loader) -> bool:
        """Whether Trainer will log when the step that begins now is done."""
        step = state.global_step + 1
        if args.logging_strategy == "epoch":
            steps = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1) if has_length(loader) else None
            return self.step_of_epoch == steps or step == state.max_steps
        is_first = step == 1 and args.logging_first_step
        return args.logging_strategy == "steps" and (is_first or step % state.logging_steps == 0)

    def _record(self, rates: dict[str, float]) -> dict[str, float]:
        layers: dict[str, list[float]] = {}
        for name, rate in rates.items():
            layers.setdefault(name.split(",")[0], []).append(rate)
        record = {"firing_rate": sum(rates.values()) / len(rates)}
        record |= {_key(layer): sum(values) / len(values) for layer, values in layers.items()}
        if self.per_neuron:
            record |= {_key(name): rate for name, rate in rates.items()}
        return record

    def _stop(self) -> None:
        if self.meter is not None:
            self.meter.stop()
        self.meter = None


class _FiringRateMeter(SpikeObserver):
    """Counts the spikes of every neuron layer of `model`, without gradients or a wait for a GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.spikes: dict[str, torch.Tensor] = {}
        self.places: dict[str, torch.Tensor | int] = {}

    def rates(self) -> dict[str, float]:
        """Spikes per valid token and channel of every neuron layer that ran, by its short name."""
        return {name: float(count / self.places[name]) for name, count in self.spikes.items()}

    @torch.no_grad()
    def see(self, firing: Firing) -> None:
        name = short_name(firing.name)
        # Several forward passes of one step (accumulation, checkpointing) add up.
        self.spikes[name] = self.spikes.get(name, 0) + torch.count_nonzero(firing.spikes)
        self.places[name] = self.places.get(name, 0) + firing.tokens * firing.neuron.num_channels


def _key(name: str) -> str:
    return "firing_rate_" + name.replace(", ", "_").replace(" ", "_")
