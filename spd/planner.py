"""From sensitivities to a plan: ranking, classes and treatments (algorithm 1 of the paper)."""

import json
import math
import re
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from spd.errors import SPDError
from spd.plan import Plan

# What algorithm 1 does to a dropped block of each class, and to a block that keeps its sync.
TREATMENTS = {"ISB": "drop", "SB": "distill, drop", "ESB": "group heads, distill, drop"}
KEEP = "keep"
TAU1, TAU2 = 0.05, 10.0  # the paper's thresholds for most models, in perplexity points


def blocks_of(percent: float, num_blocks: int) -> int:
    """Whole number of blocks nearest to a percentage, halves upwards."""
    return math.floor(percent / 100 * num_blocks + 0.5)


def parse_budget(budget: str, num_blocks: int) -> int:
    """Number of blocks to drop, from a count (`6`) or a percentage (`70%`)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(budget))
    if not match or (not match[2] and "." in match[1]):
        raise SPDError(f"'{budget}' is not a budget; give a number of blocks as in '6' or a percentage as in '70%'.")
    if match[2]:
        if float(match[1]) > 100:
            raise SPDError(f"A budget of {budget} is more than all blocks.")
        return blocks_of(float(match[1]), num_blocks)
    if int(match[1]) > num_blocks:
        raise SPDError(f"A budget of {budget} blocks is more than the model's {num_blocks}.")
    return int(match[1])


def ranking(sensitivity: list[float]) -> list[int]:
    """Block numbers by ascending sensitivity; of equals, the lower number first."""
    return sorted(range(len(sensitivity)), key=lambda i: (sensitivity[i], i))


def classify(sensitivity: float, tau1: float, tau2: float) -> str:
    """ISB (in-sensitive), SB (sensitive) or ESB (extremely sensitive)."""
    return "ISB" if sensitivity <= tau1 else "SB" if sensitivity <= tau2 else "ESB"


def zero_shot_plan(sensitivity: list[float], blocks: int) -> Plan:
    """The plan which drops the attention sync of the `blocks` least sensitive blocks."""
    return Plan.dropping(len(sensitivity), attention=set(ranking(sensitivity)[:blocks]))


def make_plan(sensitivity: list[float], budget: str, tau1: float = TAU1, tau2: float = TAU2) -> dict:
    """Policies, classes and treatments of every block, within a budget (`parse_budget`)."""
    num_blocks = len(sensitivity)
    if not sensitivity or not all(math.isfinite(s) for s in sensitivity):
        raise SPDError("The sensitivities are empty or not finite, so blocks cannot be ranked by them.")
    if not tau1 <= tau2:
        raise SPDError(f"tau1 must not exceed tau2, and they are {tau1} and {tau2}.")
    blocks = parse_budget(budget, num_blocks)
    plan = zero_shot_plan(sensitivity, blocks)
    classes = [classify(s, tau1, tau2) for s in sensitivity]
    dropped = set(plan.dropped())
    return {
        "policies": plan.policies(),
        "plan": str(plan),
        "classes": classes,
        "treatments": [TREATMENTS[c] if i in dropped else KEEP for i, c in enumerate(classes)],
        "ranking": ranking(sensitivity),
        "sensitivity": sensitivity,
        "budget": {"blocks": blocks, "percent": 100 * blocks / num_blocks},
        "tau1": tau1,
        "tau2": tau2,
    }


def plans_by_percentage(sensitivity: list[float], percentages: list[float] | None = None) -> dict[int, Plan]:
    """Zero-shot plans by number of dropped blocks: for each percentage, or for every number of blocks."""
    num_blocks = len(sensitivity)
    wanted = [100 * n / num_blocks for n in range(num_blocks + 1)] if percentages is None else percentages
    outside = [p for p in wanted if not 0 <= p <= 100]
    if outside:
        raise SPDError(f"{outside[0]} is not a percentage between 0 and 100.")
    return {n: zero_shot_plan(sensitivity, n) for n in sorted({blocks_of(p, num_blocks) for p in wanted})}


class _Model(BaseModel):
    fingerprint: str
    name: str | None = None


class _Measured(BaseModel):
    """What of a sensitivity document is relied upon."""

    model: _Model
    tp: int
    sensitivity: list[FiniteFloat] = Field(min_length=1)
    sensitivity_nats: list[FiniteFloat] | None = None
    perplexity_from: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        blocks = len(self.sensitivity)
        for name, wanted in (("sensitivity_nats", blocks), ("perplexity_from", blocks + 1)):
            found = getattr(self, name)
            if found is not None and len(found) != wanted:
                raise ValueError(f"{name} holds {len(found)} numbers, for {blocks} blocks it should be {wanted}")
        return self


def read_sensitivity(path: Path, fingerprint: str | None = None, tp: int | None = None) -> dict:
    """The document that `sensitivity --out` wrote; with `fingerprint` or `tp`, only one made for them."""
    try:
        document = json.loads(path.read_text())
        found = _Measured.model_validate(document)
    except OSError as error:
        raise SPDError(f"The sensitivities at {path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        reason = place + first["msg"].removeprefix("Value error, ")
        raise SPDError(f"{path} was not written by the sensitivity command (--out): {reason}.") from None
    except ValueError:
        raise SPDError(f"{path} was not written by the sensitivity command (--out).") from None
    if fingerprint is not None and found.model.fingerprint != fingerprint:
        made_for = f"{found.model.name} ({found.model.fingerprint})"
        raise SPDError(f"{path} was made for {made_for}, not for model {fingerprint}.")
    if tp is not None and found.tp != tp:
        raise SPDError(f"{path} was made for tp={found.tp}, not tp={tp}; measure the sensitivities anew.")
    return document
