"""Figure 7's lower panels and figure 2, measured over several links: what dropping gains on each, and by formula."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from spd.comm import Link
from spd.report import MARKERS, axis_of_blocks, canvas, finish, plain
from spd.tables import Record, Table, column, machine, number, of_command, timing_words, timings, value

COMMON = ("tp", "world", "batch", "prompt_len", "new_tokens", "dtype", "compile", "transport")
DASHES = {"linestyle": (0, (4, 2)), "linewidth": 1.2}


def over_links(records: Sequence[Record]) -> list[Record]:
    """The newest bench record of each link, slowest link first, of the setting last timed; none of fewer than two."""
    timed = [r for r in of_command(records, "bench") if value(r, "result", "plans", 0).get("communication_ms")]
    alike = {r["result"]["link"]: r for r in timed if _setting(r) == _setting(timed[-1])}
    return sorted(alike.values(), key=_one_kilobyte, reverse=True) if len(alike) > 1 else []


def _setting(record: Record) -> tuple:
    """What must be equal for the link to be the only difference."""
    plans = [plan["plan"] for plan in value(record, "result", "plans")]
    return (record["model"]["fingerprint"], plans, *(record["result"].get(key) for key in COMMON))


def _one_kilobyte(record: Record) -> float:
    link = record["result"]["link"]
    return Link.parse(link).all_reduce_seconds(1e3, 2) if link else 0.0


def _rows(record: Record) -> pd.DataFrame:
    """`timings`, with the time of all collectives of a prefill, by clock and by formula."""
    transfers = {
        "transfer_ms": column(record, "plans", "communication_ms", "median"),
        "transfer_formula_ms": column(record, "plans", "floor", "ttft_communication_ms"),
    }
    plans = [plan["plan"] for plan in record["result"]["plans"]]
    frame = timings(record).join(pd.DataFrame(transfers, plans), on="plan")
    frame["formula_speedup"] = frame["formula_ms"].iloc[0] / frame["formula_ms"]
    return frame.assign(link=(record["result"]["link"] or "none emulated").replace(",", ", "))


def tables(records: Sequence[Record]) -> list[Table]:
    """Speedup and transfer time by percentage of every link, where there are several."""
    measured = over_links(records)
    if not measured:
        return []
    columns = ["link", "blocks_dropped", "percent", "ttft_median_ms", "ttft_spread_ms", "formula_ms", "transfer_ms"]
    columns += ["transfer_formula_ms", "speedup", "formula_speedup", "saved_share"]
    caption = (
        "Left: the more a link costs, the more dropping gains; right: the time of the collectives that are left. Solid:"
        " measured, medians; dashed: the time without communication plus the link's formula and idle real collectives;"
        " what is measured above that is one process waiting for the other."
        f" {timing_words(measured[-1])}; {len(measured)} records; {machine(measured[-1])}."
    )
    frame = pd.concat([_rows(record) for record in measured], ignore_index=True)
    return [Table("links", caption, frame.reindex(columns=columns), measured)]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Speedup and transfer time by percentage, a line a link."""
    return {table.name: _lines(table) for table in tables(records)}


def _lines(table: Table) -> Figure:
    figure = canvas(9.0, 4.8)
    figure.get_layout_engine().set(wspace=0.06)
    left, right = figure.subplots(1, 2)
    links = table.frame.groupby("link", sort=False)
    for (link, rows), colour, marker in zip(links, sns.color_palette("viridis", len(links)), MARKERS, strict=False):
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "label": link}
        left.plot(rows["percent"], rows["speedup"], **look)
        left.plot(rows["percent"], rows["formula_speedup"], color=colour, **DASHES)
        right.plot(rows["percent"], rows["transfer_ms"], **look)
        right.plot(rows["percent"], rows["transfer_formula_ms"], color=colour, **DASHES)
    for ax in (left, right):
        axis_of_blocks(ax, number(table.records[0], "model", "blocks"))
    left.set_ylabel("speedup of the time to first token")
    left.plot([], [], color="0.3", label="by formula", **DASHES)
    left.legend(title="emulated link", frameon=False, loc="upper left")
    right.set(ylabel="collectives of a prefill (ms)", yscale="log")
    right.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    right.yaxis.set_major_formatter(plain)
    right.yaxis.set_minor_formatter(NullFormatter())
    return finish(figure, table.caption, table.records)
