import json

import pytest

from spd import Plan
from spd.errors import SPDError
from spd.plan import parse_blocks, read_plan
from spd.planner import blocks_of, classify, make_plan, parse_budget, plans_by_percentage, ranking, read_sensitivity

S = [3.0, 0.5, 0.04, 0.2, 12.0, 0.04]


def test_letters_and_policies_round_trip():
    plan = Plan.dropping(4, attention=[0, 2], mlp=[2, 3])
    assert str(plan) == "DF FF DD FD"
    assert Plan.from_letters(str(plan)) == plan == Plan.from_policies(plan.policies())
    assert plan.policies()[0] == ["drop", "full"]
    assert plan.dropped() == [0, 2] and plan.dropped("mlp") == [2, 3]
    assert plan.syncs() == 4 + 1  # the last MLP is dropped, so a flush is due
    assert Plan.full(4).syncs() == 8
    for wrong in ("DF X", "DF XF", "DFF"):
        with pytest.raises(SPDError, match="two letters of F, D, 8, 4, 3, 2, h, f, t, w, G a block"):
            Plan.from_letters(wrong)
    with pytest.raises(
        SPDError, match="Unknown policy 'skip'; known: full, drop, int8, int4, int3, int2, int8-plain, int4-plain"
    ):
        Plan.from_policies([["skip", "full"]])


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ("none", []),
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("3", [3]),
        ("1,3,5-7", [1, 3, 5, 6, 7]),
        (" 0 , 2 - 3", [0, 2, 3]),
        ("2,2", [2]),
    ],
)
def test_block_numbers(spec, blocks):
    assert parse_blocks(spec, 8) == blocks


@pytest.mark.parametrize(
    ("spec", "message"),
    [("8", "Block 8 does not exist: the model has blocks 0 to 7"), ("5-9", "Block 8 does not"), ("a", "does not name"),
     ("", "does not name"), ("1,,2", "does not name"), ("-1", "does not name"), ("3-1", "runs backwards")],
)  # fmt: skip
def test_wrong_block_numbers(spec, message):
    with pytest.raises(SPDError, match=message):
        parse_blocks(spec, 8)


def test_budget():
    assert [parse_budget(b, 8) for b in ("0", "8", "70%", "50%", "0%", "100%")] == [0, 8, 6, 4, 0, 8]
    assert blocks_of(70, 5) == 4  # floor(3.5 + 0.5)
    assert [blocks_of(p, 80) for p in (91.3, 97.5, 98.8)] == [73, 78, 79]
    for wrong, message in (
        ("9", "more than the model's 8"),
        ("101%", "more than the model's 8"),
        ("100.4%", "more than the model's 8"),
        ("x", "not a budget"),
        ("2.5", "not a budget"),
    ):
        with pytest.raises(SPDError, match=message):
            parse_budget(wrong, 8)


def test_algorithm_1():
    plan = make_plan(S, "4", tau1=0.05, tau2=10.0)
    assert plan["ranking"] == [2, 5, 3, 1, 0, 4]  # equals: the lower number first
    assert plan["classes"] == ["SB", "SB", "ISB", "SB", "ESB", "ISB"]
    assert plan["plan"] == "FF DF DF DF FF DF"
    assert plan["treatments"] == ["keep", "distill, drop", "drop", "distill, drop", "keep", "drop"]
    assert plan["budget"] == {"blocks": 4, "percent": pytest.approx(66.67, abs=0.01)}
    assert make_plan(S, "100%", 0.05, 10)["treatments"][4] == "group heads, distill, drop"
    assert classify(0.05, 0.05, 10) == "ISB" and classify(10, 0.05, 10) == "SB"
    for values, message in (([1.0, float("nan")], "not finite"), ([], "empty")):
        with pytest.raises(SPDError, match=message):
            make_plan(values, "0")
    with pytest.raises(SPDError, match="tau1 must not exceed tau2"):
        make_plan(S, "1", tau1=2, tau2=1)


def test_plans_by_percentage():
    plans = plans_by_percentage(S)
    assert list(plans) == [0, 1, 2, 3, 4, 5, 6]
    assert all(len(plan.dropped()) == blocks for blocks, plan in plans.items())
    assert plans[2].dropped() == sorted(ranking(S)[:2])
    assert list(plans_by_percentage(S, [0, 1, 50, 100])) == [0, 3, 6]  # 1 % of six blocks is none
    with pytest.raises(SPDError, match=r"120.* is not a percentage"):
        plans_by_percentage(S, [120])


def test_plan_files_belong_to_model_and_degree(tmp_path):
    path = tmp_path / "plan.json"
    document = {"policies": Plan.dropping(3, [1]).policies(), "model": {"name": "m", "fingerprint": "abc"}, "tp": 4}
    path.write_text(json.dumps(document))
    assert str(read_plan(path, "abc", 4, 3).plan) == str(read_plan(tmp_path, "abc", 4, 3).plan) == "FF DF FF"
    assert read_plan(tmp_path).tp == 4
    for arguments, message in (
        (("abc", 4, 5), "has 3 blocks, the model 5"),
        (("abc", 2, 3), "made for tp=4, not tp=2"),
        (("xyz", 4, 3), r"made for m \(abc\), and this model is xyz"),
    ):
        with pytest.raises(SPDError, match=message):
            read_plan(path, *arguments)
    for wrong, message in (
        ([], "an object"),
        (document | {"tp": "4"}, "tp: .*valid integer"),
        (document | {"policies": [["drop"]]}, "policies: 0: 1: Field required"),
        (document | {"model": {}}, "model: fingerprint: Field required"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(SPDError, match=f"is not a plan file, .*{message}"):
            read_plan(path)
    with pytest.raises(SPDError, match="There is no plan"):
        read_plan(tmp_path / "missing.json", "abc", 4, 3)


def test_sensitivity_files_belong_to_model_and_degree(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"sensitivity": S, "tp": 4, "model": {"name": "m", "fingerprint": "abc"}}))
    assert read_sensitivity(path, "abc", 4)["sensitivity"] == S
    for arguments, message in ((("xyz", 4), r"made for m \(abc\), not"), (("abc", 8), "made for tp=4, not tp=8")):
        with pytest.raises(SPDError, match=message):
            read_sensitivity(path, *arguments)
    good = {"sensitivity": [1.0, 2.0], "tp": 4, "model": {"name": "m", "fingerprint": "abc"}}
    for wrong, message in (
        ("{", ""),
        ("{}", "model: Field required"),
        (json.dumps(good | {"sensitivity": [1.0, float("nan")]}), "sensitivity: 1: .*finite"),
        (json.dumps(good | {"sensitivity": []}), "at least 1"),
        (json.dumps(good | {"sensitivity": [1.0, "2"]}), "sensitivity: 1: .*valid number"),
        (json.dumps(good | {"tp": "4"}), "tp: .*valid integer"),
        (json.dumps(good | {"perplexity_from": [3.0, 2.0]}), "perplexity_from holds 2 numbers, .* should be 3"),
    ):
        path.write_text(wrong)
        with pytest.raises(SPDError, match=f"was not written by the sensitivity command.*{message}"):
            read_sensitivity(path)


def test_stretches_lie_between_places_where_everything_is_synchronised():
    """By hand: first sublayer, policies, and how far what they change reaches."""

    def of(letters: str) -> list[tuple]:
        stretches = Plan.from_letters(letters, 2).stretches()
        return [
            (s.first, "".join(p.letter for p in s.policies), s.end, [*s.blocks], s.drops_attention) for s in stretches
        ]

    assert of("FF FF FF") == []
    assert of("DF FF DF") == [(0, "DF", 2, [0], True), (4, "DF", 6, [2], True)]
    assert of("FD FF FF") == [(1, "DF", 3, [0, 1], False)]
    assert of("FD FD DD") == [(1, "DF", 3, [0, 1], False), (3, "DDF", 6, [1, 2], False)]
    assert of("44 4F FD") == [(0, "4", 2, [0], False), (1, "4", 3, [0, 1], False), (2, "4", 4, [1], False)]
    assert of("D4 GG tF") == [(0, "D4", 3, [0, 1], True), (2, "GGt", 6, [1, 2], False)]
