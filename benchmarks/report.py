"""Tables as markdown."""

import math
from dataclasses import dataclass, field
from typing import Any


class Assumed(float):
    """A number that rests on an assumption; a table prints it with a star."""


@dataclass
class Table:
    """One table of a benchmark.

    Args:
        section: the section of the benchmark that it belongs to.
        title: what was measured, with the shapes.
        columns: heading of each column, by its key in the rows.
        rows: the values; a dict with a `median` is a spread (see `measure.spread`). Keys that are no column go into
            the JSON only. A missing value is printed as a dash.
        notes: how to read it.
    """

    section: str
    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in markdown, under its title and followed by its notes."""
        lines = [f"### {self.title}", "", _line(self.columns.values()), _line(["---"] * len(self.columns))]
        lines += [_line(_cell(row.get(key)) for key in self.columns) for row in self.rows]
        lines += ["", *self.notes, ""] if self.notes else [""]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it: all values in full."""
        return {"section": self.section, "title": self.title, "rows": self.rows, "notes": self.notes}


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{_cell(value['median'])} ({_cell(value['q1'])}-{_cell(value['q3'])})"
    if isinstance(value, float):
        return _three_digits(value) + "*" * isinstance(value, Assumed)
    return str(value)


def _three_digits(value: float) -> str:
    """Three significant digits, and never an exponent."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"
