"""Figure 7's lower panels and figure 2, measured over several links: what dropping gains on each, and by formula."""

from collections.abc import Sequence
from functools import partial

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from spd.comm import Link
from spd.report.captions import machine, timing_words
from spd.report.figures import MARKERS, Sheet, axis_of_blocks, finish, plain, style
from spd.report.records import Record, model_key, number_in, timings_of, value_in
from spd.report.table import Table

COMMON = ("tp", "world", "batch", "prompt_len", "new_tokens", "dtype", "compile", "transport")


def link_sheets(records: Sequence[Record]) -> list[Sheet]:
    """Speedup and transfer time by percentage, a line a link; nothing without bench records over several of them."""
    measured = over_links(records)
    if not measured:
        return []
    with style():
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        left, right = figure.subplots(1, 2)
        colours = sns.color_palette("viridis", len(measured))
        for record, colour, marker in zip(measured, colours, MARKERS * len(measured), strict=False):
            _lines(left, right, _rows(record), {"color": colour, "marker": marker, "label": _name(record)})
        _axes(left, right, number_in(measured[0], "model", "blocks"))
        finish(figure, _caption(measured))
    return [Sheet("links", "What dropping gains over links", _caption(measured), measured, figure)]


def link_tables(records: Sequence[Record]) -> list[Table]:
    """The same numbers."""
    measured = over_links(records)
    if not measured:
        return []
    rows = [{"link": _name(record), **row} for record in measured for row in _rows(record)]
    formats = {"link": "", "blocks_dropped": "d", "percent": ".1f", "ttft_median_ms": ".2f", "ttft_spread_ms": ".2f"}
    formats |= {"formula_ms": ".2f", "transfer_ms": ".2f", "transfer_formula_ms": ".2f", "speedup": ".3f"}
    formats |= {"formula_speedup": ".3f", "saved_share": ".3f"}
    return [Table("links", _caption(measured), rows, formats, measured)]


def over_links(records: Sequence[Record]) -> list[Record]:
    """The newest bench record of each link, slowest link first, of the setting last timed; none of fewer than two."""
    timed = [r for r in records if r["command"] == "bench" and "communication_ms" in value_in(r, "result", "plans", 0)]
    if not timed:
        return []
    alike = {r["result"]["link"]: r for r in timed if _setting(r) == _setting(timed[-1])}
    return sorted(alike.values(), key=_one_kilobyte, reverse=True) if len(alike) > 1 else []


def _setting(record: Record) -> tuple:
    """What must be equal for the link to be the only difference."""
    plans = [plan["plan"] for plan in value_in(record, "result", "plans")]
    return (model_key(record), plans, *(record["result"].get(key) for key in COMMON))


def _one_kilobyte(record: Record) -> float:
    link = record["result"]["link"]
    return Link.parse(link).all_reduce_seconds(1e3, 2) if link else 0.0


def _name(record: Record) -> str:
    return (record["result"]["link"] or "none emulated").replace(",", ", ")


def _rows(record: Record) -> list[dict]:
    """`timings_of`, with the time of all collectives of a prefill, by clock and by formula."""
    rows = timings_of(record)
    letters = [value_in(record, "result", "plans", i, "plan") for i in range(len(rows))]
    for row in rows:
        at = partial(number_in, record, "result", "plans", letters.index(row["plan"]))
        row["transfer_ms"] = at("communication_ms", "median")
        row["transfer_formula_ms"] = at("floor", "ttft_communication_ms")
        row["formula_speedup"] = rows[0]["formula_ms"] / row["formula_ms"]
    return rows


def _lines(left: Axes, right: Axes, rows: list[dict], look: dict) -> None:
    percent = [row["percent"] for row in rows]
    dashed = {"color": look["color"], "linestyle": (0, (4, 2)), "linewidth": 1.2}
    for ax, measured, formula in (
        (left, "speedup", "formula_speedup"),
        (right, "transfer_ms", "transfer_formula_ms"),
    ):
        ax.plot(percent, [row[measured] for row in rows], linewidth=1.6, markersize=5, **look)
        ax.plot(percent, [row[formula] for row in rows], **dashed)


def _axes(left: Axes, right: Axes, blocks: float) -> None:
    for ax in (left, right):
        axis_of_blocks(ax, blocks)
    left.set_ylabel("speedup of the time to first token")
    right.set(ylabel="collectives of a prefill (ms)", yscale="log")
    right.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(plain))
    right.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = left.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.3", linestyle=(0, (4, 2)), linewidth=1.2))
    left.legend(handles, [*labels, "by formula"], title="emulated link", frameon=False, loc="upper left")


def _caption(measured: Sequence[Record]) -> str:
    return (
        "Left: the more a link costs, the more dropping gains; right: the time of the collectives that are left. Solid:"
        " measured, medians; dashed: the time without communication plus the link's formula and idle real collectives;"
        " what is measured above that is one process waiting for the other."
        f" {model_key(measured[-1])[0]}, {timing_words(measured[-1])}; {machine(measured[-1])}."
    )
