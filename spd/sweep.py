"""Perplexity against the percentage of blocks dropped, for several ways to repair them (figure 7's upper panels)."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spd.distill import Recipe, arguments_of, distill, recipe_named, total_steps
from spd.errors import SPDError
from spd.evaluate import Progress, perplexity, silent
from spd.launch import bar
from spd.plan import Plan
from spd.planner import TAU1, TAU2, make_plan, plans_by_percentage
from spd.pretrained import SPDModel
from spd.records import write_json

ZERO_SHOT = "zs"
# The paper's recipes as its figure 7 applies them: the recipe of a block by its class, the rest dropped as it is.
BY_CLASS = {ZERO_SHOT: {}, "b2b": {"SB": "b2b", "ESB": "b2b"}, "b2b+hg": {"SB": "b2b", "ESB": "b2b+hg"}}
BY_PLAN = ("closed-form", "best")  # each of these recipes repairs a block for those dropped before it
STRATEGIES = (*BY_CLASS, *BY_PLAN)


@dataclass(frozen=True)
class Repairer:
    """How the dropped blocks of plans are repaired, and where repairs are kept (what was stopped goes on there)."""

    calibration: Tensor  # windows (W, T)
    folder: Path
    recipes: dict[str, Recipe]
    tau1: float = TAU1  # perplexity points, as are the sensitivities
    tau2: float = TAU2
    is_main: bool = True
    progress: Callable[[int, str], AbstractContextManager[Progress]] = bar  # for each repair: its steps, and their unit

    def repair(self, model: SPDModel, document: dict, recipe: str, name: str) -> tuple[Path, dict]:
        """Repairs a model as it was read, unless that was done in an earlier run; gives the folder and the result.

        The folder's name ends with a digest of all that the repair depends on, so that a run with other numbers finds
        what it shares with the last one.
        """
        chosen, windows = self.recipes[recipe], self.calibration
        same = json.dumps(arguments_of(model, windows, document, chosen), sort_keys=True)
        folder = self.folder / f"{name}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
        with self.progress(total_steps(document, chosen, len(windows)), f"steps of {name}") as progress:
            result = distill(model, windows, document, chosen, folder, self.is_main, progress)
        model.transformer.shards.align()  # the main process has written all of it
        return folder, result


class Points:
    """The points of a curve done so far, kept in a file after each, where there is one: an interrupted sweep goes on.

    Every process reads before any point is computed, the main one writes. The path must be named by all that the
    points depend on.
    """

    def __init__(self, path: Path | None = None, is_main: bool = True):
        self.path, self.is_main, self.found = path, is_main, {}
        if path is not None and path.exists():
            try:
                self.found = {(point["strategy"], point["blocks"]): point for point in json.loads(path.read_text())}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SPDError(f"The points in {path} cannot be read ({error}); remove it to start anew.") from error

    def add(self, point: dict) -> None:
        self.found[point["strategy"], point["blocks"]] = point
        if self.path is not None and self.is_main:
            write_json(self.path, list(self.found.values()))


def parse_strategies(spec: str) -> list[str]:
    """Names of recipes from a list like `zs,b2b`."""
    names = [name.strip() for name in spec.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise SPDError(f"Unknown strategy '{unknown[0]}'; known: {', '.join(STRATEGIES)}.")
    return list(dict.fromkeys(names))


def sweep_recipes(paper: dict, best: dict, seed: int = 0) -> dict[str, Recipe]:
    """For a `Repairer`: the recipes with some numbers changed, as `recipe_named` takes them."""
    changes = {"b2b": paper, "b2b+hg": paper, "closed-form": {}, "best": best}
    return {name: recipe_named(name, seed=seed, **given) for name, given in changes.items()}


def curve(
    load: Callable[[], SPDModel],
    sensitivity: list[float],
    recipes: list[str],
    percentages: list[float] | None,
    evaluation: Tensor,
    repairer: Repairer | None,
    scores: Callable[[SPDModel], dict] | None = None,
    progress: Progress = silent,
    points: Points | None = None,
) -> list[dict]:
    """Points of every recipe: `strategy` (its name), `blocks`, `percent`, `perplexity`, `nats`, `plan`, `scores`' keys.

    `load` gives the model as read; it is asked again before and after repairs, which change it in place. `evaluation`
    are windows (W, T), apart from the calibration's. The `repairer` is needed by every recipe but `zs`. `points` of an
    earlier run are not computed again; those of this one are added. `progress` is told of each.
    """
    plans, points = plans_by_percentage(sensitivity, percentages), points or Points()
    for recipe in recipes:
        missing = {blocks: plan for blocks, plan in plans.items() if (recipe, blocks) not in points.found}
        progress(len(plans) - len(missing))
        repaired = _each_repaired if recipe in BY_PLAN else _repaired_once
        for blocks, model in repaired(load, recipe, missing, sensitivity, repairer) if missing else ():
            point = {"strategy": recipe, "blocks": blocks, "percent": 100 * blocks / len(sensitivity)}
            found = perplexity(model.transformer, evaluation)
            point |= {"plan": str(model.plan), "perplexity": found["perplexity"], "nats": found["nats"]}
            points.add(point | (scores(model) if scores else {}))
            del model  # before the next one is read, lest there be two in memory
            progress(1)
    return [points.found[recipe, blocks] for recipe in recipes for blocks in plans]


def _each_repaired(
    load: Callable[[], SPDModel], recipe: str, plans: dict[int, Plan], sensitivity: list[float], repairer: Repairer
) -> Iterator[tuple[int, SPDModel]]:
    """(blocks dropped, the model repaired for them): a repair for each plan."""
    model = None
    for blocks, plan in plans.items():
        model = None  # first, lest there be two
        model = load()
        if blocks:
            document = make_plan(sensitivity, str(blocks), repairer.tau1, repairer.tau2)
            folder, _ = repairer.repair(model, document, recipe, f"{recipe}-{blocks}")
            model.load_plan(folder)  # also where an earlier run had finished it
        model.plan = plan
        yield blocks, model


def _repaired_once(
    load: Callable[[], SPDModel],
    recipe: str,
    plans: dict[int, Plan],
    sensitivity: list[float],
    repairer: Repairer | None,
) -> Iterator[tuple[int, SPDModel]]:
    """The same with one repair of each class for all plans: in the paper's recipes blocks do not depend on others."""
    folders, present = {}, set()
    for name, of_class in BY_CLASS[recipe].items():
        document = make_plan(sensitivity, "100%", repairer.tau1, repairer.tau2)
        members = [i for i, block_class in enumerate(document["classes"]) if block_class == name]
        document["policies"] = Plan.dropping(len(sensitivity), attention=members).policies()
        if members:
            folder, _ = repairer.repair(load(), document, of_class, f"{of_class}-{name}")
            folders |= dict.fromkeys(members, folder)
    model = load()
    for blocks, plan in plans.items():  # ever more blocks are dropped
        for i in sorted(folders.keys() & set(plan.dropped()) - present):
            model.load_repaired(folders[i], blocks={i})
            present.add(i)
        model.plan = plan
        yield blocks, model
