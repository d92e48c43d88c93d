"""Figures of predictions: records of `predict-paper`, drawn beside what the paper says."""

from collections.abc import Iterable, Sequence

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from spd.report.figures import MARKERS, Sheet, finish, plain
from spd.report.records import Record, newest, value_in

COLOURS = sns.color_palette("colorblind")
KINDS = {"stated": ("ring over the stated link", COLOURS[7], ":", "^"),
         "measured": ("NCCL's table", COLOURS[0], "--", "s"),
         "fitted": ("fitted to the axis", COLOURS[1], "-", "o")}  # fmt: skip
PARTS = {"matrix products": COLOURS[0], "attention": COLOURS[2], "pointwise": COLOURS[9], "communication": COLOURS[1]}
REDUCTION = "paper, as reduction"
OUTLINE = withStroke(linewidth=1.8, foreground="0.2")  # of white words that cross white lines
WIDTH = 9.6


def predicted_sheets(records: Sequence[Record]) -> list[Sheet]:
    """Figures of the newest `predict-paper` record, none without one."""
    chosen = newest(records, "predict-paper")
    if chosen is None:
        return []
    with sns.plotting_context("paper"), sns.axes_style("whitegrid"), mpl.rc_context({"svg.hashsalt": "spd"}):
        return [draw(chosen) for draw in (_transfer, _speedup, _links, _time, _decode)]


def _unique(rows: Iterable[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _asked(record: Record) -> str:
    """The paper's setting, which every prediction here is for."""
    asked = value_in(record, "result", "asked")
    return f"tp={asked['tp']}, batch {asked['batch']}, {asked['prompt_len']} tokens in"


def _sheet(record: Record, name: str, title: str, caption: str, figure: Figure) -> Sheet:
    return Sheet(f"predicted-{name}", title, caption, [record], finish(figure, caption))


def _below(figure: Figure, handles: list, columns: int) -> None:
    """One legend for all panels, over them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


# ---------------------------------------------------------------- figure 2


def _transfer(record: Record) -> Sheet:
    rows = value_in(record, "result", "figure2")
    settings = _unique(rows, "setting")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    for ax, setting in zip(figure.subplots(1, len(settings)), settings, strict=True):
        _panel_transfer(ax, [row for row in rows if row["setting"] == setting])
        ax.set_title(setting)
    ax = figure.axes[0]
    ax.set_ylabel("transfer time (ms)")
    handles = [Line2D([], [], color=c, linestyle=s, marker=m, label=label) for label, c, s, m in KINDS.values()]
    _below(figure, [*handles, Line2D([], [], color="0.25", linewidth=1, label="end of the paper's axis")], 4)
    fill = value_in(record, "result", "fits", "axis_fill")
    caption = (
        f"Predicted time of all all-reduces of a prefill of LLaMA2-70B ({_asked(record)}) against the share of"
        " blocks that drop their attention sync point: figure 2 of the paper. See how far a ring over the link that the"
        f" paper states stays below the axis it needs: the fitted links reach {fill:.0%} of it at 0 %, as NCCL's table"
        " does on 1x8 HBW."
    )
    return _sheet(record, "figure2", "Transfer time, predicted", caption, figure)


def _panel_transfer(ax: Axes, rows: list[dict]) -> None:
    for kind, (_, colour, style, marker) in KINDS.items():
        values = [row.get(f"{kind}_ms") for row in rows]
        if values[0] is not None:
            ax.plot([row["percent"] for row in rows], values, color=colour, linestyle=style, marker=marker,
                    markersize=4, zorder=3)  # fmt: skip
    axis = rows[0]["axis_upper_ms"]
    ax.axhline(axis, color="0.25", linewidth=1)
    ax.set(xlabel="blocks dropped (%)", ylim=(0, 1.08 * axis), xlim=(-4, 104))


# ---------------------------------------------------------------- figure 7


def _speedup(record: Record) -> Sheet:
    rows, launches = value_in(record, "result", "figure7"), value_in(record, "result", "regimes")
    shapes, settings = _unique(rows, "shape"), _unique(rows, "setting")
    names = {REDUCTION: "links and launch fitted to the paper", "lean": "lean: no launch time"}
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    grid = figure.subplots(len(names), len(shapes), sharex=True, sharey="row")
    for axes, (regime, words) in zip(grid, names.items(), strict=True):
        for ax, shape in zip(axes, shapes, strict=True):
            _panel_speedup(ax, [r for r in rows if (r["regime"], r["shape"]) == (regime, shape)], settings)
            if regime == REDUCTION:
                _mark_claims(ax, shape, value_in(record, "result", "claims"))
                ax.set_title(shape)
            else:
                ax.set_xlabel("blocks dropped (%)")
        axes[0].set_ylabel(f"TTFT reduction (%)\n{words}")
        axes[0].set_ylim(bottom=0)  # after all of the row, whose scale it shares, is drawn
    handles = [Line2D([], [], color=COLOURS[i], marker=MARKERS[i], label=s) for i, s in enumerate(settings)]
    handles.append(Line2D([], [], color="0.15", marker="*", linestyle="", markersize=10, label="paper: equal to"))
    handles.append(
        Line2D([], [], color="0.15", marker="^", linestyle="", markersize=7, fillstyle="none", label="paper: more than")
    )
    _below(figure, handles, 6)
    caption = (
        "Predicted reduction of the time to first token, 1 - t_p/t_0, against the share of blocks that drop their"
        f" attention sync point: figure 7's lower panels ({_asked(record)}, A100). Above: links fitted to"
        f" figure 2's axis and {launches[REDUCTION]:.0f} µs of launch an operator, fitted to the star alone; triangles"
        " are the paper's lower bounds for two nodes, the one at 100 % for 2x4 LBW alone. Below: CUDA graphs, NCCL's"
        " table, and LBW at the rate that the paper states (on two nodes no slower than the table, so that the lines"
        " coincide). See that the same dropped blocks gain more where nothing is lost to launching, most of all on fast"
        " links."
    )
    return _sheet(record, "figure7", "Reduction of time to first token, predicted", caption, figure)


def _panel_speedup(ax: Axes, rows: list[dict], settings: list[str]) -> None:
    for i, setting in enumerate(settings):
        mine = [row for row in rows if row["setting"] == setting]
        ax.plot([r["percent"] for r in mine], [100 * r["reduction"] for r in mine], color=COLOURS[i],
                marker=MARKERS[i], markersize=4, zorder=3)  # fmt: skip
    ax.set_xlim(-3, 105)


def _mark_claims(ax: Axes, shape: str, claims: list[dict]) -> None:
    settings = _unique(claims, "setting")
    for claim in claims:
        if claim["shape"] == shape and claim["where"] == "figure 7":
            equal = claim["relation"] == "="
            colour = COLOURS[settings.index(claim["setting"])] if equal else "white"
            ax.plot(claim["percent"], claim["paper"], "*" if equal else "^", color=colour, zorder=5,
                    markersize=13 if equal else 8, markeredgecolor="0.15")  # fmt: skip


# ---------------------------------------------------------------- where dropping pays


def _links(record: Record) -> Sheet:
    heat = value_in(record, "result", "heat_map")
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    top = 100 * (max(max(max(row) for row in heat["speedup"][kind]) for kind in heat["speedup"]) - 1)
    for ax, (kind, title) in zip(axes, {"ttft": "time to first token", "tpot": "time per output token"}.items(),
                                 strict=True):  # fmt: skip
        mesh = _panel_links(ax, heat, kind, top)
        ax.set(title=title, xlabel="bandwidth of the slowest hop (GB/s)")
    axes[0].set_ylabel("latency of an all-reduce (µs)")
    figure.colorbar(mesh, ax=axes, label="speedup (%)", pad=0.02)
    caption = (
        f"Predicted speedup t_0/t_p - 1 of {heat['shape']} on A100 with {heat['percent']} % of the blocks dropped, over"
        f" links of every bandwidth and latency, without launch time ({_asked(record)}). White: contours. Dots: the"
        " paper's settings as stated; crosses: as figure 2's axis implies. See that bandwidth decides for the first"
        " token and latency for the following ones."
    )
    return _sheet(record, "links", "Where dropping pays, predicted", caption, figure)


def _panel_links(ax: Axes, heat: dict, kind: str, top: float):
    x = [b / 1e9 for b in heat["bandwidths"]]
    y = [1e6 * a for a in heat["latencies"]]
    z = [[100 * (value - 1) for value in row] for row in heat["speedup"][kind]]
    mesh = ax.pcolormesh(x, y, z, cmap="viridis", vmin=0, vmax=top, shading="gouraud", rasterized=True)
    ax.set(xscale="log", yscale="log")  # before the contours, whose labels are placed by it
    lines = ax.contour(x, y, z, levels=(5, 10, 20, 30), colors="white", linewidths=0.8)
    ax.clabel(lines, fmt="%g %%", fontsize=7)
    for name, link in heat["marks"].items():
        fitted = name.endswith("fitted")
        at = (link["bandwidth"] / 1e9, 1e6 * link["latency"])
        ax.plot(*at, "x" if fitted else "o", color="white", markeredgecolor="white" if fitted else "0.1", markersize=6)
        above = "2x4 LBW" in name
        place = {"va": "bottom", "xytext": (0, 6)} if above else {"va": "top", "xytext": (0, -6)}
        words = {"fontsize": 7, "color": "white", "path_effects": [OUTLINE], "textcoords": "offset points"}
        ax.annotate(name.removesuffix(", fitted"), at, ha="center", **words, **place)
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.grid(visible=False)
    return mesh


# ---------------------------------------------------------------- where the time goes


def _time(record: Record) -> Sheet:
    rows = value_in(record, "result", "where_time_goes")
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for ax, (kind, title) in zip(axes, {"ttft": "TTFT", "tpot": "TPOT"}.items(), strict=True):
        _panel_time(ax, [row for row in rows if row["time"] == kind])
        ax.set_ylabel(f"share of {title} (%)")
    _below(figure, [Patch(color=colour, label=name) for name, colour in PARTS.items()], len(PARTS))
    caption = (
        f"Where the predicted time goes with every sync point kept ({_asked(record)}, A100, no launch time); above each"
        " bar its whole time in ms. LBW is the slower of NCCL's table and a ring at the rate that the paper states: on"
        " two nodes, and for the few bytes of a decode step, that is the table, so that those bars equal HBW's."
        " Dropping all attention sync points removes half of the orange part."
    )
    return _sheet(record, "time", "Where the time goes, predicted", caption, figure)


def _panel_time(ax: Axes, rows: list[dict]) -> None:
    shapes = _unique(rows, "shape")
    at = [i + 0.6 * shapes.index(row["shape"]) for i, row in enumerate(rows)]
    bottom = [0.0] * len(rows)
    totals = [sum(row["parts_ms"].values()) for row in rows]
    for part, colour in PARTS.items():
        heights = [100 * row["parts_ms"][part] / total for row, total in zip(rows, totals, strict=True)]
        ax.bar(at, heights, bottom=bottom, color=colour, width=0.8, linewidth=0)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, total in zip(at, totals, strict=True):
        ax.annotate(f"{total:.3g}", (x, 100), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set(ylim=(0, 109), yticks=range(0, 101, 25))
    short = [row["setting"].replace(" ", "\n") for row in rows]
    middle = {len(rows) // len(shapes) * i + 1: shape for i, shape in enumerate(shapes)}
    ax.set_xticks(at, [f"{label}\n{middle.get(i, '')}" for i, label in enumerate(short)])
    ax.grid(visible=False, axis="x")


# ---------------------------------------------------------------- the decode benchmark


def _decode(record: Record) -> Sheet:
    check = value_in(record, "result", "decode_check", "checks", "each row held out in turn")
    rows = check["predicted"]
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.subplots()
    kinds = {("no_comm", "on"): "no communication", ("standard", "on"): "P2P on", ("standard", "off"): "P2P off"}
    for i, (kind, label) in enumerate(kinds.items()):
        mine = [row for row in rows if (row["variant"], row["p2p"]) == kind]
        ax.plot([r["measured_ms"] for r in mine], [r["predicted_ms"] for r in mine], MARKERS[i],
                color=COLOURS[i], label=label, markersize=5, zorder=3)  # fmt: skip
    ends = [0.9 * min(r["measured_ms"] for r in rows), 1.1 * max(r["measured_ms"] for r in rows)]
    ax.plot(ends, ends, color="0.25", linewidth=1)
    ax.fill_between(ends, [0.9 * e for e in ends], [1.1 * e for e in ends], color="0.9", label="within 10 %", zorder=0)
    ax.set(xlabel="measured time a step (ms)", ylabel="predicted time a step (ms)", xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(FuncFormatter(plain))
    ax.legend(loc="upper left")
    caption = (
        f"Time a step of a compiled 70B ({len(rows)} runs at several tp and batch; measured by others, GPU not stated),"
        " each point predicted from a fit to all others: worst error"
        f" {check['worst_predicted']:.1%}, mean {check['mean_predicted']:.1%}."
    )
    return _sheet(record, "decode", "Decode benchmark, predicted", caption, figure)
