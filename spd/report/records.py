"""Reading records, and choosing those that one set of figures is made of."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from spd.errors import SPDError

Record = Mapping[str, Any]
CLASSES = ("ISB", "SB", "ESB")
STAGES = ("sensitivity", "plan", "sweep", "bench")  # commands that figures of one model are made of


def value_in(record: Record, *keys: str | int) -> Any:
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


def number_in(record: Record, *keys: str | int) -> float:
    value = value_in(record, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SPDError(f"Record {record['id']} has {value!r} as {'.'.join(map(str, keys))} where a number is needed.")
    return value


def numbers_in(record: Record, *keys: str) -> list[float]:
    return [number_in(record, *keys, i) for i in range(count_in(record, *keys))]


def count_in(record: Record, *keys: str) -> int:
    value = value_in(record, *keys)
    if not isinstance(value, list) or not value:
        raise SPDError(f"Record {record['id']} has no list of values as {'.'.join(keys)}.")
    return len(value)


def newest(records: Sequence[Record], command: str) -> Record | None:
    """Of `load_records`' records the last of a command."""
    return next((record for record in reversed(records) if record["command"] == command), None)


@dataclass(frozen=True)
class Sources:
    """The records behind one set of figures: one model at one tp (the newest of each kind, `sweeps` oldest first)."""

    suffix: str  # of file names; empty when the records hold one model at one tp
    sensitivity: Record | None = None
    plan: Record | None = None
    sweeps: tuple[Record, ...] = ()
    bench: Record | None = None
    tasks: Record | None = None  # the newest `eval` of tasks
    others: tuple[Record, ...] = ()  # other commands'

    def present(self) -> list[Record]:
        return [r for r in (self.sensitivity, self.plan, *self.sweeps, self.bench) if r is not None]


def choose(records: Sequence[Record]) -> tuple[list[Sources], list[Sources]]:
    """(sources a model and tp, sources a model). The second keeps a tp=8 accuracy and a tp=2 timing together."""
    useful = [r for r in records if r["command"] in STAGES or has_tasks(r)]
    keys = list(dict.fromkeys((model_key(r), value_in(r, "tp")) for r in useful))
    models = list(dict.fromkeys(model for model, _ in keys))
    names = _slugs(models)
    single = []
    for model, tp in keys:
        mine = [r for r in useful if (model_key(r), r["tp"]) == (model, tp)]
        same = [k for k in keys if k[0] == model and _kinds(useful, k) & _kinds(useful, (model, tp))]
        single.append(_sources(mine, names[model] + (f"-tp{tp}" if len(same) > 1 else "")))
    combined = [_sources(_one_tp([r for r in useful if model_key(r) == model]), names[model]) for model in models]
    return single, combined


def by_subject(records: Sequence[Record]) -> dict[tuple[str, int], Sources]:
    """The records of every (model's name, tp) that has any; not of random weights, which say nothing of a model."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        if record.get("model") and record.get("tp") and not record["model"].get("shape_only"):
            found.setdefault((model_key(record), record["tp"]), []).append(record)
    return {(model[0], tp): replace(_sources(mine, ""), sensitivity=_best_text(mine)) for (model, tp), mine in
            found.items()}  # fmt: skip


def _best_text(records: Sequence[Record]) -> Record | None:
    """Of sensitivities measured on several texts, those of the text that the model predicts best."""
    measured = [r for r in records if r["command"] == "sensitivity"]
    return min(reversed(measured), key=full_perplexity_of, default=None)


def full_perplexity_of(sensitivity: Record) -> float:
    """With every sync point kept, of a sensitivity record."""
    return number_in(sensitivity, "result", "perplexity_from", -1)


def _kinds(records: Sequence[Record], key: tuple) -> set[str]:
    return {r["command"] for r in records if (model_key(r), r["tp"]) == key}


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
        and plan["result"].get("sensitivity") != value_in(newest["sensitivity"], "result", "sensitivity")
    ):
        plan = None  # made from other sensitivities: its classes are not those of these bars
    others = tuple(r for r in records if r["command"] not in STAGES)
    return Sources(suffix, newest.get("sensitivity"), plan, tuple(sweeps), newest.get("bench"),
                   next((r for r in reversed(others) if has_tasks(r)), None), others)  # fmt: skip


def model_key(record: Record) -> tuple[str, str]:
    return Path(str(value_in(record, "model", "name"))).name, str(value_in(record, "model", "fingerprint"))


def _slugs(models: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    if len(models) == 1:
        return {models[0]: ""}
    slugs = [re.sub(r"[^\w.-]+", "-", name) for name, _ in models]
    pairs = zip(models, slugs, strict=True)
    return {m: f"-{s}" if slugs.count(s) == 1 else f"-{s}-{re.sub(r'[^0-9a-zA-Z]', '', m[1])[:8]}" for m, s in pairs}


def block_classes(sources: Sources, count: int) -> tuple[list[str] | None, list[bool]]:
    """Class of each block (None without a plan), and whether the plan drops the block's attention sync."""
    if sources.plan is None:
        return None, [True] * count
    count_in(sources.plan, "result", "classes"), count_in(sources.plan, "result", "policies")
    classes, policies = sources.plan["result"]["classes"], sources.plan["result"]["policies"]
    if not len(classes) == len(policies) == count or set(classes) - set(CLASSES):
        raise SPDError(f"Record {sources.plan['id']} does not give each of the {count} blocks one class and policy.")
    return classes, [policy[0] == "drop" for policy in policies]


def curves_of(sweeps: Sequence[Record]) -> dict[str, list[dict]]:
    """Points of each strategy by ascending number of blocks; of two records with a strategy the newer counts."""
    curves: dict[str, list[dict]] = {}
    for record in sweeps:
        found: dict[str, list[dict]] = {}
        for i in range(count_in(record, "result", "curve")):
            at = partial(number_in, record, "result", "curve", i)
            point = {"blocks": int(at("blocks")), "percent": at("percent"), "perplexity": at("perplexity")}
            point |= {"nats": at("nats"), "plan": value_in(record, "result", "curve", i, "plan")}
            found.setdefault(value_in(record, "result", "curve", i, "strategy"), []).append(point)
        curves |= found
    return {name: sorted(points, key=lambda p: p["blocks"]) for name, points in curves.items()}


def has_tasks(record: Record) -> bool:
    return record["command"] == "eval" and "tasks" in record["result"]


def full_perplexity(curves: Mapping[str, list[dict]], record: Record) -> float:
    """Perplexity with nothing dropped."""
    for points in curves.values():
        for point in points:
            if point["blocks"] == 0:
                return point["perplexity"]
    raise SPDError(f"Record {record['id']} has no point with 0 blocks dropped to compare with.")


def timings_of(record: Record) -> list[dict]:
    """One row a plan of a bench record, times in ms, with reduction 1 - t_p/t_0 and speedup t_0/t_p."""
    rows = [_timing(record, i) for i in range(count_in(record, "result", "plans"))]
    full = [r for r in rows if set(r["plan"].split()) == {"FF"}] or [r for r in rows if r["blocks_dropped"] == 0]
    if not full:
        raise SPDError(f"Record {record['id']} has no plan with 0 blocks dropped to compare with.")
    base = full[0]["ttft_median_ms"]
    for row in rows:
        row |= {"reduction": 1 - row["ttft_median_ms"] / base, "speedup": base / row["ttft_median_ms"]}
    return sorted(rows, key=lambda r: (r["blocks_dropped"], r["plan"] != full[0]["plan"]))


def _timing(record: Record, i: int) -> dict:
    at = partial(number_in, record, "result", "plans", i)
    plan = value_in(record, "result", "plans", i, "plan")
    dropped = int(at("blocks_dropped"))
    row = {"blocks_dropped": dropped, "percent": 100 * dropped / len(plan.split())}
    row |= {f"ttft_{key}_ms": at("ttft_ms", key) for key in ("median", "spread", "min")}
    row["repeats"] = int(at("ttft_ms", "repeats"))
    points = value_in(record, "result", "plans", i, "collectives")
    for kind in ("real", "emulated"):
        row[f"{kind}_ms"] = sum(at("collectives", point, f"{kind}_ms") for point in points)
    row["compute_ms"] = row["ttft_median_ms"] - row["real_ms"] - row["emulated_ms"]
    row |= {key: int(sum(at("collectives", point, key) for point in points)) for key in ("count", "bytes")}
    if row["compute_ms"] < 0:
        raise SPDError(f"Record {record['id']}, plan {i}: its communication takes longer than its whole median TTFT.")
    if record["result"]["plans"][i].get("tpot_ms") is not None:
        row |= {f"tpot_{key}_ms": at("tpot_ms", key) for key in ("median", "spread")}
    return row | _bounded(record, i) | {"plan": plan}


def _bounded(record: Record, i: int) -> dict:
    """Of a plan: the bound over the measured time, time saved over time removed, TTFT by formula; if recorded."""
    at, plan = partial(number_in, record, "result", "plans", i), value_in(record, "result", "plans", i)
    row = {}
    if "saved" in plan:
        row["saved_share"] = at("saved", "share")
    if "floor" in plan:
        silent = number_in(record, "result", "bounds", "no_communication", "ttft_ms", "median")
        row["formula_ms"] = silent + at("floor", "ttft_communication_ms")
        row["ttft_of_bound"] = at("floor", "ttft_ms") / at("ttft_ms", "median")
        if plan.get("tpot_ms") is not None:
            row["tpot_of_bound"] = at("floor", "tpot_ms") / at("tpot_ms", "median")
    return row


def taus_of(sources: Sources) -> dict[str, float]:
    if sources.plan is None:
        return {}
    return {name: number_in(sources.plan, "result", key) for name, key in (("τ₁", "tau1"), ("τ₂", "tau2"))}


def provenance(records: Sequence[Record]) -> str:
    """Ids and commits of records, as written into every file made of them."""
    if not records:
        return "drawn from no record"
    git = {r["git"]["commit"] + (" (with local changes)" if r["git"]["dirty"] else "") for r in records if r.get("git")}
    return f"records {', '.join(r['id'] for r in records)}; commit {', '.join(sorted(git)) or 'unknown'}"
