"""A model of a true shape, cut to a few blocks, with random weights: to run a whole pipeline where the model itself
does not fit. Its numbers mean nothing, and everything made from it says so by the model's name.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from spd.checkpoint import random_tensors, write_weights
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError
from spd.pretrained import MARK, mark_of
from spd.records import write_json
from spd.tiny import MODEL_DIR


def write_shape_only(shape: str | ModelConfig, blocks: int, folder: Path, seed: int = 0) -> dict:
    """Writes a checkpoint folder in bfloat16 with spd-tiny's tokenizer, block by block, whole or not at all.

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
    mark["name"] = f"{mark['shape']}, shape only: {blocks} of {config.num_blocks} blocks, random weights"
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
    size = write_weights(partial, cut, random_tensors(cut, seed))
    write_json(partial / MARK, mark)
    partial.replace(folder)
    return {"folder": str(folder), "bytes": size, **mark}


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
