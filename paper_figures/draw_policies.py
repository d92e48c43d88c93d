"""What policies lose for their bytes, and what they take on two processes over emulated links."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from draw import run
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from spd.report import canvas, finish, plain
from spd.tables import Record, Table, column, machine, newest, subject, timing_words, value

TIMED = ["full", "70 % dropped", "4 bits, kept", "70 % dropped, others 4 bits, kept"]  # as `bench` was asked


def tables(records: Sequence[Record]) -> list[Table]:
    """Of the newest `policies` record, and of the newest `bench` record of each link."""
    losses, timed = newest(records, "policies"), {r["result"]["link"]: r for r in records if r["command"] == "bench"}
    return [_losses(losses)] * bool(losses) + [_times([*timed.values()])] * bool(timed)


def _losses(record: Record) -> Table:
    shown = {"bytes %": [100 * share for share in column(record, "policies", "bytes_share")]}
    shown |= {key: column(record, "policies", key) for key in ("lost", "perplexity")}
    frame = pd.DataFrame({"every sync point": [row["name"] for row in value(record, "result", "policies")]} | shown)
    data = record["data"]
    caption = (
        "Loss over all full (nats a token, nothing repaired) and bytes of 16-bit values' that policies send; the last"
        " point is full but where said. Both rounding errors are lost or kept pending; other roundings stand in for"
        f" blocks of 32 values, to the nearest. {subject(record)}; {data['windows']} windows of {data['seq_len']}"
        f" tokens of {Path(data['text']).name}; {machine(record)}."
    )
    return Table("losses", caption, frame.rename(columns={"lost": "loss (nats)"}), [record], ".4g")


def _times(records: Sequence[Record]) -> Table:
    frames = []
    for record in records:
        times = {
            f"{kind} {of}": column(record, "plans", f"{kind.lower()}_ms", of)
            for kind in ("TTFT", "TPOT")
            for of in ("median", "spread", "min")
        }
        sent = column(record, "plans", "floor", "ttft_communication_ms")
        frames.append(pd.DataFrame({"link": record["result"]["link"], "plan": TIMED, **times, "link's TTFT": sent}))
    caption = (
        "Times (ms) of plans, interleaved, over emulated links; what the link takes by formula is without rounding and"
        f" packing. {subject(records[0])}; {timing_words(records[-1])}; {machine(records[-1])}."
    )
    return Table("times", caption, pd.concat(frames, ignore_index=True), list(records), ".1f")


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Loss against bytes; and bars of both times, a group a link."""
    draw = {"losses": _against_bytes, "times": _bars}
    return {table.name: finish(draw[table.name](table), table.caption, table.records) for table in tables(records)}


def _against_bytes(table: Table) -> Figure:
    figure = canvas(8.4, 6.4)
    ax, frame = figure.subplots(), table.frame
    kind = frame["every sync point"].str.extract("(lost|dropped, 4 bits|dropped|kept)")[0].fillna("full")
    sns.scatterplot(frame, x="bytes %", y="loss (nats)", hue=kind, style=kind, palette="colorblind", s=60, ax=ax)
    for _, (name, sent, lost, _) in frame.iterrows():
        ax.annotate(name, (sent, lost), (5, 3), textcoords="offset points", fontsize=6)
    ax.set(xscale="log", xlabel="bytes sent (% of 16-bit values at every point)")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.xaxis.set_major_locator(FixedLocator([15, 20, 25, 30, 40, 50, 60, 75, 100]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(plain)
    ax.get_legend().set_title(None)
    return figure


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


if __name__ == "__main__":
    sys.exit(run(tables, figures, __doc__))
