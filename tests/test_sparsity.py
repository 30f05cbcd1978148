"""The penalty on firing rates: what it is, its gradient, and that every head adds it while training."""

import pytest
import torch

from modeling_snn_bert import (
    BPSN,
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)
from modeling_snn_bert.sparsity import FiringRateRecorder, SpikeCount, firing_rate_penalty

IDS = torch.arange(5, 29).view(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
TOKENS = {"labels": torch.ones(3, 8, dtype=torch.long)}
CLASSES = {"labels": torch.tensor([0, 1, 0])}
HEADS = {
    "masked-lm": (SNNBertForMaskedLM, TOKENS),
    "sequence": (SNNBertForSequenceClassification, CLASSES),
    "token": (SNNBertForTokenClassification, TOKENS),
    "question": (
        SNNBertForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])},
    ),
    "choice": (SNNBertForMultipleChoice, {"labels": torch.tensor([2])}),
}
SETTINGS = {
    "bpsn": {},
    "ternary": {"spike_type": "ternary"},
    "lif": {"neuron_type": "lif"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "psn": {"neuron_type": "psn", "psn_length": 8},
    "spiking-attention": {"attention_type": "spiking"},
    "toeplitz": {"integration": "toeplitz"},
}


def inputs_for(head):
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    return {name: x[None] for name, x in inputs.items()} if head is SNNBertForMultipleChoice else inputs


@pytest.mark.parametrize(("head", "labels"), HEADS.values(), ids=HEADS)
def test_every_head_adds_the_penalty_while_training(make_config, head, labels):
    torch.manual_seed(0)
    model = head(make_config(firing_rate_target=0.05, firing_rate_weight=3.0)).train()
    inputs = inputs_for(head)
    outputs = model(**inputs, **labels)
    assert outputs.firing_rate_penalty > 0
    model.config.firing_rate_target = None
    plain = model(**inputs, **labels)
    assert plain.firing_rate_penalty is None and "firing_rate_penalty" not in plain
    torch.testing.assert_close(outputs.loss, plain.loss + 3 * outputs.firing_rate_penalty)
    model.config.firing_rate_target = 0.05
    assert model(**inputs).loss is None
    assert model(**inputs, **labels, return_dict=False)[0] == outputs.loss
    model.eval()
    torch.testing.assert_close(model(**inputs, **labels).loss, plain.loss)
    assert model(**inputs, **labels).firing_rate_penalty is None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rates_are_those_of_valid_tokens_and_the_gradient_is_autograds(make_config, settings):
    torch.manual_seed(0)
    model = SNNBertModel(make_config(firing_rate_target=0.1, **settings)).train()
    outputs = model(IDS, MASK, output_spikes=True)
    tokens = MASK.sum() * model.config.num_timesteps
    ternary = model.config.spike_type == "ternary"
    # Not `abs` for binary spikes: its gradient is 0 at silent neurons, which are as much a part of the rate.
    rates = [(s.abs() if ternary else s).sum() / (tokens * s.shape[-1]) for s in outputs.spikes]
    assert all(0 < rate < 1 for rate in rates)
    expected = torch.stack([(rate / 0.1 - 1).clamp(min=0) ** 2 for rate in rates]).mean()
    torch.testing.assert_close(outputs.firing_rate_penalty, expected)
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    got = torch.autograd.grad(outputs.firing_rate_penalty, parameters, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert sum(g is not None and bool(g.ne(0).any()) for g in got) > len(parameters) / 2
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("spike_type", ["binary", "ternary"])
@pytest.mark.parametrize("coding", [{}, SETTINGS["repeat"]], ids=["individual", "repeat"])
def test_gradient_checkpointing_changes_nothing(make_config, spike_type, coding):
    config = make_config(firing_rate_target=0.05, spike_type=spike_type, **coding)
    torch.manual_seed(0)
    model = SNNBertForSequenceClassification(config).train()
    gradients = []
    for use in (False, True):
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        outputs = model(IDS, MASK, **CLASSES)
        outputs.loss.backward()
        gradients.append([outputs.firing_rate_penalty] + [p.grad.clone() for p in model.parameters()])
    assert gradients[0][0] > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_is_refused(make_config):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.05)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(IDS, MASK, **CLASSES)


# What a loss of one's own may be made of; the last two leave out the penalty on purpose or by mistake.
LOSSES = {
    "head": (lambda outputs: outputs.loss, False),
    "own": (lambda outputs: outputs.logits.square().mean() + outputs.firing_rate_penalty, False),
    "penalty": (lambda outputs: outputs.firing_rate_penalty, False),
    "logits": (lambda outputs: outputs.logits.square().mean(), True),
    "hidden-states": (lambda outputs: outputs.hidden_states[1].square().mean(), True),
}


@pytest.mark.parametrize(("loss", "warns"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_loss_without_the_penalty_is_told_of(make_config, recwarn, loss, warns, checkpointing):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.05)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model(IDS, MASK, **CLASSES, output_hidden_states=True)).backward()
    assert any("does not hold the penalty" in str(x.message) for x in recwarn) == warns


def test_no_target_no_warning(make_config, recwarn):
    model = SNNBertForSequenceClassification(make_config()).train()
    model(IDS, MASK).logits.square().mean().backward()
    assert not [x for x in recwarn if "penalty" in str(x.message)]


# What may train; whether it stands before a neuron.
TRAINED = {
    "neurons": ("neuron", True),
    "query": ("query.weight", True),
    "embeddings": ("word_embeddings", True),
    "pooler": ("pooler", False),
    "classifier": ("classifier", False),
}


@pytest.mark.parametrize(("part", "refused"), TRAINED.values(), ids=TRAINED)
def test_reentrant_checkpointing_is_refused_whatever_trains(make_config, part, refused):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.05)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    model.enable_input_require_grads()
    model(IDS, MASK, **CLASSES).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if refused:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            model(IDS, MASK, **CLASSES)
    else:
        model(IDS, MASK, **CLASSES).loss.backward()


def test_training_reaches_the_target(make_config):
    torch.manual_seed(0)
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.08)).train()

    def highest_rate():
        with torch.no_grad():
            rates = model.eval()(IDS, MASK, output_firing_rates=True).firing_rates
        return max(rate.mean().item() for rate in rates)

    before = highest_rate()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model.train()(IDS, MASK, **CLASSES).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 0.15 and 0 < highest_rate() < 0.12


def test_no_hook_is_left_behind(make_config):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.05)).train()
    model(IDS, MASK, **CLASSES)
    with pytest.raises(ValueError, match="labels"):
        model(IDS, MASK, labels=torch.tensor([0, 1, 7]))
    with pytest.raises(ValueError, match="input_ids"):
        model(IDS.clone().fill_(-1), MASK)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, BPSN))


def test_nothing_is_saved_for_binary_spikes():
    spikes = (torch.rand(4, 5, 6) < 0.3).float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        count = SpikeCount.apply(spikes, False)
    assert not saved and count == spikes.sum() > 0
    assert torch.equal(torch.autograd.grad(count, spikes)[0], torch.ones_like(spikes))


def test_penalty_by_hand():
    rates = [torch.tensor(0.3), torch.tensor(0.05), torch.tensor([0.1, 0.3])]
    # (0.3 / 0.1 - 1)^2 = 4, nothing below the target, (0.2 / 0.1 - 1)^2 = 1
    assert firing_rate_penalty(rates, 0.1).item() == pytest.approx(5 / 3)
    with pytest.raises(ValueError, match="at least one"):
        firing_rate_penalty([], 0.1)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        firing_rate_penalty(rates, 0)


def test_frozen_neurons_need_no_gradient(make_config):
    model = SNNBertForSequenceClassification(make_config(firing_rate_target=0.05)).train()
    model.bert.requires_grad_(False)
    outputs = model(IDS, MASK, **CLASSES)
    assert outputs.firing_rate_penalty > 0
    outputs.loss.backward()


def test_recorder_counts_without_a_mask(make_config):
    model = SNNBertModel(make_config()).eval()
    with FiringRateRecorder(model) as recorder, torch.no_grad():
        firing_rates = model(IDS, output_firing_rates=True).firing_rates
        rates = recorder.rates()
    for rate, wanted in zip(rates, firing_rates, strict=True):
        torch.testing.assert_close(rate, wanted.mean())
