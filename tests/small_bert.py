"""The small random BERT that the tests of the scripts and of the documentation start from."""

from pathlib import Path

from transformers import BertConfig, BertPreTrainedModel


def write_bert(folder: Path, tokenizer, model_class: type[BertPreTrainedModel], **settings) -> None:
    """Write a BERT of that class, and its tokenizer; `settings` are further or other ones of its configuration."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), **{**small, "initializer_range": 0.1, **settings})
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
