"""Labels for texts by event-driven inference: what `snn-bert predict` and `snn-bert serve` have in common."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import typer
from transformers import PreTrainedTokenizerBase

from ..event_driven import event_driven
from ..event_kernels import WEIGHT_TYPES
from ..loading import tokenized_batches
from ..modeling_snn_bert import SNNBertForSequenceClassification
from ..text_files import Text


def _weight_type(value: str) -> str:
    if value not in WEIGHT_TYPES:
        raise typer.BadParameter(f"must be one of {', '.join(WEIGHT_TYPES)}, got {value!r}")
    return value


WeightDtype = Annotated[
    str,
    typer.Option(
        "--weight_dtype", callback=_weight_type, help=f"Weights of the encoder's products: {', '.join(WEIGHT_TYPES)}."
    ),
]


class Prediction(NamedTuple):
    """The likeliest label of a text, its probability, and the probabilities of all labels in the model's order."""

    label: str
    score: float
    scores: list[float]


class TextClassifier:
    """A classifier of texts, or of pairs of them, on the CPU. One call at a time.

    Its `reads_pairs` says which of the two it was trained on, `None` where the model does not say.

    Args:
        model: in evaluation mode; it is made event-driven, in place.
        tokenizer: of the model.
        weight_dtype: as for `event_driven`.
        max_length: as for `tokenized_batches`; `None` takes the tokenizer's length, or the model's if less.
    """

    def __init__(
        self,
        model: SNNBertForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        weight_dtype: str = "float32",
        max_length: int | None = None,
    ) -> None:
        self.model = event_driven(model, weight_dtype)
        self.tokenizer = tokenizer
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        self.reads_pairs: bool | None = model.config.reads_pairs
        self.labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> list[Prediction]:
        """The predictions of at least one text or pair, which run as one batch.

        Raises:
            ValueError: as `tokenized_batches`.
        """
        (batch,) = tokenized_batches(self.model, self.tokenizer, texts, len(texts), self.max_length)
        predictions = []
        for scores in self.model(**batch).logits.float().softmax(-1).tolist():
            best = max(range(len(scores)), key=scores.__getitem__)
            predictions.append(Prediction(self.labels[best], scores[best], scores))
        return predictions
