"""Fitting the latency model to measurements, and checking it on others.

Predicted time is linear in the unit costs, so they are fitted by least squares of the relative error, none negative:
five costs of computation (`Costs`), one all-reduce latency a degree and one cost of a byte moved by the ring. Tables
made by others (CSV) calibrate as well: decoding, operators of a block, all-reduces by size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from spd.comm import Link
from spd.config import DTYPES, ModelConfig, named_shape
from spd.errors import SPDError, one_of, reading
from spd.links import left_out_errors, link_all_reduce, ring_bytes
from spd.machines import ATTENTION, Machine, OperatorTable, Pass, Work, gpu, read_profile, tabled_shape, timed_passes
from spd.plan import Plan
from spd.pretrained import resolve
from spd.records import regular
from spd.transport import PROCESS_GROUP

SCHEMA = 1
SILENT = "no communication"
SAME_RUN = ("model", "tp", "link", "batch", "prompt_len", "time")
LATENCY, RING_BYTE = "latency", "ring_byte"  # what a collective costs: so much each, and for a byte that the ring moves
STEP, COMPUTED = "step", "computed"  # so much for each further GPU; what a run computes, as one cost of its own
SPENT = (LATENCY, STEP, RING_BYTE)
# Of tables: columns of words, those that may hold 0, and what says what computing takes.
TEXTS, ZERO, COMPUTES = {"model", "link", "device"}, {"syncs_per_block"}, {"costs", "operators"}


Unit = str | tuple  # a kind of `Work`, or a kind of what collectives cost with its link (and degree)
Calibration = dict[Unit, float]  # fitted seconds a unit


@dataclass(frozen=True)
class Observation:
    """One measured time and what was done in it."""

    label: dict[str, str | int | float | None]  # identifies it in tables
    counts: dict[Unit, float]  # work by its names, all-reduces by (LATENCY, link, degree), bytes by (RING_BYTE, link)
    seconds: float
    known: float = 0.0  # seconds of it that need no fit: an emulated link's


def fit(observations: Sequence[Observation]) -> Calibration:
    """Least squares of the relative error, no cost negative."""
    if not observations:
        raise SPDError("There are no measurements to fit a calibration to.")
    kinds = Work._fields
    units = [*kinds, *sorted({unit for o in observations for unit in o.counts} - set(kinds))]
    matrix = np.array([[o.counts.get(unit, 0) for unit in units] for o in observations], dtype=float)
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1
    unknown = np.array([o.seconds - o.known for o in observations])
    weight = 1 / np.array([o.seconds for o in observations])
    found = nnls(matrix / scale * weight[:, None], unknown * weight)[0] / scale
    return dict(zip(units, found.tolist(), strict=True))


def of_link(calibration: Calibration, link: str) -> tuple[dict[int, float], float]:
    """Its latency by degree, and what a byte that its ring moves costs; seconds."""
    latencies = {unit[2]: seconds for unit, seconds in calibration.items() if unit[:2] == (LATENCY, link)}
    return latencies, calibration.get((RING_BYTE, link), 0.0)


def errors(calibration: Calibration, observations: Sequence[Observation]) -> list[dict]:
    """A row an observation: what it is, measured and predicted ms, and the relative error, predicted / measured - 1."""
    rows = []
    for o in observations:
        predicted = sum((calibration[unit] * n for unit, n in o.counts.items()), o.known)
        row = {"measured_ms": 1e3 * o.seconds, "predicted_ms": 1e3 * predicted, "error": predicted / o.seconds - 1}
        rows.append(o.label | row)
    return rows


def worst(rows: Sequence[Mapping]) -> float | None:
    return max((abs(row["error"]) for row in rows), default=None)


def worst_points(rows: Sequence[Mapping]) -> float | None:
    """How far predicted and measured speedup lie apart, at most, in percentage points."""
    return max((100 * abs(measured - predicted) for measured, predicted in speedups(rows)), default=None)


def speedups(rows: Sequence[Mapping]) -> list[tuple[float, float]]:
    """Measured and predicted speedup of `errors`' rows against `all full` of the same run.

    Of plans: the bound without communication is no speedup that any plan has.
    """
    full = {tuple(row[k] for k in SAME_RUN): row for row in rows if row["plan"] == "all full"}
    pairs = [(full.get(tuple(row[k] for k in SAME_RUN)), row) for row in rows if row["plan"] != SILENT]
    return [tuple(base[k] / row[k] for k in ("measured_ms", "predicted_ms")) for base, row in pairs if base]


def observations_of(record: Mapping, statistic: str = "median") -> list[Observation]:
    """TTFT and TPOT (their median, or their min) of every plan and bound in a bench record.

    Its shape is a named one, or that of a model found here.
    """
    if record.get("command") != "bench":
        raise SPDError(f"Record {record.get('id')} is of {record.get('command')}, and a calibration needs bench's.")
    result, tp, shape = record["result"], record["result"]["tp"], record["config"].get("shape")
    config = named_shape(shape) if shape else ModelConfig.from_folder(resolve(record["config"]["model"]))
    sizes = (result[key] for key in ("batch", "prompt_len", "new_tokens"))
    passes = timed_passes(config, tp, *sizes, DTYPES[result["dtype"]].itemsize)
    emulated = link_all_reduce(Link.parse(result["link"]), tp) if result["link"] else lambda payload: 0.0
    label = {"model": shape or record["model"]["name"], **{key: result[key] for key in SAME_RUN[1:-1]}}
    rows = [(f"{row['blocks_dropped']} dropped", row) for row in result["plans"]]
    rows += [(name.replace("_", " "), row) for name, row in result["bounds"].items()]
    found = []
    for name, row in ((name, row) for name, row in rows if set(row["plan"]) <= set("FD ")):  # only whole values
        syncs = Plan.from_letters(row["plan"]).syncs() if row["communicates"] else 0
        for kind, a_pass in passes.items():
            if row[f"{kind}_ms"] is not None:
                counted = a_pass.collectives(syncs)
                moved = sum(n * ring_bytes(payload, tp) for n, payload in counted)
                collectives = {(LATENCY, "real", tp): sum(n for n, _ in counted), (RING_BYTE, "real"): moved}
                counts = a_pass.work()._asdict() | (collectives if tp > 1 else {})
                known, seconds = a_pass.communication(emulated, syncs), 1e-3 * row[f"{kind}_ms"][statistic]
                found.append(Observation({**label, "plan": name, "time": kind.upper()}, counts, seconds, known))
    return found


def profile(records: Sequence[Mapping], check: Sequence[Mapping] = (), statistic: str = "median") -> dict:
    """The document of `spd profile`: a calibration fitted to bench records, its errors there and on those to `check`.

    All are of one machine, dtype and (on CPUs, whose cores they share) tp and transport. `statistic` says which time
    of a plan's repetitions counts: `median`, or `min` where other work on the machine only ever lengthens them.
    `worst_error` and `speedup_points` (`worst_points`) are given for TTFT and TPOT.
    """
    if not records:
        raise SPDError("A calibration needs records of bench, and none was given.")
    one_of("statistic", statistic, ("median", "min"))
    kinds = {_machine_of(record) for record in [*records, *check]}
    if len(kinds) > 1:
        listed = "; ".join(sorted(map(str, kinds)))
        raise SPDError(f"The records are not of one machine, dtype, tp and transport: {listed}.")
    used = {"fitted": records, "checked": check}
    observed = {use: [o for r in some for o in observations_of(r, statistic)] for use, some in used.items()}
    calibration = fit(observed["fitted"])
    rows = {use: errors(calibration, found) for use, found in observed.items()}

    def by_time(summary) -> dict[str, dict[str, float | None]]:
        kinds = ("TTFT", "TPOT")
        return {use: {k: summary([r for r in found if r["time"] == k]) for k in kinds} for use, found in rows.items()}

    machine, dtype, _ = kinds.pop()
    latencies, ring_byte = of_link(calibration, "real")
    return {
        "spd_calibration": SCHEMA,
        "name": machine,
        "dtype": dtype,
        "statistic": statistic,
        "costs": {kind: calibration[kind] for kind in Work._fields},
        "all_reduce": {"latencies": {str(d): s for d, s in latencies.items()}, "ring_byte": ring_byte},
        "records": {use: [record["id"] for record in some] for use, some in used.items()},
        "worst_error": by_time(worst),
        "speedup_points": by_time(worst_points),
        "errors": rows,
    }


def _machine_of(record: Mapping) -> tuple[str, str, str]:
    hardware, result = record["hardware"], record["result"]
    gpus = hardware.get("gpus") or []
    name = gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores']} cores"
    return name, result["dtype"], "" if gpus else f"tp={result['tp']}, {result.get('transport') or PROCESS_GROUP}"


# ---------------------------------------------------------------- tables made by others


def profile_tables(paths: Sequence[Path]) -> dict:
    """The document of `spd profile` for CSV tables: what each gives, by its columns; errors are those of the last."""
    import pandas as pd

    tables = {  # what makes something of a table, and the columns that it takes
        profile_decoding: {*SAME_RUN[:-1], "new_tokens", "syncs_per_block", "tokens_per_s"},
        profile_operators: set(read_profile("layer_ops_a100")[0]),
        profile_all_reduces: {"devices", "bytes", "us"},
    }
    found = {"spd_calibration": SCHEMA, "name": ", ".join(path.stem for path in paths), "dtype": "float16", "links": {}}
    for path in paths:
        with reading(f"The table {path} cannot be read"):
            table = pd.read_csv(regular(path, math.inf))
        make, columns = next((pair for pair in tables.items() if pair[1] <= set(table)), (None, set()))
        if make is None:
            known = "; ".join(", ".join(sorted(columns)) for columns in tables.values())
            raise SPDError(f"{path} is no table to calibrate on, which has the columns of one of these: {known}.")
        wrong = [c for c in sorted(columns - TEXTS) if not (pd.to_numeric(table[c], "coerce") >= (c not in ZERO)).all()]
        if wrong or table.empty:
            raise SPDError(f"{path} is no table to calibrate on: {wrong[0] if wrong else 'a row'} is missing or wrong.")
        made = make(table.to_dict("records"), path.stem)
        if COMPUTES & found.keys() and COMPUTES & made.keys():
            raise SPDError(f"{path} says what computing takes a second time; give one such table.")
        found |= made | {"links": found["links"] | made.get("links", {})}
    return found


def decoded(row: Mapping) -> Observation:
    """Seconds of a token of a whole batch, and the mean work of one: prefill and decoding over the new tokens."""
    config, tp, new = named_shape(row["model"]), row["tp"], row["new_tokens"]
    syncs, label = row["syncs_per_block"] * config.num_blocks, {key: row[key] for key in (*SAME_RUN[:-1], "new_tokens")}
    work, spent = Work(), dict.fromkeys(((unit, row["link"]) for unit in SPENT), 0.0)
    passes = timed_passes(config, tp, row["batch"], row["prompt_len"], new, 2)
    for a_pass, share in zip(passes.values(), (1 / new, 1 - 1 / new), strict=True):
        work += a_pass.work() * share
        for n, payload in a_pass.collectives(syncs):
            for unit, cost in zip(spent, (1, tp - 1, ring_bytes(payload, tp)), strict=True):
                spent[unit] += share * n * cost
    plan = {2: "all full", 1: "one sync a block", 0: "no sync"}[row["syncs_per_block"]]
    counts = work._asdict() | (spent if syncs and tp > 1 else {})
    return Observation(label | {"time": "run", "plan": plan}, counts, row["batch"] / row["tokens_per_s"])


def fit_decoding(observations: Sequence[Observation]) -> Calibration:
    """All-reduces first, beside whatever each run computes, and then the costs of that: neither bends for the other."""
    cells, runs = {}, []
    for o in observations:
        cell = (COMPUTED, *(o.label[key] for key in ("model", "tp", "batch", "prompt_len", "new_tokens")))
        cells[cell] = {unit: o.counts[unit] for unit in Work._fields}
        spent = {unit: n for unit, n in o.counts.items() if unit not in Work._fields}
        runs.append(Observation(o.label, spent | {cell: 1}, o.seconds))
    first = fit(runs)
    second = fit([Observation({}, counts, first[cell]) for cell, counts in cells.items()])
    return second | {unit: cost for unit, cost in first.items() if unit[0] in SPENT}


def profile_decoding(rows: Sequence[Mapping], name: str) -> dict:
    """Costs and links fitted to all rows; errors there, and of each tp and batch predicted from all others."""
    observed = [decoded(row) for row in rows]
    calibration, left_out = fit_decoding(observed), []
    for cell in dict.fromkeys((o.label["tp"], o.label["batch"]) for o in observed):
        kept = [o for o in observed if (o.label["tp"], o.label["batch"]) != cell]
        found = fit_decoding(kept) if kept else {}
        left_out += errors(found, [o for o in observed if o not in kept and o.counts.keys() <= found.keys()])
    links = {row["link"]: {unit: calibration.get((unit, row["link"]), 0.0) for unit in SPENT} for row in rows}
    found = {"fitted": errors(calibration, observed), "left_out": left_out}
    return {
        "costs": {kind: calibration[kind] for kind in Work._fields},
        "links": links,
        "syncs_measured": sorted({row["syncs_per_block"] for row in rows}),
        **_summary(found),
        "speedup_points": {use: worst_points(some) for use, some in found.items()},
    }


def _summary(rows: Mapping[str, Sequence[Mapping]]) -> dict:
    median = {use: float(np.median([abs(r["error"]) for r in some])) if some else None for use, some in rows.items()}
    return {"errors": rows, "median_error": median, "worst_error": {use: worst(some) for use, some in rows.items()}}


def profile_operators(rows: Sequence[Mapping], name: str) -> dict:
    """The table itself, exact on its own rows; errors of whole blocks, one degree left out at a time."""
    left_out = []
    for tp in dict.fromkeys(row["tp"] for row in rows):
        table = OperatorTable([row for row in rows if row["tp"] != tp])
        machine = Machine(name, gpu("a100").costs, table=table)
        for row in (row for row in rows if row["tp"] == tp and row["model"] in table.models()):
            block = Pass(tabled_shape(row["model"]), tp, tokens=row["tokens"]).block()
            timed = [(machine.seconds(o, tp), 1e-6 * row[f"{o.name}_us"]) for o in block if o.kind != ATTENTION]
            predicted, measured = map(sum, zip(*timed, strict=True))
            label = {key: row[key] for key in ("model", "tp", "tokens")}
            left_out.append(label | {"measured_ms": 1e3 * measured, "error": predicted / measured - 1})
    return {"operators": list(rows), **_summary({"left_out": left_out})}


def profile_all_reduces(rows: Sequence[Mapping], name: str) -> dict:
    """Tables by link and number of GPUs; errors of each size left out."""
    tables, left_out = {}, []
    for row in rows:
        table = tables.setdefault(row.get("link", name), {}).setdefault(row["devices"], {})
        table[float(row["bytes"])] = 1e-6 * row["us"]
    for link, devices, table in ((link, n, table) for link, found in tables.items() for n, table in found.items()):
        if len(table) < 3:
            raise SPDError(f"All-reduces of {link} over {devices} GPUs have {len(table)} sizes; it takes 3 or more.")
        for size, error in zip(sorted(table), left_out_errors(*zip(*sorted(table.items()), strict=True)), strict=True):
            left_out.append({"link": link, "devices": devices, "bytes": size, "error": error})
    return {"links": {link: {"tables": found} for link, found in tables.items()}, **_summary({"left_out": left_out})}
