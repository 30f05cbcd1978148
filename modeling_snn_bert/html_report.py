"""A report in Markdown as one HTML page with its pictures inside, to be opened, mailed or archived as it is."""

import base64
import html
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: 0.9rem; }
th, td { border: 1px solid #8886; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #8882; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: white; }
"""


def html_page(markdown: str, pictures: Mapping[str, Sequence[Path]]) -> str:
    """The report as a page that needs no other file.

    Args:
        markdown: the report; its first heading becomes the title. HTML in it is shown as text.
        pictures: the pictures to show below a heading, by its words.

    Raises:
        ValueError: if a heading of `pictures` is not in the report.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    missing = set(pictures) - set(headings)
    if missing:
        raise ValueError(f"`pictures` must name headings of the report, got {sorted(missing)}, want some of {headings}")
    body = []
    start = 0
    for i, token in enumerate(tokens):
        if token.type == "heading_close":
            body.append(parser.renderer.render(tokens[start : i + 1], parser.options, {}))
            body += [_figure(path) for path in pictures.get(tokens[i - 1].content, ())]
            start = i + 1
    body.append(parser.renderer.render(tokens[start:], parser.options, {}))
    title = html.escape(headings[0] if headings else "Report")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(body)}</body>\n</html>\n"
    )


def _figure(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    words = html.escape(path.stem.replace("_", " "))
    return f'<figure><img alt="{words}" src="data:{kind};base64,{data}"></figure>\n'
