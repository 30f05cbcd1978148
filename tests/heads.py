"""The model with each of its heads, by a name for test ids."""

from modeling_snn_bert import (
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
)

HEADS = {
    "masked_lm": SNNBertForMaskedLM,
    "sequence": SNNBertForSequenceClassification,
    "token": SNNBertForTokenClassification,
    "question": SNNBertForQuestionAnswering,
    "choice": SNNBertForMultipleChoice,
}
MODELS = {"base": SNNBertModel, **HEADS}
