"""Firing rates in Trainer's log, in TensorBoard's event files and in the progress bar."""

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.callbacks import FiringRateCallback
from modeling_snn_bert.spiking_neurons import SpikingNeuron


@pytest.fixture
def train(make_config, tokenizer, texts, tmp_path):
    """A function that trains for 4 steps with the callback and returns the Trainer."""

    def run(config=None, per_neuron=False, callbacks=(), **arguments):
        torch.manual_seed(0)
        model = SNNBertForSequenceClassification(make_config(**(config or {})))
        data = Dataset.from_dict({**tokenizer(texts), "labels": [0, 1] * 3})
        settings = {
            "logging_steps": 2,
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
        }
        settings = TrainingArguments(str(tmp_path / "run"), **{**settings, **arguments})
        trainer = Trainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks))
        trainer.add_callback(FiringRateCallback(trainer, per_neuron=per_neuron))
        trainer.train()
        return trainer

    return run


def records(trainer):
    return {record["step"]: record for record in trainer.state.log_history if "firing_rate" in record}


def test_a_record_for_each_log(train):
    trainer = train()
    assert list(records(trainer)) == [2, 4]
    for record in records(trainer).values():
        assert set(record) == {"firing_rate", "firing_rate_layer_0", "firing_rate_layer_1", "epoch", "step"}
        assert 0 < record["firing_rate"] < 1
        layers = (record["firing_rate_layer_0"] + record["firing_rate_layer_1"]) / 2
        assert record["firing_rate"] == pytest.approx(layers)
    # The loss is logged as without the callback.
    assert [record["step"] for record in trainer.state.log_history if "loss" in record] == [2, 4]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"spike_type": "ternary"},
        {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 2},
    ],
    ids=["binary", "ternary", "repeat"],
)
def test_rates_are_those_of_the_models_own_outputs(train, config, tokenizer, texts):
    """At learning rate 0 and with all texts in one batch, what is logged is what the model itself says."""
    trainer = train(config, per_neuron=True, learning_rate=0.0, per_device_train_batch_size=6)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = trainer.model.train()(**inputs, output_firing_rates=True)
    # The outputs' rates are per sequence; the callback weighs all tokens alike.
    lengths = inputs["attention_mask"].sum(-1, keepdim=True)
    expected = [((rates * lengths).sum(0) / lengths.sum()).mean().item() for rates in outputs.firing_rates]
    record = records(trainer)[4]
    logged = [record[name] for name in record if name.startswith(("firing_rate_layer_0_", "firing_rate_layer_1_"))]
    assert len(logged) == 14 and all(0 < rate < 1 for rate in logged)
    assert logged == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 6},
    ],
    ids=["accumulation", "checkpointing"],
)
def test_several_forward_passes_of_a_step_add_up(train, arguments):
    expected = records(train(learning_rate=0.0, per_device_train_batch_size=6))
    trainer = train(learning_rate=0.0, **arguments)
    assert records(trainer)[2]["firing_rate"] == pytest.approx(expected[2]["firing_rate"])


def test_only_logging_steps_are_measured(train):
    hooked = []

    class CountHooks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
            hooked.append(sum(len(neuron._forward_hooks) for neuron in neurons))

    trainer = train(callbacks=[CountHooks()], logging_steps=3)
    assert hooked == [0, 0, 14, 0]
    assert not any(module._forward_hooks for module in trainer.model.modules() if isinstance(module, SpikingNeuron))


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"logging_strategy": "epoch"}, [2, 4]),
        ({"logging_first_step": True, "logging_steps": 3}, [1, 3]),
        ({"logging_strategy": "no"}, []),
    ],
    ids=["epoch", "first", "no"],
)
def test_logging_strategies(train, arguments, steps):
    assert list(records(train(**arguments))) == steps


def test_training_is_the_same_with_and_without(train, monkeypatch):
    with_rates = train().model.state_dict()
    monkeypatch.setattr(FiringRateCallback, "_will_log", lambda *args: False)
    without = train().model.state_dict()
    assert all(torch.equal(with_rates[name], without[name]) for name in without)


def test_tensorboard(train, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("firing_rate", "firing_rate_layer_0", "firing_rate_layer_1"):
        scalars = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert scalars == pytest.approx({step: record[name] for step, record in records(trainer).items()})
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_progress_bar(train, capsys):
    trainer = train(disable_tqdm=False)
    rate = records(trainer)[4]["firing_rate"]
    assert f"firing_rate={rate:.3f}" in capsys.readouterr().err


def test_a_model_without_neurons(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    trainer = Trainer(BertForSequenceClassification(config), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="must have spiking neurons, such as an SNN-BERT, got BertForSequence"):
        FiringRateCallback(trainer)
