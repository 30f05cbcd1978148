"""SNN-BERT in other runtimes: torch.compile, torch.export, ONNX Runtime, NIR, and in half precision."""

import copy
import sys
from graphlib import TopologicalSorter

import numpy as np
import pytest
import torch
from heads import MODELS
from transformers import BertConfig, BertForSequenceClassification

from modeling_snn_bert import (
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertModel,
)
from modeling_snn_bert.event_driven import event_driven
from modeling_snn_bert.export import export_nir, export_onnx, export_program

# One layer is a graph of every kind of node; the second only makes more of them.
ONE_LAYER = {"num_hidden_layers": 1, "attn_implementation": "sdpa"}
LIF = {"neuron_type": "lif", "decay": 0.5}
# Sizes that an export from two rows of ten tokens has not seen, from the smallest to the largest.
SIZES = [(1, 1), (1, 2), (4, 8), (3, 17), (2, 64)]


@pytest.fixture
def make_model(make_config):
    """A function that returns a model in evaluation mode, whose decays and resets differ between the groups."""

    def make(head, **settings):
        model = head(make_config(**settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "decay" in name:
                    parameter.add_(0.5 * torch.randn_like(parameter))
                elif "reset_strength" in name:
                    parameter.uniform_(0.1, 0.5)
        return model

    return make


def batch(rows, length):
    """Random tokens, of which the second half of the last row is padding, and both token types."""
    ids = torch.randint(5, 120, (*rows, length) if isinstance(rows, tuple) else (rows, length))
    mask = torch.ones_like(ids)
    mask.view(-1, length)[-1, (length + 1) // 2 :] = 0
    types = torch.zeros_like(ids)
    types[..., length // 2 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


EXPORTS = {
    "question-ternary-spiking-attention": (
        SNNBertForQuestionAnswering,
        {
            "spike_type": "ternary",
            "reset_iterations": 2,
            "attention_type": "spiking",
            "relative_attention_num_buckets": 8,
        },
    ),
    "masked-lm-lif-repeat": (SNNBertForMaskedLM, {**LIF, "coding": "repeat", "num_timesteps": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("head", "settings"), EXPORTS.values(), ids=EXPORTS)
def test_torch_export_leaves_batch_and_length_open(make_model, assert_spikes_flow, head, settings):
    model = make_model(head, **ONE_LAYER, **settings)
    assert_spikes_flow(model, **batch(4, 32))
    program = export_program(model).module()
    for rows, length in SIZES:
        inputs = batch(rows, length)
        with torch.no_grad():
            got, expected = program(*inputs.values()), model(**inputs)
        assert len(got) == (2 if head is SNNBertForQuestionAnswering else 1)
        for x, name in zip(got, [k for k in expected if k in OUTPUTS], strict=True):
            close(x, expected[name])


OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


@pytest.mark.slow
def test_torch_export_of_choices_and_of_a_fixed_length(make_model):
    model = make_model(SNNBertForMultipleChoice, **ONE_LAYER, neuron_type="psn", psn_length=12)
    program = export_program(model, ["input_ids", "attention_mask"]).module()
    for rows, choices in ((1, 2), (3, 4)):
        inputs = batch((rows, choices), 12)
        with torch.no_grad():
            close(
                program(inputs["input_ids"], inputs["attention_mask"])[0],
                model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits,
            )


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_logits(make_model, assert_spikes_flow, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    # With a position bias; docs/export.md, whose snippets are tested, exports a model without.
    model = make_model(SNNBertForSequenceClassification, **ONE_LAYER, relative_attention_num_buckets=32)
    assert_spikes_flow(model, **batch(4, 32))
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    # The weights are inside, and nothing is left beside the file.
    assert [x.name for x in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    for rows, length in SIZES:
        inputs = batch(rows, length)
        got = session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})[0]
        with torch.no_grad():
            close(torch.from_numpy(got), model(**inputs).logits)


@pytest.mark.slow
def test_onnx_export_is_checked_and_takes_a_bert(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from modeling_snn_bert import export

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertForSequenceClassification(config).eval()
    path = export_onnx(bert, tmp_path / "bert.onnx", ("input_ids", "attention_mask"))
    before = path.read_bytes()
    # What the file computes, compared with a model that has changed since.
    check = export._check_onnx

    def check_another(file, module, length_is_open):
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.model.classifier.weight.mul_(1.5)
        check(file, other, length_is_open)

    monkeypatch.setattr(export, "_check_onnx", check_another)
    with pytest.raises(RuntimeError, match=r"`logits` differs from the model's by 0\.\d+"):
        export_onnx(bert, path, ("input_ids", "attention_mask"))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [0, 8])
def test_a_compiled_training_step_gives_the_same_gradients(make_model, assert_spikes_flow, buckets):
    settings = {**ONE_LAYER, "relative_attention_num_buckets": buckets}
    model = make_model(SNNBertForSequenceClassification, **settings).train()
    inputs = batch(4, 12)
    assert_spikes_flow(model, **inputs)
    gradients = []
    for compiled in (False, True):
        twin = copy.deepcopy(model)
        torch._dynamo.reset()
        step = torch.compile(twin, fullgraph=True, backend="aot_eager") if compiled else twin
        loss = step(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        gradients.append({"loss": loss.detach(), **{name: p.grad for name, p in twin.named_parameters()}})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected)


@pytest.mark.parametrize(
    ("settings", "prepare", "message"),
    [
        ({}, lambda model: model.train(), "training mode"),
        ({}, lambda model: event_driven(model, dense_above=0.5), "event-driven"),
        (LIF, lambda model: model, "steps through the tokens"),
    ],
    ids=["training", "event-driven", "lif"],
)
def test_what_cannot_be_exported_is_refused(make_model, settings, prepare, message):
    model = prepare(make_model(SNNBertForSequenceClassification, **settings))
    with pytest.raises(ValueError, match=message):
        export_program(model)


def test_wrong_arguments_of_an_export(make_model, tmp_path, monkeypatch):
    model = make_model(SNNBertModel)
    with pytest.raises(TypeError, match=r"`model` must be a transformers model, got Linear"):
        export_program(torch.nn.Linear(2, 2))
    for names in ((), ("attention_mask", "input_ids"), ("input_ids", "labels"), ("input_ids", "input_ids")):
        with pytest.raises(ValueError, match="`input_names` must begin with 'input_ids'"):
            export_program(model, names)
    for name, export in (
        ("onnxscript", lambda: export_onnx(model, tmp_path / "x")),
        ("nir", lambda: export_nir(model)),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"needs {name}, .*pip install"):
            export()
    assert not list(tmp_path.iterdir())


def run_nir(graph, inputs, dt):
    """What an exported graph computes from `inputs`, `[time, channels]`, step by step, by NIR's own equations.

    An edge that closes a loop carries its value one step later.
    """
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    last = {name: np.zeros(node.scale.shape) for name, node in graph.nodes.items() if type(node).__name__ == "Scale"}
    order = TopologicalSorter({name: set(before) - set(last) for name, before in sources.items() if name not in last})
    order = [name for name in order.static_order() if name != "input"]
    potential = dict.fromkeys(graph.nodes, 0.0)
    results = {name: [] for name, node in graph.nodes.items() if type(node).__name__ == "Output"}
    for x in inputs:
        values = {"input": x, **last}
        for name in order:
            node, received = graph.nodes[name], sum(values[source] for source in sources[name])
            kind = type(node).__name__
            if kind == "LI":
                drift = node.v_leak - potential[name] + node.r * received
                potential[name] = potential[name] + dt / node.tau * drift
                values[name] = potential[name]
            elif kind == "Threshold":
                values[name] = (received > node.threshold).astype(float)
            elif kind == "Affine":
                values[name] = node.weight @ received + node.bias
            else:
                results[name].append(received)
        last = {name: graph.nodes[name].scale * values[sources[name][0]] for name in last}
    return {name: np.stack(rows) for name, rows in results.items()}


def test_nir_graphs_give_the_models_spikes(make_model, tmp_path, assert_spikes_flow):
    nir = pytest.importorskip("nir")
    model = make_model(SNNBertModel, **LIF).double()
    inputs = batch(1, 20)
    inputs["attention_mask"][:] = 1
    assert_spikes_flow(model, **inputs)
    graphs = export_nir(model, dt=1e-3)
    assert len(graphs) == 3 * 2
    seen = {}
    layer = model.encoder.layer[1]
    recorded = {
        "attention.self": (layer.attention.self.neuron, layer.attention.self.query_neuron),
        "attention.output": (layer.attention.output.neuron, layer.attention.output.dense),
        "mlp": (layer.intermediate.neuron, layer.output.dense),
    }
    for first, last in recorded.values():
        first.register_forward_hook(lambda module, args, output: seen.update({module: args[0]}))
        last.register_forward_hook(lambda module, args, output: seen.update({module: output}))
    with torch.no_grad():
        model(**inputs)
    for part, (first, last) in recorded.items():
        path = tmp_path / f"{part}.nir"
        nir.write(path, graphs[f"layer.1.{part}"])
        graph = nir.read(path)
        assert graph.metadata["time_step"] == "token" and float(graph.metadata["dt"]) == 1e-3
        outputs = run_nir(graph, seen[first][0].numpy(), 1e-3)
        assert set(outputs) == ({"query_spikes", "key_spikes", "value_spikes"} if "self" in part else {"output"})
        got, expected = outputs["query_spikes" if "self" in part else "output"], seen[last][0].numpy()
        assert np.count_nonzero(got) > 0 and np.ptp(expected) > 0
        np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no node for `neuron_type='bpsn'`: .* later tokens"),
        ({"neuron_type": "psn", "psn_length": 8}, "no node for `neuron_type='psn'`"),
        ({**LIF, "spike_type": "ternary"}, "`spike_type='ternary'`"),
    ],
    ids=["bpsn", "psn", "ternary"],
)
def test_nir_refuses_what_it_cannot_express(make_model, settings, message):
    pytest.importorskip("nir")
    with pytest.raises(ValueError, match=message):
        export_nir(make_model(SNNBertModel, **settings))
    with pytest.raises(TypeError, match="must be an SNN-BERT, got Linear"):
        export_nir(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`dt` must be positive, got 0"):
        export_nir(make_model(SNNBertModel, **LIF), dt=0)


# Rounding moves potentials by 2^-8 (bfloat16) or 2^-11 (float16) of their size, and with them the spikes that stood
# that close to their threshold: the rates hardly change, single spikes do, and the outputs follow those.
@pytest.mark.parametrize(
    ("dtype", "rate_tolerance", "similarity"),
    [(torch.bfloat16, 0.02, 0.9), (torch.float16, 0.005, 0.98)],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "spiking"])
@pytest.mark.parametrize("head", MODELS)
def test_half_precision_is_near_float32(make_model, head, attention, dtype, rate_tolerance, similarity):
    settings = {"attention_type": "spiking"} if attention == "spiking" else {"attn_implementation": attention}
    model = make_model(MODELS[head], **settings)
    inputs = batch((4, 2) if head == "choice" else 8, 32)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected = model(**inputs, output_firing_rates=True)
        got = half(**inputs, output_firing_rates=True)
    for name, rate, wanted in zip(model.neuron_names(), got.firing_rates, expected.firing_rates, strict=True):
        assert 0 < wanted.mean() < 1, name
        assert abs(rate.float().mean() - wanted.mean()) < rate_tolerance, name
    for name in (name for name in OUTPUTS if name in expected):
        assert got[name].dtype == dtype and got[name].isfinite().all()
        cosine = torch.nn.functional.cosine_similarity(got[name].float().flatten(), expected[name].flatten(), dim=0)
        assert cosine > similarity, (name, cosine)
