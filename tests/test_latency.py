"""The latency model: counted work, tables reproduced, links, fits that find what made the numbers, errors in words."""

import copy
import csv
import json
from datetime import UTC, datetime
from itertools import product

import draw
import draw_calibration
import pytest
from predict_paper import (
    claims,
    decode_check,
    figure2,
    figure7,
    fitted_launch,
    fitted_link,
    lean_all_reduce,
    predict_paper,
    prediction,
    reference,
    stated_link,
)

from spd.calibrate import (
    fit,
    observations_of,
    profile,
    speedups,
    worst,
    worst_points,
)
from spd.comm import Link
from spd.config import SHAPES, named_shape
from spd.errors import SPDError
from spd.latency import Prediction, Site, plan_at, read
from spd.latency import ask as answer
from spd.latency import predict as predict_plan
from spd.links import (
    fitted_all_reduce,
    followed_by,
    link_all_reduce,
    measured_all_reduce,
    preset_all_reduce,
    preset_errors,
    presets,
)
from spd.machines import TABLE_MODELS, Costs, Machine, Pass, gpu, read_profile
from spd.plan import Plan
from spd.records import make_record, write_record

TEN_GIGABYTES = Link.parse("10GBps,20us")
SHAPE_GIVEN = {"batch": 1, "prompt_len": 128, "new_tokens": 16}
COSTS = Costs(2e-5, 1e-11, 1e-10, 3e-11, 2e-10)  # round numbers, as of a slow CPU


def predict(prediction: Prediction, percent: float) -> dict:
    return predict_plan(prediction, plan_at(prediction.config.num_blocks, percent), percent)


def ask(shape, percent, tp=8, *, gpu_name=None, nodes=None, link=None, calibration=None, launch_us=0.0, **sizes):
    """`spd predict` of a shape and percentages."""
    config, percents = named_shape(shape), percent if isinstance(percent, list) else [percent]
    plans = [(plan_at(config.num_blocks, one), one) for one in percents]
    site = Site(gpu_name, calibration, nodes, link, 1e-6 * launch_us)
    return answer(site, config, plans, [(tp, *(SHAPE_GIVEN | sizes).values())])


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("shape", ["llama2-7b", "llama2-70b", "llama3.2-1b"])
def test_matrix_products_count_every_weight_once_and_two_flops_a_token(shape):
    config, tokens = SHAPES[shape], 3
    one = Pass(config, 1, batch=2, tokens=tokens, element_size=2)
    products = [o.work for o in one.block() if o.kind == "matrix products"]
    norms, ends = 2 * config.hidden_size, config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    weights = (config.parameters() - ends - config.hidden_size) / config.num_blocks - norms
    assert sum(work.weight_byte for work in products) == 2 * weights
    assert sum(work.flop for work in products) == 2 * weights * 2 * tokens


def test_tp_divides_the_matrix_work_and_not_the_payload():
    whole, part = Pass(SHAPES["llama2-7b"], 1, tokens=5), Pass(SHAPES["llama2-7b"], 4, tokens=5)
    for one, shard in zip(whole.block(), part.block(), strict=True):
        if one.kind == "matrix products":
            assert shard.work.flop * 4 == one.work.flop
    assert part.payload == whole.payload == 5 * 4096 * 2


def test_only_several_tokens_at_once_read_weights_in_a_batch():
    assert Pass(SHAPES["llama2-7b"], 1).work().batched_weight_byte == 0
    many = Pass(SHAPES["llama2-7b"], 1, batch=2)
    assert many.work().batched_weight_byte == many.work().weight_byte


# ---------------------------------------------------------------- machines and tables


def test_every_row_of_the_operator_table_is_reproduced():
    machine, columns = gpu("a100"), [key for key in read_profile("layer_ops_a100")[0] if key.endswith("_us")]
    for row in read_profile("layer_ops_a100"):
        one = Pass(SHAPES[TABLE_MODELS[row["model"]]], int(row["tp"]), tokens=int(row["tokens"]))
        operators = {o.name: o for o in [*one.block(), *one.ends()]}
        for column in columns:
            seconds = machine.seconds(operators[column.removesuffix("_us")], one.tp)
            assert 1e6 * seconds == pytest.approx(float(row[column]), rel=1e-9)


def test_every_row_of_the_all_reduce_table_is_reproduced():
    for row in read_profile("all_reduce_a100"):
        name = {"a100_dgx": "a100", "a100_pairwise_nvlink": "a100-pairwise"}[row["system"]]
        workers, nodes = int(row["workers"]), int(row["workers"]) // int(row["devices_per_node"])
        seconds = measured_all_reduce(name, workers, nodes)(float(row["bytes"]))
        assert 1e6 * seconds == pytest.approx(float(row["all_reduce_us"]), rel=1e-9)


def test_between_sizes_an_all_reduce_lies_between_its_neighbours_and_beyond_them_keeps_the_bandwidth():
    table = measured_all_reduce("a100", 8, 2)
    assert 462e-6 < table(3 << 20) < 613e-6  # between 2 and 4 MiB
    assert table(128 << 20) == pytest.approx(2 * table(64 << 20))
    assert table(1) == table(2048)


@pytest.mark.parametrize("tokens", [1, 128, 200, 8192])
def test_operators_of_13b_lie_between_those_of_7b_and_70b(tokens):
    machine = gpu("a100")
    times = [
        [machine.seconds(o, 8) for o in Pass(SHAPES[shape], 8, tokens=tokens).block() if o.kind == "matrix products"]
        for shape in ("llama2-7b", "llama2-13b", "llama2-70b")
    ]
    assert all(small < middle < large for small, middle, large in zip(*times, strict=True))


def test_a_machine_with_higher_peaks_is_faster_and_a_launch_time_adds_up():
    one = Pass(SHAPES["llama2-7b"], 8, tokens=128)
    a100, h100 = ([gpu(name).seconds(o, 8) for o in one.block()] for name in ("a100", "h100"))
    assert all(new < old for new, old in zip(h100, a100, strict=True))
    link = link_all_reduce(TEN_GIGABYTES, 8)
    plain, slow = (Prediction(SHAPES["llama2-7b"], gpu("a100", launch), link, 8) for launch in (0, 1e-5))
    more = slow.dropping("ttft", 0).total - plain.dropping("ttft", 0).total
    assert more == pytest.approx(1e-5 * (32 * 11 + 3))


# ---------------------------------------------------------------- links by name


@pytest.mark.parametrize("row", preset_errors(), ids=lambda row: f"{row['link']}-{row['devices']}")
def test_a_size_left_out_of_a_link_within_a_node_is_read_to_ten_percent(row):
    assert row["source"] and row["all_reduce"]
    if row["devices"] is None:
        assert row["median_error"] is None and row["source"].startswith("by formula")
    elif row["nodes"] == 1:
        assert row["median_error"] <= 0.10
    else:
        assert row["median_error"] <= 0.25 and row["worst_error"] < 1.1


def test_every_measured_size_of_a_link_is_reproduced():
    for row in read_profile("links"):
        seconds = preset_all_reduce(row["preset"], int(row["devices"]))(float(row["bytes"]))
        if "outlier" not in row["note"]:
            assert 1e6 * seconds == pytest.approx(float(row["us"]), rel=1e-9)


def test_links_are_those_of_the_shared_profiles(shared):
    with open(shared / "profiles/links.csv") as file:
        measured = {(r["system"], r["bytes"], float(r["us"])) for r in csv.DictReader(file)}
    systems = {(p["preset"], p["devices"]): p["system"] for rows in presets().values() for p in rows}
    rows = [(systems[r["preset"], r["devices"]], r["bytes"], float(r["us"])) for r in read_profile("links")]
    assert len(rows) == 173 and set(rows) <= measured


def test_an_all_reduce_is_another_kernel_s_at_another_size():
    """On one switch a one-shot kernel is twice as fast as NCCL for a token, and behind it for a prompt."""
    nccl, one_shot = preset_all_reduce("pcie5-p2p", 4), preset_all_reduce("pcie5-one-shot", 4)
    assert nccl(16 << 10) > 1.7 * one_shot(16 << 10) and nccl(1 << 20) < one_shot(1 << 20)


def test_a_link_among_other_numbers_of_gpus_moves_as_many_bytes_and_says_so():
    eight, two = preset_all_reduce("nvlink5", 8), preset_all_reduce("nvlink5", 2)
    assert two(7 << 20) == pytest.approx(eight(4 << 20)) and "read for 2" in two.name
    assert preset_all_reduce("nvlink4", 1)(1 << 20) == 0
    assert "4x H100" in preset_all_reduce("nvlink4", 4).name and "8x H200" in preset_all_reduce("nvlink4", 8).name


def test_bits_are_understood_and_ethernet_is_a_formula():
    assert Link.parse("25Gbit,10us").bandwidth == 25e9 / 8 and Link.parse("1GBps,10us").bandwidth == 1e9
    assert preset_all_reduce("tcp-1gbe", 4)(1e6) == link_all_reduce(Link.parse("1Gbit,900us"), 4)(1e6)


def test_a_named_link_has_its_nodes_and_replaces_a_calibration_s_own():
    result = ask("llama2-7b", 50, 8, link="ib-2x4")
    assert result["nodes"] == 2 and result["link"].startswith("ib-2x4: NCCL on 2 nodes x 4 H100")
    with pytest.raises(SPDError, match="measured on 2 node"):
        ask("llama2-7b", 50, 8, link="ib-2x4", nodes=1)
    with pytest.raises(SPDError, match="nvlink3, nvlink4"):
        ask("llama2-7b", 50, 8, link="nvlink")
    assert "between the 2 nodes" in ask("llama2-7b", 50, 8, link="25Gbit,20us", nodes=2)["assumptions"][-1]


# ---------------------------------------------------------------- predictions


def predicted_over(link=TEN_GIGABYTES, shape="llama2-7b", tp=8, **more) -> Prediction:
    return Prediction(SHAPES[shape], gpu("a100"), link_all_reduce(link, tp), tp, **more)


def test_communication_is_the_ring_formula_times_the_sync_points():
    predicted = predicted_over(batch=2, prompt_len=100)
    payload = 2 * 100 * 4096 * 2
    one = 20e-6 + 2 * 7 / 8 * payload / 10e9
    gather = 20e-6 + 7 / 8 * 2 * 32000 * 2 / 10e9
    assert predicted.dropping("ttft", 0).communication == pytest.approx(64 * one + gather)
    assert predicted.dropping("ttft", 50).communication == pytest.approx(48 * one + gather)
    assert predicted.dropping("tpot", 100).communication == pytest.approx(
        32 * (20e-6 + 2 * 7 / 8 * 2 * 4096 * 2 / 10e9) + gather
    )


def test_sync_points_are_counted_as_the_engine_counts_them():
    for percent, dropped in ((0, 0), (50, 20), (62.5, 25), (98.8, 40), (100, 40)):
        assert plan_at(40, percent).syncs() == Plan.dropping(40, range(dropped)).syncs()


@pytest.mark.parametrize("free", [Link(float("inf"), 0.0), Link.parse("1000000TBps,0us")])
def test_over_a_free_link_dropping_gains_nothing(free):
    result = predict(predicted_over(free), 100)
    assert result["communication_share"] == pytest.approx(0, abs=1e-6)
    assert result["speedup"] == pytest.approx(1, abs=1e-6)


def test_one_gpu_communicates_nothing():
    result = predict(predicted_over(tp=1), 100)
    assert (result["communication_share"], result["reduction"], result["speedup"]) == (0, 0, 1)


@pytest.mark.parametrize("kind", ["ttft", "tpot"])
def test_more_dropped_is_never_slower_nor_beyond_the_ceiling(kind):
    predicted = predicted_over(shape="llama2-70b")
    speedups = [predicted.compare(kind, percent)["speedup"] for percent in range(0, 101, 5)]
    assert speedups == sorted(speedups) and speedups[0] == 1
    assert speedups[-1] < predicted.bound(kind)["speedup"]


def test_a_slower_link_makes_dropping_pay_more():
    slow, fast = (predict(predicted_over(Link.parse(f"{b}GBps,10us")), 70) for b in (5, 50))
    assert slow["speedup"] > fast["speedup"] and slow["communication_share"] > fast["communication_share"]


def test_reduction_and_speedup_are_two_views_of_the_same_times():
    result = predict(predicted_over(), 70)
    full = result["all_full"]["ttft"]["ms"]
    assert result["reduction"] == pytest.approx(1 - result["ttft_ms"] / full)
    assert result["speedup"] == pytest.approx(full / result["ttft_ms"])
    assert sum(result["parts_ms"]["ttft"].values()) == pytest.approx(result["ttft_ms"])


# ---------------------------------------------------------------- questions and their answers


def test_an_answer_has_the_keys_scripts_rely_on_and_is_strict_json():
    result = ask("llama2-70b", 70, 8, gpu_name="a100", link="25GBps,10us")
    text = json.dumps(result, allow_nan=False)
    keys = {"ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup", "ceiling"}
    assert keys <= set(json.loads(text))
    assert set(result["ceiling"]) == {"all_attention_dropped", "no_communication"}
    assert result["blocks_dropped"] == 56


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": "llama2-8b"}, "llama2-7b, llama2-13b"),
        ({"gpu_name": "b300"}, ", ".join(row["gpu"] for row in read_profile("gpus"))),
        ({"link": "10Gbit"}, "'10GBps,20us'"),
        ({"percent": 101}, "between 0 and 100"),
        ({"tp": 33}, "valid: 1 to 32"),
        ({"tp": 8, "nodes": 3}, "evenly over 3 nodes"),
        ({"gpu_name": "mi300x"}, "--link"),
        ({"tp": 8, "nodes": 4}, "tp=8 on 1 node, "),
        ({"prompt_len": 4090}, "4096 positions"),
    ],
)
def test_mistakes_are_answered_in_words(options, words):
    with pytest.raises(SPDError) as caught:
        ask(**{"shape": "llama2-7b", "percent": 70, **options})
    assert words in str(caught.value) and str(caught.value).endswith((".", "'."))


# ---------------------------------------------------------------- the paper and the decode benchmark


def test_fitted_links_fill_figure_2_and_the_stated_ones_do_not():
    rows = {row["setting"]: row for row in figure2() if row["percent"] == 0}
    fill = rows["1x8 HBW"]["measured_ms"] / rows["1x8 HBW"]["axis_upper_ms"]
    for name, row in rows.items():
        assert row["fitted_ms"] / row["axis_upper_ms"] == pytest.approx(fill)
        assert row["stated_ms"] < row["fitted_ms"], name
    assert stated_link("1x8 LBW").bandwidth == 10e9
    assert fitted_link("1x8 LBW", 1.0).bandwidth < fitted_link("1x8 LBW").bandwidth < 10e9


def test_over_slow_links_the_slower_of_the_table_and_the_stated_hop_sets_the_pace():
    table, hop = measured_all_reduce("a100", 8, 1), link_all_reduce(stated_link("1x8 LBW"), 8)
    slow, fast = lean_all_reduce("1x8 LBW"), lean_all_reduce("1x8 HBW")
    small, large = 1 << 12, 1 << 26
    assert slow(small) == table(small) > hop(small) and slow(large) == hop(large) > table(large)
    assert fast(large) == table(large)


@pytest.mark.parametrize("reading", ["reduction", "speedup"])
def test_launch_time_is_fitted_to_the_one_equality_and_the_others_are_predicted(reading):
    row = prediction("llama2-70b", "1x8 LBW", fitted_launch(reading)).compare("ttft", 70)
    gain = row["reduction"] if reading == "reduction" else row["speedup"] - 1
    assert gain == pytest.approx(0.197)


def test_read_as_a_reduction_every_claim_of_the_paper_holds():
    assert {row["paper, as reduction: holds"] for row in claims()} == {True}


def test_figure_7_covers_every_model_setting_and_percentage():
    rows = [row for row in figure7() if row["regime"] == "lean"]
    percentages = reference()["figure7"]["percent"]
    wanted = {(m, s, p) for m in reference()["models"] for s in reference()["settings"] for p in (0, *percentages[m])}
    assert {(row["shape"], row["setting"], row["percent"]) for row in rows} == wanted


def test_the_decode_benchmark_is_calibrated_on_as_any_table_is():
    checked = decode_check()
    assert len(checked["errors"]["fitted"]) == len(checked["errors"]["left_out"]) == 30
    assert checked["median_error"]["left_out"] < 0.035 and checked["worst_error"]["left_out"] < 0.145
    assert checked["speedup_points"]["left_out"] < 3


def test_the_report_draws_and_tables_the_record(tmp_path):
    result = json.loads(json.dumps(predict_paper(), allow_nan=False))
    record = make_record("predict-paper", {}, result, started=datetime.now(UTC))
    write_record(record, tmp_path / "predicted")
    draw.main(["predicted", "--records", str(tmp_path), "--out", str(tmp_path / "out")])
    out = tmp_path / "out/predicted"
    names = {path.name for path in out.iterdir()}
    figures = {f"predicted-{name}" for name in ("figure2", "figure7", "links", "time")}
    assert {f"{name}.png" for name in figures} <= names
    assert {f"predicted-{name}.csv" for name in ("claims", "fits", "figure2", "figure7", "decode")} <= names
    assert record["id"] in (out / "predicted-figure7.png").read_bytes().decode("latin-1")
    with open(out / "predicted-claims.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["paper"]) for row in rows] == [row["paper"] for row in result["claims"]]


# ---------------------------------------------------------------- calibration


def bench_record(shape="llama-125m", link=None, prompt_len=64, batch=1, tp=2, noise=1.0) -> dict:
    """A record as `bench` writes it, its times made by known costs: TTFT and TPOT are 0 % off if noise is 1."""
    config, real = SHAPES[shape], fitted_all_reduce({tp: 1e-3}, 1e-10, tp)
    machine = Machine("synthetic", COSTS, 4)
    predicted = Prediction(
        config,
        machine,
        real if link is None else followed_by(real, link_all_reduce(Link.parse(link), tp)),
        tp,
        batch,
        prompt_len,
        16,
    )
    blocks = config.num_blocks

    def row(plan: Plan, communicates: bool = True) -> dict:
        times = {k: predicted.time(k, plan if communicates else None).total for k in ("ttft", "tpot")}
        return {"plan": str(plan), "blocks_dropped": len(plan.dropped()), "communicates": communicates,
                **{f"{k}_ms": {"median": 1e3 * noise * s} for k, s in times.items()}}  # fmt: skip

    full, dropped = Plan.full(blocks), Plan.dropping(blocks, range(blocks))
    bounds = {"all_full": row(full), "all_attention_dropped": row(dropped), "no_communication": row(full, False)}
    result = {"tp": tp, "batch": batch, "prompt_len": prompt_len, "new_tokens": 16, "link": link, "dtype": "float32",
              "plans": [row(Plan.dropping(blocks, range(blocks // 2)))], "bounds": bounds}  # fmt: skip
    config, hardware = {"shape": shape, "model": None}, {"cpu": "Synthetic", "cores": 2, "gpus": []}
    return {"id": f"{shape}-{link}-{prompt_len}-{batch}", "command": "bench", "config": config,
            "model": {"name": shape}, "hardware": hardware, "result": result}  # fmt: skip


def grid(links=(None, "10GBps,200us"), **more) -> list[dict]:
    sizes = product(("llama-8m", "llama-125m"), (32, 128), (1, 4))
    return [bench_record(s, link, p, b, **more) for s, p, b in sizes for link in links]


def test_a_calibration_finds_the_costs_that_made_the_records_and_predicts_other_links_and_sizes():
    held_out = [bench_record("llama3.2-1b", "1GBps,1ms", 200, 2), bench_record("llama-125m", "100MBps,5us", 17)]
    result = profile(grid(), held_out)
    for kind in ("TTFT", "TPOT"):
        assert result["worst_error"]["fitted"][kind] < 1e-6 and result["worst_error"]["checked"][kind] < 1e-3
        assert result["speedup_points"]["checked"][kind] < 0.1
    assert result["all_reduce"]["latencies"] == {"2": pytest.approx(1e-3, rel=1e-3)}
    assert result["costs"]["operator"] == pytest.approx(COSTS.operator, rel=1e-3)


def test_noise_shows_in_the_errors_and_not_more_than_it_is():
    records = [bench_record(prompt_len=p, noise=n) for p, n in ((32, 1.04), (64, 0.97), (96, 1.02), (128, 0.98))]
    result = profile(records)
    assert 0.005 < result["worst_error"]["fitted"]["TTFT"] < 0.05
    assert result["worst_error"]["checked"]["TTFT"] is None


def test_least_times_can_be_fitted_instead_of_medians():
    records = grid()
    for record in records:
        for row in [*record["result"]["plans"], *record["result"]["bounds"].values()]:
            for kind in ("ttft_ms", "tpot_ms"):
                row[kind] = {"median": 99.0, "min": row[kind]["median"]}
    result = profile(records, statistic="min")
    assert result["worst_error"]["fitted"]["TTFT"] < 1e-6 and result["statistic"] == "min"
    with pytest.raises(SPDError, match="known: median, min"):
        profile(records, statistic="mean")


def test_several_percentages_are_compared_and_the_last_is_the_answer():
    several = ask("llama2-7b", [0.0, 50.0, 100.0], 8)
    last = ask("llama2-7b", 100.0, 8)
    rows = several.pop("percentages")
    assert several.pop("rows") == rows and several == last and [row["percent"] for row in rows] == [0, 50, 100]
    assert rows[2]["speedup"] == last["speedup"] > rows[1]["speedup"] > rows[0]["speedup"] == 1


def test_a_written_calibration_predicts_as_the_machine_that_made_it(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(profile(grid(links=(None,)))))
    machine, own = read(path).machine(), read(path).own(2)
    with pytest.raises(SPDError, match="either --gpu or --machine"):
        ask("llama-125m", 50, 2, calibration=path, gpu_name="a100")
    assert machine.element_size == 4 and own(0) == pytest.approx(1e-3, rel=1e-3)
    result = ask("llama-125m", 50, 2, calibration=path, link="10GBps,200us", prompt_len=64)
    made = bench_record(link="10GBps,200us")["result"]["plans"][0]
    assert result["ttft_ms"] == pytest.approx(made["ttft_ms"]["median"], rel=1e-3)
    assert result["tpot_ms"] == pytest.approx(made["tpot_ms"]["median"], rel=1e-3)


def test_the_errors_of_a_calibration_are_tabled():
    result = json.loads(json.dumps(profile(grid(), [bench_record(prompt_len=17)])))
    (table,) = draw_calibration.tables([make_record("profile", {}, result, started=datetime.now(UTC))])
    assert table.name == "calibration" and len(table.frame) == 17 * 8  # four plans and bounds, two times each
    assert "TTFT checked 0.0% and 0.0 points" in table.caption
    figure = draw_calibration.figures([make_record("profile", {}, result, started=datetime.now(UTC))])["calibration"]
    left, right = figure.axes
    assert sum(len(line.get_xdata()) for line in left.lines) == 17 * 8 + 2  # and the line at 0
    assert sum(len(line.get_xdata()) for line in right.lines) == 17 * 6 + 2  # no bound without communication


def test_speedups_are_of_plans_against_all_full_of_their_run():
    rows = profile([bench_record(link="1GBps,5ms"), bench_record(link="10GBps,5us", noise=1.1)])["errors"]["fitted"]
    found = speedups([row for row in rows if row["time"] == "TTFT"])
    measured = [m for m, _ in found]
    assert len(found) == 6 and measured[1] == measured[4] == 1  # all full, of both runs
    assert measured[2] > measured[0] > measured[3] > 1 and measured[2] > measured[5]
    assert worst_points([]) is None


def test_an_emulated_link_is_known_and_not_fitted():
    with_link, without = (observations_of(bench_record(link=link))[0] for link in ("10GBps,200us", None))
    assert without.known == 0
    gather = 200e-6 + 32000 * 4 / 2 / 10e9
    assert with_link.known == pytest.approx((12 + 6) * (200e-6 + 64 * 768 * 4 / 10e9) + gather)  # half dropped of 12


def test_calibrations_refuse_what_does_not_belong_together(tmp_path):
    other = copy.deepcopy(bench_record())
    other["hardware"]["cpu"] = "Another"
    with pytest.raises(SPDError, match="not of one machine"):
        profile([bench_record(), other])
    elsewhere = copy.deepcopy(bench_record())
    elsewhere["result"]["transport"] = "shared-memory"
    with pytest.raises(SPDError, match="tp=2, process-group.*tp=2, shared-memory"):
        profile([bench_record(), elsewhere])
    with pytest.raises(SPDError, match="records of bench"):
        profile([])
    with pytest.raises(SPDError, match="of eval"):
        observations_of({"id": "x", "command": "eval"})
    for text in ("{}", "no JSON", '{"spd_calibration": 1}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SPDError, match="is not a calibration"):
            read(tmp_path / "c.json")
    with pytest.raises(SPDError, match="degrees calibrated: 2"):
        fitted_all_reduce({2: 1e-3}, 0, 4)
    with pytest.raises(SPDError, match="no measurements"):
        fit([])


def test_no_fitted_cost_is_negative():
    checked = decode_check()
    assert set(Costs._fields) == set(checked["costs"])
    fitted = [*checked["costs"].values(), *(cost for link in checked["links"].values() for cost in link.values())]
    assert all(cost >= 0 for cost in fitted)
    assert worst([{"error": -0.2}, {"error": 0.1}]) == 0.2
