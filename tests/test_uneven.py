"""Degrees that divide neither heads nor neurons: zeros in the shards' free places, exactly, whatever is repaired."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import hf_config, random_model, with_tokenizer
from oracle import spd_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spd import Plan, SPDModel
from spd.checkpoint import Slice, shard_slices
from spd.comm import Shards
from spd.config import SHAPES, ModelConfig
from spd.distill import distill, recipe_named
from spd.errors import SPDError
from spd.launch import Runtime, spawn
from spd.layout import permute_heads
from spd.machines import Pass

SHAPE = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 50, "head_dim": 8}
BIASED = SHAPE | {"attention_bias": True, "mlp_bias": True}
CONFIG = ModelConfig.from_hf(hf_config(**SHAPE).to_dict())
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
LETTERS = "DF FF DF", "DD FD DF"


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """Nine query heads of 8, three key/value heads, 50 neurons; biases everywhere."""
    folder = tmp_path_factory.mktemp("nine") / "model"
    return folder, with_tokenizer(folder, random_model(folder, **BIASED))


def test_shares_by_hand():
    assert [list(CONFIG.heads_of(4, j)) for j in range(4)] == [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    assert [CONFIG.neurons_of(4, j) for j in range(4)] == [range(13), range(13, 26), range(26, 38), range(38, 50)]
    assert CONFIG.kv_heads_of(4, 2) == [range(1, 2), range(2, 3)]  # query heads 5 and 6
    assert CONFIG.kv_heads_of(3, 2) == [range(2, 3)]  # a whole group: its key/value head once
    assert (CONFIG.heads_per_shard(4), CONFIG.kv_heads_per_shard(4), CONFIG.neurons_per_shard(4)) == (3, 3, 13)
    assert (CONFIG.heads_per_shard(3), CONFIG.kv_heads_per_shard(3), CONFIG.neurons_per_shard(3)) == (3, 1, 17)
    assert CONFIG.padded(4) == replace(CONFIG, num_heads=12, num_kv_heads=12, intermediate_size=52)
    assert CONFIG.padded(1) == CONFIG
    halves = ModelConfig.from_hf(
        hf_config(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, head_dim=8).to_dict()
    )
    assert halves.kv_heads_of(2, 1) == [range(1, 2), range(2, 3), range(2, 3)]  # heads 3, 4, 5: their groups are uneven


@pytest.mark.parametrize("tp", range(1, 10))
def test_shares_are_those_of_tensor_split(tp):
    for j in range(tp):
        assert list(CONFIG.heads_of(tp, j)) == torch.tensor_split(torch.arange(9), tp)[j].tolist()
        assert list(CONFIG.neurons_of(tp, j)) == torch.tensor_split(torch.arange(50), tp)[j].tolist()


def test_slices_by_hand():
    attention = "model.layers.0.self_attn."
    assert shard_slices(CONFIG, 4, 2, "blocks.0.attention.qkv.weight") == [
        Slice(attention + "q_proj.weight", 0, 40, 56, zeros=8),
        Slice(attention + "k_proj.weight", 0, 8, 16),
        Slice(attention + "k_proj.weight", 0, 16, 24, zeros=8),
        Slice(attention + "v_proj.weight", 0, 8, 16),
        Slice(attention + "v_proj.weight", 0, 16, 24, zeros=8),
    ]
    assert shard_slices(CONFIG, 4, 2, "blocks.0.attention.out.weight") == [
        Slice(attention + "o_proj.weight", 1, 40, 56, zeros=8)
    ]
    assert shard_slices(CONFIG, 4, 3, "blocks.0.mlp.down.weight") == [
        Slice("model.layers.0.mlp.down_proj.weight", 1, 38, 50, zeros=1)
    ]


@pytest.mark.parametrize("tp", [2, 3, 4, 5, 6, 7, 8, 9])
def test_nothing_dropped_is_one_shard_and_spd_is_the_oracle(nine, tp):
    folder, reference = nine
    model = SPDModel.from_pretrained(folder, tp=tp)
    one = SPDModel.from_pretrained(folder).transformer
    with torch.no_grad():
        torch.testing.assert_close(model.transformer(TOKENS), one(TOKENS), rtol=0, atol=2e-5)
        for letters in LETTERS:
            model.plan = Plan.from_letters(letters)
            expected = spd_logits(reference, TOKENS, tp, letters)
            torch.testing.assert_close(model.transformer(TOKENS), expected, rtol=0, atol=1e-4)
            cache = model.transformer.new_cache(2, 20)
            pieces = [model.transformer(piece, cache) for piece in TOKENS.split([13, 5, 1, 1], dim=1)]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-4)
            assert (expected - one(TOKENS)).abs().max() > 0.1


def test_the_oracle_without_a_drop_is_transformers_own(nine):
    reference = nine[1]
    with torch.no_grad():
        torch.testing.assert_close(spd_logits(reference, TOKENS, 4, "FF FF FF"), reference(TOKENS).logits)


def logits_of(runtime: Runtime, folder: str, tp: int) -> dict:
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(tp))
    found = {}
    for letters in LETTERS:
        model.plan = Plan.from_letters(letters)
        with torch.no_grad():
            found[letters] = model.transformer(TOKENS).tolist()
    return found


def test_two_processes_equal_one(nine):
    alone, together = logits_of(Runtime(), str(nine[0]), 4), spawn(2, logits_of, str(nine[0]), 4)
    for letters in LETTERS:
        both = torch.tensor(together[letters]), torch.tensor(alone[letters])
        torch.testing.assert_close(*both, rtol=0, atol=2e-5)


def test_what_cannot_be_is_said():
    assert CONFIG.degrees() == range(1, 10)
    with pytest.raises(SPDError, match="tp=10 is impossible: the model has 9 query heads and 50 MLP neurons .* 1 to 9"):
        CONFIG.validate_tp(10)
    with pytest.raises(SPDError, match="tp=0 is impossible"):
        CONFIG.validate_tp(0)
    few = replace(CONFIG, intermediate_size=4)
    with pytest.raises(SPDError, match="4 MLP neurons to share out; valid: 1 to 4"):
        few.validate_tp(5)


def test_padding_is_counted_and_said():
    assert CONFIG.padding_note(1) is None
    assert all(SHAPES["llama2-70b"].padding_note(tp) is None for tp in (1, 2, 4, 8, 16, 32, 64))
    more = CONFIG.padded(4).parameters() / CONFIG.parameters() - 1
    assert f"{more:.1%} more weights" in CONFIG.padding_note(4) and more > 0.2
    model = SPDModel.random(CONFIG, "nine", Shards(4)).transformer
    held = sum(p.numel() for p in model.parameters())
    assert held == CONFIG.padded(4).parameters()
    cache = model.new_cache(1, 10)
    assert [held.shape for held in (*cache.keys, *cache.values)] == [(4, 1, 3, 10, 8)] * 6
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.0.") and p.dim() == 3)
    counted = sum(operator.work.weight_byte for operator in Pass(CONFIG, 4, element_size=1).block())
    assert 4 * counted == matrices  # what the first shard reads, on each of four


# ---------------------------------------------------------------- exported


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(2, 12, 12), (3, 9, 3), (4, 12, 12), (6, 12, 12)])
def test_exported_folder_is_a_model_of_transformers(nine, tmp_path, tp, heads, kv_heads):
    """At tp=2 there are ten heads' room, and transformers wants 36 to be a multiple of them."""
    model = SPDModel.from_pretrained(nine[0], tp=tp)
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_attention_heads"], written["num_key_value_heads"]) == (heads, kv_heads)
    assert (written["head_dim"], written["intermediate_size"]) == (8, tp * -(-50 // tp))
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again = SPDModel.from_pretrained(tmp_path / "out", tp=tp)
    with torch.no_grad():
        torch.testing.assert_close(there(TOKENS).logits, model.transformer(TOKENS), rtol=0, atol=2e-5)
        model.plan = again.plan = Plan.from_letters("DF DF DF")  # the same shards
        torch.testing.assert_close(again.transformer(TOKENS), model.transformer(TOKENS), rtol=0, atol=2e-5)


def test_a_degree_whose_heads_no_folder_can_hold(nine, tmp_path):
    with pytest.raises(SPDError, match="tp=5 cannot be exported: .* hidden size 36 holds .* 10 heads .*divides 9"):
        SPDModel.from_pretrained(nine[0], tp=5).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- after repairs


def free_places(model) -> dict[str, torch.Tensor]:
    """The parts of every parameter that stand where a shard has no head or neuron, counted by hand."""
    config, tp, d, found = model.config, model.tp, model.config.head_dim, {}
    for i, block in enumerate(model.transformer.blocks):
        h, n = block.attention.h, block.mlp.down.weight.shape[2]
        for j in range(tp):
            heads, neurons = (len(torch.tensor_split(torch.arange(count), tp)[j]) for count in (9, 50))
            assert (config.num_heads, config.intermediate_size) == (9, 50)
            for kind in ("weight", "bias"):
                qkv, gate_up = getattr(block.attention.qkv, kind), getattr(block.mlp.gate_up, kind)
                if qkv is not None and block.attention.g == h:
                    found[f"{i} {j} qkv {kind}"] = qkv[j].unflatten(0, (3, h, d))[:, heads:]
                if gate_up is not None:
                    found[f"{i} {j} gate_up {kind}"] = gate_up[j].unflatten(0, (2, n))[:, neurons:]
            found[f"{i} {j} out"] = block.attention.out.weight[j].unflatten(1, (h, d))[:, heads:]
            found[f"{i} {j} down"] = block.mlp.down.weight[j][:, neurons:]
    return found


def repaired(folder, out, recipe: str, tp: int, classes=None, **changes) -> tuple[SPDModel, dict]:
    model = SPDModel.from_pretrained(folder, tp=tp)
    document = {"policies": [["drop", "full"], ["full", "full"], ["drop", "full"]]}
    document |= {"model": model.describe(), "tp": tp} | ({"classes": classes} if classes else {})
    windows = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(2))
    return model, distill(model, windows, document, recipe_named(recipe, **changes), out)


@pytest.mark.parametrize("tp", [2, 4, 5])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("closed-form", {}), ("b2b+hg", {"epochs": 2}), ("best", {"epochs": 2, "joint_epochs": 2, "generated": 2})],
)
def test_free_places_stay_zero_through_repairs(nine, tmp_path, recipe, changes, tp):
    """And the changed tensors on disk give the repaired model again."""
    changes |= {"learning_rate": 1e-3} if recipe == "b2b+hg" else {}
    model, result = repaired(nine[0], tmp_path / "out", recipe, tp, **changes)
    assert [bool(block["note"]) for block in result["blocks"]] == [False] * 3, result["blocks"]
    assert result["blocks"][0]["loss_after"] < result["blocks"][0]["loss_before"]
    free = free_places(model)
    assert sum(place.numel() for place in free.values()) > 0
    assert not [name for name, place in free.items() if place.any()]
    again = SPDModel.from_pretrained(nine[0], tp=tp)
    again.load_plan(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.transformer(TOKENS), model.transformer(TOKENS))


def test_heads_stay_where_groups_are_uneven_and_say_so(nine, tmp_path):
    model, result = repaired(nine[0], tmp_path / "out", "b2b+hg", 4, epochs=1)
    grouping = result["blocks"][0]["grouping"]
    assert grouping["order"] is None and "3 key/value heads are copied" in grouping["note"]
    with pytest.raises(SPDError, match="cannot be reordered at tp=4"):
        permute_heads(model.transformer.blocks[0], range(3), model.transformer.shards, model.config)
    _, result = repaired(nine[0], tmp_path / "two", "b2b+hg", 2, epochs=1)
    assert "3 key/value groups are not shared out evenly to 2" in result["blocks"][0]["grouping"]["note"]
    even, result = repaired(nine[0], tmp_path / "even", "b2b+hg", 3, epochs=1)  # only the neurons are uneven
    assert sorted(result["blocks"][0]["grouping"]["order"]) == [0, 1, 2]
    assert not any(place.any() for place in free_places(even).values())


def test_exported_repair_is_the_repaired_model(nine, tmp_path):
    repaired(nine[0], tmp_path / "repair", "closed-form", 4)
    model = SPDModel.from_pretrained(nine[0], tp=4)
    model.load_plan(tmp_path / "repair")
    model.save_pretrained(tmp_path / "out")
    again = SPDModel.from_pretrained(tmp_path / "out", tp=4)
    again.load_plan(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.transformer(TOKENS), model.transformer(TOKENS))
    up = load_file(tmp_path / "out" / "model-00002-of-00004.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not up.view(4, 13, 36)[2:, 12].any() and up.view(4, 13, 36)[:2, 12].any()
