"""From sensitivities to a plan: ranking, classes and treatments (algorithm 1 of the paper)."""

import math
import re
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from spd.errors import SPDError
from spd.plan import MadeFor, Plan
from spd.records import parsed

# What algorithm 1 does to a dropped block of each class, and to a block that keeps its sync.
TREATMENTS = {"ISB": "drop", "SB": "distill, drop", "ESB": "group heads, distill, drop"}
KEEP = "keep"
TAU1, TAU2 = 0.05, 10.0  # the paper's thresholds for most models, in perplexity points


def blocks_of(percent: float, num_blocks: int) -> int:
    """Whole number of blocks nearest to a percentage, halves upwards."""
    return math.floor(percent / 100 * num_blocks + 0.5)


def parse_budget(budget: str, num_blocks: int) -> int:
    """Number of blocks to drop, from a count (`6`) or a percentage (`70%`)."""
    match = re.fullmatch(r"\s*(?:(\d+)|(\d+(?:\.\d+)?)\s*%)\s*", budget)
    if not match:
        raise SPDError(f"'{budget}' is not a budget; give a number of blocks as in '6' or a percentage as in '70%'.")
    count, percent = match.groups()
    blocks = blocks_of(float(percent), num_blocks) if count is None else int(count)
    if blocks > num_blocks or float(percent or 0) > 100:
        raise SPDError(f"A budget of {budget} is more than the model's {num_blocks} blocks.")
    return blocks


def ranking(sensitivity: list[float]) -> list[int]:
    """Block numbers by ascending sensitivity; of equals, the lower number first."""
    return sorted(range(len(sensitivity)), key=sensitivity.__getitem__)


def thresholds(measured: dict, tau1: float, tau2: float) -> tuple[float | None, float | None]:
    """Those for a document that `read_sensitivity` gave: none where it holds scores, which are no perplexity points."""
    return (None, None) if "scores" in measured else (tau1, tau2)


def classify(sensitivity: float, tau1: float | None, tau2: float | None) -> str | None:
    """ISB (in-sensitive), SB (sensitive) or ESB (extremely sensitive); None without thresholds."""
    if tau1 is None:
        return None
    return "ISB" if sensitivity <= tau1 else "SB" if sensitivity <= tau2 else "ESB"


def zero_shot_plan(sensitivity: list[float], blocks: int) -> Plan:
    """The plan which drops the attention sync of the `blocks` least sensitive blocks."""
    return Plan.dropping(len(sensitivity), attention=ranking(sensitivity)[:blocks])


def make_plan(sensitivity: list[float], budget: str, tau1: float | None = TAU1, tau2: float | None = TAU2) -> dict:
    """Policies, classes and treatments of every block, within a budget (`parse_budget`)."""
    if not sensitivity or not all(math.isfinite(s) for s in sensitivity):
        raise SPDError("The sensitivities are empty or not finite, so blocks cannot be ranked by them.")
    if tau1 is not None and not tau1 <= tau2:
        raise SPDError(f"tau1 must not exceed tau2, and they are {tau1} and {tau2}.")
    blocks = parse_budget(budget, len(sensitivity))
    plan = zero_shot_plan(sensitivity, blocks)
    classes, dropped = [classify(s, tau1, tau2) for s in sensitivity], plan.dropped()
    return {
        "policies": plan.policies(),
        "plan": str(plan),
        "classes": classes,
        "treatments": [TREATMENTS.get(c, "drop") if i in dropped else KEEP for i, c in enumerate(classes)],
        "ranking": ranking(sensitivity),
        "sensitivity": sensitivity,
        "budget": {"blocks": blocks, "percent": 100 * blocks / len(sensitivity)},
        "tau1": tau1,
        "tau2": tau2,
    }


def plans_by_percentage(sensitivity: list[float], percentages: list[float] | None = None) -> dict[int, Plan]:
    """Zero-shot plans by number of dropped blocks: for each percentage, or for every number of blocks."""
    num_blocks = len(sensitivity)
    for percent in percentages or ():
        if not 0 <= percent <= 100:
            raise SPDError(f"{percent} is not a percentage between 0 and 100.")
    counts = range(num_blocks + 1) if percentages is None else {blocks_of(p, num_blocks) for p in percentages}
    return {blocks: zero_shot_plan(sensitivity, blocks) for blocks in sorted(counts)}


class Sensitivities(BaseModel, strict=True, extra="allow"):
    """What of a sensitivity document is relied upon: of each of the L blocks a finite number."""

    model: MadeFor
    tp: int
    sensitivity: list[FiniteFloat] | None = Field(None, min_length=1)
    scores: dict[str, dict[str, list[FiniteFloat]]] | None = None  # instead: of each point and policy
    losses: dict[str, dict[str, list[FiniteFloat]]] | None = None  # estimated with them
    sensitivity_nats: list[FiniteFloat] | None = None
    perplexity_from: list[FiniteFloat] | None = None  # L + 1

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.sensitivity is None:
            self.sensitivity = ((self.losses or self.scores or {}).get("attention") or {}).get("drop")
        if not self.sensitivity:
            raise ValueError("it holds neither sensitivities nor scores of dropping attention syncs")
        blocks = len(self.sensitivity)
        for name, wanted in (("sensitivity_nats", blocks), ("perplexity_from", blocks + 1)):
            found = getattr(self, name)
            if found is not None and len(found) != wanted:
                raise ValueError(f"{name} holds {len(found)} numbers, for {blocks} blocks it should be {wanted}")
        return self


def read_sensitivity(path: Path, fingerprint: str | None = None, tp: int | None = None) -> dict:
    """The document that `sensitivity --out` wrote; with `fingerprint` or `tp`, only one made for them.

    Where it holds `scores`, its `sensitivity` are the estimated losses of dropping the attention syncs.
    """
    found = parsed(path, Sensitivities, "was not written by the sensitivity command (--out)")
    if fingerprint not in (None, found.model.fingerprint):
        raise SPDError(
            f"{path} was made for {found.model.name} ({found.model.fingerprint}), not for model {fingerprint}."
        )
    if tp not in (None, found.tp):
        raise SPDError(f"{path} was made for tp={found.tp}, not tp={tp}; measure the sensitivities anew.")
    return found.model_dump(exclude_unset=True)
