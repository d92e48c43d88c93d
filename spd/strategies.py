"""Perplexity against the percentage of blocks dropped, for several ways to repair them (figure 7's upper panels)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spd.distill import distill
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.planner import make_plan, plans_by_percentage
from spd.pretrained import SPDModel
from spd.recipes import Options

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
    """How the dropped blocks of each plan are repaired, and where repairs are kept (a stopped sweep goes on there)."""

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
    scores: Callable[[SPDModel], dict] | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Points of every strategy: `strategy`, `blocks`, `percent`, `perplexity`, `nats`, `plan`, and `scores`' keys.

    Args:
        load: gives the model as read; asked again before each repair, which changes it in place.
        evaluation: windows (W, T), apart from the calibration's.
        repairs: needed for every strategy but `zs`.
        scores: asked about each point's model, for more than perplexity.
        progress: told of each point done.
    """
    plans = plans_by_percentage(sensitivity, percentages)
    points = []
    for strategy in strategies:
        for blocks, model in _models(load, strategy, plans, sensitivity, repairs):
            found = perplexity(model.transformer, evaluation)
            percent = 100 * blocks / len(sensitivity)
            points.append({"strategy": strategy, "blocks": blocks, "percent": percent, "plan": str(model.plan),
                           "perplexity": found["perplexity"], "nats": found["nats"],
                           **(scores(model) if scores else {})})  # fmt: skip
            progress(1)
    return points


def _models(load, strategy: str, plans: dict, sensitivity: list[float], repairs) -> Iterator[tuple[int, SPDModel]]:
    """(blocks dropped, the model repaired for them), one after the other."""
    model = load()
    for blocks, plan in plans.items():
        if strategy != ZERO_SHOT and blocks:
            model = load()
            _repair(model, strategy, blocks, sensitivity, repairs)
        model.plan = plan
        yield blocks, model


def _repair(model: SPDModel, strategy: str, blocks: int, sensitivity: list[float], repairs: Repairs) -> None:
    recipe, extent = STRATEGIES[strategy]
    given = {"epochs": repairs.epochs, "learning_rate": repairs.learning_rate} if recipe == "paper" else {}
    options = Options.of(recipe, extent, **given)
    document = make_plan(sensitivity, str(blocks), repairs.tau1, repairs.tau2)
    distill(model, repairs.calibration, document, options, repairs.folder / f"{strategy}-{blocks}", repairs.leads)
    model.load_plan(repairs.folder / f"{strategy}-{blocks}")  # also where an earlier run had finished it
