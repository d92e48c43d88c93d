"""Every notebook runs from top to bottom, holds little logic, and is committed with what it shows."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINES = 25  # a code cell

# What must hold in a notebook's kernel at its end.
AT_THE_END = {
    "1_method": """
*equal, other = [(left - right).abs().max() for (left, _), right in sides.values()]
assert all(difference < 1e-3 for difference in equal) and other > 0.1
assert [count for (_, count), _ in sides.values()] == [2 * blocks, blocks, blocks, blocks]
assert all(0 < share < 1 for share in missing)
""",
    "2_sensitivity": """
drawn = []
plt.show = lambda: drawn.append(plt.gca().get_title())
menu.value = measured["spd-tiny, builtin, tp=8"]
controls.children[1].value = 100
assert drawn[-1] == " ".join(["DF"] * 8)
controls.children[1].value = 0
assert drawn[-1] == " ".join(["FF"] * 8)
assert len(measure("spd-tiny", 4, "builtin-train")) == 8 and measure.cache_info().misses == 1
""",
}


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["1_method", "2_sensitivity", "3_accuracy", "4_latency"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the models are tiny: more threads would only wait for one another
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(AT_THE_END.get(path.stem, "")))
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    assert images(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_holds_little_logic(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert images(notebook)
    assert all(cell.execution_count == i for i, cell in enumerate(code, 1)), "run it from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert all(len(cell.source.splitlines()) <= LINES for cell in code)
    assert "/home/" not in nbformat.writes(notebook) and str(ROOT) not in nbformat.writes(notebook)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def images(notebook) -> list:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]
