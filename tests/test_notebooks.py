"""Every notebook runs from top to bottom, and is committed with what it shows."""

from pathlib import Path

import nbformat
import pytest
import torch

from spd.algebra import missing, statements
from spd.explore import Explorer, measure
from spd.notebooks import run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["1_method", "2_sensitivity", "3_accuracy", "4_latency"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_committed_with_its_outputs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the models are tiny: more threads would only wait for one another
    committed, now = nbformat.read(path, as_version=4), run(path)
    for notebook in (committed, now):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not any(output.output_type == "error" for output in outputs)
    assert "/home" not in nbformat.writes(now) and str(path.parents[1]) not in nbformat.writes(now)
    assert [cell.source for cell in now.cells] == [cell.source for cell in committed.cells]


def test_statements_hold_and_what_is_missing_is_a_share(plain):
    """On random weights, for which nothing was ever tuned; the last statement is a difference."""
    tokens = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    *equal, other = statements(plain, 4, tokens)
    assert all(row["largest_difference"] < 1e-4 for row in equal) and other["largest_difference"] > 0.1
    assert [row["all_reduces"] for row in (*equal, other)] == [6, 3, 3, 3]
    assert all(row["all_reduces"] == row["expected"] for row in (*equal, other))
    assert all(row["missing"] > 0 for row in missing(plain, 4, tokens))
    assert all(row["missing"] == 0 for row in missing(plain, 1, tokens))


def test_controls_draw_the_plan_of_what_was_measured(plain, text_of_words, capsys):
    explorer = Explorer(measured=[measure(plain, 4, str(text_of_words), seq_len=16, windows=2)])
    assert list(explorer.settings) == [("model", "words", 4)]
    controls = explorer.controls()
    controls.children[1].value = 100
    sheet = explorer.sheet(("model", "words", 4), "100%", 0.05, 10.0)
    assert sheet.records[-1]["result"]["plan"] == "DF DF DF"
