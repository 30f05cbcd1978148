"""The HTML page of a report: everything of the Markdown is on it, and nothing is fetched."""

import base64
import html.parser

import pytest

from modeling_snn_bert.html_report import html_page

MARKDOWN = """# Energy of <model> & co

Words with **weight**, `code` and <script>alert(1)</script>.

| layer | rate |
|---|---|
| 0 | 0.25 |

## Firing rates

- one
- two
"""


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_becomes_a_page(tmp_path):
    picture = tmp_path / "firing_rates.png"
    picture.write_bytes(b"\x89PNG picture")
    page = Page(html_page(MARKDOWN, {"Firing rates": [picture]}))
    assert not page.open and {"h1", "h2", "table", "th", "td", "strong", "code", "li"} <= set(page.tags)
    assert page.tags.index("h2") < page.tags.index("img") < page.tags.index("ul")
    assert page.sources == ["data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()]
    text = "".join(page.words)
    assert text.count("Energy of <model> & co") == 2 and "0.25" in text
    assert "script" not in page.tags and "<script>alert(1)</script>" in text


def test_without_headings_or_pictures():
    assert "<title>Report</title>" in html_page("words", {})


def test_a_picture_below_no_heading_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`pictures` must name headings of the report, got \['Spikes'\], want some of"
    ):
        html_page(MARKDOWN, {"Spikes": [tmp_path / "spikes.png"]})
