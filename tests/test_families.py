"""Families by configuration: parity with transformers, sync-point drop against an oracle, repairs and exports."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import hf_config, with_tokenizer
from oracle import spd_logits
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from spd import Plan, SPDModel, pretrained
from spd.config import FAMILIES, SHAPES, ModelConfig
from spd.distill import distill, recipe_named
from spd.engines import Compiled
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.launch import Runtime, spawn

SHAPE = dict(vocab_size=96, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=3, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)  # fmt: skip
OPT_SHAPE = {name: SHAPE[name] for name in SHAPE if name not in ("intermediate_size", "num_key_value_heads")}
CONFIGS = {
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=48),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "opt": OPTConfig(**OPT_SHAPE, ffn_dim=50, pad_token_id=0),
}
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
DROPPED = [["drop", "full"], ["full", "full"], ["drop", "full"]]
CLOSE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Family name -> (folder, transformers model): every parameter random, biases and norms too."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    kind = "norm" in parameter_name and parameter_name.endswith("weight")
                    parameter.normal_(1.0 if kind else 0.0, 0.2)
            folder = tmp_path_factory.mktemp(name) / name
            model.save_pretrained(folder)
            made[name] = folder, with_tokenizer(folder, model)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def tokenizer_of_words(monkeypatch):
    """As it lies in the folder: for a Qwen2 transformers takes the class of Qwen2's own, whatever lies there."""
    monkeypatch.setattr(pretrained, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)


@torch.no_grad()
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_transformers(families, family, tp):
    """A batch of two at once and in pieces through the cache."""
    folder, reference = families(family)
    model = SPDModel.from_pretrained(folder, tp=tp).transformer
    expected = reference(TOKENS).logits
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
    cache = model.new_cache(2, 20)
    pieces = torch.cat([model(piece, cache) for piece in TOKENS.split([13, 5, 1, 1], dim=1)], 1)
    torch.testing.assert_close(pieces, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_nothing(families, family):
    folder, reference = families(family)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :7] = False
    expected = reference(TOKENS, attention_mask=valid.long()).logits
    for tp in (1, 4):
        padded = SPDModel.from_pretrained(folder, tp=tp).transformer(TOKENS, valid=valid)
        torch.testing.assert_close(padded[0], expected[0], **CLOSE)
        torch.testing.assert_close(padded[1, 7:], expected[1, 7:], **CLOSE)
        torch.testing.assert_close(padded[1, 7:], reference(TOKENS[1:, 7:]).logits[0], **CLOSE)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_batch_equals_transformers(families, family):
    folder, reference = families(family)
    for tp in (2, 4):
        model = SPDModel.from_pretrained(folder, tp=tp)
        prompts = ["t5 t6 t7 t8 t9", "t11 t12"]
        for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=12), strict=True):
            ids = model.tokenizer(prompt, return_tensors="pt").input_ids
            theirs = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert row == theirs[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_spd_is_the_oracle(families, family, tp):
    folder, reference = families(family)
    model = SPDModel.from_pretrained(folder, tp=tp)
    for letters in ("DF FF DF", "DD FD DF"):
        model.plan = Plan.from_letters(letters)
        expected = spd_logits(reference, TOKENS, tp, letters)
        torch.testing.assert_close(model.transformer(TOKENS), expected, **CLOSE)
        assert (expected - reference(TOKENS).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("tp", [2, 4])
def test_spd_on_opt_is_the_papers_equation(families, tp):
    """x + b + sum_i P_i + c + sum_i Z_i, where Z_i saw x + b + P_i: output biases once, on the part all share."""
    folder, reference = families("opt")
    model = SPDModel.from_pretrained(folder, tp=tp, plan=Plan.from_letters("DF DF DF")).transformer
    decoder = reference.model.decoder
    x = decoder.embed_tokens(TOKENS) + decoder.embed_positions.weight[2:22]
    split = [torch.tensor_split(torch.arange(count), tp) for count in (6, 50)]
    for layer in decoder.layers:
        caught = []
        hook = layer.self_attn.out_proj.register_forward_pre_hook(lambda _, inputs, c=caught: c.append(inputs[0]))
        layer.self_attn(layer.self_attn_layer_norm(x))
        hook.remove()
        heads, out = caught[0].unflatten(-1, (6, 6)), layer.self_attn.out_proj
        after = x + out.bias + layer.fc2.bias
        for mine, neurons in zip(*split, strict=True):
            p = heads[:, :, mine].flatten(2) @ out.weight.unflatten(1, (6, 6))[:, mine].flatten(1).T
            seen = layer.final_layer_norm(x + out.bias + p)
            z = torch.relu(seen @ layer.fc1.weight[neurons].T + layer.fc1.bias[neurons])
            after = after + p + z @ layer.fc2.weight[:, neurons].T
        x = after
    expected = reference.lm_head(decoder.final_layer_norm(x))
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
    assert (expected - reference(TOKENS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_the_command_gives_transformers_loss(families, family, spd, text_of_words):
    folder, reference = families(family)
    code, result, err = spd("eval", "--model", folder, "--tp", 4, "--text", text_of_words, "--seq-len", 20)
    assert code == 0, err
    model = SPDModel.from_pretrained(folder)
    ids = torch.tensor(model.tokenizer(text_of_words.read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 20 * 20].view(-1, 20)
    with torch.no_grad():
        losses = [reference(window[None], labels=window[None]).loss.item() for window in windows]
    assert result["nats"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_compiled_decoding_is_the_eager_one(families, family):
    """Positions and norms of heads by a length that is data."""
    model = SPDModel.from_pretrained(families(family)[0], tp=2).transformer
    prompt = TOKENS[:1, :9]
    engine, tokens = Compiled(model, prompt, 3, backend="eager"), prompt
    engine.prefill()
    for _ in range(3):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
        assert engine.token.item() == tokens[0, -1]
        engine.decode()


def learnt(runtime: Runtime, folder: str, out: str) -> dict:
    """Logits with dropped syncs, of a model that was distilled on these processes, and its norms."""
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(4))
    document = {"policies": DROPPED, "model": model.describe(), "tp": 4}
    windows = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(2))
    distill(model, windows, document, recipe_named("b2b", epochs=1, learning_rate=1e-3), Path(out), runtime.is_main)
    norms = [p.tolist() for name, p in model.transformer.named_parameters() if "norm" in name]
    with torch.no_grad():
        return {"logits": model.transformer(TOKENS).tolist(), "norms": norms}


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_two_processes_equal_one(families, family, tmp_path):
    """Uneven shards, gradients of norms that all shards share, biases added once."""
    folder = str(families(family)[0])
    alone = learnt(Runtime(), folder, str(tmp_path / "one"))
    together = spawn(2, learnt, folder, str(tmp_path / "two"))
    for kind in alone:
        for mine, theirs in zip(alone[kind], together[kind], strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- repairs and exports


def repaired(folder, out, recipe: str, tp: int, **changes) -> SPDModel:
    model = SPDModel.from_pretrained(folder, tp=tp)
    document = {"policies": DROPPED, "model": model.describe(), "tp": tp}
    windows = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(2))
    result = distill(model, windows, document, recipe_named(recipe, **changes), out)
    assert [block["note"] for block in result["blocks"]] == [None] * 3
    assert result["blocks"][0]["loss_after"] < result["blocks"][0]["loss_before"]
    return model


@pytest.mark.parametrize(
    ("family", "tp", "written"),
    [("mistral", 4, "llama"), ("qwen2", 3, "llama"), ("qwen3", 4, "qwen3"), ("opt", 3, "opt")],
)
def test_repairs_and_their_exports(families, tmp_path, family, tp, written):
    """Biases that the closed form adds are exported as LLaMA's where the family's folders have no room for them."""
    folder = families(family)[0]
    model = repaired(folder, tmp_path / "repair", "best", tp, epochs=1, joint_epochs=1, generated=2)
    again = SPDModel.from_pretrained(folder, tp=tp)
    again.load_plan(tmp_path / "repair")
    model.save_pretrained(tmp_path / "out")
    exported = SPDModel.from_pretrained(tmp_path / "out", tp=tp)
    exported.load_plan(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"] == written and "sliding_window" not in config) or written == family
    with torch.no_grad():
        expected = model.transformer(TOKENS)
        torch.testing.assert_close(again.transformer(TOKENS), expected, rtol=0, atol=0)
        torch.testing.assert_close(exported.transformer(TOKENS), expected, rtol=0, atol=2e-5)
        model.plan = Plan.full(3)
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(there(TOKENS).logits, model.transformer(TOKENS), **CLOSE)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_uneven_exports_keep_the_family(families, tmp_path, family):
    model = SPDModel.from_pretrained(families(family)[0], tp=4)
    model.save_pretrained(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert there.config.model_type == family and there.config.num_attention_heads == 8
    with torch.no_grad():
        torch.testing.assert_close(there(TOKENS).logits, model.transformer(TOKENS), **CLOSE)


def test_opt_has_no_room_for_more_heads(families, tmp_path):
    with pytest.raises(SPDError, match="no OPT folder of hidden size 36 holds their 8 heads"):
        SPDModel.from_pretrained(families("opt")[0], tp=4).save_pretrained(tmp_path / "out")


def test_free_places_of_opt_stay_zero(families, tmp_path):
    model = repaired(families("opt")[0], tmp_path / "out", "best", 4, epochs=1, joint_epochs=1, generated=2)
    for block in model.transformer.blocks:
        assert block.mlp.gate_up.weight.shape[1] == 13
        for shard in (2, 3):  # 13, 13, 12 and 12 neurons; 2, 2, 1 and 1 heads of 6
            assert not block.mlp.gate_up.weight[shard, 12].any() and not block.mlp.gate_up.bias[shard, 12].any()
            assert not block.mlp.down.weight[shard, :, 12].any()
            assert not block.attention.out.weight[shard, :, 6:].any()
            assert not block.attention.qkv.bias[shard].unflatten(0, (3, 2, 6))[:, 1].any()


# ---------------------------------------------------------------- what is refused


def test_a_sliding_window_never_slides(families, spd, text_of_words, tmp_path):
    folder, reference = families("mistral")
    model = SPDModel.from_pretrained(folder)
    assert model.config.max_positions == model.config.sliding_window == 48
    tokens = torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.transformer(tokens), reference(tokens).logits, **CLOSE)
    assert perplexity(model.transformer, tokens)["perplexity"] > 1
    code, _, err = spd("eval", "--model", folder, "--text", text_of_words, "--seq-len", 49)
    assert code == 1 and "49 tokens exceed the model's sliding window of 48" in err
    with pytest.raises(SPDError, match="sliding window of 48"):
        model.generate("t5 t6", 47)
    unused = ModelConfig.from_hf(CONFIGS["qwen2"].to_dict() | {"sliding_window": 8})
    assert unused.sliding_window is None and unused.max_positions == 64
    used = CONFIGS["qwen2"].to_dict() | {"sliding_window": 8, "use_sliding_window": True, "layer_types": None}
    assert ModelConfig.from_hf(used).max_positions == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_layer_norm_before": False}, "as OPT-350M does"),
        ({"word_embed_proj_dim": 18}, "as OPT-350M does"),
        ({"_remove_final_layer_norm": True}, "as OPT-350M does"),
        ({"layer_norm_elementwise_affine": False}, "as OPT-350M does"),
        ({"activation_function": "gelu"}, "Activation 'gelu' is not OPT's; only 'relu'"),
        ({"ffn_dim": 0}, "not a valid OPT configuration: ffn_dim: .* greater than 0"),
    ],
)
def test_other_forms_of_opt_are_refused(changes, message):
    with pytest.raises(SPDError, match=message):
        ModelConfig.from_hf(CONFIGS["opt"].to_dict() | changes)


def test_pickles_are_never_opened_and_the_way_out_is_said(families, tmp_path):
    folder = shutil.copytree(families("opt")[0], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(SPDError, match=r"are pickles: .* AutoModelForCausalLM.from_pretrained"):
        SPDModel.from_pretrained(folder)


def test_tied_opt_stores_either(families, tmp_path):
    folder, reference = families("opt")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        ours = SPDModel.from_pretrained(tmp_path, tp=2).transformer(TOKENS)
        torch.testing.assert_close(ours, reference(TOKENS).logits, **CLOSE)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", [*CONFIGS, "llama"])
def test_shapes_are_transformers_own(name):
    hf = CONFIGS.get(name) or hf_config()
    config = ModelConfig.from_hf(hf.to_dict())
    assert config.family == name and config.form is FAMILIES[name]
    assert ModelConfig.from_hf(config.to_hf().to_dict()).parameters() == config.parameters()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("opt-")])
def test_opt_shapes_are_published_ones(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].to_hf())
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].parameters()
