"""The small random BERT, and its copy in half precision, that the tests of scripts and documentation start from."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    BertConfig,
    BertPreTrainedModel,
    MPNetConfig,
    MPNetPreTrainedModel,
    MPNetTokenizer,
)


def write_bert(folder: Path, tokenizer, model_class: type[BertPreTrainedModel], **settings) -> None:
    """Write a BERT of that class, and its tokenizer; `settings` are further or other ones of its configuration."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), **{**small, "initializer_range": 0.1, **settings})
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert_fixture(model_class: type[BertPreTrainedModel]):
    """A fixture, to be named in the module that uses it: the folder of such a BERT, the same one each time."""

    @pytest.fixture(scope="module")
    def bert(tmp_path_factory, tokenizer):
        folder = tmp_path_factory.mktemp("bert")
        torch.manual_seed(0)
        write_bert(folder, tokenizer, model_class, max_position_embeddings=64)
        return folder

    return bert


def write_mpnet(folder: Path, tokenizer, model_class: type[MPNetPreTrainedModel], **settings) -> None:
    """Write an MPNet of that class, and a tokenizer of MPNet with the words of `tokenizer`, one of BERT."""
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if word[0] != "["]
    pieces = ["<s>", "<pad>", "</s>", "[UNK]", *words, "<mask>"]
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    own = {"max_position_embeddings": 66, "initializer_range": 0.1}
    torch.manual_seed(0)
    model_class(MPNetConfig(vocab_size=len(pieces), **{**small, **own, **settings})).save_pretrained(folder)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    MPNetTokenizer(vocab=vocab, model_max_length=64).save_pretrained(folder)


def write_half_precision(folder: Path, source: Path, tokenizer) -> None:
    """Write a copy of the model in `source` in float16, as many on the Hub are."""
    model_class = getattr(transformers, AutoConfig.from_pretrained(source).architectures[0])
    model_class.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
