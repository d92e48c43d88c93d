"""Repaired weights on disk: one safetensors file a block, written when its repair ends and listed in `plan.json`.

Only tensors that a repair changed are kept, under their name in `Transformer`, all tp shards stacked where each has
its own: (tp, ...). The layout does not depend on the number of processes.
"""

import errno
import fcntl
import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import torch
from pydantic import BaseModel, Field, FiniteFloat
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd.checkpoint import load_changed
from spd.comm import Shards
from spd.errors import SPDError, reading
from spd.model import Transformer
from spd.plan import POINTS
from spd.records import T, inside, parsed, write_json, write_whole

PROGRESS, PLAN = "progress.json", "plan.json"  # the latter, with the result in it, is there when all else is
BLOCKS = "blocks"  # folder of the blocks' files


class State(BaseModel, strict=True, extra="allow"):
    """What of `progress.json`, or of the `plan.json` of an ended repair, is relied upon."""

    arguments: dict = {}
    seconds: FiniteFloat = 0.0
    stages: dict[str, dict] = {}
    files: dict[str, str] = {}
    epoch: int | None = None
    changed: list[Annotated[str, Field(pattern=r"^blocks/\d+\.\d+\.safetensors$")]] = []
    result: dict | None = None


class Repairs:
    """The output folder of a repair: what is finished there, and finishing more.

    A block is finished when `progress.json`, replaced whole, names its file; whatever else lies there is ignored. All
    processes read, the main one writes.
    """

    def __init__(self, folder: Path, arguments: dict, is_main: bool, shards: Shards):
        """Raises SPDError where the folder holds the work of other `arguments`, or another process is at work there."""
        self.lock = claim(folder) if is_main and not ended(folder) else None  # it may end before: looked at again below
        self.folder, self.is_main, self.shards = folder, is_main, shards
        now = json.loads(json.dumps(arguments))
        self.state = {"arguments": now, "seconds": 0.0, "stages": {}, "files": {}, "epoch": None}
        done = ended(folder)
        self.result, earlier = done and done.result, done or read_json(folder / PROGRESS, State)
        if earlier is not None:
            before = earlier.arguments
            if before != now:
                names = [name for name in now if before.get(name) != now[name]]
                raise SPDError(
                    f"{folder} holds another run's work ({', '.join(names) or 'other arguments'} differ); "
                    "give an empty folder, or the same arguments to go on with it."
                )
            self.state |= earlier.model_dump()
        self.started = time.monotonic() - self.state["seconds"]  # as if earlier runs had ended just now
        shards.align()  # nobody writes before all have read

    @property
    def notes(self) -> dict[str, dict]:
        """What was noted of each stage that is done, by its name."""
        return self.state["stages"]

    def restore(self, model: Transformer, sublayers: Iterable[int]) -> None:
        """Loads the newest finished weights of some sublayers (2 i: block i's attention, 2 i + 1: its MLP)."""
        parts = tuple(f"blocks.{n // 2}.{POINTS[n % 2]}" for n in sublayers)
        for file in self.state["files"].values():
            load_changed(model, inside(self.folder, file), lambda name: name.startswith(parts))

    def finish(self, stage: str, note: dict, changed: Iterable[tuple[int, dict[str, Tensor]]]) -> None:
        """Writes a stage's changed tensors, block by block, and then in one step that it is done."""
        files = self.state["files"]
        for block, tensors in changed:
            if tensors:
                earlier = files.get(str(block))
                files[str(block)] = f"{BLOCKS}/{block}.{len(self.notes)}.safetensors"  # never that of an earlier stage
                if self.is_main:
                    kept = load_file(inside(self.folder, earlier)) if earlier else {}
                    write_whole(self.folder / files[str(block)], partial(save_file, kept | tensors))
        self.notes[stage] = note
        self.state |= {"epoch": None, "seconds": time.monotonic() - self.started}
        if self.is_main:
            write_json(self.folder / PROGRESS, self.state)

    def save_epoch(self, epoch: int, training: dict) -> None:
        """Keeps the state of a training that is under way, each process its own part of it."""
        earlier, self.state["epoch"] = self.state["epoch"], epoch
        write_whole(self._epoch_file(epoch), partial(torch.save, training))
        self.shards.align()  # every part is there before the epoch counts
        if self.is_main:
            write_json(self.folder / PROGRESS, self.state)
        self.shards.align()  # and counts before the one before it goes
        self._epoch_file(earlier).unlink(missing_ok=True)

    def load_epoch(self) -> dict | None:
        """The last state kept of a training by as many processes, or None."""
        path = self._epoch_file(self.state["epoch"])
        with reading(f"{path} cannot be read; remove it to start the stage anew"):
            return torch.load(path, weights_only=True) if path.exists() else None

    def _epoch_file(self, epoch: int | None) -> Path:
        return self.folder / BLOCKS / f"epoch-{epoch}.{self.shards.rank}-of-{self.shards.world}.pt"

    def conclude(self, plan: dict, result: dict) -> dict:
        """Writes the plan, with the names of the blocks' files and the result, which it gives."""
        files, result = list(self.state["files"].values()), result | {"seconds": time.monotonic() - self.started}
        if self.is_main:
            for path in self.folder.glob(f"{BLOCKS}/*"):  # of earlier stages and epochs: several times the model
                if f"{BLOCKS}/{path.name}" not in files:
                    path.unlink()
            same = {"arguments": self.state["arguments"], "changed": files, "result": result}
            write_json(self.folder / PLAN, plan | same)
            (self.folder / PROGRESS).unlink(missing_ok=True)
            self.lock.close()
        return result


def claim(folder: Path) -> TextIO:
    """Holds a repair's folder until the file given is closed, or this process ends, however it does.

    Raises SPDError where another process holds it.
    """
    path = folder / BLOCKS / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system that has no locks
            raise SPDError(f"Another process is at work in {folder}; wait for it, or give another folder.") from None
    return file


def ended(folder: Path) -> State | None:
    """What a repair that ended left in its folder; None where none did."""
    found = read_json(folder / PLAN, State)
    result = found and (found.result or read_json(folder / "result.json"))  # the latter by earlier versions
    return found.model_copy(update={"result": result}) if result else None


def changed_files(folder: Path) -> dict[int, Path]:
    """The file of each block that an ended repair changed."""
    files = [inside(folder, name) for name in parsed(folder / PLAN, State, "is not the plan of a repair").changed]
    return {int(file.name.split(".")[0]): file for file in files}


def read_json(path: Path, form: type[T] = dict) -> T | None:
    """What a file of a repair holds, as pydantic reads a `form`; None where there is none."""
    if not path.exists():
        return None
    return parsed(path, form, "does not hold what is kept there (remove it to start anew)")
