"""How tensors get from process to process: through torch's process groups, or through memory that processes share.

And in how many bytes: whole, or in a few bits a value.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

PROCESS_GROUP, SHARED_MEMORY = TRANSPORTS = ("process-group", "shared-memory")


class Transport(Protocol):
    """Collectives that all processes of a model take part in, in the same order. Tensors are contiguous."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the processes, in place."""

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """The part of every process, all of one shape, by rank."""

    def exchange(self, parts: Tensor) -> Tensor:
        """Of everyone's `parts` (world, ...), [i] meant for process i, those for this one: (world, ...), by rank."""

    def barrier(self) -> None: ...


@dataclass(frozen=True)
class ProcessGroup:
    """Gloo on CPUs, NCCL on GPUs."""

    group: dist.ProcessGroup | None = None  # None: all processes

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def all_gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part, group=self.group)
        return parts

    def exchange(self, parts: Tensor) -> Tensor:
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received

    def barrier(self) -> None:
        dist.barrier(self.group)


class SharedMemory:
    """Processes of one machine that write where all can read, and watch each other's counters until all have written.

    Gloo's processes sleep while they wait and are woken by messages: a millisecond or two an all-reduce on small
    machines, whatever its size, and never twice the same. Nobody sleeps here, so every process wants a core.
    """

    def __init__(self, folder: Path, rank: int, world: int):
        """`folder` is empty and the same for all."""
        self.folder, self.rank, self.world = folder, rank, world
        self.capacity = 0  # bytes of a process's contribution

    @staticmethod
    def works_here() -> bool:
        """On processors that show one core's writes to the others in the order in which they were made."""
        return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "sched_yield")

    def all_reduce(self, tensor: Tensor) -> None:
        torch.sum(self._exchange(tensor), 0, out=tensor.view(-1))

    def all_gather(self, part: Tensor) -> list[Tensor]:
        return [one.clone().view_as(part) for one in self._exchange(part)]

    def exchange(self, parts: Tensor) -> Tensor:
        return self._exchange(parts).view(-1, *parts.shape)[:, self.rank].clone()

    def barrier(self) -> None:
        self._exchange(torch.zeros(1))

    def _exchange(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor, (world, elements), until the next exchange but one."""
        size = tensor.numel() * tensor.element_size()
        if size > self.capacity:
            self._grow(size)
        self.turn += 1
        # Two areas in turn: nobody is two exchanges ahead of another, so what is still being read is left alone.
        written = self.areas[self.turn % 2, :, :size].view(tensor.dtype)
        written[self.rank] = tensor.view(-1)
        self.turns[self.rank, 0] = self.turn
        for others in self.turns:
            while others[0] < self.turn:
                os.sched_yield()
        return written

    def _grow(self, size: int) -> None:
        """Other memory for contributions of `size` bytes; all processes do it at the same exchange."""
        self.capacity, self.turn = 1 << max(12, (size - 1).bit_length()), 0
        counters = self.world * 64  # a cache line each
        whole = counters + 2 * self.world * self.capacity
        path = self.folder / str(self.capacity)
        memory = torch.from_file(str(path), shared=True, size=whole, dtype=torch.uint8)
        self.turns = memory[:counters].view(torch.int64).view(self.world, 8).numpy()
        self.areas = memory[counters:].view(2, self.world, self.capacity)


# ---------------------------------------------------------------- few bits

BLOCK = 32  # values along hidden that share a scale in float16
FIELDS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # a code's bits in parts, of each of which whole numbers fill a byte
TOGETHER = 8  # codes are packed so many at a time: those of any number of bits then fill bytes


def packed_bytes(size: int, bits: int) -> int:
    """Bytes that `size` values take, scales included."""
    return -(-size // TOGETHER) * bits + 2 * -(-size // BLOCK)


class Rounded(NamedTuple):
    """Values (..., n), each rounded to the nearest of 2^bits - 1 numbers, evenly spaced around zero, of its block."""

    steps: Tensor  # (..., n) int8: how many of its block's scales
    scales: Tensor  # (..., ceil(n / 32)) float16: a step of each block, max|x| / (2^(bits - 1) - 1)
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> Self:
        """A block that is zero, or so small that float16 has no scale for it, rounds to zero."""
        most, blocks = 2 ** (bits - 1) - 1, _in_blocks(x).float()
        scales = (blocks.abs().amax(-1) / most).clamp(max=torch.finfo(torch.float16).max).half()
        divisors = scales.float().masked_fill(scales == 0, torch.inf)
        steps = (blocks / divisors[..., None]).round_().clamp_(-most, most).to(torch.int8)
        return cls(steps.flatten(-2)[..., : x.shape[-1]], scales, bits)

    def values(self) -> Tensor:
        """(..., n) in float32."""
        found = _in_blocks(self.steps).float().mul_(self.scales.float()[..., None])
        return found.flatten(-2)[..., : self.steps.shape[-1]]

    def pack(self) -> Tensor:
        """(..., `packed_bytes`) uint8: codes, which are steps above the least, then scales."""
        codes, parts, taken = _filled(self.steps, TOGETHER) + (2 ** (self.bits - 1) - 1), [], 0
        for width in FIELDS[self.bits]:
            first, *others = (codes.view(torch.uint8) >> taken & (2**width - 1)).chunk(8 // width, dim=-1)
            for place, other in enumerate(others, 1):
                first |= other << width * place
            parts.append(first)
            taken += width
        return torch.cat((*parts, self.scales.contiguous().view(torch.uint8)), dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor, size: int, bits: int) -> Self:
        """What `pack` gave, of `size` values each."""
        together = -(-size // TOGETHER)
        *parts, scales = packed.split([*(together * width for width in FIELDS[bits]), 2 * -(-size // BLOCK)], dim=-1)
        codes, taken = 0, 0
        for width, part in zip(FIELDS[bits], parts, strict=True):
            found = torch.cat([part >> place & (2**width - 1) for place in range(0, 8, width)], dim=-1)
            codes, taken = codes | found << taken, taken + width
        steps = codes.sub_(2 ** (bits - 1) - 1).view(torch.int8)
        return cls(steps[..., :size], scales.contiguous().view(torch.float16), bits)


def _filled(x: Tensor, size: int) -> Tensor:
    """With zeros at the end of its last dimension, so that `size` divides it; not copied where it does."""
    return F.pad(x, (0, -x.shape[-1] % size)) if x.shape[-1] % size else x


def _in_blocks(x: Tensor) -> Tensor:
    """(..., n) as (..., ceil(n / 32), 32)."""
    return _filled(x, BLOCK).unflatten(-1, (-1, BLOCK))
