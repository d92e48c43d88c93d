"""A GGUF file is a model like any other: its weights are put into a folder of the user's cache, once and whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from spd import SPDModel, pretrained
from spd.errors import SPDError
from spd.pretrained import resolve

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed", exc_type=ImportError)

SHAPE = dict(num_hidden_layers=2, num_key_value_heads=4, vocab_size=64)
TOKENS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def write_gguf(path: Path, model, architecture: str = "llama", without: str = "") -> Path:
    """A transformers LLaMA in the layout of llama.cpp: rows of queries and keys interleaved, names of its own."""
    config, tensors = model.config, dict(model.state_dict())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    words = ["<unk>", "<s>", "</s>", *(chr(ord("!") + i) for i in range(config.vocab_size - 4)), "!#"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["! #"])
    for number, name in enumerate(("unk", "bos", "eos")):
        getattr(writer, f"add_{name}_token_id")(number)
    kind = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}.get(architecture, gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in name and kind == gguf.MODEL_ARCH.LLAMA:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs != without:
            writer.add_tensor(theirs, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spd" / "gguf"


@pytest.fixture
def file(tmp_path, cache):
    model = random_model(tmp_path / "model", **SHAPE)
    return write_gguf(tmp_path / "small.gguf", model), model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_file(tmp_path, cache, tied):
    reference = random_model(tmp_path / "model", **SHAPE, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "small.gguf", reference)
    for tp in (1, 4):
        model = SPDModel.from_pretrained(path, tp=tp)
        torch.testing.assert_close(model.transformer(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-4)
    assert model.name == "small" and model.config.tie_embeddings is tied
    assert model.tokenizer.decode([3, 5]) == "!#"
    written = json.loads((model.folder / "config.json").read_text())
    assert "quantization_config" not in written and str(tmp_path) not in json.dumps(written)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(model.folder / "model.safetensors").values())


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(tmp_path, cache, family):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=8, max_position_embeddings=64)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | SHAPE))
    for name, parameter in reference.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    path = write_gguf(tmp_path / "small.gguf", reference, "llama" if family == "mistral" else family)
    model = SPDModel.from_pretrained(path, tp=3)
    torch.testing.assert_close(model.transformer(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-4)
    assert model.config.family == ("llama" if family == "mistral" else family)  # llama.cpp knows no Mistral


def test_it_is_made_once_and_its_place_is_said(file, cache, monkeypatch, capsys):
    folder = resolve(file[0])
    assert folder.parent == cache and f"kept in float32 in {folder}" in capsys.readouterr().err
    monkeypatch.setattr(pretrained, "_dequantise", None)  # not to be called again
    moved = shutil.copy(file[0], file[0].with_name("moved.gguf"))
    assert resolve(file[0]) == folder and not capsys.readouterr().err
    with pytest.raises(TypeError):  # keyed by name and content
        resolve(moved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "is damaged or no GGUF file"),
        (lambda whole: whole[:100], "is damaged or no GGUF file"),
        (lambda whole: b"", "is damaged or no GGUF file"),
        (lambda whole: b"not a model" * 1000, "is damaged or no GGUF file"),
    ],
)
def test_damaged_files_are_one_sentence_and_leave_nothing(file, cache, damage, message):
    file[0].write_bytes(damage(file[0].read_bytes()))
    with pytest.raises(SPDError, match=message) as caught:
        resolve(file[0])
    assert "\n" not in str(caught.value) and not list(cache.iterdir())


def test_missing_tensors_and_other_architectures_are_refused(file, tmp_path, cache):
    lacking = write_gguf(tmp_path / "lacking.gguf", file[1], without="blk.1.ffn_up.weight")
    with pytest.raises(SPDError, match=r"1 of \d+ tensors are missing in .*: model.layers.1.mlp.up_proj.weight"):
        resolve(lacking)
    for architecture in ("gpt2", "nothing"):
        other = write_gguf(tmp_path / f"{architecture}.gguf", file[1], architecture)
        with pytest.raises(SPDError, match=f"{architecture}"):
            resolve(other)
    with pytest.raises(SPDError, match="The model none.gguf cannot be read .No such file"):
        resolve("./none.gguf")
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_said(file, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    with pytest.raises(SPDError, match="cannot be dequantised to"):
        resolve(file[0])


def test_the_command_takes_it(spd, file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("!#%'" * 100)
    code, result, err = spd("eval", "--model", file[0], "--tp", "3", "--text", text, "--seq-len", "16")
    assert code == 0 and result["model"]["name"] == "small", err
    assert "tp=3 does not divide" in err


# ---------------------------------------------------------------- tied checkpoints, whichever tensor they store


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_checkpoints_store_either(tmp_path, kept):
    reference = random_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {kept: shared}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        ours = SPDModel.from_pretrained(tmp_path, tp=2).transformer(TOKENS)
        torch.testing.assert_close(ours, reference(TOKENS).logits, rtol=0, atol=1e-4)


def test_untied_checkpoints_store_both(tmp_path):
    random_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SPDError, match=r"1 of \d+ tensors are missing in .*: model.embed_tokens.weight"):
        SPDModel.from_pretrained(tmp_path)
