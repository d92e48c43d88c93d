"""Records to tables and figures. Every number drawn or tabled is read from a record; one that is missing is an error.

Figures are pure functions of the records: the same records give the same bytes (no date, fixed SVG ids), and each
file names its records and their commits in its metadata.
"""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spd.errors import SPDError
from spd.track import SCHEMA, write_bytes

Record = Mapping[str, Any]

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
MARKERS = "osD^vP"
LOG_FROM = 8  # a span of positive values wider than this factor is drawn on a logarithmic axis
DPI = 200

# ---------------------------------------------------------------- reading


def load_records(paths: Iterable[Path | str]) -> list[dict]:
    """Records of the given files, and of the JSON files in the given folders, oldest first.

    Raises SPDError when a file cannot be read, is not strict JSON, or is not a record of this schema.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    records = {record["id"]: record for record in map(_load, files)}
    return sorted(records.values(), key=lambda record: (record["started"], record["id"]))


def _load(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise SPDError(f"Cannot read record {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise SPDError(f"Record {path} is not strict JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise SPDError(f"{path} is not a record: it has no key schema with the value {SCHEMA}.")
    missing = [key for key in ("id", "command", "result", "started", "hardware") if record.get(key) is None]
    if missing:
        raise SPDError(f"Record {path} has no {', '.join(missing)}.")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _get(record: Record, *keys: str | int) -> Any:
    """The value at `keys` in a record; SPDError when it is not there."""
    value: Any = record
    for depth, key in enumerate(keys):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
        if value is None:
            place = ".".join(map(str, keys[: depth + 1]))
            raise SPDError(f"Record {record['id']} has no {place}, which the report needs.")
    return value


def _number(record: Record, *keys: str | int) -> float:
    value = _get(record, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SPDError(f"Record {record['id']} has {value!r} as {'.'.join(map(str, keys))} where a number is needed.")
    return value


def _numbers(record: Record, *keys: str) -> list[float]:
    return [_number(record, *keys, i) for i in range(_count(record, *keys))]


def _count(record: Record, *keys: str) -> int:
    value = _get(record, *keys)
    if not isinstance(value, list) or not value:
        raise SPDError(f"Record {record['id']} has no list of values as {'.'.join(keys)}.")
    return len(value)


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Sources:
    """The records behind one set of figures: one model at one tp (the newest of each kind, `sweeps` oldest first)."""

    suffix: str  # of file names; empty when the records hold one model at one tp
    sensitivity: Record | None = None
    plan: Record | None = None
    sweeps: tuple[Record, ...] = ()
    bench: Record | None = None

    def present(self) -> list[Record]:
        return [r for r in (self.sensitivity, self.plan, *self.sweeps, self.bench) if r is not None]


def choose(records: Sequence[Record]) -> tuple[list[Sources], list[Sources]]:
    """(sources a model and tp, sources a model). The second keeps a tp=8 accuracy and a tp=2 timing together."""
    useful = [r for r in records if r["command"] in ("sensitivity", "plan", "sweep", "bench")]
    keys = list(dict.fromkeys((_model_key(r), _get(r, "tp")) for r in useful))
    models = list(dict.fromkeys(model for model, _ in keys))
    names = _slugs(models)
    single = []
    for model, tp in keys:
        mine = [r for r in useful if (_model_key(r), r["tp"]) == (model, tp)]
        same = [k for k in keys if k[0] == model and _kinds(useful, k) & _kinds(useful, (model, tp))]
        single.append(_sources(mine, names[model] + (f"-tp{tp}" if len(same) > 1 else "")))
    combined = [_sources(_one_tp([r for r in useful if _model_key(r) == model]), names[model]) for model in models]
    return single, combined


def _kinds(records: Sequence[Record], key: tuple) -> set[str]:
    return {r["command"] for r in records if (_model_key(r), r["tp"]) == key}


def _one_tp(records: list[Record]) -> list[Record]:
    """Drop records of accuracy at another tp than the newest sensitivity (or sweep), so that the panels agree."""
    accuracy = [r for r in records if r["command"] == "sensitivity"] or [r for r in records if r["command"] == "sweep"]
    return [r for r in records if r["command"] == "bench" or not accuracy or r.get("tp") == accuracy[-1]["tp"]]


def _sources(records: list[Record], suffix: str) -> Sources:
    newest = {r["command"]: r for r in records}
    sweeps = [r for r in records if r["command"] == "sweep" and r.get("data") == newest["sweep"].get("data")]
    plan = newest.get("plan")
    if (
        plan
        and "sensitivity" in newest
        and plan["result"].get("sensitivity") != _get(newest["sensitivity"], "result", "sensitivity")
    ):
        plan = None  # made from other sensitivities: its classes are not those of these bars
    return Sources(suffix, newest.get("sensitivity"), plan, tuple(sweeps), newest.get("bench"))


def _model_key(record: Record) -> tuple[str, str]:
    return Path(str(_get(record, "model", "name"))).name, str(_get(record, "model", "fingerprint"))


def _slugs(models: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    if len(models) == 1:
        return {models[0]: ""}
    slugs = [re.sub(r"[^\w.-]+", "-", name) for name, _ in models]
    pairs = zip(models, slugs, strict=True)
    return {m: f"-{s}" if slugs.count(s) == 1 else f"-{s}-{re.sub(r'[^0-9a-zA-Z]', '', m[1])[:8]}" for m, s in pairs}


# ---------------------------------------------------------------- what the records say, one function a kind


def _classes(sources: Sources, count: int) -> tuple[list[str] | None, list[bool]]:
    """Class of each block (None without a plan), and whether the plan drops the block's attention sync."""
    if sources.plan is None:
        return None, [True] * count
    _count(sources.plan, "result", "classes"), _count(sources.plan, "result", "policies")
    classes, policies = sources.plan["result"]["classes"], sources.plan["result"]["policies"]
    if not len(classes) == len(policies) == count or set(classes) - set(CLASS_COLOURS):
        raise SPDError(f"Record {sources.plan['id']} does not give each of the {count} blocks one class and policy.")
    return classes, [policy[0] == "drop" for policy in policies]


def _curves(sweeps: Sequence[Record]) -> dict[str, list[dict]]:
    """Points of each strategy by ascending number of blocks; of two records with a strategy the newer counts."""
    curves: dict[str, list[dict]] = {}
    for record in sweeps:
        found: dict[str, list[dict]] = {}
        for i in range(_count(record, "result", "curve")):
            at = partial(_number, record, "result", "curve", i)
            point = {"blocks": int(at("blocks")), "percent": at("percent"), "perplexity": at("perplexity")}
            point |= {"nats": at("nats"), "plan": _get(record, "result", "curve", i, "plan")}
            found.setdefault(_get(record, "result", "curve", i, "strategy"), []).append(point)
        curves |= found
    return {name: sorted(points, key=lambda p: p["blocks"]) for name, points in curves.items()}


def _full_perplexity(curves: Mapping[str, list[dict]], record: Record) -> float:
    """Perplexity with nothing dropped."""
    for points in curves.values():
        for point in points:
            if point["blocks"] == 0:
                return point["perplexity"]
    raise SPDError(f"Record {record['id']} has no point with 0 blocks dropped to compare with.")


def _timings(record: Record) -> list[dict]:
    """One row a plan of a bench record, times in ms, with reduction 1 - t_p/t_0 and speedup t_0/t_p."""
    rows = [_timing(record, i) for i in range(_count(record, "result", "plans"))]
    full = [r for r in rows if set(r["plan"].split()) == {"FF"}] or [r for r in rows if r["blocks_dropped"] == 0]
    if not full:
        raise SPDError(f"Record {record['id']} has no plan with 0 blocks dropped to compare with.")
    base = full[0]["ttft_median_ms"]
    for row in rows:
        row |= {"reduction": 1 - row["ttft_median_ms"] / base, "speedup": base / row["ttft_median_ms"]}
    return sorted(rows, key=lambda r: (r["blocks_dropped"], r["plan"] != full[0]["plan"]))


def _timing(record: Record, i: int) -> dict:
    at = partial(_number, record, "result", "plans", i)
    plan = _get(record, "result", "plans", i, "plan")
    dropped = int(at("blocks_dropped"))
    row = {"blocks_dropped": dropped, "percent": 100 * dropped / len(plan.split())}
    row |= {f"ttft_{key}_ms": at("ttft_ms", key) for key in ("median", "spread", "min")}
    row["repeats"] = int(at("ttft_ms", "repeats"))
    points = _get(record, "result", "plans", i, "collectives")
    for kind in ("real", "emulated"):
        row[f"{kind}_ms"] = sum(at("collectives", point, f"{kind}_ms") for point in points)
    row["compute_ms"] = row["ttft_median_ms"] - row["real_ms"] - row["emulated_ms"]
    row |= {key: int(sum(at("collectives", point, key) for point in points)) for key in ("count", "bytes")}
    if row["compute_ms"] < 0:
        raise SPDError(f"Record {record['id']}, plan {i}: its communication takes longer than its whole median TTFT.")
    if record["result"]["plans"][i].get("tpot_ms") is not None:
        row |= {f"tpot_{key}_ms": at("tpot_ms", key) for key in ("median", "spread")}
    return row | {"plan": plan}


# ---------------------------------------------------------------- words


def _machine(record: Record) -> str:
    hardware = record["hardware"]
    gpus = [f"{len(list(same))} × {name}" for name, same in groupby(sorted(hardware.get("gpus") or []))]
    return ", ".join(gpus) if gpus else f"{_get(record, 'hardware', 'cpu')}, {_get(record, 'hardware', 'cores')} cores"


def _subject(record: Record) -> str:
    return f"{_model_key(record)[0]} at tp={_get(record, 'tp')}"


def _data_words(record: Record) -> str:
    text, seq_len = Path(str(_get(record, "data", "text"))).name, _get(record, "data", "seq_len")
    tokens, windows = _number(record, "result", "tokens"), _number(record, "result", "windows")
    return f"{tokens:,} predictions in {windows:,} windows of {seq_len} tokens of {text}"


def _sensitivity_caption(sources: Sources) -> str:
    record = sources.sensitivity
    words = "Rise of the perplexity when one more block drops its attention sync point, the later blocks having dropped"
    words += " theirs and the earlier ones none"
    if sources.plan is not None:
        budget = _number(sources.plan, "result", "budget", "blocks")
        words += f"; colours are the plan's classes, pale bars blocks outside its budget of {budget}"
    return f"{words}. {_subject(record)}; {_data_words(record)}; {_machine(record)}."


def _perplexity_caption(sources: Sources) -> str:
    record = sources.sweeps[-1]
    words = "Perplexity against the share of blocks that drop their attention sync point;"
    return f"{words} dashed: every sync point kept. {_subject(record)}; {_data_words(record)}; {_machine(record)}."


def _setting(record: Record) -> str:
    """The setting of a bench record: degree, processes, batch, prompt, link."""
    tp, world = _number(record, "result", "tp"), _number(record, "result", "world")
    link = record["result"].get("link")
    words = f"tp={tp} on {world} process{'es' if world != 1 else ''}, batch {_number(record, 'result', 'batch')}, "
    words += f"{_number(record, 'result', 'prompt_len')} prompt tokens, "
    return words + (f"emulated link {link}" if link else "no emulated link")


def _ttft_caption(sources: Sources) -> str:
    record = sources.bench
    repeats = sorted(
        {_number(record, "result", "plans", i, "ttft_ms", "repeats") for i in range(len(_timings(record)))}
    )
    words = f"Median time to first token of {'/'.join(map(str, repeats))} runs (error bar: interquartile range), "
    emulated = any(row["emulated_ms"] for row in _timings(record))
    words += "split into computation" + (", real all-reduces and the emulated link" if emulated else " and all-reduces")
    return f"{words}. {_model_key(record)[0]}, {_setting(record)}{_same_blocks(sources)}; {_machine(record)}."


def _same_blocks(sources: Sources) -> str:
    """Said when the timing's tp is not the accuracy's: whether the numbers of dropped blocks are the same."""
    if not sources.sweeps or sources.sweeps[-1]["tp"] == sources.bench["tp"]:
        return ""
    swept = {p["blocks"] for points in _curves(sources.sweeps).values() for p in points}
    timed = {row["blocks_dropped"] for row in _timings(sources.bench)}
    words = "the same numbers of dropped blocks as" if timed <= swept else "other numbers of dropped blocks than"
    return f", {words} the perplexities at tp={sources.sweeps[-1]['tp']}"


def _overview_caption(sources: Sources) -> str:
    words = []
    if sources.sensitivity is not None:
        taus = "".join(f", {name} = {tau:g}" for name, tau in _taus(sources).items())
        words.append(f"{_subject(sources.sensitivity)}{taus}, {_data_words(sources.sensitivity)}.")
    if sources.sweeps:
        words.append(f"{_subject(sources.sweeps[-1])}, {_data_words(sources.sweeps[-1])}.")
    if sources.bench is not None:
        words.append(f"{_model_key(sources.bench)[0]}, {_setting(sources.bench)}{_same_blocks(sources)}.")
    places = ("Left", "Middle", "Right") if len(words) == 3 else ("Left", "Right")
    placed = [f"{place}: {text}" for place, text in zip(places, words, strict=False)]
    return " ".join([*placed, f"{_machine(sources.present()[-1])}."])


def provenance(records: Sequence[Record]) -> str:
    """Ids and commits of records, as written into every file made of them."""
    git = {r["git"]["commit"] + (" (with local changes)" if r["git"]["dirty"] else "") for r in records if r.get("git")}
    return f"records {', '.join(r['id'] for r in records)}; commit {', '.join(sorted(git)) or 'unknown'}"


# ---------------------------------------------------------------- panels


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:.4g}".replace("-", "−")


def _taus(sources: Sources) -> dict[str, float]:
    if sources.plan is None:
        return {}
    return {name: _number(sources.plan, "result", key) for name, key in (("τ₁", "tau1"), ("τ₂", "tau2"))}


def _pale(colour: tuple[float, float, float]) -> tuple[float, ...]:
    """The colour on white at 40 %: unlike transparency it hides the grid behind a bar."""
    return tuple(0.4 * part + 0.6 for part in colour)


def _draw_sensitivity(ax: Axes, sources: Sources, values: Sequence[float], unit: str, taus: bool, narrow: bool) -> None:
    """Bars of `values` a block. `taus` adds the plan's thresholds, which are in perplexity points."""
    classes, dropped = _classes(sources, len(values))
    lines = _taus(sources) if taus else {}
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
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))


def _class_handles(sources: Sources, narrow: bool) -> list[Patch]:
    if sources.plan is None:
        return []
    classes, dropped = _classes(sources, _count(sources.plan, "result", "classes"))
    names = {c: c for c in CLASS_NAMES} if narrow else CLASS_NAMES
    handles = [Patch(color=CLASS_COLOURS[c], label=names[c]) for c in CLASS_COLOURS if c in classes]
    return handles + (
        [] if all(dropped) else [Patch(color="0.8", label="outside budget" if narrow else "outside the budget")]
    )


def _panel_sensitivity(ax: Axes, sources: Sources, narrow: bool = False) -> None:
    values = _numbers(sources.sensitivity, "result", "sensitivity")
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
    curves, record = _curves(sources.sweeps), sources.sweeps[-1]
    full, blocks = _full_perplexity(curves, record), _number(record, "model", "blocks")
    for i, (name, points) in enumerate(curves.items()):
        x, y = [p["percent"] for p in points], [p["perplexity"] for p in points]
        style = {"color": STRATEGY_COLOURS[i % 6], "marker": MARKERS[i % 6], "markersize": 4, "clip_on": False}
        ax.plot(x, y, label=name.upper() if narrow else STRATEGY_NAMES.get(name, name), zorder=3, **style)
    ax.axhline(full, color="0.25", linestyle="--", linewidth=1, label=f"all full: {full:.4g}")
    highest = max(p["perplexity"] for points in curves.values() for p in points)
    if highest > LOG_FROM * full:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set(xlabel="blocks dropped (%)", ylabel="perplexity", xlim=(-2, 102))
    top = ax.secondary_xaxis("top", functions=(lambda p: p * blocks / 100, lambda b: b * 100 / blocks))
    top.set_xlabel("blocks dropped")
    top.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    ax.legend(loc="upper left")


def _panel_ttft(ax: Axes, sources: Sources, narrow: bool = False) -> None:
    rows = _timings(sources.bench)
    bottom = [0.0] * len(rows)
    parts = {"compute_ms": ("computation", _BLUE), "real_ms": ("real all-reduces", _ORANGE)}
    parts["emulated_ms"] = ("emulated link", "0.72")
    for key, (label, colour) in parts.items():
        heights = [row[key] for row in rows]
        if any(heights):
            ax.bar(range(len(rows)), heights, bottom=bottom, label=label, color=colour, width=0.7, linewidth=0)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    error = [row["ttft_spread_ms"] / 2 for row in rows]
    ax.errorbar(range(len(rows)), bottom, error, fmt="none", ecolor="0.15", elinewidth=1, capsize=3)
    bounds = sources.bench["result"].get("bounds") or {}
    for style, name in zip(("--", ":", "-."), bounds, strict=False):
        bound = _number(sources.bench, "result", "bounds", name, "ttft_ms", "median")
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


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Sheet:
    """A figure and what is said about it."""

    name: str
    title: str
    caption: str
    records: Sequence[Record]
    figure: Figure


def _block_width(count: int) -> float:
    return min(11.0, max(6.4, 3 + 0.13 * count))


def _finish(figure: Figure, caption: str, size: float = 8) -> Figure:
    width = int(figure.get_size_inches()[0] * 72 / (size * 0.54))
    figure.supxlabel(
        textwrap.fill(caption, width, break_on_hyphens=False), x=0.01, ha="left", fontsize=size, color="0.25"
    )
    return figure


def _figure_sensitivity(sources: Sources) -> Figure:
    nats = _numbers(sources.sensitivity, "result", "sensitivity_nats")
    figure = Figure(figsize=(_block_width(len(nats)), 5.4), layout="constrained")
    points_ax, nats_ax = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _panel_sensitivity(points_ax, sources)
    _draw_sensitivity(nats_ax, sources, nats, "nats", taus=False, narrow=False)
    points_ax.set_xlabel("")
    return _finish(figure, _sensitivity_caption(sources))


def _figure_single(draw: Callable, caption: str, sources: Sources, width: float) -> Figure:
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    draw(figure.subplots(), sources)
    return _finish(figure, caption)


def _figure_overview(sources: Sources) -> Figure:
    panels = {"sensitivity of each block": sources.sensitivity and _panel_sensitivity}
    panels["perplexity"] = sources.sweeps and _panel_perplexity
    panels["time to first token"] = sources.bench and _panel_ttft
    chosen = {title: draw for title, draw in panels.items() if draw}
    figure = Figure(figsize=(3.3 * len(chosen), 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for ax, draw in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen.values(), strict=True):
        draw(ax, sources, narrow=True)
    return _finish(figure, _overview_caption(sources))


def _sheets(single: Sequence[Sources], combined: Sequence[Sources]) -> list[Sheet]:
    sheets = []
    with sns.plotting_context("paper"), sns.axes_style("whitegrid"), mpl.rc_context({"svg.hashsalt": "spd"}):
        for s in single:
            if s.sensitivity:
                used = [r for r in (s.sensitivity, s.plan) if r]
                figure = _figure_sensitivity(s)
                sheets.append(Sheet("sensitivity" + s.suffix, "Sensitivity", _sensitivity_caption(s), used, figure))
            if s.sweeps:
                figure = _figure_single(_panel_perplexity, _perplexity_caption(s), s, 6.4)
                sheets.append(Sheet("perplexity" + s.suffix, "Perplexity", _perplexity_caption(s), s.sweeps, figure))
            if s.bench:
                whole = next((c for c in combined if c.bench is s.bench), s)
                width = max(6.4, 2 + 0.7 * len(_timings(s.bench)))
                figure = _figure_single(_panel_ttft, _ttft_caption(whole), s, width)
                sheets.append(Sheet("ttft" + s.suffix, "Time to first token", _ttft_caption(whole), [s.bench], figure))
        for s in combined:
            if len([x for x in (s.sensitivity, s.sweeps, s.bench) if x]) > 1:
                figure = _figure_overview(s)
                sheets.append(Sheet("overview" + s.suffix, "Overview", _overview_caption(s), s.present(), figure))
    return sheets


def _render(sheet: Sheet, form: str) -> bytes:
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
        sheet.figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Rows of exact numbers; `formats` says how each column is rounded for reading (CSV keeps everything)."""

    name: str
    caption: str
    rows: list[dict]
    formats: Mapping[str, str]
    records: Sequence[Record] = field(repr=False, default=())

    def cells(self) -> list[list[str]]:
        return [[_cell(row.get(column), form) for column, form in self.formats.items()] for row in self.rows]


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form) if isinstance(value, (int, float)) else str(value)


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of `load_records`' records: sensitivity and classes, perplexity, TTFT. Raises SPDError."""
    found = []
    for sources in choose(records)[0]:
        if sources.sensitivity:
            found.append(_sensitivity_table(sources))
        if sources.sweeps:
            found.append(_perplexity_table(sources))
        if sources.bench:
            found.append(_ttft_table(sources))
    return found + _predicted("tables", records)


def _predicted(kind: str, records: Sequence[Record]) -> list:
    from spd import predict_figures  # which draws with what is above

    return getattr(predict_figures, kind)(records)


def _sensitivity_table(sources: Sources) -> Table:
    record = sources.sensitivity
    points, nats = _numbers(record, "result", "sensitivity"), _numbers(record, "result", "sensitivity_nats")
    if len(points) != len(nats):
        raise SPDError(f"Record {record['id']} has {len(points)} sensitivities but {len(nats)} in nats.")
    rows = [
        {"block": i, "sensitivity": s, "sensitivity_nats": n} for i, (s, n) in enumerate(zip(points, nats, strict=True))
    ]
    formats = {"block": "d", "sensitivity": ".4f", "sensitivity_nats": ".5f"}
    if sources.plan is not None:
        classes, dropped = _classes(sources, len(points))
        treatments = [_get(sources.plan, "result", "treatments", i) for i in range(len(points))]
        for row, name, treatment, inside in zip(rows, classes, treatments, dropped, strict=True):
            row |= {"class": name, "treatment": treatment, "dropped": "yes" if inside else "no"}
        formats |= {"class": "", "treatment": "", "dropped": ""}
    used = [r for r in (record, sources.plan) if r]
    return Table("sensitivity" + sources.suffix, _sensitivity_caption(sources), rows, formats, used)


def _perplexity_table(sources: Sources) -> Table:
    curves = _curves(sources.sweeps)
    full = _full_perplexity(curves, sources.sweeps[-1])
    rows = [
        {"strategy": name, **point, "increase_percent": 100 * (point["perplexity"] / full - 1)}
        for name, points in curves.items()
        for point in points
    ]
    formats = {"strategy": "", "blocks": "d", "percent": ".1f", "perplexity": ".4f", "nats": ".4f"}
    formats |= {"increase_percent": "+.2f", "plan": ""}
    return Table("perplexity" + sources.suffix, _perplexity_caption(sources), rows, formats, sources.sweeps)


def _ttft_table(sources: Sources) -> Table:
    rows = _timings(sources.bench)
    times = ["ttft_median_ms", "ttft_spread_ms", "ttft_min_ms", "compute_ms", "real_ms", "emulated_ms"]
    formats = {"blocks_dropped": "d", "percent": ".1f", **dict.fromkeys(times, ".3f"), "repeats": "d", "count": "d"}
    formats |= {"bytes": "d", "reduction": ".4f", "speedup": ".4f"}
    if any("tpot_median_ms" in row for row in rows):
        formats |= {"tpot_median_ms": ".3f", "tpot_spread_ms": ".3f"}
    caption = _ttft_caption(sources) + " reduction = 1 - t_p/t_0, speedup = t_0/t_p."
    return Table("ttft" + sources.suffix, caption, rows, {**formats, "plan": ""}, [sources.bench])


def _csv(table: Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.formats)
    writer.writerows([row.get(column, "") for column in table.formats] for row in table.rows)
    return text.getvalue().encode()


def _markdown(found: Sequence[Table]) -> str:
    parts = ["# Tables\n\nMade from the records named under each table; nothing is typed in.\n"]
    for table in found:
        lines = [list(table.formats), [":--" if not form else "--:" for form in table.formats.values()], *table.cells()]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {table.name}\n\n{table.caption}\n\n{body}\n\nSource: {provenance(table.records)}.\n")
    return "\n".join(parts)


# What fits 80 columns; the CSV has all of it, under full names.
HEADINGS = {
    "blocks_dropped": "blocks",
    "percent": "%",
    "ttft_median_ms": "TTFT\nms",
    "ttft_spread_ms": "IQR\nms",
    "compute_ms": "compute\nms",
    "real_ms": "real\nms",
    "emulated_ms": "link\nms",
    "tpot_median_ms": "TPOT\nms",
    "sensitivity_nats": "nats",
    "increase_percent": "increase\n%",
    "reduction": "reduc-\ntion",
    "speedup": "speed-\nup",
}
TERMINAL_LEAVES_OUT = {"plan", "ttft_min_ms", "repeats", "count", "bytes", "tpot_spread_ms"}


def print_tables(records: Iterable[Path | str], console: Any = None) -> None:
    """Print the tables of record files on a rich console (standard error when none is given). Raises SPDError."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    console = console or Console(stderr=True)
    for table in tables(load_records(records)):
        shown = [column for column in table.formats if column not in TERMINAL_LEAVES_OUT]
        rich = RichTable(
            title=table.name, caption=table.caption, caption_justify="left", box=SIMPLE, collapse_padding=True
        )
        for column in shown:
            heading = HEADINGS.get(column, column.replace("_", "\n"))
            rich.add_column(heading, justify="right" if table.formats[column] else "left")
        for row in table.rows:
            rich.add_row(*(_cell(row.get(column), table.formats[column]) for column in shown))
        console.print(rich)


# ---------------------------------------------------------------- the whole report


def report(records: Iterable[Path | str], out: Path | str) -> dict:
    """Write the figures (SVG, PNG) and tables (CSV, `tables.md`) of record files or folders into `out`.

    The newest record of each kind, model and tp counts; of several models or degrees each gets its own files.
    Returns `{"files": [paths written]}`. Everything is drawn before the first file is written. Raises SPDError when
    a record is malformed, lacks a number, nothing can be drawn, or a file cannot be written.
    """
    loaded, out = load_records(records), Path(out)
    single, combined = choose(loaded)
    found = tables(loaded)
    if not found:
        raise SPDError("None of the records given is of sensitivity, sweep or bench, so there is nothing to report.")
    sheets = _sheets(single, combined) + _predicted("sheets", loaded)
    content = {out / f"{s.name}.{form}": _render(s, form) for s in sheets for form in ("svg", "png")}
    content |= {out / f"{table.name}.csv": _csv(table) for table in found}
    content[out / "tables.md"] = _markdown(found).encode()
    for path, data in content.items():
        write_bytes(path, data)
    return {"files": [str(path) for path in content]}
