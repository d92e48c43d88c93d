"""The command line that the scripts of this folder share.

Each script draws from records: `python paper_figures/draw_NAME.py RECORDS... --out FOLDER` writes PNG figures, CSV
tables and `tables.md`; in Python, `tables(records)` gives its tables and `figures(records)` its figures by name.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from spd.errors import SPDError
from spd.report import write

MARKERS = "osD^vP"


def legend(figure: Figure, handles: Sequence, columns: int) -> None:
    """One legend for all panels, over them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def main(
    draw: Callable[[argparse.Namespace], dict], description: str, out: str, argv: Sequence[str] | None = None
) -> int:
    """Run a script: what `draw` returns as JSON on standard output; a mistake in one sentence and exit code 1."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where to write ({out})")
    try:
        print(json.dumps(draw(parser.parse_args(argv))))
    except SPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(tables: Callable, figures: Callable, description: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a script that writes its figures and tables into a folder."""
    return main(lambda o: write(o.records, o.out, tables, figures), description, "paper_figures", argv)
