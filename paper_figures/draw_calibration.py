"""A calibration's predictions beside what was measured: records of `profile`."""

import sys
from collections.abc import Sequence

import pandas as pd
from draw import COLOURS, Record, Table, canvas, finish, newest, plain, run, style, value
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from spd.calibrate import speedups

TIMES = {"TTFT": (COLOURS[0], "o"), "TPOT": (COLOURS[1], "s")}
COLUMNS = ["use", "model", "tp", "link", "batch", "prompt_len", "plan", "time", "measured_ms", "predicted_ms", "error"]
ERROR_GOAL, POINTS_GOAL = 10, 3  # percent of the TTFT, percentage points of its speedup


def tables(records: Sequence[Record]) -> list[Table]:
    """Every time that the newest calibration was fitted to or checked on."""
    record = newest(records, "profile")
    if record is None:
        return []
    errors = value(record, "result", "errors")
    frame = pd.DataFrame([{"use": use, **row} for use, rows in errors.items() for row in rows], columns=COLUMNS)
    how = {"min": "Least", "median": "Median"}[record["result"].get("statistic", "median")]
    kinds = [(use, kind) for use in ("fitted", "checked") for kind in TIMES]
    worst = ", ".join(filter(None, (_worst(record, *kind) for kind in kinds)))
    caption = (
        f"{how} times of the repetitions and a calibration's predictions on {value(record, 'result', 'name')}: fitted"
        " to some sizes, prompts and links, checked on others and on other percentages; the models have random weights"
        f" (shape only). Grey: within {ERROR_GOAL} %, and within {POINTS_GOAL} percentage points (of plans; the bound"
        f" without communication is left out). At worst: {worst}."
    )
    return [Table("calibration", caption, frame, [record])]


def _worst(record: Record, use: str, kind: str) -> str | None:
    error, points = (record["result"][key][use][kind] for key in ("worst_error", "speedup_points"))
    return None if None in (error, points) else f"{kind} {use} {error:.1%} and {points:.1f} points"


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Errors of times, and speedups, of the newest calibration."""
    found = tables(records)
    if not found:
        return {}
    (table,) = found
    with style():
        figure = canvas(9.0, 4.8)
        left, right = figure.subplots(1, 2)
        for (use, time), rows in table.frame.groupby(["use", "time"], sort=False):
            colour, marker = TIMES[time]
            look = {"marker": marker, "color": colour, "linestyle": "none", "markersize": 5, "markeredgewidth": 1}
            look |= {"label": f"{time}, {use}", "markerfacecolor": colour if use == "checked" else "none"}
            left.plot(rows["measured_ms"], 100 * rows["error"], **look)
            right.plot(*zip(*speedups(rows.to_dict("records")), strict=True), **look)
        _axes(left, right)
    return {"calibration": finish(figure, table.caption, table.records)}


def _axes(left: Axes, right: Axes) -> None:
    left.axhspan(-ERROR_GOAL, ERROR_GOAL, color="0.85", zorder=0, linewidth=0)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.set(xscale="log", xlabel="measured (ms)", ylabel="predicted / measured − 1 (%)")
    left.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    left.xaxis.set_major_formatter(plain)
    low, high = 1, max(max(right.get_xlim()), max(right.get_ylim()))
    ends, goal = [low, high], POINTS_GOAL / 100
    right.fill_between(ends, [e - goal for e in ends], [e + goal for e in ends], color="0.85", zorder=0, linewidth=0)
    right.plot(ends, ends, color="0.4", linewidth=0.8)
    right.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured speedup", ylabel="predicted speedup")
    right.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    sys.exit(run(tables, figures, __doc__))
