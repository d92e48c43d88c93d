"""A user's question to the latency model: this shape, on that machine, over this link.

Fitting the latency model to measurements, and checking it on measurements it was not fitted to.

Predicted time is linear in the unit costs, so they are fitted by least squares of the relative error, none negative:
five costs of computation (`Costs`), one all-reduce latency a degree and one cost of a byte moved by the ring.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from spd.comm import Link
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError
from spd.latency import Setting, predict
from spd.machines import (
    AllReduce,
    Both,
    Costs,
    FittedAllReduce,
    Machine,
    Pass,
    Work,
    gpu,
    measured_all_reduce,
    ring_bytes,
)
from spd.plan import Plan
from spd.transport import PROCESS_GROUP

# ---------------------------------------------------------------- Fitting the latency model to measurements


SCHEMA = 1
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATISTICS = ("median", "min")
SILENT = "no communication"
COSTS = tuple(Costs.__dataclass_fields__)


@dataclass(frozen=True)
class Observation:
    """One measured time and what was done in it."""

    label: dict[str, str | int | float | None]  # identifies it in tables
    work: Work
    syncs: Mapping[tuple[str, int], float]  # number of all-reduces by (link, degree)
    ring: Mapping[str, float]  # bytes moved by the ring, by link
    seconds: float
    known: float = 0.0  # seconds of it that need no fit: an emulated link's


@dataclass(frozen=True)
class Calibration:
    """Fitted unit costs, and all-reduces by the name of their link."""

    costs: Costs
    links: dict[str, FittedAllReduce]

    def seconds(self, observation: Observation) -> float:
        """Predicted time of what an observation did."""
        total = observation.known + self.costs.seconds(observation.work)
        for (link, degree), count in observation.syncs.items():
            total += count * self.links[link].latencies[degree]
        return total + sum(moved * self.links[link].ring_byte for link, moved in observation.ring.items())

    def error(self, observation: Observation) -> float:
        """Predicted over measured, minus 1."""
        return self.seconds(observation) / observation.seconds - 1


def fit(observations: Sequence[Observation]) -> Calibration:
    """Least squares of the relative error, no cost negative. Raises SPDError when there is nothing to fit."""
    if not observations:
        raise SPDError("There are no measurements to fit a calibration to.")
    latencies = sorted({key for o in observations for key in o.syncs})
    links = sorted({link for o in observations for link in o.ring})
    matrix = np.array([[*o.work.values(), *(o.syncs.get(k, 0) for k in latencies), *(o.ring.get(k, 0) for k in links)]
                       for o in observations], dtype=float)  # fmt: skip
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1
    unknown = np.array([o.seconds - o.known for o in observations])
    weight = 1 / np.array([o.seconds for o in observations])
    found = nnls(matrix / scale * weight[:, None], unknown * weight)[0] / scale
    costs, rest = Costs(*map(float, found[: len(COSTS)])), found[len(COSTS) :]
    latency = dict(zip(latencies, map(float, rest), strict=False))
    ring = dict(zip(links, map(float, rest[len(latencies) :]), strict=True))
    by_link = {link: {d: s for (name, d), s in latency.items() if name == link} for link in links}
    return Calibration(costs, {link: FittedAllReduce(by_link[link], ring[link]) for link in links})


def errors(calibration: Calibration, observations: Sequence[Observation]) -> list[dict]:
    """A row an observation: what it is, measured and predicted ms, relative error."""
    return [
        {**o.label, "measured_ms": 1e3 * o.seconds, "predicted_ms": 1e3 * calibration.seconds(o),
         "error": calibration.error(o)} for o in observations
    ]  # fmt: skip


def worst(rows: Sequence[Mapping]) -> float | None:
    return max((abs(row["error"]) for row in rows), default=None)


# ---------------------------------------------------------------- measurements: records of `bench`


def observations_of(record: Mapping, statistic: str = "median") -> list[Observation]:
    """TTFT and TPOT (their median, or their min) of every plan and bound in a bench record.

    Raises:
        SPDError: not a bench record, or its shape is neither named nor that of a model found here.
    """
    if record.get("command") != "bench":
        raise SPDError(f"Record {record.get('id')} is of {record.get('command')}, and a calibration needs bench's.")
    result, config = record["result"], _config_of(record)
    rows = [(f"{row['blocks_dropped']} dropped", row) for row in result["plans"]]
    rows += [(name.replace("_", " ") if row["communicates"] else SILENT, row) for name, row in result["bounds"].items()]
    return [o for name, row in rows for o in _observations(record, config, name, row, statistic)]


def _observations(record: Mapping, config: ModelConfig, name: str, row: Mapping, statistic: str) -> list[Observation]:
    result = record["result"]
    machine = Machine("", Costs(0, 0, 0, 0, 0), ELEMENT_SIZES[result["dtype"]])
    setting = Setting(config, machine, FittedAllReduce({}, 0), result["tp"], result["batch"], result["prompt_len"],
                      max(1, result["new_tokens"]))  # fmt: skip
    label = {"model": record["config"].get("shape") or record["model"]["name"]}
    label |= {key: result[key] for key in ("tp", "link", "batch", "prompt_len")} | {"plan": name}
    syncs = Plan.from_letters(row["plan"]).syncs() if row["communicates"] else 0
    found = [(setting.prefill(), "TTFT", row["ttft_ms"])]
    if row["tpot_ms"] is not None:
        found.append((setting.decode(), "TPOT", row["tpot_ms"]))
    link = Link.parse(result["link"]) if result["link"] else None
    return [_observe({**label, "time": kind}, p, syncs, link, 1e-3 * ms[statistic]) for p, kind, ms in found]


def _observe(label: dict, a_pass: Pass, syncs: int, link: Link | None, seconds: float) -> Observation:
    tp, collectives = a_pass.tp, a_pass.collectives(syncs)
    known = 0.0 if link is None else sum(n * link.all_reduce_seconds(payload, tp) for n, payload in collectives)
    count, moved = sum(n for n, _ in collectives), sum(n * ring_bytes(payload, tp) for n, payload in collectives)
    counts, ring = ({}, {}) if tp == 1 else ({("real", tp): count}, {"real": moved})
    return Observation(label, a_pass.work(), counts, ring, seconds, known)


def _config_of(record: Mapping) -> ModelConfig:
    options = record.get("config") or {}
    if options.get("shape"):
        return named_shape(options["shape"])
    from spd.pretrained import resolve

    return ModelConfig.from_folder(resolve(options["model"]))


# ---------------------------------------------------------------- the document of `spd profile`


def profile(records: Sequence[Mapping], check: Sequence[Mapping] = (), statistic: str = "median") -> dict:
    """A calibration fitted to bench records, with its errors there and on the records to `check`.

    `statistic` says which time of a plan's repetitions counts: `median`, or `min` where other work on the machine
    only ever lengthens them.

    `worst_error` and `speedup_points` (how far predicted and measured speedup of plans against all full lie apart, in
    percentage points) are given for TTFT and TPOT, of the records fitted and of those checked.

    Raises:
        SPDError: no records, or some of another machine, dtype or (on CPUs) tp and transport: their cores are shared.
    """
    if not records:
        raise SPDError("A calibration needs records of bench, and none was given.")
    if statistic not in STATISTICS:
        raise SPDError(f"Unknown statistic '{statistic}'; known: {', '.join(STATISTICS)}.")
    kinds = {_machine_of(record) for record in [*records, *check]}
    if len(kinds) > 1:
        listed = "; ".join(sorted(map(str, kinds)))
        raise SPDError(f"The records are not of one machine, dtype, tp and transport: {listed}.")
    fitted = [o for record in records for o in observations_of(record, statistic)]
    held_out = [o for record in check for o in observations_of(record, statistic)]
    calibration = fit(fitted)
    machine, dtype = _machine_of(records[0])[:2]
    real = calibration.links.get("real", FittedAllReduce({}, 0.0))
    rows = {"fitted": errors(calibration, fitted), "checked": errors(calibration, held_out)}
    return {
        "spd_calibration": SCHEMA,
        "name": machine,
        "dtype": dtype,
        "statistic": statistic,
        "costs": asdict(calibration.costs),
        "all_reduce": {"latencies": {str(d): s for d, s in real.latencies.items()}, "ring_byte": real.ring_byte},
        "records": {"fitted": [r["id"] for r in records], "checked": [r["id"] for r in check]},
        "worst_error": {use: _by_time(worst, found) for use, found in rows.items()},
        "speedup_points": {use: _by_time(_worst_points, found) for use, found in rows.items()},
        "errors": rows,
    }


def _by_time(summary: Callable, rows: Sequence[Mapping]) -> dict[str, float | None]:
    return {kind: summary([row for row in rows if row["time"] == kind]) for kind in ("TTFT", "TPOT")}


def _machine_of(record: Mapping) -> tuple[str, str, str]:
    hardware, result = record["hardware"], record["result"]
    gpus = hardware.get("gpus") or []
    name = gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores']} cores"
    return name, result["dtype"], "" if gpus else f"tp={result['tp']}, {result.get('transport') or PROCESS_GROUP}"


def _worst_points(rows: Sequence[Mapping]) -> float | None:
    return max((100 * abs(measured - predicted) for measured, predicted in speedups(rows)), default=None)


def speedups(rows: Sequence[Mapping]) -> list[tuple[float, float]]:
    """Measured and predicted speedup of `errors`' rows against `all full` of the same run.

    Of plans: the bound without communication is no speedup that any plan has.
    """
    found, same_run = [], ("model", "tp", "link", "batch", "prompt_len", "time")
    full = {tuple(row[k] for k in same_run): row for row in rows if row["plan"] == "all full"}
    for row in rows:
        base = full.get(tuple(row[k] for k in same_run))
        if base is not None and row["plan"] != SILENT:
            found.append(tuple(base[k] / row[k] for k in ("measured_ms", "predicted_ms")))
    return found


def read_calibration(path: Path) -> tuple[Machine, FittedAllReduce]:
    """The machine in a file that `spd profile --out` wrote, and its own all-reduce.

    Raises:
        SPDError: unreadable, or not such a file.
    """
    try:
        document = json.loads(path.read_text())
        if document["spd_calibration"] != SCHEMA:
            raise KeyError
        costs, real = Costs(**document["costs"]), document["all_reduce"]
        latencies = {int(degree): float(seconds) for degree, seconds in real["latencies"].items()}
        machine = Machine(document["name"], costs, ELEMENT_SIZES[document["dtype"]])
        return machine, FittedAllReduce(latencies, float(real["ring_byte"]))
    except OSError as error:
        raise SPDError(f"The calibration at {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError):
        raise SPDError(f"{path} is not a calibration; 'spd profile RECORDS --out {path}' makes one.") from None


def over_link(real: FittedAllReduce, link: str | None) -> FittedAllReduce | Both:
    """A calibration's all-reduce, followed by an emulated link where one is named (as `bench --link` does)."""
    return real if link is None else Both(real, Link.parse(link))


# ---------------------------------------------------------------- A user's question to the latency model: thi


DEFAULT_GPU = "a100"
COMPARED = ("percent", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup")
ASSUMPTIONS = {
    "table": "Operator times of an A100 table; for other GPUs its efficiencies at their data sheet's peaks.",
    "calibration": "Unit costs of the calibration; no operator table.",
    "attention": "The attention core is counted from FLOPs and bytes at the output projection's efficiency.",
    "serial": "Nothing overlaps; a dropped sync point saves its all-reduce and nothing else.",
}


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

    Raises:
        SPDError: unknown shape or GPU, malformed link, impossible tp, or no all-reduce known for it.
    """
    config = named_shape(shape)
    config.validate_tp(tp)
    if tp % nodes:
        raise SPDError(f"tp={tp} cannot be spread evenly over {nodes} nodes.")
    if calibration is not None and gpu_name is not None:
        raise SPDError("A calibration is a machine already; give either --gpu or --calibration.")
    if calibration is not None:
        machine, own = read_calibration(calibration)
        all_reduce, words = over_link(own, link), f"calibrated{f', then {link}' if link else ''}"
    else:
        machine = gpu(gpu_name or DEFAULT_GPU, 1e-6 * launch_us)
        all_reduce, words = _gpu_link(machine, tp, nodes, link)
    setting = Setting(config, machine, all_reduce, tp, batch, prompt_len, new_tokens)
    asked_for = percent if isinstance(percent, list) else [percent]
    results = [predict(setting, one) for one in asked_for]
    result = results[-1]
    if len(results) > 1:
        result["percentages"] = [{key: one[key] for key in COMPARED} for one in results]
    asked = {"shape": shape, "machine": machine.name, "nodes": nodes, "link": words, "batch": batch,
             "prompt_len": prompt_len, "new_tokens": new_tokens, "launch_us": launch_us}  # fmt: skip
    source = "table" if calibration is None else "calibration"
    return result | asked | {"assumptions": [ASSUMPTIONS[k] for k in (source, "attention", "serial")]}, config


def _gpu_link(machine: Machine, tp: int, nodes: int, link: str | None) -> tuple[AllReduce, str]:
    if link is not None:
        return Link.parse(link), link
    if tp == 1:
        return FittedAllReduce({}, 0.0), "none"
    measured = measured_all_reduce(machine.name, tp, nodes)
    return measured, measured.name
