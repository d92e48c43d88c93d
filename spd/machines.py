"""What a pass does on one shard, and what puts a time on it: machines, and the all-reduces that join them.

A `Pass` counts operators with their FLOPs and bytes from the shape, under the names of `profiles/layer_ops_a100.csv`,
and knows no machine. A `Machine` puts a time on an operator: its work at the machine's unit costs, over an efficiency.
For named GPUs the unit costs are the data sheet's peaks and the efficiency is what the A100 operator table shows (see
`profiles/README.md`): exact on the table's rows, interpolated between them. For a calibrated machine the costs are
fitted and the efficiency is 1.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from spd.comm import Link
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError, one_of

PROFILES = Path(__file__).parent / "profiles"
MATRIX, ATTENTION, POINTWISE = KINDS = ("matrix products", "attention", "pointwise")
# Operators the table lacks take the efficiency of a neighbour: the output projection for the attention core (alike
# in size), the gate and up projection for the head.
STAND_INS = {"attention": "o_proj", "head": "gate_up_proj", "final_norm": "input_norm"}
TABLE_MODELS = {"Llama-2-7b-hf": "llama2-7b", "Llama-2-70b-hf": "llama2-70b"}


class Work(NamedTuple):
    """Counted work, which machines put a time on. Sums and multiples of work are work."""

    operator: float = 0.0  # kernels of the fused kind that the operator table lists
    flop: float = 0.0  # of matrix products and attention; pointwise ones are free beside their bytes
    weight_byte: float = 0.0
    batched_weight_byte: float = 0.0  # those read for several tokens at once: another kernel than matrix-vector
    activation_byte: float = 0.0  # activations and key/value cache, read and written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in self))

    def seconds(self, costs: "Costs") -> float:
        return sum(cost * amount for cost, amount in zip(costs, self, strict=True))


Costs = Work  # seconds a unit of each kind


class Operator(NamedTuple):
    """One kernel on one shard, which works on `tokens` rows."""

    name: str
    kind: str
    work: Work
    tokens: int


@dataclass(frozen=True)
class Pass:
    """One forward pass of a shape on each of `tp` shards: a prefill, or a decode step with `tokens` = 1.

    `batch` sequences of `tokens` new tokens each; a shard has its part of the heads and of the MLP's neurons. The first
    has most, and counts: zeros are computed with elsewhere.
    """

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

    def collectives(self, syncs: int) -> list[tuple[int, float]]:
        """How many all-reduces of how many bytes a pass with `syncs` of them takes; none at all without them.

        The last, on a ring, stands for the all-gather of the logits: those bytes go round once, and not twice.
        """
        logits = self.batch * self.config.vocab_size * self.element_size
        return [(syncs, self.payload), (1, logits / 2)] if syncs else []

    def communication(self, all_reduce: Callable[[float], float], syncs: int) -> float:
        """Seconds of them."""
        return sum(n * all_reduce(payload) for n, payload in self.collectives(syncs))

    def block(self) -> list[Operator]:
        """A decoder block's operators in the order they run; each of the two residual additions is one."""
        c, n = self.config, self.rows
        d, neurons, inputs = c.hidden_size, c.neurons_per_shard(self.tp), 2 if c.form.gated else 1
        q, kv = c.heads_per_shard(self.tp) * c.head_dim, c.kv_heads_per_shard(self.tp) * c.head_dim
        add = self._pointwise("residual_add", 3 * n * d)
        return [
            self._pointwise("input_norm", 2 * n * d),
            self._matrix("qkv_proj", n, d, q + 2 * kv),
            *([] if c.form.learned_positions else [self._pointwise("rope", 2 * n * (q + kv))]),
            self._attention(q, kv),
            self._matrix("o_proj", n, q, d),
            add,
            self._pointwise("post_attention_norm", 2 * n * d),
            self._matrix("gate_up_proj", n, d, inputs * neurons),
            self._pointwise("act", (inputs + 1) * n * neurons),
            self._matrix("down_proj", n, neurons, d),
            add,
        ]

    def ends(self) -> list[Operator]:
        """Embedding and last norm, which every shard computes whole, and its part of the last tokens' logits."""
        d, part = self.config.hidden_size, -(-self.config.vocab_size // self.tp)
        norm = self._pointwise("final_norm", 2 * self.batch * d)._replace(tokens=self.batch)
        return [self._pointwise("embedding", 2 * self.rows * d), norm, self._matrix("head", self.batch, d, part)]

    def operators(self) -> list[tuple[Operator, int]]:
        """All operators, and how often each runs."""
        return [(one, self.config.num_blocks) for one in self.block()] + [(one, 1) for one in self.ends()]

    def work(self) -> Work:
        """Of the whole pass."""
        return sum((operator.work * times for operator, times in self.operators()), Work())

    def _matrix(self, name: str, rows: int, inputs: int, outputs: int) -> Operator:
        weights = inputs * outputs * self.element_size
        activations = rows * (inputs + outputs) * self.element_size
        work = Work(1, 2 * rows * inputs * outputs, weights, weights * (rows > 1), activations)
        return Operator(name, MATRIX, work, rows)

    def _pointwise(self, name: str, elements: int) -> Operator:
        return Operator(name, POINTWISE, Work(1, activation_byte=elements * self.element_size), self.rows)

    def _attention(self, q: int, kv: int) -> Operator:
        """A fused causal kernel: scores and their weighted sum, queries and output, keys and values once."""
        context = self.past + (self.tokens + 1) / 2  # keys a query sees, on average
        elements = 2 * self.rows * q + self.batch * (self.past + self.tokens) * 2 * kv
        work = Work(1, 4 * self.rows * q * context, activation_byte=elements * self.element_size)
        return Operator("attention", ATTENTION, work, self.rows)


def timed_passes(
    config: ModelConfig, tp: int, batch: int, prompt_len: int, new_tokens: int, element_size: int
) -> dict[str, Pass]:
    """What `bench` times: as `ttft` the prefill, as `tpot` the mean decode step, each of which sees one more token."""
    if prompt_len + new_tokens > config.max_positions:
        raise SPDError(f"{prompt_len} + {new_tokens} tokens exceed the model's {config.max_positions} positions.")
    past = prompt_len + (max(1, new_tokens) - 1) / 2
    prefill = Pass(config, tp, batch, prompt_len, 0, element_size)
    return {"ttft": prefill, "tpot": Pass(config, tp, batch, 1, past, element_size)}


# ---------------------------------------------------------------- machines


@dataclass(frozen=True)
class Machine:
    """What computes one shard. `launch` is host time that every operator waits for: 0 under CUDA graphs."""

    name: str
    costs: Costs
    element_size: int = 2  # bytes
    launch: float = 0.0  # seconds an operator
    table: "OperatorTable | None" = None  # whose efficiencies its operators take

    def seconds(self, operator: Operator, tp: int) -> float:
        """On the device, launch left out."""
        return operator.work.seconds(self.costs) / (efficiency(self.table, operator, tp) if self.table else 1)


@cache
def read_profile(name: str) -> list[dict[str, str]]:
    """Rows of a CSV among the profiles."""
    with open(PROFILES / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def gpu_row(name: str) -> dict[str, str]:
    """What the profiles say of a named GPU."""
    rows = {row["gpu"]: row for row in read_profile("gpus")}
    return rows[one_of("GPU", name, rows)]


@cache
def gpu(name: str, launch: float = 0.0) -> Machine:
    """A named GPU at its data sheet's peaks; no kernel is shorter than the shortest in the operator table."""
    row, table = gpu_row(name), a100_operators()
    byte = 1 / float(row["memory_bytes_per_second"])
    shortest = min(float(r[key]) for r in table.rows for key in r if key.endswith("_us"))
    return Machine(name, Costs(1e-6 * shortest, 1 / float(row["matrix_flops"]), byte, 0.0, byte), 2, launch, table)


def gpu_memory(name: str) -> float:
    """Bytes."""
    return float(gpu_row(name)["memory_bytes"])


def gpu_flops(name: str, dtype: str) -> float:
    """Peak of matrix products a second: in 16 bits; in float32, no shorter format inside; half of that in float64."""
    unit = "float32_flops" if dtype in ("float32", "float64") else "matrix_flops"
    return float(gpu_row(name)[unit]) / (2 if dtype == "float64" else 1)


@dataclass(frozen=True, eq=False)
class OperatorTable:
    """Measured microseconds of a block's operators: rows with `model`, `tp`, `tokens` and `NAME_us`."""

    rows: Sequence[dict[str, str]]

    def models(self) -> list[str]:
        return list(dict.fromkeys(row["model"] for row in self.rows))


@cache
def a100_operators() -> OperatorTable:
    return OperatorTable(read_profile("layer_ops_a100"))


@cache
def efficiency(table: OperatorTable, operator: Operator, tp: int) -> float:
    """Time at an A100's peaks over measured time of an operator, from a table of models, tps and numbers of tokens.

    Interpolated in the logarithms of tokens, tp and the operator's time at the peaks; constant beyond the table.
    """
    name, found = STAND_INS.get(operator.name, operator.name), []
    for model in table.models():
        tps, tokens, rows = _tabled_efficiencies(table, model, name)
        value = interpolate(tp, tps, [interpolate(operator.tokens, tokens, row) for row in rows])
        found.append((_peak_seconds(model, tp, operator.tokens, name), value))
    return interpolate(operator.work.seconds(gpu("a100").costs), *zip(*sorted(found), strict=True))


@cache
def _tabled_efficiencies(table: OperatorTable, model: str, name: str) -> tuple[list, list, list[list[float]]]:
    """Degrees and numbers of tokens, ascending, and a row a degree, a column a number of tokens."""
    rows = [row for row in table.rows if row["model"] == model]
    measured = {(int(row["tp"]), int(row["tokens"])): 1e-6 * float(row[f"{name}_us"]) for row in rows}
    tps, tokens = (sorted(set(of)) for of in zip(*measured, strict=True))
    return tps, tokens, [[_peak_seconds(model, t, n, name) / measured[t, n] for n in tokens] for t in tps]


def _peak_seconds(model: str, tp: int, tokens: int, name: str) -> float:
    operators = Pass(tabled_shape(model), tp, tokens=tokens).operators()
    return next(one.work.seconds(gpu("a100").costs) for one, _ in operators if one.name == name)


def tabled_shape(model: str) -> ModelConfig:
    """Of a table's name for a model."""
    return named_shape(TABLE_MODELS.get(model, model))


def interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear in log x; the nearest value beyond the ends."""
    return float(np.interp(np.log(at), np.log(xs), ys))


# ---------------------------------------------------------------- all-reduces


@dataclass(frozen=True)
class AllReduce:
    """A function from bytes to seconds, for a number of processes, with a name."""

    name: str
    seconds: Callable[[float], float]
    nodes: int = 1

    def __call__(self, payload: float) -> float:
        return self.seconds(payload)


def link_all_reduce(link: Link, tp: int) -> AllReduce:
    """A ring of `tp` whose slowest hop is `link`."""
    return AllReduce(link.spec, lambda payload: link.all_reduce_seconds(payload, tp))


NOTHING_TO_REDUCE = AllReduce("none", lambda payload: 0.0)


def measured_all_reduce(gpu_name: str, tp: int, nodes: int) -> AllReduce:
    """NCCL's on the nodes that a named GPU comes in, read as a table."""
    if tp == 1:
        return NOTHING_TO_REDUCE
    system = gpu_row(gpu_name)["all_reduce_system"]
    return AllReduce(
        f"NCCL measured on {system}, {nodes} x {tp // nodes}", as_table(*all_reduce_table(gpu_name, tp, nodes))
    )


def as_table(sizes: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds by bytes, interpolated in the logarithms of both; beyond it the least size's, and the last bandwidth."""

    def interpolated(payload: float) -> float:
        within = float(np.exp(interpolate(payload, sizes, np.log(seconds))))
        return within * max(1, payload / sizes[-1])

    return interpolated


def as_curve(sizes: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """The same by a monotone cubic, which a table of few sizes is nearer to at those between."""
    curve = PchipInterpolator(np.log(sizes), np.log(seconds))

    def interpolated(payload: float) -> float:
        within = float(np.exp(curve(np.log(np.clip(payload, sizes[0], sizes[-1])))))
        return within * max(1, payload / sizes[-1])

    return interpolated


@cache
def all_reduce_table(gpu_name: str, tp: int, nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes and seconds of NCCL's all-reduces over `tp` GPUs spread evenly over `nodes`."""
    system, tables = gpu_row(gpu_name)["all_reduce_system"], {}
    for row in read_profile("all_reduce_a100"):
        if row["system"] == system:
            table = tables.setdefault((int(row["workers"]), int(row["workers"]) // int(row["devices_per_node"])), [])
            table.append((float(row["bytes"]), 1e-6 * float(row["all_reduce_us"])))
    if (tp, nodes) not in tables:
        known = ", ".join(f"tp={w} on {n} node{'s' * (n > 1)}" for w, n in tables) or "none"
        raise SPDError(
            f"No all-reduce table for {gpu_name} with tp={tp} on {nodes} node{'s' * (nodes > 1)} (measured: {known}); "
            f"give the link as --link BANDWIDTH,LATENCY, as in '25GBps,10us', or by name ({', '.join(presets())})."
        )
    return tuple(zip(*sorted(tables[tp, nodes]), strict=True))


@cache
def presets() -> dict[str, list[dict[str, str]]]:
    """Links by name: for each number of GPUs it was measured with, what and who measured it; or one formula."""
    found = {}
    for row in read_profile("presets"):
        found.setdefault(row["preset"], []).append(row)
    return found


@cache
def preset_table(name: str, devices: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes and seconds of a preset's all-reduces, marked outliers left out."""
    rows = [row for row in read_profile("links") if (row["preset"], row["devices"]) == (name, devices)]
    kept = [(float(row["bytes"]), 1e-6 * float(row["us"])) for row in rows if not row["note"].startswith("outlier")]
    return tuple(zip(*sorted(kept), strict=True))


def preset_all_reduce(name: str, tp: int, nodes: int | None = None) -> AllReduce:
    """That of the table with the number of GPUs nearest to `tp`, at payloads whose ring moves as many bytes."""
    rows = presets()[one_of("link", name, presets())]
    if tp == 1:
        return NOTHING_TO_REDUCE
    if not rows[0]["devices"]:
        link = Link.parse(rows[0]["formula"])
        return AllReduce(f"{name}, by formula {link.spec}", link_all_reduce(link, tp).seconds)
    row = min(rows, key=lambda one: abs(np.log(int(one["devices"]) / tp)))
    if nodes not in (None, int(row["nodes"])):
        raise SPDError(f"The link {name} was measured on {row['nodes']} node(s), so --nodes {nodes} is not what it is.")
    told = f"{name}: {row['all_reduce']} on {row['system']}"
    return scaled_all_reduce(told, int(row["devices"]), preset_table(name, row["devices"]), tp, int(row["nodes"]))


def scaled_all_reduce(
    name: str, devices: int, table: tuple[Sequence[float], Sequence[float]], tp: int, nodes: int = 1
) -> AllReduce:
    """A table (bytes, seconds) of some number of GPUs for `tp`, read where its ring moves as many bytes."""
    seconds, scale = as_curve(*table), ring_bytes(1, tp) / ring_bytes(1, devices)
    told = name if scale == 1 else f"{name}, read for {tp}"
    return AllReduce(told, lambda payload: seconds(scale * payload), nodes)


def preset_errors() -> list[dict]:
    """A row a preset and number of GPUs: who measured it, and how far off each size is when it is left out."""
    found = []
    for name, row in ((name, row) for name, rows in presets().items() for row in rows):
        told = {key: int(row[key]) if row[key] else None for key in ("devices", "nodes")}
        told = {"link": name, **told, **{key: row[key] for key in ("system", "all_reduce", "formula", "source")}}
        errors = left_out_errors(*preset_table(name, row["devices"])) if row["devices"] else []
        worst = max(errors, default=None)
        found.append({**told, "median_error": float(np.median(errors)) if errors else None, "worst_error": worst})
    return found


def left_out_errors(sizes: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Relative errors, without sign, of each size read from all others."""
    found = []
    for i, (size, measured) in enumerate(zip(sizes, seconds, strict=True)):
        others = [(*values[:i], *values[i + 1 :]) for values in (sizes, seconds)]
        found.append(abs(as_curve(*others)(size) / measured - 1))
    return found


def ring_bytes(payload: float, participants: int) -> float:
    """Bytes that a ring moves over its slowest hop: 2 (n-1)/n of the payload."""
    return 2 * (participants - 1) / participants * payload
