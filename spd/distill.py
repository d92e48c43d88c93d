"""Repairing the blocks of a plan: the paper's recipe (algorithm 1, sections 4.2.2 to 4.2.4), and what goes past it.

The original all-TP model's hidden states (the teacher's) are moved through the model; where sublayers are to be
repaired, from one place where everything is synchronised to the next, they learn to give, under the plan, what the
original ones gave there. A dropped attention sync is a matter of its block, a dropped MLP sync of that MLP and the next
block's attention. The paper's recipes feed them the teacher's hidden states; `closed-form` and `best` feed them what
those repaired before give (the student's), and `best` trains all of them together at the end.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor

from spd.block_inputs import DroppedBlock
from spd.checkpoint import changed_tensors
from spd.closed_form import ClosedForm, repair_block
from spd.data import digest_of
from spd.errors import SPDError, one_of
from spd.evaluate import Progress, perplexity, silent
from spd.generate import sample_windows
from spd.layout import group_heads
from spd.model import Transformer
from spd.plan import FULL, Plan, Stretch
from spd.planner import KEEP
from spd.pretrained import SPDModel
from spd.repairs import Repairs
from spd.training import (
    Activations,
    Again,
    Diverged,
    Objective,
    Schedule,
    Windows,
    snapshot,
    towards_logits,
    towards_output,
    train,
)

HELD_OUT = 10  # one window in so many is never trained on: the last ones
CLOSED_FORM, GROUP, DISTILL = "closed form", "group heads", "distill"  # in the words of a block's treatment


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
    matmul: str = "tf32"  # how a GPU multiplies in float32, if it can; "fp32": with nothing shorter inside
    seed: int = 0

    def __post_init__(self):
        if self.generated < 0:
            raise SPDError(f"The number of generated windows must not be negative, and is {self.generated}.")

    def treatment(self, block_class: str | None, attention: bool = True) -> list[str]:
        """What is done to a dropped block before it drops (algorithm 1); one without a class gets all there is.

        Where it is not `attention` that drops, sublayers are only ever distilled.
        """
        if self.insensitive_as_is and block_class == "ISB":
            return []
        grouped = self.group_heads and block_class in ("ESB", None)
        wanted = {CLOSED_FORM: attention and self.closed_form, GROUP: attention and grouped, DISTILL: self.block}
        return [step for step, taken in wanted.items() if taken]

    def steps(self, block_class: str | None, windows: int) -> int:
        """Optimiser steps of a dropped block, or of other sublayers, with so many windows to train on."""
        return self.block.epochs * windows if DISTILL in self.treatment(block_class) else 0

    def units(self, block_class: str | None, windows: int, attention: bool = True) -> int:
        """Of a dropped block's repair: passes of the closed form and optimiser steps, of which `progress` is told."""
        passes = self.closed_form.passes if CLOSED_FORM in self.treatment(block_class, attention) else 0
        return passes + self.steps(block_class, windows)


_CLOSED_FORM = Recipe("closed-form", closed_form=ClosedForm(), students_inputs=True)
_B2B = Recipe("paper", block=Schedule(10, 5e-5), insensitive_as_is=True)
_OURS = Schedule(1, 0.003, relative=True, decay=True, keep_best=True)
PAPER = {"zs": Recipe("zs"), "b2b": _B2B, "b2b+hg": replace(_B2B, group_heads=True)}  # figure 7's
RECIPES = {
    **PAPER,
    "paper": PAPER["b2b+hg"],  # all of algorithm 1
    "closed-form": _CLOSED_FORM,
    "best": replace(_CLOSED_FORM, recipe="best", block=_OURS, joint=replace(_OURS, epochs=4), generated=128),
}


def recipe_named(
    name: str, seed: int = 0, epochs=None, joint_epochs=None, generated=None, matmul=None, **schedules
) -> Recipe:
    """One of `RECIPES`, changed where something is given; `schedules` are `learning_rate` and `optimizer` of both.

    Raises SPDError: an unknown name, or an impossible number.
    """
    recipe = RECIPES[one_of("recipe", name, RECIPES)]

    def changed(value, **changes):
        given = {name: change for name, change in changes.items() if change is not None}
        return value and replace(value, **given)

    block = changed(recipe.block, epochs=epochs, **schedules)
    joint = changed(recipe.joint, epochs=joint_epochs, **schedules)
    return changed(recipe, block=block, joint=joint, generated=generated, matmul=matmul, seed=seed)


def split(windows: int) -> int:
    """How many of the calibration windows are for training; the rest, a tenth rounded up, is held out."""
    if windows < 2:
        raise SPDError(f"{windows} calibration window cannot be split into training and held-out windows; give 2.")
    return windows - -(-windows // HELD_OUT)


def classes_of(document: dict) -> list[str | None]:
    """Class of every block of a plan document."""
    return document.get("classes") or [None] * len(document["policies"])


def repaired(document: dict, recipe: Recipe) -> dict[Stretch, str | None]:
    """The stretches of a plan document that are repaired one by one, with the class of a block that drops attention's.

    Recipes on the student's inputs take what is sent in few bits as sent whole.
    """
    plan, classes = Plan.from_document(document), classes_of(document)
    stretches = (plan.whole() if recipe.students_inputs else plan).stretches()
    return {stretch: classes[stretch.first // 2] if stretch.drops_attention else None for stretch in stretches}


def total_steps(document: dict, recipe: Recipe, windows: int) -> int:
    """Passes and optimiser steps in all, of which `distill` tells `progress`, with `windows` of calibration."""
    stretches, trained = repaired(document, recipe), split(windows) + recipe.generated
    joint = recipe.joint.epochs * trained if recipe.joint and Plan.from_document(document).stretches() else 0
    return joint + sum(recipe.units(found, trained, each.drops_attention) for each, found in stretches.items())


def identity_of(model: SPDModel) -> dict:
    return {"model": model.fingerprint, "tp": model.tp}


def arguments_of(identity: dict, tokens: Tensor, document: dict, recipe: Recipe) -> dict:
    """What makes two runs the same."""
    same = {"data": digest_of(tokens), "classes": document.get("classes")} | Plan.from_document(document).document()
    return identity | same | asdict(recipe)


# ---------------------------------------------------------------- algorithm 1


def in_precision_of_recipe(repair: Callable) -> Callable:
    """Meanwhile a GPU takes products of float32 in TF32 if it has that and the recipe says so; CPUs never do."""

    @wraps(repair)
    def repairing(model: SPDModel, tokens: Tensor, document: dict, recipe: Recipe, *arguments, **named) -> dict:
        before, on_gpu = torch.get_float32_matmul_precision(), model.transformer.embedding.weight.is_cuda
        torch.set_float32_matmul_precision("high" if on_gpu and recipe.matmul == "tf32" else "highest")
        try:
            return repair(model, tokens, document, recipe, *arguments, **named)
        finally:
            torch.set_float32_matmul_precision(before)

    return repairing


@in_precision_of_recipe
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

    Started again with the same arguments it goes on after the last finished block, or gives the result again.

    `model` is as read, in float32; `tokens` (W, T) are calibration windows; `document` holds `policies` and, for the
    paper's recipes, the `classes` of all blocks, as a plan file does. `is_main`: this process writes.

    Gives `blocks` (of each: `index`, `class`, `treatment`, `loss_before`, `loss_after` on the held-out windows, and a
    `note`), the same of repairs that begin at MLPs as `mlps`, `curves`, `perplexity_full`, `perplexity_before`
    (zero-shot) and `perplexity_after` on the held-out windows, `seconds`, `plan`. `best` also chooses its epoch on
    these windows: compare recipes on other text.
    """
    plan, transformer, stretches = Plan.from_document(document), model.transformer, repaired(document, recipe)
    _check(transformer, plan, stretches, recipe)
    repairs = Repairs(folder, arguments_of(identity_of(model), tokens, document, recipe), is_main, transformer.shards)
    if repairs.result is not None:
        return repairs.result
    for stretch in stretches if recipe.closed_form and recipe.closed_form.centre else ():
        if stretch.drops_attention:
            transformer.blocks[stretch.first // 2].attention.add_biases()
    windows = _windows(model, tokens, recipe)
    found = {"perplexity_full": _held_out(transformer, Plan.full(len(plan)), windows)}
    found |= {"perplexity_before": _held_out(transformer, plan, windows)}
    teacher = _one_by_one(stretches, Activations.embedded(transformer, windows), recipe, repairs, progress)
    together = sorted({i for stretch in plan.stretches() for i in stretch.blocks})  # few bits are met here, whole above
    if "joint" in repairs.notes:
        repairs.restore(transformer, range(2 * len(plan)))
    elif recipe.joint and together:
        teacher = teacher.through(2 * len(plan), in_place=recipe.students_inputs)
        _train_jointly(towards_logits(teacher, together), recipe, repairs, progress)
    found |= {"perplexity_after": _held_out(transformer, plan, windows)} | _notes(document, repairs.notes)
    found |= {"windows": {"trained": windows.trained, "held_out": len(windows.tokens) - windows.trained}}
    same = {"plan": str(plan), "recipe": recipe.recipe}
    return repairs.conclude(document | same | {"model": model.describe(), "tp": model.tp}, found | same)


def _one_by_one(
    stretches: dict[Stretch, str | None], teacher: Activations, recipe: Recipe, repairs: Repairs, progress: Progress
) -> Activations:
    """Repairs stretches in order, those that an earlier run has finished excepted; gives the furthest of the teacher.

    The teacher always goes on through sublayers that are not yet trained: where stretches overlap it is ahead.
    """
    transformer, own = teacher.model, recipe.students_inputs
    inputs = teacher.copy() if own else teacher
    for stretch, block_class in stretches.items():
        if inputs.passed < stretch.first:  # all is full in between
            teacher = teacher.through(stretch.first, in_place=own)
            inputs = inputs.through(stretch.first, in_place=True) if own else teacher
        after = teacher.through(stretch.stop, in_place=own)
        teacher = after.through(stretch.end, in_place=own)
        name = f"{('block', 'mlp')[stretch.first % 2]} {stretch.first // 2}"
        if name in repairs.notes:
            repairs.restore(transformer, range(stretch.first, stretch.end))
            progress(recipe.units(block_class, teacher.windows.trained, stretch.drops_attention))
        else:
            repairs.finish(name, *_repair(Case(stretch, block_class, inputs, teacher), recipe, progress))
        inputs = inputs.through(stretch.stop, stretch.policies, in_place=True) if own else after
    return teacher


def _check(transformer: Transformer, plan: Plan, stretches: dict[Stretch, str | None], recipe: Recipe) -> None:
    if transformer.embedding.weight.dtype != torch.float32:
        raise SPDError("Repairs are computed in float32; load the model with that dtype.")
    others = plan.stretches() and not (stretches and all(stretch.drops_attention for stretch in stretches))
    if recipe.closed_form and not (recipe.block or recipe.joint) and others:
        raise SPDError(
            f"Only dropped attention syncs can be repaired in closed form, and the plan is {plan}; "
            "the recipes 'best' and 'paper' train what the others need."
        )


def _windows(model: SPDModel, tokens: Tensor, recipe: Recipe) -> Windows:
    """A tenth of the tokens is held out; what the recipe wants of the original model's own text is written by it."""
    given, model.plan = split(len(tokens)), Plan.full(model.config.num_blocks)
    banned = model.tokenizer.all_special_ids if model.tokenizer else []
    own = sample_windows(model.transformer, tokens[:given], recipe.generated, banned, recipe.seed)
    return Windows(torch.cat((tokens[:given], own, tokens[given:])), given, given + len(own))


def _held_out(transformer: Transformer, plan: Plan, windows: Windows) -> float | None:
    """Perplexity on the windows held out; the model is left with the plan."""
    transformer.plan = plan
    return perplexity(transformer, windows.tokens[windows.trained :])["perplexity"]


def _notes(document: dict, notes: dict[str, dict]) -> dict:
    """What a result says of each stage."""
    joint = notes.get("joint", {})
    kept = {f"block {i}": _note(i, found, KEEP, None) for i, found in enumerate(classes_of(document))}
    rows = {name: {k: v for k, v in note.items() if k != "curve"} for name, note in (kept | notes).items()}
    curved = {name: note["curve"] for name, note in notes.items() if note is joint or note.get("curve")}
    mlps = [row for name, row in rows.items() if name.startswith("mlp")]
    found = {"blocks": [rows[name] for name in kept], "note": joint.get("note")}
    found |= {"curves": {name.replace(" ", "_"): curve for name, curve in curved.items()}}
    return found | ({"mlps": mlps} if mlps else {})


def _note(index: int, block_class: str | None, treatment: str, loss: float | None) -> dict:
    note = {"index": index, "class": block_class, "treatment": treatment, "note": None}
    return note | {"loss_before": loss, "loss_after": loss}


# ---------------------------------------------------------------- what is trained, solved and moved


@dataclass(frozen=True)
class Case:
    """A stretch to repair: what enters it, and what it should give."""

    stretch: Stretch
    block_class: str | None
    inputs: Activations
    targets: Activations

    @property
    def index(self) -> int:
        """Of the block that it begins in."""
        return self.stretch.first // 2


def _repair(case: Case, recipe: Recipe, progress: Progress) -> tuple[dict, list[tuple[int, dict[str, Tensor]]]]:
    """Does to the sublayers what the recipe says, and undoes it where they are then worse on held-out windows.

    Gives a note of it, and the blocks with their changed tensors.
    """
    transformer, stretch, seed = case.inputs.model, case.stretch, recipe.seed + 1000 * (case.index + 1)
    treatment = recipe.treatment(case.block_class, stretch.drops_attention)
    before = snapshot(transformer, stretch.blocks)
    relative = recipe.block is not None and recipe.block.relative
    objective = towards_output(case.inputs, stretch, case.targets, relative)
    losing = dict.fromkeys(policy.name for policy in stretch.policies if policy != FULL)
    note = _note(case.index, case.block_class, ", ".join((*treatment, *losing)), objective.held_out())
    try:
        if CLOSED_FORM in treatment:
            note["closed_form"] = _solve(case, recipe.closed_form, before, progress)
        if GROUP in treatment:
            note["grouping"] = _group(case, seed)
        if DISTILL in treatment:
            note["curve"] = train(objective, recipe.block, seed, progress)
        found = objective.held_out()
    except Diverged:
        note["note"] = "the loss became non-finite; kept zero-shot"
    else:
        if found <= note["loss_before"]:
            note["loss_after"] = found
        else:  # worse, or not a number
            note["note"] = f"the repair ended at a loss of {found:.4g}, worse; kept zero-shot"
    if note["note"]:
        transformer.load_state_dict(before, strict=False)
    return note, [(i, changed_tensors(transformer, i, before)) for i in stretch.blocks]


def _solve(case: Case, options: ClosedForm, before: dict[str, Tensor], progress: Progress) -> dict:
    transformer, i, windows = case.inputs.model, case.index, case.inputs.windows
    rows = windows.batches(stop=windows.given)  # its own text would double the time for little
    inputs, targets = (Again(rows, lambda some, a=a: a.at(some)[0].x) for a in (case.inputs, case.targets))
    saved = {name.removeprefix(f"blocks.{i}."): value for name, value in before.items()}  # one copy is enough
    dropped = DroppedBlock(transformer, i, inputs, targets, progress=progress)
    return repair_block(dropped, options, saved)["steps"]


def _group(case: Case, seed: int) -> dict:
    transformer, windows = case.inputs.model, case.inputs.windows
    inputs = Again(windows.batches(stop=windows.trained), case.inputs.at)
    return group_heads(transformer.blocks[case.index], inputs, transformer.shards, transformer.config, seed)


def _train_jointly(objective: Objective, recipe: Recipe, repairs: Repairs, progress: Progress) -> None:
    """All blocks towards the logits, going on with the epoch that an earlier run had reached."""
    model, before = objective.model, snapshot(objective.model, objective.blocks)
    note = {"curve": None, "note": None}
    try:
        state = repairs.load_epoch()
        note["curve"] = train(objective, recipe.joint, recipe.seed, progress, state, repairs.save_epoch)
    except Diverged:
        note["note"] = "training all blocks together became non-finite; each is kept as it was before"
        model.load_state_dict(before, strict=False)
    repairs.finish("joint", note, ((i, changed_tensors(model, i, before)) for i in objective.blocks))
