"""What comes from outside: numbers that are none, files that lie elsewhere, tokens that the model does not know."""

import json
import os
import shutil
import signal
from datetime import timedelta

import pytest
import torch
from conftest import hf_config
from safetensors.torch import load_file, save_file

import spd.cli  # noqa: F401  # it declares the commands
from spd import Plan, SPDModel
from spd.checkpoint import load_changed
from spd.config import ModelConfig
from spd.data import read_windows
from spd.errors import LONGEST, SPDError, short
from spd.evaluate import perplexity
from spd.generate import Sampling, generate
from spd.options import COMMANDS
from spd.records import inside, parsed, regular, write_whole
from spd.repairs import claim
from spd.session import Session

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "copy")


def change(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_weight_that_is_not_finite_is_named(copy, value):
    weight = load_file(copy / "model.safetensors")[NORM]
    weight[-1] = value
    change(copy, **{NORM: weight})
    with pytest.raises(SPDError, match=rf"{NORM} in .*copy holds values that are not finite numbers in torch.float32"):
        SPDModel.from_pretrained(copy, tp=2)


def test_a_weight_too_large_for_the_dtype_asked_for_is_named(copy):
    change(copy, **{NORM: torch.full((32,), 1e6)})
    SPDModel.from_pretrained(copy)
    with pytest.raises(SPDError, match=f"{NORM} .* not finite numbers in torch.float16"):
        SPDModel.from_pretrained(copy, dtype="float16")


def test_integers_are_no_weights(copy, tmp_path):
    model = SPDModel.from_pretrained(copy, tp=2)
    bad = torch.zeros(2, 32, 16, dtype=torch.int32)
    save_file({"blocks.0.attention.out.weight": bad}, tmp_path / "0.safetensors")
    with pytest.raises(SPDError, match="blocks.0.attention.out.weight in .* is of type I32"):
        load_changed(model.transformer, tmp_path / "0.safetensors")
    change(copy, **{NORM: torch.ones(32, dtype=torch.int32)})
    with pytest.raises(SPDError, match=f"{NORM} in .* is of type I32; weights are read of F64, F32, F16, BF16"):
        SPDModel.from_pretrained(copy)


def test_logits_that_are_not_finite_end_every_evaluation(plain, text_of_words):
    model = SPDModel.from_pretrained(plain, tp=2)
    tokens = read_windows(str(text_of_words), model.tokenizer, 16, 3).tokens
    model.plan = Plan.dropping(3, attention=[2])
    model.transformer.blocks[1].mlp.down.weight.data.fill_(1e38)
    for evaluate in (
        lambda: perplexity(model.transformer, tokens),
        lambda: generate(model.transformer, [[5, 6], [7]], 4, Sampling()),
    ):
        with pytest.raises(SPDError, match="The logits are not finite, first after block 1"):
            evaluate()


def test_token_ids_beyond_the_vocabulary(copy):
    model = SPDModel.from_pretrained(copy)
    model.tokenizer.add_tokens(["new"])
    assert model.known([95]) == [95]
    with pytest.raises(SPDError, match="gives the token id 96, and the model knows ids below 96"):
        model.generate("t5 new", 2)


def test_named_files_lie_in_the_folder(tmp_path):
    folder = tmp_path / "models" / "snapshots" / "abc"
    blobs = tmp_path / "models" / "blobs"
    for place in (folder, blobs, tmp_path / "other"):
        place.mkdir(parents=True)
        (place / "w").write_text("w")
    (folder / "blob").symlink_to("../../blobs/w")
    assert inside(folder, "w") == folder / "w" and inside(folder, "blob").read_text() == "w"
    (folder / "out").symlink_to(tmp_path / "other" / "w")
    for name in ("../../../other/w", str(tmp_path / "other" / "w"), "../abc/w", "out"):
        with pytest.raises(SPDError, match="does not lie in it"):
            inside(folder, name)
    (folder / "round").symlink_to("round")
    for name in ("gone", "round", "x" * 5000, "a\0b"):
        with pytest.raises(SPDError, match="cannot be read"):
            inside(folder, name)


def test_pipes_folders_and_giants_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SPDError, match="it is a pipe or device, not a file"):
        regular(tmp_path / "pipe")
    with pytest.raises(SPDError, match="it is a folder, not a file"):
        parsed(tmp_path, dict, "is not JSON")
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(SPDError, match="has 11 bytes, more than the 10"):
        regular(tmp_path / "long", 10)


@pytest.mark.parametrize("content", [b"", b'"abcde"', b"[" * 100_000, '{"a": 1}'.encode("utf-16"), b'{"a": "\\ud800"}'])
def test_json_of_no_use_is_one_short_sentence(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(SPDError, match=r"f\.json is not an object: ") as refused:
        parsed(tmp_path / "f.json", dict, "is not an object")
    assert len(str(refused.value)) - len(str(tmp_path)) < 150


@pytest.mark.parametrize("wrong", [{"factor": "x"}, {"factor": None}, {"factor": 0.0}, {"rope_theta": -1.0}])
def test_rope_parameters_give_frequencies(wrong):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0} | wrong
    with pytest.raises(SPDError, match="not a valid LLaMA configuration"):
        ModelConfig.from_hf(hf_config().to_dict() | {"rope_parameters": rope})


@pytest.mark.parametrize("kind", ["pipe", "nested"])
def test_an_out_that_holds_no_answer_is_asked_anew(tmp_path, kind):
    out = tmp_path / "out.json"
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.write_text("[" * 100_000)
    options = COMMANDS["plan"].parse(["s.json", "--out", str(out)])
    assert Session(COMMANDS["plan"], options).answer() is None


def test_two_processes_do_not_repair_in_one_folder(tmp_path):
    """The second is refused in words; one that was killed holds nothing, and a process does not wait for itself."""
    held, holds = os.pipe()
    holder = os.fork()
    if not holder:
        lock = claim(tmp_path)
        os.write(holds, b"x" if lock else b"")
        signal.pause()
    assert os.read(held, 1)
    with pytest.raises(SPDError, match="Another process is at work in .*; wait for it, or give another folder"):
        claim(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert claim(tmp_path) and claim(tmp_path)


def test_a_clock_that_is_set_back_makes_no_time_negative(tmp_path, monkeypatch):
    (tmp_path / "s.json").write_text(json.dumps({"sensitivity": [1.0, 2.0], "model": {"fingerprint": "f"}, "tp": 2}))
    session = Session(COMMANDS["plan"], COMMANDS["plan"].parse([str(tmp_path / "s.json"), "--records", str(tmp_path)]))
    session.started += timedelta(hours=1)
    session.options.mlflow = False
    session.run()
    (record,) = tmp_path.glob("*-plan-*.json")
    assert 0 <= json.loads(record.read_text())["seconds"] < 60


def test_a_message_is_one_line_that_keeps_its_beginning_and_end():
    assert short("a\nb") == "a b"
    cut = short("begin " + "x" * 10_000 + " end")
    assert len(cut) <= LONGEST and cut.startswith("begin") and cut.endswith("end")


def test_a_library_s_own_word_for_a_full_disk_is_a_sentence(tmp_path):
    def write(partial):
        partial.write_text("half")
        raise RuntimeError("[enforce fail] unexpected pos 10624 vs 10512")

    with pytest.raises(SPDError, match=r"Cannot write .*f, perhaps for want of room \(\[enforce fail\] unexpected pos"):
        write_whole(tmp_path / "f", write)
    assert not list(tmp_path.iterdir())
