"""A calibration's predictions beside what was measured: records of `profile`."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from spd.calibrate import speedups
from spd.report import BLUE, ORANGE, canvas, finish, plain
from spd.tables import Record, Table, newest, value

TIMES = {"TTFT": (BLUE, "o"), "TPOT": (ORANGE, "s")}
COLUMNS = ["use", "model", "tp", "link", "batch", "prompt_len", "plan", "time", "measured_ms", "predicted_ms", "error"]
ERROR_GOAL, POINTS_GOAL = 10, 3  # percent of the TTFT, percentage points of its speedup


def tables(records: Sequence[Record]) -> list[Table]:
    """Every time that the newest calibration was fitted to or checked on."""
    record = newest(records, "profile")
    if record is None:
        return []
    result = record["result"]
    rows = [{"use": use} | row for use, found in value(record, "result", "errors").items() for row in found]
    worst = []
    for use, kind in ((use, kind) for use in ("fitted", "checked") for kind in TIMES):
        error, points = (result[key][use][kind] for key in ("worst_error", "speedup_points"))
        worst += [f"{kind} {use} {error:.1%} and {points:.1f} points"] if None not in (error, points) else []
    caption = (
        f"{'Least' if result.get('statistic') == 'min' else 'Median'} times of the repetitions and a"
        f" calibration's predictions on {value(record, 'result', 'name')}: fitted to some sizes, prompts and links,"
        " checked on others and on other percentages; the models have random weights (shape only). Grey: within"
        f" {ERROR_GOAL} %, and within {POINTS_GOAL} percentage points (of plans; the bound without communication is"
        f" left out). At worst: {', '.join(worst)}."
    )
    return [Table("calibration", caption, pd.DataFrame(rows, columns=COLUMNS), [record])]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Errors of times, and speedups, of the newest calibration."""
    return {table.name: _errors(table) for table in tables(records)}


def _errors(table: Table) -> Figure:
    figure = canvas(9.0, 4.8)
    left, right = figure.subplots(1, 2)
    for (use, time), rows in table.frame.groupby(["use", "time"], sort=False):
        colour, marker = TIMES[time]
        look = {"marker": marker, "color": colour, "linestyle": "none", "markersize": 5, "markeredgewidth": 1}
        look |= {"label": f"{time}, {use}", "markerfacecolor": colour if use == "checked" else "none"}
        left.plot(rows["measured_ms"], 100 * rows["error"], **look)
        right.plot(*zip(*speedups(rows.to_dict("records")), strict=True), **look)
    left.axhspan(-ERROR_GOAL, ERROR_GOAL, color="0.85", zorder=0, linewidth=0)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.set(xscale="log", xlabel="measured (ms)", ylabel="predicted / measured − 1 (%)")
    left.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    left.xaxis.set_major_formatter(plain)
    ends, goal = [1, max(*right.get_xlim(), *right.get_ylim())], POINTS_GOAL / 100
    right.fill_between(ends, [e - goal for e in ends], [e + goal for e in ends], color="0.85", zorder=0, linewidth=0)
    right.plot(ends, ends, color="0.4", linewidth=0.8)
    right.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured speedup", ylabel="predicted speedup")
    right.legend(frameon=False, loc="upper left")
    return finish(figure, table.caption, table.records)
