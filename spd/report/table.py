"""A table: rows of exact numbers, and how they are rounded for reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd.report.records import Record


@dataclass(frozen=True)
class Table:
    """Rows of exact numbers; `formats` says how each column is rounded for reading (CSV keeps everything)."""

    name: str
    caption: str
    rows: list[dict]
    formats: Mapping[str, str]
    records: Sequence[Record] = field(repr=False, default=())
    essential: Sequence[str] = ()  # the columns for a page of text; none named: all

    def markdown(self, columns: Sequence[str] = ()) -> str:
        """The table alone, with all its columns or some."""
        shown = [name for name in self.formats if not columns or name in columns]
        chosen = [list(self.formats).index(name) for name in shown]
        rule = [":--" if not self.formats[name] else "--:" for name in shown]
        lines = [shown, rule, *([line[i] for i in chosen] for line in self.cells())]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _repr_markdown_(self) -> str:
        """How a notebook shows it."""
        return "\n\n".join(filter(None, (self.markdown(), self.caption)))

    def cells(self) -> list[list[str]]:
        return [[cell(row.get(column), form) for column, form in self.formats.items()] for row in self.rows]


def cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form) if isinstance(value, (int, float)) else str(value)
