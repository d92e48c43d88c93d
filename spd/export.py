"""A model in its present state as a Hugging Face folder, so that repaired weights travel without their base.

The folder is a plain dense LLaMA: each shard's rows and columns at their places, which is what tensor parallelism
splits again in the same way. Read with the plan and tp it was made for, it computes what base and repair computed.
Run densely (or with every sync) it computes something else, and worse than the original: repaired projections were
fitted to the partial inputs that shards see without the sync.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spd.checkpoint import INDEX, SafetensorsFolder, hf_shapes, shard_slices
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.model import Transformer
from spd.pretrained import SPDModel, describe, resolve
from spd.repair.repaired import block_parameters
from spd.track import write_json

COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "generation_config.json", "chat_template*")


def exported_config(model: Transformer) -> ModelConfig:
    """The model's shape; where shards' copies of a key/value head have come to differ, each becomes a head.

    Where a repair gave attention biases to some blocks, all get them, in place: of zero.
    """
    config, tp = model.config, model.shards.tp
    if any(block.attention.out.bias is not None for block in model.blocks):
        config = replace(config, attention_bias=True)
        for block in model.blocks:
            block.attention.add_biases()
    if tp > config.num_kv_heads and not all(_copies_agree(model, i) for i in range(config.num_blocks)):
        return replace(config, num_kv_heads=tp)
    return config


def _copies_agree(model: Transformer, block: int) -> bool:
    attention, config = model.blocks[block].attention, model.config
    queries, copies = attention.h * attention.head_dim, model.shards.tp // config.num_kv_heads
    for parameter in filter(lambda p: p is not None, (attention.qkv.weight, attention.qkv.bias)):
        keys_values = model.shards.gather(parameter.data)[:, queries:].unflatten(0, (-1, copies))
        if not (keys_values == keys_values[:, :1]).all():
            return False
    return True


def dense_tensors(model: Transformer, config: ModelConfig, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors, on the host, that some of the model's parameters make up together."""
    shapes, tp, found = hf_shapes(config), model.shards.tp, {}
    for name, parameter in parameters.items():
        whole = model.shards.gather(parameter.data) if model.is_sharded(name) else parameter.data[None]
        for shard, values in enumerate(whole.cpu()):
            row = 0
            for part in shard_slices(config, tp, shard, name):
                target = found.setdefault(part.name, torch.empty(shapes[part.name], dtype=values.dtype))
                if part.dim is None:
                    target.copy_(values)
                elif part.dim == 0:
                    rows = part.stop - part.start
                    target[part.start : part.stop] = values[row : row + rows]
                    row += rows
                else:
                    target[:, part.start : part.stop] = values
    return found


def export(model: SPDModel, source: str | Path, folder: Path, leads: bool = True) -> dict:
    """Writes the model, its tokenizer and its plan to a new folder, block by block; the rest of `source` is copied.

    Returns:
        `files`, `model` (name and fingerprint of the exported one), `plan` (letters) and `tp`.

    Raises:
        SPDError: a folder that holds something already.
    """
    if leads and folder.exists() and any(folder.iterdir()):
        raise SPDError(f"{folder} is not empty; a model is exported to a new folder.")
    transformer = model.transformer
    config = exported_config(transformer)
    partial = folder.with_name(folder.name + ".partial")
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_descriptions(resolve(source), partial, config, transformer.embedding.weight.dtype)
    _write_weights(transformer, config, partial, leads)
    if not leads:
        return {}
    described = describe(config, folder.name, SafetensorsFolder(partial).fingerprint(ModelConfig.from_folder(partial)))
    plan = {"policies": model.plan.policies(), "plan": str(model.plan), "model": described, "tp": model.tp}
    write_json(partial / "plan.json", plan)
    if folder.exists():
        folder.rmdir()
    partial.replace(folder)
    files = sorted(str(path) for path in folder.iterdir())
    return {"files": files, "plan": plan["plan"], "exported": described}


def _copy_descriptions(source: Path, target: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    description = json.loads((source / "config.json").read_text())
    description.pop("torch_dtype", None)
    description |= {"num_key_value_heads": config.num_kv_heads, "attention_bias": config.attention_bias}
    description["dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", description)
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copy(file, target / file.name)


def _write_weights(model: Transformer, config: ModelConfig, folder: Path, leads: bool) -> None:
    """One file a block and one for the rest, with an index: no more than a block is held at a time."""
    inside = [block_parameters(model, i) for i in range(config.num_blocks)]
    in_blocks = {name for parameters in inside for name in parameters}
    rest = {name: p for name, p in model.named_parameters() if name not in in_blocks}
    places, size = {}, 0
    for number, parameters in enumerate((rest, *inside), start=1):
        tensors = dense_tensors(model, config, parameters)
        file = f"model-{number:05}-of-{len(inside) + 1:05}.safetensors"
        if leads:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    if leads:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
