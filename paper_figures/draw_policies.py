"""What policies lose for their bytes, and what they take on two processes over emulated links."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from spd.report import canvas, finish, plain
from spd.tables import Record, Table, column, machine, newest, subject, timing_words, value


def tables(records: Sequence[Record]) -> list[Table]:
    """Of the newest `policies` record, and of the newest `bench` record of each link."""
    losses, timed = newest(records, "policies"), {r["result"]["link"]: r for r in records if r["command"] == "bench"}
    return [_losses(losses)] * bool(losses) + [_times([*timed.values()])] * bool(timed)


def _losses(record: Record) -> Table:
    shown = {"bytes %": [100 * share for share in column(record, "policies", "bytes_share")]}
    shown |= {"loss (nats)": column(record, "policies", "lost"), "perplexity": column(record, "policies", "perplexity")}
    frame = pd.DataFrame({"policy": [row["name"] for row in value(record, "result", "policies")]} | shown)
    data = record["data"]
    caption = (
        "Loss over all full (nats a token, nothing repaired) and bytes, of those of 16-bit values at every point. The"
        " last MLP's point is full but where said. Dropped: so many attention syncs. Bits: both rounding errors are"
        f" lost or kept pending; other than to the nearest in blocks of 32 values stand in. {subject(record)};"
        f" {data['windows']} windows of {data['seq_len']} tokens of {Path(data['text']).name}; {machine(record)}."
    )
    return Table("losses", caption, frame, [record], ".4g")


def _times(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        for timed in (value(record, "result", "bounds", "all_full"), *value(record, "result", "plans")):
            drops = f"{len(timed['plan'].split('D')) - 1} dropped" if "D" in timed["plan"] else ""
            name = ", ".join(filter(None, (drops, "4 bits, kept" if "4" in timed["plan"] else ""))) or "full"
            times = {
                f"{k[:4].upper()} {of}": timed[k][of] for k in ("ttft_ms", "tpot_ms") for of in ("median", "spread")
            }
            by_link = {"link's TTFT": timed["floor"]["ttft_communication_ms"]}
            rows.append({"link": record["result"]["link"], "plan": name, **times, **by_link})
    caption = (
        "Times (ms; medians and interquartile ranges) of plans interleaved in one run a link; what the link and idle"
        " collectives take by formula leaves out rounding and packing, which these processors do in many passes."
        f" {timing_words(records[-1])}; {machine(records[-1])}."
    )
    return Table("times", caption, pd.DataFrame(rows), list(records), ".1f")


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Loss against bytes; and bars of both times, a group a link."""
    draw = {"losses": _against_bytes, "times": _bars}
    return {table.name: finish(draw[table.name](table), table.caption, table.records) for table in tables(records)}


def _against_bytes(table: Table) -> Figure:
    figure = canvas(9.0, 6.8)
    ax, frame = figure.subplots(), table.frame
    kind = frame["policy"].str.extract("(lost|dropped, 4 bits|dropped|kept, .+|kept)")[0].fillna("full")
    kind = kind.replace(r"kept, .+", "kept, rounded otherwise", regex=True)
    sns.scatterplot(frame, x="bytes %", y="loss (nats)", hue=kind, style=kind, palette="colorblind", s=60, ax=ax)
    ax.set(xscale="log", xlabel="bytes sent (% of 16-bit values at every point)", xlim=(12.5, 130))
    ax.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    ax.set_ylim(-0.001, 2 * frame["loss (nats)"].max())
    ax.xaxis.set_major_locator(FixedLocator([15, 20, 25, 30, 40, 50, 60, 75, 100]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_formatter(plain)
    ax.get_legend().set_title(None)
    _label(ax, frame)
    return figure


def _label(ax: Axes, frame: pd.DataFrame) -> None:
    """Each point's name to its right or left, as near as it lies on no other name or point."""
    ax.figure.canvas.draw()  # that points have places
    points = ax.transData.transform(frame[["bytes %", "loss (nats)"]]) * 72 / ax.figure.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for (x, y), name in sorted(zip(points.tolist(), frame["policy"], strict=True), key=lambda one: one[0][1]):
        width = 2.9 * len(name)
        sides = [(left, up) for up in (0, 8, -8, 16, -16, 24, -24, 32) for left in (6, -6 - width)]
        boxes = [(x + left, y + up - 3, x + left + width, y + up + 4) for left, up in sides]
        free = [i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        (left, up), box = next(((sides[i], boxes[i]) for i in free), (sides[0], boxes[0]))
        taken.append(box)
        at = ax.transData.inverted().transform([x * ax.figure.dpi / 72, y * ax.figure.dpi / 72])
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if up else None
        side = {"ha": "left", "xytext": (6, up - 2)} if left > 0 else {"ha": "right", "xytext": (-6, up - 2)}
        ax.annotate(name, at, textcoords="offset points", fontsize=6, arrowprops=line, **side)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Of boxes, each left, bottom, right, top."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _bars(table: Table) -> Figure:
    figure = canvas(9.0, 4.6)
    for ax, kind in zip(figure.subplots(1, 2), ("TTFT", "TPOT"), strict=True):
        sns.barplot(table.frame, x="link", y=f"{kind} median", hue="plan", palette="colorblind", ax=ax)
        for bars, (_, rows) in zip([*ax.containers], table.frame.groupby("plan", sort=False), strict=True):
            middle = [bar.get_x() + bar.get_width() / 2 for bar in bars]
            ax.errorbar(middle, rows[f"{kind} median"], rows[f"{kind} spread"] / 2, fmt="none", color="0.3")
        ax.set(ylabel=f"{kind} (ms; median, interquartile range)", xlabel="emulated link")
        ax.get_legend().remove()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
