"""Repairing the blocks of a plan: the paper's recipe (algorithm 1, sections 4.2.2 to 4.2.4), and what goes past it.

The original all-TP model's hidden states (the teacher's) are moved through the model block by block; where a block is
to be repaired it learns to give, under the plan, what the original block gave. The paper's recipes feed it the
teacher's hidden states; `closed-form` and `best` feed it what the blocks repaired before it give (the student's), and
`best` trains all of them together at the end.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spd.block_inputs import Calibration, Site
from spd.checkpoint import changed_tensors
from spd.closed_form import ClosedForm, repair_block
from spd.data import digest_of
from spd.errors import SPDError
from spd.evaluate import Progress, perplexity, silent
from spd.generate import sample_windows
from spd.layout import group_heads
from spd.plan import SPD_BLOCK, TP_BLOCK, Plan, Policy
from spd.planner import KEEP
from spd.pretrained import SPDModel
from spd.repairs import Repairs
from spd.training import (
    Diverged,
    Lazy,
    Objective,
    Schedule,
    batches_of,
    embedded,
    put_back,
    snapshot,
    stream_at,
    through,
    towards_logits,
    towards_output,
    train,
)

HELD_OUT = 10  # one window in so many is never trained on: the last ones
CLOSED_FORM, GROUP, DISTILL = "closed form", "group heads", "distill"
KEPT = "zero-shot"  # what a block whose repair failed is left as


@dataclass(frozen=True)
class Recipe:
    """How a plan's blocks are repaired: what is done to each, in this order, and to all of them at the end."""

    recipe: str = "best"  # its name in results, where all of the paper's are "paper"
    closed_form: ClosedForm | None = None
    group_heads: bool = False  # of extremely sensitive blocks, and of those without a class
    block: Schedule | None = None  # each block's distillation
    joint: Schedule | None = None  # that of all dropped blocks together, towards the logits
    generated: int = 0  # windows that the original model writes itself, to train on besides the calibration text
    students_inputs: bool = False  # a block learns on what the repaired ones before it give, not on the teacher's
    insensitive_as_is: bool = False  # nothing is done to in-sensitive blocks
    seed: int = 0

    def actions(self, block_class: str | None) -> tuple[str, ...]:
        """What is done to a dropped block before it drops (algorithm 1); one without a class gets all there is."""
        if self.insensitive_as_is and block_class == "ISB":
            return ()
        grouped = self.group_heads and block_class in ("ESB", None)
        wanted = {CLOSED_FORM: self.closed_form, GROUP: grouped, DISTILL: self.block}
        return tuple(action for action, taken in wanted.items() if taken)


_CLOSED_FORM = Recipe("closed-form", closed_form=ClosedForm(), students_inputs=True)
_B2B = Recipe("paper", block=Schedule(10, 5e-5), insensitive_as_is=True)
_OURS = Schedule(1, 0.003, relative=True, decay=True, keep_best=True)
# Figure 7's: nothing, distillation, head grouping as well; and what goes past them.
RECIPES = {
    "zs": Recipe("zs"),
    "b2b": _B2B,
    "b2b+hg": replace(_B2B, group_heads=True),
    "closed-form": _CLOSED_FORM,
    "best": replace(_CLOSED_FORM, recipe="best", block=_OURS, joint=replace(_OURS, epochs=4), generated=128),
}
PAPER = ("zs", "b2b", "b2b+hg")  # what `strategy` chooses from, where the recipe is called "paper"


def recipe_named(name: str, strategy: str | None = None, seed: int = 0, **changes) -> Recipe:
    """One of `RECIPES`, or `paper`, of which `strategy` says how far it is followed (default: `b2b+hg`, all of it).

    `changes` are `epochs` and `joint_epochs` (of `block` and `joint`), `learning_rate` and `optimizer` (of both) and
    `generated`; those that are None change nothing. Raises SPDError: an unknown name, or an impossible number.
    """
    strategy = strategy or "b2b+hg"
    for kind, given, known in (("recipe", name, (*RECIPES, "paper")), ("strategy", strategy, PAPER)):
        if given not in known:
            raise SPDError(f"Unknown {kind} '{given}'; known: {', '.join(known)}.")
    epochs, joint_epochs, generated = (changes.pop(n, None) for n in ("epochs", "joint_epochs", "generated"))
    if generated is not None and generated < 0:
        raise SPDError(f"The number of generated windows must not be negative, and is {generated}.")

    def changed(schedule: Schedule | None, epochs: int | None) -> Schedule | None:
        given = {name: value for name, value in (changes | {"epochs": epochs}).items() if value is not None}
        return schedule and replace(schedule, **given)

    base = RECIPES[strategy if name == "paper" else name]
    return replace(
        base,
        block=changed(base.block, epochs),
        joint=changed(base.joint, joint_epochs),
        generated=base.generated if generated is None else generated,
        seed=seed,
    )


def split(windows: int) -> int:
    """How many of the calibration windows are for training; the rest, a tenth rounded up, is held out."""
    if windows < 2:
        raise SPDError(f"{windows} calibration window cannot be split into training and held-out windows; give 2.")
    return windows - -(-windows // HELD_OUT)


def repaired_blocks(document: dict) -> list[int]:
    """Blocks of a plan document that lose a sync."""
    return [i for i, pair in enumerate(Plan.from_policies(document["policies"]).blocks) if pair != TP_BLOCK]


def class_of(document: dict, block: int) -> str | None:
    classes = document.get("classes")
    return classes[block] if classes else None


def total_steps(document: dict, recipe: Recipe, windows: int) -> int:
    """Optimiser steps in all, of which `distill` tells `progress`, with `windows` of calibration."""
    blocks, trained = repaired_blocks(document), split(windows) + recipe.generated
    distilled = sum(DISTILL in recipe.actions(class_of(document, i)) for i in blocks)
    steps = distilled * recipe.block.steps(trained) if recipe.block else 0
    return steps + (recipe.joint.steps(trained) if recipe.joint and blocks else 0)


def arguments_of(model: SPDModel, tokens: Tensor, document: dict, recipe: Recipe) -> dict:
    """What makes two runs the same."""
    same = {"model": model.fingerprint, "tp": model.tp, "data": digest_of(tokens), "policies": document["policies"]}
    return same | {"classes": document.get("classes")} | asdict(recipe)


# ---------------------------------------------------------------- algorithm 1


def distill(
    model: SPDModel,
    tokens: Tensor,
    document: dict,
    recipe: Recipe,
    folder: Path,
    is_main: bool = True,
    progress: Progress = silent,
) -> dict:
    """Repairs a model for a plan, in place, and writes plan, changed tensors and result to `folder`.

    Started again with the same arguments after it was interrupted, it goes on after the last finished block, and ends
    with the same weights; where it had ended, it gives the result again.

    `model` is as read, in float32; `tokens` (W, T) are calibration windows; `document` holds `policies` and, for the
    paper's recipes, the `classes` of all blocks, as a plan file does. `is_main`: this process writes.

    Gives `blocks` (of each: `index`, `class`, `treatment`, `loss_before`, `loss_after` on the held-out windows, and a
    `note`), `curves`, `perplexity_full`, `perplexity_before` (zero-shot) and `perplexity_after` on the held-out
    windows, `seconds`, `plan`. `best` also chooses the epoch to end with on these windows, which flatters it a little
    there: compare recipes on other text.
    """
    transformer, plan, dropped = model.transformer, Plan.from_policies(document["policies"]), repaired_blocks(document)
    _check(model, plan, recipe)
    repairs = Repairs(folder, arguments_of(model, tokens, document, recipe), is_main, transformer.shards)
    if repairs.result is not None:
        return repairs.result
    for i in dropped if recipe.closed_form and recipe.closed_form.centre else ():
        transformer.blocks[i].attention.add_biases()
    windows = Windows.of(model, tokens, recipe)
    scores = {"perplexity_full": windows.perplexity(model, Plan.full(len(plan)))}
    scores |= {"perplexity_before": windows.perplexity(model, plan)}
    own = recipe.students_inputs  # else a block's inputs are the teacher's, which outlive the block
    teacher = embedded(transformer, windows.tokens)
    student = teacher.clone() if own else None
    for i in range(len(plan) if recipe.joint else max(dropped, default=-1) + 1):
        policies, inputs = plan.blocks[i], student if own else teacher
        targets = through(transformer, i, TP_BLOCK, teacher, in_place=own)
        if i in dropped:
            case = Case(model, i, class_of(document, i), policies, inputs, targets, windows)
            _repair_or_restore(case, recipe, repairs, progress)
        student = through(transformer, i, policies, student, in_place=True) if own else None
        teacher = targets
    if recipe.joint and dropped:
        objective = towards_logits(transformer, dropped, windows.tokens, teacher, windows.trained)
        _train_jointly(objective, recipe, repairs, progress)
    scores |= {"perplexity_after": windows.perplexity(model, plan), "windows": windows.counts()}
    same = {"plan": str(plan), "recipe": recipe.recipe}
    of_model = {"model": model.describe(), "tp": model.tp}
    return repairs.conclude(document | same | of_model, scores | same | _notes(document, repairs))


def _check(model: SPDModel, plan: Plan, recipe: Recipe) -> None:
    if model.transformer.embedding.weight.dtype != torch.float32:
        raise SPDError("Repairs are computed in float32; load the model with that dtype.")
    if recipe.students_inputs and any(pair not in (TP_BLOCK, SPD_BLOCK) for pair in plan.blocks):
        raise SPDError(f"Only dropped attention syncs can be repaired in closed form, and the plan is {plan}.")


def _notes(document: dict, repairs: Repairs) -> dict:
    """What a result says of each stage."""
    joint = repairs.finished("joint") or {}
    blocks = range(len(document["policies"]))
    notes = [repairs.finished(f"block {i}") or _note(i, class_of(document, i), KEEP, None) for i in blocks]
    curves = {f"block_{note['index']}": note["curve"] for note in notes if note.get("curve")}
    if joint:
        curves["joint"] = joint["curve"]
    without_curves = [{name: value for name, value in note.items() if name != "curve"} for note in notes]
    return {"blocks": without_curves, "curves": curves, "note": joint.get("note")}


def _note(index: int, block_class: str | None, treatment: str, loss: float | None) -> dict:
    note = {"index": index, "class": block_class, "treatment": treatment, "note": None}
    return note | {"loss_before": loss, "loss_after": loss}


@dataclass(frozen=True)
class Windows:
    """Calibration windows (W, T): `given` to train on, the original model's own up to `trained`, and those held out."""

    tokens: Tensor
    given: int
    trained: int

    @classmethod
    def of(cls, model: SPDModel, tokens: Tensor, recipe: Recipe) -> "Windows":
        """A tenth of the tokens is held out; what the recipe wants of the model's own text is written by it."""
        given = split(len(tokens))
        model.plan = Plan.full(model.config.num_blocks)
        banned = model.tokenizer.all_special_ids if model.tokenizer else []
        own = sample_windows(model.transformer, tokens[:given], recipe.generated, banned, recipe.seed)
        return cls(torch.cat((tokens[:given], own, tokens[given:])), given, given + len(own))

    def perplexity(self, model: SPDModel, plan: Plan) -> float | None:
        """On the windows held out; the model is left with the plan."""
        model.plan = plan
        return perplexity(model.transformer, self.tokens[self.trained :])["perplexity"]

    def counts(self) -> dict:
        return {"trained": self.trained, "held_out": len(self.tokens) - self.trained}


# ---------------------------------------------------------------- one block


@dataclass(frozen=True)
class Case:
    """A dropped block: the activations (W, T, D) that enter it, and those that it should give."""

    model: SPDModel
    index: int
    block_class: str | None
    policies: tuple[Policy, Policy]
    inputs: Tensor
    targets: Tensor
    windows: Windows

    @property
    def objective(self) -> Objective:
        transformer, trained = self.model.transformer, self.windows.trained
        return towards_output(transformer, self.index, self.policies, self.inputs, self.targets, trained)


def _repair_or_restore(case: Case, recipe: Recipe, repairs: Repairs, progress: Progress) -> None:
    transformer, i = case.model.transformer, case.index
    if repairs.finished(f"block {i}") is None:
        before = snapshot(transformer, [i])
        note = _repair(case, recipe, before, progress)
        repairs.finish(f"block {i}", note, [(i, changed_tensors(transformer, i, before))])
    else:
        repairs.restore(transformer, i)
        distilled = DISTILL in recipe.actions(case.block_class)
        progress(recipe.block.steps(case.windows.trained) if distilled else 0)


def _repair(case: Case, recipe: Recipe, before: dict[str, Tensor], progress: Progress) -> dict:
    """Does to the block what the recipe says, and undoes it where the block is then worse on held-out windows."""
    actions, objective, seed = recipe.actions(case.block_class), case.objective, recipe.seed + 1000 * (case.index + 1)
    note = _note(case.index, case.block_class, ", ".join((*actions, "drop")), objective.held_out())
    try:
        if CLOSED_FORM in actions:
            note["closed_form"] = _solve(case, recipe.closed_form, before)
        if GROUP in actions:
            note["grouping"] = _group(case, seed)
        if DISTILL in actions:
            note["curve"] = train(objective, recipe.block, seed, progress)
        found = objective.held_out()
    except Diverged:
        note["note"] = f"the loss became non-finite; kept {KEPT}"
    else:
        if found <= note["loss_before"]:
            note["loss_after"] = found
        else:  # worse, or not a number
            note["note"] = f"the repair ended at a loss of {found:.4g}, worse; kept {KEPT}"
    if note["note"]:
        put_back(case.model.transformer, before)
    return note


def _solve(case: Case, options: ClosedForm, before: dict[str, Tensor]) -> dict:
    transformer, i = case.model.transformer, case.index
    rows = list(batches_of(case.inputs, range(case.windows.given)))  # its own text would double the time for little

    def on_device(activations: Tensor) -> Lazy:
        return Lazy(rows, lambda some: activations[some].to(transformer.embedding.weight))

    site = Site(transformer.blocks[i], i, transformer.shards, case.model.config)
    data = Calibration(on_device(case.inputs), on_device(case.targets), transformer.context)
    saved = {name.removeprefix(f"blocks.{i}."): value for name, value in before.items()}  # one copy is enough
    return repair_block(site, data, options, saved)["steps"]


def _group(case: Case, seed: int) -> dict:
    transformer = case.model.transformer
    rows = list(batches_of(case.inputs, range(case.windows.trained)))
    inputs = Lazy(rows, partial(stream_at, transformer, case.inputs))
    return group_heads(transformer.blocks[case.index], inputs, transformer.shards, case.model.config, seed)


def _train_jointly(objective: Objective, recipe: Recipe, repairs: Repairs, progress: Progress) -> None:
    """All blocks towards the logits, going on with the epoch that an earlier run had reached."""
    model, blocks = objective.model, objective.blocks
    if repairs.finished("joint") is not None:
        for i in blocks:
            repairs.restore(model, i)
        return
    before = snapshot(model, blocks)
    note = {"curve": None, "note": None}
    try:
        state = repairs.load_epoch()
        note["curve"] = train(objective, recipe.joint, recipe.seed, progress, state, repairs.save_epoch)
    except Diverged:
        note["note"] = "training all blocks together became non-finite; each is kept as it was before"
        put_back(model, before)
    repairs.finish("joint", note, ((i, changed_tensors(model, i, before)) for i in blocks))
