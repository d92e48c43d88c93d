"""Perplexity against the percentage of blocks dropped, for several ways to repair them (figure 7's upper panels)."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spd.distill import Options, arguments_of, distill, total_steps
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.launch import bar
from spd.plan import Plan
from spd.planner import make_plan, plans_by_percentage
from spd.pretrained import SPDModel
from spd.records import write_json

ZERO_SHOT = "zs"
# The paper's strategies, by class: how blocks of it are repaired before they drop (`spd.distill.STRATEGIES`).
BY_CLASS = {ZERO_SHOT: {}, "b2b": {"SB": "b2b", "ESB": "b2b"}, "b2b+hg": {"SB": "b2b", "ESB": "b2b+hg"}}
BY_PLAN = ("closed-form", "best")  # each of these recipes repairs a block for those dropped before it
STRATEGIES = (*BY_CLASS, *BY_PLAN)


@dataclass(frozen=True)
class Repairs:
    """How the dropped blocks of each plan are repaired, and where repairs are kept (a stopped sweep goes on there)."""

    calibration: Tensor  # windows (W, T)
    folder: Path
    tau1: float  # perplexity points, as are the sensitivities
    tau2: float
    options: dict[str, Options]  # by recipe, or by strategy of the paper's
    is_main: bool = True  # whether this process writes
    bar: Callable = bar  # for each repair


class Points:
    """The points of a curve done so far, kept in a file after each, where there is one: an interrupted sweep goes on.

    Every process reads before any point is computed, the leading one writes.
    """

    def __init__(self, path: Path | None = None, is_main: bool = True):
        """`path` must be named by all that the points depend on. Raises SPDError where it holds something else."""
        self.path, self.is_main, self._found = path, is_main, {}
        if path is not None and path.exists():
            try:
                self._found = {(point["strategy"], point["blocks"]): point for point in json.loads(path.read_text())}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SPDError(f"The points in {path} cannot be read ({error}); remove it to start anew.") from error

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._found

    def __getitem__(self, key: tuple[str, int]) -> dict:
        return self._found[key]

    def add(self, point: dict) -> None:
        self._found[point["strategy"], point["blocks"]] = point
        if self.path is not None and self.is_main:
            write_json(self.path, list(self._found.values()))


def parse_strategies(spec: str) -> list[str]:
    """Names from a list like `zs,b2b`. Raises SPDError naming the known ones."""
    names = [name.strip() for name in spec.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise SPDError(f"Unknown strategy '{unknown[0]}'; known: {', '.join(STRATEGIES)}.")
    return list(dict.fromkeys(names))


def options_of(paper: dict, best: dict, seed: int = 0) -> dict[str, Options]:
    """For `Repairs`: the recipes' own options with some changed, as keyword arguments of `Options.of`."""
    changed = {"closed-form": {}, "best": best}
    options = {recipe: Options.of(recipe, **given, seed=seed) for recipe, given in changed.items()}
    return options | {name: Options.of("paper", name, **paper, seed=seed) for name in ("b2b", "b2b+hg")}


def curve(
    load: Callable[[], SPDModel],
    sensitivity: list[float],
    strategies: list[str],
    percentages: list[float] | None,
    evaluation: Tensor,
    repairs: Repairs | None,
    scores: Callable[[SPDModel], dict] | None = None,
    progress: Callable[[int], None] = lambda n: None,
    done: Points | None = None,
) -> list[dict]:
    """Points of every strategy: `strategy`, `blocks`, `percent`, `perplexity`, `nats`, `plan`, and `scores`' keys.

    Args:
        load: gives the model as read; asked again before and after repairs, which change it in place.
        evaluation: windows (W, T), apart from the calibration's.
        repairs: needed for every strategy but `zs`.
        scores: asked about each point's model, for more than perplexity.
        progress: told of each point done.
        done: points of an earlier run, which are not computed again; those of this one are added.
    """
    plans, done = plans_by_percentage(sensitivity, percentages), Points() if done is None else done
    for strategy in strategies:
        missing = {blocks: plan for blocks, plan in plans.items() if (strategy, blocks) not in done}
        progress(len(plans) - len(missing))
        for blocks, model in _models(load, strategy, missing, sensitivity, repairs) if missing else ():
            found = perplexity(model.transformer, evaluation)
            percent = 100 * blocks / len(sensitivity)
            done.add({"strategy": strategy, "blocks": blocks, "percent": percent, "plan": str(model.plan),
                      "perplexity": found["perplexity"], "nats": found["nats"],
                      **(scores(model) if scores else {})})  # fmt: skip
            del model  # before the next one is read, lest there be two in memory
            progress(1)
    return [done[strategy, blocks] for strategy in strategies for blocks in plans]


def _models(load, strategy: str, plans: dict, sensitivity: list[float], repairs) -> Iterator[tuple[int, SPDModel]]:
    """(blocks dropped, the model repaired for them), one after the other."""
    if strategy in BY_PLAN:
        return _each_repaired(load, strategy, plans, sensitivity, repairs)
    return _repaired_once(load, strategy, plans, sensitivity, repairs)


def _each_repaired(load, recipe: str, plans: dict, sensitivity: list[float], repairs: Repairs) -> Iterator:
    """A repair for each plan."""
    model = None
    for blocks, plan in plans.items():
        model = None  # first, lest there be two
        model = load()
        if blocks:
            document = make_plan(sensitivity, str(blocks), repairs.tau1, repairs.tau2)
            folder = _repair(model, document, repairs.options[recipe], f"{recipe}-{blocks}", repairs)
            model.load_plan(folder)  # also where an earlier run had finished it
        model.plan = plan
        yield blocks, model


def _repaired_once(load, strategy: str, plans: dict, sensitivity: list[float], repairs: Repairs | None) -> Iterator:
    """One repair of each class for all plans: by the paper's recipe a block's repair depends on no other block."""
    folders, present = {}, set()
    for name, treatment in BY_CLASS[strategy].items():
        document = make_plan(sensitivity, "100%", repairs.tau1, repairs.tau2)
        members = [i for i, block_class in enumerate(document["classes"]) if block_class == name]
        document["policies"] = Plan.dropping(len(sensitivity), attention=members).policies()
        if members:
            folder = _repair(load(), document, repairs.options[treatment], f"{treatment}-{name}", repairs)
            folders |= dict.fromkeys(members, folder)
    model = load()
    for blocks, plan in plans.items():  # ever more blocks are dropped
        for i in sorted(folders.keys() & set(plan.dropped()) - present):
            model.load_repaired(folders[i], blocks={i})
            present.add(i)
        model.plan = plan
        yield blocks, model


def _repair(model: SPDModel, document: dict, options: Options, name: str, repairs: Repairs) -> Path:
    """Repairs a model as it was read, with a bar of its own, unless that was done in an earlier run; gives the folder.

    Its name ends with a digest of all that the repair depends on, so that a sweep with other numbers finds what it
    shares with the last one.
    """
    same = json.dumps(arguments_of(model, repairs.calibration, document, options), sort_keys=True)
    folder = repairs.folder / f"{name}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    with repairs.bar(total_steps(document, options, len(repairs.calibration)), f"steps of {name}") as told:
        distill(model, repairs.calibration, document, options, folder, repairs.is_main, told)
    model.transformer.shards.align()  # the leading process has written all of it
    return folder
