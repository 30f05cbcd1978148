"""Tables as markdown, and files of results."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import environment

from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.energy.tables import markdown_table


class Assumed(float):
    """A number that rests on an assumption; a table prints it with a star."""


@dataclass
class Table:
    """One table of a benchmark.

    Args:
        title: what was measured, with the shapes.
        columns: heading of each column, by its key in the rows.
        rows: the values; a dict with a `median` is a spread (see `measure.spread`). Keys that are no column go into
            the JSON only. A missing value is printed as a dash.
        notes: how to read it.
        section: the section of the benchmark that it belongs to.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    section: str = ""

    def markdown(self) -> str:
        """The table in markdown, under its title and followed by its notes."""
        cells = [[_cell(row.get(key)) for key in self.columns] for row in self.rows]
        lines = [f"### {self.title}", "", *markdown_table(list(self.columns.values()), cells), *self.notes]
        return "\n".join(lines) + "\n" * bool(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it: all values in full."""
        return {"section": self.section, "title": self.title, "rows": self.rows, "notes": self.notes}


def write_results(path: Path, settings: Mapping[str, Any], tables: Iterable[Table], **more: Any) -> None:
    """Write tables with what they depend on, the command line among it, and say where.

    Args:
        path: the file; its folder is made if there is none.
        settings: all of them; `threads` and `seed` are among them.
        tables: the tables.
        more: what else belongs into the file.
    """
    result = {
        "benchmark": path.stem.partition("-")[0],
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(settings["threads"], settings.get("seed", 0)),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        **more,
        "tables": [table.to_dict() for table in tables],
    }
    write_json(path, result, allow_nan=False)
    print(f"written to {path}\n", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{_cell(value['median'])} ({_cell(value['q1'])}-{_cell(value['q3'])})"
    if isinstance(value, float):
        # Three significant digits, and never an exponent.
        decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:.{max(decimals, 0)}f}" + "*" * isinstance(value, Assumed)
    return str(value)
