"""Model cards state what was measured, all of it, and nothing else."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from modeling_snn_bert import SNNBertForMaskedLM, SNNBertForMultipleChoice, SNNBertForSequenceClassification
from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.model_card import Score, Speed, card_from_report, model_card


@pytest.fixture
def saved(make_config, tmp_path):
    """A model that was saved, so that its configuration names its head."""

    def save(head=SNNBertForSequenceClassification, **settings):
        model = head(make_config(**settings)).eval()
        model.save_pretrained(tmp_path)
        return model

    return save


@pytest.fixture
def energy(saved, tokenizer, texts):
    return energy_report(saved(), [tokenizer(texts, padding=True, return_tensors="pt")], run_lengths=False)


def quickstart_report(energy, **changes):
    report = {
        "command": "python examples/quickstart.py --seed 7",
        "base_model": "somebody/some-bert",
        "dataset": {"name": "some reviews", "split": "validation"},
        "accuracy": {"SNN-BERT": 0.78125, "BERT": 0.855, "majority class": 0.51},
        "training_sentences": 1000,
        "validation_sentences": 143,
        "distillation_steps": 400,
        "finetuning_steps": 250,
        "energy": energy.to_dict(),
        "seed": 7,
    }
    report = {**report, **changes}
    return json.loads(json.dumps({name: value for name, value in report.items() if value is not None}))


def sections(card):
    return re.findall(r"^## (.+)$", card.text, re.MULTILINE)


def test_quickstart(saved, energy, tmp_path):
    model = saved()
    card = card_from_report(model.config, quickstart_report(energy), model_id="you/yours", license="mit")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.model_name, data.base_model, data.license) == ("yours", "somebody/some-bert", "mit")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.78125, "validation")
    assert result.dataset_name == "some reviews"
    text = (tmp_path / "README.md").read_text()
    assert "| **this model** | accuracy | 0.7812 | some reviews | validation | 143 | 7 |" in text
    assert "| majority class | accuracy | 0.51 | some reviews | validation | 143 | 7 |" in text
    assert "| steps of distillation | 400 |" in text and "`python examples/quickstart.py --seed 7`" in text
    assert 'AutoModelForSequenceClassification.from_pretrained("you/yours", **source)' in text


def test_energy_and_rates_are_those_of_the_report(saved, energy):
    text = card_from_report(saved().config, energy.to_dict()).text
    rates = list(energy.firing_rates().values())
    assert f"**{sum(rates) / len(rates):.3f} ({min(rates):.3f} to {max(rates):.3f})**" in text
    for cost in energy.costs:
        name = "**this model**" if cost is energy.cost else cost.name
        row = (cost.matrix_product_picojoules, cost.picojoules, cost.memory.picojoules)
        assert f"| {name} | " + " | ".join(f"{value / 1e6:,.2f}" for value in row) + " |" in text


def test_what_is_not_known_is_left_out(saved, energy):
    config = saved().config
    bare = model_card(config)
    assert sections(bare) == ["Architecture", "How to load", "Limits"]
    assert bare.data.eval_results is None and "license" not in bare.data.to_dict()
    assert "base_model" not in bare.data.to_dict()
    partial = quickstart_report(energy, dataset=None, base_model=None, seed=None, command=None)
    card = card_from_report(config, partial)
    # Without the data's name a score is no result, and a column that would be empty is not there.
    assert card.data.eval_results is None
    assert "| model | metric | value | examples |" in card.text and "seed" not in card.text
    for word in ("None", "nan", "TO BE FILLED IN"):
        assert word not in card.text


def test_speeds(saved):
    card = model_card(saved().config, speeds=[Speed("inference, batch 1", 123.4, "sentences per second", "a laptop")])
    assert "| inference, batch 1 | 123.4 sentences per second | a laptop |" in card.text


@pytest.mark.parametrize(
    ("head", "tag", "auto_class"),
    [
        (SNNBertForMaskedLM, "fill-mask", "AutoModelForMaskedLM"),
        (SNNBertForMultipleChoice, None, "AutoModelForMultipleChoice"),
    ],
)
def test_heads(saved, head, tag, auto_class):
    card = model_card(saved(head).config, scores=[Score("accuracy", 0.5, dataset="x")])
    assert card.data.pipeline_tag == tag
    assert f"import {auto_class}, AutoTokenizer" in card.text


def test_length_of_a_psn(saved):
    card = model_card(saved(neuron_type="psn", psn_length=8).config)
    assert "exactly 8 tokens" in card.text and "at most" not in card.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True, None])
def test_scores_are_numbers(value):
    with pytest.raises(ValueError, match="`value` of the score 'accuracy' must be a finite number"):
        Score("accuracy", value)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"loss": 1.0}, "`report` must be the report.json of examples/quickstart.py or of"),
        ({"costs": []}, "`energy` must be what `EnergyReport.to_dict()` returns; it lacks"),
        ({"accuracy": {"SNN-BERT": None}, "energy": {}}, "must be a finite number, got None"),
    ],
)
def test_reports_of_something_else(saved, report, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        card_from_report(saved().config, report)
