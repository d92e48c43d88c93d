"""The recipes by which dropped blocks are repaired: what is done to which class of block, and with which numbers."""

from dataclasses import dataclass, replace

from spd.errors import SPDError
from spd.plan import TP_BLOCK, Plan
from spd.repair.closed_form import Options as ClosedForm
from spd.repair.training import Schedule

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
