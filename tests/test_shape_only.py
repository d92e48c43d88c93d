"""Checkpoints of a true shape with random weights: they load, are cut, and say what they are."""

import json

import pytest
from shape_only import write_shape_only

from spd.checkpoint import Checkpoint
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.pretrained import SPDModel, mark_of

SMALL = ModelConfig(2048, 64, 96, 6, 8, 2, 8, 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "model"
    write_shape_only(SMALL, 2, path)
    return path


def test_it_loads_and_is_marked_wherever_its_name_goes(folder):
    model = SPDModel.from_pretrained(folder, tp=2)
    assert (model.config.num_blocks, model.config.num_kv_heads, model.config.vocab_size) == (2, 2, 2048)
    assert mark_of(folder) == model.describe()["shape_only"]
    assert mark_of(folder) | {"name": ""} == {"shape": "custom", "blocks": 2, "of": 6, "name": ""}
    assert model.describe()["name"] == "custom, shape only: 2 of 6 blocks, random weights"
    assert {tensor.get_dtype() for tensor in Checkpoint(folder).tensors.values()} == {"BF16"}
    weight = model.transformer.blocks[0].mlp.down.weight
    assert 0.8 < weight.std().item() * 96**0.5 < 1.2
    assert model.generate("The first", 4)[0]


def test_transformers_loads_it_too(folder):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.num_hidden_layers == 2


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    write_shape_only(SMALL, 2, tmp_path / "again")
    assert Checkpoint(tmp_path / "again").fingerprint() == Checkpoint(folder).fingerprint()


def test_impossible_ones_are_refused_and_leave_nothing(folder, tmp_path):
    with pytest.raises(SPDError, match="has 80 blocks and cannot be cut to 81"):
        write_shape_only("llama2-70b", 81, tmp_path / "m")
    with pytest.raises(SPDError, match="is there already"):
        write_shape_only(SMALL, 2, folder)
    with pytest.raises(SPDError, match="needs a vocabulary"):
        write_shape_only(ModelConfig(100, 64, 96, 6, 8, 2, 8, 256), 2, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
