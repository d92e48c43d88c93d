"""Figures 2, 4 and 6 of the paper on other models: records of `sensitivity` and `bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from draw import legend
from ledger import classes_in, full_perplexity_of
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from reference import reference

from spd.report import CLASS_COLOURS, PARTS, canvas, finish, plain
from spd.tables import (
    CLASSES,
    Record,
    Table,
    by_subject,
    column,
    machine,
    model_of,
    named,
    newest,
    number,
    of_command,
    timings,
    value,
)


def tables(records: Sequence[Record]) -> list[Table]:
    """The share of each class in the sensitivity records of `newest_settings`, where there are several."""
    measured = newest_settings(records)
    if len(measured) < 2:
        return []
    rows = [{"model": model, "text": text, "tp": tp, **_shares(r)} for (model, text, tp), r in measured.items()]
    return [Table("classes", _classes_caption(measured), pd.DataFrame(rows), list(measured.values()))]


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Transfer time of every bench record chosen; shares of classes and the map, where there are several of them."""
    benches = [(suffix, newest(mine, "bench")) for suffix, mine in by_subject(records)]
    timed = [(suffix, one) for suffix, one in benches if one and timings(one)["real_ms"].notna().all()]  # not on GPUs
    found = {f"transfer{suffix}": transfer_figure(one) for suffix, one in timed}
    measured = newest_settings(records)
    if len(measured) > 1:
        found |= {"classes": classes_figure(measured), "sensitivity-map": map_figure(measured)}
    return found


def newest_settings(records: Sequence[Record]) -> dict[tuple[str, str, int], Record]:
    """The newest sensitivity record of each (model, text, tp), in that order; not of random weights."""
    found = {
        (model_of(r), Path(value(r, "data", "text")).stem, value(r, "tp")): r
        for r in of_command(records, "sensitivity")
        if not r["model"].get("shape_only")
    }
    return dict(sorted(found.items()))


def _shares(record: Record) -> pd.Series:
    """Percentage of the blocks in each class."""
    blocks = classes_in(record)
    return 100 * blocks / blocks.sum()


def _classes_caption(measured: Mapping[tuple, Record]) -> str:
    taus, texts = reference()["figure6"]["thresholds"], ", ".join(dict.fromkeys(text for _, text, _ in measured))
    return (
        f"Share of the blocks in each class at the paper's thresholds (τ₁ = {taus['tau1']:g}, τ₂ = {taus['tau2']:g}"
        " perplexity points): figure 6 of the paper on other models. The perplexities themselves differ between models."
        f" Texts: {texts}; {len(measured)} records; {machine(next(iter(measured.values())))}."
    )


def transfer_figure(record: Record) -> Figure:
    """The time of the all-reduces of a prefill by percentage, of a bench record: figure 2."""
    frame = timings(record).set_index("percent")
    claim = next(c for c in reference()["claims"] if c["metric"] == "transfer_reduction_percent")
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
    figure = canvas(6.8, 2.2 + 0.3 * len(shares))
    ax = figure.subplots()
    shares.plot.barh(stacked=True, ax=ax, color=colours, width=0.75, legend=False)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="share of the blocks (%)", xlim=(0, 100))
    handles = [Patch(color=colours[c], label=words) for c, words in {**CLASSES, "other": "SB or ESB"}.items()]
    legend(figure, handles, 4)
    return finish(figure, _classes_caption(groups), list(groups.values()))


def map_figure(measured: Mapping[tuple[str, str, int], Record]) -> Figure:
    """Sensitivities in nats of `newest_settings`, a row a setting: figure 4 over degrees and texts."""
    rows = {key: column(record, "sensitivity_nats") for key, record in measured.items()}
    models = list(dict.fromkeys(model for model, *_ in measured))
    positive = [v for row in rows.values() for v in row if v > 0] or [1e-3, 1]
    norm = LogNorm(max(min(positive), 1e-3), max(positive))
    heights = [sum(key[0] == model for key in measured) for model in models]
    figure = canvas(8.2, 2.0 + 0.27 * sum(heights) + 0.5 * len(models))
    axes = figure.subplots(len(models), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, model in zip(axes, models, strict=True):
        frame = pd.DataFrame({f"{text[:26]}, tp={tp}": row for (m, text, tp), row in rows.items() if m == model}).T
        numbers = frame if frame.shape[1] <= 16 else None  # more have no room
        sns.heatmap(frame.clip(lower=norm.vmin), annot=numbers, fmt=".2g", annot_kws={"size": 6}, norm=norm,
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
