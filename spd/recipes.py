"""The recipes by which dropped blocks are repaired: what is done to which class of block, and with which numbers."""

from dataclasses import dataclass, replace

from spd.errors import SPDError
from spd.plan import DROP, FULL, Plan
from spd.training import Schedule

RECIPES = ("zs", "closed-form", "paper", "best")
STRATEGIES = ("zs", "b2b", "b2b+hg")  # figure 7's: nothing, distillation, head grouping as well
HELD_OUT = 10  # one window in so many is never trained on: the last ones
TP_BLOCK, SPD_BLOCK = (FULL, FULL), (DROP, FULL)
GROUP, DISTILL, CLOSED_FORM = "group heads", "distill", "closed form"


@dataclass(frozen=True)
class Options:
    """How a plan's blocks are repaired."""

    recipe: str = "best"
    strategy: str = "b2b+hg"  # of the paper's recipe
    block: Schedule | None = None  # each block's distillation
    joint: Schedule | None = None  # that of all dropped blocks together, towards the logits
    generated: int = 0  # windows that the original model writes itself, to train on besides the calibration text
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
        """A recipe's options, with some of them changed.

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
        return replace(
            base,
            strategy=strategy,
            block=base.block and _changed(base.block, epochs, chosen),
            joint=base.joint and _changed(base.joint, joint_epochs, chosen),
            generated=base.generated if generated is None else generated,
            seed=seed,
        )

    def actions(self, block_class: str | None) -> tuple[str, ...]:
        """What is done to a dropped block before it drops (algorithm 1); one without a class gets all there is."""
        if self.recipe == "best":
            return (CLOSED_FORM, DISTILL)
        if self.recipe == "closed-form":
            return (CLOSED_FORM,)
        if self.recipe == "zs" or self.strategy == "zs" or block_class == "ISB":
            return ()
        return (GROUP, DISTILL) if self.strategy == "b2b+hg" and block_class in ("ESB", None) else (DISTILL,)

    @property
    def students_inputs(self) -> bool:
        """Whether a block is repaired on what the repaired blocks before it give, rather than the teacher's states."""
        return self.recipe in ("closed-form", "best")


def _changed(schedule: Schedule, epochs: int | None, chosen: dict) -> Schedule:
    return replace(schedule, **chosen, **({} if epochs is None else {"epochs": epochs}))


_OURS = {"relative": True, "decay": True, "keep_best": True}
DEFAULTS = {
    "zs": Options("zs"),
    "closed-form": Options("closed-form"),
    "paper": Options("paper", block=Schedule(10, 5e-5)),
    "best": Options("best", block=Schedule(1, 0.003, **_OURS), joint=Schedule(4, 0.003, **_OURS), generated=128),
}


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
