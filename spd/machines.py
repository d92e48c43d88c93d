"""What a pass does on one shard, and what puts a time on it: machines. What joins them is in `links`.

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

from spd.config import ModelConfig, named_shape
from spd.errors import SPDError, one_of

PROFILES = Path(__file__).parent / "profiles"
MATRIX, ATTENTION, POINTWISE = KINDS = ("matrix products", "attention", "pointwise")
# Operators the table lacks take the efficiency of a neighbour: the output projection for the attention core (alike
# in size), the gate and up projection for the head.
STAND_INS = {"attention": "o_proj", "head": "gate_up_proj", "final_norm": "input_norm"}
STAND_INS |= dict.fromkeys(("round", "sum", "unpack"), "residual_add")
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

    def rounding(self) -> list[Operator]:
        """Around the collectives of a sync in few bits: pending is read and its error kept, slices are summed, and all
        are unpacked for the addition that there is anyway."""
        n, d = self.rows, self.config.hidden_size
        return [self._pointwise(name, times * n * d) for name, times in (("round", 2), ("sum", 1), ("unpack", 1))]

    def operators(self, rounded: int = 0) -> list[tuple[Operator, int]]:
        """All operators, and how often each runs, with so many syncs in few bits."""
        blocks = [(one, self.config.num_blocks) for one in self.block()]
        return blocks + [(one, 1) for one in self.ends()] + [(one, rounded) for one in self.rounding() if rounded]

    def memory(self) -> dict[str, float]:
        """Bytes on one shard at most: weights, keys and values of all tokens, and what a sublayer holds beside them.

        Embedding and head are whole on each; logits are of the last tokens, in float32.
        """
        c, room, size = self.config, self.config.padded(self.tp), self.element_size
        ends = c.parameters() - c.num_blocks * c.block_parameters()
        kv = c.kv_heads_per_shard(self.tp) * c.head_dim
        wide = max(c.heads_per_shard(self.tp) * c.head_dim + 2 * kv, 2 * c.neurons_per_shard(self.tp))
        return {
            "weights": size * (c.num_blocks * room.block_parameters() / self.tp + ends),
            "cache": size * self.batch * (self.past + self.tokens) * c.num_blocks * 2 * kv,
            "activations": size * self.rows * (3 * c.hidden_size + wide) + 4 * self.batch * c.vocab_size,
        }

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
    memory: float | None = None  # bytes, where they are known
    by_data_sheet: bool = False  # the table is another GPU's

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
    costs = Costs(1e-6 * shortest, 1 / float(row["matrix_flops"]), byte, 0.0, byte)
    return Machine(name, costs, 2, launch, table, gpu_memory(name), not row["all_reduce_system"])


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
