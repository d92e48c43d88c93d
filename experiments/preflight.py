"""What a reproduction needs before anything long begins: all that is missing, at once and in words.

    python experiments/preflight.py experiments/llama2-70b.yaml --tp 8 --processes 8

Started by torchrun with one process a node, every node is checked.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage

import psutil
import torch
from budget import GIB, Budget, stages

from spd.checkpoint import Checkpoint
from spd.data import BUILTIN, read_text
from spd.errors import SPDError
from spd.launch import runtime
from spd.options import read_experiment
from spd.pretrained import HUB_FILES, resolve

TASK_ROWS = "allenai/ai2_arc"  # a data set of the tasks, asked for to see whether the hub answers


@dataclass(frozen=True)
class Needs:
    """What the stages ask for."""

    model: str
    tp: int
    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    device: str = "cpu"
    processes: int = 1  # a node
    nodes: int = 1
    folder: Path = Path("runs")  # what is made goes there
    budget: Budget = field(default_factory=Budget)


def missing(needs: Needs) -> list[str]:
    """Sentences, each about one thing that this machine lacks; empty where all is there."""
    return [*_machine(needs), *_weights(needs), *_texts(needs), *_tasks(needs)]


def _machine(needs: Needs) -> list[str]:
    budget, found = needs.budget, []
    if needs.device == "cuda":
        found += _gpus(needs.processes, budget.device_bytes)
    host = budget.host_bytes + (0 if needs.device == "cuda" else budget.device_bytes)
    free = psutil.virtual_memory().available
    if free < host:
        found.append(f"{host / GIB:.0f} GiB of host memory are needed (reckoned), and {free / GIB:.0f} are available.")
    place = next(path for path in (needs.folder.absolute(), *needs.folder.absolute().parents) if path.exists())
    free = disk_usage(place).free
    if free < budget.disk_bytes:
        found.append(f"{budget.disk_bytes / GIB:.0f} GiB of disk are needed for what repairs keep (reckoned), and "
                     f"{free / GIB:.0f} are free under {needs.folder}.")  # fmt: skip
    return found


def _gpus(processes: int, need: float) -> list[str]:
    count = torch.cuda.device_count()
    if count < processes:
        return [f"{processes} GPUs are needed, one a process, and {count} are visible (NPROC=N uses fewer)."]
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(processes)]
    if min(sizes) < need:
        return [f"{need / GIB:.0f} GiB of memory are needed on each GPU (reckoned), and the smallest has "
                f"{min(sizes) / GIB:.0f}; more processes (NPROC=N) share the shards out."]  # fmt: skip
    return []


def _weights(needs: Needs) -> list[str]:
    """The model's folder is complete, or the hub gives it to this login; and tp and the processes divide it."""
    world = needs.processes * needs.nodes
    if needs.tp % world:
        return [f"tp={needs.tp} is not a multiple of the {world} processes that share it."]
    try:
        folder = _cached(needs.model)
        if folder is None:
            return _hub_access(needs.model)
        Checkpoint(folder).config.validate_tp(needs.tp)
    except SPDError as error:
        return [str(error)]
    return [] if list(folder.glob("tokenizer*")) else [f"{folder} holds no tokenizer."]


def _cached(model: str) -> Path | None:
    """The local folder of a model, None where the hub must be asked. Raises SPDError for what is no hub id either."""
    if Path(model).exists() or model == "spd-tiny" or model.count("/") != 1 or model.startswith((".", "/")):
        return resolve(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _hub_access(model: str) -> list[str]:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(model)
    except GatedRepoError:
        return [f"Access to {model} is gated: ask for it on its hub page, then log in with 'hf auth login'."]
    except RepositoryNotFoundError:
        return [f"The hub knows no model {model}, or not for this login; see 'hf auth login'."]
    except Exception:  # no network, or offline by a setting
        return [f"{model} is not in the local cache and the hub cannot be reached; give its folder (MODEL=DIR)."]
    return []


def _texts(needs: Needs) -> list[str]:
    found = []
    for text in dict.fromkeys(needs.texts):
        try:
            if text not in BUILTIN:
                read_text(text)
        except SPDError as error:
            found.append(str(error))
    return found


def _tasks(needs: Needs) -> list[str]:
    if not needs.tasks:
        return []
    if needs.tasks_dir is not None:
        lacking = [task for task in needs.tasks if not list(needs.tasks_dir.glob(f"{task}*.jsonl"))]
        return [f"{needs.tasks_dir} holds no rows of {', '.join(lacking)} (as NAME.jsonl)."] if lacking else []
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(TASK_ROWS)
    except Exception:  # no network, or offline by a setting
        return [f"The rows of the tasks {', '.join(needs.tasks)} come from the hub, which cannot be reached; give a "
                "folder of them (TASKS_DIR=DIR)."]  # fmt: skip
    return []


def needs_of(experiment: Path, given: argparse.Namespace) -> Needs:
    """What an experiment asks for, with what the command line says instead."""
    sections = read_experiment(experiment)
    common, sweep = sections["common"], sections.get("sweep", {})
    model, device = given.model or common.get("model", "spd-tiny"), given.device or common.get("device", "cpu")
    found = [s.get(name) for s in sections.values() for name in ("text", "calibration_text")]
    tasks = sweep["tasks"].split(",") if "tasks" in sweep else ()
    tasks = tuple(task for task in tasks if not task.startswith("tiny_"))
    folder = given.tasks_dir or (Path(sweep["tasks_dir"]) if "tasks_dir" in sweep else None)
    world, budget = given.processes * given.nodes, Budget()
    try:
        for each in stages(experiment, model, given.tp, world, given.processes, "a100").values():
            budget = budget.then(each)
    except SPDError:  # an unknown shape: its weights are looked for all the same
        pass
    return Needs(model, given.tp, tuple(given.text or filter(None, found)), tasks, folder, device, given.processes,
                 given.nodes, given.folder, budget)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model", help="another than the experiment's")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--text", action="append", help="texts in place of the experiment's")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--processes", type=int, default=1, help="a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results will go")
    given = parser.parse_args()
    try:
        needs = needs_of(given.experiment, given)
        with runtime("cpu") as here:
            lacking = {rank: found for rank, found in enumerate(here.gather(missing(needs))) if found}
    except SPDError as error:
        sys.exit(str(error))
    lines = [
        f"- {f'node {rank}: ' if given.nodes > 1 else ''}{line}" for rank, found in lacking.items() for line in found
    ]
    if lines:
        sys.exit("\n".join(["Missing:", *lines]) if here.is_main else 1)


if __name__ == "__main__":
    main()
