"""Perplexity and sensitivity: against transformers, against brute force, against independent figures."""

import json
import math

import pytest
import torch
from conftest import SHARED
from transformers import AutoModelForCausalLM

from spd import Plan, SPDModel
from spd.comm import Stream
from spd.data import read_windows
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.plan import DROP, KEPT, PLAIN
from spd.sensitivity import block_evaluations, scores, sensitivity

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


def test_progress_counts_blocks_and_sync_points(words):
    model, tokens = words
    done = []
    sensitivity(model.transformer, tokens, done.append)
    assert sum(done) == len(tokens) * block_evaluations(3) and len(done) == 4
    done.clear()
    scores(model.transformer, tokens, [DROP], done.append)
    assert sum(done) == len(tokens) * 2 * 3 and len(done) == 6


def test_a_broken_model_is_said(words):
    model, tokens = words
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight.fill_(float("nan"))
    with pytest.raises(SPDError, match="with SPD from block 0 on is not finite"):
        sensitivity(model.transformer, tokens)
    with pytest.raises(SPDError, match="logits are not finite, first after block 1"):
        perplexity(model.transformer, tokens)


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


def test_scores_are_gradients_times_changes(words):
    """Against the derivative of the loss along the change, by finite differences, one token at a time."""
    model, tokens = words
    transformer, tokens = model.transformer.double(), tokens[:2]
    found = scores(transformer, tokens, [DROP, KEPT[4], PLAIN[3]])
    for name, letters in (("drop", "D"), ("int4", "4"), ("int3-plain", "t")):
        assert found["scores"]["mlp"][name][-1] == 0
        for point, plan in (("attention", f"FF {letters}F FF"), ("mlp", f"F{letters} FF FF")):
            block = 1 if point == "attention" else 0
            c = _directional(transformer, tokens, Plan.from_letters(plan), point, block)
            assert found["scores"][point][name][block] == pytest.approx(c.square().mean().sqrt().item(), rel=1e-4)
            second = torch.where(c.abs() < 1, c.square() / 2, c.abs() - 0.5)
            expected = (c.clip(-1, 1) + second).mean().item()
            assert found["losses"][point][name][block] == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert found["windows"] == 2 and found["tokens"] == 2 * 15
    assert all(value > 0 for value in found["scores"]["attention"]["drop"])


@torch.no_grad()
def _directional(transformer, tokens, plan, point, block):
    """Of block 1's output (attention) or its attention's (MLP of block 0): dL/de of every token's change."""
    shards, streams = transformer.shards, {}
    for name, each in (("full", Plan.full(3)), ("changed", plan)):
        stream = transformer.embed(tokens)
        context = transformer.context(stream)
        stream = transformer.run_block(0, stream, each.blocks[0], context)
        if point == "attention":
            streams[name] = transformer.run_block(1, stream, each.blocks[1], context)
        else:
            one = transformer.blocks[1]
            streams[name] = shards.flush(stream.produce(one.attend(stream, context, None), one.attention.out.bias))

    def loss(x):
        stream = Stream(x)
        context = transformer.context(stream)
        if point == "mlp":
            one = transformer.blocks[1]
            stream = shards.flush(stream.produce(one.transform(stream), one.mlp.down.bias))
        stream = transformer.run_block(2, stream, Plan.full(3).blocks[2], context)
        logits = transformer.logits(stream)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()

    x, delta, slopes = streams["full"].x, shards.flush(streams["changed"]).x - streams["full"].x, []
    for row in range(tokens.shape[0]):
        for token in range(tokens.shape[1]):
            step = torch.zeros_like(delta)
            step[row, token] = 1e-6 * delta[row, token]
            slopes.append((loss(x + step) - loss(x - step)) / 2e-6)
    return torch.tensor(slopes)
