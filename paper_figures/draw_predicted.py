"""The paper's latency figures predicted, beside what it says: records of `predict-paper`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from draw import legend
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from spd.report import COLOURS, MARKERS, canvas, finish, plain
from spd.tables import Record, Table, newest, value

KINDS = {"stated": ("ring over the stated link", COLOURS[7], ":", "^"),
         "measured": ("NCCL's table", COLOURS[0], "--", "s"),
         "fitted": ("fitted to the axis", COLOURS[1], "-", "o")}  # fmt: skip
PARTS = {"matrix products": COLOURS[0], "attention": COLOURS[2], "pointwise": COLOURS[9], "communication": COLOURS[1]}
REDUCTION = "paper, as reduction"
OUTLINE = withStroke(linewidth=1.8, foreground="0.2")  # of white words that cross white lines
WIDTH = 9.6


def tables(records: Sequence[Record]) -> list[Table]:
    """Claims, fits, summary, transfer times and decode errors of the newest record."""
    chosen = newest(records, "predict-paper")
    if chosen is None:
        return []
    summary = (
        "Predicted TTFT and share of communication at 0 %, reduction 1 - t_p/t_0 and speedup t_0/t_p at 70 and 100 %,"
        " and the ceiling of any method: no communication at all."
    )
    transfers = "Transfer time of LLaMA2-70B's all-reduces by kind of link, beside the end of figure 2's axis."
    return [
        _claims(chosen),
        _fits(chosen),
        Table("predicted-figure7", summary, _frame(chosen, "figure7_summary"), [chosen]),
        Table("predicted-figure2", transfers, _frame(chosen, "figure2"), [chosen]),
        _decode_errors(chosen),
    ]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Figures 2 and 7, where dropping pays, and where the time goes, of the newest record."""
    chosen = newest(records, "predict-paper")
    makers = {"figure2": _transfer, "figure7": _speedup, "links": _links, "time": _time}
    return {} if chosen is None else {f"predicted-{name}": draw(chosen) for name, draw in makers.items()}


def _frame(record: Record, key: str) -> pd.DataFrame:
    return pd.DataFrame(value(record, "result", key))


def _asked(record: Record) -> str:
    """The paper's setting, which every prediction here is for."""
    asked = value(record, "result", "asked")
    return f"tp={asked['tp']}, batch {asked['batch']}, {asked['prompt_len']} tokens in"


# ---------------------------------------------------------------- figures 2 and 7


def _transfer(record: Record) -> Figure:
    settings = _frame(record, "figure2").groupby("setting", sort=False)
    figure = canvas(WIDTH, 3.6)
    for ax, (setting, rows) in zip(figure.subplots(1, len(settings)), settings, strict=True):
        for kind, (_, colour, line, marker) in KINDS.items():
            ax.plot(rows["percent"], rows[f"{kind}_ms"].astype(float), color=colour, linestyle=line, marker=marker,
                    markersize=4, zorder=3)  # fmt: skip
        axis = rows["axis_upper_ms"].iloc[0]
        ax.axhline(axis, color="0.25", linewidth=1)
        ax.set(title=setting, xlabel="blocks dropped (%)", ylim=(0, 1.08 * axis), xlim=(-4, 104))
    figure.axes[0].set_ylabel("transfer time (ms)")
    handles = [Line2D([], [], color=c, linestyle=s, marker=m, label=label) for label, c, s, m in KINDS.values()]
    legend(figure, [*handles, Line2D([], [], color="0.25", linewidth=1, label="end of the paper's axis")], 4)
    fill = value(record, "result", "fits", "axis_fill")
    caption = (
        f"Predicted time of all all-reduces of a prefill of LLaMA2-70B ({_asked(record)}) against the share of"
        " blocks that drop their attention sync point: figure 2 of the paper. See how far a ring over the link that the"
        f" paper states stays below the axis it needs: the fitted links reach {fill:.0%} of it at 0 %, as NCCL's table"
        " does on 1x8 HBW."
    )
    return finish(figure, caption, [record])


def _speedup(record: Record) -> Figure:
    rows, claims = _frame(record, "figure7"), _frame(record, "claims").query("where == 'figure 7'")
    looks = dict(zip(rows["setting"].unique(), zip(COLOURS, MARKERS, strict=False), strict=False))
    shapes, launch = rows["shape"].unique(), value(record, "result", "regimes", REDUCTION)
    names = {REDUCTION: "links and launch fitted to the paper", "lean": "lean: no launch time"}
    figure = canvas(WIDTH, 6.4)
    grid = figure.subplots(len(names), len(shapes), sharex=True, sharey="row")
    for axes, (regime, words) in zip(grid, names.items(), strict=True):
        for ax, shape in zip(axes, shapes, strict=True):
            panel = rows[(rows["regime"] == regime) & (rows["shape"] == shape)]
            for setting, line in panel.groupby("setting", sort=False):
                colour, marker = looks[setting]
                ax.plot(line["percent"], 100 * line["reduction"], color=colour, marker=marker, markersize=4, zorder=3)
        axes[0].set_ylabel(f"TTFT reduction (%)\n{words}")
    for above, below, shape in zip(*grid, shapes, strict=True):
        for _, claim in claims[claims["shape"] == shape].iterrows():
            equal = claim["relation"] == "="
            above.plot(claim["percent"], claim["paper"], "*" if equal else "^", markersize=13 if equal else 8, zorder=5,
                       color=looks[claim["setting"]][0] if equal else "white", markeredgecolor="0.15")  # fmt: skip
        above.set(title=shape, ylim=(0, None))  # after all of the row, whose scale it shares, is drawn
        below.set(xlabel="blocks dropped (%)", xlim=(-3, 105), ylim=(0, None))
    handles = [Line2D([], [], color=colour, marker=marker, label=s) for s, (colour, marker) in looks.items()]
    paper = {"color": "0.15", "linestyle": ""}
    handles.append(Line2D([], [], marker="*", markersize=10, label="paper: equal to", **paper))
    handles.append(Line2D([], [], marker="^", markersize=7, fillstyle="none", label="paper: more than", **paper))
    legend(figure, handles, 6)
    caption = (
        "Predicted reduction of the time to first token, 1 - t_p/t_0, against the share of blocks that drop their"
        f" attention sync point: figure 7's lower panels ({_asked(record)}, A100). Above: links fitted to"
        f" figure 2's axis and {launch:.0f} µs of launch an operator, fitted to the star alone; triangles"
        " are the paper's lower bounds for two nodes, the one at 100 % for 2x4 LBW alone. Below: CUDA graphs, NCCL's"
        " table, and LBW at the rate that the paper states (on two nodes no slower than the table, so that the lines"
        " coincide). See that the same dropped blocks gain more where nothing is lost to launching, most of all on fast"
        " links."
    )
    return finish(figure, caption, [record])


# ---------------------------------------------------------------- where dropping pays


def _links(record: Record) -> Figure:
    heat = value(record, "result", "heat_map")
    figure = canvas(WIDTH, 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    top = 100 * (np.max(list(heat["speedup"].values())) - 1)
    titles = {"ttft": "time to first token", "tpot": "time per output token"}
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
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
    return finish(figure, caption, [record])


def _panel_links(ax: Axes, heat: dict, kind: str, top: float):
    x, y = np.array(heat["bandwidths"]) / 1e9, 1e6 * np.array(heat["latencies"])
    z = 100 * (np.array(heat["speedup"][kind]) - 1)
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
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(visible=False)
    return mesh


# ---------------------------------------------------------------- where the time goes


def _time(record: Record) -> Figure:
    rows = _frame(record, "where_time_goes")
    figure = canvas(WIDTH, 6.2)
    for ax, (kind, mine) in zip(figure.subplots(2, 1, sharex=True), rows.groupby("time", sort=False), strict=True):
        _panel_time(ax, mine.reset_index())
        ax.set_ylabel(f"share of {kind.upper()} (%)")
    legend(figure, [Patch(color=colour, label=name) for name, colour in PARTS.items()], len(PARTS))
    caption = (
        f"Where the predicted time goes with every sync point kept ({_asked(record)}, A100, no launch time); above each"
        " bar its whole time in ms. LBW is the slower of NCCL's table and a ring at the rate that the paper states: on"
        " two nodes, and for the few bytes of a decode step, that is the table, so that those bars equal HBW's."
        " Dropping all attention sync points removes half of the orange part."
    )
    return finish(figure, caption, [record])


def _panel_time(ax: Axes, rows: pd.DataFrame) -> None:
    shapes, parts = list(rows["shape"].unique()), pd.DataFrame(list(rows["parts_ms"]))
    at = rows.index + 0.6 * rows["shape"].map(shapes.index)
    totals, bottom = parts.sum(axis=1), 0.0 * at
    for part, colour in PARTS.items():
        share = 100 * parts[part] / totals
        ax.bar(at, share, bottom=bottom, color=colour, width=0.8, linewidth=0)
        bottom = bottom + share
    for x, total in zip(at, totals, strict=True):
        ax.annotate(f"{total:.3g}", (x, 100), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set(ylim=(0, 109), yticks=range(0, 101, 25))
    middle = {len(rows) // len(shapes) * i + 1: shape for i, shape in enumerate(shapes)}
    words = rows["setting"].str.replace(" ", "\n")
    ax.set_xticks(at, [f"{label}\n{middle.get(i, '')}" for i, label in words.items()])
    ax.grid(visible=False, axis="x")


# ---------------------------------------------------------------- tables


def _claims(record: Record) -> Table:
    frame = _frame(record, "claims")
    holds = [f"{name}: holds" for name in value(record, "result", "regimes")]
    frame[holds] = frame[holds].astype(bool).replace({True: "yes", False: "no"})
    caption = (
        "The paper's claims about time beside predictions. lean: no launch time, NCCL's table, LBW at the rate"
        " stated; paper: links fitted to figure 2's axis, launch time to the one equality, read as a reduction"
        " 1 - t_p/t_0 or as a speedup t_0/t_p - 1 (the lean column is a speedup). So that equality, and the transfer"
        " times at 0 % of the two paper columns, hold by fit; the others are predicted."
    )
    return Table("predicted-claims", caption, frame, [record])


def _fits(record: Record) -> Table:
    fits = value(record, "result", "fits")
    rows = []
    for setting, link in fits["links"].items():
        to = f"figure 2's axis filled by {fits['axis_fill']:.0%}; latency {link['latency_us']:.0f} µs, NCCL's least"
        rows.append({"fitted": f"bandwidth of {setting}", "unit": "GB/s", "value": link["bandwidth_gb_per_s"],
                     "if_axis_full": link["bandwidth_gb_per_s_if_axis_full"], "stated": link["stated"],
                     "to": to})  # fmt: skip
    for reading, launch in fits["launch_us"].items():
        block = fits["launch_ms_a_block"][reading]
        rows.append({"fitted": f"launch, claim as {reading}", "unit": "µs an operator", "value": launch,
                     "to": f"{_equality(record)}; {block:.2f} ms a block"})  # fmt: skip
    columns = ["fitted", "value", "unit", "if_axis_full", "stated", "to"]
    caption = "What was fitted, and to what; if_axis_full: had figure 2's bars reached the end of their axes."
    return Table("predicted-fits", caption, pd.DataFrame(rows, columns=columns), [record])


def _equality(record: Record) -> str:
    """The one claim that launch time is fitted to."""
    claim = next(claim for claim in value(record, "result", "claims") if claim["relation"] == "=")
    return f"{claim['paper']:g} % at {claim['percent']:g} % ({claim['shape']}, {claim['setting']})"


def _decode_errors(record: Record) -> Table:
    check = value(record, "result", "decode_check")
    worst, median = (check[f"{which}_error"]["left_out"] for which in ("worst", "median"))
    columns = ["link", "plan", "batch", "tp", "measured_ms", "predicted_ms", "error"]
    caption = (
        "Time a token of the decode benchmark (measured by others, GPU not stated), each degree and batch predicted by"
        f" `spd profile` from all others: worst error {worst:.1%}, median {median:.1%}; speedups off by"
        f" {check['speedup_points']['left_out']:.1f} percentage points at most."
    )
    return Table("predicted-decode", caption, pd.DataFrame(check["errors"]["left_out"])[columns], [record])
