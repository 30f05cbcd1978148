"""What an SNN-BERT costs on real text: a report on operations, energy, memory traffic, firing rates and run lengths.

    snn-bert energy outputs/quickstart/model --data_file sentences.tsv

writes report.md, report.json and three pictures. The conventions are in `operation_counts`.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .configuration_snn_bert import SNNBertConfig
from .energy_tables import EnergyReport
from .modeling_snn_bert import SNNBertForMultipleChoice, SNNBertPreTrainedModel
from .operation_counts import neuron_costs, rival_costs, spiking_cost
from .spike_statistics import INPUT_NAMES, measure_spikes

# It stood here before it had a module of its own.
from .text_files import read_texts as read_texts

# Settings that a reader needs to place the figures.
SETTINGS = (
    "num_hidden_layers hidden_size num_attention_heads intermediate_size neuron_type coding num_timesteps "
    "attention_type spike_type reset_iterations firing_rate_target"
).split()


def energy_report(
    model: SNNBertPreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    baseline: SNNBertPreTrainedModel | None = None,
    run_lengths: bool = True,
) -> EnergyReport:
    """Measure `model` on real text and count what it costs, beside what other models of its shape would.

    Args:
        model: an SNN-BERT with any head; it is run in evaluation mode and left in the mode that it was in.
        batches: what the tokenizer returns, see `measure_spikes`.
        baseline: an SNN-BERT with repeat coding to measure on the same batches.
        run_lengths: whether to measure runs of uninterrupted firing too.

    Raises:
        TypeError: if `model` or `baseline` is not an SNN-BERT.
        ValueError: if `batches` is empty or lacks `input_ids`, or `baseline` does not use repeat coding.
    """
    if baseline is not None:
        if not isinstance(baseline, SNNBertPreTrainedModel):
            raise TypeError(f"`baseline` must be an SNN-BERT, got {type(baseline).__name__}")
        if baseline.config.coding != "repeat":
            raise ValueError(f"`baseline` must have `coding='repeat'`, got {baseline.config.coding!r}")
        batches = list(batches)
    statistics = measure_spikes(model, batches, run_lengths=run_lengths)
    baseline_cost = None
    if baseline is not None:
        name = f"{baseline.config.neuron_type.upper()}, repeat coding, {baseline.config.num_timesteps} time-steps"
        baseline_cost = spiking_cost(baseline, measure_spikes(baseline, batches), name)
    return EnergyReport(
        model=type(model).__name__,
        settings={name: getattr(model.config, name, None) for name in SETTINGS},
        statistics=statistics,
        costs=[spiking_cost(model, statistics), *rival_costs(model, statistics)],
        neuron=neuron_costs(model.config, statistics),
        baseline=baseline_cost,
    )


def load_model(model_name_or_path: str, revision: str | None = None) -> SNNBertPreTrainedModel:
    """The SNN-BERT of a checkpoint with the head that it was saved with.

    Args:
        model_name_or_path: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: if it is another kind of model.
        OSError: if there is no such checkpoint.
    """
    config = PreTrainedConfig.get_config_dict(model_name_or_path, revision=revision)[0]
    if config.get("model_type") != SNNBertConfig.model_type:
        raise ValueError(
            f"{model_name_or_path} must be an SNN-BERT checkpoint, its model_type is {config.get('model_type')!r}: "
            "convert a BERT with `snn-bert convert` first"
        )
    name = (config.get("architectures") or ["SNNBertModel"])[0]
    classes = {model_class.__name__: model_class for model_class in SNNBertPreTrainedModel.__subclasses__()}
    if name not in classes:
        raise ValueError(f"{model_name_or_path} names the architecture {name!r}, which is none of {sorted(classes)}")
    return classes[name].from_pretrained(model_name_or_path, revision=revision or "main")


def tokenized_batches(
    model: SNNBertPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Padded batches of `texts` in the shape that `model` takes, cut at `max_length` tokens or what the model can."""
    config = model.config
    length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
    padding: bool | str = True
    if config.psn_length is not None:
        # That neuron takes sequences of one length only.
        padding, length = "max_length", config.psn_length
    batches = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=padding,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        tensors = {name: batch[name] for name in INPUT_NAMES if name in batch}
        if isinstance(model, SNNBertForMultipleChoice):
            tensors = {name: x[:, None] for name, x in tensors.items()}
        batches.append(tensors)
    return batches
