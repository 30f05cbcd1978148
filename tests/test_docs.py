"""The guides in docs/: their snippets run, their links lead somewhere."""

import contextlib
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from command_line import run_command
from snippets import BERT, FENCE, ROOT, agrees, check_page, python_blocks, relative_links, run_page, shown_outputs

import modeling_snn_bert
import modeling_snn_bert.energy

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists())]
LANGUAGES = {"python", "bash", "text", "json", "yaml", ""}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_snippets_run_and_print_what_is_shown(page, hub_cache, tmp_path):
    first, *_ = check_page(page, hub_cache, tmp_path)
    assert shown_outputs(page)[0] or not first, "a guide shows what its first block prints"


# The guides whose first block is for the shell, and what it leaves behind.
SHELL_PAGES = {
    "cli": {"spikes.png", "my-snn-bert", "energy"},
    "scaling": {"train.py"},
    "training_scripts": {"outputs/first/model.safetensors", "outputs/reviews/results.json"},
}


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL_PAGES)
def test_the_first_block_for_the_shell_prints_what_is_shown(page, hub_cache, tmp_path):
    commands, shown = list(FENCE.finditer((DOCS / f"{page}.md").read_text(encoding="utf-8")))[:2]
    assert commands["language"] == "bash" and shown["language"] == "text"
    # As in a clone, but for what the block writes.
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_OFFLINE": "1",
        "SNN_BERT_CACHE": str(tmp_path / "cache"),
    }
    command = ["bash", "-e", "-c", commands["code"]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert agrees(shown["code"], result.stdout), result.stdout
    assert not [name for name in SHELL_PAGES[page] if not (tmp_path / name).exists()]


def test_the_rows_that_install_shows():
    """What stands in them is of a machine; without kernels there is no level."""
    _, shown = list(FENCE.finditer((DOCS / "install.md").read_text(encoding="utf-8")))[:2]
    rows, printed = (
        [re.split(r" {2,}", line.strip())[0] for line in text.splitlines()]
        for text in (shown["code"], run_command("info").stdout)
    )
    assert len(printed) >= 2 and printed == rows[: len(printed)]


def test_every_guide_begins_with_a_block_and_what_it_prints():
    """All but those that only tell: a guide that teaches is pasted before it is read."""
    telling = {"at_a_glance", "benchmarks", "choose", "errors", "index", "log", "results", "works_with"}
    for page in PAGES:
        if page.stem not in telling:
            first, second, *_ = FENCE.finditer(page.read_text(encoding="utf-8"))
            kinds = (first["language"], second["language"])
            assert kinds in (("bash", "text"), ("python", "text")), page.name


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


def test_every_module_is_named():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "modeling_snn_bert").glob("[a-z]*.py") if path.name not in text]
    assert not missing


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once and without a network: warnings, such as of links that lead nowhere, would be errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(DOCS / "build_site.py"), str(folder)]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = subprocess.run(command, env={**os.environ, **proxies}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


class Html(HTMLParser):
    """The ids of a page of HTML, and where it leads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def lost_links(folder):
    """The links within the site in `folder` that lead to no file, or to no such place in it."""
    pages = {path.resolve(): Html(path) for path in folder.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                continue
            fragment = unquote(url.fragment)
            if not target.exists() or (fragment and target in pages and fragment not in pages[target].ids):
                lost.append((path.name, link))
    return lost


@pytest.mark.slow
class TestTheSite:
    def test_every_guide_and_module_is_in_the_sidebar(self, site):
        home = Html(site / "index.html")
        guides = {f"docs/{page.stem}.html" for page in PAGES} - {"docs/index.html"}
        modules = [module.name for module in pkgutil.iter_modules(modeling_snn_bert.__path__)]
        modules += [f"energy.{module.name}" for module in pkgutil.iter_modules(modeling_snn_bert.energy.__path__)]
        assert "energy.report" in modules
        reference = {f"reference/{name}.html" for name in modules if not name.startswith("_")}
        assert len(guides) > 10 and len(reference) > 10
        assert guides | reference | {"docs/first_steps.html"} <= set(home.links)

    def test_every_public_name_leads_to_its_description(self, site):
        links = {link.split("#")[-1] for link in Html(site / "reference" / "package.html").links}
        names = {f"{getattr(modeling_snn_bert, name).__module__}.{name}" for name in modeling_snn_bert.__all__}
        assert names <= links

    def test_links_lead_somewhere(self, site):
        assert not lost_links(site)

    def test_nothing_is_fetched(self, site):
        """No script, style sheet or picture comes from elsewhere when a page is opened."""
        for path in site.rglob("*.html"):
            text = path.read_text(encoding="utf-8")
            assert not re.findall(r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//|<link[^>]*stylesheet[^>]*//", text)

    def test_guides_and_reference_are_in_the_search(self, site):
        index = (site / "searchindex.js").read_text(encoding="utf-8")
        assert '"docs/event_driven"' in index and '"reference/conversion"' in index and '"convert_bert' in index

    def test_formulas_of_docstrings_stay_as_they_are(self, site):
        page = (site / "reference" / "spiking_neurons.html").read_text(encoding="utf-8")
        assert re.search(r"<pre>[^/]*v = W I", re.sub(r"<span[^>]*>|</span>", "", page))

    def test_lost_links_are_seen(self, tmp_path):
        (tmp_path / "a.html").write_text('<a href="b.html#there"></a><a href="b.html#lost"></a><img src="c.png">')
        (tmp_path / "b.html").write_text('<p id="there"><a href="#nowhere"></a><a href="https://example.org/x"></a>')
        assert sorted(lost_links(tmp_path)) == [("a.html", "b.html#lost"), ("a.html", "c.png"), ("b.html", "#nowhere")]


@pytest.mark.slow
class TestTheRunner:
    """A check of snippets that cannot fail is worth nothing."""

    def page(self, folder, *blocks):
        path = folder / "page.md"
        path.write_text("# Title\n\n" + "\n".join(f"```python\n{block}\n```\n" for block in blocks), encoding="utf-8")
        return path

    def test_blocks_share_their_names(self, hub_cache, tmp_path):
        page = self.page(tmp_path, "count = 16", "print(count)", "import os; print(os.getcwd())")
        assert run_page(page, hub_cache, tmp_path) == ["", "16\n", f"{tmp_path / 'work'}\n"]

    def test_the_bert_of_the_pages_is_there(self, hub_cache, tmp_path):
        code = f"from transformers import AutoConfig\nprint(AutoConfig.from_pretrained('{BERT}').hidden_size)"
        assert run_page(self.page(tmp_path, code), hub_cache, tmp_path) == ["384\n"]

    def test_a_failing_block_is_named(self, hub_cache, tmp_path):
        page = self.page(tmp_path, "print(1)", "undefined_name")
        with pytest.raises(AssertionError, match=r"(?s)page\.md.*line 8.*NameError.*the block at line 8"):
            run_page(page, hub_cache, tmp_path)

    def test_leaving_early_is_no_success(self, hub_cache, tmp_path):
        with pytest.raises(AssertionError, match="SystemExit"):
            run_page(self.page(tmp_path, "raise SystemExit(0)"), hub_cache, tmp_path)

    def test_another_output_than_shown_is_seen(self, hub_cache, tmp_path):
        page = self.page(tmp_path, "print('two lines')\nprint(2)")
        for shown, right in (("two lines\n2", True), ("two lines", False), ("two lines\n...", True)):
            text = page.read_text(encoding="utf-8").split("```text")[0]
            page.write_text(f"{text}```text\n{shown}\n```\n", encoding="utf-8")
            with (
                contextlib.nullcontext() if right else pytest.raises(AssertionError, match=r"line 4 of page\.md shows")
            ):
                check_page(page, hub_cache, tmp_path)

    @pytest.mark.parametrize(
        "shown, printed, wanted",
        [
            ("a 0.50 b", "a  0.53 b\n", True),
            ("a 0.50 b", "a 0.60 b", False),
            ("100 uJ", "109 uJ", True),
            ("100 uJ", "111 uJ", False),
            ("-1.0", "1.0", False),
            ("a\n...\nd", "a\nb\nc\nd", True),
            ("a\n...\nd", "a\nb\nc", False),
            ("a (b) [1]", "a (b) [1]", True),
            ("a.c", "abc", False),
        ],
    )
    def test_outputs_agree(self, shown, printed, wanted):
        assert agrees(shown, printed) == wanted

    def test_a_broken_link_is_seen(self, tmp_path):
        path = tmp_path / "page.md"
        path.write_text("[a](missing.md#part) [b](https://example.org) [c](#part) ![d](missing.png)", encoding="utf-8")
        assert relative_links(path) == ["missing.md", "missing.png"]
