"""What to leave out on which link: the answer table, and loss against time; records of `answers`."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from spd.report import canvas, finish
from spd.tables import Record, Table, newest, subject, value

TIMES = ["ttft_ms", "tpot_ms"]


def tables(records: Sequence[Record]) -> list[Table]:
    """Predicted times; measured losses; losses against predicted times; measured times."""
    record = newest(records, "answers")
    return [] if record is None else [_predicted(record), _lost(record), _fronts(record), _timed(record)]


def _shares(letters: str) -> str:
    """How many points have which policy."""
    return " ".join(f"{count}×{letter}" for letter, count in sorted(Counter(letters.replace(" ", "")).items()))


def _predicted(record: Record) -> Table:
    rows, result = pd.DataFrame(value(record, "result", "predicted")), record["result"]
    rows["shown"] = [f"{ms:.3g} ms, {gain:.2f}×" for ms, gain in zip(rows["ms"], rows["speedup"], strict=True)]
    mixed = rows["mix"].notna()
    rows.loc[mixed, "shown"] += [f" ({_shares(mix)})" for mix in rows.loc[mixed, "mix"]]
    wide = rows.pivot(index=["link", "way"], columns="asked", values="shown")
    ordered = wide.loc[[*dict.fromkeys(zip(rows["link"], rows["way"], strict=True))], [*rows["asked"].unique()]]
    caption = (
        f"{result['shape']} at tp=8, {result['gpu']}, 16 bits, predicted: time, and speedup over everything full."
        f" Planner's mix: the fastest plan estimated to lose {result['nats']} nats a token on {subject(record)},"
        " carried over by the share of each policy there (D drop, 8, 4, 3 bits, F full). Sources of links: --link help."
    )
    return Table("answers", caption, ordered.reset_index(), [record])


def _lost(record: Record) -> Table:
    rows = [
        (row["text"], row["way"].replace("zs", "none"), _shares(row["plan"]), round(row["lost"], 5))
        for row in value(record, "result", "measured")
    ]
    frame = pd.DataFrame(sorted(set(rows)), columns=["text", "repair or rounding", "sync points", "lost (nats)"])
    caption = f"Measured losses over full, of all records of this model and tp. {subject(record)}."
    return Table("losses", caption, frame, [record])


def _fronts(record: Record) -> Table:
    result = record["result"]
    caption = (
        "Least loss at each time: estimated by scores (lines), measured with nothing repaired (crosses). Where few bits"
        " are not drawn, decoding, they are slower than everything full. Above: time to"
        f" the first token of 8 x 2048; below: time per token of one sequence; {subject(record)}, predicted on"
        f" {result['gpu']}."
    )
    return Table("fronts", caption, pd.DataFrame(value(record, "result", "fronts")), [record])


def _timed(record: Record) -> Table:
    frame = pd.DataFrame(
        value(record, "result", "timed"), columns=["link", "tp", "batch", "prompt_len", "plan", *TIMES]
    )
    frame["plan"] = frame["plan"].map(_shares)
    caption = f"Measured times of {subject(record).split(' at ')[0]}, a process a shard, over emulated links: medians."
    return Table("times", caption, frame.drop_duplicates(), [record], ".1f")


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Loss against time: SPD alone, few bits alone, mixed, on four links."""
    return {table.name: finish(_panels(table), table.caption, table.records) for table in tables(records)[2:3]}


def _panels(table: Table) -> Figure:
    figure, links = canvas(12.0, 6.6), table.frame["link"].unique()
    grid, colours = figure.subplots(2, len(links), sharey=True), sns.color_palette("colorblind", 3)
    for axes, phase in zip(grid, ("prefill", "decode"), strict=True):
        for ax, link in zip(axes, links, strict=True):
            rows = table.frame.query("link == @link and phase == @phase")
            for (way, line), look in zip(
                rows.query("way != 'measured'").groupby("way", sort=False), colours, strict=False
            ):
                ax.plot(
                    line["ms"],
                    line["nats"].clip(lower=1e-5),
                    color=look,
                    label=way,
                    drawstyle="steps-post",
                    linestyle="--" if way == "mixed" else "-",
                )
            crosses = rows.query("way == 'measured' and nats > 0")
            ax.scatter(crosses["ms"], crosses["nats"], marker="x", color="0.3", s=18, label="measured", zorder=3)
            ax.set(yscale="log", ylim=(1e-5, 10), xlabel="ms", title=link if phase == "prefill" else "")
        axes[0].set_ylabel(f"nats lost a token, {phase}")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
