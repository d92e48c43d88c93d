"""The paper's latency figures predicted, beside what it says: records of `predict-paper`."""

import sys
from collections.abc import Sequence

import pandas as pd
from draw import COLOURS, MARKERS, Record, Table, canvas, finish, legend, newest, plain, run, style, unique, value
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

KINDS = {"stated": ("ring over the stated link", COLOURS[7], ":", "^"),
         "measured": ("NCCL's table", COLOURS[0], "--", "s"),
         "fitted": ("fitted to the axis", COLOURS[1], "-", "o")}  # fmt: skip
PARTS = {"matrix products": COLOURS[0], "attention": COLOURS[2], "pointwise": COLOURS[9], "communication": COLOURS[1]}
REDUCTION = "paper, as reduction"
OUTLINE = withStroke(linewidth=1.8, foreground="0.2")  # of white words that cross white lines
WIDTH = 9.6
DECODE_COSTS = {
    "launch and gaps": ("operator_us", "µs an operator"),
    "matrix rate": ("matrix_tflops", "TFLOPS"),
    "weights, matrix-vector": ("matrix_vector_tb_per_s", "TB/s"),
    "weights, matrix-matrix": ("matrix_matrix_tb_per_s", "TB/s"),
}


def tables(records: Sequence[Record]) -> list[Table]:
    """Claims, fits, summary, transfer times and decode errors of the newest record."""
    chosen = newest(records, "predict-paper")
    return [] if chosen is None else [make(chosen) for make in (_claims, _fits, _summary, _transfers, _decode_errors)]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Figures 2 and 7, where dropping pays, where the time goes, and the decode benchmark, of the newest record."""
    chosen = newest(records, "predict-paper")
    makers = {"figure2": _transfer, "figure7": _speedup, "links": _links, "time": _time, "decode": _decode}
    with style():
        return {} if chosen is None else {f"predicted-{name}": draw(chosen) for name, draw in makers.items()}


def _asked(record: Record) -> str:
    """The paper's setting, which every prediction here is for."""
    asked = value(record, "result", "asked")
    return f"tp={asked['tp']}, batch {asked['batch']}, {asked['prompt_len']} tokens in"


# ---------------------------------------------------------------- figure 2


def _transfer(record: Record) -> Figure:
    rows = value(record, "result", "figure2")
    settings = unique(rows, "setting")
    figure = canvas(WIDTH, 3.6)
    for ax, setting in zip(figure.subplots(1, len(settings)), settings, strict=True):
        _panel_transfer(ax, [row for row in rows if row["setting"] == setting])
        ax.set_title(setting)
    ax = figure.axes[0]
    ax.set_ylabel("transfer time (ms)")
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


def _panel_transfer(ax: Axes, rows: list[dict]) -> None:
    for kind, (_, colour, line, marker) in KINDS.items():
        values = [row.get(f"{kind}_ms") for row in rows]
        if values[0] is not None:
            ax.plot([row["percent"] for row in rows], values, color=colour, linestyle=line, marker=marker,
                    markersize=4, zorder=3)  # fmt: skip
    axis = rows[0]["axis_upper_ms"]
    ax.axhline(axis, color="0.25", linewidth=1)
    ax.set(xlabel="blocks dropped (%)", ylim=(0, 1.08 * axis), xlim=(-4, 104))


# ---------------------------------------------------------------- figure 7


def _speedup(record: Record) -> Figure:
    rows, launches = value(record, "result", "figure7"), value(record, "result", "regimes")
    shapes, settings = unique(rows, "shape"), unique(rows, "setting")
    names = {REDUCTION: "links and launch fitted to the paper", "lean": "lean: no launch time"}
    figure = canvas(WIDTH, 6.4)
    grid = figure.subplots(len(names), len(shapes), sharex=True, sharey="row")
    for axes, (regime, words) in zip(grid, names.items(), strict=True):
        for ax, shape in zip(axes, shapes, strict=True):
            _panel_speedup(ax, [r for r in rows if (r["regime"], r["shape"]) == (regime, shape)], settings)
            if regime == REDUCTION:
                _mark_claims(ax, shape, value(record, "result", "claims"))
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
    legend(figure, handles, 6)
    caption = (
        "Predicted reduction of the time to first token, 1 - t_p/t_0, against the share of blocks that drop their"
        f" attention sync point: figure 7's lower panels ({_asked(record)}, A100). Above: links fitted to"
        f" figure 2's axis and {launches[REDUCTION]:.0f} µs of launch an operator, fitted to the star alone; triangles"
        " are the paper's lower bounds for two nodes, the one at 100 % for 2x4 LBW alone. Below: CUDA graphs, NCCL's"
        " table, and LBW at the rate that the paper states (on two nodes no slower than the table, so that the lines"
        " coincide). See that the same dropped blocks gain more where nothing is lost to launching, most of all on fast"
        " links."
    )
    return finish(figure, caption, [record])


def _panel_speedup(ax: Axes, rows: list[dict], settings: list[str]) -> None:
    for i, setting in enumerate(settings):
        mine = [row for row in rows if row["setting"] == setting]
        ax.plot([r["percent"] for r in mine], [100 * r["reduction"] for r in mine], color=COLOURS[i],
                marker=MARKERS[i], markersize=4, zorder=3)  # fmt: skip
    ax.set_xlim(-3, 105)


def _mark_claims(ax: Axes, shape: str, claims: list[dict]) -> None:
    settings = unique(claims, "setting")
    for claim in claims:
        if claim["shape"] == shape and claim["where"] == "figure 7":
            equal = claim["relation"] == "="
            colour = COLOURS[settings.index(claim["setting"])] if equal else "white"
            ax.plot(claim["percent"], claim["paper"], "*" if equal else "^", color=colour, zorder=5,
                    markersize=13 if equal else 8, markeredgecolor="0.15")  # fmt: skip


# ---------------------------------------------------------------- where dropping pays


def _links(record: Record) -> Figure:
    heat = value(record, "result", "heat_map")
    figure = canvas(WIDTH, 4.6)
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
    return finish(figure, caption, [record])


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
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(visible=False)
    return mesh


# ---------------------------------------------------------------- where the time goes


def _time(record: Record) -> Figure:
    rows = value(record, "result", "where_time_goes")
    figure = canvas(WIDTH, 6.2)
    axes = figure.subplots(2, 1, sharex=True)
    for ax, (kind, title) in zip(axes, {"ttft": "TTFT", "tpot": "TPOT"}.items(), strict=True):
        _panel_time(ax, [row for row in rows if row["time"] == kind])
        ax.set_ylabel(f"share of {title} (%)")
    legend(figure, [Patch(color=colour, label=name) for name, colour in PARTS.items()], len(PARTS))
    caption = (
        f"Where the predicted time goes with every sync point kept ({_asked(record)}, A100, no launch time); above each"
        " bar its whole time in ms. LBW is the slower of NCCL's table and a ring at the rate that the paper states: on"
        " two nodes, and for the few bytes of a decode step, that is the table, so that those bars equal HBW's."
        " Dropping all attention sync points removes half of the orange part."
    )
    return finish(figure, caption, [record])


def _panel_time(ax: Axes, rows: list[dict]) -> None:
    shapes = unique(rows, "shape")
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


def _decode(record: Record) -> Figure:
    check = value(record, "result", "decode_check", "checks", "each row held out in turn")
    rows = check["predicted"]
    figure = canvas(6.4, 5.2)
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
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain)
    ax.legend(loc="upper left")
    caption = (
        f"Time a step of a compiled 70B ({len(rows)} runs at several tp and batch; measured by others, GPU not stated),"
        " each point predicted from a fit to all others: worst error"
        f" {check['worst_predicted']:.1%}, mean {check['mean_predicted']:.1%}."
    )
    return finish(figure, caption, [record])


# ---------------------------------------------------------------- tables


def _claims(record: Record) -> Table:
    rows = [dict(row) for row in value(record, "result", "claims")]
    regimes = list(value(record, "result", "regimes"))
    for row in rows:
        row |= {f"{name}: holds": "yes" if row[f"{name}: holds"] else "no" for name in regimes}
    caption = (
        "The paper's claims about time beside predictions. lean: no launch time, NCCL's table, LBW at the rate"
        " stated; paper: links fitted to figure 2's axis, launch time to the one equality, read as a reduction"
        " 1 - t_p/t_0 or as a speedup t_0/t_p - 1 (the lean column is a speedup). So that equality, and the transfer"
        " times at 0 % of the two paper columns, hold by fit; the others are predicted."
    )
    return Table("predicted-claims", caption, pd.DataFrame(rows), [record])


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
    described = value(record, "result", "decode_check", "costs")
    for words, (key, unit) in DECODE_COSTS.items():
        rows.append({"fitted": f"decode: {words}", "unit": unit, "value": described[key], "to": "all its rows"})
    for name, link in described["links"].items():
        latencies = ", ".join(f"{us:.0f} (tp={tp})" for tp, us in link["latency_us"].items())
        rows.append({"fitted": f"decode: ring, {name}", "unit": "GB/s", "value": link["ring_gb_per_s"],
                     "to": f"all its rows; latency in µs: {latencies}"})  # fmt: skip
    columns = ["fitted", "value", "unit", "if_axis_full", "stated", "to"]
    caption = "What was fitted, and to what; if_axis_full: had figure 2's bars reached the end of their axes."
    return Table("predicted-fits", caption, pd.DataFrame(rows, columns=columns), [record])


def _equality(record: Record) -> str:
    """The one claim that launch time is fitted to."""
    claim = next(claim for claim in value(record, "result", "claims") if claim["relation"] == "=")
    return f"{claim['paper']:g} % at {claim['percent']:g} % ({claim['shape']}, {claim['setting']})"


def _summary(record: Record) -> Table:
    caption = (
        "Predicted TTFT and share of communication at 0 %, reduction 1 - t_p/t_0 and speedup t_0/t_p at 70 and 100 %,"
        " and the ceiling of any method: no communication at all."
    )
    return Table("predicted-figure7", caption, pd.DataFrame(value(record, "result", "figure7_summary")), [record])


def _transfers(record: Record) -> Table:
    caption = "Transfer time of LLaMA2-70B's all-reduces by kind of link, beside the end of figure 2's axis."
    return Table("predicted-figure2", caption, pd.DataFrame(value(record, "result", "figure2")), [record])


def _decode_errors(record: Record) -> Table:
    checks = value(record, "result", "decode_check", "checks")
    keys = ("variant", "p2p", "batch", "tp")
    rows = [dict(row) for row in checks["each row held out in turn"]["predicted"]]
    for name, check in checks.items():
        if check["fitted"]:
            found = {tuple(r[k] for k in keys): r["error"] for r in check["predicted"]}
            for row in rows:
                row[name] = found.get(tuple(row[k] for k in keys))
    worst = "; ".join(f"{name}: worst {c['worst_predicted']:.1%}, mean {c['mean_predicted']:.1%}" for name, c in
                      checks.items())  # fmt: skip
    caption = f"Time a step of the decode benchmark; error of predictions of rows that were not fitted. {worst}."
    return Table("predicted-decode", caption, pd.DataFrame(rows), [record])


if __name__ == "__main__":
    sys.exit(run(tables, figures, __doc__))
