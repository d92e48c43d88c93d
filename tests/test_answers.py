"""The answer table: times predicted, plans carried over by shares, losses as records have them."""

from dataclasses import replace
from datetime import UTC, datetime

import draw_answers
import pytest
from answers import ASKED, LINKS, carried, fronts, measured, predicted, timed

from spd.config import SHAPES
from spd.plan import Plan
from spd.records import make_record, write_record
from spd.report import write

BLOCKS = 6
SCORES = {
    point: {name: [size] * BLOCKS for name, size in (("drop", 0.3), ("int8", 0.004), ("int4", 0.05))}
    for point in ("attention", "mlp")
}


def test_a_plan_is_carried_over_by_shares():
    plan = carried(Plan.from_letters("DF 44 4F"), 60)
    letters = str(plan).replace(" ", "")
    assert {letter: letters.count(letter) for letter in "D4F"} == {"D": 20, "4": 60, "F": 40} and letters[-1] == "F"


def test_losses_are_over_full_on_the_same_windows():
    model, on = {"fingerprint": "a"}, {"text": "t", "windows": 2}
    same = {"tp": 3, "model": model, "data": on, "id": "x"}
    records = [
        same | {"command": "sweep", "result": {"curve": [
            {"strategy": "zs", "plan": "FF FF", "nats": 3.0}, {"strategy": "closed-form", "plan": "DF FF", "nats": 3.1}
        ]}},
        same | {"command": "policies", "result": {"policies": [
            {"name": "4 bits, kept, rotated", "plan": "44 4F", "nats": 3.2}
        ]}},
        same | {"command": "eval", "data": {"text": "other"}, "config": {}, "result": {"plan": "DF FF", "nats": 9.0}},
        same | {"command": "eval", "tp": 4, "result": {"plan": "DF FF", "nats": 9.0}},
        same | {"command": "eval", "config": {}, "result": {"plan": "DF DF", "nats": 3.5}},
        same | {"command": "eval", "config": {"plan": "best-2"}, "result": {"plan": "DF DF", "nats": 3.25}},
    ]  # fmt: skip
    found = [(row["way"], row["plan"], row["lost"]) for row in measured(records, "a", 3)]
    expected = [("zs", "FF FF", 0), ("closed-form", "DF FF", 0.1), ("rotated", "44 4F", 0.2), ("zs", "DF DF", 0.5)]
    expected += [("repaired", "DF DF", 0.25)]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected])


def test_the_table_and_the_figure_are_drawn_from_the_record(tmp_path):
    rows = list(predicted(SCORES))
    assert len(rows) == 6 * len(LINKS) * len(ASKED)
    for full, *others, none in (rows[i : i + 6] for i in range(0, len(rows), 6)):
        assert full["speedup"] == 1 and none["speedup"] == max(row["speedup"] for row in (full, *others, none))
        assert others[-1]["speedup"] >= 1 and others[-1]["estimated"] <= 0.05
    row = {"plan": "DF FF", "ttft_ms": {"median": 2.0}, "tpot_ms": None}
    bench = {"link": "1GBps,1ms", "tp": 2, "batch": 1, "prompt_len": 9, "plans": [row], "bounds": {"all_full": row}}
    times = [*timed([{"command": "bench", "model": {"fingerprint": "a"}, "result": bench}], "a")]
    assert [(one["ttft_ms"], one["tpot_ms"]) for one in times] == [(2.0, None)] * 2
    config = replace(SHAPES["llama-125m"], num_blocks=BLOCKS)
    known = [{"way": "zs", "plan": " ".join(["DF"] * BLOCKS), "nats": 3.3, "lost": 0.3, "text": "t"}]
    result = {"predicted": rows, "measured": known, "nats": 0.05, "gpu": "a100", "shape": "llama2-70b"}
    result["timed"] = times
    result["fronts"] = list(fronts(SCORES, config, 4, known))
    described = {"name": "some", "fingerprint": "a", "blocks": BLOCKS, "parameters": 1}
    record = make_record("answers", {}, result, started=datetime.now(UTC), model=described, tp=4)
    write([write_record(record, tmp_path / "records")], tmp_path / "out", draw_answers.tables, draw_answers.figures)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"answers.csv", "losses.csv", "fronts.csv", "fronts.png", "times.csv", "tables.md"} == names
