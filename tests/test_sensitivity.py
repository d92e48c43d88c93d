"""Perplexity and sensitivity: against transformers, against brute force, against independent figures."""

import json
import math

import pytest
import torch
from conftest import SHARED
from transformers import AutoModelForCausalLM

from spd import Plan, SPDModel
from spd.data import read_windows
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.sensitivity import block_evaluations, sensitivity

EXPECTED = SHARED / "expected.jsonl"
CASES = [json.loads(line) for line in EXPECTED.read_text().splitlines()] if EXPECTED.exists() else []


@pytest.fixture
def words(plain, text_of_words):
    model = SPDModel.from_pretrained(plain, tp=4)
    return model, read_windows(str(text_of_words), model.tokenizer, 16, 20).tokens


@torch.no_grad()
def test_perplexity_is_transformers(variants, text_of_words):
    folder, reference = variants("tied")
    model = SPDModel.from_pretrained(folder, tp=2)
    tokens = read_windows(str(text_of_words), model.tokenizer, 16).tokens
    losses = [reference(input_ids=w[None], labels=w[None]).loss.double() for w in tokens]
    ours = perplexity(model.transformer, tokens)
    assert ours["nats"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(ours["nats"]))
    assert ours["tokens"] == len(tokens) * 15 and ours["windows"] == len(tokens)


def test_sensitivity_is_brute_force(words):
    model, tokens = words
    found = sensitivity(model.transformer, tokens)
    for i in range(4):
        model.plan = Plan.dropping(3, attention=range(i, 3))
        assert found["perplexity_from"][i] == pytest.approx(
            perplexity(model.transformer, tokens)["perplexity"], rel=1e-6
        )
    for i in range(3):
        assert found["sensitivity"][i] == found["perplexity_from"][i] - found["perplexity_from"][i + 1]
        ratio = found["perplexity_from"][i] / found["perplexity_from"][i + 1]
        assert found["sensitivity_nats"][i] == pytest.approx(math.log(ratio))


def test_the_common_prefix_runs_once(words):
    model, tokens = words
    calls = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    found = sensitivity(model.transformer, tokens)  # 20 windows of 16: a single batch
    assert len(calls) == found["block_evaluations"] == block_evaluations(3) == 3 * (3 + 3) // 2
    assert block_evaluations(80) == 3320


def test_progress_counts_windows(words):
    model, tokens = words
    done = []
    sensitivity(model.transformer, tokens, done.append)
    assert sum(done) == len(tokens)


def test_a_broken_model_is_said(words):
    model, tokens = words
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight.fill_(float("nan"))
    with pytest.raises(SPDError, match="with SPD from block 0 on is not finite"):
        sensitivity(model.transformer, tokens)
    assert perplexity(model.transformer, tokens)["perplexity"] is None


@pytest.mark.skipif(not CASES, reason="the independent figures of ../shared are not here")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['model']}-tp{c['tp']}-{c['text'][:8]}")
def test_independent_figures(case):
    model = SPDModel.from_pretrained(SHARED / "models" / case["model"], tp=case["tp"])
    tokens = read_windows(str(SHARED / "text" / case["text"]), model.tokenizer, case["seq_len"], case["windows"]).tokens
    found = sensitivity(model.transformer, tokens)
    assert found["perplexity_from"] == pytest.approx(case["perplexity_from"], rel=1e-5)
    assert found["sensitivity"] == pytest.approx(case["sensitivity"], rel=1e-3)
    model.plan = Plan.dropping(len(found["sensitivity"]), attention=[0])
    assert perplexity(model.transformer, tokens)["perplexity"] == pytest.approx(case["only_first"], rel=1e-5)
    if (case["model"], case["tp"], case["text"][:4]) == ("stories260K", 4, "tiny"):
        assert sorted(range(5), key=lambda i: -found["sensitivity"][i])[:2] == [0, 1]  # the early blocks


def test_spd_tiny_behaves_like_a_real_model():
    """Trained long enough that dropping every sync at tp=8 costs at least 30 % of its perplexity."""
    model = SPDModel.from_pretrained("spd-tiny", tp=8)
    tokens = read_windows("builtin", model.tokenizer, 256, 8).tokens
    full = perplexity(model.transformer, tokens)["perplexity"]
    model.plan = Plan.dropping(8, attention=range(8))
    assert full < 15
    assert perplexity(model.transformer, tokens)["perplexity"] > 1.3 * full


def test_reference_model_agrees_on_real_text(spd_tiny):
    model = SPDModel.from_pretrained("spd-tiny", tp=4)
    tokens = read_windows("builtin", model.tokenizer, 128, 4).tokens
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(spd_tiny, dtype=torch.float32)
        loss = reference(input_ids=tokens, labels=tokens).loss.item()
    assert perplexity(model.transformer, tokens)["nats"] == pytest.approx(loss, abs=1e-5)
