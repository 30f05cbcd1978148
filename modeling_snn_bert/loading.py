"""An SNN-BERT from a checkpoint of any head, batches of texts in the shape that it takes, and what it says to one."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .configuration_snn_bert import SNNBertConfig
from .modeling_snn_bert import SNNBertForMultipleChoice, SNNBertForSequenceClassification, SNNBertPreTrainedModel
from .text_files import Text, parts

# Keys of a tokenizer's batch that the models take.
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


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


def too_short(max_length: int, tokenizer: PreTrainedTokenizerBase, pairs: bool) -> str | None:
    """What is wrong with a `max_length` of less than the special tokens and one of each text, if it is."""
    least = tokenizer.num_special_tokens_to_add(pair=pairs) + 1 + pairs
    what = "pairs of texts" if pairs else "texts"
    return f"must be >= {least} for {what}, got {max_length}" if max_length < least else None


def tokenized_batches(
    model: SNNBertPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    batch_size: int,
    max_length: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Padded batches of `texts` in the shape that `model` takes, cut at `max_length` tokens or what the model can.

    Of a pair, the longer text is cut first.

    Raises:
        ValueError: if `max_length` is `too_short`.
    """
    config = model.config
    length = config.max_position_embeddings
    if max_length is not None:
        wrong = too_short(max_length, tokenizer, pairs=any(len(parts(text)) == 2 for text in texts))
        if wrong:
            raise ValueError(f"`max_length` {wrong}")
        length = min(max_length, length)
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


@torch.no_grad()
def predicted(model: SNNBertPreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, float] | str | None:
    """What a sequence classifier says to a batch of one: the labels' probabilities, or a regression's value in words.

    `None` for another head.
    """
    if not isinstance(model, SNNBertForSequenceClassification):
        return None
    logits = model(**batch).logits[0]
    if model.config.problem_type == "regression" or len(logits) == 1:
        return ", ".join(f"{value:.3f}" for value in logits.tolist())
    is_multi_label = model.config.problem_type == "multi_label_classification"
    scores = logits.sigmoid() if is_multi_label else logits.softmax(-1)
    return {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}
