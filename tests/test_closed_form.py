"""Repair without training, against independent solvers, brute force and the definition of the error."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spd.block_inputs import Calibration, Site, output_error
from spd.closed_form import ClosedForm, placement_costs, refit, repair_block
from spd.comm import Shards, Stream
from spd.config import ModelConfig
from spd.data import read_windows
from spd.errors import SPDError
from spd.evaluate import batches, perplexity
from spd.layout import balanced_assignment, permute_neurons
from spd.least_squares import Moments, Rows, best_ridge
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


def _first_block(model: Transformer) -> tuple[Site, Calibration]:
    """Block 0 and its teacher, on two batches of embedded windows."""
    inputs = [model.embed(batch).x for batch in TOKENS.split(20)]
    targets = [model.run_block(0, Stream(x), (FULL, FULL), model.context(Stream(x))).x for x in inputs]
    return Site(model.blocks[0], 0, model.shards, model.config), Calibration(inputs, targets, model.context)


def _copy(block) -> dict:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


# Least squares


def test_ridge_equals_an_independent_solver():
    generator = torch.Generator().manual_seed(0)
    f, t = torch.randn(2, 90, 5, generator=generator), torch.randn(2, 90, 3, generator=generator)
    moments = Moments(2, 5, 3)
    for part in (slice(0, 40), slice(40, 90)):  # in a stream
        moments.add(f[:, part], t[:, part])
    found = moments.solve(torch.tensor([0.0, 0.5]))
    solution = found.dense()
    plain = torch.linalg.lstsq(f[0].double(), t[0].double()).solution.T
    torch.testing.assert_close(solution[0], plain, rtol=0, atol=1e-5)
    root = (0.5 * moments.gram[1].diagonal()).sqrt().diag()  # ridge as so many more observations of 0
    more = torch.cat((f[1].double(), root)), torch.cat((t[1].double(), torch.zeros(5, 3)))
    torch.testing.assert_close(solution[1], torch.linalg.lstsq(*more).solution.T, rtol=0, atol=1e-5)
    left = (t.double() - f.double() @ solution.mT).square().sum((1, 2))
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
    assert not fit.solve(ridges).dense()[0].any()


@pytest.mark.parametrize("tokens", [12, 60])
def test_the_dual_form_equals_the_primal(tokens):
    """With fewer and with more tokens than features, unlike scales, a dead feature; also what it is chosen by."""
    generator = torch.Generator().manual_seed(0)
    f, t = torch.randn(2, tokens, 20, generator=generator), torch.randn(2, tokens, 3, generator=generator)
    f *= torch.logspace(-2, 2, 20)
    f[:, :, 7] = 0
    cut, both = tokens - 4, []
    for pair in ([Moments(2, 20, 3) for _ in range(2)], [Rows() for _ in range(2)]):
        for rows, part in ((slice(0, 5), 0), (slice(5, cut), 0), (slice(cut, tokens), 1)):
            pair[part].add(f[:, rows], t[:, rows])
        both.append(pair)
    (fit, held_out), (fit_rows, held_out_rows) = both
    for ridge in (1e-3, torch.tensor([0.1, torch.inf])):
        primal, dual = fit.solve(ridge), fit_rows.solve(ridge)
        scale = torch.logspace(-2, 2, 20)  # compared as contributions
        torch.testing.assert_close(
            dual.dense().double() * scale, primal.dense() * scale, rtol=1e-3, atol=2e-4
        )  # float32 Gram
        torch.testing.assert_close(held_out_rows.error(dual), held_out.error(primal), rtol=1e-3, atol=1e-4)
        some = torch.randn(2, 3, 2, 20, generator=generator)
        torch.testing.assert_close(dual(some), (some.double().flatten(1, 2) @ dual.dense().double().mT).float()
                                   .unflatten(1, (3, 2)), rtol=1e-4, atol=1e-4)  # fmt: skip
        weights = torch.randn(2, 4, 3, generator=generator)
        torch.testing.assert_close(dual.after(weights), weights @ dual.dense(), rtol=1e-4, atol=1e-5)
    assert best_ridge(fit, held_out).tolist() == best_ridge(fit_rows, held_out_rows).tolist()


def test_a_joint_dual_regression_equals_one_of_all_features():
    generator = torch.Generator().manual_seed(0)
    f, t = torch.randn(3, 10, 8, generator=generator), torch.randn(1, 10, 2, generator=generator)
    joint, whole = Rows(lambda parts: parts.sum(0, keepdim=True)), Moments(1, 24, 2)
    joint.add(f, t)
    whole.add(f.movedim(0, 1).flatten(1)[None], t)
    found, expected = joint.solve(0.01).dense(), whole.solve(0.01).dense()[0].unflatten(1, (3, 8)).movedim(1, 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joint.error(joint.solve(0.01)), whole.error(whole.solve(0.01)), rtol=1e-4, atol=1e-5)


# Placement


def test_assignment_is_balanced_and_optimal():
    generator = np.random.default_rng(0)
    for _ in range(20):
        cost = generator.random((6, 3))
        shard = balanced_assignment(cost)
        assert np.bincount(shard).tolist() == [2, 2, 2]
        every = (p for p in itertools.product(range(3), repeat=6) if np.bincount(p, minlength=3).tolist() == [2, 2, 2])
        best = min(cost[range(6), p].sum() for p in every)
        assert cost[range(6), shard].sum() == pytest.approx(best, abs=1e-12)


def test_assignment_of_many_equals_the_assignment_problem():
    from scipy.optimize import linear_sum_assignment

    cost = np.random.default_rng(1).random((240, 4)) ** 3 - [0.3, 0, 0, 0]  # all want shard 0
    _, seat = linear_sum_assignment(cost.repeat(60, axis=1))
    mine = cost[range(240), balanced_assignment(cost)].sum()
    assert mine == pytest.approx(cost[range(240), seat // 60].sum(), rel=1e-12)


def test_impossible_assignments_are_refused():
    with pytest.raises(SPDError, match="evenly"):
        balanced_assignment(np.zeros((5, 2)))
    with pytest.raises(SPDError, match="not finite"):
        balanced_assignment(np.full((4, 2), np.nan))


@pytest.mark.parametrize("config", [PLAIN, BIASED])
def test_placement_cost_is_the_error_one_neuron_causes(config):
    """A neuron alone in the MLP, on the shard in question: the whole block's output error is its cost."""
    model = _model(config)
    site, data = _first_block(model)
    costs = placement_costs(site, data, None, tokens=10**9)
    for neuron, shard in ((0, 0), (7, 3), (20, 2)):
        alone = _model(config)
        site, data = _first_block(alone)
        order = list(range(24))
        place = 6 * shard
        order[place], order[neuron] = order[neuron], order[place]
        permute_neurons(site.block, order, site.shards)
        keep = site.block.mlp.down.weight[shard, :, 0].clone()
        site.block.mlp.down.weight.zero_()
        site.block.mlp.down.weight[shard, :, 0] = keep
        _, data = _first_block(alone)
        torch.testing.assert_close(costs[neuron, shard].item(), output_error(site, data) * TOKENS.numel() * 16)


# Refit


@pytest.mark.parametrize("attention", [False, True])
def test_sweeps_over_shards_converge_to_the_joint_solution(attention):
    changed = []
    for limits in ({}, {"joint_features": 0, "sweeps": 200}):
        site, data = _first_block(_model())
        refit(site, data, attention, ridge=1e-3, **limits)
        changed.append(_copy(site.block))
    for joint, swept in zip(changed[0].values(), changed[1].values(), strict=True):
        torch.testing.assert_close(joint, swept, rtol=0, atol=2e-4)  # float32 products in every sweep


@pytest.mark.parametrize("attention", [False, True])
def test_few_tokens_give_the_joint_solution_in_its_dual_form(attention, monkeypatch):
    changed = []
    for pretended in (None, 10**9):
        site, data = _first_block(_model())
        data = Calibration([x[:1, :20] for x in data.inputs[:1]], [x[:1, :20] for x in data.targets[:1]], data.context)
        assert data.tokens == 20
        if pretended:
            monkeypatch.setattr(Calibration, "tokens", pretended)
        refit(site, data, attention, ridge=1e-2)
        changed.append(_copy(site.block))
    for rows, joint in zip(changed[0].values(), changed[1].values(), strict=True):
        torch.testing.assert_close(rows, joint, rtol=0, atol=2e-4)


def test_few_sweeps_already_help():
    site, data = _first_block(_model())
    before = output_error(site, data)
    refit(site, data, ridge=1e-3, joint_features=0, sweeps=3)
    assert output_error(site, data) < before


def test_refit_of_a_block_without_error_changes_nothing_that_matters():
    """With the MLP's down projections at zero a dropped block equals its teacher."""
    model = _model()
    model.blocks[0].mlp.down.weight.zero_()
    site, data = _first_block(model)
    report = repair_block(site, data)
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
    site, data = _first_block(_model(config))
    report = repair_block(site, data, options)
    assert (
        report["error_after"]
        <= report["error_before"]
        == pytest.approx(output_error(*_first_block(_model(config))), rel=1e-6)
    )
    assert report["error_after"] == pytest.approx(output_error(site, data), rel=1e-6)


def _unchanged(block, before: dict) -> bool:
    """Biases of zero that were not there before are no change."""
    now = block.state_dict()
    return all(torch.equal(tensor, before.get(name, torch.zeros_like(tensor))) for name, tensor in now.items())


def test_a_repair_that_ends_worse_or_not_finite_is_undone(monkeypatch):
    site, data = _first_block(_model())
    before = _copy(site.block)
    monkeypatch.setattr(
        "spd.closed_form.apply_corrections", lambda block, *_: block.mlp.gate_up.weight.fill_(torch.nan)
    )
    report = repair_block(site, data, ClosedForm(place=False, refit=False))
    assert not report["kept"] and report["error_after"] == report["error_before"]
    assert _unchanged(site.block, before)


def test_a_block_whose_output_is_not_finite_is_left_alone():
    site, data = _first_block(_model())
    data.inputs[0][0, 0, 0] = torch.inf
    before = _copy(site.block)
    assert not repair_block(site, data)["kept"]
    assert _unchanged(site.block, before)


def _repair(model: Transformer, plan: Plan, tokens: torch.Tensor, **options) -> list[int]:
    """Repairs what the plan drops, each block on what those before it give now; sets the plan. Their numbers."""
    model.plan = plan
    student = [model.embed(batch).x for batch in batches(tokens)]
    teacher, repaired = list(student), []
    for i, policies in enumerate(plan.blocks):
        teacher = _run(model, i, teacher, TP_BLOCK)
        if policies == SPD_BLOCK:
            site = Site(model.blocks[i], i, model.shards, model.config)
            repair_block(site, Calibration(student, teacher, model.context), ClosedForm(**options))
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
    _repair(model, Plan.from_letters("DF DF"), TOKENS, joint_features=0, sweeps=5)
    logits = model(TOKENS)
    if rank == 0:
        torch.save(logits, f"{folder}/logits.pt")
    dist.destroy_process_group()


def test_processes_repair_as_one_does(tmp_path: Path):
    mp.spawn(_process, args=(2, str(tmp_path)), nprocs=2)
    model = _model()
    _repair(model, Plan.from_letters("DF DF"), TOKENS, joint_features=0, sweeps=5)
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
