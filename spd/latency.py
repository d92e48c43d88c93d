"""Predicted latency: time to first token (TTFT), time per output token (TPOT), and what dropping sync points gains.

A pass takes the sum of its operators' device times, plus launch time an operator (none under CUDA graphs), plus one
all-reduce a sync point that is kept, and one all-gather of the logits. Nothing overlaps; dropping a sync point changes
nothing but its all-reduce.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from spd.calibrate import SCHEMA
from spd.comm import Link
from spd.config import DTYPES, ModelConfig, named_shape
from spd.errors import SPDError
from spd.machines import (
    KINDS,
    AllReduce,
    Costs,
    Machine,
    OperatorTable,
    Pass,
    gpu,
    link_all_reduce,
    measured_all_reduce,
    preset_all_reduce,
    presets,
    ring_bytes,
    scaled_all_reduce,
    timed_passes,
)
from spd.plan import Plan
from spd.planner import blocks_of
from spd.records import parsed

TIMES = ("ttft", "tpot")
DEFAULT_GPU = "a100"
COMPARED = ("percent", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup")
TABLE = "Operator times of an A100 table; for other GPUs its efficiencies at their data sheet's peaks."
CALIBRATION = "Unit costs of the calibration; no operator table."
BETWEEN = "One sync a block was not measured there: it is predicted between two syncs and none."
ASSUMPTIONS = [
    "The attention core is counted from FLOPs and bytes at the output projection's efficiency.",
    "Nothing overlaps; a dropped sync point saves its all-reduce and nothing else.",
]


@dataclass(frozen=True)
class Time:
    """Seconds of one pass, by what they go to: kinds of operators, launch, communication."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def communication(self) -> float:
        return self.parts["communication"]

    def parts_ms(self) -> dict[str, float]:
        return {part: 1e3 * seconds for part, seconds in self.parts.items()}

    def against(self, full: "Time") -> dict[str, float]:
        """Milliseconds, share of communication, and against `full` reduction 1 - t_p/t_0 and speedup t_0/t_p."""
        ratios = {"reduction": 1 - self.total / full.total, "speedup": full.total / self.total}
        return {"ms": 1e3 * self.total, "communication_share": self.communication / self.total, **ratios}


@dataclass(frozen=True)
class Prediction:
    """TTFT and TPOT of a shape on a machine, under any number of dropped attention sync points."""

    config: ModelConfig
    machine: Machine
    all_reduce: Callable[[float], float]
    tp: int
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded; TPOT is their mean

    @property
    def passes(self) -> dict[str, Pass]:
        asked = self.config, self.tp, self.batch, self.prompt_len, self.new_tokens
        return timed_passes(*asked, self.machine.element_size)

    def time(self, kind: str, syncs: int) -> Time:
        """Of `ttft` or `tpot` with `syncs` all-reduces."""
        a_pass, parts = self.passes[kind], dict.fromkeys((*KINDS, "launch"), 0.0)
        for operator, times in a_pass.operators():
            parts[operator.kind] += times * self.machine.seconds(operator, self.tp)
            parts["launch"] += times * self.machine.launch
        return Time(parts | {"communication": a_pass.communication(self.all_reduce, syncs)})

    def dropping(self, kind: str, percent: float) -> Time:
        """With the attention sync point of `percent` of the blocks dropped."""
        return self.time(kind, syncs_at(self.config, percent))

    def compare(self, kind: str, percent: float) -> dict[str, float]:
        """That `against` 0 %."""
        return self.dropping(kind, percent).against(self.dropping(kind, 0))

    def bound(self, kind: str) -> dict[str, float]:
        """The same without any communication."""
        return self.time(kind, 0).against(self.dropping(kind, 0))


def syncs_at(config: ModelConfig, percent: float) -> int:
    """All-reduces a pass when `percent` of the blocks drop theirs after attention."""
    if not 0 <= percent <= 100:
        raise SPDError(f"{percent:g} is not a percentage between 0 and 100.")
    return Plan.dropping(config.num_blocks, range(blocks_of(percent, config.num_blocks))).syncs()


def predict(prediction: Prediction, percent: float) -> dict:
    """TTFT and TPOT at `percent`, beside 0 % and the ceilings.

    `ceiling` has what dropping could give at most (every attention sync point) and what any method could (no
    communication at all). Top-level share, reduction and speedup are the TTFT's; `tpot` has its own.
    """
    asked, full, dropped = ({k: prediction.compare(k, p) for k in TIMES} for p in (percent, 0, 100))
    times = {f"{kind}_ms": asked[kind].pop("ms") for kind in TIMES}
    return {
        **times,
        **asked["ttft"],
        "tpot": asked["tpot"],
        "percent": percent,
        "blocks_dropped": blocks_of(percent, prediction.config.num_blocks),
        "ceiling": {"all_attention_dropped": dropped, "no_communication": {k: prediction.bound(k) for k in TIMES}},
        "all_full": full,
        "parts_ms": {kind: prediction.dropping(kind, percent).parts_ms() for kind in TIMES},
    }


def ask(
    shape: str,
    percent: float | list[float],
    tp: int = 8,
    *,
    gpu_name: str | None = None,
    nodes: int | None = None,
    link: str | None = None,
    calibration: Path | None = None,
    launch_us: float = 0.0,
    **prompt: int,
) -> tuple[dict, ModelConfig]:
    """The document of `spd predict`, with what was assumed, and the shape. `prompt`: sizes of a `Prediction`.

    Of several percentages the document is the last one's; `percentages` has TTFT, TPOT, reduction and speedup of all.
    The machine is a named GPU (a100 if none is named) or a calibration. Its all-reduce is the link given (without a
    name, emulated after a calibration's own, as `bench --link` does), else the calibration's, else NCCL's table.
    """
    config = named_shape(shape)
    config.validate_tp(tp)
    if tp % (nodes or 1):
        raise SPDError(f"tp={tp} cannot be spread evenly over {nodes} nodes.")
    found = None if calibration is None else read(calibration)
    own_machine = found and found.machine()
    if own_machine and gpu_name is not None:
        raise SPDError("A calibration is a machine already; give either --gpu or --machine.")
    machine = own_machine or gpu(gpu_name or DEFAULT_GPU, 1e-6 * launch_us)
    labels = {} if found is None else found.links
    over = None if link is None or link in labels else all_reduce_over(link, tp, nodes, labels)
    own = found and found.own(tp, link)
    if over and own and link not in presets():
        all_reduce = followed_by(own, over)
    elif labels and not (over or own):
        raise SPDError(f"{calibration} has several links; say which with --link: {', '.join(labels)}.")
    else:
        all_reduce = over or own or measured_all_reduce(machine.name, tp, nodes or 1)
    prediction = Prediction(config, machine, all_reduce, tp, **prompt)
    results = [predict(prediction, one) for one in (percent if isinstance(percent, list) else [percent])]
    result = results[-1]
    if len(results) > 1:
        result["percentages"] = [{key: one[key] for key in COMPARED} for one in results]
    note = config.padding_note(tp)
    assumed = [CALIBRATION if machine.table is None else TABLE, *ASSUMPTIONS, *([note] if note else [])]
    if found and found.syncs_measured and 1 not in found.syncs_measured:
        assumed.append(BETWEEN)
    if (nodes or 1) > 1 and over is not None:
        assumed.append(f"The link is the slowest hop of one ring over all GPUs: that between the {nodes} nodes.")
    asked = {"shape": shape, "machine": machine.name, "nodes": nodes or all_reduce.nodes, "link": all_reduce.name}
    asked |= {"launch_us": launch_us} | {key: getattr(prediction, key) for key in ("batch", "prompt_len", "new_tokens")}
    return result | asked | {"assumptions": assumed}, config


def all_reduce_over(link: str, tp: int, nodes: int | None = None, labels: Iterable[str] = ()) -> AllReduce:
    """Of a link's name (`labels`: what else would be one), or of its slowest hop and latency as in `10GBps,20us`."""
    if "," in link:
        return link_all_reduce(Link.parse(link), tp)
    if link in presets():
        return preset_all_reduce(link, tp, nodes)
    known = ", ".join([*labels, *presets()])
    raise SPDError(f"'{link}' is not a link; give BANDWIDTH,LATENCY as in '10GBps,20us', or one of {known}.")


class _Link(BaseModel):
    latencies: dict[int, float] | None = None  # seconds, by degree
    latency: float = 0.0  # or for all degrees, and
    step: float = 0.0  # for a further GPU
    ring_byte: float = 0.0
    tables: dict[int, dict[float, float]] = {}  # or seconds by bytes, by number of GPUs

    def all_reduce(self, name: str, tp: int) -> AllReduce:
        if self.tables and tp > 1:
            devices = min(self.tables, key=lambda one: abs(np.log(one / tp)))
            return scaled_all_reduce(name, devices, tuple(zip(*sorted(self.tables[devices].items()), strict=True)), tp)
        latencies = {tp: self.latency + self.step * (tp - 1)} if self.latencies is None else self.latencies
        return fitted_all_reduce(latencies, self.ring_byte, tp, name)


class MachineFile(BaseModel):
    """What of `profile`'s document is relied upon."""

    spd_calibration: Literal[SCHEMA]
    name: str
    dtype: Literal[tuple(DTYPES)]
    costs: dict[Literal[Costs._fields], float] | None = None
    operators: list[dict] | None = None
    all_reduce: _Link | None = None  # of bench's records
    links: dict[str, _Link] = {}  # of tables
    syncs_measured: list[int] = []

    def machine(self) -> Machine | None:
        """None where only all-reduces were measured."""
        if self.operators:
            return Machine(self.operators[0]["device"], gpu(DEFAULT_GPU).costs, table=OperatorTable(self.operators))
        return self.costs and Machine(self.name, Costs(**self.costs), DTYPES[self.dtype].itemsize)

    def own(self, tp: int, link: str | None = None) -> AllReduce | None:
        """Its all-reduce over the link of that label, else that of bench's records."""
        if link in self.links:
            return self.links[link].all_reduce(link, tp)
        return self.all_reduce and self.all_reduce.all_reduce("calibrated", tp)


def read(path: Path) -> MachineFile:
    """What `spd profile --out` wrote."""
    return parsed(path, MachineFile, f"is not a calibration; 'spd profile RECORDS --out {path}' makes one")


def fitted_all_reduce(latencies: dict[int, float], ring_byte: float, tp: int, name: str = "calibrated") -> AllReduce:
    """One latency (seconds) a degree, one cost (seconds) of a byte that the ring moves."""
    if tp > 1 and tp not in latencies:
        known = ", ".join(map(str, sorted(latencies))) or "none"
        raise SPDError(f"The calibration has no all-reduce over tp={tp}; degrees calibrated: {known}.")
    latency = latencies[tp] if tp > 1 else 0.0  # and the ring moves nothing
    return AllReduce(name, lambda payload: latency + ring_bytes(payload, tp) * ring_byte)


def followed_by(real: AllReduce, emulated: AllReduce) -> AllReduce:
    return AllReduce(f"{real.name}, then {emulated.name}", lambda payload: real(payload) + emulated(payload))
