"""Perplexity against the percentage of blocks dropped, for several ways to repair them (figure 7's upper panels)."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spd.distill import arguments_of, distill
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.plan import Plan
from spd.planner import make_plan, plans_by_percentage
from spd.pretrained import SPDModel
from spd.recipes import Options
from spd.repaired import CHANGED, RESULT, load_changed

ZERO_SHOT = "zs"
# Strategy -> recipe and, of the paper's, how far algorithm 1 is followed.
STRATEGIES = {
    ZERO_SHOT: ("zs", "zs"),
    "b2b": ("paper", "b2b"),
    "b2b+hg": ("paper", "b2b+hg"),
    "closed-form": ("closed-form", "zs"),
    "best": ("best", "zs"),
}


@dataclass(frozen=True)
class Repairs:
    """How the dropped blocks of each plan are repaired, and where repairs are kept.

    A stopped sweep goes on there, and one with other numbers finds what it shares with the last; each repair has a
    folder of its own, named by strategy, blocks and all that it depends on.
    """

    calibration: Tensor  # windows (W, T)
    folder: Path
    tau1: float  # perplexity points, as are the sensitivities
    tau2: float
    epochs: int | None = None  # of the paper's distillation; None: the paper's own
    learning_rate: float | None = None
    leads: bool = True  # whether this process writes


def parse_strategies(spec: str) -> list[str]:
    """Names from a list like `zs,b2b`. Raises SPDError naming the known ones."""
    names = [name.strip() for name in spec.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise SPDError(f"Unknown strategy '{unknown[0]}'; known: {', '.join(STRATEGIES)}.")
    return list(dict.fromkeys(names))


def curve(
    load: Callable[[], SPDModel],
    sensitivity: list[float],
    strategies: list[str],
    percentages: list[float] | None,
    evaluation: Tensor,
    repairs: Repairs | None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Points of every strategy: `strategy`, `blocks`, `percent`, `perplexity`, `nats`, `plan`.

    Args:
        load: gives the model as read; asked again before each repair, which changes it in place.
        evaluation: windows (W, T), apart from the calibration's.
        repairs: needed for every strategy but `zs`.
        progress: told of each point done.
    """
    plans = plans_by_percentage(sensitivity, percentages)
    points = []
    for strategy in strategies:
        for blocks, model in _models(load, strategy, plans, sensitivity, repairs):
            scores = perplexity(model.transformer, evaluation)
            percent = 100 * blocks / len(sensitivity)
            points.append({"strategy": strategy, "blocks": blocks, "percent": percent, "plan": str(model.plan),
                           "perplexity": scores["perplexity"], "nats": scores["nats"]})  # fmt: skip
            del model  # before the next one is read, lest there be two in memory
            progress(1)
    return points


def _models(load, strategy: str, plans: dict, sensitivity: list[float], repairs) -> Iterator[tuple[int, SPDModel]]:
    """(blocks dropped, the model repaired for them), one after the other."""
    model = None
    for blocks, plan in plans.items():
        if strategy != ZERO_SHOT and blocks:
            model = None
            model = _repaired(load, strategy, plan, sensitivity, repairs)
        elif model is None:
            model = load()
        model.plan = plan
        yield blocks, model


def _repaired(load, strategy: str, plan: Plan, sensitivity: list[float], repairs: Repairs) -> SPDModel:
    """A model repaired for a plan, now or by an earlier run.

    A repair on the teacher's hidden states does not depend on which other blocks drop: one of all blocks serves every
    plan, which takes its blocks from it.
    """
    recipe, extent = STRATEGIES[strategy]
    given = {"epochs": repairs.epochs, "learning_rate": repairs.learning_rate} if recipe == "paper" else {}
    options = Options.of(recipe, extent, **given)
    blocks = len(plan.dropped()) if options.students_inputs else len(plan)
    document = make_plan(sensitivity, str(blocks), repairs.tau1, repairs.tau2)
    model = load()
    same = json.dumps(arguments_of(model, repairs.calibration, document, options), sort_keys=True)
    folder = repairs.folder / f"{strategy}-{blocks}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    if not (folder / RESULT).exists():
        distill(model, repairs.calibration, document, options, folder, repairs.leads)
        model.transformer.shards.align()  # the folder is whole before anyone reads it
        if blocks == len(plan.dropped()):
            return model
        model = None
        model = load()
    if (folder / CHANGED).exists():
        load_changed(model.transformer, folder / CHANGED, plan.dropped())
    return model
