"""The commands that a reproduction calls, run as one process of several under `fake_cuda`; what they asked of the GPU.

    python tests/gpu_commands.py RANK WORLD FOLDER STAGE...

The model has LLaMA2-70B's shape, cut to three blocks, and a checkpoint without contents. On stdout one JSON document:
for each stage its `counts`, `collectives` in order, `peak` and `live` bytes, what was `noted` on its way, and the
`result` that the command printed and `recorded` of the GPU.
"""

import json
import struct
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import wraps
from io import StringIO
from pathlib import Path

from fake_cuda import GPU, patch_kernels, patch_processes, patch_torch  # it must come before torch

# isort: split
import torch

import spd.closed_form
import spd.repairs
from spd import engines, training
from spd.checkpoint import Checkpoint
from spd.cli import chosen
from spd.config import SHAPES, hf_shapes
from spd.session import Session
from spd.tiny import MODEL_DIR

SHAPE, BLOCKS, TP = "llama2-70b", 3, 8
SENSITIVITY = [1.0, 1.0, 20.0]  # two blocks are distilled, of one the heads are grouped first
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}


def hollow(path: Path, tensors: dict[str, tuple[torch.dtype, tuple]]) -> None:
    """A safetensors file with a true header, and a hole for contents."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def hollow_checkpoint(folder: Path) -> Path:
    config = replace(SHAPES[SHAPE], num_blocks=BLOCKS)
    SHAPES[SHAPE] = config
    folder.mkdir(parents=True, exist_ok=True)
    hollow(folder / "model.safetensors", {n: (torch.bfloat16, shape) for n, shape in hf_shapes(config).items()})
    (folder / "config.json").write_text(json.dumps(config.to_hf().to_dict(), default=str))
    for file in MODEL_DIR.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def no_contents() -> None:
    """Neither checkpoints nor repairs are really read or written."""

    def chunks(self, part):
        rows, *width = self.tensors[part.name].get_shape()
        first, last = (part.start, part.stop) if part.dim == 0 else (0, rows)
        width = [part.stop - part.start] if part.dim == 1 else width
        yield 0, torch.zeros(1, dtype=torch.bfloat16).expand(last - first, *width)

    spd.closed_form.SWEEPS = 2  # thirty are all alike
    Checkpoint.chunks = chunks
    spd.repairs.save_file = lambda tensors, path: hollow(path, {n: (t.dtype, t.shape) for n, t in tensors.items()})
    torch.save = lambda thing, path: Path(path).write_bytes(b"")


NOTED: dict[str, list] = {}


def note(owner, name: str, counted: bool) -> None:
    """Notes after each call of a function what it counted, or how many bytes are live."""
    function = getattr(owner, name)

    @wraps(function)
    def noting(*arguments, **named):
        before = GPU.counts.copy()
        found = function(*arguments, **named)
        spent = {what: GPU.counts[what] - before[what] for what in GPU.counts}
        spent["tf32"] = torch.get_float32_matmul_precision() == "high"
        NOTED.setdefault(name.strip("_"), []).append(spent if counted else GPU.live)
        return found

    setattr(owner, name, noting)


def words_of(stage: str, model: Path, folder: Path, work: Path, world: int) -> list:
    """The command line of a stage."""
    common = ["--model", model, "--device", "cuda", "--records", folder / "records", "--no-mlflow"]
    text = ["--text", folder / "text.txt", "--seq-len", 2048, "--windows", 2, "--tp", TP]
    (folder / "text.txt").write_text("return the mean of it\n" * 4000)
    sensitivity = folder / "sensitivity.json"
    described = {"name": SHAPE, "fingerprint": fingerprint(model), "blocks": BLOCKS}
    sensitivity.write_text(json.dumps({"sensitivity": SENSITIVITY, "model": described, "tp": TP}))
    tasks = ["--tasks", "tiny_last_word,tiny_continuation", "--limit", 2]
    bench = ["bench", *common, "--tp", world, "--dtype", "bfloat16", "--repeats", 2, "--percentages", "0,50,100"]
    commands = {
        "sensitivity": ["sensitivity", *common, *text, "--dtype", "bfloat16"],
        "eval": ["eval", *common, *text, *tasks, "--drop", "all", "--compare", "--dtype", "bfloat16"],
        "bench": [*bench, "--new-tokens", 2],
        "compiled": [*bench, "--prompt-len", 250, "--new-tokens", 10, "--compile"],  # past a multiple of 256
        "little-memory": [
            "distill",
            *common,
            *text,
            "--recipe",
            "paper",
            "--epochs",
            1,
            "--drop",
            "0-1",
            "--out",
            work,
        ],
    }
    repaired = ["sweep", sensitivity, *common, *text, "--skip", 3, "--calibration", 3, "--tau1", 0.05, "--tau2", 10]
    repaired += ["--percentages", "0,100", "--epochs", 1, "--repairs", work]
    return commands.get(stage) or [*repaired, "--strategies", stage]


def fingerprint(model: Path) -> str:
    return Checkpoint(model).fingerprint()


def main() -> None:
    rank, world, folder, stages = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    mine, found = folder / str(rank), {}
    if "eval" in stages:
        from spd import harness  # noqa: F401 (with all that it brings along, before torch is patched)
    patch_torch()
    patch_kernels()
    patch_processes(rank, world, mine / "work", folder / "barriers")
    no_contents()
    for owner, name, counted in (
        (engines.Eager, "decode", True),
        (training, "_step", True),
        (spd.repairs.Repairs, "finish", False),
    ):
        note(owner, name, counted)
    model = hollow_checkpoint(mine / "model")
    for stage in stages:
        sys.argv = ["spd", *map(str, words_of(stage, model, mine, mine / "work", world))]
        if stage == "little-memory":
            torch.cuda.mem_get_info = lambda *_: (2**20, 2**30)
        GPU.start()
        with GPU, redirect_stdout(StringIO()) as said:
            Session(*chosen(None)).run()
        found[stage] = {"counts": GPU.counts, "collectives": GPU.collectives, "peak": GPU.peak, "live": GPU.live}
        found[stage]["result"] = json.loads(said.getvalue().splitlines()[-1]) if rank == 0 else None
        record = mine / "records" / f"{(found[stage]['result'] or {}).get('record')}.json"
        found[stage]["recorded"] = json.loads(record.read_text())["gpu"] if rank == 0 else None
        found[stage]["noted"] = {name: list(values) for name, values in NOTED.items()}
        NOTED.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
