"""Records to tables and figures. Every number drawn or tabled is read from a record; one that is missing is an error.

Figures are pure functions of the records: the same records give the same bytes (no date, fixed SVG ids), and each
file names its records and their commits in its metadata.
"""

from collections.abc import Iterable
from pathlib import Path

from spd.errors import SPDError
from spd.records import load_records, write_bytes
from spd.report.figures import Sheet, finish, render, sheets
from spd.report.records import Record, choose, provenance
from spd.report.shelf import every_sheet
from spd.report.table import Table
from spd.report.tables import csv_of, embed, markdown, print_tables, tables

__all__ = [
    "Record",
    "Sheet",
    "Table",
    "choose",
    "csv_of",
    "finish",
    "load_records",
    "markdown",
    "print_tables",
    "provenance",
    "render",
    "report",
    "sheets",
    "tables",
]


def report(records: Iterable[Path | str], out: Path | str, page: Path | None = None) -> dict:
    """Write the figures (SVG, PNG) and tables (CSV, `tables.md`) of record files or folders into `out`.

    `page` is a text with places marked for some of the tables, which are put in there as well (`embed`).

    The newest record of each kind, model and tp counts; of several models or degrees each gets its own files.
    Returns `{"files": [paths written]}`. Everything is drawn before the first file is written. Raises SPDError when
    a record is malformed, lacks a number, nothing can be drawn, or a file cannot be written.
    """
    loaded, out = load_records(records), Path(out)
    found = tables(loaded)
    if not found:
        raise SPDError(
            "None of the records is of sensitivity, sweep, bench, tasks or a prediction: there is nothing to report."
        )
    content = {out / f"{s.name}.{form}": render(s, form) for s in every_sheet(loaded) for form in ("svg", "png")}
    content |= {out / f"{table.name}.csv": csv_of(table) for table in found}
    content[out / "tables.md"] = markdown(found).encode()
    if page is not None:
        content[page] = embed(page.read_text(), found).encode()
    for path, data in content.items():
        write_bytes(path, data)
    return {"files": [str(path) for path in content]}
