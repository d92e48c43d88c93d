"""Predicted latency: time to first token (TTFT), time per output token (TPOT), and what plans gain.

A pass takes the sum of its operators' device times, plus launch time an operator (none under CUDA graphs), plus one
all-reduce a sync point that is kept whole, two collectives of packed bytes one in few bits, and one all-gather of the
logits. Nothing overlaps; a dropped sync point saves its all-reduce and nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from spd.calibrate import SCHEMA
from spd.comm import Link
from spd.config import DTYPES, ModelConfig
from spd.errors import SPDError
from spd.links import (
    AllReduce,
    all_reduce_over,
    fitted_all_reduce,
    followed_by,
    formula,
    link_all_reduce,
    measured_all_reduce,
    presets,
    scaled_all_reduce,
)
from spd.machines import KINDS, Costs, Machine, OperatorTable, Pass, gpu, timed_passes
from spd.plan import Plan
from spd.planner import blocks_of
from spd.records import parsed

TIMES = ("ttft", "tpot")
DEFAULT_GPU = "a100"
COMPARED = ("tp", "batch", "prompt_len", "percent", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup")
COMPARED += ("ceiling", "memory_bytes", "fits")
GAINS = (0.05, 0.1, 0.2)  # that a break-even is found for
TABLE = "Operator times of an A100 table; for other GPUs its efficiencies at their data sheet's peaks."
DATA_SHEET = "{} is known by its data sheet alone: no time was measured on it."
CALIBRATION = "Unit costs of the calibration; no operator table."
BETWEEN = "One sync a block was not measured there: it is predicted between two syncs and none."
ROUNDED = "A sync in few bits is two collectives, like all-reduces of half of its packed bytes, and three kernels."
NODES = "The link is the slowest hop of one ring over all GPUs: that between the {} nodes."
NODE_LOCAL = "Syncs inside groups run over {}."
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
    """TTFT and TPOT of a shape on a machine, under any plan. `all_reduce` joins all shards, `inside` some of a node."""

    config: ModelConfig
    machine: Machine
    all_reduce: AllReduce
    tp: int
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded; TPOT is their mean
    inside: Callable[[int], AllReduce] | None = None  # by number of shards

    @cached_property
    def passes(self) -> dict[str, Pass]:
        asked = self.config, self.tp, self.batch, self.prompt_len, self.new_tokens
        return timed_passes(*asked, self.machine.element_size)

    @cached_property
    def full(self) -> Plan:
        return Plan.full(self.config.num_blocks)

    def time(self, kind: str, plan: Plan | None) -> Time:
        """Of `ttft` or `tpot` under a plan; None: without any communication."""
        a_pass, parts = self.passes[kind], dict.fromkeys((*KINDS, "launch"), 0.0)
        rounded = [] if plan is None else plan.rounded(self.config.hidden_size, self.tp)
        for operator, times in a_pass.operators(len(rounded)):
            parts[operator.kind] += times * self.machine.seconds(operator, self.tp)
            parts["launch"] += times * self.machine.launch
        if plan is None:
            return Time(parts | {"communication": 0.0})
        communication = a_pass.communication(self.all_reduce, plan.syncs())
        communication += sum(self.all_reduce.rounded(a_pass.rows * each) for each in rounded)
        if plan.group:
            local = sum(policy.group is not None for pair in plan.blocks for policy in pair)
            communication += local * self.inside(plan.group)(a_pass.payload)
        return Time(parts | {"communication": communication})

    def dropping(self, kind: str, percent: float) -> Time:
        """With the attention sync point of `percent` of the blocks dropped."""
        return self.time(kind, plan_at(self.config.num_blocks, percent))

    def compare(self, kind: str, percent: float) -> dict[str, float]:
        """That `against` 0 %."""
        return self.dropping(kind, percent).against(self.time(kind, self.full))

    def bound(self, kind: str) -> dict[str, float]:
        """The same without any communication."""
        return self.time(kind, None).against(self.time(kind, self.full))

    def memory(self) -> dict[str, float]:
        """Bytes of one GPU at most: weights, the cache of all tokens, and the prefill's activations."""
        last = replace(self.passes["tpot"], past=self.prompt_len + max(0, self.new_tokens - 1))
        return self.passes["ttft"].memory() | {"cache": last.memory()["cache"]}


def plan_at(num_blocks: int, percent: float) -> Plan:
    """The first blocks drop their attention sync: which they are changes no time."""
    if not 0 <= percent <= 100:
        raise SPDError(f"{percent:g} is not a percentage between 0 and 100.")
    return Plan.dropping(num_blocks, range(blocks_of(percent, num_blocks)))


def predict(prediction: Prediction, plan: Plan, percent: float | None = None) -> dict:
    """TTFT and TPOT under a plan (that of a percentage, if so), beside everything full and the ceilings.

    `ceiling` has what dropping could give at most (every attention sync point) and what any method could (no
    communication at all). Top-level share, reduction and speedup are the TTFT's; `tpot` has its own.
    """
    full = {kind: prediction.time(kind, prediction.full) for kind in TIMES}
    asked = {kind: prediction.time(kind, plan).against(full[kind]) for kind in TIMES}
    times, dropped = {f"{kind}_ms": asked[kind].pop("ms") for kind in TIMES}, len(plan.dropped())
    memory, room = prediction.memory(), prediction.machine.memory
    return {
        **{name: getattr(prediction, name) for name in ("tp", "batch", "prompt_len")},
        "percent": 100 * dropped / len(plan) if percent is None else percent,
        **times,
        **asked["ttft"],
        "tpot": asked["tpot"],
        "ceiling": {
            "all_attention_dropped": {kind: prediction.compare(kind, 100) for kind in TIMES},
            "no_communication": {kind: prediction.bound(kind) for kind in TIMES},
        },
        "memory_bytes": sum(memory.values()),
        "fits": None if room is None else sum(memory.values()) <= room,
        "plan": str(plan),
        "blocks_dropped": dropped,
        "memory_parts": memory,
        "all_full": {kind: full[kind].against(full[kind]) for kind in TIMES},
        "parts_ms": {kind: prediction.time(kind, plan).parts_ms() for kind in TIMES},
    }


def break_even(prediction: Prediction, plan: Plan, link: Link | None) -> list[dict]:
    """Below which bandwidth, and above which latency, a plan gains `GAINS` over a ring whose slowest hop is a link.

    Each with the other as that link has it, or free. None where no link would do; `0us`, and `any` bandwidth, where
    all would. Time is linear in latency and in seconds a byte, so that both are solved for.
    """
    given, found = link or Link(float("inf"), 0.0), []

    def units(kind: str, gain: float, nothing: Link, one: Link) -> float | None:
        over = [replace(prediction, all_reduce=link_all_reduce(each, prediction.tp)) for each in (nothing, one)]
        lacking, then = ((1 + gain) * p.time(kind, plan).total - p.time(kind, p.full).total for p in over)
        return 0.0 if lacking <= 0 else lacking / (lacking - then) if then < lacking else None

    for kind, gain in product(TIMES, GAINS):
        seconds = units(kind, gain, replace(given, bandwidth=float("inf")), replace(given, bandwidth=1e9))  # a gigabyte
        waited = units(kind, gain, replace(given, latency=0.0), replace(given, latency=1e-6))
        below = None if seconds is None else f"{1 / seconds:.4g}GBps" if seconds else "any"
        above = None if waited is None else f"{waited:.4g}us"
        found.append({"time": kind, "gain": gain, "below_bandwidth": below, "above_latency": above})
    return found


@dataclass(frozen=True)
class Site:
    """Where a model runs: GPUs of a name (a100 if none is given) or a machine that `profile` made, and what joins them.

    That is the link given (without a name, after a calibration's own, as `bench --link` emulates it), else the
    calibration's, else the GPU's own, which also joins groups inside a node.
    """

    gpu: str | None = None
    file: Path | None = None
    nodes: int | None = None
    link: str | None = None
    launch: float = 0.0  # seconds an operator waits for the host

    @cached_property
    def found(self) -> "MachineFile | None":
        return None if self.file is None else read(self.file)

    @cached_property
    def machine(self) -> Machine:
        own = self.found and self.found.machine()
        if own and self.gpu is not None:
            raise SPDError("A calibration is a machine already; give either --gpu or --machine.")
        return own or gpu(self.gpu or DEFAULT_GPU, self.launch)

    def all_reduce(self, tp: int) -> AllReduce:
        """Over all shards."""
        if tp % (self.nodes or 1):
            raise SPDError(f"tp={tp} cannot be spread evenly over {self.nodes} nodes.")
        labels = {} if self.found is None else self.found.links
        named = self.link is not None and self.link not in labels
        over = all_reduce_over(self.link, tp, self.nodes, labels) if named else None
        own = self.found and self.found.own(tp, self.link)
        if over and own and self.link not in presets():
            return followed_by(own, over)
        if labels and not (over or own):
            raise SPDError(f"{self.file} has several links; say which with --link: {', '.join(labels)}.")
        return over or own or measured_all_reduce(self.machine.name, tp, self.nodes or 1)

    def inside(self, tp: int, size: int) -> AllReduce:
        """Over `size` shards of one node."""
        if self.machine.memory is None:
            raise SPDError("What joins GPUs inside a node is known of a named --gpu, and not of this machine.")
        if tp // (self.nodes or 1) % size:
            raise SPDError(f"Groups of {size} do not fill nodes of {tp // (self.nodes or 1)} GPUs evenly.")
        return measured_all_reduce(self.machine.name, size, 1)

    def prediction(self, config: ModelConfig, tp: int, *sizes: int) -> Prediction:
        """`sizes`: batch, prompt_len and new_tokens, as far as they are not the defaults."""
        config.validate_tp(tp)
        return Prediction(config, self.machine, self.all_reduce(tp), tp, *sizes, inside=partial(self.inside, tp))

    def assumptions(self, asked: Prediction, plan: Plan) -> list[str]:
        """In words."""
        tp, measured = asked.tp, self.found and self.found.syncs_measured
        said = {
            TABLE: self.machine.table is not None,
            CALIBRATION: self.machine.table is None,
            **dict.fromkeys(ASSUMPTIONS, True),
            asked.config.padding_note(tp): True,
            BETWEEN: measured and 1 not in measured,
            NODES.format(self.nodes): (self.nodes or 1) > 1 and self.link is not None,
            DATA_SHEET.format(self.machine.name): self.machine.by_data_sheet,
            ROUNDED: plan.rounded(1, tp),
            plan.group and NODE_LOCAL.format(self.inside(tp, plan.group).name): True,
        }
        return [sentence for sentence, holds in said.items() if sentence and holds]


def ask(
    site: Site,
    config: ModelConfig,
    plans: Sequence[tuple[Plan, float | None]],
    sizes: Iterable[tuple[int, ...]],
    gains: bool = False,
) -> dict:
    """The document of `spd predict`, with what was assumed: the last row's; `rows` has all, where there are several.

    `plans` come with the percentage that they are of, `sizes` are (tp, batch, prompt_len, new_tokens).
    """
    asked = [(site.prediction(config, *each), *plan) for each, plan in product(sizes, plans)]
    results = [predict(*each) for each in asked]
    last, plan, _ = asked[-1]
    result = dict(results[-1])
    if len(results) > 1:
        result["rows"] = [{key: one[key] for key in COMPARED} for one in results]
        result |= {"percentages": result["rows"]} if len(plans) > 1 else {}  # as they were called
    if gains:
        link = site.link and formula(site.link)
        if site.link and link is None:
            raise SPDError(f"A break-even is of links by formula: give --link as '10GBps,20us', not {site.link}.")
        result["break_even"] = break_even(last, plan, link)
    said = {"machine": last.machine.name, "nodes": site.nodes or last.all_reduce.nodes, "link": last.all_reduce.name}
    said |= {"launch_us": 1e6 * site.launch, "new_tokens": last.new_tokens}
    return result | said | {"assumptions": site.assumptions(last, plan)}


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
