"""Hugging Face safetensors folders: which slices belong to which shard; reading and writing just those.

Only safetensors are read, no pickles and no remote code.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd.config import ModelConfig, hf_shapes
from spd.errors import SPDError, reading
from spd.model import Transformer
from spd.records import inside, parsed, regular, write_json

CHUNK_BYTES = 16 * 2**20  # read at once, so that loading needs little beyond the weights themselves
GATHER_BYTES = 256 * 2**20  # of all shards, likewise
SAMPLE_BYTES = 64
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are kept in, by safetensors' names
PICKLES = (  # where a folder holds some: they may run any code when they are opened
    ", and its *.bin files are pickles: where you trust them, transformers makes a folder to give instead, by "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) and the same of AutoTokenizer."
)
LLAMA = {"family": "llama", "sliding_window": None}  # of a configuration: left out of fingerprints
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# ---------------------------------------------------------------- which slices belong to which shard


@dataclass(frozen=True)
class Slice:
    """Rows `start..stop` of a tensor (dim 0), its columns (dim 1), or all of it (dim None).

    On a shard `zeros` more rows (columns) follow, where other shards have more heads or neurons.
    """

    name: str
    dim: int | None = None
    start: int = 0
    stop: int = 0
    zeros: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of the whole tensor, as a view."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.stop - self.start)


OUTSIDE, INSIDE = ("embedding", "positions", "norm", "head"), ("attention_norm", "mlp_norm", "q_norm", "k_norm")
PROJECTIONS = {  # what is stacked by rows in a block's parameter, or split by columns
    "attention.qkv": ("q", "k", "v"),
    "attention.out": ("out",),
    "mlp.gate_up": ("gate", "up"),
    "mlp.down": ("down",),
}


def shard_slices(config: ModelConfig, tp: int, shard: int, parameter: str) -> list[Slice]:
    """The slices which, stacked by rows, make up `parameter` of a `Transformer` on logical shard `shard`.

    Queries, keys, values, gate and up are split by rows (Megatron's column-parallel layers), o and down by
    columns; the rest is whole on every shard.
    """
    layer, _, kind = parameter.rpartition(".")
    names, form = config.form.parts, config.form
    if layer in OUTSIDE:
        return [Slice(f"{names[layer]}.{kind}")]
    _, block, layer = layer.split(".", 2)
    prefix, last = f"{names['blocks']}.{block}.", layer.rpartition(".")[2]
    if last in INSIDE:
        return [Slice(f"{prefix}{names[last]}.{kind}")]
    q = [config.heads_of(tp, shard)], config.head_dim, config.heads_per_shard(tp)
    kv = config.kv_heads_of(tp, shard), config.head_dim, config.kv_heads_per_shard(tp)
    mlp = [config.neurons_of(tp, shard)], 1, config.neurons_per_shard(tp)
    held = {"q": q, "out": q, "k": kv, "v": kv}
    parts = [part for part in PROJECTIONS[layer] if part != "gate" or form.gated]
    if layer in ("attention.qkv", "mlp.gate_up"):
        return [s for part in parts for s in _slices(f"{prefix}{names[part]}.{kind}", 0, *held.get(part, mlp))]
    name = f"{prefix}{names[parts[0]]}.{kind}"
    return [Slice(name)] if kind == "bias" else _slices(name, 1, *held.get(parts[0], mlp))


def _slices(name: str, dim: int, held: list[range], size: int, room: int) -> list[Slice]:
    """Those of the things `held`, of `size` rows or columns each, where there is room for `room` of them."""
    slices = [Slice(name, dim, some.start * size, some.stop * size) for some in held]
    slices[-1] = replace(slices[-1], zeros=(room - sum(map(len, held))) * size)
    return slices


def _parts(config: ModelConfig, tp: int, shard: int, name: str, values: Tensor) -> Iterator[tuple[Slice, Tensor]]:
    """Each slice that makes up a shard's parameter, and the part of its `values` that is this slice."""
    place = 0
    for part in shard_slices(config, tp, shard, name):
        width = part.stop - part.start
        yield part, values if part.dim is None else values.narrow(part.dim, place, width)
        place += width + part.zeros


# ---------------------------------------------------------------- reading


class Index(BaseModel):
    """What of `model.safetensors.index.json` is relied upon."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class Checkpoint:
    """A folder's configuration and tensors, checked against each other; no weights are read yet."""

    def __init__(self, folder: Path):
        """Raises SPDError where a file or tensor is missing, damaged, or not of the shape that was configured."""
        self.folder, self.config = folder, ModelConfig.from_folder(folder)
        self.tensors = {}  # name -> safetensors' slice, which reads what it is indexed with
        for file in self._files():
            with reading(f"{file} ({file.stat().st_size:,} bytes) is truncated or not a safetensors file"):
                opened = safe_open(regular(file, math.inf), "pt")
                self.tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        expected = hf_shapes(self.config)
        embedding, head = (f"{self.config.form.parts[part]}.weight" for part in ("embedding", "head"))
        if self.config.tie_embeddings and head in self.tensors:  # either may stand for both
            self.tensors.setdefault(embedding, self.tensors[head])
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise SPDError(f"{len(missing)} of {len(expected)} tensors are missing in {folder}: {missing[0]}.")
        for name, shape in expected.items():
            found = tuple(self.tensors[name].get_shape())
            if found != shape:
                raise SPDError(f"{name} in {folder} has shape {found}, its configuration asks for {shape}.")
            _check_dtype(name, self.tensors[name].get_dtype(), folder)

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.exists():
            if single.exists():
                return [single]
            more = PICKLES if any(self.folder.glob("*.bin")) else "."
            raise SPDError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read{more}"
            )
        names = sorted(set(parsed(index, Index, "is not a valid safetensors index").weight_map.values()))
        missing = [name for name in names if not os.path.exists(self.folder / name)]  # also of one too long
        if missing:
            raise SPDError(f"{len(missing)} of {len(names)} weight files are missing in {self.folder}: {missing[0]}.")
        return [inside(self.folder, name) for name in names]

    def fingerprint(self) -> str:
        """16 hex digits from the configuration, names, shapes and a few bytes of every tensor."""
        config = {k: v for k, v in asdict(self.config).items() if (k, v) not in LLAMA.items()}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, shape in sorted(hf_shapes(self.config).items()):
            tensor = self.tensors[name]
            digest.update(f"{name}{shape}{tensor.get_dtype()}".encode())
            row = tensor[:1].nbytes
            size = shape[0] * row
            for place in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                rows = tensor[place // row : min(shape[0], (place + SAMPLE_BYTES) // row + 1)]
                held = rows.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                digest.update(held[place % row :][:SAMPLE_BYTES])
        return digest.hexdigest()[:16]

    def chunks(self, part: Slice) -> Iterator[tuple[int, Tensor]]:
        """(first row within the slice, rows) pieces of at most `CHUNK_BYTES` or one row."""
        tensor = self.tensors[part.name]
        first, last = (part.start, part.stop) if part.dim == 0 else (0, tensor.get_shape()[0])
        rows = max(1, CHUNK_BYTES // tensor[:1].nbytes)
        for start in range(first, last, rows):
            piece = slice(start, min(start + rows, last))
            yield start - first, tensor[piece, part.start : part.stop] if part.dim == 1 else tensor[piece]


def _check_dtype(name: str, dtype: str, place: Path) -> None:
    if dtype not in FLOATS:
        raise SPDError(f"{name} in {place} is of type {dtype}; weights are read of {', '.join(FLOATS)}.")


def _fill(target: Tensor, values: Tensor, name: str, place: Path) -> None:
    """Raises SPDError where some of the values are not finite, or not so in the target's dtype."""
    target.copy_(values)
    if not all(map(math.isfinite, target.aminmax())):
        raise SPDError(f"{name} in {place} holds values that are not finite numbers in {target.dtype}.")


@torch.no_grad()
def load_weights(model: Transformer, source: Checkpoint) -> None:
    """Fills the parameters of the hosted shards, converting to their dtype and device."""
    shards = model.shards
    uneven = model.config.padded(shards.tp) != model.config
    with reading(f"The weights in {source.folder} cannot be read"):
        for name, parameter in model.named_parameters():
            if uneven:
                parameter.zero_()
            hosted = zip(shards.hosted, parameter, strict=True) if name in model.sharded else [(0, parameter)]
            for shard, values in hosted:
                for part, rows in _parts(model.config, shards.tp, shard, name, values):
                    for start, piece in source.chunks(part):
                        _fill(rows[start : start + len(piece)], piece, part.name, source.folder)


# ---------------------------------------------------------------- random weights


@torch.no_grad()
def randomize(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a usual scale, in place, for a tensor of this name: for timing, never for quality."""
    if name.endswith("bias"):
        return tensor.zero_()
    if "norm" in name:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, 1 / math.sqrt(tensor.shape[-1]), generator=generator)


def random_tensors(config: ModelConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """A checkpoint's tensors in bfloat16, which float32 holds exactly: those outside of blocks, then block by block."""
    generator = torch.Generator().manual_seed(seed)
    for _, some in groupby(hf_shapes(config).items(), lambda named: re.findall(r"layers\.(\d+)", named[0])):
        yield {name: randomize(name, torch.empty(shape, dtype=torch.bfloat16), generator) for name, shape in some}


# ---------------------------------------------------------------- writing


def write_weights(folder: Path, config: ModelConfig, pieces: Iterable[dict[str, Tensor]], is_main: bool = True) -> int:
    """One file for the tensors outside of blocks and one a block, with an index; gives the bytes of all tensors.

    `pieces` are those of the files: no more than one is held at a time. Where many processes make them, one writes.
    """
    places, size = {}, 0
    for number, tensors in enumerate(pieces, start=1):
        file = f"model-{number:05}-of-{config.num_blocks + 1:05}.safetensors"
        if is_main:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if is_main:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return size


def exported_config(model: Transformer) -> ModelConfig:
    """The model's shape, with the zeros in it where tp does not divide heads or neurons.

    Where a repair gave attention biases to some blocks, all get them, in place: of zero; a family whose folders have
    no room for them becomes LLaMA. Where shards' copies of a key/value head have come to differ, each becomes a head.
    """
    config, tp = model.config, model.shards.tp
    found = config.padded(tp)
    if any(block.attention.out.bias is not None for block in model.blocks):
        family = found.family if found.form.out_bias else "llama"
        found = replace(found, attention_bias=True, family=family, sliding_window=None)
        for block in model.blocks:
            block.attention.add_biases()
    copied = config.shares_kv_heads(tp) and tp > config.num_kv_heads
    if copied and not all(_copies_agree(model, i) for i in range(config.num_blocks)):
        found = replace(found, num_kv_heads=tp)
    return _loadable(found, config, tp)


def _loadable(found: ModelConfig, config: ModelConfig, tp: int) -> ModelConfig:
    """A shape that transformers takes, with more zeros where its class wants a hidden size that the heads divide.

    OPT's wants as many heads as there were. A LLaMA that has too many zeros can be called Mistral, if without biases.
    """
    width, heads = found.hidden_size, found.num_heads
    if found.family == "llama" and width % heads:
        more = next((n for n in range(heads, width + 1, tp) if width % n == 0), None)
        if more is not None and not config.shares_kv_heads(tp):
            return replace(found, num_heads=more, num_kv_heads=more)
        if not (found.attention_bias or found.mlp_bias):
            return replace(found, family="mistral")
    if (found.family == "llama" and width % heads) or (found.family == "opt" and heads != config.num_heads):
        raise SPDError(
            f"The shards of tp={tp} cannot be exported: no {found.form.label} folder of hidden size {width} holds "
            f"their {heads} heads for transformers; choose a degree that divides {config.num_heads} heads."
        )
    return found


def _copies_agree(model: Transformer, block: int) -> bool:
    attention, config = model.blocks[block].attention, model.config
    queries, copies = attention.h * attention.head_dim, model.shards.tp // config.num_kv_heads
    for parameter in attention.qkv.parameters():
        keys_values = model.shards.gather(parameter.data)[:, queries:].unflatten(0, (-1, copies))
        if not (keys_values == keys_values[:, :1]).all():
            return False
    return True


def dense_tensors(model: Transformer, config: ModelConfig) -> Iterator[dict[str, Tensor]]:
    """The checkpoint that the shards make up together, in the pieces that `write_weights` wants.

    On the host of process 0; elsewhere without contents.
    """
    shapes, outside = hf_shapes(config), {n: p for n, p in model.named_parameters() if not n.startswith("blocks.")}
    for parameters in (outside, *(block_parameters(model, i) for i in range(config.num_blocks))):
        found = {}
        for name, parameter in parameters.items():
            values = _of_all_shards(model, name, parameter)
            if ".attention." in name and name in model.sharded:
                values = _with_room(model, config, values, dim=2 if ".out." in name else 1)
            for shard, own in enumerate(values if name in model.sharded else values[None]):
                for part, rows in _parts(config, model.shards.tp, shard, name, own):
                    whole = torch.empty(shapes[part.name], dtype=rows.dtype, device=rows.device)
                    target = found.setdefault(part.name, whole)
                    part.of(target).copy_(rows)
        yield found


def _with_room(model: Transformer, config: ModelConfig, values: Tensor, dim: int) -> Tensor:
    """Queries, keys and values, or what the output projection reads, of as many heads a shard as `config` has."""
    more = config.num_heads // model.shards.tp - model.config.heads_per_shard(model.shards.tp)
    if not more:
        return values
    parts = values.chunk(3 if dim == 1 else 1, dim)  # of equally many heads: each query head has its own copy
    shape = [more * config.head_dim if i == dim else size for i, size in enumerate(values.shape)]
    return torch.cat([piece for part in parts for piece in (part, values.new_zeros(shape))], dim)


def _of_all_shards(model: Transformer, name: str, parameter: Tensor) -> Tensor:
    """(tp, ...) where each shard has its own part, (...) where all have the same: on the host of process 0.

    It writes them; others get the shape alone. The devices gather a part at a time.
    """
    values, shards, sharded = parameter.detach(), model.shards, name in model.sharded
    if shards.world == 1 or (shards.rank == 0 and not sharded):
        return values.contiguous().cpu()
    shape = (shards.tp, *values.shape[1:]) if sharded else values.shape
    found = torch.empty(shape, dtype=values.dtype, device="meta" if shards.rank else "cpu")
    rows = max(1, shape[1] * GATHER_BYTES // found.nbytes) if sharded else 0
    for start in range(0, shape[1], rows) if sharded else ():
        gathered = shards.gather(values[:, start : start + rows])
        if shards.rank == 0:
            found[:, start : start + rows] = gathered
    return found


# ---------------------------------------------------------------- repaired weights


def block_parameters(model: Transformer, block: int) -> dict[str, Tensor]:
    prefix = f"blocks.{block}."
    return {name: p for name, p in model.named_parameters() if name.startswith(prefix)}


@torch.no_grad()
def changed_tensors(model: Transformer, block: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's parameters that differ on any shard from `before` (hosted parts), as `_of_all_shards` gives them."""
    found = {}
    for name, parameter in block_parameters(model, block).items():
        differs = torch.tensor([float(not torch.equal(parameter, before[name]))], device=parameter.device)
        if model.shards.all_reduce(differs, "repair").item():
            found[name] = _of_all_shards(model, name, parameter)
    return found


@torch.no_grad()
def load_changed(model: Transformer, path: Path, wanted: Callable[[str], bool] = bool) -> None:
    """Puts the tensors of a file written here into the model, those `wanted`, the hosted shards' parts alone.

    Raises:
        SPDError: an unreadable file, or tensors that this model and tp do not have.
    """
    shards = model.shards
    with reading(f"The repaired weights {path} cannot be read"), safe_open(regular(path, math.inf), "pt") as file:
        names = list(filter(wanted, file.keys()))
        for name in names:
            added = re.fullmatch(r"blocks\.(\d+)\.attention\.(qkv|out)\.bias", name)  # by a repair
            if added and int(added[1]) < len(model.blocks):
                model.blocks[int(added[1])].attention.add_biases()
        parameters = dict(model.named_parameters())
        for name in names:
            part, target, sharded = file.get_slice(name), parameters.get(name), name in model.sharded
            expected = None if target is None else [*([shards.tp] if sharded else []), *target.shape[sharded:]]
            if part.get_shape() != expected:
                raise SPDError(f"{path} does not fit this model and tp={shards.tp}: {name} is {part.get_shape()}.")
            _check_dtype(name, part.get_dtype(), path)
            _fill(target, part[shards.hosted.start : shards.hosted.stop] if sharded else part[:], name, path)
