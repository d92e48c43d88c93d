"""spd beside transformers: records of `bench-peers`."""

from collections.abc import Sequence

import seaborn as sns
from bench_peers import OVER_GLOO, PEER, SPD
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd.report.captions import machine
from spd.report.figures import Sheet, finish, style
from spd.report.records import Record, newest, number_in, value_in
from spd.report.table import Table

ENGINES = (SPD, OVER_GLOO, PEER)
COLOURS = dict(zip(ENGINES, sns.color_palette("colorblind"), strict=False))
TIMES = {"ttft": "time to first token", "tpot": "time per output token"}


def peer_sheets(records: Sequence[Record]) -> list[Sheet]:
    """How many times transformers' times are spd's, from the newest `bench-peers` record; none without one."""
    record = newest(records, "bench-peers")
    if record is None:
        return []
    rows = [row for row in (_row(record, i) for i in _range(record)) if "spd_ttft_ratio" in row][::-1]
    with style():
        figure = Figure(figsize=(9.0, 1.6 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (kind, title) in zip(axes, TIMES.items(), strict=True):
            _ratios(ax, rows, kind, title)
        axes[0].set_yticks(range(len(rows)), [f"{row['shape']}, {row['dtype']}, tp={row['tp']}" for row in rows])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        finish(figure, _caption(record))
    return [Sheet("peers", "Beside transformers", _caption(record), [record], figure)]


def _ratios(ax: Axes, rows: Sequence[dict], kind: str, title: str) -> None:
    names = {SPD: "spd", OVER_GLOO: "spd, over gloo as transformers"}
    for shift, (engine, name) in zip((0.19, -0.19), names.items(), strict=True):
        key = f"{engine}_{kind}_ratio"
        places = [i + shift for i, row in enumerate(rows) if key in row]
        ratios = [row[key] for row in rows if key in row]
        bars = ax.barh(places, ratios, height=0.36, color=COLOURS[engine], label=name, linewidth=0)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    ax.axvline(1, color="0.25", linewidth=1)
    ax.set(title=title, xlabel="transformers / spd")
    ax.margins(x=0.12)
    ax.grid(visible=False, axis="y")


def _range(record: Record) -> range:
    return range(len(value_in(record, "result", "rows")))


def peer_tables(records: Sequence[Record]) -> list[Table]:
    """The table of the newest `bench-peers` record, none without one."""
    record = newest(records, "bench-peers")
    return [] if record is None else [_peers(record)]


def _peers(record: Record) -> Table:
    rows = [_row(record, i) for i in _range(record)]
    formats = {"shape": "", "dtype": "", "tp": "d", "threads": "d"}
    for kind in ("ttft", "tpot"):
        for engine in (e for e in ENGINES if any(f"{e}_{kind}_ms" in row for row in rows)):
            formats |= {f"{engine}_{kind}_ms": ".2f", f"{engine}_{kind}_iqr": ".2f"}
        for engine in (e for e in ENGINES[:-1] if any(f"{e}_{kind}_ratio" in row for row in rows)):
            formats |= {f"{engine}_{kind}_ratio": ".2f"}
    if any("why_not" in row for row in rows):
        formats |= {"why_not": ""}
    formats |= {"repeats": "d", "logits_differ": ".1e"}
    return Table("peers", _caption(record), rows, formats, [record])


def _caption(record: Record) -> str:
    said = {"batch": "in the batch", "prompt_len": "prompt tokens", "new_tokens": "decoded"}
    setting = ", ".join(f"{number_in(record, 'result', key)} {words}" for key, words in said.items())
    return (
        "Time to first token and per output token beside transformers"
        f" {value_in(record, 'versions', 'transformers')} (SDPA; with tp processes its own tensor parallelism, tp_plan"
        " auto over gloo): the same random weights, the same threads a process, medians of interleaved repetitions and"
        " their interquartile range. With several processes spd talks through shared memory, and, in spd_over_gloo, the"
        " way transformers does. ratio = transformers / spd of the medians, above 1 where spd is ahead; logits_differ:"
        f" the largest difference of the first token's logits. {setting}; {machine(record)}."
    )


def _row(record: Record, i: int) -> dict:
    source = value_in(record, "result", "rows", i)
    row = {key: source[key] for key in ("shape", "dtype", "tp", "threads", "why_not", "logits_differ") if key in source}
    row["repeats"] = number_in(record, "result", "rows", i, "spd", "ttft_ms", "repeats")
    for engine in ENGINES:
        if engine in source:
            for kind in ("ttft", "tpot"):
                row[f"{engine}_{kind}_ms"] = number_in(record, "result", "rows", i, engine, f"{kind}_ms", "median")
                row[f"{engine}_{kind}_iqr"] = number_in(record, "result", "rows", i, engine, f"{kind}_ms", "spread")
    for engine, ratios in source.get("ratio", {}).items():
        row |= {f"{engine}_{kind}_ratio": ratio for kind, ratio in ratios.items()}
    return row
