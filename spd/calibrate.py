"""Fitting the latency model to measurements, and checking it on others.

Predicted time is linear in the unit costs, so they are fitted by least squares of the relative error, none negative:
five costs of computation (`Costs`), one all-reduce latency a degree and one cost of a byte moved by the ring.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel
from scipy.optimize import nnls

from spd.comm import Link
from spd.config import DTYPES, ModelConfig, named_shape
from spd.errors import SPDError, one_of
from spd.machines import AllReduce, Costs, Machine, Work, link_all_reduce, ring_bytes, timed_passes
from spd.plan import Plan
from spd.pretrained import resolve
from spd.records import parsed
from spd.transport import PROCESS_GROUP

SCHEMA = 1
SILENT = "no communication"
SAME_RUN = ("model", "tp", "link", "batch", "prompt_len", "time")
LATENCY, RING_BYTE = "latency", "ring_byte"  # what a collective costs: so much each, and for a byte that the ring moves


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


class _RealAllReduce(BaseModel):
    latencies: dict[int, float]
    ring_byte: float


class _File(BaseModel):
    """What of `profile`'s document is relied upon."""

    spd_calibration: Literal[SCHEMA]
    name: str
    dtype: Literal[tuple(DTYPES)]
    costs: dict[Literal[Work._fields], float]
    all_reduce: _RealAllReduce


def read(path: Path, tp: int) -> tuple[Machine, AllReduce]:
    """The machine in a file that `spd profile --out` wrote, and its own all-reduce over `tp` processes."""
    found = parsed(path, _File, f"is not a calibration; 'spd profile RECORDS --out {path}' makes one")
    machine = Machine(found.name, Costs(**found.costs), DTYPES[found.dtype].itemsize)
    return machine, fitted_all_reduce(found.all_reduce.latencies, found.all_reduce.ring_byte, tp)


def fitted_all_reduce(latencies: Mapping[int, float], ring_byte: float, tp: int) -> AllReduce:
    """One latency (seconds) a degree, one cost (seconds) of a byte that the ring moves."""
    if tp > 1 and tp not in latencies:
        known = ", ".join(map(str, sorted(latencies))) or "none"
        raise SPDError(f"The calibration has no all-reduce over tp={tp}; degrees calibrated: {known}.")
    latency = latencies[tp] if tp > 1 else 0.0  # and the ring moves nothing
    return AllReduce("calibrated", lambda payload: latency + ring_bytes(payload, tp) * ring_byte)
