"""The model card of a trained SNN-BERT, from what was measured. What was not measured is left out, never filled in.

card = card_from_report(model.config, json.loads(Path("outputs/quickstart/report.json").read_text()))
card.save("outputs/quickstart/model/README.md")
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_snn_bert import AUTO_MAP, SNNBertConfig
from .energy.report import SETTINGS
from .energy.tables import markdown_table

# Heads whose task has a name on the Hub.
PIPELINE_TAGS = {
    "SNNBertForSequenceClassification": "text-classification",
    "SNNBertForTokenClassification": "token-classification",
    "SNNBertForQuestionAnswering": "question-answering",
    "SNNBertForMaskedLM": "fill-mask",
    "SNNBertModel": "feature-extraction",
}
# Where the weights are, in a card that is written before they are published.
UNPUBLISHED = "NAMESPACE/NAME"


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric that was measured.

    Attributes:
        metric: its name, such as `"accuracy"` or `"matthews_correlation"`.
        value: what was measured, finite.
        model: of which model; empty for the model of the card.
        dataset: the name of the data; without it the score is not listed in the card's metadata.
        split: the part of the data.
        samples: how many examples it was measured on.
        seed: the seed of the training run.
    """

    metric: str
    value: float
    model: str = ""
    dataset: str | None = None
    split: str | None = None
    samples: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"`value` of the score {self.metric!r} must be a finite number, got {self.value!r}")


@dataclasses.dataclass(frozen=True)
class Speed:
    """A speed that was measured.

    Attributes:
        what: what ran, such as `"inference, event-driven, int8, batch 1, 64 tokens"`.
        value, unit: such as `120.0, "sentences per second"`.
        machine: on what.
    """

    what: str
    value: float
    unit: str
    machine: str


def model_card(
    config: SNNBertConfig,
    *,
    model_id: str | None = None,
    scores: Sequence[Score] = (),
    energy: Mapping[str, Any] | None = None,
    speeds: Sequence[Speed] = (),
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    **card_data,
) -> ModelCard:
    """A model card with a section for each kind of fact that is given.

    Args:
        config: of the model, as it was saved (its `architectures` name the head).
        model_id: the repository, `namespace/name`.
        scores: what was measured of the model and of those that it is compared with.
        energy: `EnergyReport.to_dict()`, or what was read back from its report.json.
        speeds: measured speeds.
        training: what the model was trained with, such as `{"seed": 0}`; `None` values are left out.
        base_model: the Hub id of the BERT that it was converted from.
        card_data: more of `huggingface_hub.ModelCardData`: `license`, `language`, `datasets`.

    Raises:
        ValueError: if `energy` is not an energy report.
    """
    head = (config.architectures or ["SNNBertModel"])[0]
    data = ModelCardData(
        library_name="transformers",
        tags=["spiking-neural-network", "snn", "bert"],
        pipeline_tag=PIPELINE_TAGS.get(head),
        base_model=base_model,
        **card_data,
    )
    name = (model_id or "").split("/")[-1] or "SNN-BERT"
    results = [_eval_result(score, data.pipeline_tag) for score in scores if not score.model and score.dataset]
    if results and data.pipeline_tag is not None:
        data.model_name, data.eval_results = name, results
    sections = [
        [f"# {name}", "", *INTRODUCTION.splitlines(), ""],
        _scores_section(scores),
        _training_section(training or {}),
        _energy_sections(energy) if energy else [],
        _speed_section(speeds),
        _architecture_section(config),
        _loading_section(head, model_id or UNPUBLISHED),
        [PAIRS, ""] if config.reads_pairs else [],
        _limits_section(config, bool(energy)),
    ]
    text = "\n".join(line for section in sections for line in section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def card_from_report(
    config: SNNBertConfig, report: Mapping[str, Any], *, model_id: str | None = None, **card_data
) -> ModelCard:
    """The card of a model from the report.json of `examples/quickstart.py` or of `snn-bert energy`.

    Args:
        config: of the model, as it was saved.
        report: the content of the file.
        model_id, card_data: as for `model_card`.

    Raises:
        ValueError: if it is the report of neither, or a figure in it is not a finite number.
    """
    given = report if isinstance(report, Mapping) else {}
    if "costs" in given:
        return model_card(config, model_id=model_id, energy=report, **card_data)
    if not isinstance(given.get("accuracy"), Mapping) or "energy" not in given:
        raise ValueError(
            "`report` must be the report.json of examples/quickstart.py or of `snn-bert energy`, "
            f"got {str(report)[:200]}"
        )
    dataset = report.get("dataset") or {}
    common = {
        "dataset": dataset.get("name"),
        "split": dataset.get("split"),
        "samples": report.get("validation_sentences"),
        "seed": report.get("seed"),
    }
    scores = [
        Score("accuracy", value, "" if model == "SNN-BERT" else model, **common)
        for model, value in report["accuracy"].items()
    ]
    training = {
        "training pairs" if config.reads_pairs else "training sentences": report.get("training_sentences"),
        "steps of distillation": report.get("distillation_steps"),
        "steps of fine-tuning": report.get("finetuning_steps"),
        "seed": report.get("seed"),
        "command": report.get("command"),
    }
    card_data = {"base_model": report.get("base_model"), **card_data}
    return model_card(config, model_id=model_id, scores=scores, energy=report["energy"], training=training, **card_data)


def _eval_result(score: Score, task: str | None) -> EvalResult:
    return EvalResult(
        task_type=task or "",
        dataset_type=str(score.dataset),
        dataset_name=str(score.dataset),
        dataset_split=score.split,
        metric_type=score.metric,
        metric_value=score.value,
    )


def _scores_section(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return []
    header = {"model": "model", "metric": "metric", "value": "value", "dataset": "data", "split": "split"}
    header |= {"samples": "examples", "seed": "seed"}
    rows = [{**dataclasses.asdict(score), "model": score.model or "**this model**"} for score in scores]
    # A column of which nothing is known is left out.
    header = {name: title for name, title in header.items() if any(row[name] is not None for row in rows)}
    lines = [[_cell(row[name]) for name in header] for row in rows]
    return ["## Results", "", *markdown_table(list(header.values()), lines)]


def _training_section(training: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in training.items() if value is not None}
    rows = [(name, f"`{value}`" if name == "command" else _cell(value)) for name, value in known.items()]
    return ["## Training", "", *markdown_table(("", ""), rows)] if rows else []


def _energy_sections(energy: Mapping[str, Any]) -> list[str]:
    try:
        rates = [rate["mean"] for rate in energy["firing_rates"].values()]
        rows = [
            (
                "**this model**" if index == 0 else cost["name"],
                f"{cost['matrix_product_picojoules'] / 1e6:,.2f}",
                f"{cost['arithmetic_picojoules'] / 1e6:,.2f}",
                f"{cost['memory']['picojoules'] / 1e6:,.2f}",
            )
            for index, cost in enumerate(energy["costs"])
        ]
        sequences, tokens = energy["sequences"], energy["tokens_per_sequence"]
        source = energy["conventions"]["source"]
        firing = f"{sum(rates) / len(rates):.3f} ({min(rates):.3f} to {max(rates):.3f})"
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"`energy` must be what `EnergyReport.to_dict()` returns; it lacks {error}") from error
    measured = f"Measured on {sequences:,} sequences of {tokens:.1f} valid tokens on average."
    header = ("model of this shape", "matrix products, uJ", "all arithmetic, uJ", "memory traffic, uJ (estimate)")
    return [
        "## Firing rate",
        "",
        f"Spikes per valid token, mean over the neuron layers (lowest to highest): **{firing}**. {measured}",
        "",
        "## Energy of a mean sequence",
        "",
        f"Estimated from counts of operations ({source}), not measured with a meter. The other models are counted at "
        "the same shape and on the same sequences.",
        "",
        *markdown_table(header, rows),
    ]


def _speed_section(speeds: Sequence[Speed]) -> list[str]:
    if not speeds:
        return []
    rows = [(speed.what, f"{_cell(speed.value)} {speed.unit}", speed.machine) for speed in speeds]
    return ["## Speed", "", *markdown_table(("what", "measured", "on"), rows)]


def _architecture_section(config: SNNBertConfig) -> list[str]:
    values = {name: getattr(config, name) for name in (*SETTINGS, "max_position_embeddings")}
    rows = [(f"`{name}`", _cell(value)) for name, value in values.items() if value is not None]
    return ["## Architecture", "", *markdown_table(("setting", "value"), rows)]


def _loading_section(head: str, model_id: str) -> list[str]:
    auto_class = next((name for name, path in AUTO_MAP.items() if path.split(".")[-1] == head), "AutoModel")
    return [*LOADING.format(auto_class=auto_class, model_id=model_id).splitlines(), ""]


def _limits_section(config: SNNBertConfig, with_energy: bool) -> list[str]:
    limits = [
        f"An input has at most {config.max_position_embeddings} tokens, because there are so many position embeddings.",
        "Softmax, LayerNorm, embeddings, the residual stream and the head work on real numbers.",
        "What text a model learns from, its errors and biases come from its training data, and from the BERT that it "
        "was converted from, if it was.",
    ]
    if config.psn_length is not None:
        limits[0] = f"An input has exactly {config.psn_length} tokens, which is what a PSN takes."
    if with_energy:
        limits.append(
            "Fewer operations are not fewer seconds: dense hardware, a GPU among it, makes no use of sparse spikes by "
            "itself. The energy figures hold for hardware that does."
        )
    return ["## Limits", "", *(f"- {limit}" for limit in limits), ""]


def _cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


INTRODUCTION = """\
A spiking BERT: in the encoder, every input of every linear layer is a spike. A token is a time-step (individual
coding), unless the table of settings below says otherwise. The idea is that of Su et al., "SNN-BERT:
Training-efficient Spiking Neural Networks for energy-efficient BERT" (Neural Networks 180, 2024, 106630). Only the
paper's abstract was available to this implementation; its equations are its own, and it is not the authors' code."""

LOADING = """\
## How to load

The code lies beside the weights. It runs on your machine, so look at it first and pin the commit that you looked at:

```python
from transformers import {auto_class}, AutoTokenizer

source = {{"revision": "main", "trust_remote_code": True}}  # better: a commit hash in place of "main"
tokenizer = AutoTokenizer.from_pretrained("{model_id}", **source)
model = {auto_class}.from_pretrained("{model_id}", **source)
```

With the package `snn-bert` installed and imported (`import modeling_snn_bert`), its code is used and
`trust_remote_code` is not needed."""

PAIRS = """\
It reads two texts in one input: `tokenizer(text, text_pair, return_tensors="pt")`, or
`{"text": text, "text_pair": text_pair}` where a text-classification pipeline takes a text."""
