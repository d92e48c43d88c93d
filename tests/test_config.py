import json
from dataclasses import asdict

import pytest
import torch
from conftest import hf_config
from transformers import LlamaConfig

from spd.comm import Shards
from spd.config import SHAPES, ModelConfig, named_shape
from spd.errors import SPDError
from spd.pretrained import build

# Parameters as the models' own pages and papers give them.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_builds(name):
    config = named_shape(name)
    with torch.device("meta"):
        from spd.model import Transformer

        model = Transformer(config, Shards(1))
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
    assert config.parameters() == PUBLISHED.get(name, config.parameters())
    assert 8 in config.degrees() or name == "llama-125m"


def test_published_shapes_are_all_there():
    assert set(PUBLISHED) <= set(SHAPES)


def test_parameter_count_with_biases():
    config = ModelConfig.from_hf(hf_config(attention_bias=True, mlp_bias=True, num_key_value_heads=4).to_dict())
    model = build(config, Shards(1), torch.float32, "cpu")
    assert sum(p.numel() for p in model.parameters()) == config.parameters()


def test_unknown_shape_lists_the_known():
    with pytest.raises(SPDError, match="Unknown shape 'llama9'; known: llama2-7b, llama2-13b"):
        named_shape("llama9")


def test_old_and_new_rope_keys_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling}
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | scaling}
    older = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling}
    frequencies = [ModelConfig.from_hf(source).rotary_frequencies()[0] for source in (new, old, older)]
    assert torch.equal(frequencies[0], frequencies[1]) and torch.equal(frequencies[0], frequencies[2])
    plain = ModelConfig.from_hf({"model_type": "llama", "rope_theta": 5e5})
    assert plain.rope["rope_theta"] == 5e5
    assert not torch.equal(frequencies[0], plain.rotary_frequencies()[0])


def test_round_trip_through_transformers():
    config = named_shape("llama3.1-8b")
    again = ModelConfig.from_hf(LlamaConfig(**config.to_hf().to_dict()).to_dict())
    assert again.rope == config.rope and again.parameters() == config.parameters()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "of type 'gpt2'; only LLaMA models and their like are supported: llama, mistral, qwen2",
        ),
        ({"model_type": None}, "of type 'None'; only LLaMA"),
        ({"hidden_act": "gelu"}, "Activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic' is not"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3"),
        ({"hidden_size": "wide"}, "not a valid LLaMA configuration"),
        ({"num_hidden_layers": 0}, "not a valid LLaMA configuration: num_hidden_layers: .* greater than 0"),
        ({"rms_norm_eps": -1.0}, "not a valid LLaMA configuration: rms_norm_eps: .* greater than 0"),
        ({"eos_token_id": ["</s>"]}, "not a valid LLaMA configuration"),
    ],
)
def test_foreign_configurations_are_refused(changes, message):
    with pytest.raises(SPDError, match=message):
        ModelConfig.from_hf(hf_config().to_dict() | changes)


def test_damaged_config_file(tmp_path):
    with pytest.raises(SPDError, match=r"holds no config\.json"):
        ModelConfig.from_folder(tmp_path)
    for damaged in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(SPDError, match="not valid JSON"):
            ModelConfig.from_folder(tmp_path)


def test_degrees_are_named():
    config = ModelConfig(512, 64, 172, 5, 8, 4, 8, 512)
    assert config.degrees() == range(1, 9)
    with pytest.raises(SPDError, match=r"tp=9 is impossible: the model has 8 query heads .* valid: 1 to 8\."):
        config.validate_tp(9)
    with pytest.raises(SPDError, match="tp=0 is impossible"):
        config.validate_tp(0)
    assert 16 in named_shape("llama2-70b").degrees()  # 8 key/value heads, each on two shards


def test_config_is_json():
    json.dumps(asdict(named_shape("llama3.2-1b")))
