"""Head scattering (equation 2) and MLP matching (equation 3) against searches that try everything."""

from itertools import permutations

import numpy as np
import pytest
import torch

from spd.comm import Shards, Stream
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.layout import (
    EXACT_UNITS,
    _swap,
    group_heads,
    head_distances,
    match,
    matching_norms,
    objective,
    random_splits,
    scatter,
    unit_distances,
)
from spd.model import Transformer
from spd.plan import Plan
from spd.pretrained import build

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=24, num_blocks=2, num_heads=16, num_kv_heads=8, head_dim=4,
    max_positions=32, attention_bias=True,
)  # fmt: skip
KINDS = ("weight", "bias")


def _distances(units: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(units, 3))
    return np.linalg.norm(points[:, None] - points, axis=-1)


def _model(tp: int, config: ModelConfig = CONFIG) -> Transformer:
    model = build(config, Shards(tp), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.4, generator=generator)
    return model


def _inputs(model: Transformer) -> list:
    streams = [Stream(x) for x in torch.randn(2, 3, 10, 32, generator=torch.Generator().manual_seed(1))]
    return [(stream, model.context(stream)) for stream in streams]


def _every_split(units: list[int], size: int):
    """All splits into groups of `size`, by their definition."""
    if not units:
        yield []
        return
    for order in permutations(units[1:], size - 1):
        if list(order) == sorted(order):
            rest = [unit for unit in units[1:] if unit not in order]
            yield from ([(units[0], *order), *others] for others in _every_split(rest, size))


@pytest.mark.parametrize(("units", "groups"), [(8, 4), (8, 2), (6, 2), (6, 3)])
def test_scattering_is_the_best_of_all_splits(units, groups):
    distances = _distances(units)
    found = scatter(distances, groups)
    every = [objective(distances, split) for split in _every_split(list(range(units)), units // groups)]
    assert objective(distances, found) == pytest.approx(max(every))
    assert sorted(unit for group in found for unit in group) == list(range(units))
    assert all(len(group) == units // groups for group in found)


def test_scattering_separates_heads_that_are_alike():
    kind = np.array([0, 0, 1, 1, 2, 2, 3, 3])  # pairs of like heads: no group may hold one
    found = scatter((kind[:, None] != kind).astype(float), 2)
    assert all(len(set(kind[list(group)])) == 4 for group in found)


@pytest.mark.parametrize("seed", range(3))
def test_heuristic_reaches_the_optimum_of_small_cases(seed):
    distances = _distances(12, seed)
    generator = np.random.default_rng(seed)
    best = max(objective(distances, _swap(distances, generator.permutation(12).reshape(4, 3))) for _ in range(32))
    assert best == pytest.approx(objective(distances, scatter(distances, 4)))


def test_beyond_small_cases_it_beats_random():
    distances = _distances(32)
    found = scatter(distances, 8)
    assert len(distances) > EXACT_UNITS
    assert objective(distances, found) > max(objective(distances, split) for split in random_splits(32, 8))
    assert found == scatter(distances, 8)  # the same seed, the same grouping


@pytest.mark.parametrize(
    ("distances", "message"), [(np.zeros((6, 6)), "6 heads"), (np.full((8, 8), np.nan), "not finite")]
)
def test_impossible_scatterings_are_refused(distances, message):
    with pytest.raises(SPDError, match=message):
        scatter(distances, 4)


def test_distances_are_those_of_whole_score_vectors(monkeypatch):
    """Accumulated over batches and over chunks of queries, against the vectors written out."""
    monkeypatch.setattr("spd.layout.SCORES_AT_ONCE", 1000)
    model, vectors = _model(1), []
    block, inputs = model.blocks[0], _inputs(model)
    mask = torch.ones(10, 10).tril().bool()
    for stream, context in inputs:
        queries, keys, _ = block.attention.project(block.attention_norm(stream.read()), context)
        logits = queries @ keys.repeat_interleave(2, dim=2).transpose(-1, -2) / 2  # heads of 4
        vectors.append(logits.masked_fill(~mask, -torch.inf).softmax(-1)[0].transpose(0, 1).flatten(1).double())
    expected = torch.cdist(torch.cat(vectors, 1), torch.cat(vectors, 1))
    torch.testing.assert_close(head_distances(block, inputs, model.shards), expected, rtol=1e-4, atol=1e-5)


def test_distances_do_not_depend_on_the_layout_and_units_add_up_their_heads():
    whole, split = _model(1), _model(8)
    for mine, all_of_it in zip(split.blocks[0].parameters(), whole.blocks[0].parameters(), strict=True):
        if mine.shape == all_of_it.shape:
            mine.copy_(all_of_it)
    for mine, all_of_it in ((getattr(m.blocks[0].attention.qkv, kind) for m in (split, whole)) for kind in KINDS):
        parts = all_of_it[0].split([64, 32, 32])  # 16 query heads, 8 key and 8 value heads of 4
        mine.copy_(torch.cat([part.unflatten(0, (8, -1)) for part in parts], dim=1))
    heads = [head_distances(m.blocks[0], _inputs(m), m.shards) for m in (whole, split)]
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)
    units = unit_distances(heads[0], 8)
    assert units[1, 4] == pytest.approx(heads[0][2:4, 8:10].sum().item())
    assert units[3, 3] == pytest.approx(heads[0][6, 7].item())


def test_matching_is_the_best_of_all():
    norms = np.random.default_rng(0).normal(size=(5, 5)) ** 2
    matched = match(norms)
    value = sum(norms[group, m] for m, group in enumerate(matched))
    assert value == pytest.approx(max(sum(norms[g, m] for m, g in enumerate(p)) for p in permutations(range(5))))


def test_matching_norms_are_what_each_mlp_gives_for_each_group():
    model, tp = _model(4), 4
    block, inputs = model.blocks[0], _inputs(_model(4))
    expected = torch.zeros(tp, tp)
    for stream, context in inputs:
        y = block.attention(block.attention_norm(stream.read()), context)
        for group in range(tp):
            seen = block.mlp_norm(stream.x + block.attention.out.bias + y[group])
            z = block.mlp(seen[None])  # every partition, of the one input
            expected[group] += z.square().sum((1, 2, 3))
    np.testing.assert_allclose(matching_norms(block, inputs, model.shards), expected.sqrt(), rtol=1e-4)


def test_what_is_gathered_lies_where_the_model_does(monkeypatch):
    """NCCL refuses the host's memory; on the meta device nothing can be brought there unseen."""
    model = _model(4).to("meta")
    streams = [Stream(torch.empty(3, 10, 32, device="meta"))]
    inputs, gathered = [(stream, model.context(stream)) for stream in streams], []

    def gather(tensor):
        gathered.append(tensor.device.type)
        return tensor if tensor.ndim > 2 else torch.ones(tensor.shape)

    monkeypatch.setattr(model.shards, "gather", gather)
    assert matching_norms(model.blocks[0], inputs, model.shards).shape == (4, 4)
    assert set(gathered) == {"meta"}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_grouped_model_is_the_same_function_with_every_sync(tp):
    tokens = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    model = _model(tp)
    inputs, before = _inputs(model), model(tokens)
    model.plan = Plan.from_letters("DF DF")
    dropped = model(tokens)
    reports = [group_heads(block, inputs, model.shards, CONFIG) for block in model.blocks]
    assert not torch.allclose(model(tokens), dropped, atol=1e-3)
    model.plan = Plan.full(2)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-4)
    for report in reports:
        assert report["matching"]["objective"] >= report["matching"]["unmatched"]
        assert sorted(report["order"]) == list(range(8))
        assert (report["scattering"] is None) == (tp == 8)
        if tp < 8:
            assert report["scattering"]["exact"]
            assert report["scattering"]["objective"] >= report["scattering"]["best_random"] * (1 - 1e-12)
        assert (report["note"] is not None) == (tp == 8)


def test_where_key_value_heads_are_copied_nothing_moves_and_it_is_said():
    config = ModelConfig(**{**vars(CONFIG), "num_kv_heads": 2})
    model = _model(4, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = group_heads(model.blocks[0], _inputs(model), model.shards, config)
    assert report["order"] is None and "2 key/value heads" in report["note"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
