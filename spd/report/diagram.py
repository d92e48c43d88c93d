"""The method in pictures: a tensor-parallel block beside an SPD block, and what the shards of a model miss."""

from collections.abc import Sequence

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from spd.report.figures import Sheet, finish, style
from spd.report.table import Table

_BLUE, _ORANGE, _GREEN, *_ = sns.color_palette("colorblind")
LANES = (0.0, 3.4)  # x of the devices drawn
WIDTH, HEIGHT = 2.5, 0.8  # of a box


def block_diagram() -> Sheet:
    """A block with both sync points beside one that drops the first (the paper's figure 3)."""
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_block(left, "tensor parallelism: full, full", dropped=False)
    _draw_block(right, "sync-point drop: drop, full", dropped=True)
    caption = (
        "One decoder block on two devices, from top to bottom. Orange: all-reduces, where the devices wait for each"
        " other. On the right the first one is gone: each device's MLP sees its own part of the attention's output"
        " only, and that part stays pending until the all-reduce after the MLP, which carries both. Nothing is lost"
        " from the sum; only the MLP's input is partial. Norms are left out."
    )
    return Sheet("block", "A block with and without its first sync point", caption, (), finish(figure, caption))


def _draw_block(ax: Axes, title: str, dropped: bool) -> None:
    middle = sum(LANES) / 2
    for i, x in enumerate(LANES, 1):
        _text(ax, x, 9.2, f"device {i}\n$x$", "0.15")
        _arrow(ax, x, 8.75, 8.1)
        _box(ax, x, 7.7, f"attention\nheads of device {i}", _BLUE)
        _arrow(ax, x, 7.3, 6.45, f"$y_{i}$")
        _arrow(ax, x, 5.65, 4.7, f"$x + y_{i}$" if dropped else "$x + \\sum_j y_j$")
        _box(ax, x, 4.3, f"MLP\nneurons of device {i}", _GREEN)
        _arrow(ax, x, 3.9, 3.05, f"$y_{i} + z_{i}$" if dropped else f"$z_{i}$")
        _arrow(ax, x, 2.25, 1.55)
    if dropped:
        words = "no all-reduce: $y_i$ stays pending"
        _box(ax, middle, 6.05, words, "white", LANES[1] + WIDTH, edge="0.55", dashed=True)
    else:
        _box(ax, middle, 6.05, "all-reduce", _ORANGE, LANES[1] + WIDTH)
    _box(ax, middle, 2.65, "all-reduce", _ORANGE, LANES[1] + WIDTH)
    _text(ax, middle, 1.2, "$x + \\sum_j y_j + \\sum_j z_j$   on both devices", "0.15")
    ax.set(xlim=(-1.7, LANES[1] + 1.7), ylim=(0.8, 9.9), title=title)
    ax.axis("off")


def _box(ax: Axes, x: float, y: float, words: str, colour, width: float = WIDTH, edge="0.15", dashed=False) -> None:
    style = {"facecolor": colour, "edgecolor": edge, "linestyle": "--" if dashed else "-", "linewidth": 1}
    corner = (x - width / 2, y - HEIGHT / 2)
    ax.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", zorder=3, **style))
    _text(ax, x, y, words, "0.35" if dashed else "white")


def _text(ax: Axes, x: float, y: float, words: str, colour: str, ha: str = "center") -> None:
    ax.text(x, y, words, ha=ha, va="center", color=colour, fontsize=9, zorder=4)


def _arrow(ax: Axes, x: float, start: float, end: float, words: str = "") -> None:
    ax.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "-|>", "color": "0.15", "shrinkA": 0, "shrinkB": 0})
    if words:
        _text(ax, x + 0.12, (start + end) / 2, words, "0.15", ha="left")


def missing_figure(rows: Sequence[dict], model: str, tp: int) -> Sheet:
    """Of `spd.algebra.missing`: how much of the MLP's input each block's shards would not see."""
    with style():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        ax = figure.subplots()
        ax.bar([row["block"] for row in rows], [100 * row["missing"] for row in rows], color=_BLUE, linewidth=0)
        ax.set(xlabel="block", ylabel="missing of the MLP's input (%)")
        ax.grid(visible=False, axis="x")
    caption = (
        f"What a shard's MLP would not see if the block dropped its attention sync point: the size of the other shards'"
        f" attention outputs over that of the whole input, mean over tokens and shards. {model} at tp={tp}."
    )
    return Sheet("missing", "What is missing", caption, (), finish(figure, caption))


def statements_table(rows: Sequence[dict]) -> Table:
    """Of `spd.algebra.statements`."""
    formats = {"statement": "", "largest_difference": ".0e", "scale": ".0f", "all_reduces": "d", "expected": "d"}
    caption = (
        "largest_difference: of the logits of the two sides; scale: the largest logit; all_reduces: counted on the left"
        " side; expected: by the plan."
    )
    return Table("statements", caption, list(rows), formats)
