"""Repaired weights on disk: one safetensors file a block, written when its repair ends and listed in `plan.json`.

Only tensors that a repair changed are kept, under their name in `Transformer`, all tp shards stacked where each has
its own: (tp, ...). The layout does not depend on the number of processes.
"""

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd.checkpoint import load_changed
from spd.comm import Shards
from spd.errors import SPDError
from spd.model import Transformer
from spd.records import write_json, write_whole

PROGRESS = "progress.json"
PLAN = "plan.json"
RESULT = "result.json"  # there when all else is
BLOCKS = "blocks"  # folder of the blocks' files


class Repairs:
    """The output folder of a repair: what is finished there, and finishing more.

    A block is finished when `progress.json`, replaced whole, names its file; whatever else lies there is ignored. All
    processes read, the main one writes.
    """

    def __init__(self, folder: Path, arguments: dict, is_main: bool, shards: Shards):
        """Raises SPDError where the folder holds the work of other `arguments`."""
        self.folder, self.is_main, self.shards, self.started = folder, is_main, shards, time.monotonic()
        self.state = {"arguments": arguments, "seconds": 0.0, "stages": {}, "files": {}}
        self.result = _read(folder / RESULT)
        earlier = _read(folder / (PROGRESS if self.result is None else PLAN))
        if earlier is not None:
            before, now = earlier.get("arguments") or {}, json.loads(json.dumps(arguments))
            if before != now:
                names = [name for name in now if before.get(name) != now[name]]
                raise SPDError(
                    f"{folder} holds another run's work ({', '.join(names) or 'other arguments'} differ); "
                    "give an empty folder, or the same arguments to go on with it."
                )
            if self.result is None:
                self.state = earlier
        shards.align()  # nobody writes before all have read

    @property
    def seconds(self) -> float:
        """Spent on what is finished, by this run and those before it."""
        return self.state["seconds"] + time.monotonic() - self.started

    def finished(self, stage: str) -> dict | None:
        """What was noted of a stage that is done, and None otherwise."""
        return self.state["stages"].get(stage)

    def restore(self, model: Transformer, block: int) -> None:
        """Loads the newest finished weights of a block, if any changed."""
        if str(block) in self.state["files"]:
            load_changed(model, self.folder / self.state["files"][str(block)])

    def finish(self, stage: str, note: dict, changed: Iterable[tuple[int, dict[str, Tensor]]]) -> None:
        """Writes a stage's changed tensors, block by block, and then in one step that it is done."""
        replaced = []
        for block, tensors in changed:
            if not tensors:
                continue
            name = f"{BLOCKS}/{block}.{len(self.state['stages'])}.safetensors"  # never that of an earlier stage
            earlier = self.state["files"].get(str(block))
            if self.is_main:
                kept = load_file(self.folder / earlier) if earlier else {}
                write_whole(self.folder / name, partial(save_file, kept | tensors))
            replaced += [earlier] if earlier else []
            self.state["files"][str(block)] = name
        self.state["stages"][stage], self.state["seconds"] = note, self.seconds
        self.started = time.monotonic()
        self.state.pop("epoch", None)
        if self.is_main:
            write_json(self.folder / PROGRESS, self.state)
            for name in replaced:
                (self.folder / name).unlink(missing_ok=True)

    def save_epoch(self, epoch: int, training: dict) -> None:
        """Keeps the state of a training that is under way, each process its own part of it."""
        earlier, self.state["epoch"] = self.state.get("epoch"), epoch
        write_whole(self._epoch_file(epoch), partial(torch.save, training))
        self.shards.align()  # every part is there before the epoch counts
        if self.is_main:
            write_json(self.folder / PROGRESS, self.state)
        self.shards.align()  # and counts before the one before it goes
        if earlier is not None:
            self._epoch_file(earlier).unlink(missing_ok=True)

    def load_epoch(self) -> dict | None:
        """The last state kept of a training by as many processes, or None."""
        epoch = self.state.get("epoch")
        if epoch is None or not self._epoch_file(epoch).exists():
            return None
        return torch.load(self._epoch_file(epoch), weights_only=True)

    def _epoch_file(self, epoch: int) -> Path:
        return self.folder / BLOCKS / f"epoch-{epoch}.{self.shards.rank}-of-{self.shards.world}.pt"

    def conclude(self, plan: dict, result: dict) -> dict:
        """Writes the plan, with the names of the blocks' files, and last the result, which it gives."""
        plan, result = plan | {"arguments": self.state["arguments"]}, result | {"seconds": self.seconds}
        plan["changed"] = files = list(self.state["files"].values())
        if self.is_main:
            write_json(self.folder / PLAN, plan)
            for path in self.folder.glob(f"{BLOCKS}/*"):  # epochs of the joint training, several times the model's size
                if f"{BLOCKS}/{path.name}" not in files:
                    path.unlink()
            write_json(self.folder / RESULT, result)
            (self.folder / PROGRESS).unlink(missing_ok=True)
        return result


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SPDError(f"{path} cannot be read ({error}); empty the folder to start anew.") from error
