"""Runs the README's snippets one after the other, as a newcomer would, on a small random BERT."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

README = Path(__file__).resolve().parents[1] / "README.md"

SETTING = """
from datasets import Dataset

texts = ["a joy from start to end", "dull and far too long"] * 8
dataset = Dataset.from_dict({{"sentence": texts, "label": [1, 0] * 8}})
bert_checkpoint = {bert!r}
folder = {folder!r}
"""


@pytest.mark.slow
def test_snippets_run(tmp_path, tokenizer):
    bert = tmp_path / "bert"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.1,
    )
    BertForSequenceClassification(config).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 4
    script = tmp_path / "readme.py"
    setting = SETTING.format(bert=str(bert), folder=str(tmp_path / "saved"))
    script.write_text(setting + "\n".join(snippets), encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "query_neuron" in result.stdout and "LABEL_" in result.stdout


def test_every_module_is_named():
    text = README.read_text(encoding="utf-8")
    package = README.parent / "modeling_snn_bert"
    missing = [path.name for path in package.glob("[a-z]*.py") if path.name not in text]
    assert not missing
