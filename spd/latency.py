"""Predicted latency: time to first token (TTFT), time per output token (TPOT), and what dropping sync points gains.

A pass takes the sum of its operators' device times, plus launch time an operator (none under CUDA graphs), plus one
all-reduce a sync point that is kept, and one all-gather of the logits. Nothing overlaps; dropping a sync point changes
nothing but its all-reduce.
"""

from dataclasses import dataclass

from spd.config import ModelConfig
from spd.errors import SPDError
from spd.machines import AllReduce, Machine, Pass, check_length, communication, timed_passes
from spd.plan import Plan
from spd.planner import blocks_of


@dataclass(frozen=True)
class Time:
    """Seconds of one pass, by what they go to."""

    parts: dict[str, float]  # matrix products, attention, pointwise, launch
    communication: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.communication

    def parts_ms(self) -> dict[str, float]:
        return {part: 1e3 * seconds for part, seconds in {**self.parts, "communication": self.communication}.items()}

    def against(self, full: "Time") -> dict[str, float]:
        """Milliseconds, share of communication, and against `full` reduction 1 - t_p/t_0 and speedup t_0/t_p."""
        ratios = {"reduction": 1 - self.total / full.total, "speedup": full.total / self.total}
        return {"ms": 1e3 * self.total, "communication_share": self.communication / self.total, **ratios}


@dataclass(frozen=True)
class Prediction:
    """TTFT and TPOT of a shape on a machine, under any number of dropped attention sync points."""

    config: ModelConfig
    machine: Machine
    all_reduce: AllReduce
    tp: int
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded; TPOT is their mean

    def __post_init__(self):
        self.config.validate_tp(self.tp)
        check_length(self.config, self.prompt_len, self.new_tokens)

    @property
    def passes(self) -> dict[str, Pass]:
        asked = self.config, self.tp, self.batch, self.prompt_len, self.new_tokens
        return timed_passes(*asked, self.machine.element_size)

    def time(self, kind: str, syncs: int) -> Time:
        """Of `ttft` or `tpot` with `syncs` all-reduces."""
        a_pass, parts = self.passes[kind], dict.fromkeys(("matrix products", "attention", "pointwise", "launch"), 0.0)
        for operator, times in a_pass.operators():
            parts[operator.kind] += times * self.machine.seconds(operator, self.tp)
            parts["launch"] += times * self.machine.launch
        return Time(parts, communication(a_pass, self.all_reduce, syncs))

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
    """The document of `spd predict`: TTFT and TPOT at `percent`, beside 0 % and the ceilings.

    `ceiling` has what dropping could give at most (every attention sync point) and what any method could (no
    communication at all). Top-level share, reduction and speedup are the TTFT's; `tpot` has its own.
    """
    asked, full, dropped = ({k: prediction.compare(k, p) for k in ("ttft", "tpot")} for p in (percent, 0, 100))
    times = {f"{kind}_ms": row.pop("ms") for kind, row in asked.items()}
    return {
        **times,
        **asked["ttft"],
        "tpot": asked["tpot"],
        "percent": percent,
        "blocks_dropped": blocks_of(percent, prediction.config.num_blocks),
        "ceiling": {"all_attention_dropped": dropped, "no_communication": {k: prediction.bound(k) for k in asked}},
        "all_full": full,
        "parts_ms": {kind: prediction.dropping(kind, percent).parts_ms() for kind in asked},
    }
