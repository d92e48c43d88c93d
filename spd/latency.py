"""Predicted latency: time to first token (TTFT), time per output token (TPOT), and what dropping sync points gains.

A pass takes the sum of its operators' device times, plus launch time an operator (none under CUDA graphs), plus one
all-reduce a sync point that is kept, and one all-gather of the logits. Nothing overlaps; dropping a sync point changes
nothing but its all-reduce.

What one forward pass does on one shard: operators with their FLOPs and bytes, counted from the shape.

Operators carry the names of `profiles/layer_ops_a100.csv`. B sequences of T new tokens each, `past` tokens before
them; a shard has h of H query heads, g key/value heads and f MLP neurons. Nothing here knows a machine.

Machines that passes are timed on: named GPUs with measured operator tables, and the all-reduces that join them.

An operator's time is its work at the machine's unit costs over an efficiency. For named GPUs the unit costs are
the data sheet's peaks and the efficiency is what the A100 operator table shows (see `profiles/README.md`): exact on
the table's rows, interpolated between them. For a calibrated machine the costs are fitted and the efficiency is 1.
"""

from dataclasses import dataclass, replace

from spd.config import ModelConfig
from spd.errors import SPDError
from spd.machines import AllReduce, Machine, Operator, Pass
from spd.plan import Plan
from spd.planner import blocks_of


@dataclass(frozen=True)
class Setting:
    """What a prediction is for."""

    config: ModelConfig
    machine: Machine
    all_reduce: AllReduce
    tp: int
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded; TPOT is their mean

    def prefill(self) -> Pass:
        return Pass(self.config, self.tp, self.batch, self.prompt_len, 0, self.machine.element_size)

    def decode(self) -> Pass:
        """The mean decode step: bench decodes `new_tokens` after the prompt, each seeing one more token."""
        past = self.prompt_len + (self.new_tokens - 1) / 2
        return Pass(self.config, self.tp, self.batch, 1, past, self.machine.element_size)

    def validate(self) -> None:
        """Raises SPDError for an impossible tp, or more tokens than the shape has positions."""
        self.config.validate_tp(self.tp)
        total, positions = self.prompt_len + self.new_tokens, self.config.max_positions
        if total > positions:
            raise SPDError(f"{self.prompt_len} + {self.new_tokens} tokens exceed the model's {positions} positions.")


@dataclass(frozen=True)
class Time:
    """Seconds of one pass, by what they go to."""

    parts: dict[str, float]  # matrix products, attention, pointwise, launch
    communication: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.communication

    @property
    def communication_share(self) -> float:
        return self.communication / self.total


def pass_time(a_pass: Pass, machine: Machine, all_reduce: AllReduce, syncs: int) -> Time:
    """Predicted time of a pass with `syncs` all-reduces."""
    parts = {"matrix products": 0.0, "attention": 0.0, "pointwise": 0.0, "launch": 0.0}
    for operator, times in operator_counts(a_pass):
        parts[operator.kind] += times * machine.seconds(operator, a_pass.tp)
        parts["launch"] += times * machine.launch
    return Time(parts, communication(a_pass, all_reduce, syncs))


def communication(a_pass: Pass, all_reduce: AllReduce, syncs: int) -> float:
    """Seconds of a pass's collectives."""
    return sum(n * all_reduce.all_reduce_seconds(payload, a_pass.tp) for n, payload in a_pass.collectives(syncs))


def operator_counts(a_pass: Pass) -> list[tuple[Operator, int]]:
    """The operators of a pass and how often each runs."""
    blocks = [(operator, a_pass.config.num_blocks) for operator in a_pass.block()]
    return blocks + [(operator, 1) for operator in a_pass.ends()]


def with_syncs(time: Time, a_pass: Pass, all_reduce: AllReduce, syncs: int) -> Time:
    """The same pass with another number of all-reduces, or over another link."""
    return replace(time, communication=communication(a_pass, all_reduce, syncs))


def gain(full: Time, dropped: Time) -> dict[str, float]:
    """Reduction 1 - t_p/t_0 and speedup t_0/t_p."""
    return {"reduction": 1 - dropped.total / full.total, "speedup": full.total / dropped.total}


class Prediction:
    """TTFT and TPOT of a setting under any number of dropped attention sync points."""

    def __init__(self, setting: Setting):
        """Raises SPDError where the setting is impossible."""
        setting.validate()
        self.setting = setting
        self.passes = {"ttft": setting.prefill(), "tpot": setting.decode()}
        self._times = {k: pass_time(p, setting.machine, setting.all_reduce, 0) for k, p in self.passes.items()}

    def time(self, kind: str, syncs: int, all_reduce: AllReduce | None = None) -> Time:
        """Of `ttft` or `tpot` with `syncs` all-reduces."""
        return with_syncs(self._times[kind], self.passes[kind], all_reduce or self.setting.all_reduce, syncs)

    def dropping(self, kind: str, percent: float, all_reduce: AllReduce | None = None) -> Time:
        """With the attention sync point of `percent` of the blocks dropped."""
        return self.time(kind, syncs_at(self.setting.config, percent), all_reduce)

    def compare(self, kind: str, percent: float, all_reduce: AllReduce | None = None) -> dict[str, float]:
        """Milliseconds, share of communication, reduction and speedup against 0 %."""
        return self._row(self.dropping(kind, 0, all_reduce), self.dropping(kind, percent, all_reduce))

    def bound(self, kind: str) -> dict[str, float]:
        """The same without any communication."""
        return self._row(self.dropping(kind, 0), self.time(kind, 0))

    @staticmethod
    def _row(full: Time, dropped: Time) -> dict[str, float]:
        share = {"communication_share": dropped.communication_share}
        return {"ms": 1e3 * dropped.total, **share, **gain(full, dropped)}


def syncs_at(config: ModelConfig, percent: float) -> int:
    """All-reduces a pass when `percent` of the blocks drop theirs after attention."""
    if not 0 <= percent <= 100:
        raise SPDError(f"{percent:g} is not a percentage between 0 and 100.")
    return Plan.dropping(config.num_blocks, range(blocks_of(percent, config.num_blocks))).syncs()


def predict(setting: Setting, percent: float) -> dict:
    """The document of `spd predict`: TTFT and TPOT at `percent`, beside 0 % and the ceilings.

    `ceiling` has what dropping could give at most (every attention sync point) and what any method could (no
    communication at all). Top-level share, reduction and speedup are the TTFT's; `tpot` has its own.
    """
    prediction, config = Prediction(setting), setting.config
    ttft, tpot = (prediction.compare(kind, percent) for kind in ("ttft", "tpot"))
    full = {kind: prediction.compare(kind, 0) for kind in ("ttft", "tpot")}
    dropped = {kind: prediction.compare(kind, 100) for kind in ("ttft", "tpot")}
    silent = {kind: prediction.bound(kind) for kind in ("ttft", "tpot")}
    return {
        "ttft_ms": ttft.pop("ms"),
        "tpot_ms": tpot.pop("ms"),
        **ttft,
        "tpot": tpot,
        "percent": percent,
        "blocks_dropped": blocks_of(percent, config.num_blocks),
        "ceiling": {"all_attention_dropped": dropped, "no_communication": silent},
        "all_full": full,
        "parts_ms": {kind: parts_ms(prediction.dropping(kind, percent)) for kind in ("ttft", "tpot")},
    }


def parts_ms(time: Time) -> dict[str, float]:
    """Where the time goes, milliseconds."""
    return {name: 1e3 * seconds for name, seconds in (time.parts | {"communication": time.communication}).items()}
