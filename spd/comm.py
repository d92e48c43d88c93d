"""The shards a process hosts, and what a sync point does between them.

`tp` logical shards fix the numbers; `world` processes host `k = tp / world` of them each, in lock-step. A sync
sums over the hosted shards first and then, in one collective, over the processes.

Gradients. Every process computes the same loss from its own copy of whatever is replicated. Read as one function of
all those copies, the objective is the mean over processes of that loss, and an all-reduce is a plain sum, so that its
backward is the same sum over the gradients: a dropped sync point costs nothing backward either. What is left to do
after `backward` is to scale by 1 / world and, for replicated parameters, to add up the copies' gradients:
`Shards.reduce_gradients`. (Megatron's pair of identities and sums gives the same numbers, but needs a mark at
every place where something replicated meets something sharded, norm weights included.)
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from spd.errors import SPDError
from spd.plan import DROP, FULL, Policy
from spd.transport import Rounded, Transport, packed_bytes

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Link:
    """The slowest hop of a ring: bytes a second, and seconds of latency of one all-reduce."""

    bandwidth: float
    latency: float
    spec: str = ""

    @classmethod
    def parse(cls, spec: str) -> "Link":
        """From `10GBps,20us` (bytes a second) or `25Gbit,20us` (bits a second)."""
        number = r"(\d+(?:\.\d+)?)"
        match = re.fullmatch(rf"{number}\s*([KMGT]?)(Bps|bit)\s*,\s*{number}\s*(ns|us|ms|s)", spec.strip())
        if not match or float(match[1]) == 0:
            raise SPDError(f"'{spec}' is not a link; the form is BANDWIDTH,LATENCY as in '10GBps,20us'.")
        unit = _UNITS[match[2]] / (8 if match[3] == "bit" else 1)
        return cls(float(match[1]) * unit, float(match[4]) * _SECONDS[match[5]], spec.strip())

    def all_reduce_seconds(self, payload: float, participants: int) -> float:
        """Ring all-reduce of `payload` bytes: latency + 2 (n-1)/n payload / bandwidth; none among one."""
        if participants == 1:
            return 0.0
        return self.latency + 2 * (participants - 1) / participants * payload / self.bandwidth


@dataclass
class Collective:
    """What the collectives of one sync point have cost so far."""

    count: int = 0
    bytes: int = 0
    real_seconds: float | None = None  # None where none was timed: a GPU's is only launched here, see `Shards.events`
    emulated_seconds: float = 0.0


@dataclass
class Stream:
    """The residual stream, in parts.

    `x` (B, T, D) is synchronised: equal on every shard. `pending` (S, B, T, D) is what each hosted shard has
    produced and not yet shared, or None where nothing is. `shared` (S, B, T, D), or None, is what its group of `group`
    consecutive shards has shared inside and not yet with others: equal in a group.
    """

    x: torch.Tensor
    pending: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    group: int = 1

    def read(self) -> torch.Tensor:
        """What the shards' next sublayer sees: (S, B, T, D), or (1, B, T, D) where all see the same."""
        seen = self.x[None] if self.shared is None else self.x + self.shared
        return seen if self.pending is None else seen + self.pending

    def produce(self, partial: torch.Tensor, bias: torch.Tensor | None) -> "Stream":
        """Adds the shards' partial outputs (S, B, T, D) to the pending part, and a bias (D,) to `x`, once."""
        x = self.x if bias is None else self.x + bias
        return replace(self, x=x, pending=partial if self.pending is None else self.pending + partial)

    def owed(self) -> torch.Tensor | None:
        """What each shard has for all others (S, B, T, D): its pending part, and its share of its group's."""
        if self.shared is None:
            return self.pending
        share = self.shared / self.group
        return share if self.pending is None else self.pending + share

    def last(self) -> "Stream":
        """That of the last tokens (T is 1)."""
        x, *others = (part if part is None else part[..., -1:, :] for part in (self.x, self.pending, self.shared))
        return Stream(x, *others, self.group)


@dataclass
class Shards:
    """The `k` shards hosted by process `rank` of `world`, with the collectives that join them all.

    `silent` leaves the collectives out: the numbers are then wrong, which is what a bound on latency wants.
    """

    tp: int = 1
    rank: int = 0
    world: int = 1
    transport: Transport | None = None  # among the processes, where there are several
    link: Link | None = None
    silent: bool = False
    collectives: dict[str, Collective] = field(default_factory=lambda: defaultdict(Collective))
    events: list[tuple] | None = None  # a list takes, of each collective on a GPU, its point and events round it

    def __post_init__(self):
        if self.tp % self.world:
            raise SPDError(f"tp={self.tp} is not a multiple of the {self.world} processes that share it.")

    @property
    def k(self) -> int:
        return self.tp // self.world

    @property
    def hosted(self) -> range:
        """Numbers of the logical shards hosted here."""
        return range(self.rank * self.k, (self.rank + 1) * self.k)

    def sync(self, stream: Stream, policy: Policy, point: str) -> Stream:
        """Moves the pending part on as `policy` says; `point` names the sync point in the count."""
        owed = stream.owed()
        if policy == DROP or owed is None:
            return stream
        if policy.group:
            if stream.pending is None:
                return stream
            inside = _GroupSum.apply(stream.pending, self, policy.group, f"{point} group")
            return Stream(stream.x, None, inside if stream.shared is None else stream.shared + inside, policy.group)
        if policy.bits and not self.silent:
            total, errors = _RoundedSum.apply(owed, self, policy.bits, point)
            return Stream(stream.x + total, None if policy.plain else errors)
        return Stream(stream.x + self.all_reduce(owed[0] if self.k == 1 else owed.sum(0), point))

    def flush(self, stream: Stream) -> Stream:
        """Synchronises whatever is still pending after the last block."""
        return self.sync(stream, FULL, "flush")

    def all_reduce(self, tensor: torch.Tensor, point: str) -> torch.Tensor:
        """Sum of `tensor` over the processes; counted and timed on the CPU's clock.

        In place where it can be, and where gradients flow through it never; their own sum is counted as
        `POINT backward`.
        """
        if torch.is_grad_enabled() and tensor.requires_grad:
            return _Sum.apply(tensor, self, point)
        return self._all_reduce(tensor, point)

    def reduce_gradients(self, replicated: Iterable[nn.Parameter], sharded: Iterable[nn.Parameter]) -> None:
        """After `backward` of a loss that all processes computed alike: the gradients of that one loss, in place.

        Sharded parameters are scaled by 1 / world; replicated ones get the mean over processes, equal on each.
        """
        if self.world == 1:
            return
        for parameter in sharded:
            if parameter.grad is not None:
                parameter.grad /= self.world
        copies = [p.grad for p in replicated if p.grad is not None]
        if copies:
            flat = torch.cat([grad.flatten() for grad in copies])
            mean = self._all_reduce(flat, "gradients") / self.world
            for grad, part in zip(copies, mean.split([g.numel() for g in copies]), strict=True):
                grad.copy_(part.view_as(grad))

    def _all_reduce(self, tensor: torch.Tensor, point: str) -> torch.Tensor:
        if self.silent:
            return tensor
        tensor = tensor.contiguous()  # a process group reads memory as it lies
        payload = tensor.numel() * tensor.element_size()
        with self._counted(point, payload, self._emulated(payload), tensor.is_cuda):
            if self.world > 1:
                self.transport.all_reduce(tensor)
        return tensor

    def rounded_sum(self, owed: torch.Tensor, bits: int, point: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum (B, T, D) over all shards of what each owes (S, B, T, D), in few bits; and what rounding took of each.

        Every shard rounds what it owes and sends its j-th slice along hidden to shard j, which owns it: adds up in
        float32, rounds the sum, keeps what that took for its own, and sends it to all.
        """
        size, mine = owed.shape[-1], slice(self.hosted.start, self.hosted.stop)
        width, tokens = -(-size // self.tp), owed[0, ..., 0].numel()
        slices = F.pad(owed, (0, self.tp * width - size)).unflatten(-1, (self.tp, width)).movedim(-2, 0)
        # Half the bytes and half the latency each, so that both together compare with one all-reduce.
        payload = tokens * self.tp * packed_bytes(width, bits)
        half = point, -(-payload // 2), self._emulated(payload) / 2, owed.is_cuda
        first = Rounded.of(slices, bits)  # (tp, S, B, T, width): by owner, and by who sends it
        sent = first.values()
        with self._counted(*half):
            received = sent if self.world == 1 else self._to_owners(first)
        sums = received.sum(1)  # (S, B, T, width), of the hosted owners
        second = Rounded.of(sums, bits)
        again = second.values()
        with self._counted(*half):
            total = again if self.world == 1 else self._to_all(second)
        errors = torch.sub(slices, sent, out=sent)
        errors[mine].diagonal().add_((sums - again).movedim(0, -1))
        total, errors = (part.movedim(0, -2).flatten(-2)[..., :size].to(owed.dtype) for part in (total, errors))
        return total, errors

    def _to_owners(self, slices: Rounded) -> torch.Tensor:
        """Values (S, tp, B, T, width) of the slices owned here from those of all (tp, S, B, T, width), sent packed."""
        packed = slices.pack().unflatten(0, (self.world, self.k)).contiguous()
        received = self.transport.exchange(packed).movedim(1, 0).flatten(1, 2)
        return Rounded.unpack(received, slices.steps.shape[-1], slices.bits).values()

    def _to_all(self, owned: Rounded) -> torch.Tensor:
        """Values (tp, B, T, width) of all slices from the owned ones (S, B, T, width), sent packed."""
        packed = torch.cat(self.transport.all_gather(owned.pack()))
        return Rounded.unpack(packed, owned.steps.shape[-1], owned.bits).values()

    def group_sum(self, tensor: torch.Tensor, size: int, point: str) -> torch.Tensor:
        """Sums (S, B, T, D) inside groups of `size` consecutive shards, for each of the shards hosted here.

        Nothing crosses the link, which lies between groups.
        """
        inside, payload = self.k % size == 0, tensor[0].numel() * tensor.element_size()
        with self._counted(point, payload, 0.0, tensor.is_cuda):
            parts = tensor if inside else self.gather(tensor)
        sums = parts.unflatten(0, (-1, size)).sum(1).repeat_interleave(size, 0)
        return sums if inside else sums[self.hosted.start : self.hosted.stop]

    def _emulated(self, payload: float) -> float:
        """Seconds that the link, where there is one, would take to reduce so many bytes."""
        return 0.0 if self.link is None else self.link.all_reduce_seconds(payload, self.tp)

    @contextmanager
    def _counted(self, point: str, payload: int, emulated: float, on_gpu: bool) -> Iterator[None]:
        """Counts and times one collective; waits after it as long as a link would take."""
        events = self.events if on_gpu else None
        marks = [] if events is None else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        if marks:
            marks[0].record()
        yield
        if marks:
            marks[1].record()
            events.append((point, *marks))
        reached = time.perf_counter()
        while time.perf_counter() < reached + emulated:  # a sleep would take 100 us at the least
            pass
        spent = self.collectives[point]
        spent.count += 1
        spent.bytes += payload
        if not on_gpu:
            spent.real_seconds = (spent.real_seconds or 0.0) + reached - start
            spent.emulated_seconds += time.perf_counter() - reached

    def width_of(self, size: int) -> int:
        """How many of `size` things each process takes; there may not be so many left for the last ones."""
        return -(-size // self.world)

    def part_of(self, size: int) -> slice:
        """This process's part of `size` things."""
        width = self.width_of(size)
        return slice(self.rank * width, (self.rank + 1) * width)

    def join(self, part: torch.Tensor, size: int, point: str) -> torch.Tensor:
        """The last dimension, `size` long, from the `part_of` it that each process has; counted, without gradients.

        `silent` puts this process's own part in the others' places.
        """
        if self.world == 1:
            return part
        mine = F.pad(part, (0, self.width_of(size) - part.shape[-1]))
        parts = [mine] * self.world
        if not self.silent:
            payload = size * mine[..., 0].numel() * mine.element_size()
            with self._counted(
                point, payload, self._emulated(payload / 2), part.is_cuda
            ):  # gathered bytes go round a ring once
                parts = self.transport.all_gather(mine)
        return torch.cat(parts, dim=-1)[..., :size]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What all shards hold, (tp, ...), from the (k, ...) of every process; uncounted, for offline work."""
        if self.world == 1:
            return tensor
        return torch.cat(self.transport.all_gather(tensor.contiguous()))

    def agreed(self, decision: torch.Tensor) -> torch.Tensor:
        """What process 0 decided, on every process, lest rounding part them; uncounted, for offline work."""
        return decision if self.world == 1 else self.transport.all_gather(decision.contiguous())[0]

    def align(self) -> None:
        """Waits until every process is here, uncounted; where one alone stands for all of them, there is no wait."""
        if self.transport is not None:
            self.transport.barrier()

    def take_collectives(self) -> dict[str, Collective]:
        """What each sync point has cost since the last call, by its name; counting starts afresh."""
        taken, self.collectives = self.collectives, defaultdict(Collective)
        return dict(taken)


class _Sum(torch.autograd.Function):
    """The all-reduce for autograd: forward sums over the processes, and so does backward."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, shards: Shards, point: str) -> torch.Tensor:
        ctx.shards, ctx.point = shards, point
        return shards._all_reduce(tensor.clone(), point)  # a clone: others may still need the shards' own parts

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return ctx.shards._all_reduce(grad.clone(), f"{ctx.point} backward"), None, None


class _RoundedSum(torch.autograd.Function):
    """`Shards.rounded_sum` for autograd, straight through: backward is that of the sum of whole values."""

    @staticmethod
    def forward(ctx, owed: torch.Tensor, shards: Shards, bits: int, point: str):
        ctx.shards, ctx.point = shards, point
        total, errors = shards.rounded_sum(owed, bits, point)
        ctx.mark_non_differentiable(errors)
        return total, errors

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _):
        summed = ctx.shards._all_reduce(grad.clone(), f"{ctx.point} backward")
        return summed.expand(ctx.shards.k, *grad.shape), None, None, None


class _GroupSum(torch.autograd.Function):
    """`Shards.group_sum` for autograd, which is its own backward."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, shards: Shards, size: int, point: str) -> torch.Tensor:
        ctx.shards, ctx.size, ctx.point = shards, size, point
        return shards.group_sum(tensor.contiguous(), size, point)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return ctx.shards.group_sum(grad.contiguous(), ctx.size, f"{ctx.point} backward"), None, None, None
