"""What each step of a repair gives, and the paper's table 1: records of `ablate` and `table1`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from spd.report.figures import MARKERS, STRATEGY_COLOURS, Sheet, finish
from spd.report.records import Record, model_key, number_in, value_in
from spd.report.table import Table


def ablation_tables(records: Sequence[Record]) -> list[Table]:
    """One table of all `ablate` records and one of all `table1` records; of one model, tp, text and plan the newest."""
    makers = {"ablate": _ablation, "table1": _table1}
    return [make(chosen) for command, make in makers.items() if (chosen := _newest(records, command))]


def ablation_sheets(records: Sequence[Record]) -> list[Sheet]:
    """One figure of all `ablate` records."""
    chosen = _newest(records, "ablate")
    if not chosen:
        return []
    with sns.plotting_context("paper"), sns.axes_style("whitegrid"), mpl.rc_context({"svg.hashsalt": "spd"}):
        table = _ablation(chosen)
        caption = "Share of the loss that dropping adds (in nats) and that a repair takes back, on text that it has not"
        caption += " seen; right is better, 100 % is the model with every sync point kept. " + _windows(chosen)
        return [Sheet("ablation", "What each step of a repair gives", caption, table.records,
                      _figure(table, list(chosen), caption))]  # fmt: skip


def _figure(table: Table, subjects: list[str], caption: str) -> Figure:
    rows = table.rows[1:]  # without the model whose sync points are all kept
    figure = Figure(figsize=(8.2, 1.6 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for i, subject in enumerate(subjects):
        values = [row.get(f"{subject}: recovered %") for row in rows]
        places = [place + 0.16 * (i - (len(subjects) - 1) / 2) for place in range(len(rows))]
        colour, marker = STRATEGY_COLOURS[i % len(STRATEGY_COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(values, places, marker, color=colour, markersize=5, label=subject)
    ax.axvline(0, color="0.25", linewidth=0.8)
    ax.axvline(100, color="0.25", linewidth=0.8, linestyle="--")
    ax.set(yticks=range(len(rows)), yticklabels=[row["repair"] for row in rows], xlabel="loss taken back (%)")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(left=max(ax.get_xlim()[0], -60), right=106)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return finish(figure, caption)


def _newest(records: Sequence[Record], command: str) -> dict[str, Record]:
    return {_subject(r): r for r in records if r["command"] == command}


def _subject(record: Record) -> str:
    text = Path(str(value_in(record, "data", "text"))).stem
    dropped = str(value_in(record, "plan")).split().count("DF")
    blocks = len(str(record["plan"]).split())
    where = "all blocks" if dropped == blocks else f"{dropped} of {blocks} blocks"
    return f"{model_key(record)[0]}, {text}, tp={value_in(record, 'tp')}, {where}"


def _ablation(chosen: dict[str, Record]) -> Table:
    rows: dict[str, dict] = {}
    for subject, record in chosen.items():
        for i, variant in enumerate(value_in(record, "result", "variants")):
            row = rows.setdefault(variant["name"], {"repair": variant["name"]})
            row[subject] = number_in(record, "result", "variants", i, "perplexity")
            row[f"{subject}: recovered %"] = 100 * number_in(record, "result", "variants", i, "recovered")
            row[f"{subject}: seconds"] = number_in(record, "result", "variants", i, "seconds")
    formats = {"repair": ""}
    for subject in chosen:
        formats |= {subject: ".2f", f"{subject}: recovered %": ".0f", f"{subject}: seconds": ".0f"}
    caption = "What each step of a repair gives: perplexity with attention syncs dropped, on text the repairs have not"
    caption += " seen; the share of the loss (in nats) that zero-shot adds and the repair takes back; seconds it took. "
    return Table("ablation", caption + _windows(chosen), list(rows.values()), formats, list(chosen.values()),
                 essential=("repair", *chosen))  # fmt: skip


def _windows(chosen: dict[str, Record]) -> str:
    parts = []
    for subject, record in chosen.items():
        counts = value_in(record, "result", "windows")
        seq_len = value_in(record, "data", "seq_len")
        parts.append(f"{subject}: {counts['calibration']} calibration and {counts['evaluation']} evaluation windows of"
                     f" {seq_len} tokens")  # fmt: skip
    return "; ".join(parts) + "."


def _table1(chosen: dict[str, Record]) -> Table:
    rows = []
    for subject, record in chosen.items():
        row = {"model": subject}
        for kind in ("residual", "bias"):
            for i, design in enumerate(value_in(record, "result", kind)):
                name = f"{kind}: {design['design']}" if design["design"] == "no SPD" else design["design"]
                row[name] = number_in(record, "result", kind, i, "perplexity")
        rows.append(row)
    formats = {"model": ""} | {name: ".2f" for name in rows[0] if name != "model"}
    caption = (
        "The paper's table 1 on small real models: perplexity where an SPD block adds its attention output (residual)"
        " before the one all-reduce, as the method does, or after it, so that it stays with its shard for good; and"
        " where the output projection's bias is added after it, as the method does, or before it, tp times. The biases"
        " are the values' means, taken from the values and given back after the projection: the same function."
    )
    return Table("table1", caption, rows, formats, list(chosen.values()))
