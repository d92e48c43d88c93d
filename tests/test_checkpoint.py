"""Slicing is a pure function of (configuration, tp, shard, parameter); damage is said in words."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from conftest import VARIANTS, hf_config, random_model
from safetensors.torch import load_file, save_file

from spd import SPDModel
from spd.checkpoint import CHUNK_BYTES, Checkpoint, Slice, shard_slices
from spd.comm import Shards
from spd.config import ModelConfig, hf_shapes
from spd.errors import SPDError
from spd.pretrained import resolve
from spd.records import load_records
from spd.tiny import MODEL_DIR

RECORDS = Path(__file__).parents[1] / "experiments" / "records"
CONFIG = ModelConfig.from_hf(hf_config(num_key_value_heads=4).to_dict())  # 8 heads of 4, MLP of 64


def test_slices_by_hand():
    attention = "model.layers.1.self_attn."
    assert shard_slices(CONFIG, 2, 1, "blocks.1.attention.qkv.weight") == [
        Slice(attention + "q_proj.weight", 0, 16, 32),
        Slice(attention + "k_proj.weight", 0, 8, 16),
        Slice(attention + "v_proj.weight", 0, 8, 16),
    ]
    assert shard_slices(CONFIG, 2, 1, "blocks.1.attention.out.weight") == [
        Slice(attention + "o_proj.weight", 1, 16, 32)
    ]
    assert shard_slices(CONFIG, 2, 1, "blocks.1.attention.out.bias") == [Slice(attention + "o_proj.bias")]
    assert shard_slices(CONFIG, 4, 3, "blocks.0.mlp.gate_up.bias") == [
        Slice("model.layers.0.mlp.gate_proj.bias", 0, 48, 64),
        Slice("model.layers.0.mlp.up_proj.bias", 0, 48, 64),
    ]
    assert shard_slices(CONFIG, 4, 3, "blocks.0.mlp.down.weight") == [
        Slice("model.layers.0.mlp.down_proj.weight", 1, 48, 64)
    ]
    assert shard_slices(CONFIG, 4, 3, "embedding.weight") == [Slice("model.embed_tokens.weight")]


def test_replicated_key_value_heads():
    """At tp=8 four key/value heads are shared by neighbours: shards 2 and 3 both hold head 1."""
    for shard in (2, 3):
        _, k, _ = shard_slices(CONFIG, 8, shard, "blocks.0.attention.qkv.weight")
        assert (k.start, k.stop) == (4, 8)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("variant", ["plain", "all-biases", "tied"])
def test_slices_cover_every_tensor_once(variant, tp):
    config = ModelConfig.from_hf(hf_config(**VARIANTS[variant]).to_dict())
    with torch.device("meta"):
        from spd.model import Transformer

        names = [name for name, _ in Transformer(config, Shards(tp)).named_parameters()]
    covered = {name: torch.zeros(shape) for name, shape in hf_shapes(config).items()}
    for shard in range(tp):
        for part in (part for name in names for part in shard_slices(config, tp, shard, name)):
            target = covered[part.name]
            if part.dim is None:
                target += shard == 0  # replicated: counted once
            else:
                part.of(target).add_(1)
    assert all(bool((count == 1).all()) for count in covered.values())


def test_one_file_or_many(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one, many = SPDModel.from_pretrained(plain, tp=2), SPDModel.from_pretrained(tmp_path, tp=2)
    assert one.fingerprint == many.fingerprint
    for a, b in zip(one.transformer.parameters(), many.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
    for wrong in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": null}}'):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(SPDError, match="is not a valid safetensors index"):
            SPDModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SPDError, match="1 of 3 weight files are missing in .*: model-00002-of-00003.safetensors"):
        SPDModel.from_pretrained(tmp_path)


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "copy")


def test_truncated_file(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(SPDError, match=rf"{len(whole) - 100:,} bytes\) is truncated .*not fully covered"):
        SPDModel.from_pretrained(copy)
    for damaged in (whole[:50], b"", b"\x10" + bytes(7) + b"not json at all!" + bytes(100)):
        file.write_bytes(damaged)
        with pytest.raises(SPDError, match=rf"\({len(damaged):,} bytes\) is truncated or not a safetensors file"):
            SPDModel.from_pretrained(copy)


def test_wrong_shape_missing_tensor_no_safetensors(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:, :31].contiguous()}, copy / "model.safetensors")
    with pytest.raises(SPDError, match=rf"{name} in .* has shape \(64, 31\), its configuration asks for \(64, 32\)"):
        SPDModel.from_pretrained(copy)
    save_file({k: v for k, v in tensors.items() if k != name}, copy / "model.safetensors")
    with pytest.raises(SPDError, match=rf"1 of \d+ tensors are missing in .*: {name}"):
        SPDModel.from_pretrained(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(SPDError, match="only safetensors checkpoints are read"):
        SPDModel.from_pretrained(copy)


def test_fingerprint_follows_the_content(plain, copy):
    def fingerprint(folder):
        return Checkpoint(folder).fingerprint()

    assert fingerprint(copy) == fingerprint(plain)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert fingerprint(copy) != fingerprint(plain)


def test_fingerprints_are_those_of_committed_records():
    models = [record["model"] for record in load_records([RECORDS]) if record.get("model")]
    assert {m["fingerprint"] for m in models if m["name"] == "spd-tiny"} == {Checkpoint(MODEL_DIR).fingerprint()}


def test_other_dtypes_are_converted(copy):
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    weight = SPDModel.from_pretrained(copy).transformer.norm.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, tensors["model.norm.weight"].float())


def test_a_process_reads_only_its_shards(tmp_path, monkeypatch):
    """Hosting one shard of eight allocates its weights; what is read at once stays under the largest tensor."""
    random_model(tmp_path, vocab_size=64, hidden_size=512, intermediate_size=16384, num_hidden_layers=1)  # 100 MB
    config = ModelConfig.from_folder(tmp_path)
    read, chunks = [], Checkpoint.chunks

    def watched(self, part):
        for offset, piece in chunks(self, part):
            read.append(piece.numel() * piece.element_size())
            yield offset, piece

    monkeypatch.setattr(Checkpoint, "chunks", watched)
    SPDModel.from_pretrained(tmp_path, shards=Shards(8, rank=0, world=8))  # import and warm everything first
    read.clear()
    before = _anonymous_bytes()
    hosted = SPDModel.from_pretrained(tmp_path, shards=Shards(8, rank=3, world=8)).transformer
    weights = sum(p.numel() * p.element_size() for p in hosted.parameters())
    largest = 4 * max(torch.Size(shape).numel() for shape in hf_shapes(config).values())
    assert sum(read) == weights < config.parameters()  # a quarter of all bytes would be two shards of eight
    assert max(read) <= CHUNK_BYTES < largest
    assert _anonymous_bytes() - before < weights + largest


def _anonymous_bytes() -> int:
    """Resident memory without the pages of files, which the kernel may take back at any time."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def test_model_names(plain, monkeypatch):
    assert resolve(plain) == plain
    assert (resolve("spd-tiny") / "config.json").exists()
    with pytest.raises(SPDError, match="There is no model folder ./nothing/here"):
        resolve("./nothing/here")
    with pytest.raises(SPDError, match="neither a folder nor in the local cache"):
        resolve("nobody/nothing")  # the tests run offline
