"""`spd predict` of any plan: bytes as the engine counts them, memory as it is allocated, links where a plan pays."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from spd import Plan, SPDModel
from spd.comm import Link, Shards
from spd.config import SHAPES
from spd.errors import SPDError
from spd.latency import Prediction, Site, ask, break_even, plan_at
from spd.links import AllReduce, followed_by, link_all_reduce
from spd.machines import Machine, Pass, Work, gpu, read_profile
from spd.pretrained import build

LINK = Link.parse("10GBps,20us")
PLAIN = Machine("none", Work(), element_size=4)


def over(link=LINK, shape="llama2-7b", tp=8, **more) -> Prediction:
    return Prediction(SHAPES[shape], gpu("a100"), link_all_reduce(link, tp), tp, **more)


# ---------------------------------------------------------------- what a plan sends


@pytest.mark.parametrize("letters", ["FF", "DF", "44", "D3", "8D", "hD"])
@pytest.mark.parametrize("tp", [3, 4])
def test_a_plan_sends_what_the_engine_counts(spd_tiny, letters, tp):
    """Bytes and collectives of a prefill; the gathered logits apart, which one process does not gather."""
    plan = Plan.from_letters(" ".join([letters] * 7 + [f"{letters[0]}F"]))
    model = SPDModel.from_pretrained(spd_tiny, tp, plan)
    with torch.no_grad():
        model.transformer(torch.ones(2, 16, dtype=torch.long))
    counted = model.transformer.shards.take_collectives().values()
    rounded = len(plan.rounded(1, tp))
    sizes = {"tp": tp, "batch": 2, "prompt_len": 16, "new_tokens": 0}
    by_byte, by_count = (
        Prediction(model.config, PLAIN, link_all_reduce(link, tp), **sizes).time("ttft", plan).communication
        for link in (Link(1.0, 0.0), Link(float("inf"), 1.0))
    )
    logits = 2 * model.config.vocab_size * 4
    assert by_byte == pytest.approx(2 * (tp - 1) / tp * (sum(one.bytes for one in counted) + logits / 2), rel=1e-6)
    assert by_count == sum(one.count for one in counted) - rounded + 1  # two collectives, half the latency each


def test_a_table_s_least_time_is_paid_by_both_collectives_of_a_rounded_sync():
    table = AllReduce("table", lambda payload: max(10.0, payload))
    assert table(4.0) == 10 and table.rounded(4.0) == 20 and table.rounded(40.0) == 40
    ring = link_all_reduce(Link(1.0, 10.0), 2)
    assert ring.rounded(4.0) == ring(4.0) == 14
    assert followed_by(table, ring).rounded(4.0) == 34 and followed_by(table, ring)(4.0) == 24


def test_few_bits_pay_for_a_prompt_and_not_for_a_token_on_a_fast_link():
    config = SHAPES["llama2-70b"]
    four = Plan.full(80).sending(bits=4)
    asked = {"config": config, "tp": 8, "batch": 1, "new_tokens": 16}
    slow = Site(link="10Gbit,20us").prediction(config, 8, 8, 2048)
    fast = Site(gpu="h100", link="nvlink4").prediction(**{k: asked[k] for k in ("config", "tp")})
    assert slow.time("ttft", four).total < 0.4 * slow.time("ttft", slow.full).total
    assert fast.time("tpot", four).total > fast.time("tpot", fast.full).total > fast.time("tpot", None).total


def test_syncs_inside_groups_run_over_the_gpu_s_own_link_and_fit_into_a_node():
    config, plan = SHAPES["llama2-7b"], plan_at(32, 100).sending(group=4)
    site = Site(nodes=2, link="25Gbit,50us")
    found, dropped = site.prediction(config, 8), plan_at(32, 100)
    inside = site.inside(8, 4)
    more = found.time("ttft", plan).total - found.time("ttft", dropped).total
    assert more == pytest.approx(32 * inside(found.passes["ttft"].payload))
    result = ask(site, config, [(plan, None)], [(8, 1, 128, 16)])
    assert result["assumptions"][-1] == "Syncs inside groups run over NCCL measured on a100_dgx, 1 x 4."
    with pytest.raises(SPDError, match="Groups of 8 do not fill nodes of 4 GPUs"):
        found.time("ttft", plan_at(32, 100).sending(group=8))


# ---------------------------------------------------------------- memory, GPUs


@pytest.mark.parametrize("tp", [1, 3, 8])
def test_memory_is_that_of_the_weights_and_cache_that_a_shard_allocates(spd_tiny, tp):
    config = SPDModel.from_pretrained(spd_tiny, 1).config
    shard = build(config, Shards(tp, 0, tp), torch.float32, "meta")
    found = Prediction(config, PLAIN, link_all_reduce(LINK, tp), tp, 3, 50, 7).memory()
    weights = 4 * sum(parameter.numel() for parameter in shard.parameters())
    assert found["weights"] == pytest.approx(weights, rel=0.01)  # norms, which every shard has whole, are shared out
    cache = shard.new_cache(3, 50 + 7)
    assert found["cache"] == sum(part.numel() * part.element_size() for part in [*cache.keys, *cache.values])
    assert found["activations"] > 4 * 150 * config.hidden_size


def test_a_model_that_does_not_fit_is_said_not_to():
    config, plans = SHAPES["llama2-70b"], [(Plan.full(80), None)]
    asked = product(("h100", "rtx-3090"), (2, 8))
    answers = {(name, tp): ask(Site(name, link="10GBps,20us"), config, plans, [(tp, 1, 128)]) for name, tp in asked}
    assert {key: one["fits"] for key, one in answers.items()} == {
        ("h100", 2): True, ("h100", 8): True, ("rtx-3090", 2): False, ("rtx-3090", 8): True
    }  # fmt: skip
    assert 69e9 < answers["h100", 2]["memory_bytes"] < 71e9


@pytest.mark.parametrize("name", [row["gpu"] for row in read_profile("gpus")])
def test_gpus_known_by_data_sheet_are_said_to_be(name):
    row = next(row for row in read_profile("gpus") if row["gpu"] == name)
    result = ask(Site(gpu=name, link="10GBps,20us"), SHAPES["llama2-7b"], [(Plan.full(32), None)], [(8, 1, 128)])
    said = f"{name} is known by its data sheet alone: no time was measured on it."
    assert (said in result["assumptions"]) == (not row["all_reduce_system"]) and row["source"]
    assert result["tpot_ms"] > 1e3 * Pass(SHAPES["llama2-7b"], 8).work().weight_byte * gpu(name).costs.weight_byte


# ---------------------------------------------------------------- break-even


@pytest.mark.parametrize("plan", [plan_at(32, 70), Plan.full(32).sending(bits=4)], ids=["SPD", "4 bits"])
def test_at_the_break_even_the_gain_is_what_it_says(plan):
    found = break_even(over(), plan, LINK)
    assert [(row["time"], row["gain"]) for row in found] == list(product(("ttft", "tpot"), (0.05, 0.1, 0.2)))
    for row in found:
        for spec in (row["below_bandwidth"], row["above_latency"]):
            if spec not in (None, "any", "0us"):
                link = Link.parse(f"{spec},20us" if "Bps" in spec else f"10GBps,{spec}")
                at = over(link)
                gained = at.time(row["time"], at.full).total / at.time(row["time"], plan).total - 1
                assert gained == pytest.approx(row["gain"], abs=2e-4)


def test_where_every_link_would_do_or_none_the_break_even_says_so():
    spd, four = ({(r["time"], r["gain"]): r for r in break_even(over(), p, LINK)} for p in
                 (plan_at(32, 100), Plan.full(32).sending(bits=4)))  # fmt: skip
    assert spd["ttft", 0.05]["below_bandwidth"] == "any" and spd["ttft", 0.05]["above_latency"] == "0us"
    assert four["tpot", 0.05]["above_latency"] is None  # few bits save no latency
    nothing = break_even(over(), Plan.full(32), LINK)
    assert all(row["below_bandwidth"] is row["above_latency"] is None for row in nothing)


# ---------------------------------------------------------------- the command


def test_the_command_takes_lists_models_and_plans(spd, spd_tiny, tmp_path):
    asked = ["predict", "--shape", "llama2-70b", "--tp", "4,8", "--batch", "1,32", "--prompt-len", "128,2048"]
    code, result, err = spd(*asked, "--percent", "0,70", "--link", "pcie5")
    assert code == 0, err
    rows = result["rows"]
    assert [(r["tp"], r["batch"], r["prompt_len"], r["percent"]) for r in rows] == list(
        product((4, 8), (1, 32), (128, 2048), (0, 70))
    )
    assert {key: result[key] for key in rows[-1]} == rows[-1] and result["new_tokens"] == 16
    code, one, err = spd("predict", "--model", spd_tiny, "--tp", 4, "--drop", "1,3", "--bits", 4, "--link", "pcie5")
    assert code == 0 and one["plan"] == "44 D4 44 D4 44 44 44 4F" and one["percent"] == 25, err
    described = SPDModel.from_pretrained(spd_tiny, 4).describe()
    plan = {"policies": Plan.from_letters(one["plan"]).policies(), "model": described, "tp": 4}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, same, err = spd("predict", "--model", spd_tiny, "--tp", 4, "--plan", "plan.json", "--link", "pcie5")
    assert code == 0 and same["ttft_ms"] == one["ttft_ms"] and same["model"]["fingerprint"] == described["fingerprint"]
    assert spd("predict", "--shape", "llama2-70b", "--bits", 4)[1]["percent"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--shape llama2-7b --drop 1 --percent 70", "give one of them"),
        ("--shape llama2-7b --model spd-tiny", "Give either --model"),
        ("", "Give either --model"),
        ("--shape llama2-7b --tp 4 --group 3", "groups of 3"),
        ("--model spd-tiny --plan none.json", "There is no plan at none.json"),
        ("--shape llama2-7b --break-even --link pcie5", "A break-even is of links by formula"),
        ("--shape llama2-7b --tp 8,x", "not a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(spd, words, said):
    code, _, err = spd("predict", *words.split())
    assert code in (1, 2) and said in err and "bug" not in err


def test_a_prediction_by_a_replaced_link_keeps_the_rest():
    found = over(batch=4)
    other = replace(found, all_reduce=link_all_reduce(Link.parse("1GBps,20us"), 8))
    assert other.time("ttft", None) == found.time("ttft", None)
    assert other.time("ttft", found.full).total > found.time("ttft", found.full).total
