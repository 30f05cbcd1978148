"""Runs the README's snippets one after the other, as a newcomer would, on a small random BERT."""

import pytest
from small_bert import write_bert
from snippets import ROOT, python_blocks, run_page
from transformers import BertForSequenceClassification

README = ROOT / "README.md"


@pytest.mark.slow
def test_snippets_run(tmp_path, tokenizer):
    assert len(python_blocks(README)) == 4
    bert = tmp_path / "bert"
    write_bert(bert, tokenizer, BertForSequenceClassification)
    printed = run_page(README, bert, tmp_path)
    assert "query_neuron" in printed and "LABEL_" in printed


def test_every_module_is_named():
    text = README.read_text(encoding="utf-8")
    package = README.parent / "modeling_snn_bert"
    missing = [path.name for path in package.glob("[a-z]*.py") if path.name not in text]
    assert not missing
