"""A model of a true shape, cut to a few blocks, with random weights: to run a whole pipeline where the model itself
does not fit. Its numbers mean nothing, and everything made from it says so by the model's name.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from spd.checkpoint import SINGLE, hf_shapes, safetensors_header
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError
from spd.pretrained import MARK, mark_of
from spd.records import write_json
from spd.tiny import MODEL_DIR

ROWS_AT_ONCE = 1024


def write_shape_only(shape: str | ModelConfig, blocks: int, folder: Path, seed: int = 0) -> dict:
    """Writes a checkpoint folder in bfloat16 with spd-tiny's tokenizer, tensor by tensor, whole or not at all.

    Args:
        shape: a named one (`spd.config.SHAPES`), or a configuration.

    Returns:
        `folder`, `bytes` of weights, and what `mark_of` will give.

    Raises:
        SPDError: an unknown shape, more blocks than it has, a vocabulary too small for the tokenizer, or a folder
            that holds something already.
    """
    config = named_shape(shape) if isinstance(shape, str) else shape
    if not 1 <= blocks <= config.num_blocks:
        raise SPDError(f"{shape} has {config.num_blocks} blocks and cannot be cut to {blocks}.")
    if folder.exists():
        raise SPDError(f"{folder} is there already; shape-only weights are written to a new folder.")
    mark = {"shape": shape if isinstance(shape, str) else "custom", "blocks": blocks, "of": config.num_blocks}
    tiny = json.loads((MODEL_DIR / "config.json").read_text())
    if config.vocab_size < tiny["vocab_size"]:
        raise SPDError(f"The tokenizer needs a vocabulary of {tiny['vocab_size']}, and the shape's is smaller.")
    cut = replace(config, num_blocks=blocks)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in MODEL_DIR.glob("tokenizer*"):
        shutil.copy(file, partial / file.name)
    special = {name: tiny.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(partial / "config.json", cut.to_hf().to_dict() | special | {"dtype": "bfloat16"})
    size = _write_weights(partial / SINGLE, cut, seed)
    write_json(partial / MARK, mark)
    partial.replace(folder)
    return {"folder": str(folder), "bytes": size, **mark}


def _write_weights(path: Path, config: ModelConfig, seed: int) -> int:
    """Gives the number of bytes."""
    shapes, generator = hf_shapes(config), torch.Generator().manual_seed(seed)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    with path.open("wb") as out:
        out.write(safetensors_header({name: ("BF16", shape, sizes[name]) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            for rows in _random(name, shape, generator):
                out.write(rows.view(torch.uint8).numpy())
    return sum(sizes.values())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """A tensor's rows, some at a time, of a scale that keeps activations near 1."""
    if len(shape) == 1:
        yield torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        return
    scale = 1.0 if "embed" in name else 1 / math.sqrt(shape[1])
    for start in range(0, shape[0], ROWS_AT_ONCE):
        size = (min(ROWS_AT_ONCE, shape[0] - start), shape[1])
        yield torch.empty(size, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, help="as llama2-70b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    if mark_of(o.out) is not None:
        print(f"{o.out} is there already.", file=sys.stderr)
        return
    try:
        print(json.dumps(write_shape_only(o.shape, o.blocks, o.out, o.seed)))
    except SPDError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
