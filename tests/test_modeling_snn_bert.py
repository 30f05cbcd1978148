"""The models: spikes only, padding that changes nothing, outputs, losses, gradients, and BERT's checkpoints."""

import copy
import math
import re

import pytest
import torch
import transformers
from heads import MODELS
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

import modeling_snn_bert
from modeling_snn_bert import (
    LIF,
    PSN,
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
    SpikingNeuron,
)
from modeling_snn_bert import modeling_snn_bert as implementation

LENGTH = 32
INDIVIDUAL = {
    "bpsn": {},
    "lif": {"neuron_type": "lif"},
    "psn": {"neuron_type": "psn", "psn_length": LENGTH},
}
NEURONS = {**INDIVIDUAL, "lif_repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 4}}
ATTENTIONS = ["softmax", "spiking"]
SPIKE_VALUES = {"binary": {0.0, 1.0}, "ternary": {-1.0, 0.0, 1.0}}
NEURON_PARAMETERS = {
    "v_threshold",
    "decay_forward_logit",
    "decay_backward_logit",
    "reset_strength",
    "query_gain",
    "query_offset",
}
# Decays towards later tokens that cannot matter to the first token's output: those of the last layer's neurons that
# only it reaches. The spikes of a BPSN at later tokens do reach it, in every neuron but the last.
WITHOUT_PAST = {
    "bpsn": r"layer\.1\.output\.neuron\.decay_forward_logit$",
    "lif": r"layer\.1\.(attention\.self\.query_neuron|(attention\.output|intermediate|output)\.neuron)\.decay_logit$",
    "psn": "$^",
    "lif_repeat": "$^",
}

each_neuron = pytest.mark.parametrize("neuron", list(NEURONS))
each_attention = pytest.mark.parametrize("attention_type", ATTENTIONS)
each_head = pytest.mark.parametrize("head", list(MODELS))


@pytest.fixture
def sentences(tokenizer, texts):
    """The example sentences, padded on the right to `LENGTH`, the one length that a PSN takes."""

    return dict(tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt"))


@pytest.fixture
def make_model(make_config):
    """A function that returns a model in evaluation mode whose neurons' parameters differ between the channels."""

    def make(model_class=SNNBertModel, neuron="bpsn", **overrides):
        torch.manual_seed(0)
        model = model_class(make_config(**{**NEURONS[neuron], **overrides})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                last = name.split(".")[-1]
                if last == "v_threshold":
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif last.startswith("decay") or last.startswith("query_"):
                    parameter.add_(0.5 * torch.randn_like(parameter))
                elif last == "reset_strength":
                    parameter.uniform_(0.1, 0.5)
                elif name.endswith("neuron.weight"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def as_choices(batch, choices=2):
    """A batch of sentences as one of questions with that many choices each."""
    return {name: value.unflatten(0, (-1, choices)) for name, value in batch.items()}


def inputs_for(head, batch):
    return as_choices(batch) if head == "choice" else batch


def labels_for(head, batch):
    if head == "base":
        return {}
    size = len(batch["input_ids"])
    if head == "question":
        return {"start_positions": torch.ones(size).long(), "end_positions": torch.full((size,), 2)}
    if head in ("masked_lm", "token"):
        return {"labels": batch["input_ids"] % 2}
    return {"labels": torch.arange(size // 2 if head == "choice" else size) % 2}


class TestSpikesOnly:
    """Every matrix product of the encoder has spikes on one side at least, on real text."""

    @pytest.mark.parametrize("spike_type", list(SPIKE_VALUES))
    @each_attention
    @each_neuron
    def test_every_linear_of_the_encoder_receives_spikes(
        self, make_model, sentences, assert_spikes_flow, neuron, attention_type, spike_type
    ):
        model = make_model(neuron=neuron, attention_type=attention_type, spike_type=spike_type)
        seen = {}

        def record(name):
            def hook(module, args):
                seen[name] = set(args[0].unique().tolist())

            return hook

        linears = {name: module for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)}
        for name, module in linears.items():
            module.register_forward_pre_hook(record(name))
        assert_spikes_flow(model, **sentences)
        assert len(linears) == 6 * model.config.num_hidden_layers
        assert seen == dict.fromkeys(linears, SPIKE_VALUES[spike_type])

    @pytest.mark.parametrize("spike_type", list(SPIKE_VALUES))
    @each_attention
    @each_neuron
    def test_attention_receives_spikes(self, make_model, sentences, monkeypatch, neuron, attention_type, spike_type):
        model = make_model(neuron=neuron, attention_type=attention_type, spike_type=spike_type)
        function = "eager_attention_forward" if attention_type == "softmax" else "spiking_attention"
        original = getattr(implementation, function)
        operands = []

        def record(*args, **kwargs):
            operands.append([x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4][:3])
            return original(*args, **kwargs)

        monkeypatch.setattr(implementation, function, record)
        model(**sentences)
        assert len(operands) == model.config.num_hidden_layers
        for layer, (query, key, value) in zip(model.encoder.layer, operands, strict=True):
            assert set(key.unique().tolist()) == set(value.unique().tolist()) == SPIKE_VALUES[spike_type]
            gain, offset = (
                getattr(layer.attention.self, name).view(1, -1, 1, query.shape[-1])
                for name in ("query_gain", "query_offset")
            )
            spikes = (query - offset) / gain
            close(spikes, spikes.round(), 1e-4)
            assert set(spikes.round().abs().unique().tolist()) == {0.0, 1.0}

    @pytest.mark.parametrize("initializer_range", [0.005, 0.02, 0.1, 1.0])
    @pytest.mark.parametrize("spike_type", list(SPIKE_VALUES))
    @each_attention
    @each_neuron
    def test_a_fresh_model_is_alive(
        self, make_config, sentences, assert_spikes_flow, neuron, attention_type, spike_type, initializer_range
    ):
        settings = {"attention_type": attention_type, "spike_type": spike_type, "initializer_range": initializer_range}
        model = SNNBertModel(make_config(**NEURONS[neuron], **settings)).eval()
        assert_spikes_flow(model, **sentences)


class TestPadding:
    """Nothing but the valid tokens of a sentence decides what comes out at its valid tokens."""

    def outputs(self, make_model, neuron, attention_type, batch, row, attn_implementation="eager"):
        """What every model returns at the valid tokens of one row."""
        settings = {"attention_type": attention_type, "attn_implementation": attn_implementation}
        valid = batch["attention_mask"][row].bool()
        found = {}
        for head, model_class in MODELS.items():
            model = make_model(model_class, neuron, num_labels=3, **settings)
            with torch.no_grad():
                output = model(**inputs_for(head, batch), output_hidden_states=True, output_firing_rates=True)
            if neuron != "lif_repeat" and head == "base":
                found["hidden_states"] = torch.stack(output.hidden_states)[:, row, valid]
            if head == "base":
                found["last_hidden_state"] = output.last_hidden_state[row, valid]
                found["pooler_output"] = output.pooler_output[row]
                found["firing_rates"] = torch.cat([rate[row] for rate in output.firing_rates])
            elif head == "question":
                found[head] = torch.stack((output.start_logits, output.end_logits), -1)[row, valid]
            elif head == "choice":
                found[head] = output.logits.flatten()[row]
            else:
                found[head] = output.logits[row, valid] if output.logits.dim() == 3 else output.logits[row]
        rates = found["firing_rates"]
        assert 0 < rates.mean() < 1
        return found

    def assert_same(self, found, expected):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("layout", ["right", "left", "both"])
    @each_attention
    @pytest.mark.parametrize("neuron", ["bpsn", "lif", "lif_repeat"])
    def test_padding_changes_nothing(self, make_model, tokenizer, neuron, attention_type, layout, attn_implementation):
        sentence, mate = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("All night long.", "It is."))
        before = 0 if layout == "right" else 5
        length = sentence.shape[1] + before + (0 if layout == "left" else 7)
        ids = torch.randint(5, 80, (2, length))
        mask = torch.zeros(2, length, dtype=torch.long)
        for row, tokens in enumerate((sentence, mate)):
            ids[row, before : before + tokens.shape[1]] = tokens
            mask[row, before : before + tokens.shape[1]] = 1
        alone = {"input_ids": sentence.repeat(2, 1), "attention_mask": torch.ones_like(sentence).repeat(2, 1)}
        padded = {"input_ids": ids, "attention_mask": mask}
        run = [self.outputs(make_model, neuron, attention_type, x, 0, attn_implementation) for x in (padded, alone)]
        self.assert_same(*run)

    @each_attention
    @each_neuron
    def test_what_stands_in_the_padding_changes_nothing(self, make_model, sentences, neuron, attention_type):
        row = 2
        mask = sentences["attention_mask"].clone()
        mask[row, 3:5] = 0
        mask[row, 9] = 0
        junk = torch.where(mask.bool(), sentences["input_ids"], torch.randint(0, 120, mask.shape))
        assert (junk != sentences["input_ids"]).any()
        batches = [{"input_ids": ids, "attention_mask": mask} for ids in (sentences["input_ids"], junk)]
        self.assert_same(*(self.outputs(make_model, neuron, attention_type, batch, row) for batch in batches))

    @each_attention
    @each_neuron
    def test_the_other_rows_change_nothing(self, make_model, sentences, neuron, attention_type):
        row = 1
        other = {name: value.clone() for name, value in sentences.items()}
        for index in {*range(6)} - {row}:
            other["input_ids"][index] = torch.randint(5, 120, (LENGTH,))
            other["attention_mask"][index] = 1
        batches = [{name: x[name] for name in ("input_ids", "attention_mask")} for x in (sentences, other)]
        self.assert_same(*(self.outputs(make_model, neuron, attention_type, batch, row) for batch in batches))

    @each_attention
    def test_a_row_without_any_valid_token_is_finite_and_harms_no_other(self, make_model, sentences, attention_type):
        empty = {name: value.clone() for name, value in sentences.items()}
        empty["attention_mask"][0] = 0
        model = make_model(attention_type=attention_type)
        expected, found = model(**sentences), model(**empty, output_firing_rates=True)
        valid = sentences["attention_mask"][1:].bool()
        close(found.last_hidden_state[1:][valid], expected.last_hidden_state[1:][valid])
        assert found.last_hidden_state.isfinite().all()
        assert all(rate.isfinite().all() and not rate[0].any() for rate in found.firing_rates)

    def test_no_mask_means_all_tokens_are_valid(self, make_model, sentences):
        ids = sentences["input_ids"]
        model = make_model()
        close(model(ids).last_hidden_state, model(ids, torch.ones_like(ids)).last_hidden_state)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
    def test_masks_of_any_dtype(self, make_model, sentences, dtype):
        model = make_model()
        expected = model(**sentences, output_firing_rates=True)
        sentences["attention_mask"] = sentences["attention_mask"].to(dtype)
        found = model(**sentences, output_firing_rates=True)
        close(found.pooler_output, expected.pooler_output)
        for rate, wanted in zip(found.firing_rates, expected.firing_rates, strict=True):
            close(rate, wanted)


class TestOutputs:
    @each_attention
    @each_neuron
    @each_head
    def test_counts_and_shapes(self, make_model, sentences, head, neuron, attention_type):
        model = make_model(MODELS[head], neuron, attention_type=attention_type)
        config = model.config
        flags = ("output_hidden_states", "output_attentions", "output_firing_rates", "output_spikes")
        outputs = model(**inputs_for(head, sentences), **dict.fromkeys(flags, True))
        batch = len(sentences["input_ids"])
        inner = batch * config.num_timesteps
        assert len(outputs.hidden_states) == config.num_hidden_layers + 1
        assert {tuple(x.shape) for x in outputs.hidden_states[:-1]} == {(inner, LENGTH, config.hidden_size)}
        assert len(outputs.attentions) == config.num_hidden_layers
        assert {tuple(x.shape) for x in outputs.attentions} == {(inner, config.num_attention_heads, LENGTH, LENGTH)}
        neurons = [model.get_submodule(name) for name in model.neuron_names()]
        assert len(neurons) == 7 * config.num_hidden_layers == len(outputs.spikes) == len(outputs.firing_rates)
        for module, spikes, rates in zip(neurons, outputs.spikes, outputs.firing_rates, strict=True):
            assert spikes.shape == (inner, LENGTH, module.num_channels)
            assert rates.shape == (batch, module.num_channels)

    @each_neuron
    def test_spikes_are_those_of_the_named_neurons(self, make_model, sentences, neuron):
        model = make_model(SNNBertForSequenceClassification, neuron)
        seen = {}
        for name in model.neuron_names():
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output})
            )
        outputs = model(**sentences, output_spikes=True)
        for name, spikes in zip(model.neuron_names(), outputs.spikes, strict=True):
            assert torch.equal(spikes, seen[name]), name

    @each_neuron
    def test_rates_are_means_over_valid_tokens(self, make_model, sentences, neuron):
        model = make_model(neuron=neuron, spike_type="ternary")
        outputs = model(**sentences, output_spikes=True, output_firing_rates=True)
        mask = sentences["attention_mask"].bool()
        for spikes, rates in zip(outputs.spikes, outputs.firing_rates, strict=True):
            spikes = spikes.detach().unflatten(0, (-1, len(mask)))
            assert not spikes[:, ~mask].any()
            for row, valid in enumerate(mask):
                close(rates[row], spikes[:, row, valid].abs().mean((0, 1)))
        assert 0 < rates.mean() < 1

    @each_head
    def test_only_what_was_asked_for_is_returned(self, make_model, sentences, head):
        model = make_model(MODELS[head])
        inputs = inputs_for(head, sentences)
        extra = {"hidden_states", "attentions", "firing_rates", "spikes"}
        assert not extra & model(**inputs).keys()
        assert extra & model(**inputs, output_firing_rates=True).keys() == {"firing_rates"}
        assert extra & model(**inputs, output_spikes=True).keys() == {"spikes"}
        assert extra & model(**inputs, output_hidden_states=True).keys() == {"hidden_states"}

    @each_head
    def test_the_config_sets_the_defaults(self, make_model, sentences, head):
        inputs = inputs_for(head, sentences)
        model = make_model(MODELS[head], output_firing_rates=True, output_spikes=True)
        outputs = model(**inputs)
        assert len(outputs.firing_rates) == len(outputs.spikes) == len(model.neuron_names())
        outputs = model(**inputs, output_firing_rates=False, output_spikes=False)
        assert outputs.firing_rates is outputs.spikes is None

    @each_head
    def test_tuples_hold_the_same_values(self, make_model, sentences, head):
        model = make_model(MODELS[head])
        inputs = {**inputs_for(head, sentences), **labels_for(head, sentences)}
        flags = {"output_hidden_states": True, "output_firing_rates": True, "output_spikes": True}
        named, plain = model(**inputs, **flags), model(**inputs, **flags, return_dict=False)
        assert isinstance(plain, tuple)
        assert len(plain) == len(named.to_tuple())
        for found, expected in zip(plain, named.to_tuple(), strict=True):
            assert type(found) is type(expected)
            torch.testing.assert_close(found, expected)

    def test_recording_changes_no_result(self, make_model, sentences):
        model = make_model()
        flags = {"output_hidden_states": True, "output_firing_rates": True, "output_spikes": True}
        assert torch.equal(model(**sentences).last_hidden_state, model(**sentences, **flags).last_hidden_state)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
    def test_outputs_under_gradient_checkpointing(self, make_model, sentences):
        model = make_model(SNNBertForSequenceClassification)
        flags = {"output_hidden_states": True, "output_attentions": True, "output_firing_rates": True}
        expected = model(**sentences, **flags, output_spikes=True)
        model.train()
        model.gradient_checkpointing_enable()
        found = model(**sentences, **flags, output_spikes=True, labels=torch.zeros(6).long())
        found.loss.backward()
        for name in ("hidden_states", "attentions", "firing_rates", "spikes"):
            assert len(found[name]) == len(expected[name]), name
            for x, y in zip(found[name], expected[name], strict=True):
                close(x, y)

    def test_inputs_embeds_in_place_of_input_ids(self, make_model, sentences):
        model = make_model()
        embeds = model.get_input_embeddings()(sentences["input_ids"])
        found = model(inputs_embeds=embeds, attention_mask=sentences["attention_mask"])
        close(found.last_hidden_state, model(**sentences).last_hidden_state)

    def test_token_types_and_positions_are_used(self, make_model, sentences):
        model = make_model()
        default = model(**sentences).last_hidden_state
        zeros = torch.zeros(1, LENGTH).long()
        close(model(**{**sentences, "token_type_ids": zeros}).last_hidden_state, default)
        for changed in ({"token_type_ids": zeros + 1}, {"position_ids": zeros}):
            assert (model(**{**sentences, **changed}).last_hidden_state - default).abs().max() > 1e-2


class TestAttention:
    @pytest.mark.parametrize("neuron", list(NEURONS))
    def test_eager_is_sdpa(self, make_model, sentences, assert_spikes_flow, neuron):
        eager, sdpa = (make_model(neuron=neuron, attn_implementation=name) for name in ("eager", "sdpa"))
        assert sdpa.config._attn_implementation == "sdpa"
        assert_spikes_flow(eager, **sentences)
        valid = sentences["attention_mask"].bool()
        close(sdpa(**sentences).last_hidden_state[valid], eager(**sentences).last_hidden_state[valid])

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
    def test_eager_is_flex(self, make_model, sentences, assert_spikes_flow):
        settings = {"hidden_size": 64, "intermediate_size": 64}
        eager, flex = (make_model(attn_implementation=name, **settings) for name in ("eager", "flex_attention"))
        assert_spikes_flow(eager, **sentences)
        valid = sentences["attention_mask"].bool()
        try:
            hidden_states = torch.empty(*valid.shape, settings["hidden_size"])
            create_bidirectional_mask(flex.config, hidden_states, valid)
        except RuntimeError as error:
            # torch 2.13 does so on a processor with AVX2 and no AVX-512, for any model of transformers.
            pytest.skip(f"torch compiles a mask for flex attention that does not run on this processor: {error}")
        with torch.no_grad():
            close(flex(**sentences).last_hidden_state[valid], eager(**sentences).last_hidden_state[valid])

    @pytest.mark.parametrize("spike_type", list(SPIKE_VALUES))
    @each_neuron
    def test_spiking_attention_is_the_same_in_its_quadratic_and_its_linear_form(
        self, make_model, sentences, assert_spikes_flow, neuron, spike_type
    ):
        settings = {"attention_type": "spiking", "spike_type": spike_type}
        quadratic = make_model(neuron=neuron, attn_implementation="eager", **settings)
        linear = make_model(neuron=neuron, attn_implementation="sdpa", **settings)
        assert_spikes_flow(quadratic, **sentences)
        close(linear(**sentences).last_hidden_state, quadratic(**sentences).last_hidden_state)
        assert not linear(**sentences, output_attentions=True).attentions
        assert quadratic(**sentences, output_attentions=True).attentions[0].abs().max() > 0

    def test_attention_weights_of_padding_are_zero_and_add_up_to_one(self, make_model, sentences):
        attentions = make_model()(**sentences, output_attentions=True).attentions
        padding = sentences["attention_mask"] == 0
        for weights in attentions:
            close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            assert not weights.transpose(1, 3)[padding].any()

    def test_the_implementation_can_be_changed(self, make_model, sentences):
        model = make_model(attn_implementation="sdpa")
        expected = model(**sentences).pooler_output
        model.set_attn_implementation("eager")
        outputs = model(**sentences, output_attentions=True)
        close(outputs.pooler_output, expected)
        assert all(weights is not None for weights in outputs.attentions)


class TestRepeatCoding:
    @each_attention
    def test_it_is_the_loop_over_time_steps(
        self, make_model, sentences, monkeypatch, assert_spikes_flow, attention_type
    ):
        model = make_model(neuron="lif_repeat", attention_type=attention_type, num_timesteps=3)
        rates = assert_spikes_flow(model, **sentences)
        assert len(rates) == 14
        expected = model(**sentences).last_hidden_state
        charges = {}

        def one_time_step(neuron, current, attention_mask=None):
            current = current.masked_fill(attention_mask[..., None] == 0, 0)
            decay = neuron.decay.repeat_interleave(neuron.num_channels // neuron.num_groups)
            potential = decay * charges.get(neuron, 0.0) + current
            spikes = (potential >= neuron.v_threshold).float()
            charges[neuron] = potential - neuron.v_threshold * spikes
            return spikes.masked_fill(attention_mask[..., None] == 0, 0)

        monkeypatch.setattr(LIF, "forward", one_time_step)
        mask = sentences["attention_mask"]
        bias = torch.zeros(len(mask), 1, 1, LENGTH).masked_fill(mask[:, None, None] == 0, torch.finfo().min)
        positions = implementation.default_position_ids(sentences["input_ids"], mask)
        with torch.no_grad():
            embedded = model.embeddings(sentences["input_ids"], sentences["token_type_ids"], positions, None)
            steps = []
            for _ in range(3):
                hidden_states = embedded
                for layer in model.encoder.layer:
                    hidden_states = layer(hidden_states, bias, mask)
                steps.append(hidden_states)
        assert (steps[0] - steps[1]).abs().max() > 1e-2
        close(torch.stack(steps).mean(0)[mask.bool()], expected[mask.bool()])


class TestBertCheckpoints:
    @pytest.fixture
    def bert_config(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return transformers.BertConfig(vocab_size=120, max_position_embeddings=64, **sizes)

    def load(self, model_class, folder, **kwargs):
        return model_class.from_pretrained(folder, output_loading_info=True, **kwargs)

    @pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
    @each_head
    def test_everything_loads_that_loads_into_bert(self, make_config, tmp_path, bert_config, saved, head):
        getattr(transformers, saved)(bert_config).save_pretrained(tmp_path)
        spiking_class = MODELS[head]
        bert, expected = self.load(getattr(transformers, spiking_class.__name__.removeprefix("SNN")), tmp_path)
        model, found = self.load(spiking_class, tmp_path, config=make_config())

        assert set(found["unexpected_keys"]) == set(expected["unexpected_keys"])
        assert not found["mismatched_keys"]
        missing = set(found["missing_keys"]) - set(expected["missing_keys"])
        assert {name.split(".")[-1] for name in missing} == NEURON_PARAMETERS
        assert missing == {name for name, _ in model.named_parameters() if name.split(".")[-1] in NEURON_PARAMETERS}

        loaded = {name for name, _ in bert.named_parameters()} - set(expected["missing_keys"])
        spiking = dict(model.named_parameters())
        assert len(loaded) >= 37
        for name, parameter in bert.named_parameters():
            if name in loaded:
                assert torch.equal(spiking[name], parameter), name

    @pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM"])
    def test_no_key_of_the_same_model_is_unexpected(self, make_config, tmp_path, bert_config, saved):
        getattr(transformers, saved)(bert_config).save_pretrained(tmp_path)
        _, found = self.load(getattr(modeling_snn_bert, f"SNN{saved}"), tmp_path, config=make_config())
        assert not found["unexpected_keys"]
        assert {name.split(".")[-1] for name in found["missing_keys"]} == NEURON_PARAMETERS

    def test_missing_neuron_parameters_start_from_the_config(
        self, make_config, tmp_path, bert_config, sentences, assert_spikes_flow
    ):
        transformers.BertModel(bert_config).save_pretrained(tmp_path)
        config = make_config(v_threshold=0.7, decay=0.1, reset=0.2, initializer_range=bert_config.initializer_range)
        model = SNNBertModel.from_pretrained(tmp_path, config=config)
        neuron = model.encoder.layer[0].intermediate.neuron
        # 0.7 standard deviations of the potential: of a leaky mean of LayerNorm's output, in both directions.
        spread = math.sqrt(2 / (1 - 0.1**2) - 1) / (2 / (1 - 0.1) - 1)
        close(neuron.v_threshold, torch.full((32,), 0.7 * spread))
        close(neuron.decay_forward, torch.full((4,), 0.1))
        close(neuron.decay_backward, torch.full((4,), 0.1))
        close(neuron.soft_reset, torch.full((4,), 0.2))
        assert_spikes_flow(model, **sentences)


class TestTraining:
    @each_attention
    @each_neuron
    @each_head
    def test_every_parameter_gets_a_gradient(self, make_model, sentences, head, neuron, attention_type):
        model = make_model(MODELS[head], neuron, attention_type=attention_type).train()
        outputs = model(**inputs_for(head, sentences), **labels_for(head, sentences))
        # The base model has no loss; its sum would be constant, because a LayerNorm comes last.
        loss = outputs.loss if head != "base" else outputs.pooler_output.sum()
        loss.backward()
        without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        # What is added to every score that enters one softmax cancels there, up to rounding.
        without -= {"choice": {"classifier.bias"}, "question": {"qa_outputs.bias"}}.get(head, set())
        expected = set()
        if head in ("base", "sequence", "choice"):
            # These read the first token, and nothing comes before it that could reach it through a decay.
            expected = {name for name, _ in model.named_parameters() if re.search(WITHOUT_PAST[neuron], name)}
        assert without == expected
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.slow
    @each_attention
    @each_neuron
    def test_a_tiny_model_learns_eight_sentences_by_heart(
        self, make_config, tokenizer, assert_spikes_flow, neuron, attention_type
    ):
        subjects, verbs = ("The dog", "A fox", "It", "She"), ("is old", "and all")
        eight = [f"{subject} {verb}." for subject in subjects for verb in verbs]
        batch = dict(tokenizer(eight, padding="max_length", max_length=12, return_tensors="pt"))
        labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
        settings = NEURONS[neuron] | {"psn_length": 12 if neuron == "psn" else None, "attention_type": attention_type}
        model = SNNBertForSequenceClassification(make_config(**settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
        losses = []
        for _ in range(250):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if losses[-1] < 0.2 * losses[0]:
                break
        assert losses[-1] < 0.2 * losses[0]
        assert_spikes_flow(model.eval(), **batch)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
    @each_head
    def test_gradient_checkpointing_gives_the_same_gradients(self, make_model, sentences, head):
        model = make_model(MODELS[head]).train()
        gradients = []
        for checkpointing in (False, True):
            twin = copy.deepcopy(model)
            if checkpointing:
                twin.gradient_checkpointing_enable()
                assert twin.is_gradient_checkpointing
            outputs = twin(**inputs_for(head, sentences), **labels_for(head, sentences))
            (outputs.loss if head != "base" else outputs.pooler_output.sum()).backward()
            gradients.append({name: p.grad for name, p in twin.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @each_attention
    @each_neuron
    def test_half_precision_forward(self, make_model, sentences, assert_spikes_flow, neuron, attention_type, dtype):
        model = make_model(SNNBertForSequenceClassification, neuron, attention_type=attention_type).to(dtype)
        assert_spikes_flow(model, **sentences)
        outputs = model(**sentences, output_spikes=True)
        assert outputs.logits.dtype == dtype
        assert outputs.logits.isfinite().all()
        assert {spikes.dtype for spikes in outputs.spikes} == {dtype}

    @each_attention
    @each_neuron
    def test_bfloat16_autocast_training_step(self, make_model, sentences, neuron, attention_type):
        model = make_model(SNNBertForSequenceClassification, neuron, attention_type=attention_type).train()
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**sentences, labels=torch.tensor([0, 1] * 3)).loss
        loss.backward()
        optimizer.step()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        unchanged = {name for name, x in model.state_dict().items() if torch.equal(x, before[name])}
        # The steps of some decays are too small to be seen in float32.
        assert all(re.search(r"\.decay(_\w+)?_logit$", name) for name in unchanged)

    @pytest.mark.slow
    @each_attention
    @each_neuron
    def test_compiles_to_one_graph(self, make_model, sentences, assert_spikes_flow, neuron, attention_type):
        batch = {name: x[:, :12] for name, x in sentences.items()}
        settings = {"attention_type": attention_type, "attn_implementation": "sdpa", "num_hidden_layers": 1}
        if neuron == "psn":
            settings["psn_length"] = 12
        model = make_model(SNNBertForSequenceClassification, neuron, **settings)
        assert_spikes_flow(model, **batch)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            close(compiled(**batch).logits, model(**batch).logits)

    def test_dropout_is_active_in_training_only(self, make_model, sentences):
        model = make_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        assert torch.equal(model(**sentences).pooler_output, model(**sentences).pooler_output)
        model.train()
        assert not torch.equal(model(**sentences).pooler_output, model(**sentences).pooler_output)


class TestHeads:
    def test_regression(self, make_model, sentences):
        model = make_model(SNNBertForSequenceClassification, num_labels=1)
        labels = torch.randn(6)
        outputs = model(**sentences, labels=labels)
        assert model.config.problem_type == "regression"
        close(outputs.loss, nn.functional.mse_loss(outputs.logits[:, 0], labels))

    def test_single_label(self, make_model, sentences):
        model = make_model(SNNBertForSequenceClassification, num_labels=3)
        labels = torch.tensor([0, 1, 2] * 2)
        outputs = model(**sentences, labels=labels)
        assert model.config.problem_type == "single_label_classification"
        close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))

    def test_multi_label(self, make_model, sentences):
        model = make_model(SNNBertForSequenceClassification, num_labels=3)
        labels = torch.randint(0, 2, (6, 3)).float()
        outputs = model(**sentences, labels=labels)
        assert model.config.problem_type == "multi_label_classification"
        close(outputs.loss, nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels))

    @pytest.mark.parametrize("head", ["masked_lm", "token"])
    def test_labels_of_minus_100_are_ignored(self, make_model, sentences, head):
        model = make_model(MODELS[head], num_labels=2)
        labels = (sentences["input_ids"] % 2).masked_fill(sentences["attention_mask"] == 0, -100)
        outputs = model(**sentences, labels=labels)
        close(outputs.loss, nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()))

    @pytest.mark.parametrize("head", ["masked_lm", "token"])
    def test_the_loss_divides_by_the_number_of_items_that_trainer_gives(self, make_model, sentences, head):
        model = make_model(MODELS[head], num_labels=2)
        labels = sentences["input_ids"] % 2
        mean = model(**sentences, labels=labels).loss
        close(model(**sentences, labels=labels, num_items_in_batch=2 * labels.numel()).loss, mean / 2)

    def test_masked_lm_ties_decoder_and_embeddings(self, make_model, tmp_path):
        model = make_model(SNNBertForMaskedLM)
        decoder, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        assert decoder.weight is embeddings.weight
        assert decoder.bias is model.cls.predictions.bias
        model.save_pretrained(tmp_path)
        loaded = SNNBertForMaskedLM.from_pretrained(tmp_path)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.get_output_embeddings().weight, decoder.weight)

    def test_masked_lm_untied(self, make_model):
        model = make_model(SNNBertForMaskedLM, tie_word_embeddings=False)
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight

    def test_masked_lm_resizes(self, make_model, sentences):
        model = make_model(SNNBertForMaskedLM)
        model.resize_token_embeddings(130)
        assert model(**sentences).logits.shape == (6, LENGTH, 130)
        assert model.cls.predictions.bias.shape == (130,)

    def test_multiple_choice_scores_each_choice_on_its_own(self, make_model, sentences):
        model = make_model(SNNBertForMultipleChoice)
        labels = torch.tensor([0, 1, 1])
        outputs = model(**as_choices(sentences), labels=labels)
        assert outputs.logits.shape == (3, 2)
        close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
        single = model(**as_choices(sentences, 1)).logits
        close(outputs.logits.flatten(), single.flatten())

    def test_question_answering(self, make_model, sentences):
        model = make_model(SNNBertForQuestionAnswering)
        start, end = torch.tensor([1, 2, 3] * 2), torch.tensor([3, 4, 5] * 2)
        outputs = model(**sentences, start_positions=start, end_positions=end)
        assert outputs.start_logits.shape == outputs.end_logits.shape == (6, LENGTH)
        losses = [
            nn.functional.cross_entropy(logits, target)
            for logits, target in ((outputs.start_logits, start), (outputs.end_logits, end))
        ]
        close(outputs.loss, sum(losses) / 2)


class TestInitialisation:
    def test_the_same_seed_gives_the_same_model(self, make_config, sentences):
        runs = []
        for _ in range(2):
            torch.manual_seed(7)
            model = SNNBertModel(make_config()).eval()
            runs.append((model.state_dict(), model(**sentences).last_hidden_state))
        assert all(torch.equal(x, runs[1][0][name]) for name, x in runs[0][0].items())
        assert torch.equal(runs[0][1], runs[1][1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_dtype(self, make_config, tmp_path, dtype):
        SNNBertModel(make_config()).save_pretrained(tmp_path)
        model = SNNBertModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}

    @pytest.mark.parametrize(
        ("setting", "attribute", "value"),
        [("decay", "decay_forward", 0.4), ("decay", "decay_backward", 0.4), ("reset", "soft_reset", 0.3)],
    )
    def test_settings_reach_every_bpsn(self, make_config, setting, attribute, value):
        model = SNNBertModel(make_config(**{setting: value}))
        neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
        assert len(neurons) == 14
        for neuron in neurons:
            close(getattr(neuron, attribute), torch.full((4,), value))

    def test_settings_reach_lif_and_psn(self, make_config):
        lif = SNNBertModel(make_config(**NEURONS["lif"], decay=0.4)).encoder.layer[1].output.neuron
        close(lif.decay, torch.full((4,), 0.4))
        psn = SNNBertModel(make_config(**NEURONS["psn"])).encoder.layer[1].output.neuron
        assert isinstance(psn, PSN)
        assert torch.equal(psn.weight, torch.eye(LENGTH))

    @pytest.mark.parametrize(
        "overrides",
        [
            {"surrogate": "triangle"},
            {"surrogate_alpha": 5.0},
            {"spike_type": "ternary"},
            {"reset_iterations": 3},
            {"normalize": False},
            {"bidirectional": False},
        ],
        ids=lambda overrides: next(iter(overrides)),
    )
    def test_plain_settings_reach_every_neuron(self, make_config, overrides):
        ((name, value),) = overrides.items()
        model = SNNBertModel(make_config(**overrides))
        assert {getattr(model.get_submodule(neuron), name) for neuron in model.neuron_names()} == {value}

    def test_a_higher_threshold_gives_fewer_spikes(self, make_config, sentences, assert_spikes_flow):
        rates = []
        for v_threshold in (0.3, 1.0, 1.5):
            torch.manual_seed(0)
            model = SNNBertModel(make_config(v_threshold=v_threshold)).eval()
            values = assert_spikes_flow(model, **sentences).values()
            rates.append(sum(values) / len(values))
        assert rates[0] > rates[1] > rates[2]

    def test_neuron_names(self, make_config):
        model = SNNBertForMaskedLM(make_config(num_hidden_layers=1))
        layer = "bert.encoder.layer.0"
        assert model.neuron_names() == [
            f"{layer}.attention.self.neuron",
            f"{layer}.attention.self.query_neuron",
            f"{layer}.attention.self.key_neuron",
            f"{layer}.attention.self.value_neuron",
            f"{layer}.attention.output.neuron",
            f"{layer}.intermediate.neuron",
            f"{layer}.output.neuron",
        ]

    def test_parameters_are_saved_and_loaded(self, make_model, tmp_path, sentences):
        model = make_model(SNNBertForTokenClassification)
        model.save_pretrained(tmp_path)
        loaded, info = SNNBertForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(loaded(**sentences).logits, model(**sentences).logits)
