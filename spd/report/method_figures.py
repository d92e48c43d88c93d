"""Figures 2 and 6 of the paper measured on other models, and how sensitivities move with degree and text."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from reference import reference

from spd.report.captions import machine
from spd.report.figures import CLASS_COLOURS, CLASS_NAMES, PART_COLOURS, Sheet, finish, plain, style
from spd.report.measures import classes_in
from spd.report.records import Record, Sources, full_perplexity_of, model_key, numbers_in, timings_of, value_in
from spd.report.table import Table

THRESHOLDS = "the paper's thresholds (τ₁ = {tau1:g}, τ₂ = {tau2:g} perplexity points)"


def method_sheets(records: Sequence[Record], single: Sequence[Sources]) -> list[Sheet]:
    """Transfer time of every bench record chosen; shares of classes and the map, where there are several of them."""
    measured = newest_settings(records)
    with style():
        sheets = [_transfer(sources) for sources in single if sources.bench]
        if len(measured) > 1:
            sheets += [_classes(measured), _map(measured)]
    return sheets


def method_tables(records: Sequence[Record]) -> list[Table]:
    """The share of each class in the sensitivity records of `newest_settings`, where there are several."""
    measured = newest_settings(records)
    if len(measured) < 2:
        return []
    rows = [{"model": model, "text": text, "tp": tp, **_shares(r)} for (model, text, tp), r in measured.items()]
    formats = {"model": "", "text": "", "tp": "d", **dict.fromkeys(CLASS_NAMES, ".1f")}
    return [Table("classes", _classes_caption(measured), rows, formats, list(measured.values()))]


def newest_settings(records: Sequence[Record]) -> dict[tuple[str, str, int], Record]:
    """The newest sensitivity record of each (model, text, tp), in that order; not of random weights."""
    found = {
        (model_key(r)[0], Path(value_in(r, "data", "text")).stem, value_in(r, "tp")): r
        for r in records
        if r["command"] == "sensitivity" and not value_in(r, "model").get("shape_only")
    }
    return dict(sorted(found.items()))


def _shares(record: Record) -> dict[str, float]:
    """Percentage of the blocks in each class."""
    classes = classes_in(record)
    return {name: 100 * classes.count(name) / len(classes) for name in CLASS_NAMES}


# ---------------------------------------------------------------- figure 2


def _transfer(sources: Sources) -> Sheet:
    record, rows = sources.bench, timings_of(sources.bench)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax, x = figure.subplots(), [row["percent"] for row in rows]
    bottom = [0.0] * len(rows)
    for key, (label, colour) in list(PART_COLOURS.items())[1:]:
        top = [b + row[key] for b, row in zip(bottom, rows, strict=True)]
        if top != bottom:
            ax.fill_between(x, bottom, top, label=label, color=colour, linewidth=0, step=None)
        bottom = top
    ax.plot(x, bottom, "o-", color="0.15", markersize=4, label="transfer time")
    claim = next(c for c in reference()["claims"] if c["metric"] == "transfer_reduction_percent")
    bound = bottom[0] * (1 - claim["value"] / 100)
    ax.plot(claim["percent"], bound, "v", color="white", markeredgecolor="0.15", markersize=9, zorder=5,
            label=f"the paper: below this ({claim['value']} % less)")  # fmt: skip
    ax.set(xlabel="blocks dropped (%)", ylabel="time of all all-reduces (ms)", xlim=(-2, 103), ylim=(0, None))
    ax.legend(loc="lower left")
    words = (
        f"Time of the all-reduces of one prefill against the share of blocks that drop their attention sync point, as"
        f" measured: figure 2 of the paper in kind. {model_key(record)[0]}, tp={record['tp']},"
        f" {value_in(record, 'result', 'prompt_len')} prompt tokens, emulated link"
        f" {record['result'].get('link') or 'none'}; {machine(record)}."
    )
    return Sheet("transfer" + sources.suffix, "Transfer time", words, [record], finish(figure, words))


# ---------------------------------------------------------------- figure 6


def _classes(measured: dict) -> Sheet:
    paper = reference()["figure6"]["in_sensitive_percent"]
    groups = _one_text(measured)
    figure = Figure(figsize=(6.8, 1.9 + 0.3 * (len(groups) + len(paper))), layout="constrained")
    ax = figure.subplots()
    labels = [f"{model}, tp={tp}" for model, _, tp in groups] + [f"{name}: the paper" for name in paper]
    for y, record in enumerate(groups.values()):
        left = 0.0
        for name, share in _shares(record).items():
            ax.barh(y, share, left=left, color=CLASS_COLOURS[name], linewidth=0, height=0.75)
            left += share
    for y, share in enumerate(paper.values(), len(groups)):
        ax.barh(y, share, color=CLASS_COLOURS["ISB"], height=0.75, linewidth=0)
        ax.barh(y, 100 - share, left=share, color="0.85", height=0.75, linewidth=0)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="share of the blocks (%)", xlim=(0, 100))
    handles = [Patch(color=CLASS_COLOURS[c], label=words) for c, words in CLASS_NAMES.items()]
    figure.legend(handles=[*handles, Patch(color="0.85", label="SB or ESB")], loc="outside upper center", ncols=4,
                  frameon=False)  # fmt: skip
    caption = _classes_caption(groups)
    return Sheet("classes", "Classes of blocks", caption, list(groups.values()), finish(figure, caption))


def _one_text(measured: dict) -> dict:
    """Of several texts of one model and degree the one that it predicts best."""
    best: dict = {}
    for key in sorted(measured, key=lambda key: full_perplexity_of(measured[key])):
        best.setdefault((key[0], key[2]), key)
    return {key: record for key, record in measured.items() if key in best.values()}


def _classes_caption(groups: dict) -> str:
    thresholds = THRESHOLDS.format(**reference()["figure6"]["thresholds"])
    texts = ", ".join(dict.fromkeys(text for _, text, _ in groups))
    return (
        f"Share of the blocks in each class at {thresholds}: figure 6 of the paper on other models."
        f" Thresholds are in points of perplexity, and the perplexities differ between models. Texts: {texts}."
    )


# ---------------------------------------------------------------- figure 4 over degrees and texts


def _map(measured: dict) -> Sheet:
    models = list(dict.fromkeys(model for model, *_ in measured))
    heights = [sum(key[0] == model for key in measured) for model in models]
    figure = Figure(figsize=(8.2, 1.6 + 0.27 * sum(heights) + 0.5 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 1, height_ratios=heights, squeeze=False)[:, 0]
    values = {key: numbers_in(record, "result", "sensitivity_nats") for key, record in measured.items()}
    positive = [v for row in values.values() for v in row if v > 0]
    norm = LogNorm(max(min(positive), 1e-3), max(positive)) if positive else Normalize()
    for ax, model in zip(axes, models, strict=True):
        mesh = _panel_map(ax, {key: row for key, row in values.items() if key[0] == model}, norm)
        ax.set_title(model, loc="left")
    axes[-1].set_xlabel("block")
    bar = figure.colorbar(mesh, ax=axes, label="sensitivity (nats)", pad=0.02, extend="min")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    caption = (
        "Sensitivity of every block in nats, which compare across models, by tensor-parallel degree and calibration"
        " text. See whether rows of one model have the same dark and bright blocks: then a plan made with one text, or"
        " at one degree, is nearly the plan of the others."
    )
    return Sheet("sensitivity-map", "Sensitivity by degree and text", caption, list(measured.values()),
                 finish(figure, caption))  # fmt: skip


def _panel_map(ax: Axes, values: dict, norm: Normalize):
    rows = [[max(v, norm.vmin or v) for v in row] for row in values.values()]
    mesh = ax.imshow(rows, cmap="viridis", norm=norm, aspect="auto")
    ax.set_yticks(range(len(rows)), [f"{text[:26]}, tp={tp}" for _, text, tp in values])
    ax.set_xticks(range(len(rows[0])))
    for y, row in enumerate(values.values()):
        for x, value in enumerate(row):
            bright = norm(max(value, norm.vmin or value)) > 0.6
            ax.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color="0.1" if bright else "white")
    ax.grid(visible=False)
    return mesh
