"""A plan is data: one policy for each of the two sync points of every block."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from spd.errors import SPDError, one_of

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
            return cls(tuple((by_letter[pair[0]], by_letter[pair[1]]) for pair in letters.split()))
        except (KeyError, IndexError):
            raise SPDError(f"'{letters}' is not a plan; two letters of {', '.join(by_letter)} a block.") from None

    @classmethod
    def from_policies(cls, pairs: list) -> "Plan":
        """From `[["drop", "full"], ...]`, the form of plan files."""
        try:
            named = (tuple(one_of("policy", name, POLICIES) for name in (attention, mlp)) for attention, mlp in pairs)
            return cls(tuple((POLICIES[attention], POLICIES[mlp]) for attention, mlp in named))
        except (TypeError, ValueError):
            raise SPDError("A plan needs two policies a block, attention and mlp.") from None

    def policies(self) -> list[list[str]]:
        return [[policy.name for policy in pair] for pair in self.blocks]

    def __str__(self) -> str:
        return " ".join(attention.letter + mlp.letter for attention, mlp in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def dropped(self, point: str = "attention") -> list[int]:
        """Numbers of the blocks whose `point` is dropped."""
        return [i for i, pair in enumerate(self.blocks) if pair[POINTS.index(point)] is DROP]

    def pending_at_end(self) -> bool:
        """Whether something is still pending after the last block, so that a flush is due."""
        return bool(self.blocks) and self.blocks[-1][1] is DROP

    def syncs(self) -> int:
        """All-reduces in one forward pass, the last flush included."""
        points = sum(policy is not DROP for pair in self.blocks for policy in pair)
        return points + self.pending_at_end()

    def sync_bytes(self, tokens: int, hidden_size: int, element_size: int) -> int:
        """Payload of those all-reduces, bytes, for `tokens` = B x T."""
        return self.syncs() * tokens * hidden_size * element_size


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


class PlanFile(BaseModel, extra="allow"):
    """What a plan file must hold; others may stand beside it, such as `classes` or `changed` (repaired weights)."""

    policies: list
    model: MadeFor
    tp: int

    @classmethod
    def read(cls, path: Path) -> "PlanFile":
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise SPDError(f"There is no plan at {path}.") from None
        except OSError as error:
            raise SPDError(f"The plan at {path} cannot be read ({error.strerror}).") from error
        except ValidationError:
            raise SPDError(f"{path} is not a plan file: it needs 'policies', 'model.fingerprint' and 'tp'.") from None


def plan_file(path: Path) -> Path:
    """The plan file that a path means: itself, or the one in a folder."""
    return path / "plan.json" if path.is_dir() else path


def degree(path: Path) -> int:
    """The tp that the plan at `path` was made for."""
    return PlanFile.read(plan_file(path)).tp


def read_plan(path: Path, fingerprint: str, tp: int, num_blocks: int) -> Plan:
    """The plan in a file (or in the folder that `distill` made), for this model and degree only."""
    return Plan.from_policies(read_plan_document(path, fingerprint, tp, num_blocks)["policies"])


def read_plan_document(path: Path, fingerprint: str, tp: int, num_blocks: int) -> dict:
    """All that a plan file holds; a mistake where it was made for another model, tp or number of blocks."""
    path = plan_file(path)
    found = PlanFile.read(path)
    blocks, made_for = len(Plan.from_policies(found.policies)), found.model
    if blocks != num_blocks:
        raise SPDError(f"The plan at {path} has {blocks} blocks, the model {num_blocks}.")
    if found.tp != tp:
        raise SPDError(
            f"The plan at {path} was made for tp={found.tp}, not tp={tp}: sensitivities differ, make one anew."
        )
    if made_for.fingerprint != fingerprint:
        raise SPDError(
            f"The plan at {path} was made for {made_for.name} ({made_for.fingerprint}), "
            f"and this model is {fingerprint}."
        )
    return found.model_dump(exclude_unset=True)
