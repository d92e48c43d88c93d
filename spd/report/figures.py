"""Figures as functions of records: panels, the sheets they stand on, and their bytes."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spd.report.captions import (
    overview_caption,
    perplexity_caption,
    sensitivity_caption,
    ttft_caption,
)
from spd.report.records import (
    Record,
    Sources,
    block_classes,
    count_in,
    curves_of,
    full_perplexity,
    number_in,
    numbers_in,
    provenance,
    taus_of,
    timings_of,
)

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _BROWN, _PINK, _GREY, _YELLOW, _SKY = sns.color_palette("colorblind")
CLASS_COLOURS = {"ISB": _BLUE, "SB": _ORANGE, "ESB": _PURPLE}
CLASS_NAMES = {"ISB": "ISB (in-sensitive)", "SB": "SB (sensitive)", "ESB": "ESB (extremely sensitive)"}
STRATEGY_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _BROWN, _SKY)
STRATEGY_NAMES = {
    "zs": "ZS: zero-shot",
    "b2b": "ZS + B2B distillation",
    "b2b+hg": "ZS + B2B + head grouping",
    "closed-form": "closed form",
    "best": "best recipe",
}
PART_COLOURS = {
    "compute_ms": ("computation", _BLUE),
    "real_ms": ("real collectives", _ORANGE),
    "emulated_ms": ("emulated link", "0.72"),
}
MARKERS = "osD^vP"
LOG_FROM = 8  # a span of positive values wider than this factor is drawn on a logarithmic axis
DPI, SCREEN_DPI = 200, 100  # of files, and in notebooks


def plain(value: float, _position: int | None = None) -> str:
    """A tick's label."""
    return f"{value:.4g}".replace("-", "−")


def _pale(colour: tuple[float, float, float]) -> tuple[float, ...]:
    """The colour on white at 40 %: unlike transparency it hides the grid behind a bar."""
    return tuple(0.4 * part + 0.6 for part in colour)


def _draw_sensitivity(ax: Axes, sources: Sources, values: Sequence[float], unit: str, taus: bool, narrow: bool) -> None:
    """Bars of `values` a block. `taus` adds the plan's thresholds, which are in perplexity points."""
    classes, dropped = block_classes(sources, len(values))
    lines = taus_of(sources) if taus else {}
    strong = [CLASS_COLOURS[c] for c in classes] if classes else [_BLUE] * len(values)
    colours = [colour if inside else _pale(colour) for colour, inside in zip(strong, dropped, strict=True)]
    ax.bar(range(len(values)), values, color=colours, width=0.8, linewidth=0)
    _scale_around_zero(ax, [*values, *lines.values()])
    for name, tau in lines.items():
        ax.axhline(tau, color="0.25", linestyle="--", linewidth=0.9)
        at = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(name if narrow else f"{name} = {tau:g}", (1, tau), (3, 0), va="center", **at)
    ax.axhline(0, color="0.25", linewidth=0.8)
    ax.set(xlabel="block", ylabel=f"sensitivity ({unit})", xlim=(-0.7, len(values) - 0.3))
    ax.xaxis.set_major_locator(MaxNLocator(8 if narrow else 16, integer=True, steps=[1, 2, 5, 10]))
    ax.grid(visible=False, axis="x")


def _scale_around_zero(ax: Axes, values: Sequence[float]) -> None:
    """Symmetric logarithmic axis when the sizes span more than a factor of 30, linear otherwise; room for labels."""
    sizes = sorted(abs(v) for v in values if v)
    if sizes and sizes[-1] > 30 * sizes[len(sizes) // 5]:
        small = max(sizes[len(sizes) // 5], sizes[-1] / 1e4)
        ax.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(small)), linscale=0.7)
        low, high = min(values), max(values)
        ax.set_ylim(2.5 * low if low < 0 else 0, 2.5 * high if high > 0 else 0)
    else:
        ax.margins(y=0.12)
    ax.yaxis.set_major_formatter(FuncFormatter(plain))


def _class_handles(sources: Sources, narrow: bool) -> list[Patch]:
    if sources.plan is None:
        return []
    classes, dropped = block_classes(sources, count_in(sources.plan, "result", "classes"))
    names = {c: c for c in CLASS_NAMES} if narrow else CLASS_NAMES
    handles = [Patch(color=CLASS_COLOURS[c], label=names[c]) for c in CLASS_COLOURS if c in classes]
    return handles + (
        [] if all(dropped) else [Patch(color="0.8", label="outside budget" if narrow else "outside the budget")]
    )


def _panel_sensitivity(ax: Axes, sources: Sources, narrow: bool = False) -> None:
    values = numbers_in(sources.sensitivity, "result", "sensitivity")
    _draw_sensitivity(ax, sources, values, "perplexity points", taus=True, narrow=narrow)
    handles = _class_handles(sources, narrow)
    if handles:
        _legend_above(ax, 4 if narrow else 2, narrow, handles=handles)


def _legend_above(ax: Axes, columns: int = 2, narrow: bool = False, **options: Any) -> None:
    """A legend over the panel, where no bar or line can lie under it."""
    compact = {"handlelength": 1.3, "columnspacing": 0.9, "handletextpad": 0.4, "frameon": False, "borderaxespad": 0.1}
    compact["fontsize"] = 7.5 if narrow else None
    ax.legend(loc="lower left", bbox_to_anchor=(-0.2 if narrow else -0.02, 1.0), ncols=columns, **compact, **options)


def _panel_perplexity(ax: Axes, sources: Sources, narrow: bool = False) -> None:
    curves, record = curves_of(sources.sweeps), sources.sweeps[-1]
    full, blocks = full_perplexity(curves, record), number_in(record, "model", "blocks")
    for i, (name, points) in enumerate(curves.items()):
        x, y = [p["percent"] for p in points], [p["perplexity"] for p in points]
        ax.plot(x, y, label=name.upper() if narrow else STRATEGY_NAMES.get(name, name), **line_style(i))
    ax.axhline(full, color="0.25", linestyle="--", linewidth=1, label=f"all full: {full:.4g}")
    highest = max(p["perplexity"] for points in curves.values() for p in points)
    if highest > LOG_FROM * full:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.set(ylabel="perplexity")
    axis_of_blocks(ax, blocks)
    ax.legend(loc="upper left")


def line_style(i: int) -> dict[str, Any]:
    """Of the i-th strategy."""
    style = {"color": STRATEGY_COLOURS[i % 6], "marker": MARKERS[i % 6], "markersize": 4}
    return style | {"clip_on": False, "zorder": 3}


def axis_of_blocks(ax: Axes, blocks: float) -> None:
    """Percentage of `blocks` dropped below, their number above."""
    ax.set(xlabel="blocks dropped (%)", xlim=(-2, 102))
    top = ax.secondary_xaxis("top", functions=(lambda p: p * blocks / 100, lambda b: b * 100 / blocks))
    top.set_xlabel("blocks dropped")
    top.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))


def _panel_ttft(ax: Axes, sources: Sources, narrow: bool = False) -> None:
    rows = timings_of(sources.bench)
    bottom = [0.0] * len(rows)
    for key, (label, colour) in PART_COLOURS.items():
        heights = [row[key] for row in rows]
        if any(heights):
            ax.bar(range(len(rows)), heights, bottom=bottom, label=label, color=colour, width=0.7, linewidth=0)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    error = [row["ttft_spread_ms"] / 2 for row in rows]
    ax.errorbar(range(len(rows)), bottom, error, fmt="none", ecolor="0.15", elinewidth=1, capsize=3)
    if all("formula_ms" in row for row in rows):
        formula = [row["formula_ms"] for row in rows]
        ax.plot(range(len(rows)), formula, "D:", color=_PURPLE, markersize=3.5, linewidth=1, label="by formula")
    bounds = sources.bench["result"].get("bounds") or {}
    for style, name in zip(("--", ":", "-."), bounds, strict=False):
        bound = number_in(sources.bench, "result", "bounds", name, "ttft_ms", "median")
        ax.axhline(bound, color="0.25", linestyle=style, linewidth=1, label=f"{name.replace('_', ' ')}: {bound:.4g} ms")
    stride = _stride(len(rows), 5 if narrow else 12)
    ax.set_xticks(range(0, len(rows), stride), _plan_labels(rows, "d" if narrow else ".3g")[::stride])
    ax.set(xlabel="blocks dropped", ylabel="time to first token (ms)")
    ax.grid(visible=False, axis="x")
    _legend_above(ax, narrow=narrow)


def _stride(count: int, most: int) -> int:
    """Every how many bars get a label: about `most` labels, the last bar's among them where that divides well."""
    least = math.ceil(count / most)
    return next((n for n in range(least, 2 * least + 1) if (count - 1) % n == 0), least)


def _plan_labels(rows: Sequence[dict], form: str) -> list[str]:
    """Tick labels: count and percentage; where two plans drop as many blocks, their letters too, run by run."""
    counts = [row["blocks_dropped"] for row in rows]
    labels = []
    for row in rows:
        label = f"{row['blocks_dropped']}\n{round(row['percent']) if form == 'd' else row['percent']:{form}} %"
        if counts.count(row["blocks_dropped"]) > 1:
            runs = [(letters, len(list(same))) for letters, same in groupby(row["plan"].split())]
            label += "\n" + "\n".join(f"{n}×{letters}" for letters, n in runs[:3]) + ("\n…" if len(runs) > 3 else "")
        labels.append(label)
    return labels


@dataclass(frozen=True)
class Sheet:
    """A figure and what is said about it."""

    name: str
    title: str
    caption: str
    records: Sequence[Record] = field(repr=False)
    figure: Figure = field(repr=False)

    def _repr_png_(self) -> bytes:
        """How a notebook shows it."""
        return render(self, "png", SCREEN_DPI)


def _block_width(count: int) -> float:
    return min(11.0, max(6.4, 3 + 0.13 * count))


def finish(figure: Figure, caption: str, size: float = 8) -> Figure:
    """The figure with its caption below, wrapped to its width."""
    width = int(figure.get_size_inches()[0] * 72 / (size * 0.54))
    figure.supxlabel(
        textwrap.fill(caption, width, break_on_hyphens=False), x=0.01, ha="left", fontsize=size, color="0.25"
    )
    return figure


def _figure_sensitivity(sources: Sources) -> Figure:
    nats = numbers_in(sources.sensitivity, "result", "sensitivity_nats")
    figure = Figure(figsize=(_block_width(len(nats)), 5.4), layout="constrained")
    points_ax, nats_ax = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _panel_sensitivity(points_ax, sources)
    _draw_sensitivity(nats_ax, sources, nats, "nats", taus=False, narrow=False)
    points_ax.set_xlabel("")
    return finish(figure, sensitivity_caption(sources))


def figure_single(draw: Callable, caption: str, sources: Sources, width: float) -> Figure:
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    draw(figure.subplots(), sources)
    return finish(figure, caption)


def _figure_overview(sources: Sources) -> Figure:
    panels = {"sensitivity of each block": sources.sensitivity and _panel_sensitivity}
    panels["perplexity"] = sources.sweeps and _panel_perplexity
    panels["time to first token"] = sources.bench and _panel_ttft
    chosen = {title: draw for title, draw in panels.items() if draw}
    figure = Figure(figsize=(3.3 * len(chosen), 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for ax, draw in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen.values(), strict=True):
        draw(ax, sources, narrow=True)
    return finish(figure, overview_caption(sources))


def style() -> ExitStack:
    """The look of every figure, as a context to draw in."""
    stack = ExitStack()
    stack.enter_context(sns.plotting_context("paper"))
    stack.enter_context(sns.axes_style("whitegrid"))
    stack.enter_context(mpl.rc_context({"svg.hashsalt": "spd"}))
    return stack


def sensitivity_sheet(sources: Sources, caption: str) -> Sheet:
    used = [record for record in (sources.sensitivity, sources.plan) if record]
    with style():
        figure = _figure_sensitivity(sources)
    return Sheet("sensitivity" + sources.suffix, "Sensitivity", caption, used, figure)


def sheets(single: Sequence[Sources], combined: Sequence[Sources]) -> list[Sheet]:
    sheets = []
    with style():
        for s in single:
            if s.sensitivity:
                sheets.append(sensitivity_sheet(s, sensitivity_caption(s)))
            if s.sweeps:
                figure = figure_single(_panel_perplexity, perplexity_caption(s), s, 6.4)
                sheets.append(Sheet("perplexity" + s.suffix, "Perplexity", perplexity_caption(s), s.sweeps, figure))
            if s.bench:
                whole = next((c for c in combined if c.bench is s.bench), s)
                width = max(6.4, 2 + 0.7 * len(timings_of(s.bench)))
                figure = figure_single(_panel_ttft, ttft_caption(whole), s, width)
                sheets.append(Sheet("ttft" + s.suffix, "Time to first token", ttft_caption(whole), [s.bench], figure))
        for s in combined:
            if len([x for x in (s.sensitivity, s.sweeps, s.bench) if x]) > 1:
                figure = _figure_overview(s)
                sheets.append(Sheet("overview" + s.suffix, "Overview", overview_caption(s), s.present(), figure))
    return sheets


def render(sheet: Sheet, form: str, dpi: int = DPI) -> bytes:
    """The figure as SVG or PNG bytes, the same for the same records."""
    source = provenance(sheet.records)
    if form == "svg":
        metadata = {
            "Title": sheet.title,
            "Description": sheet.caption,
            "Source": source,
            "Date": None,
            "Creator": "spd",
        }
    else:
        metadata = {"Title": sheet.title, "Description": sheet.caption, "Source": source, "Software": "spd"}
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "spd", "font.family": "DejaVu Sans"}):
        sheet.figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
    return buffer.getvalue()
