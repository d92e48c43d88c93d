"""Runs notebooks and keeps their outputs: `python -m spd.notebooks FOLDER`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from spd.records import write_bytes

WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without the kernel that made it
SECONDS = 300  # a cell


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run from top to bottom, in its own folder; nothing is written.

    What would differ from run to run is left out: times, and widgets, which a kernel has to be there for.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": path.parent}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {}) and not _noise(out)]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _noise(output: nbformat.NotebookNode) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for path in sorted(Path(sys.argv[1]).glob("*.ipynb")):
        print(path, file=sys.stderr)
        write_bytes(path, (nbformat.writes(run(path)) + "\n").encode())


if __name__ == "__main__":
    main()
