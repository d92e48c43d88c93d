"""Records to figures and tables: sensitivity, perplexity, accuracy on tasks, time to first token, and all on one sheet.

The same records give the same bytes, and every file names its records and their commits. Each `..._figure` takes a
table of `spd.tables`, which has the numbers, and returns a matplotlib Figure with its caption below.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spd.errors import SPDError
from spd.records import load_records, write_bytes
from spd.tables import (
    CLASSES,
    Record,
    Table,
    asked_words,
    by_subject,
    curve_of,
    data_words,
    link_words,
    machine,
    newest,
    number,
    provenance,
    subject,
    tables,
    tables_of,
    timing_words,
)

BLUE, ORANGE, GREEN, RED, PURPLE, *_ = COLOURS = sns.color_palette("colorblind")
STYLE = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper"), "font.sans-serif": ["DejaVu Sans"]}
CLASS_COLOURS = {"ISB": BLUE, "SB": ORANGE, "ESB": PURPLE}
STRATEGIES = {
    "zs": "ZS: zero-shot",
    "b2b": "ZS + B2B distillation",
    "b2b+hg": "ZS + B2B + head grouping",
    "closed-form": "closed form",
    "best": "best recipe",
}
PARTS = {
    "compute_ms": ("computation", BLUE),
    "real_ms": ("real collectives", ORANGE),
    "emulated_ms": ("emulated link", "0.72"),
}
UNITS = {"sensitivity": "perplexity points", "sensitivity_nats": "nats"}
MARKERS = "osD^vP"
LOG_FROM = 8  # a span of perplexities wider than this factor is drawn on a logarithmic axis
TITLE = "# Tables\n\nMade from the records named under each table; nothing is typed in.\n"
plain = FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "−"))  # a tick's label


# ---------------------------------------------------------------- files


def report(records: Iterable[Path | str], out: Path | str) -> dict:
    """Write the figures (PNG) and tables (CSV, `tables.md`) of record files or folders into `out`.

    The newest record of each kind, model and tp counts; of several models or degrees each gets its own files. Returns
    `{"files": [paths written]}`.
    """
    return write(records, out, tables, figures)


def write(records: Iterable[Path | str], out: Path | str, tables: Callable, figures: Callable) -> dict:
    """What `tables` and `figures` make of record files or folders, all made before the first file is written."""
    out, loaded = Path(out), load_records(records)
    with rc_context(STYLE):
        found, drawn = tables(loaded), figures(loaded)
        if not found and not drawn:
            raise SPDError(f"None of the {len(loaded)} records is of a kind drawn here: there is nothing to report.")
        content = {out / f"{name}.png": png(figure) for name, figure in drawn.items()}
    content |= {out / f"{t.name}.csv": t.frame.to_csv(index=False, lineterminator="\n").encode() for t in found}
    content[out / "tables.md"] = markdown(found).encode()
    for path, data in content.items():
        write_bytes(path, data)
    return {"files": [str(path) for path in content]}


def markdown(found: Sequence[Table], title: str = TITLE) -> str:
    """Tables under their names, captions and sources."""
    parts = [title]
    for table in found:
        caption = f"{table.caption} {table.columns}".strip() + "\n\n" * bool(table.caption)
        source = f"\n\nSource: {provenance(table.records)}." if table.records else ""
        parts.append(f"## {table.name}\n\n{caption}{table.markdown()}{source}\n")
    return "\n".join(parts)


def png(figure: Figure) -> bytes:
    """The same bytes for the same records, which they name."""
    metadata = {"Description": figure.caption, "Source": provenance(figure.records), "Software": "spd"}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata=metadata)
    return buffer.getvalue()


def finish(figure: Figure, caption: str, records: Sequence[Record], size: float = 8) -> Figure:
    """The figure with its caption below, wrapped to its width, and the records that `png` names."""
    figure.caption, figure.records = caption, records
    width = int(figure.get_size_inches()[0] * 72 / (size * 0.54))
    wrapped = textwrap.fill(caption, width, break_on_hyphens=False)
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=size, color="0.25")
    return figure


# ---------------------------------------------------------------- figures


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Of `load_records`' records every figure by its name."""
    found = {}
    for end, mine in by_subject(records):
        made = tables_of(mine)
        found |= {name + end: draw(made[name]) for name, draw in FIGURES.items() if name in made}
        for of, name in {"average": "accuracy", "mmlu": "accuracy-mmlu"}.items():
            if "accuracy" in made and of in made["accuracy"].frame:
                found[name + end] = accuracy_figure(made["accuracy"], of)
    for end, mine in by_subject(records, by=["model"]):
        accuracy = newest(mine, "sensitivity") or newest(mine, "sweep")
        mine = [r for r in mine if r["command"] == "bench" or not accuracy or r["tp"] == accuracy["tp"]]
        made = [table for name, table in tables_of(mine).items() if name in FIGURES]
        if len(made) > 1:
            found["overview" + end] = overview_figure(made)
    return found


def sensitivity_figure(table: Table) -> Figure:
    """The paper's figure 4: bars a block in perplexity points, and in nats."""
    figure = canvas(min(11.0, max(6.4, 3 + 0.13 * len(table.frame))), 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    taus = {sign: plan["result"][key] for plan in table.records[1:] for sign, key in (("τ₁", "tau1"), ("τ₂", "tau2"))}
    _sensitivity_panel(upper, table, "sensitivity", taus)
    _sensitivity_panel(lower, table, "sensitivity_nats", {})
    upper.set_xlabel("")
    _class_legend(upper, table.frame, CLASSES, columns=2)
    return finish(figure, table.caption, table.records)


def _sensitivity_panel(ax: Axes, table: Table, column: str, taus: Mapping[str, float]) -> None:
    frame = table.frame
    colours = frame["class"].map(CLASS_COLOURS) if "class" in frame else [BLUE] * len(frame)
    if "dropped" in frame:  # outside the budget pale, which unlike transparency hides the grid
        pale = [[0.4 * part + 0.6 for part in colour] for colour in colours]
        colours = colours.where(frame["dropped"] == "yes", pale)
    ax.bar(frame["block"], frame[column], color=colours, width=0.8, linewidth=0)
    sizes = sorted(abs(v) for v in (*frame[column], *taus.values()) if v)
    if sizes and sizes[-1] > 30 * sizes[len(sizes) // 5]:
        small = max(sizes[len(sizes) // 5], sizes[-1] / 1e4)
        ax.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(small)), linscale=0.7)
    for name, tau in taus.items():
        ax.axhline(tau, color="0.25", linestyle="--", linewidth=0.9)
        ax.annotate(name, (1, tau), (3, 0), xycoords=ax.get_yaxis_transform(), textcoords="offset points", va="center")
    ax.margins(y=0.12)
    ax.axhline(0, color="0.25", linewidth=0.8)
    ax.set(xlabel="block", ylabel=f"sensitivity ({UNITS[column]})", xlim=(-0.7, len(frame) - 0.3))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(plain)
    ax.grid(visible=False, axis="x")


def _class_legend(ax: Axes, frame: pd.DataFrame, words: Mapping[str, str], columns: int) -> None:
    if "class" in frame:
        handles = [Patch(color=CLASS_COLOURS[c], label=words[c]) for c in CLASSES if c in set(frame["class"])]
        handles += [] if all(frame["dropped"] == "yes") else [Patch(color="0.8", label="outside budget")]
        legend_above(ax, columns, handles=handles)


def legend_above(ax: Axes, columns: int = 2, **options: Any) -> None:
    """Over the panel, where no bar or line can lie under it."""
    compact = {"handlelength": 1.3, "columnspacing": 0.9, "handletextpad": 0.4, "frameon": False, "fontsize": 7.5}
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=columns, borderaxespad=0.1, **compact, **options)


def axis_of_blocks(ax: Axes, blocks: float) -> None:
    """Percentage of `blocks` dropped below, their number above."""
    ax.set(xlabel="blocks dropped (%)", xlim=(-2, 102))
    top = ax.secondary_xaxis("top", functions=(lambda p: p * blocks / 100, lambda b: b * 100 / blocks))
    top.set_xlabel("blocks dropped")
    top.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))


def _single(panel: Callable[[Axes, Table], None], table: Table, width: float = 6.4) -> Figure:
    figure = canvas(width, 4.4)
    panel(figure.subplots(), table)
    return finish(figure, table.caption, table.records)


def _perplexity_panel(ax: Axes, table: Table) -> None:
    frame = table.frame.replace({"strategy": STRATEGIES})
    look = {"markers": True, "dashes": False, "palette": "colorblind", "zorder": 3}
    sns.lineplot(frame, x="percent", y="perplexity", hue="strategy", style="strategy", ax=ax, **look)
    full = frame.loc[frame["blocks"] == 0, "perplexity"].iloc[0]
    ax.axhline(full, color="0.25", linestyle="--", linewidth=1, label=f"all full: {full:.4g}")
    if frame["perplexity"].max() > LOG_FROM * full:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(plain)
    ax.set(ylabel="perplexity")
    axis_of_blocks(ax, number(table.records[-1], "model", "blocks"))
    ax.legend(loc="upper left")


def accuracy_figure(table: Table, of: str = "average") -> Figure:
    """The upper panels of the paper's figures 7 and 8 (`average`), and figure 9 (`mmlu`)."""
    tasks = table.records[-1]["result"]["curve"][0]["tasks"]
    tasks = {name: task for name, task in tasks.items() if (name == "mmlu") == (of == "mmlu")}
    place = of if of == "average" else f"tasks.{of}"
    columns = {"acc": "acc", "stderr": "compared.stderr", "full": "compared.acc_full"}
    frame = curve_of(table.records, {name: f"{place}.{at}" for name, at in columns.items()})
    kind = f"mean over {len(tasks)} tasks of the" if of == "average" else of
    caption = (
        f"Accuracy ({kind} harness's acc) against the share of blocks that drop their attention sync point; bars:"
        " standard error of the difference from the model with every sync point kept (dashed) on the same questions;"
        f" dotted: guessing. {asked_words(table.records[-1], tasks)}"
    )
    chance = fmean(task["chance"] for task in tasks.values())
    return _single(partial(_accuracy_panel, chance=chance), Table(of, caption, frame, table.records))


def _accuracy_panel(ax: Axes, table: Table, chance: float) -> None:
    curves = table.frame.groupby("strategy", sort=False)
    for i, (name, points) in enumerate(curves):
        x = points["percent"] + 0.8 * (i - (len(curves) - 1) / 2)  # beside one another, so that all bars are seen
        look = {"color": COLOURS[i], "marker": MARKERS[i % 6], "markersize": 4, "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(x, 100 * points["acc"], 100 * points["stderr"], label=STRATEGIES.get(name, name), **look)
    full = 100 * table.frame["full"].iloc[-1]
    ax.axhline(full, color="0.25", linestyle="--", linewidth=1, label=f"all full: {full:.1f} %")
    ax.axhline(100 * chance, color="0.5", linestyle=":", linewidth=1, label=f"guessing: {100 * chance:.1f} %")
    axis_of_blocks(ax, number(table.records[-1], "model", "blocks"))
    ax.set(ylabel=f"{table.name.replace('average', 'average accuracy')} (%)", xlim=(-4, 104))  # the markers' room
    ax.legend(loc="best")


def ttft_figure(table: Table) -> Figure:
    """The paper's figure 7's times as bars a plan."""
    return _single(_ttft_panel, table, max(6.4, 2 + 0.7 * len(table.frame)))


def _ttft_panel(ax: Axes, table: Table, narrow: bool = False) -> None:
    frame, bounds, bottom = table.frame, table.records[0]["result"].get("bounds") or {}, 0.0
    parts = PARTS if frame["compute_ms"].notna().all() else {"ttft_median_ms": ("computation and collectives", BLUE)}
    for key, (label, colour) in parts.items():
        if frame[key].any():
            ax.bar(frame.index, frame[key], bottom=bottom, label=label, color=colour, width=0.7, linewidth=0)
        bottom = bottom + frame[key]
    ax.errorbar(frame.index, bottom, frame["ttft_spread_ms"] / 2, fmt="none", ecolor="0.15", elinewidth=1, capsize=3)
    if "formula_ms" in frame:
        ax.plot(frame.index, frame["formula_ms"], "D:", color=PURPLE, markersize=3.5, linewidth=1, label="by formula")
    for style, name in zip(("--", ":", "-."), bounds, strict=False):
        bound = number(table.records[0], "result", "bounds", name, "ttft_ms", "median")
        ax.axhline(bound, color="0.25", linestyle=style, linewidth=1, label=f"{name.replace('_', ' ')}: {bound:.4g} ms")
    shown = frame.iloc[:: math.ceil(len(frame) / (5 if narrow else 12))]
    ax.set_xticks(shown.index, shown["blocks_dropped"].astype(str) + shown["percent"].map("\n{:.3g} %".format))
    ax.set(xlabel="blocks dropped", ylabel="time to first token (ms)")
    ax.grid(visible=False, axis="x")
    if narrow:
        ax.set_ylim(top=1.5 * ax.get_ylim()[1])
        ax.legend(loc="upper left", ncols=2, fontsize=7)
    else:
        legend_above(ax)


def overview_figure(made: Sequence[Table]) -> Figure:
    """Sensitivity, perplexity and time to first token of one model side by side: those of the three that are made."""
    with rc_context({"legend.fontsize": 7, "font.size": 8}):
        figure = canvas(4.6 * len(made), 4.4)
        figure.get_layout_engine().set(wspace=0.06)
        for ax, table in zip(figure.subplots(1, len(made)), made, strict=True):
            OVERVIEW[table.name](ax, table)
            if ax.get_legend():
                ax.get_legend().set_in_layout(False)  # else a wide legend takes the panels' room
    words, by_name = [], {table.name: table for table in made}
    for name, table in by_name.items():
        record = table.records[0 if name == "sensitivity" else -1]
        about = (timing_words, link_words) if name == "ttft" else (subject, data_words)
        words.append(", ".join(of(record) for of in about))
    if {"perplexity", "ttft"} <= by_name.keys():
        swept = by_name["perplexity"]
        same = set(by_name["ttft"].frame["blocks_dropped"]) <= set(swept.frame["blocks"])
        words[-1] += f", {'the same' if same else 'other'} numbers of dropped blocks {'as' if same else 'than'}"
        words[-1] += f" the perplexities at tp={swept.records[-1]['tp']}"
    sides = ("Left", "Middle", "Right") if len(words) == 3 else ("Left", "Right")
    caption = " ".join(f"{side}: {text}." for side, text in zip(sides, words, strict=True))
    used = [record for table in made for record in table.records]
    return finish(figure, f"{caption} {machine(used[-1])}.", used)


def _overview_sensitivity(ax: Axes, table: Table) -> None:
    _sensitivity_panel(ax, table, "sensitivity", {})
    _class_legend(ax, table.frame, {name: name for name in CLASSES}, columns=4)


# By the kind of a table: its figure, and its panel of the overview.
FIGURES = {"sensitivity": sensitivity_figure, "perplexity": partial(_single, _perplexity_panel), "ttft": ttft_figure}
OVERVIEW = {
    "sensitivity": _overview_sensitivity,
    "perplexity": _perplexity_panel,
    "ttft": partial(_ttft_panel, narrow=True),
}
