"""The method in pictures, and figures 2, 4 and 6 of the paper on other models: records of `sensitivity` and `bench`.

`block_figure()` is drawn of no record; `missing_figure(rows, model, tp)` of `spd.algebra.missing`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from draw import COLOURS, Record, Table, canvas, finish, machine, model_of, newest, number, plain, run, style, value
from ledger import classes_in, full_perplexity_of
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from reference import reference

from spd.report import CLASS_COLOURS, CLASS_NAMES, PARTS
from spd.tables import named, numbers, suffixed, timings

BLUE, ORANGE, GREEN, *_ = COLOURS
LANES, WIDTH, HEIGHT = (0.0, 3.4), 2.5, 0.8  # x of the devices drawn; size of a box


def tables(records: Sequence[Record]) -> list[Table]:
    """The share of each class in the sensitivity records of `newest_settings`, where there are several."""
    measured = newest_settings(records)
    if len(measured) < 2:
        return []
    rows = [{"model": model, "text": text, "tp": tp, **_shares(r)} for (model, text, tp), r in measured.items()]
    return [Table("classes", _classes_caption(measured), pd.DataFrame(rows), list(measured.values()))]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Transfer time of every bench record chosen; shares of classes and the map, where there are several of them."""
    found = {f"transfer{suffix}": transfer_figure(mine) for suffix, mine in suffixed(records) if newest(mine, "bench")}
    measured = newest_settings(records)
    if len(measured) > 1:
        found |= {"classes": classes_figure(measured), "sensitivity-map": map_figure(measured)}
    return found


def newest_settings(records: Sequence[Record]) -> dict[tuple[str, str, int], Record]:
    """The newest sensitivity record of each (model, text, tp), in that order; not of random weights."""
    found = {
        (model_of(r), Path(value(r, "data", "text")).stem, value(r, "tp")): r
        for r in records
        if r["command"] == "sensitivity" and not r["model"].get("shape_only")
    }
    return dict(sorted(found.items()))


def _shares(record: Record) -> dict[str, float]:
    """Percentage of the blocks in each class."""
    classes = classes_in(record)
    return {name: 100 * classes.count(name) / len(classes) for name in CLASS_NAMES}


def _classes_caption(measured: Mapping[tuple, Record]) -> str:
    taus, texts = reference()["figure6"]["thresholds"], ", ".join(dict.fromkeys(text for _, text, _ in measured))
    return (
        f"Share of the blocks in each class at the paper's thresholds (τ₁ = {taus['tau1']:g}, τ₂ = {taus['tau2']:g}"
        " perplexity points): figure 6 of the paper on other models. The perplexities themselves differ between models."
        f" Texts: {texts}; {len(measured)} records; {machine(next(iter(measured.values())))}."
    )


# ---------------------------------------------------------------- figures 2, 4 and 6


def transfer_figure(records: Sequence[Record]) -> Figure:
    """The time of the all-reduces of a prefill by percentage, of the newest bench record: figure 2."""
    record = newest(records, "bench")
    frame = timings(record).set_index("percent")
    claim = next(c for c in reference()["claims"] if c["metric"] == "transfer_reduction_percent")
    with style():
        figure = canvas(6.4, 4.4)
        ax, bottom = figure.subplots(), 0.0 * frame["real_ms"]
        for key, (label, colour) in list(PARTS.items())[1:]:
            if frame[key].any():
                ax.fill_between(frame.index, bottom, bottom + frame[key], label=label, color=colour, linewidth=0)
            bottom = bottom + frame[key]
        ax.plot(bottom.index, bottom, "o-", color="0.15", markersize=4, label="transfer time")
        words = f"the paper: below this ({claim['value']} % less)"
        ax.plot(claim["percent"], bottom.iloc[0] * (1 - claim["value"] / 100), "v", color="white", label=words,
                markeredgecolor="0.15", markersize=9, zorder=5)  # fmt: skip
        ax.set(xlabel="blocks dropped (%)", ylabel="time of all all-reduces (ms)", xlim=(-2, 103), ylim=(0, None))
        ax.legend(loc="upper right")
    caption = (
        "Time of the all-reduces of one prefill against the share of blocks that drop their attention sync point, as"
        f" measured: figure 2 of the paper in kind. {named(record)}, tp={record['tp']},"
        f" {number(record, 'result', 'prompt_len')} prompt tokens, emulated link"
        f" {record['result'].get('link') or 'none'}; {machine(record)}."
    )
    return finish(figure, caption, [record])


def classes_figure(measured: Mapping[tuple[str, str, int], Record]) -> Figure:
    """Of `newest_settings`, beside the paper's models: figure 6. Of several texts that which a model predicts best."""
    best: dict = {}
    for key in sorted(measured, key=lambda key: full_perplexity_of(measured[key])):
        best.setdefault((key[0], key[2]), key)
    groups = {key: record for key, record in measured.items() if key in best.values()}
    shares = pd.DataFrame([_shares(r) for r in groups.values()], [f"{name}, tp={tp}" for name, _, tp in groups])
    for name, share in reference()["figure6"]["in_sensitive_percent"].items():
        shares.loc[f"{name}: the paper", ["ISB", "other"]] = share, 100 - share
    colours = CLASS_COLOURS | {"other": "0.85"}
    with style():
        figure = canvas(6.8, 2.2 + 0.3 * len(shares))
        ax = figure.subplots()
        shares.plot.barh(stacked=True, ax=ax, color=colours, width=0.75, legend=False)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlabel="share of the blocks (%)", xlim=(0, 100))
        handles = [Patch(color=colours[c], label=words) for c, words in {**CLASS_NAMES, "other": "SB or ESB"}.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return finish(figure, _classes_caption(groups), list(groups.values()))


def map_figure(measured: Mapping[tuple[str, str, int], Record]) -> Figure:
    """Sensitivities in nats of `newest_settings`, a row a setting: figure 4 over degrees and texts."""
    rows = {key: numbers(record, "result", "sensitivity_nats") for key, record in measured.items()}
    models = list(dict.fromkeys(model for model, *_ in measured))
    positive = [v for row in rows.values() for v in row if v > 0] or [1e-3, 1]
    norm = LogNorm(max(min(positive), 1e-3), max(positive))
    heights = [sum(key[0] == model for key in measured) for model in models]
    with style():
        figure = canvas(8.2, 2.0 + 0.27 * sum(heights) + 0.5 * len(models))
        axes = figure.subplots(len(models), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, model in zip(axes, models, strict=True):
            frame = pd.DataFrame({f"{text[:26]}, tp={tp}": row for (m, text, tp), row in rows.items() if m == model}).T
            sns.heatmap(frame.clip(lower=norm.vmin), annot=frame, fmt=".2g", annot_kws={"size": 6}, norm=norm,
                        cmap="viridis", cbar=False, ax=ax)  # fmt: skip
            ax.set_title(model, loc="left")
            ax.tick_params(axis="both", rotation=0)
        axes[-1].set_xlabel("block")
        bar = figure.colorbar(axes[0].collections[0], ax=axes, label="sensitivity (nats)", pad=0.02, extend="min")
        bar.ax.yaxis.set_major_formatter(plain)
    caption = (
        "Sensitivity of every block in nats, which compare across models, by tensor-parallel degree and calibration"
        " text. See whether rows of one model have the same dark and bright blocks: then a plan made with one text, or"
        f" at one degree, is nearly the plan of the others. {len(measured)} records;"
        f" {machine(next(iter(measured.values())))}."
    )
    return finish(figure, caption, list(measured.values()))


# ---------------------------------------------------------------- drawn of no record


def missing_figure(rows: Sequence[Mapping], model: str, tp: int) -> Figure:
    """Of `spd.algebra.missing`: how much of the MLP's input each block's shards would not see."""
    with style():
        figure = canvas(6.4, 3.6)
        ax = figure.subplots()
        ax.bar([row["block"] for row in rows], [100 * row["missing"] for row in rows], color=BLUE, linewidth=0)
        ax.set(xlabel="block", ylabel="missing of the MLP's input (%)")
        ax.grid(visible=False, axis="x")
    caption = (
        "What a shard's MLP would not see if the block dropped its attention sync point: the size of the other shards'"
        f" attention outputs over that of the whole input, mean over tokens and shards. {model} at tp={tp}."
    )
    return finish(figure, caption)


def block_figure() -> Figure:
    """A block with both sync points beside one that drops the first (the paper's figure 3)."""
    with style():
        figure = canvas(8.6, 5.6)
        left, right = figure.subplots(1, 2)
        _draw_block(left, "tensor parallelism: full, full", dropped=False)
        _draw_block(right, "sync-point drop: drop, full", dropped=True)
    caption = (
        "One decoder block on two devices, from top to bottom. Orange: all-reduces, where the devices wait for each"
        " other. On the right the first one is gone: each device's MLP sees its own part of the attention's output"
        " only, and that part stays pending until the all-reduce after the MLP, which carries both. Nothing is lost"
        " from the sum; only the MLP's input is partial. Norms are left out."
    )
    return finish(figure, caption)


def _draw_block(ax: Axes, title: str, dropped: bool) -> None:
    middle = sum(LANES) / 2
    for i, x in enumerate(LANES, 1):
        _text(ax, x, 9.2, f"device {i}\n$x$", "0.15")
        _arrow(ax, x, 8.75, 8.1)
        _box(ax, x, 7.7, f"attention\nheads of device {i}", BLUE)
        _arrow(ax, x, 7.3, 6.45, f"$y_{i}$")
        _arrow(ax, x, 5.65, 4.7, f"$x + y_{i}$" if dropped else "$x + \\sum_j y_j$")
        _box(ax, x, 4.3, f"MLP\nneurons of device {i}", GREEN)
        _arrow(ax, x, 3.9, 3.05, f"$y_{i} + z_{i}$" if dropped else f"$z_{i}$")
        _arrow(ax, x, 2.25, 1.55)
    if dropped:
        words = "no all-reduce: $y_i$ stays pending"
        _box(ax, middle, 6.05, words, "white", LANES[1] + WIDTH, edge="0.55", dashed=True)
    else:
        _box(ax, middle, 6.05, "all-reduce", ORANGE, LANES[1] + WIDTH)
    _box(ax, middle, 2.65, "all-reduce", ORANGE, LANES[1] + WIDTH)
    _text(ax, middle, 1.2, "$x + \\sum_j y_j + \\sum_j z_j$   on both devices", "0.15")
    ax.set(xlim=(-1.7, LANES[1] + 1.7), ylim=(0.8, 9.9), title=title)
    ax.axis("off")


def _box(ax: Axes, x: float, y: float, words: str, colour, width: float = WIDTH, edge="0.15", dashed=False) -> None:
    look = {"facecolor": colour, "edgecolor": edge, "linestyle": "--" if dashed else "-", "linewidth": 1}
    corner = (x - width / 2, y - HEIGHT / 2)
    ax.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", zorder=3, **look))
    _text(ax, x, y, words, "0.35" if dashed else "white")


def _text(ax: Axes, x: float, y: float, words: str, colour: str, ha: str = "center") -> None:
    ax.text(x, y, words, ha=ha, va="center", color=colour, fontsize=9, zorder=4)


def _arrow(ax: Axes, x: float, start: float, end: float, words: str = "") -> None:
    ax.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": "0.15", "shrinkA": 0, "shrinkB": 0})
    if words:
        _text(ax, x + 0.12, (start + end) / 2, words, "0.15", ha="left")


if __name__ == "__main__":
    sys.exit(run(tables, figures, __doc__))
