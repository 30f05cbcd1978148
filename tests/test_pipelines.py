"""transformers' pipelines, sentence-transformers and hyper-parameter search, on saved tiny models."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from modeling_snn_bert import (
    SNNBertForMaskedLM,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)


@pytest.fixture
def saved(make_config, tokenizer, assert_spikes_flow, texts, tmp_path):
    """A function that saves a tiny model of a class with its tokenizer, and returns model and folder."""

    def save(model_class, **settings):
        model = model_class(make_config(**settings)).eval()
        assert_spikes_flow(model, **tokenizer(texts, padding=True, return_tensors="pt"))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return model, str(tmp_path / "model")

    return save


@torch.no_grad()
def one_by_one(model, tokenizer, texts):
    """The model's outputs for each text alone, so without any padding."""
    return [model(**tokenizer(text, return_tensors="pt")) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_classification(saved, tokenizer, texts, batch_size):
    model, folder = saved(SNNBertForSequenceClassification, id2label={0: "dull", 1: "fine", 2: "joy"})
    results = pipeline("text-classification", model=folder, top_k=None)(texts, batch_size=batch_size)
    for result, outputs in zip(results, one_by_one(model, tokenizer, texts), strict=True):
        expected = dict(zip(["dull", "fine", "joy"], outputs.logits[0].softmax(-1).tolist(), strict=True))
        assert {row["label"]: row["score"] for row in result} == pytest.approx(expected, abs=1e-5)


def test_token_classification(saved, tokenizer, texts):
    model, folder = saved(SNNBertForTokenClassification, id2label={0: "O", 1: "B-ANIMAL", 2: "I-ANIMAL"})
    results = pipeline("token-classification", model=folder, ignore_labels=[])(texts, batch_size=4)
    for text, result, outputs in zip(texts, results, one_by_one(model, tokenizer, texts), strict=True):
        labels = [model.config.id2label[i] for i in outputs.logits[0, 1:-1].argmax(-1).tolist()]
        assert [row["entity"] for row in result] == labels
        assert all(text[row["start"] : row["end"]].lower() == row["word"].strip("#") for row in result)
    grouped = pipeline("token-classification", model=folder, aggregation_strategy="simple", ignore_labels=[])(texts[0])
    assert {row["entity_group"] for row in grouped} <= {"O", "ANIMAL"}


def test_fill_mask(saved, tokenizer):
    model, folder = saved(SNNBertForMaskedLM)
    text = "The quick brown [MASK] sat over the river."
    results = pipeline("fill-mask", model=folder, top_k=3)(text)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    scores, ids = logits.softmax(-1)[0].topk(3)
    assert [result["token"] for result in results] == ids.tolist()
    assert [result["score"] for result in results] == pytest.approx(scores.tolist(), abs=1e-5)
    assert results[0]["token_str"] in results[0]["sequence"]


def test_zero_shot_classification(saved, tokenizer, texts):
    names = {0: "contradiction", 1: "entailment"}
    label2id = {name: index for index, name in names.items()}
    model, folder = saved(SNNBertForSequenceClassification, id2label=names, label2id=label2id)
    topics = ["the fox", "the river", "the dog"]
    results = pipeline("zero-shot-classification", model=folder)(texts[:2], candidate_labels=topics, batch_size=3)
    for text, result in zip(texts, results, strict=False):
        pairs = [tokenizer(text, f"This example is {topic}.", return_tensors="pt") for topic in topics]
        with torch.no_grad():
            entailed = torch.stack([model(**pair).logits[0, 1] for pair in pairs]).softmax(0).tolist()
        found = dict(zip(result["labels"], result["scores"], strict=True))
        assert found == pytest.approx(dict(zip(topics, entailed, strict=True)), abs=1e-5)


def test_feature_extraction(saved, tokenizer, texts):
    model, folder = saved(SNNBertModel)
    results = pipeline("feature-extraction", model=folder, return_tensors=True)(texts)
    for result, outputs in zip(results, one_by_one(model, tokenizer, texts), strict=True):
        torch.testing.assert_close(result, outputs.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_sentence_transformers(saved, tokenizer, texts, tmp_path):
    from sentence_transformers import SentenceTransformer

    model, folder = saved(SNNBertModel)
    # A folder without sentence-transformers' own files is taken as a Transformer module and mean pooling.
    encoder = SentenceTransformer(folder, device="cpu")
    embeddings = encoder.encode(texts, convert_to_tensor=True, batch_size=4)
    expected = torch.cat([o.last_hidden_state.mean(1) for o in one_by_one(model, tokenizer, texts)])
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    encoder.save(str(tmp_path / "encoder"))
    again = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert torch.equal(again.encode(texts, convert_to_tensor=True, batch_size=4), embeddings)
    assert encoder.similarity(embeddings, embeddings).shape == (6, 6)


@pytest.mark.slow
def test_hyperparameter_search(make_config, tokenizer, texts, tmp_path):
    data = Dataset.from_dict({**tokenizer(texts), "labels": [0, 1] * 3})
    targets = []

    def model_init(trial=None):
        # A setting of the configuration can be searched too, not only Trainer's arguments.
        target = trial.suggest_categorical("firing_rate_target", [0.1, 0.2]) if trial is not None else None
        targets.append(target)
        return SNNBertForSequenceClassification(make_config(firing_rate_target=target))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="no", use_cpu=True
    )
    trainer = Trainer(
        model_init=model_init, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)},
        backend="optuna",
        direction="minimize",
        n_trials=3,
    )
    assert math.isfinite(best.objective)
    assert 1e-5 <= best.hyperparameters["learning_rate"] <= 1e-2
    assert best.hyperparameters["firing_rate_target"] in (0.1, 0.2)
    assert sum(target is not None for target in targets) == 3
