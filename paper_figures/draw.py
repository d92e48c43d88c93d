"""What the scripts of this folder share: their command line, colours, and words for captions.

Each script draws from records: `python paper_figures/draw_NAME.py RECORDS... --out FOLDER` writes PNG figures, CSV
tables and `tables.md`; in Python, `tables(records)` gives its tables and `figures(records)` its figures by name.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from spd.errors import SPDError
from spd.records import load_records
from spd.report import COLOURS, STYLE, finish, plain, write_all
from spd.tables import Record, Table, machine, model_of, newest, number, value

__all__ = ["COLOURS", "MARKERS", "Record", "Table", "canvas", "finish", "legend", "machine", "main", "model_of",
           "newest", "number", "plain", "run", "style", "value"]  # fmt: skip
MARKERS = "osD^vP"


def style():
    """The look of every figure, as a context to draw in."""
    return rc_context(STYLE)


def canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, handles: list, columns: int) -> None:
    """One legend for all panels, over them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def main(
    draw: Callable[[argparse.Namespace], dict], description: str, out: str, argv: Sequence[str] | None = None
) -> int:
    """Run a script: what `draw` returns as JSON on standard output; a mistake in one sentence and exit code 1."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where to write ({out})")
    parser.add_argument("--page", type=Path, help="text with places for tables: <!-- table NAME --> <!-- end -->")
    try:
        print(json.dumps(draw(parser.parse_args(argv))))
    except SPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(
    tables: Callable[[Sequence[Record]], list[Table]],
    figures: Callable[[Sequence[Record]], dict[str, Figure]],
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of a script that writes its figures and tables into a folder."""

    def draw(asked: argparse.Namespace) -> dict:
        loaded = load_records(asked.records)
        found, drawn = tables(loaded), figures(loaded)
        if not found and not drawn:
            raise SPDError(f"None of the {len(loaded)} records is of what this script draws: nothing was written.")
        return {"files": write_all(drawn, found, asked.out, asked.page)}

    return main(draw, description, "paper_figures", argv)
