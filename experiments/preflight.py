"""What a reproduction needs before anything long begins: all that is missing, at once and in words.

    python experiments/preflight.py experiments/llama2-70b.yaml --tp 8 --processes 8

Started by torchrun with one process a node, every node is checked.
"""

import argparse
import functools
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage

import psutil
import torch
from budget import GIB, Budget, shape_of, stages
from huggingface_hub.constants import HF_HUB_CACHE

from spd.checkpoint import Checkpoint
from spd.data import BUILTIN, read_text
from spd.errors import SPDError
from spd.launch import environment, runtime
from spd.options import read_experiment
from spd.pretrained import HUB_FILES, resolve

SHARED_MEMORY, SHM_BYTES = Path("/dev/shm"), 2**30  # NCCL's between processes of a node; containers have 64 MB of it
PATIENCE = 240  # seconds for an all-reduce that is tried
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
    processes: int = 1  # a node, that share a model
    nodes: int = 1
    gpus: int = 1  # a node
    folder: Path = Path("runs")  # what is made goes there
    budget: Budget = field(default_factory=Budget)
    download: float = 0.0  # bytes


def missing(needs: Needs) -> list[str]:
    """Sentences, each about one thing that this machine lacks; empty where all is there."""
    return [*_machine(needs), *_weights(needs), *_texts(needs), *_tasks(needs)]


def _machine(needs: Needs) -> list[str]:
    budget, found = needs.budget, []
    if needs.device == "cuda":
        found += _gpus(needs.gpus, budget.device_bytes) or (_together(needs.gpus) if needs.gpus > 1 else [])
    host = budget.host_bytes + (0 if needs.device == "cuda" else budget.device_bytes)
    free = psutil.virtual_memory().available
    if free < host:
        found.append(f"{host / GIB:.0f} GiB of host memory are needed (reckoned), and {free / GIB:.0f} are available.")
    disks = Counter()  # bytes, by where a disk is mounted
    for folder, size in ((needs.folder, budget.disk_bytes), (Path(HF_HUB_CACHE), needs.download)):
        disks[next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_mount())] += size
    for disk, size in disks.items():
        if (free := disk_usage(disk).free) < size:
            found.append(f"{size / GIB:.0f} GiB of disk are needed for weights to download and what repairs keep "
                         f"(reckoned), and {free / GIB:.0f} are free under {disk}.")  # fmt: skip
    return found


def _gpus(count: int, need: float) -> list[str]:
    """Whether each GPU is there, has room now, and multiplies."""
    if torch.version.cuda is None:
        return [f"{count} GPUs are needed, and this torch ({torch.__version__}) was built without CUDA."]
    visible = torch.cuda.device_count()
    if visible < count:
        return [f"{count} GPUs are needed, one a process, and {visible} are visible (NPROC=N uses fewer)."]
    try:
        for i in range(count):
            x = torch.ones(256, 256, device=f"cuda:{i}")
            if not ((x @ x) == 256).all():
                return [f"GPU {i} multiplies wrongly."]
        free = [torch.cuda.mem_get_info(i)[0] for i in range(count)]
    except RuntimeError as error:  # a driver older than the wheel, a GPU that is broken or another's
        reason = str(error).splitlines()[0]
        return [f"The GPUs do not compute with this torch ({torch.__version__}, CUDA {torch.version.cuda}): {reason}"]
    if min(free) < need:
        return [f"{need / GIB:.0f} GiB of memory are needed on each GPU (reckoned), and the fullest has "
                f"{min(free) / GIB:.0f} free; more processes (NPROC=N) share the shards out."]  # fmt: skip
    return []


def _together(gpus: int) -> list[str]:
    """Whether as many processes sum by NCCL, or by gloo without GPUs; they are started for it."""
    free = disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else SHM_BYTES
    if free < SHM_BYTES:
        return [f"NCCL needs 1 GiB of {SHARED_MEMORY}, and {free / GIB:.2f} are free (docker run --shm-size 1g)."]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    done = subprocess.run([*launcher, __file__, "--probe"], capture_output=True, text=True, env=environment())
    said = [line for line in done.stderr.splitlines() if "Error" in line and "Child" not in line] or ["no reason given"]
    return [f"An all-reduce of {gpus} processes fails (NCCL_DEBUG=INFO says more): {said[0]}"] * bool(done.returncode)


def probe() -> None:
    """One of several processes that sum; it ends by itself, as NCCL waits long."""
    signal.alarm(PATIENCE)
    with runtime("cuda" if torch.cuda.is_available() else "cpu") as here:
        summed = here.shards(here.world).all_reduce(torch.ones(2**20, device=here.device), "probe")
        if not (summed == here.world).all():
            raise ValueError("the sum is wrong")


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
    world, copies, budget, download = given.processes * given.nodes, max(1, given.gpus * given.nodes), Budget(), 0.0
    try:
        found_stages = stages(experiment, model, given.tp, world, given.processes, "a100", copies)
        budget = functools.reduce(Budget.then, found_stages.values())
        download = 2.0 * shape_of(model).parameters() if _cached(model) is None else 0.0
    except SPDError:  # an unknown shape: its weights are looked for all the same
        pass
    return Needs(model, given.tp, tuple(given.text or filter(None, found)), tasks, folder, device, given.processes,
                 given.nodes, max(given.processes, given.gpus), given.folder, budget, download)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model", help="another than the experiment's")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--text", action="append", help="texts in place of the experiment's")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--processes", type=int, default=1, help="a node, that share a model")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="a node, where a sweep has a copy of the model on each")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results will go")
    parser.add_argument("--force", action="store_true", help="go on whatever is missing")
    given = parser.parse_args()
    try:
        needs = needs_of(given.experiment, given)
        with runtime("cpu") as here:
            found = here.gather(missing(needs))
    except SPDError as error:
        sys.exit(str(error))
    lines = [f"- {f'node {n}: ' if given.nodes > 1 else ''}{line}" for n, some in enumerate(found) for line in some]
    if lines and here.is_main:
        head = "FORCE=1: going on, and this is missing:" if given.force else "Missing (FORCE=1 goes on all the same):"
        print("\n".join([head, *lines]), file=sys.stderr)
    sys.exit(bool(lines) and not given.force)


if __name__ == "__main__":
    probe() if sys.argv[1:2] == ["--probe"] else main()
