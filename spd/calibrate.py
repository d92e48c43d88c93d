"""Fitting the latency model to measurements, checking it on others, and asking it about a shape, a machine and a link.

Predicted time is linear in the unit costs, so they are fitted by least squares of the relative error, none negative:
five costs of computation (`Costs`), one all-reduce latency a degree and one cost of a byte moved by the ring.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ValidationError
from scipy.optimize import nnls

from spd.comm import Link
from spd.config import DTYPES, ModelConfig, named_shape
from spd.errors import SPDError, one_of
from spd.latency import Prediction, predict
from spd.machines import (
    AllReduce,
    Costs,
    Machine,
    Work,
    communication,
    gpu,
    gpu_row,
    link_all_reduce,
    measured_all_reduce,
    ring_bytes,
    timed_passes,
)
from spd.plan import Plan
from spd.transport import PROCESS_GROUP

SCHEMA = 1
STATISTICS = ("median", "min")
SILENT = "no communication"
SAME_RUN = ("model", "tp", "link", "batch", "prompt_len", "time")
DEFAULT_GPU = "a100"
COMPARED = ("percent", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup")
ASSUMPTIONS = {
    "table": "Operator times of an A100 table; for other GPUs its efficiencies at their data sheet's peaks.",
    "calibration": "Unit costs of the calibration; no operator table.",
    "attention": "The attention core is counted from FLOPs and bytes at the output projection's efficiency.",
    "serial": "Nothing overlaps; a dropped sync point saves its all-reduce and nothing else.",
}
LATENCY, RING_BYTE = "latency", "ring_byte"  # what a collective costs: so much each, and for a byte that the ring moves


@dataclass(frozen=True)
class Observation:
    """One measured time and what was done in it."""

    label: dict[str, str | int | float | None]  # identifies it in tables
    work: Work
    collectives: Mapping[tuple, float]  # all-reduces by (LATENCY, link, degree), bytes moved by (RING_BYTE, link)
    seconds: float
    known: float = 0.0  # seconds of it that need no fit: an emulated link's


@dataclass(frozen=True)
class Calibration:
    """Fitted seconds a unit of what observations count."""

    costs: Costs
    collectives: dict[tuple, float]

    def seconds(self, observation: Observation) -> float:
        """Predicted time of what an observation did."""
        computing = observation.known + self.costs.seconds(observation.work)
        return sum((self.collectives[key] * n for key, n in observation.collectives.items()), computing)

    def of_link(self, link: str) -> tuple[dict[int, float], float]:
        """Its latency by degree, and what a byte that its ring moves costs; seconds."""
        latencies = {key[2]: seconds for key, seconds in self.collectives.items() if key[:2] == (LATENCY, link)}
        return latencies, self.collectives.get((RING_BYTE, link), 0.0)


def fit(observations: Sequence[Observation]) -> Calibration:
    """Least squares of the relative error, no cost negative."""
    if not observations:
        raise SPDError("There are no measurements to fit a calibration to.")
    keys = sorted({key for o in observations for key in o.collectives})
    matrix = np.array([[*o.work, *(o.collectives.get(key, 0) for key in keys)] for o in observations], dtype=float)
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1
    unknown = np.array([o.seconds - o.known for o in observations])
    weight = 1 / np.array([o.seconds for o in observations])
    found = nnls(matrix / scale * weight[:, None], unknown * weight)[0] / scale
    costs, collectives = np.split(found, [len(Work._fields)])
    return Calibration(Costs(*costs.tolist()), dict(zip(keys, collectives.tolist(), strict=True)))


def errors(calibration: Calibration, observations: Sequence[Observation]) -> list[dict]:
    """A row an observation: what it is, measured and predicted ms, and the relative error, predicted / measured - 1."""
    rows = []
    for o in observations:
        predicted = calibration.seconds(o)
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
    found, full = [], {tuple(row[k] for k in SAME_RUN): row for row in rows if row["plan"] == "all full"}
    for row in rows:
        base = full.get(tuple(row[k] for k in SAME_RUN))
        if base is not None and row["plan"] != SILENT:
            found.append(tuple(base[k] / row[k] for k in ("measured_ms", "predicted_ms")))
    return found


def observations_of(record: Mapping, statistic: str = "median") -> list[Observation]:
    """TTFT and TPOT (their median, or their min) of every plan and bound in a bench record.

    Its shape is a named one, or that of a model found here.
    """
    if record.get("command") != "bench":
        raise SPDError(f"Record {record.get('id')} is of {record.get('command')}, and a calibration needs bench's.")
    result, tp = record["result"], record["result"]["tp"]
    sizes = (result[key] for key in ("batch", "prompt_len", "new_tokens"))
    passes = timed_passes(_config_of(record), tp, *sizes, DTYPES[result["dtype"]].itemsize)
    emulated = link_all_reduce(Link.parse(result["link"]), tp) if result["link"] else lambda payload: 0.0
    label = {"model": record["config"].get("shape") or record["model"]["name"]}
    label |= {key: result[key] for key in ("tp", "link", "batch", "prompt_len")}
    rows = [(f"{row['blocks_dropped']} dropped", row) for row in result["plans"]]
    rows += [(name.replace("_", " ") if row["communicates"] else SILENT, row) for name, row in result["bounds"].items()]
    found = []
    for name, row in rows:
        syncs = Plan.from_letters(row["plan"]).syncs() if row["communicates"] else 0
        for kind, a_pass in passes.items():
            if row[f"{kind}_ms"] is not None:
                counted = a_pass.collectives(syncs)
                moved = sum(n * ring_bytes(payload, tp) for n, payload in counted)
                collectives = {(LATENCY, "real", tp): sum(n for n, _ in counted), (RING_BYTE, "real"): moved}
                known, seconds = communication(a_pass, emulated, syncs), 1e-3 * row[f"{kind}_ms"][statistic]
                of_row = {**label, "plan": name, "time": kind.upper()}
                found.append(Observation(of_row, a_pass.work(), collectives if tp > 1 else {}, seconds, known))
    return found


def _config_of(record: Mapping) -> ModelConfig:
    options = record.get("config") or {}
    if options.get("shape"):
        return named_shape(options["shape"])
    from spd.pretrained import resolve

    return ModelConfig.from_folder(resolve(options["model"]))


def profile(records: Sequence[Mapping], check: Sequence[Mapping] = (), statistic: str = "median") -> dict:
    """The document of `spd profile`: a calibration fitted to bench records, its errors there and on those to `check`.

    All are of one machine, dtype and (on CPUs, whose cores they share) tp and transport. `statistic` says which time
    of a plan's repetitions counts: `median`, or `min` where other work on the machine only ever lengthens them.
    `worst_error` and `speedup_points` (`worst_points`) are given for TTFT and TPOT.
    """
    if not records:
        raise SPDError("A calibration needs records of bench, and none was given.")
    one_of("statistic", statistic, STATISTICS)
    kinds = {_machine_of(record) for record in [*records, *check]}
    if len(kinds) > 1:
        listed = "; ".join(sorted(map(str, kinds)))
        raise SPDError(f"The records are not of one machine, dtype, tp and transport: {listed}.")
    fitted, checked = ([o for r in some for o in observations_of(r, statistic)] for some in (records, check))
    calibration = fit(fitted)
    machine, dtype, _ = kinds.pop()
    latencies, ring_byte = calibration.of_link("real")
    rows = {"fitted": errors(calibration, fitted), "checked": errors(calibration, checked)}
    return {
        "spd_calibration": SCHEMA,
        "name": machine,
        "dtype": dtype,
        "statistic": statistic,
        "costs": asdict(calibration.costs),
        "all_reduce": {"latencies": {str(d): s for d, s in latencies.items()}, "ring_byte": ring_byte},
        "records": {"fitted": [r["id"] for r in records], "checked": [r["id"] for r in check]},
        "worst_error": {use: _by_time(worst, found) for use, found in rows.items()},
        "speedup_points": {use: _by_time(worst_points, found) for use, found in rows.items()},
        "errors": rows,
    }


def _by_time(summary: Callable, rows: Sequence[Mapping]) -> dict[str, float | None]:
    return {kind: summary([row for row in rows if row["time"] == kind]) for kind in ("TTFT", "TPOT")}


def _machine_of(record: Mapping) -> tuple[str, str, str]:
    hardware, result = record["hardware"], record["result"]
    gpus = hardware.get("gpus") or []
    name = gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores']} cores"
    return name, result["dtype"], "" if gpus else f"tp={result['tp']}, {result.get('transport') or PROCESS_GROUP}"


class _AllReduce(BaseModel):
    latencies: dict[int, float]
    ring_byte: float


class _File(BaseModel):
    """What of `profile`'s document is relied upon."""

    spd_calibration: Literal[SCHEMA]
    name: str
    dtype: Literal[tuple(DTYPES)]
    costs: Costs
    all_reduce: _AllReduce


def read_calibration(path: Path, tp: int) -> tuple[Machine, AllReduce]:
    """The machine in a file that `spd profile --out` wrote, and its own all-reduce over `tp` processes."""
    try:
        found = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SPDError(f"The calibration at {path} cannot be read ({error.strerror}).") from error
    except ValidationError:
        raise SPDError(f"{path} is not a calibration; 'spd profile RECORDS --out {path}' makes one.") from None
    machine = Machine(found.name, found.costs, DTYPES[found.dtype].itemsize)
    return machine, fitted_all_reduce(found.all_reduce.latencies, found.all_reduce.ring_byte, tp)


def fitted_all_reduce(latencies: Mapping[int, float], ring_byte: float, tp: int) -> AllReduce:
    """One latency (seconds) a degree, one cost (seconds) of a byte that the ring moves."""
    if tp == 1:
        return lambda payload: 0.0
    if tp not in latencies:
        known = ", ".join(map(str, sorted(latencies))) or "none"
        raise SPDError(f"The calibration has no all-reduce over tp={tp}; degrees calibrated: {known}.")
    return lambda payload: latencies[tp] + ring_bytes(payload, tp) * ring_byte


def followed_by(real: AllReduce, link: str | None, tp: int) -> AllReduce:
    """An all-reduce, and after it an emulated link where one is named (as `bench --link` does)."""
    if link is None:
        return real
    emulated = link_all_reduce(Link.parse(link), tp)
    return lambda payload: real(payload) + emulated(payload)


def ask(
    shape: str,
    percent: float | list[float],
    tp: int = 8,
    *,
    gpu_name: str | None = None,
    nodes: int = 1,
    link: str | None = None,
    calibration: Path | None = None,
    batch: int = 1,
    prompt_len: int = 128,
    new_tokens: int = 16,
    launch_us: float = 0.0,
) -> tuple[dict, ModelConfig]:
    """The document of `spd predict`, with what was assumed, and the shape.

    Of several percentages the document is the last one's; `percentages` has TTFT, TPOT, reduction and speedup of all.
    The machine is a named GPU (a100 if none is named) or a calibration. Its all-reduce is the link given (beside a
    calibration's own: emulated after it), else NCCL's measured table, else the calibration's.
    """
    config = named_shape(shape)
    config.validate_tp(tp)
    if tp % nodes:
        raise SPDError(f"tp={tp} cannot be spread evenly over {nodes} nodes.")
    if calibration is not None and gpu_name is not None:
        raise SPDError("A calibration is a machine already; give either --gpu or --calibration.")
    if calibration is not None:
        machine, own = read_calibration(calibration, tp)
        all_reduce, words = followed_by(own, link, tp), f"calibrated{f', then {link}' if link else ''}"
    else:
        machine = gpu(gpu_name or DEFAULT_GPU, 1e-6 * launch_us)
        all_reduce, words = _gpu_all_reduce(machine.name, tp, nodes, link)
    prediction = Prediction(config, machine, all_reduce, tp, batch, prompt_len, new_tokens)
    results = [predict(prediction, one) for one in (percent if isinstance(percent, list) else [percent])]
    result = results[-1]
    if len(results) > 1:
        result["percentages"] = [{key: one[key] for key in COMPARED} for one in results]
    asked = {"shape": shape, "machine": machine.name, "nodes": nodes, "link": words, "launch_us": launch_us}
    asked |= {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens}
    assumed = ("table" if calibration is None else "calibration", "attention", "serial")
    return result | asked | {"assumptions": [ASSUMPTIONS[name] for name in assumed]}, config


def _gpu_all_reduce(gpu_name: str, tp: int, nodes: int, link: str | None) -> tuple[AllReduce, str]:
    """That of a link or of NCCL's table, and what it is called."""
    if link is not None:
        return link_all_reduce(Link.parse(link), tp), link
    if tp == 1:
        return lambda payload: 0.0, "none"
    name = f"NCCL measured on {gpu_row(gpu_name)['all_reduce_system']}, {nodes} x {tp // nodes}"
    return measured_all_reduce(gpu_name, tp, nodes), name
