"""Builds the documentation as a site: the guides, and an API reference from the docstrings.

    python docs/build_site.py outputs/docs

The sidebar has the headings and links of docs/index.md. Nothing is fetched, and a link that leads nowhere is an error.
"""

import argparse
import pkgutil
import re
import shutil
import sys
import tempfile
from pathlib import Path

import modeling_snn_bert

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "index.md"
FIRST_STEPS = ROOT / "docs" / "first_steps.py"
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]+)")
SETTINGS = {
    "project": "SNN-BERT",
    "author": "the SNN-BERT authors",
    "release": modeling_snn_bert.__version__,
    "html_title": f"SNN-BERT {modeling_snn_bert.__version__}",
    "html_theme": "furo",
    "extensions": "myst_parser,sphinx.ext.autodoc,sphinx.ext.napoleon,build_site",
    "root_doc": "index",
    "myst_heading_anchors": 4,
    # The docstrings are Markdown of the simple kind, in which `this` is code.
    "default_role": "literal",
    "autodoc_member_order": "bysource",
    "autodoc_inherit_docstrings": 0,
    "autodoc_typehints": "none",  # the signatures stay as they are written
    # A field of a named tuple is described once, by autodoc.
    "napoleon_use_ivar": 1,
    "add_module_names": 0,
    "html_copy_source": 0,
    "html_show_copyright": 0,
    # Model cards are linked, and are in no table of contents.
    "suppress_warnings": "toc.not_included",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder for the site")
    output_dir = parser.parse_args().output_dir
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise SystemExit('the site is built by Sphinx: `pip install -c constraints.txt ".[docs]"`') from error
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        settings = [f"--define={name}={value}" for name, value in SETTINGS.items()]
        sys.path.insert(0, str(Path(__file__).parent))  # for `setup` below
        # -W: warnings are errors. -C: there is no conf.py.
        command = ["-C", "-W", "--keep-going", "-q", "-E", "-d", f"{folder}/.doctrees", *settings, folder]
        exit_code = build_main([*command, str(output_dir)])
    if exit_code:
        sys.exit(exit_code)
    print(f"open {output_dir / 'index.html'}")


def write_sources(folder: Path) -> None:
    """Write the pages to `folder`: those that a walk along the links finds, and a page for each module."""
    waiting, found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", INDEX], set()
    while waiting:
        source = waiting.pop()
        if source in found:
            continue
        found.add(source)
        # Pages lie in `folder` as they do in the repository, so that their links lead where they lead there.
        page = folder / source.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            targets = [source.parent / target for target in LINK.findall(FENCE.sub("", text))]
            waiting += [target.resolve() for target in targets if target.is_file()]
            page.write_text(text.replace("first_steps.py)", "first_steps.md)"), encoding="utf-8")
        elif source == FIRST_STEPS:
            page.with_suffix(".md").write_text(page_of_notebook(source), encoding="utf-8")
        else:
            shutil.copy(source, page)
    home = (folder / "README.md").rename(folder / "index.md")
    with home.open("a", encoding="utf-8") as file:
        file.write(sidebar(write_reference(folder)))


def page_of_notebook(script: Path) -> str:
    """The Markdown of a script in jupytext's percent format."""
    page = []
    for cell in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, lines = cell.partition("\n")
        if kind.strip() == "[markdown]":
            page.append(re.sub(r"^# ?", "", lines, flags=re.MULTILINE))
        else:
            page.append(f"```python\n{lines.strip()}\n```\n")
    return "\n".join(page)


def write_reference(folder: Path) -> list[str]:
    """Write a page for each module and one for what the package itself names; return their names."""
    # What starts with an underscore is compiled or starts the command line.
    found = pkgutil.walk_packages(modeling_snn_bert.__path__, "modeling_snn_bert.")
    names = (module.name.removeprefix("modeling_snn_bert.") for module in found)
    modules = sorted(name for name in names if name[0] != "_" and not name.startswith("commands."))
    (folder / "reference").mkdir()
    for name in modules:
        directive = f".. automodule:: modeling_snn_bert.{name}\n   :members:\n   :show-inheritance:"
        page = f"# {name}\n\n```{{eval-rst}}\n{directive}\n```\n"
        (folder / "reference" / f"{name}.md").write_text(page, encoding="utf-8")
    public = [(name, getattr(modeling_snn_bert, name)) for name in modeling_snn_bert.__all__]
    lines = [f"- {{py:obj}}`{name} <{item.__module__}.{name}>`" for name, item in public]
    page = "# The package\n\n`from modeling_snn_bert import ...` gives these:\n\n" + "\n".join(lines) + "\n"
    (folder / "reference" / "package.md").write_text(page, encoding="utf-8")
    return ["package", *modules]


def sidebar(reference: list[str]) -> str:
    """The tables of contents that make the sidebar: a heading of docs/index.md with the links below it, each."""
    blocks = []
    for section in INDEX.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        links = re.findall(r"\[([^]]+)\]\(([a-z_]+)\.(?:md|py)\)", text)
        entries = [f"{words} <docs/{page}>" for words, page in links]
        if title == "Reference":
            entries += [f"reference/{name}" for name in reference]
        if entries:
            blocks.append(f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(entries) + "\n```\n")
    return "".join(blocks)


def mark_literal_blocks(app, what, name, item, options, lines: list[str]) -> None:
    """Mark the indented paragraphs of a docstring, formulas and examples, as such in Sphinx's markup."""
    for i in range(len(lines) - 1, 1, -1):
        # A section such as "Args:" has no empty line below its title.
        if lines[i].startswith("    ") and not lines[i - 1] and lines[i - 2] and not lines[i - 2].startswith(" "):
            lines[i - 1 : i] = ["", "::", ""]


def setup(app) -> dict[str, bool]:
    """What makes this file an extension of Sphinx."""
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)  # before napoleon, which has 500
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    main()
