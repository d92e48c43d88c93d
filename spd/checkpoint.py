"""Hugging Face safetensors folders: which slices belong to which shard, and reading just those.

Only safetensors are read, no pickles and no remote code.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spd.config import ModelConfig
from spd.errors import SPDError
from spd.model import Transformer

CHUNK_BYTES = 16 * 2**20  # read at once, so that loading needs little beyond the weights themselves
SAMPLE_BYTES = 64
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Slice:
    """Rows `start..stop` of a tensor (dim 0), its columns (dim 1), or all of it (dim None)."""

    name: str
    dim: int | None = None
    start: int = 0
    stop: int = 0


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    d, f, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    linear = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.attention_bias),
        "mlp.gate_proj": (f, d, config.mlp_bias),
        "mlp.up_proj": (f, d, config.mlp_bias),
        "mlp.down_proj": (d, f, config.mlp_bias),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_blocks):
        prefix = f"model.layers.{i}."
        shapes |= {prefix + "input_layernorm.weight": (d,), prefix + "post_attention_layernorm.weight": (d,)}
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def shard_slices(config: ModelConfig, tp: int, shard: int, parameter: str) -> list[Slice]:
    """The slices which, stacked by rows, make up `parameter` of a `Transformer` on logical shard `shard`.

    Queries, keys, values, gate and up are split by rows (Megatron's column-parallel layers), o and down by
    columns; the rest is whole on every shard. Where tp exceeds the key/value heads, neighbours share one.
    """
    whole = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if parameter in whole:
        return [Slice(whole[parameter])]
    _, i, module, *_, kind = parameter.split(".")
    inner = parameter.split(".")[3]
    prefix, size = f"model.layers.{i}.", config.head_dim
    if module == "attention_norm":
        return [Slice(prefix + "input_layernorm.weight")]
    if module == "mlp_norm":
        return [Slice(prefix + "post_attention_layernorm.weight")]
    heads, neurons = config.num_heads // tp * size, config.intermediate_size // tp
    kv_heads = config.kv_heads_per_shard(tp) * size
    kv_start = shard * config.num_kv_heads // tp * size
    q = (shard * heads, (shard + 1) * heads)
    kv = (kv_start, kv_start + kv_heads)
    mlp = (shard * neurons, (shard + 1) * neurons)
    rows = {
        "qkv": [("self_attn.q_proj", *q), ("self_attn.k_proj", *kv), ("self_attn.v_proj", *kv)],
        "gate_up": [("mlp.gate_proj", *mlp), ("mlp.up_proj", *mlp)],
    }
    columns = {"out": ("self_attn.o_proj", *q), "down": ("mlp.down_proj", *mlp)}
    if inner in rows:
        return [Slice(f"{prefix}{name}.{kind}", 0, a, b) for name, a, b in rows[inner]]
    name, a, b = columns[inner]
    return [Slice(f"{prefix}{name}.bias")] if kind == "bias" else [Slice(f"{prefix}{name}.weight", 1, a, b)]


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The head of a file with these tensors, name: (dtype, shape, bytes), whose contents follow it in this order."""
    described, offset = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class SafetensorsFolder:
    """The tensors of a folder, located and checked by their headers alone."""

    def __init__(self, folder: Path):
        """Raises SPDError where a file is missing, truncated or not safetensors."""
        self.folder = folder
        self.entries: dict[str, dict] = {}  # name -> {"shape", "dtype", "file", "offset", "bytes"}
        for file in self._files():
            self.entries |= self.header(file)

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                raise SPDError(f"{index} is not a valid safetensors index.") from None
            missing = [name for name in names if not (self.folder / name).exists()]
            if missing:
                raise SPDError(
                    f"{len(missing)} of {len(names)} weight files are missing in {self.folder}: {missing[0]}."
                )
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        raise SPDError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read.")

    @staticmethod
    def header(file: Path) -> dict[str, dict]:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise SPDError(f"{file} is truncated or not a safetensors file ({size:,} bytes).")
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                raise SPDError(f"{file} is not a safetensors file: its header is damaged.") from None
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < end:
            raise SPDError(f"{file} is truncated: {size:,} bytes of {end:,}.")
        return {
            name: {
                "shape": tuple(entry["shape"]),
                "dtype": entry["dtype"],
                "file": file,
                "offset": 8 + length + entry["data_offsets"][0],
                "bytes": entry["data_offsets"][1] - entry["data_offsets"][0],
            }
            for name, entry in header.items()
        }

    def validate(self, config: ModelConfig) -> None:
        """Raises SPDError naming the first tensor that is missing or of another shape than the configuration's."""
        expected = hf_shapes(config)
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise SPDError(f"{len(missing)} of {len(expected)} tensors are missing in {self.folder}: {missing[0]}.")
        for name, shape in expected.items():
            found = self.entries[name]["shape"]
            if found != shape:
                raise SPDError(f"{name} in {self.folder} has shape {found}, its configuration asks for {shape}.")

    def fingerprint(self, config: ModelConfig) -> str:
        """16 hex digits from the configuration, names, shapes and a few bytes of every tensor."""
        digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
        for name in sorted(hf_shapes(config)):
            entry = self.entries[name]
            digest.update(f"{name}{entry['shape']}{entry['dtype']}".encode())
            with entry["file"].open("rb") as stream:
                for place in (0, entry["bytes"] // 2, max(0, entry["bytes"] - SAMPLE_BYTES)):
                    stream.seek(entry["offset"] + place)
                    digest.update(stream.read(min(SAMPLE_BYTES, entry["bytes"] - place)))
        return digest.hexdigest()[:16]

    @cached_property
    def _open(self) -> dict[Path, safe_open]:
        return {file: safe_open(file, "pt") for file in {entry["file"] for entry in self.entries.values()}}

    def chunks(self, part: Slice) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row within the slice, rows) pieces of at most `CHUNK_BYTES` or one row."""
        entry = self.entries[part.name]
        tensor = self._open[entry["file"]].get_slice(part.name)
        first, last = (part.start, part.stop) if part.dim == 0 else (0, entry["shape"][0])
        rows = max(1, CHUNK_BYTES * entry["shape"][0] // max(1, entry["bytes"]))
        for start in range(first, last, rows):
            piece = slice(start, min(start + rows, last))
            yield start - first, tensor[piece, part.start : part.stop] if part.dim == 1 else tensor[piece]


@torch.no_grad()
def load_weights(model: Transformer, weights: SafetensorsFolder) -> None:
    """Fills the parameters of the hosted shards, converting to their dtype and device."""
    weights.validate(model.config)
    shards = model.shards
    try:
        for name, parameter in model.named_parameters():
            parts = [shard_slices(model.config, shards.tp, shard, name) for shard in shards.hosted]
            replicated = parts[0][0].dim is None
            targets = [parameter] if replicated else parameter
            for target, slices in zip(targets, parts[: len(targets)], strict=True):
                row = 0
                for part in slices:
                    for offset, piece in weights.chunks(part):
                        target[row + offset : row + offset + len(piece)].copy_(piece)
                    row += part.stop - part.start
    except SafetensorError as error:
        raise SPDError(f"The weights in {weights.folder} cannot be read: {error}.") from error


@torch.no_grad()
def fill_randomly(model: Transformer, seed: int) -> None:
    """Random weights of a usual scale: for timing a shape, never for quality."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """A whole checkpoint by Hugging Face's names, of a usual scale, in bfloat16: for timing, never for quality."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in hf_shapes(config).items():
        if "norm" in name:
            made[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            made[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)
    return made


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


def block_parameters(model: Transformer, block: int) -> dict[str, Tensor]:
    prefix = f"blocks.{block}."
    return {name: p for name, p in model.named_parameters() if name.startswith(prefix)}


@torch.no_grad()
def changed_tensors(model: Transformer, block: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's parameters that differ on any shard from `before` (hosted parts), for all shards, on the host."""
    found = {}
    for name, parameter in block_parameters(model, block).items():
        differs = torch.tensor([float(not torch.equal(parameter, before[name]))], device=parameter.device)
        if model.shards.all_reduce(differs, "repair").item():
            whole = model.shards.gather(parameter.data) if model.is_sharded(name) else parameter.data
            found[name] = whole.contiguous().cpu()
    return found


@torch.no_grad()
def load_changed(model: Transformer, path: Path) -> None:
    """Puts the tensors of a file written here into the model, the hosted shards' parts alone.

    Raises:
        SPDError: an unreadable file, or tensors that this model and tp do not have.
    """
    shards = model.shards
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if re.fullmatch(r"blocks\.\d+\.attention\.(qkv|out)\.bias", name):  # a repair may have added them
                    model.blocks[int(name.split(".")[1])].attention.add_biases()
            parameters = dict(model.named_parameters())
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                target = parameters.get(name)
                sharded = target is not None and model.is_sharded(name)
                expected = None if target is None else [*((shards.tp,) if sharded else ()), *target.shape[sharded:]]
                if part.get_shape() != expected:
                    raise SPDError(f"{path} does not fit this model and tp={shards.tp}: {name} is {part.get_shape()}.")
                target.copy_(part[shards.hosted.start : shards.hosted.stop] if sharded else part[:])
    except (OSError, SafetensorError) as error:
        raise SPDError(f"The repaired weights {path} cannot be read ({error}).") from error
