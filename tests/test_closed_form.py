"""Repair without training, against independent solvers, brute force and the definition of the error."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import spd.closed_form as closed_form
import spd.least_squares as least_squares
from spd.block_inputs import DroppedBlock
from spd.closed_form import ClosedForm, placement_costs, refit, repair_block
from spd.comm import Shards, Stream
from spd.config import ModelConfig
from spd.data import read_windows
from spd.errors import SPDError
from spd.evaluate import batches, perplexity, silent
from spd.layout import balanced_assignment, permute_neurons
from spd.least_squares import Moments, best_ridge
from spd.model import Transformer
from spd.plan import FULL, SPD_BLOCK, TP_BLOCK, Plan
from spd.pretrained import SPDModel, build
from spd.transport import ProcessGroup

SHARED = Path(__file__).resolve().parents[2] / "shared"
SHAPE = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_blocks=2, num_heads=4, num_kv_heads=4,
             head_dim=4, max_positions=64)  # fmt: skip
PLAIN, BIASED = ModelConfig(**SHAPE), ModelConfig(**SHAPE, attention_bias=True, mlp_bias=True)
TOKENS = torch.randint(0, 50, (40, 24), generator=torch.Generator().manual_seed(1))


def _model(config: ModelConfig = PLAIN, shards: Shards | None = None) -> Transformer:
    """Every parameter random, norms and biases too; the same dense model for every number of processes."""
    shards = shards or Shards(4)
    whole, generator = build(config, Shards(shards.tp), torch.float32, "cpu"), torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        parameter.normal_(0, 0.4, generator=generator)
    model = build(config, shards, torch.float32, "cpu")
    for mine, all_of_it in zip(model.parameters(), whole.parameters(), strict=True):
        stacked = mine.shape != all_of_it.shape
        mine.copy_(all_of_it[shards.hosted.start : shards.hosted.stop] if stacked else all_of_it)
    return model


def _first_block(model: Transformer) -> DroppedBlock:
    """Block 0 and its teacher, on two batches of embedded windows."""
    inputs = [model.embed(batch).x for batch in TOKENS.split(20)]
    targets = [model.run_block(0, Stream(x), (FULL, FULL), model.context(Stream(x))).x for x in inputs]
    return DroppedBlock(model, 0, inputs, targets)


def _copy(block) -> dict:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


# Least squares


@pytest.mark.parametrize("columns", [2, 256])
def test_ridge_equals_an_independent_solver(columns, monkeypatch):
    monkeypatch.setattr(least_squares, "COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    f, t = torch.randn(2, 90, 5, generator=generator), torch.randn(2, 90, 3, generator=generator)
    moments = Moments(2, 5, 3)
    for part in (slice(0, 40), slice(40, 90)):  # in a stream
        moments.add(f[:, part], t[:, part])
    found = moments.solve(torch.tensor([0.0, 0.5]))
    plain = torch.linalg.lstsq(f[0].double(), t[0].double()).solution.T
    torch.testing.assert_close(found[0], plain, rtol=0, atol=1e-5)
    root = (0.5 * moments.gram[1].diagonal()).sqrt().diag()  # ridge as so many more observations of 0
    more = torch.cat((f[1].double(), root)), torch.cat((t[1].double(), torch.zeros(5, 3)))
    torch.testing.assert_close(found[1], torch.linalg.lstsq(*more).solution.T, rtol=0, atol=1e-5)
    left = (t.double() - f.double() @ found.mT).square().sum((1, 2))
    torch.testing.assert_close(moments.error(found), left, rtol=1e-5, atol=0)


def test_held_out_windows_choose_the_ridge():
    """Noise is not fitted at all, a clear relation with the least ridge."""
    generator = torch.Generator().manual_seed(0)
    f, noise = torch.randn(2, 60, 40, generator=generator), torch.randn(2, 60, 2, generator=generator)
    noise[1] = f[1, :, :2]
    fit, held_out = Moments(2, 40, 2), Moments(2, 40, 2)
    fit.add(f[:, :45], noise[:, :45])
    held_out.add(f[:, 45:], noise[:, 45:])
    ridges = best_ridge(fit, held_out)
    assert ridges.tolist() == [float("inf"), 1e-5]
    assert not fit.solve(ridges)[0].any()


@pytest.mark.parametrize("ridge", [1e-5, 1e-2])
def test_fewer_tokens_than_features_have_a_solution_too(ridge):
    """Against the same ridge as so many more observations of 0; unlike scales and a feature that is never active."""
    generator = torch.Generator().manual_seed(0)
    f, t = torch.randn(1, 12, 20, generator=generator), torch.randn(1, 12, 3, generator=generator)
    scale = torch.logspace(-2, 2, 20)
    f *= scale
    f[:, :, 7] = 0
    moments = Moments(1, 20, 3)
    moments.add(f, t)
    root = moments.penalty(ridge)[0].sqrt().diag()
    more = torch.cat((f[0].double(), root)), torch.cat((t[0].double(), torch.zeros(20, 3)))
    expected = torch.linalg.lstsq(*more).solution.T
    found = moments.solve(ridge)[0]  # compared as contributions
    torch.testing.assert_close(found * scale, expected * scale, rtol=0, atol=1e-2 if ridge < 1e-4 else 1e-4)


# Placement


@pytest.mark.parametrize(("seed", "counts"), [(0, [2, 2, 2]), (2, [3, 2, 1])])
def test_assignment_keeps_counts_and_is_optimal(seed, counts):
    generator = np.random.default_rng(seed)
    for _ in range(20):
        cost = generator.random((6, 3))
        shard = balanced_assignment(cost, counts)
        assert np.bincount(shard).tolist() == counts
        every = (p for p in itertools.product(range(3), repeat=6) if np.bincount(p, minlength=3).tolist() == counts)
        best = min(cost[range(6), p].sum() for p in every)
        assert cost[range(6), shard].sum() == pytest.approx(best, abs=1e-12)


def test_assignment_of_many_equals_the_assignment_problem():
    from scipy.optimize import linear_sum_assignment

    cost = np.random.default_rng(1).random((240, 4)) ** 3 - [0.3, 0, 0, 0]  # all want shard 0
    _, seat = linear_sum_assignment(cost.repeat(60, axis=1))
    mine = cost[range(240), balanced_assignment(cost, 4 * [60])].sum()
    assert mine == pytest.approx(cost[range(240), seat // 60].sum(), rel=1e-12)


def test_impossible_assignments_are_refused():
    with pytest.raises(SPDError, match=r"5 things cannot be shared out to 2 shards that take \[2, 2\]"):
        balanced_assignment(np.zeros((5, 2)), [2, 2])
    with pytest.raises(SPDError, match="not finite"):
        balanced_assignment(np.full((4, 2), np.nan), [2, 2])


def test_things_that_are_alike_take_turns():
    """Of neurons that never fire, whose costs are all the same, none has to be moved one at a time."""
    cost = np.random.default_rng(0).random((4000, 8))
    cost[::2] = 0
    shard = balanced_assignment(cost, 8 * [500])
    assert np.bincount(shard).tolist() == 8 * [500]
    alone = balanced_assignment(np.zeros((8000, 8)), 8 * [1000])
    assert np.array_equal(alone, np.arange(8000) % 8)


@pytest.mark.parametrize("config", [PLAIN, BIASED])
def test_placement_cost_is_the_error_one_neuron_causes(config):
    """A neuron alone in the MLP, on the shard in question: the whole block's output error is its cost."""
    model = _model(config)
    costs = placement_costs(_first_block(model))
    for neuron, shard in ((0, 0), (7, 3), (20, 2)):
        alone = _model(config)
        order = list(range(24))
        place = 6 * shard
        order[place], order[neuron] = order[neuron], order[place]
        permute_neurons(alone.blocks[0], order, alone.shards)
        down = alone.blocks[0].mlp.down.weight
        keep = down[shard, :, 0].clone()
        down.zero_()
        down[shard, :, 0] = keep
        torch.testing.assert_close(costs[neuron, shard].item(), _first_block(alone).error() * TOKENS.numel() * 16)


# Refit


def _in_sweeps(monkeypatch, sweeps: int) -> None:
    monkeypatch.setattr(closed_form, "JOINT_FEATURES", 0)
    monkeypatch.setattr(closed_form, "SWEEPS", sweeps)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("tokens", [None, 20])  # of one window: fewer than features
def test_sweeps_over_shards_converge_to_the_joint_solution(attention, tokens, monkeypatch):
    changed = []
    for in_sweeps in (False, True):
        dropped = _first_block(_model())
        if tokens:
            dropped = replace(dropped, inputs=[dropped.inputs[0][:1, :20]], targets=[dropped.targets[0][:1, :20]])
            assert dropped.tokens == tokens < PLAIN.intermediate_size
        if in_sweeps:
            _in_sweeps(monkeypatch, 200)
        before = dropped.error()
        refit(dropped, attention, ridge=1e-3 if tokens is None else 1e-2)
        assert attention or dropped.error() < before
        changed.append(_copy(dropped.block))
    for joint, swept in zip(changed[0].values(), changed[1].values(), strict=True):
        torch.testing.assert_close(joint, swept, rtol=0, atol=2e-4)  # float32 products in every sweep


def test_few_sweeps_already_help(monkeypatch):
    dropped = _first_block(_model())
    before = dropped.error()
    _in_sweeps(monkeypatch, 3)
    refit(dropped, ridge=1e-3)
    assert dropped.error() < before


def test_refit_of_a_block_without_error_changes_nothing_that_matters():
    """With the MLP's down projections at zero a dropped block equals its teacher."""
    model = _model()
    model.blocks[0].mlp.down.weight.zero_()
    report = repair_block(_first_block(model))
    assert report["error_before"] < 1e-12 and report["error_after"] < 1e-12


# Blocks and models


@pytest.mark.parametrize("config", [PLAIN, BIASED])
@pytest.mark.parametrize(
    "options",
    [
        ClosedForm(),
        ClosedForm(centre=False),
        ClosedForm(correct=False),
        ClosedForm(place=False),
        ClosedForm(refit=False),
        ClosedForm(refit_attention=False),
    ],
    ids=["all", "centre off", "no correction", "no placement", "no refit", "no attention"],
)
def test_no_block_ends_worse(config, options):
    told = []
    dropped = replace(_first_block(_model(config)), progress=told.append)
    report = repair_block(dropped, options)
    assert sum(told) == options.passes and min(told) >= 0
    dropped = replace(dropped, progress=silent)
    before = _first_block(_model(config)).error()
    assert report["error_after"] <= report["error_before"] == pytest.approx(before, rel=1e-6)
    assert report["error_after"] == pytest.approx(dropped.error(), rel=1e-6)


def _unchanged(block, before: dict) -> bool:
    """Biases of zero that were not there before are no change."""
    now = block.state_dict()
    return all(torch.equal(tensor, before.get(name, torch.zeros_like(tensor))) for name, tensor in now.items())


def test_a_repair_that_ends_worse_or_not_finite_is_undone(monkeypatch):
    dropped = _first_block(_model())
    before = _copy(dropped.block)
    monkeypatch.setattr(closed_form, "correct", lambda block, *_: block.mlp.gate_up.weight.fill_(torch.nan))
    report = repair_block(dropped, ClosedForm(place=False, refit=False))
    assert not report["kept"] and report["error_after"] == report["error_before"]
    assert _unchanged(dropped.block, before)


def test_a_block_whose_output_is_not_finite_is_left_alone():
    dropped = _first_block(_model())
    dropped.inputs[0][0, 0, 0] = torch.inf
    before = _copy(dropped.block)
    assert not repair_block(dropped)["kept"]
    assert _unchanged(dropped.block, before)


def _repair(model: Transformer, plan: Plan, tokens: torch.Tensor, **options) -> list[int]:
    """Repairs what the plan drops, each block on what those before it give now; sets the plan. Their numbers."""
    model.plan = plan
    student = [model.embed(batch).x for batch in batches(tokens)]
    teacher, repaired = list(student), []
    for i, policies in enumerate(plan.blocks):
        teacher = _run(model, i, teacher, TP_BLOCK)
        if policies == SPD_BLOCK:
            repair_block(DroppedBlock(model, i, student, teacher), ClosedForm(**options))
            repaired.append(i)
        student = _run(model, i, student, policies)
    return repaired


def _run(model: Transformer, i: int, streams: list[torch.Tensor], policies: tuple) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.run_block(i, Stream(x), policies, model.context(Stream(x))).x for x in streams]


def test_only_dropped_blocks_change():
    model = _model()
    before = [_copy(block) for block in model.blocks]
    assert _repair(model, Plan.from_letters("FF DF"), TOKENS) == [1]
    pairs = zip(model.blocks, before, strict=True)
    assert [_unchanged(block, old) for block, old in pairs] == [True, False]


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = _model(shards=Shards(4, rank, world, ProcessGroup()))
    closed_form.SWEEPS = 5
    assert model.shards.agreed(torch.tensor([rank])).tolist() == [0]  # what process 0 decided
    _repair(model, Plan.from_letters("DF DF"), TOKENS)
    logits = model(TOKENS)
    if rank == 0:
        torch.save(logits, f"{folder}/logits.pt")
    dist.destroy_process_group()


def test_processes_repair_as_one_does(tmp_path: Path, monkeypatch):
    mp.spawn(_process, args=(2, str(tmp_path)), nprocs=2)
    model = _model()
    _in_sweeps(monkeypatch, 5)
    _repair(model, Plan.from_letters("DF DF"), TOKENS)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), model(TOKENS), rtol=0, atol=5e-3
    )  # logits of size 10; float32 sums in another order


@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="the shared models are not here")
def test_a_real_model_recovers_on_text_it_was_not_fitted_to():
    """All TP 4.7, dropped 11: a tenth of the usual windows already bring it below 8."""
    loaded = SPDModel.from_pretrained(SHARED / "models" / "stories260K", tp=4)
    text = str(SHARED / "text" / "tinystories_v1_train_head.txt")
    calibration = read_windows(text, loaded.tokenizer, 512, 12).tokens
    evaluation = read_windows(text, loaded.tokenizer, 512, 4, 600).tokens
    plan = Plan.dropping(5, range(5))
    loaded.plan = plan
    before = perplexity(loaded.transformer, evaluation)["perplexity"]
    _repair(loaded.transformer, plan, calibration, refit_attention=False)
    after = perplexity(loaded.transformer, evaluation)["perplexity"]
    assert before > 9 and after < 8
