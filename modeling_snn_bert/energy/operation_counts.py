"""Operations and memory traffic of an SNN-BERT on a mean sequence, and of the BERTs that it has to be compared with.

Conventions, all at 45 nm and 0.9 V, from Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
2014: a float32 addition takes 0.9 pJ and a multiplication 3.7 pJ, so a multiply-accumulate (MAC) 4.6 pJ; an 8-bit
multiplication 0.2 pJ and the 32-bit integer addition that accumulates it 0.1 pJ; 64 bits from a 1 MB cache 100 pJ,
from DRAM 1,300 pJ (the lower end of the range given there). An addition that a spike causes is an accumulate (AC).

What has no entry in that table is counted by what it takes in additions and multiplications: an exponential is a
range reduction and a polynomial of degree 5 (6 MACs), a reciprocal, square root or division two Newton steps of two
MACs each (4 MACs), a comparison an addition.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from ..configuration_snn_bert import SNNBertConfig
from ..layer_places import LINEARS, PLACES, place_of
from ..modeling_snn_bert import SNNBertPreTrainedModel
from .spike_statistics import SpikeStatistics


class Arithmetic(NamedTuple):
    """Energy in pJ of an addition and of a multiplication in one number format."""

    name: str
    addition: float
    multiplication: float


FLOAT32 = Arithmetic("float32", 0.9, 3.7)
INT8 = Arithmetic("int8", 0.1, 0.2)
PICOJOULES_PER_BYTE_OF_CACHE = 100 / 8
PICOJOULES_PER_BYTE_OF_DRAM = 1300 / 8

MACS_PER_EXPONENTIAL = 6
MACS_PER_RECIPROCAL = 4
MACS_PER_TANH = MACS_PER_EXPONENTIAL + MACS_PER_RECIPROCAL
# 0.5 x (1 + tanh(c (x + d x^3))): the cubic, the tanh, the product.
MACS_PER_GELU = 3 + MACS_PER_TANH + 1

MATRIX_PRODUCTS = ("Linear", "QK^T", "attention x V")


@dataclasses.dataclass
class OperationCount:
    """Operations of one computation on a mean sequence.

    Attributes:
        part: the kind of computation, such as `"Linear"` or `"neurons"`.
        name: which one of its kind.
        layer: index of the encoder layer, `None` outside of the encoder.
        additions: additions alone (ACs, where a spike causes them).
        macs: multiplications with an addition each.
        multiplications: multiplications alone.
        arithmetic: the number format, which sets the energy.
    """

    part: str
    name: str = ""
    layer: int | None = None
    additions: float = 0.0
    macs: float = 0.0
    multiplications: float = 0.0
    arithmetic: Arithmetic = FLOAT32

    @property
    def is_matrix_product(self) -> bool:
        """Whether it is one of the matrix products of the encoder, which are all that many papers count."""
        return self.part in MATRIX_PRODUCTS

    @property
    def picojoules(self) -> float:
        """Energy of the arithmetic."""
        additions, multiplications = self.additions + self.macs, self.multiplications + self.macs
        return additions * self.arithmetic.addition + multiplications * self.arithmetic.multiplication

    def add(self, other: "OperationCount | NeuronCost", times: float = 1.0) -> None:
        """Add the operations of `other`, so many times."""
        self.additions += times * other.additions
        self.macs += times * other.macs
        self.multiplications += times * other.multiplications


@dataclasses.dataclass
class NeuronCost:
    """Operations of one step of a neuron, per channel, token and time-step.

    Attributes:
        step: what the neuron does there, and why it takes that many.
        additions, macs, multiplications: as in `OperationCount`.
    """

    step: str
    additions: float = 0.0
    macs: float = 0.0
    multiplications: float = 0.0


@dataclasses.dataclass
class MemoryTraffic:
    """An estimate of the bytes that a mean sequence moves, at batch size 1.

    Attributes:
        weight_bytes: weights, each read once from DRAM, and the embeddings' rows.
        activation_bytes: activations, each written once to a 1 MB cache and read once from it.
    """

    weight_bytes: float
    activation_bytes: float

    @property
    def picojoules(self) -> float:
        """Energy of the accesses."""
        return self.weight_bytes * PICOJOULES_PER_BYTE_OF_DRAM + self.activation_bytes * PICOJOULES_PER_BYTE_OF_CACHE


@dataclasses.dataclass
class ModelCost:
    """What one model costs on a mean sequence.

    Attributes:
        name: the model.
        note: what is assumed of it.
        rows: its operations.
        memory: its memory traffic.
    """

    name: str
    note: str
    rows: list[OperationCount]
    memory: MemoryTraffic

    @property
    def matrix_product_picojoules(self) -> float:
        """Energy of the encoder's matrix products alone."""
        return sum(row.picojoules for row in self.rows if row.is_matrix_product)

    @property
    def picojoules(self) -> float:
        """Energy of all arithmetic."""
        return sum(row.picojoules for row in self.rows)

    def by_part(self) -> list[OperationCount]:
        """The rows of each part added up; matrix products first."""
        totals: dict[tuple[str, Arithmetic], OperationCount] = {}
        for row in self.rows:
            total = totals.setdefault((row.part, row.arithmetic), OperationCount(row.part, arithmetic=row.arithmetic))
            total.add(row)
        return sorted(totals.values(), key=lambda total: not total.is_matrix_product)


def spiking_cost(model: SNNBertPreTrainedModel, statistics: SpikeStatistics, name: str = "SNN-BERT") -> ModelCost:
    """What `model` costs at the measured spikes.

    A Linear adds one row of its weights per incoming spike (rate x fan-in x fan-out), and its bias. With softmax
    attention a key's spike adds one component of the query to the score of every token, whatever the query's gain and
    offset are, because the key is what multiplies; a value's spike adds one attention weight to the context of every
    token. The affine query itself takes one of two stored values (of three with ternary spikes). Spiking attention is
    counted in its linear form: `k^T v` adds one for each pair of a key's and a value's spike, a query's spike adds one
    row of that matrix; the gain and the offset enter it once per head and sequence. A position bias is an addition per
    score; in spiking attention a value's spike adds one of its numbers to the context of every token.

    Args:
        model: the SNN-BERT that `statistics` was measured on.
        statistics: from `measure_spikes`.
        name: how to call it.
    """
    config = model.config
    memory = _memory_traffic(model, statistics, has_spikes=True)
    rows = _operations(model, statistics, neuron_costs(config, statistics))
    return ModelCost(name, f"float32 weights, {config.spike_type} spikes, zeros skipped", rows, memory)


def rival_costs(model: SNNBertPreTrainedModel, statistics: SpikeStatistics) -> list[ModelCost]:
    """What other models of the same shape, with the same head, cost on the same sequences.

    Args:
        model: the SNN-BERT that `statistics` was measured on.
        statistics: from `measure_spikes`.
    """
    threshold = [NeuronCost("threshold", additions=2 if model.config.spike_type == "ternary" else 1)]
    bert_rows = bert_operations(model.config, statistics.lengths) + _read_out(model, statistics)
    one_bit_memory = _memory_traffic(model, statistics, has_spikes=True, steps=1)
    return [
        ModelCost(
            "SNN-BERT, int8 weights",
            "the same with 8-bit weights in the Linears, added up in 32-bit integers; all else float32",
            _in_int8(spiking_cost(model, statistics).rows, ("Linear", "biases")),
            _memory_traffic(model, statistics, has_spikes=True, weight_bytes=1),
        ),
        ModelCost("BERT, float32", "every product multiplies", bert_rows, _memory_traffic(model, statistics)),
        ModelCost(
            "BERT, int8",
            "matrix products in 8 bits with 32-bit accumulators; softmax, norms, GELU and read-out float32",
            _in_int8(bert_rows, (*MATRIX_PRODUCTS, "biases")),
            _memory_traffic(model, statistics, weight_bytes=1, activation_bytes=1),
        ),
        ModelCost(
            "BERT with 1-bit activations {-1, 1}",
            "float32 weights, a sign in each neuron's place, so every input is added or subtracted",
            _operations(model, statistics, threshold, steps=1, all_inputs_active=True),
            one_bit_memory,
        ),
        ModelCost(
            "BERT with 1-bit activations {0, 1}, zeros skipped",
            "float32 weights, a threshold in each neuron's place, active as often as the SNN-BERT's neurons",
            _operations(model, statistics, threshold, steps=1),
            one_bit_memory,
        ),
    ]


def _in_int8(rows: list[OperationCount], parts: tuple[str, ...]) -> list[OperationCount]:
    """`rows` with those of `parts` in 8 bits."""
    return [dataclasses.replace(row, arithmetic=INT8) if row.part in parts else row for row in rows]


def neuron_costs(config: SNNBertConfig, statistics: SpikeStatistics) -> list[NeuronCost]:
    """The steps of one neuron and their operations, per channel, token and time-step."""
    threshold = NeuronCost("threshold: a comparison", additions=1.0)
    if config.spike_type == "ternary":
        threshold = NeuronCost("threshold: a comparison, once for each sign", additions=2.0)
    if config.neuron_type == "lif":
        return [
            NeuronCost("leak: the decay times the potential, plus the current", macs=1),
            threshold,
            NeuronCost("soft reset: the threshold subtracted (at most; only where it fired)", additions=1),
        ]
    if config.neuron_type == "psn":
        lengths = statistics.lengths
        seen = (lengths.square().sum() / lengths.sum()).item()
        row = NeuronCost(f"row of the T x T matrix times the currents of {seen:.0f} valid tokens", macs=seen)
        return [row, threshold]
    directions = 2 if config.bidirectional else 1
    words = "forward and backward" if config.bidirectional else "forward"
    merge = 2.0 if config.bidirectional else 0.0
    costs = [NeuronCost(f"leaky scan of the currents, {words}: decay times state plus current", macs=directions)]
    if config.bidirectional:
        costs.append(NeuronCost("the two scans added, and the token itself, which is in both, taken off", merge))
    if config.normalize:
        group = config.hidden_size // config.num_attention_heads
        weight = (directions + MACS_PER_RECIPROCAL) / group
        costs.append(NeuronCost("division by the total weight, whose reciprocal a group shares", 0, weight, 1))
    costs.append(threshold)
    for sweep in range(1, config.reset_iterations + 1):
        title = f"reset, sweep {sweep}"
        costs += [
            NeuronCost(f"{title}: scans of the spikes, {words}", macs=directions),
            NeuronCost(f"{title}: scans added without the token's own spike", additions=max(merge, 1.0)),
            NeuronCost(
                f"{title}: {'normalised, ' if config.normalize else ''}times the reset, taken off the potential",
                macs=1,
                multiplications=1 if config.normalize else 0,
            ),
            dataclasses.replace(threshold, step=f"{title}: {threshold.step}"),
        ]
    return costs


def bert_operations(config, lengths: torch.Tensor) -> list[OperationCount]:
    """Operations of a float32 BERT's encoder and embeddings on the mean of sequences of `lengths` valid tokens."""
    width, heads = config.hidden_size, config.num_attention_heads
    tokens, pairs = lengths.double().mean().item(), lengths.double().square().mean().item()
    rows = []
    for layer in range(config.num_hidden_layers):
        for name, (fan_in, fan_out) in _sizes(config).items():
            rows.append(OperationCount("Linear", name, layer, macs=fan_in * fan_out * tokens))
        rows.append(OperationCount("QK^T", "scores", layer, macs=width * pairs))
        rows.append(OperationCount("attention x V", "contexts", layer, macs=width * pairs))
        rows.append(OperationCount("GELU", "activation", layer, macs=MACS_PER_GELU * config.intermediate_size * tokens))
        rows.append(_softmax(heads, tokens, pairs, layer))
        if getattr(config, "relative_attention_num_buckets", 0):
            rows.append(OperationCount("position bias", "scores", layer, additions=heads * pairs))
        rows += _norms_and_sums(config, tokens, layer)
    return [*rows, *_embeddings(config, tokens)]


def _operations(
    model: SNNBertPreTrainedModel,
    statistics: SpikeStatistics,
    neuron: list[NeuronCost],
    steps: int | None = None,
    all_inputs_active: bool = False,
) -> list[OperationCount]:
    """The rows of a model whose products take spikes.

    Args:
        model, statistics: the model, and what was measured on it.
        neuron: the steps of a neuron.
        steps: time-steps, those of the model's configuration by default.
        all_inputs_active: count as if every input of every product were active.
    """
    config = model.config
    steps = config.num_timesteps if steps is None else steps
    lengths = statistics.lengths
    width, heads = config.hidden_size, config.num_attention_heads
    head_size = width // heads
    tokens, pairs = lengths.mean().item(), lengths.square().mean().item()
    sizes = _sizes(config)
    measured = {place_of(name): statistics.spikes[:, index] for index, name in enumerate(statistics.names)}
    rows = []
    for layer in range(config.num_hidden_layers):
        spikes = {}
        for place in PLACES:
            channels = getattr(config, place.width)
            spikes[place.neuron] = channels * lengths if all_inputs_active else measured[layer, place]
            row = OperationCount("neurons", place.neuron, layer)
            for step in neuron:
                row.add(step, channels * tokens)
            rows.append(row)
        for place in PLACES:
            for linear in place.linears:
                additions = spikes[place.neuron].mean().item() * sizes[linear][1]
                rows.append(OperationCount("Linear", linear, layer, additions=additions))
        query, key, value = (spikes[f"attention.self.{name}_neuron"] for name in ("query", "key", "value"))
        affine = OperationCount("query gain and offset", "attention.self.query", layer, query.mean().item())
        if config.attention_type == "softmax":
            scores, contexts = (key * lengths).mean().item(), (value * lengths).mean().item()
            rows.append(_softmax(heads, tokens, pairs, layer))
            bias = heads * pairs
        else:
            matched = head_size * width * lengths if all_inputs_active else statistics.key_value_pairs[:, layer]
            scores = matched.mean().item()
            contexts = query.mean().item() * head_size
            # The offset's row of `k^T v` is added for every token; gain and offset are multiplied in once per head.
            folded = heads * head_size**2
            affine = dataclasses.replace(affine, additions=width * tokens, macs=folded, multiplications=folded)
            rows.append(OperationCount("attention scaling", "contexts", layer, multiplications=width * tokens))
            # A value's spike adds a number of the bias to the context of every token, which is a term of its own.
            bias = (value * lengths).mean().item() + width * tokens
        if config.relative_attention_num_buckets:
            rows.append(OperationCount("position bias", "scores", layer, additions=bias))
        # In the spiking form the first product is `k^T v` and the second one `q (k^T v)`.
        rows.append(OperationCount("QK^T", "scores", layer, additions=scores))
        rows.append(OperationCount("attention x V", "contexts", layer, additions=contexts))
        rows.append(affine)
        rows += _norms_and_sums(config, tokens, layer)
    # Each time-step does all of it.
    for row in rows:
        row.add(row, steps - 1)
    rows += _embeddings(config, tokens)
    if steps > 1:
        rows.append(OperationCount("mean over time-steps", "encoder", additions=steps * width * tokens))
    return rows + _read_out(model, statistics)


def _sizes(config) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each Linear of a layer."""
    return {name: (getattr(config, fan_in), getattr(config, fan_out)) for name, (fan_in, fan_out) in LINEARS.items()}


def _softmax(heads: int, tokens: float, pairs: float, layer: int) -> OperationCount:
    """Per score: the maximum, the difference to it and the sum; the exponential; the scaling and the division."""
    scores = heads * pairs
    macs = MACS_PER_EXPONENTIAL * scores + MACS_PER_RECIPROCAL * heads * tokens
    return OperationCount("softmax", "weights", layer, additions=3 * scores, macs=macs, multiplications=2 * scores)


def _layer_norm(width: int, tokens: float, name: str, layer: int | None) -> OperationCount:
    """Per element: the mean and the difference to it; the variance, gain and bias; the division."""
    elements = width * tokens
    macs = 2 * elements + 2 * MACS_PER_RECIPROCAL * tokens
    return OperationCount("LayerNorm", name, layer, additions=2 * elements, macs=macs, multiplications=elements)


def _norms_and_sums(config, tokens: float, layer: int) -> list[OperationCount]:
    width = config.hidden_size
    biases = sum(fan_out for _, fan_out in _sizes(config).values()) * tokens
    return [
        OperationCount("biases", "of the Linears", layer, additions=biases),
        _layer_norm(width, tokens, "attention.output.LayerNorm", layer),
        _layer_norm(width, tokens, "output.LayerNorm", layer),
        OperationCount("residual", "attention and MLP", layer, additions=2 * width * tokens),
    ]


def _embeddings(config, tokens: float) -> list[OperationCount]:
    width = config.hidden_size
    norm = _layer_norm(width, tokens, "embeddings.LayerNorm", None)
    total = OperationCount("embeddings", "three added up", additions=2 * width * tokens)
    return [total, dataclasses.replace(norm, part="embeddings")]


def _read_out(model: SNNBertPreTrainedModel, statistics: SpikeStatistics) -> list[OperationCount]:
    """Every Linear behind the encoder on as many rows as were seen to enter it, with its activation and norm."""
    rows = []
    for name, count in statistics.read_out.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        part = "pooler" if "pooler" in name.split(".") else "classifier"
        outputs = count * linear.out_features
        row = OperationCount(part, name, additions=outputs, macs=linear.in_features * outputs)
        if part == "pooler":
            row.macs += MACS_PER_TANH * outputs
        elif name.endswith("transform.dense"):
            row.macs += MACS_PER_GELU * outputs
            norm = _layer_norm(linear.out_features, count, name.replace("dense", "LayerNorm"), None)
            rows.append(dataclasses.replace(norm, part=part))
        rows.append(row)
    return rows


def _memory_traffic(
    model: SNNBertPreTrainedModel,
    statistics: SpikeStatistics,
    *,
    has_spikes: bool = False,
    weight_bytes: int = 4,
    activation_bytes: int = 4,
    steps: int | None = None,
) -> MemoryTraffic:
    """Bytes of weights and activations; a spike takes a bit (two if it is ternary).

    Real-valued activations of a layer, per token: three projections, context, two outputs, two norms and the MLP's
    hidden layer, which BERT also has behind its activation; scores and weights of the softmax per pair of tokens.
    """
    config = model.config
    steps = config.num_timesteps if steps is None else steps
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, pairs = statistics.lengths.mean().item(), statistics.lengths.square().mean().item()
    matrices = sum(fan_in * fan_out for fan_in, fan_out in _sizes(config).values())
    weights = layers * (matrices + 9 * width + inner)
    weights += config.relative_attention_num_buckets * config.num_attention_heads
    weights += sum(x.numel() for name in statistics.read_out for x in model.get_submodule(name).parameters())
    # Of each token a row of three embeddings, which stay in float32 as does the norm.
    embedded = 4 * (3 * width * tokens + 2 * width)
    values = layers * (8 * width + inner * (1 if has_spikes else 2)) * tokens * activation_bytes
    if not has_spikes or config.attention_type == "softmax":
        values += layers * 2 * config.num_attention_heads * pairs * activation_bytes
    if has_spikes:
        bits = 2 if config.spike_type == "ternary" else 1
        channels = sum(getattr(config, place.width) for place in PLACES)
        values += layers * channels * tokens * bits / 8
        # Thresholds, and gain and offset of the queries.
        weights += layers * (channels + 2 * width)
    values = values * steps + width * tokens * activation_bytes
    return MemoryTraffic(weights * weight_bytes + embedded, 2 * values)
