"""Plans for a target: the best of all there are, at the latency model's times; promises are kept, or the run fails."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from spd import Plan, SPDModel
from spd.config import SHAPES
from spd.errors import SPDError
from spd.latency import Site
from spd.plan import DROP, FULL, KEPT, POINTS
from spd.targets import MARGIN, Choices, Target, kept

BLOCKS = 3
NAMES = ("drop", "int8", "int4")


def scores(seed=0, blocks=BLOCKS) -> dict:
    """Random, a drop's the largest."""
    draw, sizes = np.random.default_rng(seed), dict(zip(NAMES, (1, 0.03, 0.3), strict=True))
    return {point: {name: (draw.random(blocks) * size).tolist() for name, size in sizes.items()} for point in POINTS}


def prediction(link="1GBps,30us", tp=4):
    config = replace(SHAPES["llama-125m"], num_blocks=BLOCKS)
    return Site(link=link).prediction(config, tp, 2, 256, 8)


@pytest.fixture
def choices() -> Choices:
    return Choices.of(scores(), prediction(), "prefill")


def every_plan():
    for row in product((FULL, DROP, KEPT[8], KEPT[4]), repeat=2 * BLOCKS - 1):
        points = (*row, FULL)
        yield Plan(tuple(zip(points[::2], points[1::2], strict=True)))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_times_are_sums_over_sync_points_and_losses_half_squares_of_scores(phase):
    """Of drops in a row the k-th counts k times."""
    found, given, kind = prediction(), scores(), {"prefill": "ttft", "decode": "tpot"}[phase]
    choices = Choices.of(given, found, phase)
    for plan in list(every_plan())[::97]:
        spent = choices.rest + choices.costs[choices.numbers(plan)].sum()
        assert spent == pytest.approx(found.time(kind, plan).total)
        lost, run = 0.0, 0
        for i, pair in enumerate(plan.blocks):
            for point, policy in zip(POINTS, pair, strict=True):
                run = run + 1 if policy == DROP else 0
                lost += 0 if policy == FULL else max(run, 1) * given[point][policy.name][i] ** 2 / 2
        assert choices.loss(plan) == pytest.approx(lost)


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_is_better_than_the_best(seed):
    found = prediction()
    choices = Choices.of(scores(seed), found, "prefill")
    all_of_them = [(found.time("ttft", plan).total, choices.loss(plan)) for plan in every_plan()]
    full = found.time("ttft", found.full).total
    for speedup in (1.1, 1.5, 2.0):
        best = choices.best(seconds=full / speedup)
        assert found.time("ttft", best).total <= full / speedup * (1 + 1e-9)
        # its times are whole units, rounded up: nothing that is as much faster loses less
        slack = full / speedup - choices.costs[0] / 400 * (2 * BLOCKS - 1)
        assert choices.loss(best) <= min(lost for seconds, lost in all_of_them if seconds <= slack) + 1e-12
    for nats in (0.0, 0.01, 0.1, 10.0):
        best = choices.best(nats=nats)
        fastest = min(seconds for seconds, lost in all_of_them if lost <= nats)
        assert choices.loss(best) <= nats and found.time("ttft", best).total <= fastest * 1.005


def test_so_many_drops_as_a_time_allows_are_not_one_more():
    """Syncs in few bits that take longer than full ones do not make the units coarser."""
    found = prediction("100GBps,20us")
    choices = Choices.of(scores(), found, "decode")
    assert choices.costs.max() > choices.costs[0]
    for drops in range(2 * BLOCKS):
        plan = choices.best(seconds=found.time("tpot", found.full).total - drops * choices.costs[0])
        assert str(plan).count("D") == drops and set(str(plan)) <= set("DF ")


def test_where_latency_is_all_only_drops_are_planned_and_where_bytes_are_few_bits():
    plans = []
    for link in ("1000GBps,1ms", "100MBps,0us"):
        found = prediction(link)
        plans.append(Target(found, speedup=1.5).plan(Choices.of(scores(), found, "prefill")))
    assert set(str(plans[0])) == set("DF ") and "D" not in str(plans[1])


def test_what_cannot_be_met_is_refused_with_what_could_be(choices):
    found, words = prediction(), r"A speedup of 50 in prefill cannot be met over 1GBps,30us: .* at most (\d\.\d+),"
    with pytest.raises(SPDError, match=words) as caught:
        Target(found, speedup=50).plan(choices)
    bare = Plan.dropping(BLOCKS, range(BLOCKS), range(BLOCKS - 1))
    assert f"{found.time('ttft', found.full).total / found.time('ttft', bare).total:.3f}" in str(caught.value)
    for wrong in ({}, {"speedup": 2, "nats": 1}):
        with pytest.raises(SPDError, match="either a speedup"):
            Target(found, **wrong)
    for given, at, phase, said in (
        (None, found, "prefill", "sensitivity --fast"),
        (scores(), prediction(tp=1), "prefill", "One GPU alone"),
        (scores(), found, "training", "known: prefill, decode"),
        (scores(blocks=2), found, "prefill", "The scores are of 2 blocks, and the model has 3"),
    ):
        with pytest.raises(SPDError, match=said):
            Choices.of(given, at, phase)


# ---------------------------------------------------------------- measured

SHARES = {DROP: 0.6, KEPT[8]: 0.5, KEPT[4]: 0.1}


def searched(choices, evaluations=4, shares=SHARES, twist=lambda plan: 0.0, **target):
    """On a model whose true losses are shares of the estimated ones: plan, promise, shares found, plans measured."""
    asked, truth = [], replace(choices, losses=choices.losses * [1, *(shares[p] for p in choices.policies[1:])])

    def measure(plan):
        asked.append(plan)
        return 3.0 + truth.loss(plan) + twist(plan)

    return *Target(prediction(), **target).searched(choices, measure, evaluations), truth, asked


def test_a_search_finds_what_policies_really_lose_and_plans_by_it(choices):
    plan, most, shares, truth, asked = searched(choices, speedup=1.8)
    assert shares == pytest.approx({policy.name: share for policy, share in SHARES.items()})
    assert truth.loss(plan) <= truth.loss(Target(prediction(), speedup=1.8).plan(choices)) + 1e-12
    assert most == pytest.approx(truth.loss(plan) / MARGIN)
    assert len(asked) == 1 + 3 + 1 + 4  # full, each policy alone, the plan, its neighbours


def test_neighbours_that_lose_less_are_taken_and_are_as_fast(choices):
    base, *_, truth, _ = searched(choices, 0, speedup=1.8)
    other = truth.exchanges(base)[0]
    plan = searched(choices, twist=lambda plan: -1.0 * (plan == other), speedup=1.8)[0]
    assert plan == other and choices.costs[choices.numbers(plan)].sum() == choices.costs[choices.numbers(base)].sum()


def test_a_loss_is_used_up_as_far_as_it_is_measured_to_be_there(choices):
    plan, most, _, truth, _ = searched(choices, nats=0.05)
    asked = Target(prediction(), nats=0.05).plan(choices)
    seconds = [choices.costs[choices.numbers(one)].sum() for one in (plan, asked)]
    assert seconds[0] < seconds[1] and truth.loss(plan) <= MARGIN * 0.05 and most == 0.05
    assert searched(choices, shares=dict.fromkeys(SHARES, 1e6), nats=1e-6)[0] == prediction().full


def test_a_promise_is_kept_or_the_run_fails(choices):
    found = prediction()
    target = Target(found, nats=0.05)
    result = target.promise(target.plan(choices), choices)
    assert result["promise"]["estimated_nats"] <= 0.05 == result["promise"]["loss_nats"] and result["measured"] is None
    assert result["promise"]["ttft"]["speedup"] > 1 and len(result["classes"]) == BLOCKS
    good = kept(result, lambda plan: 3.0 + 0.03 * (plan != found.full), found.full)
    assert good["loss_nats"] == pytest.approx(0.03) and good["perplexity"] == pytest.approx(np.exp(3.03))
    with pytest.raises(SPDError, match="breaks its promise and is not kept: at most 0.05 nats .* and 0.06 were"):
        kept(result, lambda plan: 3.0 + 0.06 * (plan != found.full), found.full)


# ---------------------------------------------------------------- one cache for two plans


@torch.no_grad()
def continued(model, first: str, second: str):
    """Last logits of a prompt read under one plan and of tokens after it, one by one, under another."""
    tokens = torch.arange(40, 52)[None]
    cache = model.new_cache(1, 12)
    model.plan = Plan.from_letters(first)
    model(tokens[:, :8], cache)
    model.plan = Plan.from_letters(second)
    return torch.cat([model(tokens[:, i : i + 1], cache) for i in range(8, 12)], 1)


MIXED = "DF 44 FD FF 8D FF DF "


@pytest.mark.parametrize("last", ["FF", "DF", "4F", "DD"])
def test_plans_that_differ_in_the_last_block_alone_share_a_cache(spd_tiny, last):
    model = SPDModel.from_pretrained(spd_tiny, 4).transformer
    assert Plan.from_letters(MIXED + "FF").shares_cache(Plan.from_letters(MIXED + last))
    assert torch.equal(continued(model, MIXED + "FF", MIXED + last), continued(model, MIXED + last, MIXED + last))


@pytest.mark.parametrize("place", [0, 5, 6])
def test_any_other_difference_is_another_cache(spd_tiny, place):
    model, letters = SPDModel.from_pretrained(spd_tiny, 4).transformer, [*MIXED.split(), "FF"]
    other = " ".join("D4" if i == place else pair for i, pair in enumerate(letters))
    assert not Plan.from_letters(MIXED + "FF").shares_cache(Plan.from_letters(other))
    assert not torch.allclose(continued(model, other, MIXED + "FF"), continued(model, MIXED + "FF", MIXED + "FF"))


# ---------------------------------------------------------------- the command


def test_the_command_plans_measures_and_refuses(spd, spd_tiny, monkeypatch):
    common = ["--model", "spd-tiny", "--text", "builtin-train", "--seq-len", 64]
    fast = ["--fast", "--policies", "drop,int4", "--windows", 4]
    code, _, err = spd("sensitivity", *common, "--tp", 4, *fast, "--out", "s.json")
    assert code == 0, err
    at = ["plan", "s.json", "--link", "1GBps,50us", "--gpu", "h100"]
    code, prefill, err = spd(*at, "--model", "spd-tiny", "--target-speedup", 1.3, "--out", "p.json")
    assert code == 0 and prefill["promise"]["ttft"]["speedup"] >= 1.3 and prefill["measured"] is None, err
    asked = [*at, *common, "--phase", "decode", "--windows", 8, "--evaluations", 3]
    code, decode, err = spd(*asked, "--max-loss", 0.2, "--beside", "p.json", "--out", "d.json")
    assert code == 0, err
    assert decode["measured"]["loss_nats"] <= 0.2 == decode["promise"]["loss_nats"] and decode["shares_cache"] is False
    assert decode["promise"]["tpot"]["speedup"] > 1 and set(decode["measured"]["of_estimates"]) == {"drop", "int4"}
    assert spd("eval", *common, "--tp", 4, "--windows", 2, "--plan", "d.json")[1]["plan"] == decode["plan"]
    for words, said in (
        (["--target-speedup", 99, "--model", "spd-tiny"], "cannot be met over 1GBps,50us"),
        (["--target-speedup", 2, "--budget", 3, "--model", "spd-tiny"], "give one of them"),
        (["--target-speedup", 2, "--shape", "llama2-7b"], "The scores are of 8 blocks, and the model has 32"),
        (["--target-speedup", 1.1, *common, "--windows", 1], "give two or more"),
    ):
        code, _, err = spd(*at, *words)
        assert code == 1 and said in err
    monkeypatch.setattr("spd.targets.MARGIN", 50.0)
    code, result, err = spd(*asked, "--max-loss", 0.01, "--out", "broken.json")
    assert code == 1 and "breaks its promise" in err and result is None
    with pytest.raises(FileNotFoundError):
        Path("broken.json").read_text()
    assert json.loads(Path("d.json").read_text())["plan"] == decode["plan"]
