"""The relative position bias: its buckets against MPNet's, and what it does in a model of every kind."""

import pytest
import torch
from transformers import MPNetConfig
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from modeling_snn_bert import SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.relative_position import bucket_starts, relative_position_bias, relative_position_buckets

BIAS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
KINDS = {
    "softmax": {},
    "ternary": {"spike_type": "ternary"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "spiking": {"attention_type": "spiking"},
}


@pytest.fixture
def make_model(make_config):
    """A function that returns a model with a bias that matters, in evaluation mode."""

    def make(head=SNNBertModel, **settings):
        torch.manual_seed(0)
        model = head(make_config(**{**BIAS, **settings})).eval()
        torch.nn.init.normal_(model.base_model.encoder.relative_attention_bias.weight)
        return model

    return make


@pytest.fixture
def batch():
    """Sequences without padding, and with padding on the right and on the left."""
    mask = torch.ones(3, 21).long()
    mask[1, 13:] = 0
    mask[2, :6] = 0
    return {"input_ids": torch.randint(5, 120, (3, 21)), "attention_mask": mask}


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (6, 2), (4, 50), (64, 1000)])
def test_buckets_are_those_of_mpnet(buckets, distance):
    indices = torch.arange(1200)
    wanted = MPNetEncoder.relative_position_bucket(indices[None] - indices[:, None], buckets, distance)
    found = relative_position_buckets(1200, bucket_starts(buckets, distance), torch.device("cpu"))
    assert found.dtype == torch.int64 and torch.equal(found, wanted)
    assert set(found.unique().tolist()) <= set(range(buckets)) and found.max() == buckets - 1


def test_bias_is_that_of_mpnet():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    encoder = MPNetEncoder(MPNetConfig(vocab_size=20, **sizes))
    wanted = encoder.compute_position_bias(torch.zeros(2, 300, 16))
    found = relative_position_bias(encoder.relative_attention_bias, 300, bucket_starts(32, 128), wanted.device)
    assert found.shape == (1, 4, 300, 300) and found.is_contiguous()
    assert torch.equal(found.expand(2, -1, -1, -1), wanted)


def test_without_buckets_there_is_no_parameter(make_config):
    model = SNNBertModel(make_config())
    assert model.encoder.relative_attention_bias is None
    assert not [name for name in model.state_dict() if "relative" in name]
    names = {name for name, _ in SNNBertModel(make_config(**BIAS)).named_parameters()}
    assert names - set(model.state_dict()) == {"encoder.relative_attention_bias.weight"}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_weights_are_their_formula(make_model, batch, assert_spikes_flow, settings):
    model = make_model(**settings)
    assert_spikes_flow(model, **batch)
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True, output_spikes=True)
    steps = model.config.num_timesteps
    mask = batch["attention_mask"].repeat(steps, 1)[:, None, None] != 0
    spikes = dict(zip(model.neuron_names(), outputs.spikes, strict=True))
    starts = bucket_starts(*BIAS.values())
    bias = model.encoder.relative_attention_bias.weight[relative_position_buckets(21, starts, mask.device)]
    for number, layer in enumerate(model.encoder.layer):
        attention, prefix = layer.attention.self, f"encoder.layer.{number}.attention.self"
        query = spikes[f"{prefix}.query_neuron"] * attention.query_gain + attention.query_offset
        query, key = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (query, spikes[f"{prefix}.key_neuron"]))
        scores = query @ key.transpose(2, 3) * 8**-0.5 + bias.permute(2, 0, 1)
        if model.config.attention_type == "softmax":
            wanted = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        else:
            wanted = scores * mask / mask.sum(-1, keepdim=True)
        torch.testing.assert_close(outputs.attentions[number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_eager_is_sdpa(make_model, batch, settings):
    eager, sdpa = (make_model(attn_implementation=name, **settings) for name in ("eager", "sdpa"))
    valid = batch["attention_mask"] != 0
    plain = make_model(**settings)
    torch.nn.init.zeros_(plain.encoder.relative_attention_bias.weight)
    with torch.no_grad():
        found, wanted, without = (model(**batch).last_hidden_state[valid] for model in (sdpa, eager, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - without).abs().max() > 0.1


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_padding_changes_nothing(make_model, batch, settings):
    model = make_model(attn_implementation="sdpa", **settings)
    single = {"input_ids": batch["input_ids"][2:, 6:]}
    with torch.no_grad():
        found, wanted = model(**batch).last_hidden_state[2:, 6:], model(**single).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [{}, {"attention_type": "spiking"}, {"attn_implementation": "sdpa"}], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(make_model, batch, assert_spikes_flow, attention, use_reentrant):
    model = make_model(SNNBertForSequenceClassification, **attention)
    assert_spikes_flow(model.bert, **batch)
    labels = torch.tensor([0, 1, 1])

    def gradients():
        model.train().zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    wanted = gradients()
    # No key lies behind the query at the distance of 0.
    grad = wanted["bert.encoder.relative_attention_bias.weight"]
    assert (grad != 0).all(1).tolist() == [True] * 4 + [False] + [True] * 3
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_dtypes(make_model, batch, dtype, implementation):
    model = make_model(attn_implementation=implementation).to(dtype)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    assert states.dtype == dtype and states.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_training(make_model, batch, implementation, dropout, autocast):
    """With dropout and sdpa it is the packed attention that trains."""
    settings = {"attn_implementation": implementation, "attention_probs_dropout_prob": dropout}
    model = make_model(SNNBertForSequenceClassification, **settings).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    grad = model.bert.encoder.relative_attention_bias.weight.grad
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_bias_is_refused(make_model, batch, implementation):
    model = make_model()
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=f"`relative_attention_num_buckets` needs .* got '{implementation}'"):
        model(**batch)
