"""A plan is data: one policy for each of the two sync points of every block."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from spd.errors import SPDError, one_of
from spd.records import parsed
from spd.transport import FIELDS, packed_bytes

POINTS = ("attention", "mlp")  # the sync points of a block, in the order they are reached


@dataclass(frozen=True)
class Policy:
    """What a sync point does with the pending part of the residual stream.

    `full` shares everything pending, `drop` nothing. With `bits` it is sent rounded to so many bits a value, and what
    rounding took stays pending, or is lost (`plain`). With `group` it is shared inside groups of so many consecutive
    shards. A policy is a line here, and a branch of `Shards.sync`.
    """

    name: str
    letter: str
    bits: int | None = None
    plain: bool = False
    group: int | None = None


FULL = Policy("full", "F")
DROP = Policy("drop", "D")
GROUP = Policy("group", "G")  # of a size that stands beside the policies of a plan
KEPT = {bits: Policy(f"int{bits}", str(bits), bits) for bits in FIELDS}
PLAIN = {
    bits: Policy(f"int{bits}-plain", letter, bits, plain=True) for bits, letter in zip(FIELDS, "hftw", strict=True)
}
TP_BLOCK, SPD_BLOCK = (FULL, FULL), (DROP, FULL)  # Megatron's block, and the paper's
POLICIES = {policy.name: policy for policy in (FULL, DROP, *KEPT.values(), *PLAIN.values(), GROUP)}


@dataclass(frozen=True)
class Stretch:
    """Sublayers from where everything is synchronised to where it is next, each with the policy of the sync after it.

    Sublayer 2 i is block i's attention, 2 i + 1 its MLP.
    """

    first: int
    policies: tuple[Policy, ...]

    @property
    def stop(self) -> int:
        return self.first + len(self.policies)

    @property
    def end(self) -> int:
        """Where all that the policies change has been read: what is sent in few bits, by one sublayer more."""
        return self.stop + bool(self.policies[-1].bits)

    @property
    def blocks(self) -> range:
        """Those that the sublayers up to the end are of."""
        return range(self.first // 2, (self.end + 1) // 2)

    @property
    def drops_attention(self) -> bool:
        """The paper's case: one block, whose MLP's sync sends what attention's did not."""
        return self.first % 2 == 0 and len(self.policies) == 2 and self.policies[0] == DROP


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
    def from_letters(cls, letters: str, group: int | None = None) -> "Plan":
        by_letter = {policy.letter: policy for policy in POLICIES.values()}
        try:
            blocks = tuple((by_letter[attention], by_letter[mlp]) for attention, mlp in letters.split())
        except (KeyError, ValueError):
            raise SPDError(f"'{letters}' is not a plan; two letters of {', '.join(by_letter)} a block.") from None
        return cls(blocks)._grouped(group)

    @classmethod
    def from_policies(cls, pairs: Iterable[tuple[str, str]], group: int | None = None) -> "Plan":
        """From `[["drop", "full"], ...]`, the form of plan files."""
        named = (tuple(POLICIES[one_of("policy", name, POLICIES)] for name in pair) for pair in pairs)
        return cls(tuple(named))._grouped(group)

    @classmethod
    def from_document(cls, document: dict) -> "Plan":
        """Of `policies` and, where some are node-local, `group`."""
        return cls.from_policies(document["policies"], document.get("group"))

    def document(self) -> dict:
        return {"policies": self.policies()} | ({} if self.group is None else {"group": self.group})

    def policies(self) -> list[list[str]]:
        return [[policy.name for policy in pair] for pair in self.blocks]

    def replaced(self, policies: dict[Policy, Policy]) -> "Plan":
        """With other policies in the place of some; what is `full` at the very end stays so."""
        blocks = [tuple(policies.get(policy, policy) for policy in pair) for pair in self.blocks]
        if self.blocks and self.blocks[-1][1] == FULL:
            blocks[-1] = (blocks[-1][0], FULL)
        return Plan(tuple(blocks))

    def sending(self, bits: int | None = None, plain: int | None = None, group: int | None = None) -> "Plan":
        """Where it is `full`, few bits instead, kept or `plain`; where it drops, node-local in groups of so many."""
        if bits and plain:
            raise SPDError("What rounding takes is either kept (--bits) or lost (--bits-plain): give one of them.")
        rounded = KEPT[bits] if bits else PLAIN[plain] if plain else FULL
        return self.replaced({FULL: rounded} | ({DROP: replace(GROUP, group=group)} if group else {}))

    def whole(self) -> "Plan":
        """With whole values where it sends few bits."""
        return self.replaced(dict.fromkeys((*KEPT.values(), *PLAIN.values()), FULL))

    def _grouped(self, size: int | None) -> "Plan":
        if size is None and any(policy == GROUP for pair in self.blocks for policy in pair):
            raise SPDError(f"The plan {self} has node-local sync points; how many shards a group has must be said.")
        return self if size is None else self.replaced({GROUP: replace(GROUP, group=size)})

    def stretches(self) -> list[Stretch]:
        """Those on which not all is sent whole; the last point counts as full, as what it leaves is flushed."""
        found, since, policies = [], [], [policy for pair in self.blocks for policy in pair]
        policies[-1:] = [FULL]
        for n, policy in enumerate(policies):
            since.append(policy)
            if policy.letter not in "DG":
                found += [Stretch(n + 1 - len(since), tuple(since))] if since != [FULL] else []
                since = []
        return found

    @property
    def group(self) -> int | None:
        """Shards in a group, where some policy is node-local."""
        return next((policy.group for pair in self.blocks for policy in pair if policy.group), None)

    def check_groups(self, tp: int) -> None:
        """Raises SPDError where so many shards are no whole number of groups."""
        if self.group is not None and (self.group < 1 or tp % self.group):
            raise SPDError(f"tp={tp} shards cannot be divided into groups of {self.group}; give a divisor of {tp}.")

    def __str__(self) -> str:
        return " ".join(attention.letter + mlp.letter for attention, mlp in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def dropped(self, point: str = "attention") -> list[int]:
        """Numbers of the blocks whose `point` sends nothing between groups."""
        return [i for i, pair in enumerate(self.blocks) if pair[POINTS.index(point)].letter in "DG"]

    def shares_cache(self, other: "Plan") -> bool:
        """Whether keys and values that one plan computed are those that the other would have.

        A block's are of the stream that its attention reads: every policy before the last block counts, none in it.
        """
        return self.blocks[:-1] == other.blocks[:-1]

    def syncs(self) -> int:
        """All-reduces of whole values in a forward pass, with the flush due where the last point keeps some pending."""
        last = self.blocks[-1][1] if self.blocks else FULL
        return sum(policy == FULL for pair in self.blocks for policy in pair) + (last != FULL and not last.plain)

    def bytes_share(self, size: int, tp: int) -> float:
        """Of what all sync points send together when all are `full`, values (`size` a token) in 16 bits."""
        return (2 * size * self.syncs() + sum(self.rounded(size, tp))) / (2 * size * 2 * len(self))

    def rounded(self, size: int, tp: int) -> list[int]:
        """Bytes a token of each sync point that sends few bits, of `size` values in a slice for each shard."""
        every = [policy.bits for pair in self.blocks for policy in pair if policy.bits]
        return [tp * packed_bytes(-(-size // tp), bits) for bits in every]


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
    group: int | None = None  # shards in a group, where some policy is node-local
    model: MadeFor
    tp: int
    changed: list[str] = []  # files beside it, one a block

    @property
    def plan(self) -> Plan:
        return Plan.from_policies(self.policies, self.group)


def read_plan(
    path: Path, fingerprint: str | None = None, tp: int | None = None, num_blocks: int | None = None
) -> PlanFile:
    """A plan file, or the one in the folder that `distill` made; only one made for this model, where that is given."""
    path = path / "plan.json" if path.is_dir() else path
    wrong = "is not a plan file, which has 'policies' (two a block), 'model.fingerprint' and 'tp'"
    found = parsed(path, PlanFile, wrong, f"There is no plan at {path}.")
    if num_blocks not in (None, len(found.plan)):
        raise SPDError(f"The plan at {path} has {len(found.plan)} blocks, the model {num_blocks}.")
    found.plan.check_groups(found.tp)
    if tp not in (None, found.tp):
        raise SPDError(
            f"The plan at {path} was made for tp={found.tp}, not tp={tp}: sensitivities differ, make one anew."
        )
    if fingerprint not in (None, found.model.fingerprint):
        made_for = f"{found.model.name} ({found.model.fingerprint})"
        raise SPDError(f"The plan at {path} was made for {made_for}, and this model is {fingerprint}.")
    return found
