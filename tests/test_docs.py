"""The guides in docs/: their snippets run, their links lead somewhere."""

import os
import pkgutil
import re
import subprocess
import sys

import pytest
from small_bert import write_bert
from snippets import FENCE, ROOT, python_blocks, relative_links, run_page
from transformers import BertForSequenceClassification

import modeling_snn_bert

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists())]
LANGUAGES = {"python", "bash", "text", "json", "yaml", ""}


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, tokenizer, BertForSequenceClassification)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_snippets_run(page, bert, tmp_path):
    run_page(page, bert, tmp_path)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page):
    missing = [target for target in relative_links(page) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fences_are_of_a_known_kind(page):
    # A block marked `py` or `python3` would be shown like the others, and never run.
    languages = {match["language"].strip() for match in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert languages <= LANGUAGES


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_prose_is_at_most_120_wide(page):
    """All but tables, code and links, which cannot be broken."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "    ")) and "](" not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_names_that_are_not_set_are_explained(page):
    code = "\n".join(block for _, block in python_blocks(page))
    taken = {name for name in ("bert_checkpoint", "texts", "dataset", "folder") if re.search(rf"\b{name}\b", code)}
    assert not taken or "index.md#names-in-the-snippets" in page.read_text(encoding="utf-8")


def test_the_index_sets_the_names():
    """README and index set the same ones, and those that `run_page` sets."""
    for page in (DOCS / "index.md", ROOT / "README.md"):
        found = set(re.findall(r"^    (\w+) = ", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert found == {"bert_checkpoint", "texts", "dataset", "folder"}


def test_every_guide_is_in_the_index():
    missing = {page.name for page in PAGES} - {"index.md"} - set(relative_links(DOCS / "index.md"))
    assert not missing


@pytest.mark.slow
def test_first_steps(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(DOCS / "first_steps.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "fires {0.0, 1.0}" in result.stdout and "logits differ by 0.0" in result.stdout
    assert "BERT, float32" in result.stdout


@pytest.mark.slow
def test_reference(tmp_path):
    """It builds, and every public name of every module is in it."""
    command = [sys.executable, str(DOCS / "build_reference.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "already been added" not in result.stderr
    package = (tmp_path / "modeling_snn_bert.html").read_text(encoding="utf-8")
    assert not [name for name in modeling_snn_bert.__all__ if f'id="{name}"' not in package]
    modules = [module.name for module in pkgutil.iter_modules(modeling_snn_bert.__path__)]
    pages = {path.stem for path in (tmp_path / "modeling_snn_bert").glob("*.html")}
    assert pages == {name for name in modules if not name.startswith("_")}


@pytest.mark.slow
class TestTheRunner:
    """A check of snippets that cannot fail is worth nothing."""

    def page(self, folder, *blocks):
        path = folder / "page.md"
        path.write_text("# Title\n\n" + "\n".join(f"```python\n{block}\n```\n" for block in blocks), encoding="utf-8")
        return path

    def test_blocks_share_their_names(self, bert, tmp_path):
        page = self.page(tmp_path, "count = len(texts)", "print(count, dataset.column_names)")
        assert "16 ['sentence', 'label']" in run_page(page, bert, tmp_path)

    def test_a_failing_block_is_named(self, bert, tmp_path):
        page = self.page(tmp_path, "print(1)", "undefined_name")
        with pytest.raises(AssertionError, match=r"(?s)page\.md.*line 8.*NameError.*the block at line 8"):
            run_page(page, bert, tmp_path)

    def test_leaving_early_is_no_success(self, bert, tmp_path):
        with pytest.raises(AssertionError, match="SystemExit"):
            run_page(self.page(tmp_path, "raise SystemExit(0)"), bert, tmp_path)

    def test_a_broken_link_is_seen(self, tmp_path):
        path = tmp_path / "page.md"
        path.write_text("[a](missing.md#part) [b](https://example.org) [c](#part) ![d](missing.png)", encoding="utf-8")
        assert relative_links(path) == ["missing.md", "missing.png"]
