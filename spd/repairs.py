"""Repaired weights on disk: written block by block while a repair runs, and one file with the plan when it is done.

Only tensors that a repair changed are kept, under their name in `Transformer`, all tp shards stacked where each has
its own: (tp, ...). The layout does not depend on the number of processes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd.checkpoint import SafetensorsFolder, load_changed, safetensors_header
from spd.comm import Shards
from spd.errors import SPDError
from spd.model import Transformer
from spd.records import write_json

CHANGED = "changed.safetensors"
PROGRESS = "progress.json"
PLAN = "plan.json"
RESULT = "result.json"  # there when all else is
PARTS = "blocks"  # folder of the finished blocks, until they are joined


class Workspace:
    """The output folder of a repair: what is finished there, and finishing more.

    A block is finished when `progress.json`, replaced whole, names its file; whatever else lies there is ignored. All
    processes read, the leading one writes.
    """

    def __init__(self, folder: Path, arguments: dict, is_main: bool, shards: Shards):
        """Raises SPDError where the folder holds the work of other `arguments`."""
        self.folder, self.is_main, self.shards = folder, is_main, shards
        self.state = {"arguments": arguments, "seconds": 0.0, "stages": {}, "files": {}}
        self.result = self._read(folder / RESULT)
        earlier = self._read(folder / (PROGRESS if self.result is None else PLAN))
        if earlier is not None:
            self._check(earlier.get("arguments"), arguments)
            if self.result is None:
                self.state = earlier
        shards.align()  # nobody writes before all have read
        if is_main and self.result is None:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def _read(path: Path) -> dict | None:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SPDError(f"{path} cannot be read ({error}); empty the folder to start anew.") from error

    def _check(self, earlier: dict | None, arguments: dict) -> None:
        plain = json.loads(json.dumps(arguments))
        if earlier != plain:
            names = [n for n in plain if (earlier or {}).get(n) != plain[n]]
            raise SPDError(
                f"{self.folder} holds another run's work ({', '.join(names) or 'other arguments'} differ); "
                "give an empty folder, or the same arguments to go on with it."
            )

    def finished(self, stage: str) -> dict | None:
        """What was noted of a stage that is done, and None otherwise."""
        return self.state["stages"].get(stage)

    def restore(self, model: Transformer, block: int) -> None:
        """Loads the newest finished weights of a block, if any changed."""
        if str(block) in self.state["files"]:
            load_changed(model, self.folder / self.state["files"][str(block)])

    def finish(self, stage: str, note: dict, changed: dict[int, dict[str, Tensor]], seconds: float) -> None:
        """Writes a stage's changed tensors, by block, and then in one step that it is done."""
        stale = []
        for block, tensors in changed.items():
            if not tensors:
                continue
            name = f"{PARTS}/{block}.{len(self.state['stages'])}.safetensors"  # never that of an earlier stage
            earlier = self.state["files"].get(str(block))
            if self.is_main:
                kept = load_file(self.folder / earlier) if earlier else {}
                _save(kept | tensors, self.folder / name)
            stale.append(earlier)
            self.state["files"][str(block)] = name
        self.state["stages"][stage], self.state["seconds"] = note, seconds
        self.state.pop("epoch", None)
        if self.is_main:
            write_json(self.folder / PROGRESS, self.state)
            for name in filter(None, stale):
                (self.folder / name).unlink(missing_ok=True)

    def save_epoch(self, epoch: int, training: dict) -> None:
        """Keeps the state of a training that is under way, each process its own part of it."""
        earlier, self.state["epoch"] = self.state.get("epoch"), epoch
        path = self._epoch_file(epoch)
        partial = path.with_name(path.name + ".partial")
        torch.save(training, partial)
        partial.replace(path)
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
        return self.folder / PARTS / f"epoch-{epoch}.{self.shards.rank}-of-{self.shards.world}.pt"

    def conclude(self, plan: dict, result: dict) -> None:
        """Joins the blocks' files into one beside the plan, and writes the result last."""
        if not self.is_main:
            return
        files = [self.folder / name for name in self.state["files"].values()]
        if files:
            join(files, self.folder / CHANGED)
            plan = plan | {"changed": CHANGED}
        write_json(self.folder / PLAN, plan | {"arguments": self.state["arguments"]})
        write_json(self.folder / RESULT, result)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(self.folder / PARTS)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    partial.replace(path)


def join(files: list[Path], target: Path) -> None:
    """One safetensors file of the tensors of several, copied as bytes, so that memory does not grow with the model."""
    entries = {name: entry for file in files for name, entry in SafetensorsFolder.header(file).items()}
    header = safetensors_header({name: (e["dtype"], e["shape"], e["bytes"]) for name, e in entries.items()})
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as out:
        out.write(header)
        for entry in entries.values():
            with entry["file"].open("rb") as source:
                source.seek(entry["offset"])
                _copy(source, out, entry["bytes"])
    partial.replace(target)


def _copy(source, out, count: int) -> None:
    while count:
        piece = source.read(min(count, 2**24))
        out.write(piece)
        count -= len(piece)
