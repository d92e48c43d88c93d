"""What one forward pass does on one shard, and machines that passes are timed on: named GPUs, or fitted ones."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from spd.config import SHAPES, ModelConfig
from spd.errors import SPDError

MATRIX = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "head")  # the others but attention are pointwise


@dataclass(frozen=True)
class Work:
    """Counted work, which machines put a time on. Sums and multiples of work are work."""

    operators: float = 0.0  # kernels of the fused kind that the operator table lists
    flops: float = 0.0  # of matrix products and attention; pointwise ones are free beside their bytes
    weight_bytes: float = 0.0
    batched_weight_bytes: float = 0.0  # those read for several tokens at once: another kernel than matrix-vector
    activation_bytes: float = 0.0  # activations and key/value cache, read and written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in self.values()))

    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Operator:
    """One kernel on one shard."""

    name: str
    work: Work
    tokens: int  # rows it works on

    @property
    def kind(self) -> str:
        return "matrix products" if self.name in MATRIX else "attention" if self.name == "attention" else "pointwise"


@dataclass(frozen=True)
class Pass:
    """One forward pass of a shape on each of `tp` shards: a prefill, or a decode step with `tokens` = 1."""

    config: ModelConfig
    tp: int
    batch: int = 1
    tokens: int = 1  # T, new tokens a sequence
    past: float = 0  # tokens a sequence before them; a mean where steps are averaged
    element_size: int = 2  # bytes

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def payload(self) -> int:
        """Bytes of one all-reduce."""
        return self.rows * self.config.hidden_size * self.element_size

    @property
    def logits(self) -> int:
        """Bytes of the last tokens' logits, which one all-gather joins."""
        return self.batch * self.config.vocab_size * self.element_size

    def collectives(self, syncs: int) -> list[tuple[int, float]]:
        """How many all-reduces of how many bytes a pass with `syncs` of them takes; none at all without them.

        The last, on a ring, stands for the all-gather of the logits: those bytes go round once, and not twice.
        """
        return [(syncs, self.payload), (1, self.logits / 2)] if syncs else []

    def block(self) -> list[Operator]:
        """A decoder block's operators in the order they run; each of the two residual additions is one."""
        c, n = self.config, self.rows
        d, heads, neurons = c.hidden_size, c.num_heads // self.tp, c.intermediate_size // self.tp
        kv_heads = max(1, c.num_kv_heads // self.tp)  # beyond the key/value heads, tp replicates them
        q, kv = heads * c.head_dim, kv_heads * c.head_dim
        add = self._pointwise("residual_add", 3 * n * d)
        return [
            self._pointwise("input_norm", 2 * n * d),
            self._matrix("qkv_proj", n, d, q + 2 * kv),
            self._pointwise("rope", 2 * n * (q + kv)),
            self._attention(q, kv),
            self._matrix("o_proj", n, q, d),
            add,
            self._pointwise("post_attention_norm", 2 * n * d),
            self._matrix("gate_up_proj", n, d, 2 * neurons),
            self._pointwise("act", 3 * n * neurons),
            self._matrix("down_proj", n, neurons, d),
            add,
        ]

    def ends(self) -> list[Operator]:
        """Embedding and last norm, which every shard computes whole, and its part of the last tokens' logits."""
        d, part = self.config.hidden_size, -(-self.config.vocab_size // self.tp)
        return [
            self._pointwise("embedding", 2 * self.rows * d),
            self._pointwise("final_norm", 2 * self.batch * d, self.batch),
            self._matrix("head", self.batch, d, part),
        ]

    def work(self) -> Work:
        """Of the whole pass."""
        block = sum((operator.work for operator in self.block()), Work())
        return block * self.config.num_blocks + sum((operator.work for operator in self.ends()), Work())

    def _matrix(self, name: str, rows: int, inputs: int, outputs: int) -> Operator:
        weights = inputs * outputs * self.element_size
        activations = rows * (inputs + outputs) * self.element_size
        return Operator(name, Work(1, 2 * rows * inputs * outputs, weights, weights * (rows > 1), activations), rows)

    def _pointwise(self, name: str, elements: int, rows: int | None = None) -> Operator:
        return Operator(name, Work(1, activation_bytes=elements * self.element_size), rows or self.rows)

    def _attention(self, q: int, kv: int) -> Operator:
        """A fused causal kernel: scores and their weighted sum, queries and output, keys and values once."""
        context = self.past + (self.tokens + 1) / 2  # keys a query sees, on average
        cache = self.batch * (self.past + self.tokens) * 2 * kv
        flops = 4 * self.rows * q * context
        return Operator("attention", Work(1, flops, 0, 0, (2 * self.rows * q + cache) * self.element_size), self.rows)


PROFILES = Path(__file__).parent / "profiles"
# Operators the table lacks take the efficiency of a neighbour: the output projection for the attention core (alike
# in size), the gate and up projection for the head.
STAND_INS = {"attention": "o_proj", "head": "gate_up_proj", "final_norm": "input_norm"}
TABLE_MODELS = {"Llama-2-7b-hf": "llama2-7b", "Llama-2-70b-hf": "llama2-70b"}


@dataclass(frozen=True)
class Costs:
    """Seconds a unit of each kind of `Work`, in its order."""

    operator: float
    flop: float
    weight_byte: float
    batched_weight_byte: float
    activation_byte: float

    def seconds(self, work: Work) -> float:
        return sum(cost * amount for cost, amount in zip(vars(self).values(), work.values(), strict=True))


@dataclass(frozen=True)
class Efficiencies:
    """Reference time over measured time of each operator on a grid of model, tp and tokens."""

    costs: Costs  # of the GPU that was measured
    tps: tuple[int, ...]
    tokens: tuple[int, ...]
    grids: Mapping[str, Mapping[str, np.ndarray]] = field(repr=False)  # operator, model: (tp, tokens)

    def of(self, operator: Operator, tp: int) -> float:
        """Interpolated in the logarithms of tokens, tp and the operator's reference time; constant beyond the table."""
        name = STAND_INS.get(operator.name, operator.name)
        sizes, values = [], []
        for model, grid in self.grids[name].items():
            sizes.append(self.costs.seconds(_operator(model, tp, operator.tokens, name).work))
            along_tokens = [_interpolate(operator.tokens, self.tokens, row) for row in grid]
            values.append(_interpolate(tp, self.tps, along_tokens))
        return _interpolate(self.costs.seconds(operator.work), sizes, values)


def _interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear in log x; the nearest value beyond the ends."""
    return float(np.interp(np.log(at), np.log(xs), ys))


def _operator(model: str, tp: int, tokens: int, name: str) -> Operator:
    one = Pass(SHAPES[model], tp, tokens=tokens)
    return next(operator for operator in [*one.block(), *one.ends()] if operator.name == name)


@dataclass(frozen=True)
class Machine:
    """What computes one shard. `launch` is host time that every operator waits for: 0 under CUDA graphs."""

    name: str
    costs: Costs
    element_size: int = 2  # bytes
    launch: float = 0.0  # seconds an operator
    efficiencies: Efficiencies | None = field(default=None, repr=False)

    def seconds(self, operator: Operator, tp: int) -> float:
        """On the device, launch left out."""
        reference = self.costs.seconds(operator.work)
        return reference if self.efficiencies is None else reference / self.efficiencies.of(operator, tp)


class AllReduce(Protocol):
    """Anything that says how long an all-reduce of `payload` bytes over `participants` takes, as `comm.Link` does."""

    def all_reduce_seconds(self, payload: float, participants: int) -> float: ...


@dataclass(frozen=True)
class MeasuredAllReduce:
    """Times by size, interpolated in the logarithms of both; beyond the sizes: the least time, the last bandwidth."""

    name: str
    payloads: tuple[float, ...]
    seconds: tuple[float, ...]

    def all_reduce_seconds(self, payload: float, participants: int) -> float:
        if participants == 1 or payload == 0:
            return 0.0
        if payload > self.payloads[-1]:
            return self.seconds[-1] * payload / self.payloads[-1]
        return float(np.exp(_interpolate(payload, self.payloads, np.log(self.seconds))))

    @property
    def latency(self) -> float:
        """The least time of any size, seconds."""
        return min(self.seconds)


@dataclass(frozen=True)
class FittedAllReduce:
    """A calibration's: one latency a degree, one cost of a byte that the ring moves."""

    latencies: Mapping[int, float]  # seconds
    ring_byte: float  # seconds

    def all_reduce_seconds(self, payload: float, participants: int) -> float:
        if participants == 1:
            return 0.0
        if participants not in self.latencies:
            known = ", ".join(map(str, sorted(self.latencies))) or "none"
            raise SPDError(f"The calibration has no all-reduce over tp={participants}; degrees calibrated: {known}.")
        return self.latencies[participants] + ring_bytes(payload, participants) * self.ring_byte


@dataclass(frozen=True)
class Both:
    """Two all-reduces one after the other: the real one and an emulated link."""

    first: AllReduce
    second: AllReduce

    def all_reduce_seconds(self, payload: float, participants: int) -> float:
        return sum(one.all_reduce_seconds(payload, participants) for one in (self.first, self.second))


@dataclass(frozen=True)
class Slower:
    """The slower of two hops, which sets a ring's pace."""

    first: AllReduce
    second: AllReduce

    def all_reduce_seconds(self, payload: float, participants: int) -> float:
        return max(one.all_reduce_seconds(payload, participants) for one in (self.first, self.second))


def ring_bytes(payload: float, participants: int) -> float:
    """Bytes that a ring moves over its slowest hop: 2 (n-1)/n of the payload."""
    return 2 * (participants - 1) / participants * payload


def gpu(name: str, launch: float = 0.0) -> Machine:
    """A named GPU, `launch` seconds an operator. Raises SPDError listing the known ones."""
    row = _gpu_row(name)
    return Machine(name, _peaks(row), 2, launch, _a100_efficiencies())


def measured_all_reduce(gpu_name: str, tp: int, nodes: int) -> MeasuredAllReduce:
    """NCCL's times over `tp` GPUs spread evenly over `nodes`.

    Raises:
        SPDError: nothing was measured there, with the arrangements that were.
    """
    system = _gpu_row(gpu_name)["all_reduce_system"]
    tables = {key[1:]: table for key, table in _all_reduce_tables().items() if key[0] == system}
    per_node = tp / nodes
    if (tp, per_node) not in tables:
        known = ", ".join(f"tp={w} on {w // d} node{'s' * (w > d)}" for w, d in tables) or "none"
        raise SPDError(
            f"No all-reduce table for {gpu_name} with tp={tp} on {nodes} node{'s' * (nodes > 1)} (measured: {known}); "
            "give the link as --link BANDWIDTH,LATENCY, as in '25GBps,10us'."
        )
    sizes, seconds = zip(*tables[tp, per_node], strict=True)
    return MeasuredAllReduce(f"NCCL measured on {system}, {nodes} x {tp // nodes}", sizes, seconds)


def gpu_memory(name: str) -> float:
    """Bytes."""
    return float(_gpu_row(name)["memory_bytes"])


def gpu_flops(name: str, dtype: str) -> float:
    """Peak of matrix products a second: in 16 bits; in float32, no shorter format inside; half of that in float64."""
    row = _gpu_row(name)
    if dtype in ("float32", "float64"):
        return float(row["float32_flops"]) / (1 if dtype == "float32" else 2)
    return float(row["matrix_flops"])


def gpu_names() -> list[str]:
    return [row["gpu"] for row in read_profile("gpus")]


@cache
def read_profile(name: str) -> list[dict[str, str]]:
    """Rows of a CSV among the profiles."""
    with open(PROFILES / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def _gpu_row(name: str) -> dict[str, str]:
    rows = {row["gpu"]: row for row in read_profile("gpus")}
    if name not in rows:
        raise SPDError(f"Unknown GPU '{name}'; known: {', '.join(rows)}.")
    return rows[name]


def _peaks(row: Mapping[str, str]) -> Costs:
    """Unit costs at the data sheet's peaks; no kernel is shorter than the shortest in the operator table."""
    byte = 1 / float(row["memory_bytes_per_second"])
    shortest = min(float(r[key]) for r in read_profile("layer_ops_a100") for key in r if key.endswith("_us"))
    return Costs(1e-6 * shortest, 1 / float(row["matrix_flops"]), byte, 0.0, byte)


@cache
def _a100_efficiencies() -> Efficiencies:
    rows = read_profile("layer_ops_a100")
    tps, tokens = (tuple(sorted({int(row[key]) for row in rows})) for key in ("tp", "tokens"))
    costs = _peaks(_gpu_row("a100"))
    grids: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for column in (key for key in rows[0] if key.endswith("_us")):
        name = column.removesuffix("_us")
        for label, model in TABLE_MODELS.items():
            grid = np.empty((len(tps), len(tokens)))
            for row in (r for r in rows if r["model"] == label):
                tp, count = int(row["tp"]), int(row["tokens"])
                reference = costs.seconds(_operator(model, tp, count, name).work)
                grid[tps.index(tp), tokens.index(count)] = reference / (1e-6 * float(row[column]))
            grids[name][model] = grid
    return Efficiencies(costs, tps, tokens, grids)


@cache
def _all_reduce_tables() -> dict[tuple[str, int, int], list[tuple[float, float]]]:
    """(bytes, seconds) by (system, workers, workers of a node)."""
    tables = defaultdict(list)
    for row in read_profile("all_reduce_a100"):
        key = row["system"], int(row["workers"]), int(row["devices_per_node"])
        tables[key].append((float(row["bytes"]), 1e-6 * float(row["all_reduce_us"])))
    return {key: sorted(table) for key, table in tables.items()}
