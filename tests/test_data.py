import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from spd.data import read_windows
from spd.errors import SPDError
from spd.tiny import MODEL_DIR, corpus


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Sentence number {i} says little.\n" for i in range(200)))
    return path


def test_windows_are_consecutive_pieces_of_the_whole_text(text, tokenizer):
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    everything = read_windows(str(text), tokenizer, seq_len=32)
    count = len(ids) // 32
    assert everything.tokens.tolist() == [ids[i * 32 : (i + 1) * 32] for i in range(count)]
    assert tokenizer.bos_token_id not in everything.tokens
    part = read_windows(str(text), tokenizer, seq_len=32, windows=3, skip=2)
    assert torch.equal(part.tokens, everything.tokens[2:5])
    assert part.describe() | {"fingerprint": ""} == {
        "text": "text.txt", "fingerprint": "", "seq_len": 32, "windows": 3, "skip": 2, "available": count,
    }  # fmt: skip
    assert part.describe()["fingerprint"] != everything.describe()["fingerprint"]
    more = read_windows(str(text), tokenizer, seq_len=32, windows=10**6)
    assert torch.equal(more.tokens, everything.tokens)


def test_a_literal_special_token_stays_one_token(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("a <s> b " * 100)
    ids = read_windows(str(path), tokenizer, seq_len=100).tokens.flatten().tolist()
    assert ids.count(tokenizer.bos_token_id) > 10
    assert tokenizer.decode(ids).startswith("a <s> b a <s> b")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, "is empty"),
        (" \n", {}, "is empty"),
        ("short", {"seq_len": 64}, "0 windows of 64; at least 1 is needed"),
        ("word " * 100, {"seq_len": 32, "skip": 50}, "of which 50 are skipped"),
        ("word " * 100, {"seq_len": 1}, "nothing to predict"),
        ("word " * 100, {"seq_len": 512}, "exceed the model's 256 positions"),
        ("word " * 100, {"windows": 0}, "windows must be at least 1"),
        (b"\xff\xfe\x00", {}, "is not UTF-8"),
    ],
)
def test_impossible_texts(tmp_path, tokenizer, content, arguments, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SPDError, match=message):
        read_windows(str(path), tokenizer, **({"seq_len": 32, "max_positions": 256} | arguments))


def test_missing_text(tmp_path, tokenizer):
    with pytest.raises(SPDError, match="There is no text"):
        read_windows(str(tmp_path / "none.txt"), tokenizer, 32)
    with pytest.raises(SPDError, match="cannot be read"):
        read_windows(str(tmp_path), tokenizer, 32)


def test_the_built_in_text_is_the_committed_one():
    """The pinned packages hold the very text that spd-tiny's figures come from."""
    text = corpus.read(held_out=True)
    assert corpus.difference_from_committed(text, held_out=True) is None
    assert "It was made with torch" in corpus.difference_from_committed(text + "!", held_out=True)
    assert json.loads(corpus.FINGERPRINT_FILE.read_text())["held_out"]["characters"] == len(text)


def test_training_and_held_out_text_are_disjoint():
    held_out = set(corpus.documents(held_out=True))
    prefix = corpus.read(held_out=False, characters=300_000).split(corpus.SEPARATOR)[:-1]
    assert len(held_out) > 500 and len(prefix) > 300
    assert not held_out & set(prefix)


def test_training_text_is_read_no_further_than_asked(tokenizer):
    windows = read_windows("builtin-train", tokenizer, seq_len=64, windows=5, skip=1)
    more = read_windows("builtin-train", tokenizer, seq_len=64, windows=40)
    assert windows.tokens.shape == (5, 64) and windows.available is None
    assert torch.equal(windows.tokens, more.tokens[1:6])


def test_a_text_too_long_to_be_tokenised_at_once_is_read_as_far_as_asked(text, tokenizer, monkeypatch):
    whole = read_windows(str(text), tokenizer, seq_len=32)
    monkeypatch.setattr("spd.data.WHOLE", 5000)  # the text has 6,690 characters
    monkeypatch.setattr("spd.data.CHARACTERS_PER_TOKEN", 1)  # too few at first
    part = read_windows(str(text), tokenizer, seq_len=32, windows=20, skip=3)
    assert torch.equal(part.tokens, whole.tokens[3:23]) and part.available is None
    for windows in (None, 10**6):
        with pytest.raises(
            SPDError, match=r"more than 5,000 characters.*say how many windows.*of 5,000 tokens at most"
        ):
            read_windows(str(text), tokenizer, 32, windows)
    monkeypatch.setattr("spd.data.WHOLE", 7000)
    assert torch.equal(read_windows(str(text), tokenizer, 32, 10**6).tokens, whole.tokens)


def test_a_changed_built_in_text_is_said(tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "read", lambda held_out, characters=None: "other words " * 200)
    assert "differs from the one spd-tiny was made with" in read_windows("builtin", tokenizer, 32).note


def test_a_hub_text_is_its_rows_joined_by_empty_lines(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return {"text": ["one line " * 40, "another " * 40]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_windows("wikitext2-test", tokenizer, 32)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    joined = tokenizer("one line " * 40 + "\n\n" + "another " * 40, add_special_tokens=False)["input_ids"]
    assert found.tokens.flatten().tolist() == joined[: found.tokens.numel()]


def test_without_a_network_a_hub_text_is_refused_in_one_sentence(tokenizer, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        SPDError, match=r"wikitext2-train .* the hub cannot be reached; give a file \(make: TEXT=FILE\)\.$"
    ):
        read_windows("wikitext2-train", tokenizer, 32)
