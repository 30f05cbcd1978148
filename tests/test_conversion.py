"""From a BERT to an SNN-BERT: thresholds, decoding and the fit of the weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.conversion import SPIKING_CLASSES, convert_bert, decode, initialize_from_bert, ridge_regression
from modeling_snn_bert.energy import measure_spikes

SETTINGS = {
    "bpsn": {},
    "strong-reset": {"reset": 0.5, "decay": 0.3},
    "ternary": {"spike_type": "ternary"},
    "lif": {"neuron_type": "lif"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "psn": {"neuron_type": "psn", "psn_length": 24},
    "spiking-attention": {"attention_type": "spiking"},
}


def make_bert(model_class=BertModel):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    return model_class(config).eval()


def make_batches(count=10, padded=True):
    torch.manual_seed(1)
    batches = []
    for _ in range(count):
        mask = torch.ones(16, 24, dtype=torch.long)
        if padded:
            mask[::2, 17:] = 0
        batches.append({"input_ids": torch.randint(5, 200, (16, 24)), "attention_mask": mask})
    return batches


def cosine_to_bert(model, bert, batches):
    cosines = []
    for batch in batches:
        with torch.no_grad():
            ours, theirs = model(**batch).last_hidden_state, bert(**batch).last_hidden_state
        valid = batch["attention_mask"] != 0
        cosines.append(torch.nn.functional.cosine_similarity(ours[valid], theirs[valid], dim=-1).mean())
    return torch.stack(cosines).mean().item()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("threshold_per", ["channel", "layer"])
def test_neurons_fire_at_the_wanted_rate(settings, rate, threshold_per):
    batches = make_batches()
    model = convert_bert(make_bert(), batches, firing_rate=rate, threshold_per=threshold_per, **settings)
    rates = measure_spikes(model, batches).rates
    assert all(0.5 * rate < layer.mean() < 2 * rate for layer in rates), [layer.mean().item() for layer in rates]
    thresholds = [x for name, x in model.named_parameters() if name.endswith("neuron.v_threshold")]
    shared = [torch.equal(x, x[:1].expand_as(x)) for x in thresholds]
    assert len(shared) == len(rates) and shared == [threshold_per == "layer"] * len(rates)
    # One channel or another then fires far more often than the others, which thresholds of its own rule out.
    spread = max(layer.max().item() for layer in rates[:1])
    assert spread > 1.5 * rate if threshold_per == "layer" else spread < 1.5 * rate


def test_calibration_brings_the_model_near_its_bert():
    bert, batches, held_out = make_bert(), make_batches(40), make_batches(44)[40:]
    plain = cosine_to_bert(initialize_from_bert(bert), bert, held_out)
    decoded = cosine_to_bert(convert_bert(bert, batches, ridge=float("inf")), bert, held_out)
    fitted = cosine_to_bert(convert_bert(bert, batches), bert, held_out)
    assert plain < decoded < fitted
    assert fitted > 0.7


@pytest.mark.parametrize("bert_class", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_head_and_bert_are_kept(bert_class):
    bert = make_bert(bert_class).train()
    before = {name: x.clone() for name, x in bert.state_dict().items()}
    model = convert_bert(bert, make_batches(2))
    assert type(model) is SPIKING_CLASSES[bert_class] and not model.training
    assert bert.training and all(torch.equal(x, before[name]) for name, x in bert.state_dict().items())
    kept = [name for name in before if ".encoder." not in f".{name}"]
    assert kept and all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


def test_decoding_is_the_two_means():
    torch.manual_seed(0)
    values = torch.randn(500, 6)
    spikes = (values > 0.5).float()
    spikes[:, 5] = 0
    slope, offset = decode(spikes, values)
    for channel in range(5):
        fires = spikes[:, channel] == 1
        silent, firing = values[~fires, channel].mean(), values[fires, channel].mean()
        torch.testing.assert_close(offset[channel], silent, atol=1e-5, rtol=0)
        torch.testing.assert_close(slope[channel], firing - silent, atol=1e-5, rtol=0)
    assert slope[5] == 0 and torch.isclose(offset[5], values[:, 5].mean(), atol=1e-6)


def test_regression_finds_the_weights():
    torch.manual_seed(0)
    x, weight, bias = (torch.rand(400, 10) < 0.3).float(), torch.randn(3, 10), torch.randn(3)
    found, shift = ridge_regression(x, x @ weight.T + bias, ridge=1e-9)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(shift, bias, atol=1e-4, rtol=0)


def test_padding_does_not_count():
    batches = make_batches(4)
    other = [
        {**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], torch.tensor(7))} for b in batches
    ]
    first, second = (convert_bert(make_bert(), x).state_dict() for x in (batches, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"bert": RobertaModel}, TypeError, "`bert` must be one of", id="not-a-bert"),
        pytest.param({"firing_rate": 0.0}, ValueError, "`firing_rate`", id="rate-0"),
        pytest.param({"firing_rate": 1.0}, ValueError, "`firing_rate`", id="rate-1"),
        pytest.param({"ridge": -1.0}, ValueError, "`ridge`", id="ridge"),
        pytest.param({"threshold_per": "head"}, ValueError, "`threshold_per`", id="threshold_per"),
        pytest.param({"batches": []}, ValueError, "at least one batch", id="no-batches"),
        pytest.param({"batches": [{"ids": torch.ones(1, 2)}]}, ValueError, "`input_ids`", id="no-input-ids"),
        pytest.param({"num_timesteps": 3}, StrictDataclassError, "num_timesteps", id="impossible-setting"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"bert": make_bert(), "batches": make_batches(1), **change}
    if arguments["bert"] is RobertaModel:
        config = RobertaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        arguments["bert"] = RobertaModel(config)
    with pytest.raises(error, match=message):
        convert_bert(**arguments)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "electra", "camembert", "mpnet"])
def test_from_pretrained_refuses_other_models_by_name(tmp_path, kind):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, intermediate_size=48))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"of the type '{kind}'"):
        SNNBertModel.from_pretrained(tmp_path)
