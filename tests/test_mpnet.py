"""From an MPNet to an SNN-BERT: its weights in their places, and calibration."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MPNetConfig, MPNetForMaskedLM, MPNetForSequenceClassification, MPNetModel, MPNetPreTrainedModel

from modeling_snn_bert.conversion import SPIKING_CLASSES, convert_bert, initialize_from_bert
from modeling_snn_bert.energy import measure_spikes
from modeling_snn_bert.mpnet import LINEAR_NAMES

MPNET_CLASSES = {
    model_class: spiking
    for model_class, spiking in SPIKING_CLASSES.items()
    if issubclass(model_class, MPNetPreTrainedModel)
}
VALUES = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def make_mpnet(model_class=MPNetModel, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = MPNetConfig(
        **{"vocab_size": 200, "max_position_embeddings": 66, "initializer_range": 0.3, **sizes, **settings}
    )
    mpnet = model_class(config)
    # transformers begins with biases of 0.
    for name, parameter in mpnet.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(mpnet.base_model.encoder.relative_attention_bias.weight)
    return mpnet.eval()


def make_batches(count=10):
    """Padding, of MPNet's id, on the right and on the left."""
    torch.manual_seed(1)
    batches = []
    for _ in range(count):
        mask = torch.ones(16, 24, dtype=torch.long)
        mask[::2, 17:] = 0
        mask[1::4, :5] = 0
        ids = torch.randint(5, 200, (16, 24)).masked_fill(mask == 0, 1)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class Passes(nn.Module):
    """In a neuron's place: what an MPNet has there."""

    def __init__(self, function=lambda current: current):
        super().__init__()
        self.function = function

    def forward(self, current, token_mask=None):
        return self.function(current)


def without_neurons(model):
    """`model` with nothing in the neurons' places, and MPNet's activation in that of the MLP's."""
    for layer in model.base_model.encoder.layer:
        attention = layer.attention.self
        for name in ("neuron", "query_neuron", "key_neuron", "value_neuron"):
            setattr(attention, name, Passes())
        layer.attention.output.neuron, layer.intermediate.neuron = Passes(), Passes()
        layer.output.neuron = Passes(nn.functional.gelu)
    return model


def fidelity(model, mpnet, batches):
    cosines = []
    for batch in batches:
        with torch.no_grad():
            ours, theirs = model(**batch).last_hidden_state, mpnet(**batch).last_hidden_state
        valid = batch["attention_mask"] != 0
        cosines.append(nn.functional.cosine_similarity(ours[valid], theirs[valid], dim=-1).mean())
    return torch.stack(cosines).mean().item()


@pytest.mark.parametrize("model_class", MPNET_CLASSES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_neurons_it_is_the_mpnet(model_class, implementation):
    """Embeddings, positions, bias, every weight and the head: all that is not a neuron."""
    mpnet = make_mpnet(model_class)
    model = without_neurons(initialize_from_bert(mpnet))
    model.set_attn_implementation(implementation)
    assert type(model) is MPNET_CLASSES[model_class] and not model.training
    assert type(model).__name__ == model_class.__name__.replace("MPNet", "SNNBert")
    # Without padding on the left, where the first token of MPNet's heads would be padding.
    batch = {name: x[::2] for name, x in make_batches(1)[0].items()}
    if "MultipleChoice" in model_class.__name__:
        batch = {name: x.view(4, 2, -1) for name, x in batch.items()}
    with torch.no_grad():
        found, wanted = model(**batch), mpnet(**batch)
    names = [name for name in VALUES if wanted.get(name) is not None]
    assert names and names == [name for name in VALUES if found.get(name) is not None]
    for name in names:
        ours, theirs = found[name], wanted[name]
        if ours.shape[:2] == batch["input_ids"].shape and ours.dim() > 1 and ours.shape[1] == 24:
            valid = batch["attention_mask"] != 0
            ours, theirs = ours[valid], theirs[valid]
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_states_of_left_padding_as_well():
    mpnet = make_mpnet()
    model, batch = without_neurons(initialize_from_bert(mpnet)), make_batches(1)[0]
    valid = batch["attention_mask"] != 0
    with torch.no_grad():
        ours = model(**batch, output_hidden_states=True).hidden_states
        theirs = mpnet(**batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found[valid], wanted[valid], rtol=1e-4, atol=1e-4)


def test_settings():
    mpnet = make_mpnet(MPNetForMaskedLM, hidden_act="relu")
    config = initialize_from_bert(mpnet, spike_type="ternary").config
    assert (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (32, 128)
    assert (config.vocab_size, config.pad_token_id, config.max_position_embeddings) == (200, 1, 64)
    assert (config.type_vocab_size, config.hidden_act, config.spike_type) == (1, "gelu", "ternary")
    assert (config.bos_token_id, config.eos_token_id) == (0, 2)
    model = initialize_from_bert(make_mpnet())
    assert not model.embeddings.token_type_embeddings.weight.any()
    assert model.embeddings.word_embeddings.padding_idx == 1


def test_names_of_the_linears():
    layer = make_mpnet().encoder.layer[0]
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert set(LINEAR_NAMES.values()) == linears and len(LINEAR_NAMES) == len(linears)


@pytest.mark.parametrize(
    "settings",
    [{}, {"spike_type": "ternary"}, {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3}],
    ids=["bpsn", "ternary", "repeat"],
)
def test_calibration_brings_the_model_near(settings):
    mpnet, batches, held_out = make_mpnet(), make_batches(30), make_batches(34)[30:]
    plain = fidelity(initialize_from_bert(mpnet, **settings), mpnet, held_out)
    decoded = fidelity(convert_bert(mpnet, batches, ridge=float("inf"), **settings), mpnet, held_out)
    fitted = convert_bert(mpnet, batches, **settings)
    rates = [layer.mean().item() for layer in measure_spikes(fitted, held_out).rates]
    assert all(0.1 < rate < 0.4 for rate in rates), rates
    assert plain < decoded < fidelity(fitted, mpnet, held_out)
    assert fidelity(fitted, mpnet, held_out) > 0.7


def test_bias_and_mpnet_are_kept():
    mpnet = make_mpnet(MPNetForSequenceClassification).train()
    before = {name: x.clone() for name, x in mpnet.state_dict().items()}
    model = convert_bert(mpnet, make_batches(2))
    assert mpnet.training and all(torch.equal(x, before[name]) for name, x in mpnet.state_dict().items())
    ours = model.state_dict()
    bias = "encoder.relative_attention_bias.weight"
    assert torch.equal(ours[f"bert.{bias}"], before[f"mpnet.{bias}"])
    assert torch.equal(ours["bert.pooler.dense.weight"], before["classifier.dense.weight"])


def test_saved_and_loaded(tmp_path):
    model, batch = convert_bert(make_mpnet(), make_batches(2)), make_batches(1)[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_what_is_no_mpnet_that_can_be_converted():
    class OtherHead(MPNetPreTrainedModel):
        pass

    assert 0 < len(MPNET_CLASSES) < len(SPIKING_CLASSES)
    with pytest.raises(TypeError, match=r"`bert` must be one of .*MPNetModel.* got OtherHead"):
        convert_bert(OtherHead(make_mpnet().config), make_batches(1))
    with pytest.raises(ValueError, match=r"`relative_attention_num_buckets` of an MPNet must be 32, .* got 64"):
        convert_bert(make_mpnet(relative_attention_num_buckets=64), make_batches(1))
    with pytest.raises(ValueError, match=r"unexpected \['encoder.relative_attention_bias.weight'\]"):
        convert_bert(make_mpnet(), make_batches(1), relative_attention_num_buckets=0)
    with pytest.raises(StrictDataclassError, match="num_timesteps"):
        convert_bert(make_mpnet(), make_batches(1), num_timesteps=3)
