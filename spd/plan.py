"""A plan is data: one policy for each of the two sync points of every block."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from spd.errors import SPDError, in_words, one_of

POINTS = ("attention", "mlp")  # the sync points of a block, in the order they are reached


@dataclass(frozen=True)
class Policy:
    """What a sync point does with the pending part of the residual stream.

    `full` shares everything pending, `drop` shares nothing. Further kinds (low-bit, node-local) join here,
    with one letter, and in `Shards.sync`, with one branch.
    """

    name: str
    letter: str


FULL = Policy("full", "F")
DROP = Policy("drop", "D")
TP_BLOCK, SPD_BLOCK = (FULL, FULL), (DROP, FULL)  # Megatron's block, and the paper's
POLICIES = {policy.name: policy for policy in (FULL, DROP)}


def _policy(name: str) -> Policy:
    return POLICIES[one_of("policy", name, POLICIES)]


@dataclass(frozen=True)
class Plan:
    """Policies of every block: `blocks[i]` is (attention, mlp). Prints as its letters, as in `DF DF FF`."""

    blocks: tuple[tuple[Policy, Policy], ...]

    @classmethod
    def full(cls, num_blocks: int) -> "Plan":
        """Megatron tensor parallelism: two all-reduces a block."""
        return cls(((FULL, FULL),) * num_blocks)

    @classmethod
    def dropping(cls, num_blocks: int, attention=(), mlp=()) -> "Plan":
        """`drop` at the attention (mlp) point of the blocks numbered in `attention` (`mlp`), else `full`."""
        return cls(tuple((DROP if i in attention else FULL, DROP if i in mlp else FULL) for i in range(num_blocks)))

    @classmethod
    def from_letters(cls, letters: str) -> "Plan":
        by_letter = {policy.letter: policy for policy in POLICIES.values()}
        try:
            return cls(tuple((by_letter[attention], by_letter[mlp]) for attention, mlp in letters.split()))
        except (KeyError, ValueError):
            raise SPDError(f"'{letters}' is not a plan; two letters of {', '.join(by_letter)} a block.") from None

    @classmethod
    def from_policies(cls, pairs: Iterable[tuple[str, str]]) -> "Plan":
        """From `[["drop", "full"], ...]`, the form of plan files."""
        return cls(tuple((_policy(attention), _policy(mlp)) for attention, mlp in pairs))

    def policies(self) -> list[list[str]]:
        return [[policy.name for policy in pair] for pair in self.blocks]

    def __str__(self) -> str:
        return " ".join(attention.letter + mlp.letter for attention, mlp in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def dropped(self, point: str = "attention") -> list[int]:
        """Numbers of the blocks whose `point` is dropped."""
        return [i for i, pair in enumerate(self.blocks) if pair[POINTS.index(point)] is DROP]

    def syncs(self) -> int:
        """All-reduces in one forward pass, with the flush that is due where the last point leaves something pending."""
        points = sum(policy is not DROP for pair in self.blocks for policy in pair)
        return points + bool(self.blocks and self.blocks[-1][1] is DROP)


def parse_blocks(spec: str, num_blocks: int) -> list[int]:
    """Block numbers of `none`, `all` or a list like `1,3,5-7` (from 0, ranges inclusive)."""
    if spec in ("none", "all"):
        return list(range(num_blocks)) if spec == "all" else []
    numbers = set()
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise SPDError(f"'{spec}' does not name blocks; use 'none', 'all' or numbers and ranges as in '1,3,5-7'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise SPDError(f"The range {part.strip()} in '{spec}' runs backwards.")
        numbers.update(range(first, last + 1))
    outside = sorted(n for n in numbers if n >= num_blocks)
    if outside:
        raise SPDError(f"Block {outside[0]} does not exist: the model has blocks 0 to {num_blocks - 1}.")
    return sorted(numbers)


class MadeFor(BaseModel, extra="allow"):
    """The model of a plan."""

    fingerprint: str
    name: str = "another model"


class PlanFile(BaseModel, extra="allow", strict=True):
    """What a plan file must hold, and where repaired weights lie; others may stand beside it, such as `classes`."""

    policies: list[tuple[str, str]]
    model: MadeFor
    tp: int
    changed: list[str] = []  # files beside it, one a block

    @property
    def plan(self) -> Plan:
        return Plan.from_policies(self.policies)


def read_plan(
    path: Path, fingerprint: str | None = None, tp: int | None = None, num_blocks: int | None = None
) -> PlanFile:
    """A plan file, or the one in the folder that `distill` made; only one made for this model, where that is given."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        found = PlanFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise SPDError(f"There is no plan at {path}.") from None
    except OSError as error:
        raise SPDError(f"The plan at {path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise SPDError(
            f"{path} is not a plan file, which has 'policies' (two a block), 'model.fingerprint' and 'tp': "
            f"{in_words(error)}."
        ) from None
    if num_blocks not in (None, len(found.plan)):
        raise SPDError(f"The plan at {path} has {len(found.plan)} blocks, the model {num_blocks}.")
    if tp not in (None, found.tp):
        raise SPDError(
            f"The plan at {path} was made for tp={found.tp}, not tp={tp}: sensitivities differ, make one anew."
        )
    if fingerprint not in (None, found.model.fingerprint):
        made_for = f"{found.model.name} ({found.model.fingerprint})"
        raise SPDError(f"The plan at {path} was made for {made_for}, and this model is {fingerprint}.")
    return found
