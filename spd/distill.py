"""Repairing the blocks of a plan: the paper's recipe (algorithm 1, sections 4.2.2 to 4.2.4), and what goes past it.

The original all-TP model's hidden states (the teacher's) are moved through the model block by block; where a block is
to be repaired it learns to give, under the plan, what the original block gave. `paper` feeds it the teacher's hidden
states; `best` feeds it what the blocks repaired before it give, and trains all of them together at the end.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spd.checkpoint import block_parameters, changed_tensors
from spd.closed_form import Calibration, ClosedForm, Site, repair_block
from spd.data import digest_of
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.generate import sample_windows
from spd.layout import group_heads
from spd.model import Transformer
from spd.plan import SPD_BLOCK, TP_BLOCK, Plan
from spd.planner import KEEP
from spd.pretrained import SPDModel
from spd.repairs import Workspace
from spd.training import Activations, Batches, Diverged, Passes, Schedule, block_loss, train_block, train_jointly

# ---------------------------------------------------------------- The recipes by which dropped blocks are rep


RECIPES = ("zs", "closed-form", "paper", "best")
HELD_OUT = 10  # one window in so many is never trained on: the last ones
GROUP, DISTILL, CLOSED_FORM = "group heads", "distill", "closed form"


@dataclass(frozen=True)
class Options:
    """How a plan's blocks are repaired: what is done to each, in this order, and to all of them at the end."""

    recipe: str = "best"
    closed_form: ClosedForm | None = None
    group_heads: bool = False  # of extremely sensitive blocks, and of those without a class
    block: Schedule | None = None  # each block's distillation
    joint: Schedule | None = None  # that of all dropped blocks together, towards the logits
    generated: int = 0  # windows that the original model writes itself, to train on besides the calibration text
    students_inputs: bool = (
        False  # a block learns on what the repaired ones before it give, not on the teacher's states
    )
    insensitive_as_is: bool = False  # nothing is done to in-sensitive blocks
    seed: int = 0

    @classmethod
    def of(
        cls,
        recipe: str,
        strategy: str = "b2b+hg",
        epochs: int | None = None,
        learning_rate: float | None = None,
        optimizer: str | None = None,
        joint_epochs: int | None = None,
        generated: int | None = None,
        seed: int = 0,
    ) -> "Options":
        """A recipe's options, with some of them changed; `strategy` is the paper's, and says how far it is followed.

        Raises:
            SPDError: an unknown recipe, strategy or optimiser, or an impossible number.
        """
        for name, given, known in (("recipe", recipe, RECIPES), ("strategy", strategy, STRATEGIES)):
            if given not in known:
                raise SPDError(f"Unknown {name} '{given}'; known: {', '.join(known)}.")
        if generated is not None and generated < 0:
            raise SPDError(f"The number of generated windows must not be negative, and is {generated}.")
        chosen = {"learning_rate": learning_rate, "optimizer": optimizer}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        base = DEFAULTS[recipe]
        options = replace(
            base,
            block=base.block and _changed(base.block, epochs, chosen),
            joint=base.joint and _changed(base.joint, joint_epochs, chosen),
            generated=base.generated if generated is None else generated,
            seed=seed,
        )
        return replace(options, **STRATEGIES[strategy]) if recipe == "paper" else options

    def actions(self, block_class: str | None) -> tuple[str, ...]:
        """What is done to a dropped block before it drops (algorithm 1); one without a class gets all there is."""
        if self.insensitive_as_is and block_class == "ISB":
            return ()
        grouped = self.group_heads and block_class in ("ESB", None)
        taken = {CLOSED_FORM: self.closed_form, GROUP: grouped, DISTILL: self.block}
        return tuple(action for action, wanted in taken.items() if wanted)


def _changed(schedule: Schedule, epochs: int | None, chosen: dict) -> Schedule:
    return replace(schedule, **chosen, **({} if epochs is None else {"epochs": epochs}))


# Figure 7's: nothing, distillation, head grouping as well.
STRATEGIES = {"zs": {"block": None, "group_heads": False}, "b2b": {"group_heads": False}, "b2b+hg": {}}
_OURS = {"relative": True, "decay": True, "keep_best": True}
_CLOSED_FORM = Options("closed-form", closed_form=ClosedForm(), students_inputs=True)
DEFAULTS = {
    "zs": Options("zs"),
    "closed-form": _CLOSED_FORM,
    "paper": Options("paper", group_heads=True, block=Schedule(10, 5e-5), insensitive_as_is=True),
    "best": replace(_CLOSED_FORM, recipe="best", block=Schedule(1, 0.003, **_OURS), joint=Schedule(4, 0.003, **_OURS),
                    generated=128),
}  # fmt: skip


def split(windows: int) -> int:
    """How many of the calibration windows are for training; the rest, a tenth rounded up, is held out.

    Raises:
        SPDError: fewer than two windows.
    """
    if windows < 2:
        raise SPDError(f"{windows} calibration window cannot be split into training and held-out windows; give 2.")
    return windows - -(-windows // HELD_OUT)


def repaired_blocks(document: dict) -> list[int]:
    """Blocks of a plan document that lose a sync."""
    return [i for i, pair in enumerate(Plan.from_policies(document["policies"]).blocks) if pair != TP_BLOCK]


def total_steps(document: dict, options: Options, windows: int) -> int:
    """Optimiser steps in all, for a bar, with `windows` of calibration."""
    blocks, trained = repaired_blocks(document), split(windows) + options.generated
    steps = sum(DISTILL in options.actions(class_of(document, i)) for i in blocks)
    steps *= options.block.steps(trained) if options.block else 0
    return steps + (options.joint.steps(trained) if options.joint and blocks else 0)


def class_of(document: dict, block: int) -> str | None:
    classes = document.get("classes")
    return classes[block] if classes else None


# ---------------------------------------------------------------- Repairing the blocks of a plan: the paper's


KEPT = "zero-shot"  # what a block whose repair failed is left as

Told = Callable[..., None]


def distill(
    model: SPDModel,
    tokens: Tensor,
    document: dict,
    options: Options,
    folder: Path,
    is_main: bool = True,
    told: Told = lambda *_, **__: None,
) -> dict:
    """Repairs a model for a plan, in place, and writes plan, changed tensors and result to `folder`.

    Started again with the same arguments after it was interrupted, it goes on after the last finished block, and ends
    with the same weights; where it had ended, it gives the result again.

    Args:
        model: as read, in float32, with nothing repaired.
        tokens: calibration windows (W, T); the last tenth is held out.
        document: `policies` and, for the paper's recipe, the `classes` of all blocks, as a plan file holds them.
        is_main: whether this process writes.
        told: progress; told of steps done, and the `loss`.

    Returns:
        `blocks` (of each: `index`, `class`, `treatment`, `loss_before`, `loss_after` on the held-out windows, and a
        `note`), `curves`, `perplexity_full`, `perplexity_before` (zero-shot) and `perplexity_after` on the held-out
        windows, `seconds`, `plan`. `best` also chooses the epoch to end with on these windows, which flatters it a
        little there: compare recipes on other text.

    Raises:
        SPDError: too few windows, a model that is not in float32, a plan that the recipe cannot repair, or a folder
            with another run's work.
    """
    if model.transformer.embedding.weight.dtype != torch.float32:
        raise SPDError("Repairs are computed in float32; load the model with that dtype.")
    plan = Plan.from_policies(document["policies"])
    if options.students_inputs and any(pair not in (TP_BLOCK, SPD_BLOCK) for pair in plan.blocks):
        raise SPDError(f"Only dropped attention syncs can be repaired in closed form, and the plan is {plan}.")
    arguments = arguments_of(model, tokens, document, options)
    workspace = Workspace(folder, arguments, is_main, model.transformer.shards)
    if workspace.result is not None:
        return workspace.result
    run = _Run(model, tokens, document, options, workspace, told)
    result = run.result()
    plan = {name: value for name, value in document.items() if name not in ("changed", "arguments")}
    plan |= {"plan": result["plan"], "recipe": options.recipe, "model": model.describe(), "tp": model.tp}
    workspace.conclude(plan, result)
    return result


def arguments_of(model: SPDModel, tokens: Tensor, document: dict, options: Options) -> dict:
    """What makes two runs the same."""
    same = {"model": model.fingerprint, "tp": model.tp, "data": digest_of(tokens), "policies": document["policies"]}
    return same | {"classes": document.get("classes")} | asdict(options)


class _Run:
    """One repair, from the first block to the last."""

    def __init__(
        self, model: SPDModel, tokens: Tensor, document: dict, options: Options, workspace: Workspace, told: Told
    ):
        self.started = time.monotonic()
        self.model, self.document, self.options, self.workspace, self.told = model, document, options, workspace, told
        self.transformer = model.transformer
        self.plan = Plan.from_policies(document["policies"])
        self.blocks = repaired_blocks(document)
        if options.closed_form and options.closed_form.centre:
            for i in self.blocks:
                self.transformer.blocks[i].attention.add_biases()
        self.kept = split(len(tokens))
        self.held_out = tokens[self.kept :]
        self.scores = self._scores()
        own = self._generated(tokens[: self.kept])
        self.trained = self.kept + len(own)
        self.tokens = torch.cat((tokens[: self.kept], own, self.held_out))

    def _scores(self) -> dict:
        """Perplexities of the model as it was read, on the held-out windows: all TP, and under the plan."""
        scores = {}
        for name, plan in (("full", Plan.full(len(self.plan))), ("before", self.plan)):
            self.model.plan = plan
            scores[f"perplexity_{name}"] = perplexity(self.transformer, self.held_out)["perplexity"]
        return scores

    def _generated(self, tokens: Tensor) -> Tensor:
        self.model.plan = Plan.full(len(self.plan))
        banned = self.model.tokenizer.all_special_ids if self.model.tokenizer else []
        return sample_windows(self.transformer, tokens, self.options.generated, banned, self.options.seed)

    def result(self) -> dict:
        """Repairs what is not yet repaired, and scores it."""
        self.model.plan = self.plan
        teacher = self._blockwise()
        if self.options.joint and self.blocks:
            self._jointly(teacher)
        self.model.plan = self.plan
        stages = self.workspace.state["stages"]
        notes = [stages[f"block {i}"] if i in self.blocks else self._kept_block(i) for i in range(len(self.plan))]
        curves = {f"block_{n['index']}": n["curve"] for n in notes if n.get("curve")}
        if "joint" in stages:
            curves["joint"] = stages["joint"]["curve"]
        return {
            "blocks": [{name: value for name, value in note.items() if name != "curve"} for note in notes],
            "curves": curves,
            **self.scores,
            "perplexity_after": perplexity(self.transformer, self.held_out)["perplexity"],
            "note": stages.get("joint", {}).get("note"),
            "recipe": self.options.recipe,
            "windows": {"trained": self.trained, "held_out": len(self.held_out)},
            "seconds": self._seconds(),
            "plan": str(self.plan),
        }

    def _kept_block(self, i: int) -> dict:
        return {"index": i, "class": class_of(self.document, i), "treatment": KEEP, "loss_before": None,
                "loss_after": None, "note": None}  # fmt: skip

    def _seconds(self) -> float:
        return self.workspace.state["seconds"] + time.monotonic() - self.started

    def _finish(self, stage: str, note: dict, changed: dict[int, dict[str, Tensor]]) -> None:
        self.workspace.finish(stage, note, changed, self._seconds())
        self.started = time.monotonic()

    # ------------------------------------------------------------ block by block

    def _blockwise(self) -> Activations:
        """Repairs the blocks in order; gives what leaves the original model's last block."""
        last = max(self.blocks, default=-1) if self.options.joint is None else len(self.plan) - 1
        own_inputs = self.options.students_inputs
        teacher = Activations.embedded(self.transformer, self.tokens)
        student = Activations.embedded(self.transformer, self.tokens) if own_inputs else None
        for i in range(last + 1):
            targets = teacher.through(self.transformer, i, TP_BLOCK, in_place=own_inputs)
            if i in self.blocks:
                self._block(i, student if own_inputs else teacher, targets)
            if own_inputs:
                student = student.through(self.transformer, i, self.plan.blocks[i], in_place=True)
            teacher = targets
        return teacher

    def _block(self, i: int, inputs: Activations, targets: Activations) -> None:
        stage = f"block {i}"
        actions = self.options.actions(class_of(self.document, i))
        if self.workspace.finished(stage) is None:
            before = _copy(self.transformer, i)
            note = self._repair(i, actions, inputs, targets, before)
            self._finish(stage, note, {i: changed_tensors(self.transformer, i, before)})
        else:
            self.workspace.restore(self.transformer, i)
            self.told(self.options.block.steps(self.trained) if DISTILL in actions else 0)

    def _repair(
        self, i: int, actions: tuple[str, ...], inputs: Activations, targets: Activations, before: dict[str, Tensor]
    ) -> dict:
        policies, held_out = self.plan.blocks[i], range(self.trained, len(self.tokens))

        def loss() -> float:
            return block_loss(self.transformer, i, policies, inputs, targets, held_out)

        note = self._kept_block(i) | {"treatment": ", ".join((*actions, "drop")), "loss_before": loss()}
        try:
            for action in actions:
                self._act(action, i, inputs, targets, note, before)
            note["loss_after"] = loss()
        except Diverged:
            note["note"] = f"the loss became non-finite; kept {KEPT}"
        else:
            if not note["loss_after"] <= note["loss_before"]:
                note["note"] = f"the repair ended at a loss of {note['loss_after']:.4g}, worse; kept {KEPT}"
        if note["note"]:
            self._put_back(before)
            note["loss_after"] = note["loss_before"]
        return note

    def _act(
        self, action: str, i: int, inputs: Activations, targets: Activations, note: dict, before: dict[str, Tensor]
    ) -> None:
        seed = self.options.seed + 1000 * (i + 1)
        if action == CLOSED_FORM:
            site = Site(self.transformer.blocks[i], i, self.transformer.shards, self.model.config)
            windows = range(self.kept)  # the model's own text would double the time for little
            streams = [Batches(stream, self.transformer, windows) for stream in (inputs, targets)]
            calibration = Calibration(*streams, self.transformer.context)
            saved = {name.removeprefix(f"blocks.{i}."): value for name, value in before.items()}  # one copy is enough
            note["closed_form"] = repair_block(site, calibration, self.options.closed_form, saved)["steps"]
        elif action == GROUP:
            passes = Passes(inputs, self.transformer, range(self.trained))
            block, shards = self.transformer.blocks[i], self.transformer.shards
            note["grouping"] = group_heads(block, passes, shards, self.model.config, seed)
        elif action == DISTILL:
            note["curve"] = train_block(
                self.transformer, i, self.plan.blocks[i], inputs, targets, self.trained, self.options.block, seed,
                self.told,
            )  # fmt: skip

    def _put_back(self, values: dict[str, Tensor]) -> None:
        parameters = dict(self.transformer.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    # ------------------------------------------------------------ all together

    def _jointly(self, teacher: Activations) -> None:
        if self.workspace.finished("joint") is not None:
            for i in self.blocks:
                self.workspace.restore(self.transformer, i)
            return
        before = [_copy(self.transformer, i) for i in self.blocks]
        note = {"curve": None, "note": None}
        try:
            note["curve"] = train_jointly(
                self.transformer, self.blocks, self.tokens, teacher, self.trained, self.options.joint,
                self.options.seed, self.told, self.workspace.load_epoch(), self.workspace.save_epoch,
            )  # fmt: skip
        except Diverged:
            note["note"] = "training all blocks together became non-finite; each is kept as it was before"
            for values in before:
                self._put_back(values)
        changed = {
            i: changed_tensors(self.transformer, i, values) for i, values in zip(self.blocks, before, strict=True)
        }
        self._finish("joint", note, changed)


def _copy(model: Transformer, block: int) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in block_parameters(model, block).items()}
