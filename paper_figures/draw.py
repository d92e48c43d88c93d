"""Draws paper_figures/FOLDER again from experiments/records/FOLDER, for each folder named, or for all of them.

A script `draw_NAME` of this folder is, of `load_records`' records, `tables(records)` and, by their names,
`figures(records)`; they are written as CSV, `tables.md` and PNG.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from matplotlib.figure import Figure

from spd.errors import SPDError
from spd.report import write

REPORT = {".": "spd.report"}
DRAWN_BY = {  # the scripts that draw a folder of records, by the folder below its own that each draws in
    "ablation": {".": "draw_ablation"},
    "answers": {".": "draw_answers"},
    "budget": {".": "draw_ablation"},
    "calibration": {".": "draw_calibration"},
    "links": {".": "draw_links"},
    "peers": {".": "draw_peers"},
    "policies": {".": "draw_policies"},
    "predicted": {".": "draw_predicted"},
    "sensitivities": REPORT | {"method": "draw_method"},
    "spd-tiny": REPORT | {"method": "draw_method", "method-table1": "draw_ablation"},
}  # other folders: REPORT


def legend(figure: Figure, handles: Sequence, columns: int) -> None:
    """One legend for all panels, over them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def main(words: Sequence[str] | None = None) -> None:
    """A mistake ends as one sentence and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of records; left out: all")
    parser.add_argument("--records", type=Path, default=Path("experiments/records"), help="where these folders are")
    parser.add_argument("--out", type=Path, default=Path("paper_figures"), help="where those of figures are")
    o = parser.parse_args(words)
    for folder in o.folders or sorted(path.name for path in o.records.iterdir() if path.is_dir()):
        print(o.out / folder, file=sys.stderr)
        for place, script in DRAWN_BY.get(folder, REPORT).items():
            drawing = import_module(script)
            try:
                write([o.records / folder], o.out / folder / place, drawing.tables, drawing.figures)
            except SPDError as error:
                sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
