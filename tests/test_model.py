"""Parity with transformers on the same weights: the engine's first proof."""

import pytest
import torch
from conftest import VARIANTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd import Sampling, SPDModel
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.generate import PROMPT, choose, sample_windows

TOLERANCE = 1e-4  # float32 logits of scale 20: sums over shards are taken in another order


def logits_in_pieces(model, tokens, pieces):
    """Prefill of the first piece, then the others through the cache."""
    cache = model.new_cache(*tokens.shape)
    return torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variants, variant, tp):
    folder, reference = variants(variant)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    expected = reference(tokens).logits
    model = SPDModel.from_pretrained(folder, tp=tp).transformer
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=TOLERANCE)
    pieces = [15, 5, 1, 1, 1, 1]
    torch.testing.assert_close(logits_in_pieces(model, tokens, pieces), expected, rtol=0, atol=TOLERANCE)
    last = model(tokens, last_only=True)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("tp", [1, 4])
def test_padding_changes_nothing(variants, tp):
    """A left-padded row gives at its valid places what it gives alone, and no value is NaN."""
    folder, reference = variants("grouped-query")
    model = SPDModel.from_pretrained(folder, tp=tp).transformer
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(4))
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    padded = model(tokens, valid=valid)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[0], reference(tokens[:1]).logits[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(padded[1, 5:], reference(tokens[1:, 5:]).logits[0], rtol=0, atol=TOLERANCE)


def test_greedy_batch_equals_transformers(variants):
    folder, reference = variants("llama3-rope")
    model = SPDModel.from_pretrained(folder, tp=2)
    prompts = ["t5 t6 t7 t8 t9", "t11 t12"]
    ours = model.generate(prompts, max_new_tokens=12)
    for prompt, row in zip(prompts, ours, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        theirs = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert row == theirs[0].tolist()


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_real_models_at_every_degree(shared, name):
    folder = shared / "models" / name
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(3, 100, (2, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = reference(tokens).logits
        for tp in ModelConfig.from_folder(folder).degrees():
            model = SPDModel.from_pretrained(folder, tp=tp).transformer
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=TOLERANCE)
            with_cache = logits_in_pieces(model, tokens, [90] + 10 * [1])
            torch.testing.assert_close(with_cache, expected, rtol=0, atol=TOLERANCE)


def test_greedy_story_equals_transformers(shared):
    folder = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=100, do_sample=False)[0].tolist()
    for tp in (1, 4):
        assert SPDModel.from_pretrained(folder, tp=tp).generate("Once upon a time", 100)[0] == expected


def test_spd_tiny_equals_transformers(spd_tiny):
    reference = AutoModelForCausalLM.from_pretrained(spd_tiny, dtype=torch.float32)
    tokens = torch.randint(3, 1000, (2, 64), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = reference(tokens).logits
        for tp in (1, 8):
            ours = SPDModel.from_pretrained("spd-tiny", tp=tp).transformer(tokens)
            torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_half_precision_stays_close(variants):
    folder, reference = variants("grouped-query")
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(tokens).logits
        ours = SPDModel.from_pretrained(folder, tp=4, dtype="bfloat16").transformer(tokens)
    assert ours.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: errors of a few percent of the logits' scale
    assert (ours.float() - expected).std() < 0.05 * expected.std()


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(2000, 1)

    def drawn(**options):
        return choose(logits, Sampling(temperature=1.0, **options), torch.Generator().manual_seed(0)).bincount(
            minlength=4
        )

    shares = drawn() / 2000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.04)  # four standard errors
    assert set(drawn(top_k=2).nonzero().flatten().tolist()) == {1, 3}
    assert drawn(top_p=0.5).nonzero().flatten().tolist() == [1]  # the first alone has 0.64
    assert choose(logits, Sampling(), None).unique().tolist() == [1]


def test_sampled_text_depends_on_the_seed_alone(plain):
    model = SPDModel.from_pretrained(plain)
    texts = [model.generate("t5", 20, Sampling(temperature=2.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampled_windows_go_on_from_the_text_and_hold_no_banned_token(plain):
    """Five of six tokens are banned, and the end-of-sequence token with them: no window ends early."""
    model = SPDModel.from_pretrained(plain).transformer
    tokens = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(0))
    windows = sample_windows(model, tokens, 70, list(range(16)) + list(range(32, 96)), seed=1)
    assert windows.shape == (70, 20) and windows.dtype == tokens.dtype
    assert windows[:, PROMPT:].min() >= 16 and windows[:, PROMPT:].max() < 32
    places = {tuple(place) for place in tokens.flatten().unfold(0, PROMPT, 1).tolist()}
    assert {tuple(row) for row in windows[:, :PROMPT].tolist()} <= places
    assert torch.equal(windows, sample_windows(model, tokens, 70, list(range(16)) + list(range(32, 96)), seed=1))
    assert sample_windows(model, tokens, 0, [], seed=1).shape == (0, 20)


def test_generation_stops_at_the_end_token(variants, tmp_path):
    folder, _ = variants("plain")
    model = SPDModel.from_pretrained(folder)
    free = model.generate("t5", 10)[0]
    object.__setattr__(model.config, "eos_token_ids", (free[3],))
    assert model.generate("t5", 10)[0] == free[: free.index(free[3], 1) + 1]


def test_generation_refuses_what_cannot_be():
    model = SPDModel.from_pretrained("spd-tiny")
    with pytest.raises(SPDError, match="more than the model's 256 positions"):
        model.generate("a", 300)
    with pytest.raises(SPDError, match="without any token"):
        model.generate([], 3)
    with pytest.raises(SPDError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(SPDError, match="top-p"):
        Sampling(top_p=1.5)
