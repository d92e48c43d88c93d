"""Perplexity against the percentage of blocks dropped, for several recipes of repair (figure 7's upper panels)."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spd.checkpoint import load_changed
from spd.distill import Recipe, arguments_of, distill, recipe_named, total_steps
from spd.errors import one_of
from spd.evaluate import Progress, silent
from spd.launch import Replicas, bar
from spd.options import percentages
from spd.plan import Plan
from spd.planner import TAU1, TAU2, make_plan, plans_by_percentage
from spd.pretrained import SPDModel
from spd.records import write_json
from spd.repairs import changed_files, ended, read_json

POLL = 5.0  # seconds
ZERO_SHOT = "zs"
# The paper's recipes as its figure 7 applies them: the recipe of a block by its class, the rest dropped as it is.
BY_CLASS = {ZERO_SHOT: {}, "b2b": {"SB": "b2b", "ESB": "b2b"}, "b2b+hg": {"SB": "b2b", "ESB": "b2b+hg"}}
BY_PLAN = ("closed-form", "best")  # each of these recipes repairs a block for those dropped before it
STRATEGIES = (*BY_CLASS, *BY_PLAN)
Strategies = Mapping[str, list[float] | None]  # recipe -> percentages of its own, where it has some


def parse_strategies(spec: str) -> Strategies:
    """Names of recipes from a list like `zs,b2b,closed-form@50/100`, the last at percentages of its own."""
    found = {}
    for part in spec.split(","):
        name, _, own = part.strip().partition("@")
        found[one_of("strategy", name, STRATEGIES)] = percentages(own.replace("/", ",")) if own else None
    return found


def points_of(strategies: Strategies, sensitivity: list[float], common: list[float] | None) -> list[tuple[str, Plan]]:
    """Each strategy with each plan it is for: at its own percentages, else at the `common` ones."""
    plans = {name: plans_by_percentage(sensitivity, own or common).values() for name, own in strategies.items()}
    return [(name, plan) for name, some in plans.items() for plan in some]


def sweep_recipes(paper: dict, best: dict, seed: int = 0, matmul: str = "tf32") -> dict[str, Recipe]:
    """The recipes by name, some of their numbers changed, as `recipe_named` takes them."""
    changes = {"b2b": paper, "b2b+hg": paper, "closed-form": {}, "best": best}
    return {name: recipe_named(name, seed, matmul=matmul, **given) for name, given in changes.items()}


@dataclass(frozen=True)
class Repairer:
    """Repairs a model for plans, each in a folder of its own, where what was stopped goes on."""

    load: Callable[[], SPDModel]  # gives the model as read, in float32
    identity: dict  # that model's (`identity_of`)
    calibration: Tensor | None  # windows (W, T)
    folder: Path
    replicas: Replicas = field(default_factory=Replicas)  # copies of the model that divide the repairs among themselves
    progress: Callable[[int, str], AbstractContextManager[Progress]] = bar  # for each repair: its steps, and their unit

    def folder_of(self, document: dict, recipe: Recipe, name: str) -> Path:
        """Its name ends with a digest of all that the repair depends on: a run with other numbers finds what it shares
        with the last one."""
        same = json.dumps(arguments_of(self.identity, self.calibration, document, recipe), sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"

    def repair(self, document: dict, recipe: Recipe, name: str) -> tuple[Path, dict]:
        """The folder of a plan's repair and its result, also where an earlier run had finished it."""
        folder = self.folder_of(document, recipe, name)
        done = ended(folder)
        result = done and done.result
        if result is None:
            model, steps = self.load(), total_steps(document, recipe, len(self.calibration))
            with self.progress(steps, f"steps of {name}") as progress:
                writes = self.replicas.rank % self.replicas.each == 0
                result = distill(model, self.calibration, document, recipe, folder, writes, progress)
            model.transformer.shards.align()  # the main process has written all of it
        return folder, result

    def share(self, repairs: list[tuple[dict, Recipe, str]]) -> None:
        """Each copy does its part; then it waits for the others' files, as no collective may wait so long."""
        for one in repairs[self.replicas.rank // self.replicas.each :: self.replicas.count]:
            self.repair(*one)
        while None in [ended(self.folder_of(*one)) for one in repairs]:
            time.sleep(POLL)


@dataclass(frozen=True)
class Sweep:
    """Plans that drop ever more blocks, the least sensitive first, and the recipes that repair them."""

    sensitivity: list[float]  # perplexity points, as are tau1 and tau2
    repairer: Repairer  # without calibration where the recipe is `zs` alone
    recipes: dict[str, Recipe]
    tau1: float = TAU1
    tau2: float = TAU2
    load: Callable[[], SPDModel] | None = None  # gives the model to evaluate; left out: the one that is repaired
    sent: tuple[int | None, ...] = ()  # bits, plain bits, group: how the plans are evaluated (`Plan.sending`)

    def repairs(self, recipe: str, blocks: int) -> Iterator[tuple[dict, str, str]]:
        """What repairs a plan of so many blocks: plan document, recipe and name of each.

        In the paper's recipes blocks do not depend on others, so that one repair of each class serves all plans.
        """
        if recipe in BY_PLAN and blocks:
            yield make_plan(self.sensitivity, str(blocks), self.tau1, self.tau2), recipe, f"{recipe}-{blocks}"
        for block_class, of_class in BY_CLASS.get(recipe, {}).items():
            document = make_plan(self.sensitivity, "100%", self.tau1, self.tau2)
            members = [i for i, found in enumerate(document["classes"]) if found == block_class]
            document["policies"] = Plan.dropping(len(self.sensitivity), members).policies()
            if members:
                yield document, of_class, f"{of_class}-{block_class}"

    def needed(self, points: list[tuple[str, Plan]]) -> list[tuple[dict, Recipe, str]]:
        """Each repair of these points once, as `Repairer.repair` takes it."""
        found = (one for recipe, plan in points for one in self.repairs(recipe, len(plan.dropped())))
        return list({name: (document, self.recipes[recipe], name) for document, recipe, name in found}.values())

    def files(self, recipe: str, plan: Plan) -> frozenset[Path]:
        """Of the blocks that the plan drops, the files of those that the recipe's repair changed."""
        files, dropped = {}, plan.dropped()
        for document, name, folder in self.repairs(recipe, len(dropped)):
            files |= changed_files(self.repairer.repair(document, self.recipes[name], folder)[0])
        return frozenset(file for block, file in files.items() if block in dropped)

    def curve(
        self,
        strategies: Strategies,
        percentages: list[float] | None,
        evaluate: Callable[[SPDModel], dict],
        progress: Progress = silent,
        kept: Path | None = None,
    ) -> list[dict]:
        """Points of every strategy: `strategy` (its name), `blocks`, `percent`, `plan`, and what `evaluate` gives.

        First all is repaired; then points are evaluated, those whose plan and repaired blocks are the same once.
        Scores are `kept` in a file after each, so that an interrupted sweep goes on; its path must be named by all
        that they depend on. `progress` is told of each point.
        """
        asked = points_of(strategies, self.sensitivity, percentages)
        self.repairer.share(self.needed(asked))
        repaired = [(name, plan, self.files(name, plan)) for name, plan in asked]
        scores = (read_json(kept, dict[str, dict]) if kept else None) or {}
        points, model, loaded = [], None, frozenset()
        for name, plan, files in repaired:
            same = " ".join([str(plan), *sorted("/".join(file.parts[-3:]) for file in files)])
            if same not in scores:
                if model is None or not loaded <= files:
                    model = None  # first, lest there be two in memory
                    model, loaded = (self.load or self.repairer.load)(), frozenset()
                for file in files - loaded:
                    load_changed(model.transformer, file)
                model.plan, loaded = plan.sending(*self.sent), files
                scores[same] = evaluate(model)
                if kept and self.repairer.replicas.rank == 0:
                    write_json(kept, scores)
            blocks = len(plan.dropped())
            described = {"strategy": name, "blocks": blocks, "percent": 100 * blocks / len(plan)}
            points.append(described | {"plan": str(plan.sending(*self.sent))} | scores[same])
            progress(1)
        return points
