"""SNN-BERT for other runtimes: `torch.export`, ONNX, and NIR for neuromorphic tools.

`export_program` and `export_onnx` write down a model of any head with the batch and the length left open; its results
are those of the model. They take transformers' BERT too, so that the two can be compared in one runtime. `export_nir`
writes the spiking parts of a model with LIF neurons in the Neuromorphic Intermediate Representation, and refuses by
name what that format cannot express.

The package installs none of the tools: ONNX needs `pip install onnx onnxscript` (and `onnxruntime`, to check the file
and to run it), NIR needs `pip install nir`.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .atomic_writes import written_whole
from .event_driven import is_event_driven
from .layer_places import PLACES
from .modeling_snn_bert import SNNBertForMultipleChoice, SNNBertLayer, SNNBertPreTrainedModel
from .spiking_neurons import LIF, SpikingNeuron

if TYPE_CHECKING:
    import nir

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
# What a model may return, in the order in which an exported graph returns it.
OUTPUT_NAMES = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
# Sums in another order move a potential by some 1e-7 and, rarely, a spike with it, which the layers behind it see. A
# wrong graph is off everywhere. So the file is judged by its mean error, in units of the outputs' mean size.
ONNX_TOLERANCE = 1e-2
# The parts of a layer that NIR can express, and the neurons that they begin at.
NIR_PARTS = {
    "attention.self": "attention.self.neuron",
    "attention.output": "attention.output.neuron",
    "mlp": "intermediate.neuron",
}
# Where PyTorch stops taking the batch for open: torch.export wants a range.
MAX_BATCH_SIZE = 2**16


class TensorsOnly(nn.Module):
    """`model` with tensors in, by position, and the tensors named `output_names` out."""

    def __init__(self, model: PreTrainedModel, input_names: Iterable[str], output_names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self.input_names, inputs, strict=True)), return_dict=True)
        return tuple(outputs[name] for name in self.output_names)


def export_program(model: PreTrainedModel, input_names: Iterable[str] = INPUT_NAMES) -> torch.export.ExportedProgram:
    """`model` as a `torch.export` program whose batch and length are open.

    Args:
        model: an SNN-BERT with any head, or a BERT, in evaluation mode and not event-driven.
        input_names: what the program takes, by position: `"input_ids"` first, and of `"attention_mask"` and
            `"token_type_ids"` those that are wanted. All are int64 and `[batch, seq_len]`, `[batch, choices, seq_len]`
            for multiple choice, of at least two choices.

    Returns:
        The program. It returns a tuple of those of `OUTPUT_NAMES` that the model has, in that order. The length ends
        at `config.max_position_embeddings`; with `neuron_type="psn"` it is `psn_length` and nothing else.

    Raises:
        TypeError: if `model` is no transformers model.
        ValueError: if `model` is in training mode, is event-driven, or steps through its tokens, or if `input_names`
            are none that it takes.
    """
    module, inputs, dimensions = _exportable(model, input_names)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(tuple(dimensions for _ in inputs),))


def export_onnx(
    model: PreTrainedModel, path: str | Path, input_names: Iterable[str] = INPUT_NAMES, *, check: bool = True
) -> Path:
    """Write `model` as an ONNX file whose batch and length are open.

    The file takes what a tokenizer returns (`return_tensors="np"`) by the names of `input_names`, and has outputs of
    the names in `OUTPUT_NAMES`. Weights are inside it.

    Args:
        model: as for `export_program`.
        path: the file to write, whole or not at all.
        input_names: as for `export_program`.
        check: run the file in ONNX Runtime at two other batch sizes and lengths before it is put in its place.

    Returns:
        `path`.

    Raises:
        TypeError, ValueError: as `export_program`.
        ImportError: if onnx or onnxscript, or onnxruntime for the check, is not installed.
        RuntimeError: if ONNX Runtime's outputs are not the model's.
    """
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _require(name, "onnx onnxscript onnxruntime")
    module, inputs, dimensions = _exportable(model, input_names)
    path = Path(path)
    with written_whole(path) as temporary:
        with torch.no_grad():
            torch.onnx.export(
                module,
                inputs,
                temporary,
                input_names=list(module.input_names),
                output_names=list(module.output_names),
                dynamic_shapes=(tuple(dimensions for _ in inputs),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        if check:
            _check_onnx(temporary, module, len(dimensions) > 1)
    return path


def export_nir(model: SNNBertPreTrainedModel, dt: float = 1.0) -> "dict[str, nir.NIRGraph]":
    """The spiking parts of `model` as graphs of the Neuromorphic Intermediate Representation.

    A part begins at real-valued currents, runs over neurons and Linears and ends where something stands that NIR has no
    node for (softmax, LayerNorm, the residual sum). So each encoder layer gives three graphs, which a host program has
    to connect:

    - `layer.N.attention.self`: hidden states to the spikes of `query`, `key` and `value`;
    - `layer.N.attention.output`: the attention's output to the current that is added to the hidden states;
    - `layer.N.mlp`: hidden states to the current that is added to them.

    A LIF neuron with soft reset, `v[t] = decay * (v[t - 1] - v_threshold * s[t - 1]) + I[t]`, is written as a leaky
    integrator `LI` and a `Threshold`, whose spikes come back through a `Scale` one time-step later: NIR's own `LIF`
    node sets the potential to a value when it fires and cannot say "subtract the threshold". `LI` is an equation in
    continuous time; its `tau` and `r` are those that a forward Euler step of `dt` turns into the model's decay. A
    `Threshold` fires above its value, the model at it too.

    Args:
        model: an SNN-BERT of `neuron_type="lif"` with binary spikes. A time-step is a token, or with repeat coding one
            of the presentations of each token (the graphs' metadata says which).
        dt: duration of a time-step, > 0, in the unit that the simulator counts time in.

    Returns:
        Graphs by the names above, ready for `nir.write`.

    Raises:
        TypeError: if `model` holds no encoder layer of an SNN-BERT.
        ValueError: for a neuron or a spike that NIR cannot express, and for `dt`.
        ImportError: if nir is not installed.
    """
    nir = _require("nir", "nir")
    if not dt > 0:
        raise ValueError(f"`dt` must be positive, got {dt}")
    layers = [module for module in model.modules() if isinstance(module, SNNBertLayer)]
    if not layers:
        raise TypeError(f"`model` must be an SNN-BERT, got {type(model).__name__}")
    config = layers[0].attention.self.config
    if config.neuron_type != "lif":
        reasons = {
            "bpsn": "the potential of a bidirectional parallel neuron depends on later tokens",
            "psn": "the potential of a parallel neuron is a matrix over all tokens",
        }
        raise ValueError(
            f"NIR has no node for `neuron_type={config.neuron_type!r}`: {reasons[config.neuron_type]}, and NIR's "
            "neurons step through time. A model of `neuron_type='lif'` can be exported"
        )
    if config.spike_type != "binary":
        raise ValueError(f"NIR's spikes are binary, got a model of `spike_type={config.spike_type!r}`")
    time_step = "token" if config.coding == "individual" else "presentation"
    metadata = {"model_type": config.model_type, "time_step": time_step, "dt": dt}
    graphs = {}
    for k, layer in enumerate(layers):
        for name, neuron in NIR_PARTS.items():
            part = NIRPart(nir, dt, config.hidden_size)
            part.follow(layer, name, neuron, "input")
            graphs[f"layer.{k}.{name}"] = part.graph(metadata)
    return graphs


class NIRPart:
    """Collects nodes and edges of one graph; each method returns the name of the node that its result comes from."""

    def __init__(self, nir: Any, dt: float, channels: int) -> None:
        self.nir = nir
        self.dt = dt
        self.nodes: dict[str, Any] = {"input": nir.Input(input_type={"input": _array(torch.tensor([channels]))})}
        self.edges: list[tuple[str, str]] = []

    def follow(self, layer: SNNBertLayer, part: str, neuron: str, source: str) -> None:
        """Add the neuron of that name in `layer`, and all that its spikes reach without leaving this part."""
        (place,) = (place for place in PLACES if place.neuron == neuron)

        def node(name: str) -> str:
            return name.removeprefix(f"{part}.").replace(".", "_")

        spikes = self.neuron(source, node(neuron), cast(SpikingNeuron, layer.get_submodule(neuron)))
        if not place.linears:
            self.output(spikes, spikes.replace("_neuron", "_spikes"))
        for linear in place.linears:
            current = self.linear(spikes, node(linear), cast(nn.Linear, layer.get_submodule(linear)))
            behind = [other.neuron for other in PLACES if other.source == linear]
            for other in behind:
                self.follow(layer, part, other, current)
            if not behind:
                self.output(current, "output")

    def neuron(self, source: str, name: str, spiking_neuron: SpikingNeuron) -> str:
        """A LIF neuron, which a model of `neuron_type="lif"` has: integrator, threshold, and the reset that returns."""
        neuron = cast(LIF, spiking_neuron)
        decay = neuron.per_channel(neuron.decay).double()
        v_threshold = neuron.v_threshold.double()
        gain = 1 / (1 - decay)
        self.nodes[f"{name}_potential"] = self.nir.LI(
            tau=_array(self.dt * gain), r=_array(gain), v_leak=_array(torch.zeros_like(decay))
        )
        self.nodes[name] = self.nir.Threshold(threshold=_array(v_threshold))
        self.nodes[f"{name}_reset"] = self.nir.Scale(scale=_array(-decay * v_threshold))
        self.edges += [
            (source, f"{name}_potential"),
            (f"{name}_potential", name),
            (name, f"{name}_reset"),
            (f"{name}_reset", f"{name}_potential"),
        ]
        return name

    def linear(self, source: str, name: str, linear: nn.Linear) -> str:
        """A Linear with its bias."""
        # A Linear that an adapter has wrapped would lose the adapter here.
        if hasattr(linear, "base_layer"):
            raise ValueError(f"`{name}` carries an adapter: merge it into the weights first (`merge_and_unload`)")
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        self.nodes[name] = self.nir.Affine(weight=_array(linear.weight), bias=_array(bias))
        self.edges.append((source, name))
        return name

    def output(self, source: str, name: str) -> None:
        """Name what `source` gives as an output of the graph."""
        self.nodes[name] = self.nir.Output(output_type={"output": self.nodes[source].output_type["output"]})
        self.edges.append((source, name))

    def graph(self, metadata: dict[str, Any]) -> "nir.NIRGraph":
        """The graph, with its types checked."""
        return self.nir.NIRGraph(nodes=self.nodes, edges=self.edges, metadata=dict(metadata))


def _array(x: torch.Tensor):
    return x.detach().cpu().numpy()


def _require(name: str, packages: str) -> Any:
    """The module `name`.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this export needs {name}, which cannot be imported ({error}): pip install {packages}"
        ) from error


def _exportable(
    model: PreTrainedModel, input_names: Iterable[str]
) -> tuple[TensorsOnly, tuple[torch.Tensor, ...], dict[int, Any]]:
    """The module to export, example inputs, and which of their dimensions are open."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model, got {type(model).__name__}")
    names = tuple(input_names)
    if not names or names[0] != "input_ids" or len(set(names)) < len(names) or not set(names) <= set(INPUT_NAMES):
        raise ValueError(f"`input_names` must begin with 'input_ids' and name some of {INPUT_NAMES}, got {names}")
    if model.training:
        raise ValueError("`model` is in training mode, and a graph holds no dropout: call `model.eval()`")
    if is_event_driven(model):
        raise ValueError("`model` is event-driven, which has no graph of fixed operations: call `dense(model)` first")
    config = model.config
    neuron_type = getattr(config, "neuron_type", None)
    if neuron_type == "lif" and config.coding == "individual":
        raise ValueError(
            "a LIF neuron of `coding='individual'` steps through the tokens, so its graph has as many steps as there "
            "are tokens, and no open length: use `neuron_type='bpsn'`, or `coding='repeat'`"
        )
    is_choice = isinstance(model, SNNBertForMultipleChoice)
    inputs = _example(model, names, (2, 2) if is_choice else (2,), 10 if neuron_type != "psn" else config.psn_length)
    with torch.no_grad():
        outputs = model(**dict(zip(names, inputs, strict=True)), return_dict=True)
    module = TensorsOnly(model, names, [name for name in OUTPUT_NAMES if outputs.get(name) is not None])
    # `training` is what tells export that there is no dropout; a fresh module is in training mode.
    module.eval()
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)}
    if is_choice:
        dimensions[1] = torch.export.Dim("choices", min=2, max=MAX_BATCH_SIZE)
    if neuron_type != "psn":
        longest = config.max_position_embeddings
        dimensions[inputs[0].dim() - 1] = torch.export.Dim("length", min=1, max=longest)
    return module, inputs, dimensions


def _example(
    model: PreTrainedModel, names: tuple[str, ...], rows: tuple[int, ...], length: int
) -> tuple[torch.Tensor, ...]:
    """Random tokens with padding in the last row; a mask without any would be left out of the graph."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (*rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask.view(-1, length)[-1, (length + 1) // 2 :] = 0
    types = torch.zeros_like(ids)
    if getattr(model.config, "type_vocab_size", 1) > 1:
        types[..., length // 2 :] = 1
    tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return tuple(tensors[name].to(model.device) for name in names)


def _check_onnx(path: Path, module: TensorsOnly, length_is_open: bool) -> None:
    """Raise a `RuntimeError` unless ONNX Runtime computes from `path` what `module` does."""
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    config = module.model.config
    choices = (3,) if isinstance(module.model, SNNBertForMultipleChoice) else ()
    fixed = getattr(config, "psn_length", None) or config.max_position_embeddings
    for batch, length in ((1, min(7, fixed)), (3, min(33, fixed))) if length_is_open else ((1, fixed), (3, fixed)):
        inputs = _example(module.model, module.input_names, (batch, *choices), length)
        mask = _example(module.model, ("attention_mask",), (batch, *choices), length)[0].cpu()
        with torch.no_grad():
            wanted = module(*inputs)
        feed = {name: x.cpu().numpy() for name, x in zip(module.input_names, inputs, strict=True)}
        for name, expected, array in zip(module.output_names, wanted, session.run(None, feed), strict=True):
            expected = expected.cpu().float()
            got = torch.from_numpy(array).float()
            if got.shape != expected.shape:
                raise RuntimeError(
                    f"ONNX Runtime gives `{name}` the shape {list(got.shape)}, not {list(expected.shape)}"
                )
            # What has an entry for each token is compared at valid ones.
            valid = mask != 0 if expected.shape[: mask.dim()] == mask.shape else ...
            error = (got - expected)[valid].abs().mean() / expected[valid].abs().mean()
            if not error <= ONNX_TOLERANCE:
                raise RuntimeError(
                    f"ONNX Runtime's `{name}` differs from the model's by {error.item():.3g} of its mean size, on "
                    f"{batch} rows of {length} tokens"
                )


__all__ = ["export_nir", "export_onnx", "export_program"]
