"""Processes: the group, devices, threads, copies of the model, what they tell the reader.

The only reader of environment variables; on GPUs memory is to have no holes, and NCCL to keep its last calls.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from spd.comm import Link, Shards
from spd.errors import SPDError, short
from spd.transport import PROCESS_GROUP, SHARED_MEMORY, ProcessGroup, SharedMemory

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Replicas:
    """Copies of the model, each on `each` consecutive processes, that divide independent work among themselves."""

    count: int = 1
    each: int = 1
    rank: int = 0  # this process's, among all

    def new_group(self) -> dist.ProcessGroup | None:
        """The processes of this one's copy; None where that is all of them. A collective: every process must call."""
        if self.count == 1:
            return None
        groups = [dist.new_group(range(n * self.each, (n + 1) * self.each)) for n in range(self.count)]
        return groups[self.rank // self.each]

    def share(self, items: list, work: Callable[[Any], Any]) -> list:
        """What `work` gives for each item, in their order, on every process; it is called for this copy's alone."""
        mine = [work(item) for item in items[self.rank // self.each :: self.count]]
        if self.count == 1:
            return mine
        results = [None] * len(items)
        for copy, part in enumerate(_gather(mine, self.count * self.each)[:: self.each]):
            results[copy :: self.count] = part
        return results


@dataclass(frozen=True)
class Runtime:
    """This process among `world`, and where it computes."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    memory: Path | None = None  # a folder that processes of one machine share memory through, instead of gloo

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def shards(self, tp: int, link: Link | None = None, replicas: Replicas | None = None) -> Shards:
        """Those of this process, where `replicas` copies of the model run (left out: one, on all processes)."""
        replicas = replicas or self.replicas(1)
        rank, transport = self.rank % replicas.each, None
        if replicas.each > 1 and self.memory is not None and replicas.count == 1:
            transport = SharedMemory(self.memory, rank, replicas.each)
        elif replicas.each > 1:
            transport = ProcessGroup(replicas.new_group())
        return Shards(tp, rank, replicas.each, transport, link)

    def replicas(self, count: int) -> Replicas:
        """`count` copies of the model, on equal parts of the processes."""
        if count < 1 or self.world % count:
            raise SPDError(
                f"{count} copies of the model need as many equal parts of the processes, which are {self.world}."
            )
        return Replicas(count, self.world // count, self.rank)

    def gather(self, thing: object) -> list:
        """What every process has, by rank."""
        return _gather(thing, self.world)


def _gather(thing: object, world: int) -> list:
    things = [thing] * world
    if world > 1:
        dist.all_gather_object(things, thing)
    return things


def environment_rank() -> int:
    """This process's rank as its launcher says, before anything is started."""
    return int(os.environ.get("RANK", "0"))


def nccl_settings() -> dict[str, str]:
    """Settings that decide how GPUs talk to each other."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "TORCH_"))}


def gpu_state() -> dict[str, Any] | None:
    """This process's peak of GPU memory (bytes), NCCL's version and the GPUs' topology; None where it uses no GPU."""
    if not torch.cuda.is_initialized():
        return None
    topology = None
    with suppress(OSError, subprocess.SubprocessError):
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "topology": topology,
    }


def environment(**defaults: str) -> dict[str, str]:
    """That of a process to start: this one's, with `defaults` where it says nothing, and with this very package."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return defaults | os.environ | {"PYTHONPATH": path}


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spd")


def tracking_uri() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI") or None


@contextmanager
def runtime(device: str = "cpu") -> Iterator[Runtime]:
    """Joins the processes that torchrun or accelerate started, if any; leaves their group at the end.

    Raises SPDError where a collective fails as another process has ended, which says itself why.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), environment_rank()
    if world == 1:
        yield Runtime(device=_device(device, 0))
        return
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    backend, where = ("nccl", torch.device(chosen)) if device == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=where)
    try:
        yield Runtime(rank, world, chosen)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise SPDError(f"Another process of this run ended or went silent ({short(str(error))}).") from error
    dist.destroy_process_group()  # on a clean end alone: NCCL would wait here for processes that never come


def leave(code: int) -> NoReturn:
    """Ends this process: at once where a group was left in the middle, as its own end would wait for the others."""
    if dist.is_initialized():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _device(device: str, local_rank: int) -> str:
    if device == "cpu":
        return device
    os.environ |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "2000"} | os.environ
    found = torch.cuda.device_count()
    if found <= local_rank:
        raise SPDError(f"Process {local_rank} of this machine needs a GPU of its own, and {found} are visible.")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def spawn(processes: int, function: Callable, *arguments, transport: str = PROCESS_GROUP) -> dict:
    """Runs `function(runtime, *arguments)` in `processes` processes of this machine; gives rank 0's result.

    They are a gloo group; if `transport` is shared-memory, their shards' collectives go through memory. The cores are
    shared out evenly. `function` must be importable, its arguments picklable and its result a JSON document. A
    mistake that it raises is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (folder, processes, transport, function, arguments)
        try:
            mp.start_processes(_enter, work, nprocs=processes, start_method="spawn")
        except mp.ProcessExitedException as error:
            raise SPDError(f"Process {error.error_index} of {processes} ended unexpectedly: {error}.") from error
        except mp.ProcessRaisedException:
            mistake = Path(folder, "mistake")
            if mistake.exists():
                raise SPDError(mistake.read_text()) from None
            raise
        return json.loads(Path(folder, "result").read_text())


def _enter(rank: int, folder: str, world: int, transport: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(max(1, cores() // world))
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # the machine's own name need not resolve
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        memory = Path(folder) if transport == SHARED_MEMORY else None
        result = function(Runtime(rank, world, memory=memory), *arguments)
        if rank == 0:
            Path(folder, "result").write_text(json.dumps(result))
    except SPDError as error:
        Path(folder, "mistake").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def say(message: str) -> None:
    """A line for the reader, on stderr: stdout belongs to the result."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def bar(total: int, unit: str, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of `total` units; gives the function to call with the number of units done, and values to show."""
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    with tqdm(total=total, unit=f" {unit}", disable=not shown, mininterval=every, dynamic_ncols=True) as display:

        def progress(units: int, **values: float) -> None:
            if values:
                display.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            display.update(units)

        yield progress
