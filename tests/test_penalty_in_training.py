"""The penalty on firing rates in losses of one's own and under gradient checkpointing."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_snn_bert import SNNBertForSequenceClassification, loss_with_penalty
from modeling_snn_bert.sparsity import PENALTY_IS_MISSING

IDS = torch.arange(5, 101).view(8, 12)
CLASSES = {"labels": IDS[:, 0] % 2}
WEIGHT = 2.0


def make(make_config):
    torch.manual_seed(0)
    config = make_config(firing_rate_target=0.01, firing_rate_weight=WEIGHT)
    return SNNBertForSequenceClassification(config).train()


def smoothed(outputs, labels, num_items_in_batch=None):
    """A loss that Trainer's users write."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def train(model, folder, compute_loss_func, steps=1, batch_size=8, accumulation=1):
    """The loss of the first step of Trainer, at a learning rate of 0.05, on all rows in their order."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": CLASSES["labels"].tolist()})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, compute_loss_func=compute_loss_func)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_the_wrapped_loss_brings_the_rate_down(make_config, tmp_path):
    rates = {}
    for name, loss in {"bare": smoothed, "wrapped": loss_with_penalty(smoothed, WEIGHT)}.items():
        model = make(make_config)
        if name == "bare":
            with pytest.warns(UserWarning, match="does not hold the penalty"):
                train(model, tmp_path, loss, steps=30)
        else:
            train(model, tmp_path, loss, steps=30)
        with torch.no_grad():
            found = model.eval()(input_ids=IDS, output_firing_rates=True).firing_rates
        rates[name] = torch.stack([rate.mean() for rate in found]).mean()
    assert 0 < rates["wrapped"] < 0.5 * rates["bare"]


def test_the_wrapped_loss_has_the_scale_of_the_loss(make_config, tmp_path):
    loss = loss_with_penalty(smoothed, WEIGHT)
    whole, parts = (
        train(make(make_config), tmp_path, loss, batch_size=rows, accumulation=8 // rows) for rows in (8, 2)
    )
    outputs = make(make_config)(input_ids=IDS)
    wanted = smoothed(outputs, CLASSES["labels"]) + WEIGHT * outputs.firing_rate_penalty
    assert whole == pytest.approx(wanted.item(), rel=1e-4) and parts == pytest.approx(whole, rel=0.05)


def test_evaluation_has_no_penalty(make_config):
    outputs = make(make_config).eval()(input_ids=IDS)
    wrapped = loss_with_penalty(smoothed, WEIGHT)
    assert torch.equal(wrapped(outputs, CLASSES["labels"]), smoothed(outputs, CLASSES["labels"]))


def test_nothing_is_said_where_the_penalty_counts(make_config, recwarn):
    """Two forward passes in one loss, and forward passes that nothing is learned from."""
    model = make(make_config)
    for _ in range(2):
        (model(input_ids=IDS, **CLASSES).loss + model(input_ids=IDS.flip(0), **CLASSES).loss).backward()
        model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
    assert PENALTY_IS_MISSING not in {str(warning.message) for warning in recwarn}


CHECKPOINTING = {True: "reentrant", False: "not-reentrant"}


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING.values())
@pytest.mark.parametrize("trained", ["everything", "lora", "neurons", "last-layer", "head"])
def test_checkpointing_never_loses_the_penalty(make_config, use_reentrant, trained):
    """Refused, or with the gradients that there are without checkpointing, whatever of the model trains."""

    def gradients(checkpointing):
        model = make(make_config)
        if trained == "lora":
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(target_modules=["query", "key", "value"], r=4, init_lora_weights=False)
            torch.manual_seed(1)
            wrapped = peft.get_peft_model(model, config)
            model.enable_input_require_grads()
        else:
            wrapped = model
            parts = {"everything": "", "neurons": "neuron", "last-layer": "layer.1.", "head": "classifier"}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parts[trained] in name)
            if trained != "head":
                model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        wrapped.train()(input_ids=IDS, **CLASSES).loss.backward()
        return {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad and p.grad is not None}

    plain = gradients(False)
    assert plain and any(x.abs().max() > 0 for x in plain.values())
    if use_reentrant and trained != "head":
        with pytest.raises(RuntimeError, match=r"firing_rate_target.*use_reentrant"):
            gradients(True)
    else:
        checkpointed = gradients(True)
        assert checkpointed.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)
