"""SNN-BERT: a spiking BERT for the Hugging Face ecosystem. Importing the package registers the Auto classes."""

import transformers

from .configuration_snn_bert import AUTO_MAP, SNNBertConfig
from .leaky_integration import leaky_integration
from .modeling_snn_bert import (
    SNNBertForMaskedLM,
    SNNBertForMultipleChoice,
    SNNBertForQuestionAnswering,
    SNNBertForSequenceClassification,
    SNNBertForTokenClassification,
    SNNBertModel,
    SNNBertPreTrainedModel,
)
from .sparsity import loss_with_penalty
from .spiking_neurons import BPSN, LIF, PSN, SpikingNeuron

__version__ = "0.1.0"


def _register_auto_classes() -> None:
    """Let the Auto classes find SNN-BERT, and let `save_pretrained` put the code beside the weights."""
    transformers.AutoConfig.register(SNNBertConfig.model_type, SNNBertConfig)
    SNNBertConfig.register_for_auto_class()
    tokenizer = transformers.BertTokenizer
    transformers.AutoTokenizer.register(SNNBertConfig, tokenizer)
    for auto_class, path in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = globals()[path.split(".")[-1]]
            getattr(transformers, auto_class).register(SNNBertConfig, model_class)
            model_class.register_for_auto_class(auto_class)


_register_auto_classes()

__all__ = [
    "BPSN",
    "LIF",
    "PSN",
    "SNNBertConfig",
    "SNNBertForMaskedLM",
    "SNNBertForMultipleChoice",
    "SNNBertForQuestionAnswering",
    "SNNBertForSequenceClassification",
    "SNNBertForTokenClassification",
    "SNNBertModel",
    "SNNBertPreTrainedModel",
    "SpikingNeuron",
    "leaky_integration",
    "loss_with_penalty",
]
