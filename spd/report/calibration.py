"""A calibration's predictions beside what was measured: records of `profile`."""

from collections.abc import Sequence

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from spd.calibrate import speedups
from spd.report.figures import Sheet, finish, plain, style
from spd.report.records import Record, newest, value_in
from spd.report.table import Table

TIMES = {"TTFT": (sns.color_palette("colorblind")[0], "o"), "TPOT": (sns.color_palette("colorblind")[1], "s")}
ERROR_GOAL, POINTS_GOAL = 10, 3  # percent of the TTFT, percentage points of its speedup


def calibration_sheets(records: Sequence[Record]) -> list[Sheet]:
    """Errors of times, and speedups, of the newest calibration, none without one."""
    record = newest(records, "profile")
    if record is None:
        return []
    with style():
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for use, rows in value_in(record, "result", "errors").items():
            for time, (colour, marker) in TIMES.items():
                of_time = [row for row in rows if row["time"] == time]
                look = {"marker": marker, "color": colour, "linestyle": "none", "markersize": 5, "markeredgewidth": 1}
                look |= {"label": f"{time}, {use}", "markerfacecolor": colour if use == "checked" else "none"}
                left.plot([r["measured_ms"] for r in of_time], [100 * r["error"] for r in of_time], **look)
                pairs = speedups(of_time)
                right.plot([measured for measured, _ in pairs], [predicted for _, predicted in pairs], **look)
        _axes(left, right)
        finish(figure, _caption(record))
    return [Sheet("calibration", "Predicted and measured times", _caption(record), [record], figure)]


def _axes(left: Axes, right: Axes) -> None:
    left.axhspan(-ERROR_GOAL, ERROR_GOAL, color="0.85", zorder=0, linewidth=0)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.set(xscale="log", xlabel="measured (ms)", ylabel="predicted / measured − 1 (%)")
    left.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    left.xaxis.set_major_formatter(FuncFormatter(plain))
    low, high = 1, max(max(right.get_xlim()), max(right.get_ylim()))
    ends, goal = [low, high], POINTS_GOAL / 100
    right.fill_between(ends, [e - goal for e in ends], [e + goal for e in ends], color="0.85", zorder=0, linewidth=0)
    right.plot(ends, ends, color="0.4", linewidth=0.8)
    right.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured speedup", ylabel="predicted speedup")
    right.legend(frameon=False, loc="upper left")


def calibration_tables(records: Sequence[Record]) -> list[Table]:
    """Every time that the newest calibration was fitted to or checked on, none without one."""
    record = newest(records, "profile")
    if record is None:
        return []
    rows = [{"use": use, **row} for use, found in value_in(record, "result", "errors").items() for row in found]
    formats = dict.fromkeys(("use", "model", "tp", "link", "batch", "prompt_len", "plan", "time"), "")
    formats |= {"measured_ms": ".3f", "predicted_ms": ".3f", "error": "+.1%"}
    return [Table("calibration", _caption(record), rows, formats, [record])]


def _caption(record: Record) -> str:
    how = {"min": "Least", "median": "Median"}[record["result"].get("statistic", "median")]
    words = [_errors_in_words(record, use, kind) for use in ("fitted", "checked") for kind in ("TTFT", "TPOT")]
    return " ".join([
        f"{how} times of the repetitions and a calibration's predictions on {value_in(record, 'result', 'name')}:",
        "fitted to some sizes, prompts and links, checked on others and on other percentages. Grey: within",
        f"{ERROR_GOAL} %, and within {POINTS_GOAL} percentage points (of plans;",
        "the bound without communication is left out).",
        f"At worst: {', '.join(filter(None, words))}.",
    ])  # fmt: skip


def _errors_in_words(record: Record, use: str, kind: str) -> str | None:
    error, points = (record["result"][key][use][kind] for key in ("worst_error", "speedup_points"))
    return None if None in (error, points) else f"{kind} {use} {error:.1%} and {points:.1f} points"
