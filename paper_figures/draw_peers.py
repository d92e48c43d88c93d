"""spd beside transformers: records of `bench-peers`."""

from collections.abc import Sequence

import pandas as pd
from bench_peers import OVER_GLOO, PEER, SPD
from draw import legend
from matplotlib.figure import Figure

from spd.report import COLOURS, canvas, finish
from spd.tables import Record, Table, machine, newest, number, value

NAMES = {SPD: "spd", OVER_GLOO: "spd, over gloo as transformers"}
TIMES = {"ttft": "time to first token", "tpot": "time per output token"}


def tables(records: Sequence[Record]) -> list[Table]:
    """Every comparison of the newest record: medians and interquartile ranges in ms, and ratios."""
    record = newest(records, "bench-peers")
    if record is None:
        return []
    batch, prompt, decoded = (number(record, "result", key) for key in ("batch", "prompt_len", "new_tokens"))
    caption = (
        "Time to first token and per output token beside transformers"
        f" {value(record, 'versions', 'transformers')} (SDPA; with tp processes its own tensor parallelism, tp_plan"
        " auto over gloo): the same random weights (shape only), the same threads a process, medians of interleaved"
        " repetitions and their interquartile range. With several processes spd talks through shared memory, and, in"
        " spd_over_gloo, the way transformers does. ratio = transformers / spd of the medians, above 1 where spd is"
        " ahead; logits_differ: the largest difference of the first token's logits."
        f" {batch} in the batch, {prompt} prompt tokens, {decoded} decoded; {machine(record)}."
    )
    frame = pd.DataFrame([_row(record, i) for i in range(len(value(record, "result", "rows")))])
    last = [name for name in ("why_not", "repeats", "logits_differ") if name in frame]
    return [Table("peers", caption, frame[[*frame.columns.drop(last), *last]], [record])]


def _row(record: Record, i: int) -> dict:
    source = value(record, "result", "rows", i)
    row = {key: source[key] for key in ("shape", "dtype", "tp", "threads", "why_not", "logits_differ") if key in source}
    row["repeats"] = number(record, "result", "rows", i, SPD, "ttft_ms", "repeats")
    for kind in TIMES:
        for engine in (engine for engine in (SPD, OVER_GLOO, PEER) if engine in source):
            row[f"{engine}_{kind}_ms"] = number(record, "result", "rows", i, engine, f"{kind}_ms", "median")
            row[f"{engine}_{kind}_iqr"] = number(record, "result", "rows", i, engine, f"{kind}_ms", "spread")
        row |= {f"{engine}_{kind}_ratio": ratios[kind] for engine, ratios in source.get("ratio", {}).items()}
    return row


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """How many times transformers' times are spd's."""
    return {table.name: _ratios(table) for table in tables(records) if "spd_ttft_ratio" in table.frame}


def _ratios(table: Table) -> Figure:
    frame = table.frame.dropna(subset="spd_ttft_ratio").iloc[::-1].reset_index(drop=True)
    figure = canvas(9.0, 2.2 + 0.34 * len(frame))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (kind, title) in zip(axes, TIMES.items(), strict=True):
        for shift, (engine, name), colour in zip((0.19, -0.19), NAMES.items(), COLOURS, strict=False):
            if f"{engine}_{kind}_ratio" in frame:
                ratios = frame[f"{engine}_{kind}_ratio"].dropna()
                bars = ax.barh(ratios.index + shift, ratios, height=0.36, color=colour, label=name, linewidth=0)
                ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        ax.axvline(1, color="0.25", linewidth=1)
        ax.set(title=title, xlabel="transformers / spd (times)")
        ax.margins(x=0.12)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(frame.index, frame["shape"] + ", " + frame["dtype"] + ", tp=" + frame["tp"].astype(str))
    legend(figure, axes[0].get_legend_handles_labels()[0], 2)
    return finish(figure, table.caption, table.records)
