"""How tensors get from process to process: through torch's process groups, or through memory that processes share."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

PROCESS_GROUP, SHARED_MEMORY = TRANSPORTS = ("process-group", "shared-memory")


class Transport(Protocol):
    """Collectives that all processes of a model take part in, in the same order. Tensors are contiguous."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the processes, in place."""

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """The part of every process, all of one shape, by rank."""

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
