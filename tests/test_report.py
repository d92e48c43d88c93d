"""Report: figures and tables are functions of records. All numbers here are made up, and look it."""

import csv
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import draw
import draw_links
import draw_method
import pytest
from PIL import Image

from spd.errors import SPDError
from spd.records import load_records, make_record, write_record
from spd.report import report, write
from spd.tables import sensitivity_table, tables

BLOCKS = 4
SENSITIVITY = [12.5, 0.25, -0.5, 0.015625]
CLASSES = ["ESB", "SB", "ISB", "ISB"]
DATA = {"text": "/texts/synthetic.txt", "fingerprint": "d", "seq_len": 8, "windows": 10, "skip": 0}
HARDWARE = {"cpu": "Synthetic CPU", "cores": 3, "memory_gib": 1.0, "gpus": []}


def _plan(blocks: int) -> str:
    return " ".join(["DF"] * blocks + ["FF"] * (BLOCKS - blocks))


def _sensitivity() -> dict:
    nats = [value / 16 for value in SENSITIVITY]
    found = {"sensitivity": SENSITIVITY, "sensitivity_nats": nats, "tokens": 70, "windows": 10}
    return found | {"perplexity_from": [16.265625, 3.765625, 3.515625, 4.015625, 4.0]}


def _planned() -> dict:
    policies = [["full", "full"]] + [["drop", "full"]] * 3
    result = {
        "policies": policies,
        "classes": CLASSES,
        "treatments": ["keep", "b2b", "zs", "zs"],
        "tau1": 0.05,
        "tau2": 10,
    }
    return {**result, "budget": {"blocks": 3, "percent": 75.0}, "sensitivity": SENSITIVITY}


def _sweep(strategy: str = "zs", perplexities: tuple = (4.0, 5.0, 8.0)) -> dict:
    points = [
        {"blocks": b, "percent": 25.0 * b, "perplexity": p, "nats": 1.5, "plan": _plan(b), "strategy": strategy}
        for b, p in zip((0, 2, 4), perplexities, strict=True)
    ]
    return {"curve": points, "tokens": 70, "windows": 10}


def _times(median: float) -> dict:
    return {"median": median, "spread": 1.0, "min": median - 1, "repeats": 5}


def _bench() -> dict:
    plans = []
    for blocks, median in ((0, 40.0), (2, 35.0), (4, 32.0)):
        attention = {"count": BLOCKS - blocks, "bytes": 64, "real_ms": 2.0, "emulated_ms": 2.0 * (BLOCKS - blocks)}
        mlp = {"count": BLOCKS, "bytes": 64, "real_ms": 2.0, "emulated_ms": 8.0}
        collectives = {"attention": attention, "mlp": mlp}
        plan = {"plan": _plan(blocks), "blocks_dropped": blocks, "ttft_ms": _times(median), "tpot_ms": None}
        plans.append({**plan, "collectives": collectives})
    bounds = {"no_communication": {"ttft_ms": _times(20.0)}}
    setting = {"tp": 2, "world": 2, "batch": 1, "prompt_len": 16, "link": "10GBps,20us"}
    return {**setting, "plans": plans, "bounds": bounds, "hardware": HARDWARE}


Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path) -> Put:
    """Writes a synthetic record a second younger than the one before."""
    return _writer(tmp_path / "runs")


def _writer(directory: Path) -> Put:
    written = []

    def write(command: str, result: dict, tp: int = 8, name: str = "synthetic", **more) -> Path:
        started = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=len(written))
        model = {"name": name, "fingerprint": f"f-{name}", "blocks": BLOCKS}
        record = make_record(command, {}, result, started=started, model=model, tp=tp, data=DATA, seconds=1.0)
        record |= {"hardware": HARDWARE, "git": {"commit": "c0ffee", "dirty": False}, **more}
        written.append(write_record(record, directory))
        return written[-1]

    return write


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[list[Path], Path, dict]:
    """(records, out, result) of one whole report: sensitivity and sweep at tp=8, timing at tp=2."""
    folder = tmp_path_factory.mktemp("report")
    write = _writer(folder / "runs")
    records = [write("sensitivity", _sensitivity()), write("plan", _planned()), write("sweep", _sweep())]
    records += [write("bench", _bench(), tp=2), write("eval", {"perplexity": 4.0})]
    return records, folder / "out", report(records, folder / "out")


def _rows(path: Path) -> list[dict]:
    return list(csv.DictReader(StringIO(path.read_text())))


def test_every_figure_and_table_is_written_once(made):
    _, out, result = made
    names = {f"{name}.png" for name in ("sensitivity", "perplexity", "ttft", "overview")}
    names |= {"sensitivity.csv", "perplexity.csv", "ttft.csv", "tables.md"}
    assert {Path(file).name for file in result["files"]} == names == {file.name for file in out.iterdir()}
    json.dumps(result)


def test_figures_and_tables_name_their_records_and_commit(made):
    records, out, _ = made
    ids = [json.loads(path.read_text())["id"] for path in records[:4]]
    image, text = Image.open(out / "overview.png"), (out / "tables.md").read_text()
    for name in ids:
        assert name in image.info["Source"] and name in text
    assert "commit c0ffee" in image.info["Source"] and "commit c0ffee" in text
    assert ids[3] not in Image.open(out / "perplexity.png").info["Source"]


def test_captions_say_model_degree_data_and_machine(made):
    out = made[1]
    caption = Image.open(out / "overview.png").info["Description"]
    for words in (
        "synthetic at tp=8",
        "70 predictions",
        "synthetic.txt",
        "tp=2 on 2 processes",
        "Synthetic CPU, 3 cores",
    ):
        assert words in caption
    assert "10GBps,20us" in caption and "the same numbers of dropped blocks as the perplexities at tp=8" in caption
    assert "/texts" not in (out / "tables.md").read_text()


def test_the_same_records_give_the_same_bytes(made, tmp_path):
    records, out, _ = made
    report([records[0].parent], tmp_path)  # a folder stands for the records in it
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_tables_hold_the_records_numbers_exactly(made):
    out = made[1]
    rows = _rows(out / "sensitivity.csv")
    assert [float(r["sensitivity"]) for r in rows] == SENSITIVITY and [r["class"] for r in rows] == CLASSES
    assert [r["dropped"] for r in rows] == ["no", "yes", "yes", "yes"]
    rows = _rows(out / "perplexity.csv")
    assert [(float(r["perplexity"]), float(r["increase_percent"])) for r in rows] == [(4, 0), (5, 25), (8, 100)]
    rows = _rows(out / "ttft.csv")
    assert [float(r["reduction"]) for r in rows] == pytest.approx([0, 0.125, 0.2])
    assert [float(r["speedup"]) for r in rows] == [1, 40 / 35, 1.25]
    assert [float(r["compute_ms"]) for r in rows] == [40 - 4 - 16, 35 - 4 - 12, 32 - 4 - 8]


def test_tables_are_written_uncut_for_reading(made):
    text = (made[1] / "tables.md").read_text()
    assert "0.015625" in text and "1.1429" in text and "…" not in text


# ---------------------------------------------------------------- choosing


def test_the_newest_record_counts_and_a_newer_strategy_is_added(put):
    put("sweep", _sweep(perplexities=(4.0, 6.0, 9.0)))
    put("sweep", _sweep())
    put("sweep", _sweep("b2b", (4.0, 4.5, 6.0)))
    last = put("sensitivity", _sensitivity())
    rows = tables(load_records([last.parent]))[1].frame.to_dict("records")
    assert [(r["strategy"], r["perplexity"]) for r in rows[1::3]] == [("zs", 5.0), ("b2b", 4.5)]


def test_perplexities_on_other_data_are_not_mixed(put):
    put("sweep", _sweep("b2b"), data={**DATA, "seq_len": 16})
    (table,) = tables(load_records([put("sweep", _sweep()).parent]))
    assert set(table.frame["strategy"]) == {"zs"}


def test_a_plan_of_other_sensitivities_colours_nothing(put):
    put("plan", {**_planned(), "sensitivity": [1.0] * BLOCKS})
    table = sensitivity_table(load_records([put("sensitivity", _sensitivity()).parent]))
    assert "class" not in table.frame and len(table.records) == 1


def test_what_has_other_numbers_is_passed_over(put, tmp_path):
    """Scores of one pass in place of sensitivities, and one shard's time in place of plans'."""
    put("sensitivity", _sensitivity())
    put("bench", {"share": {}, "predicted": []})
    fast = put("sensitivity", {"scores": {"attention": {"drop": [1.0] * BLOCKS}}, "tokens": 70, "windows": 10})
    records = load_records([fast.parent])
    (table,) = tables(records)
    assert list(table.frame["sensitivity"]) == SENSITIVITY and draw_method.newest_settings(records).keys() == {
        ("synthetic", "synthetic", 8)
    }
    with pytest.raises(SPDError, match="nothing to report"):
        report([fast], tmp_path / "out")


def test_models_and_degrees_get_files_of_their_own(put):
    put("sensitivity", _sensitivity())
    put("sensitivity", _sensitivity(), tp=4)
    folder = put("sensitivity", _sensitivity(), name="hub/other").parent
    assert [t.name for t in tables(load_records([folder]))] == [
        "sensitivity-synthetic-tp8",
        "sensitivity-synthetic-tp4",
        "sensitivity-other",
    ]


def test_other_weights_under_the_same_name_are_another_model(put):
    put("sensitivity", _sensitivity())
    other = {"name": "elsewhere/synthetic", "fingerprint": "0123456789", "blocks": BLOCKS}
    folder = put("sensitivity", _sensitivity(), model=other).parent
    names = [table.name for table in tables(load_records([folder]))]
    assert names == ["sensitivity-synthetic-f-synthe", "sensitivity-synthetic-01234567"]


def test_records_of_no_model_are_nothing_to_report(put, tmp_path):
    with pytest.raises(SPDError, match="nothing to report"):
        report([put("profile", {"name": "machine"}, model=None)], tmp_path / "out")
    with pytest.raises(SPDError, match="nothing to report"):
        report([], tmp_path / "out")


def test_several_settings_give_classes_and_a_map(put, tmp_path):
    put("sensitivity", _sensitivity())
    folder = put("sensitivity", _sensitivity(), tp=4).parent
    write([folder], tmp_path / "out", draw_method.tables, draw_method.figures)
    assert {"classes.png", "classes.csv", "sensitivity-map.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    classes = _rows(tmp_path / "out" / "classes.csv")  # at the paper's thresholds: 12.5, 0.25, -0.5, 0.016
    assert [(row["tp"], row["ISB"], row["SB"], row["ESB"]) for row in classes] == [
        ("4", "50.0", "25.0", "25.0"),
        ("8", "50.0", "25.0", "25.0"),
    ]


def test_a_folder_is_drawn_by_its_scripts_and_a_mistake_is_one_sentence(tmp_path, capsys):
    _writer(tmp_path / "spd-tiny")("bench", _bench(), tp=2)
    asked = ["--records", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="error: None of the 1 records"):
        draw.main(["spd-tiny", *asked])  # the last of its scripts has no table 1 to draw
    assert (tmp_path / "out/spd-tiny/ttft.png").exists() and (tmp_path / "out/spd-tiny/method/transfer.png").exists()
    assert capsys.readouterr().err.split() == [str(tmp_path / "out/spd-tiny")]


def test_transfer_time_is_what_the_collectives_took(put):
    figure = draw_method.figures(load_records([put("bench", _bench(), tp=2)]))["transfer"]
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 3)
    assert list(line.get_ydata()) == [20.0, 16.0, 12.0]  # 4 real, 8 and 8, 4, 0 emulated


# ---------------------------------------------------------------- errors in words


def _without(document: dict, *keys) -> dict:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return copy


@pytest.mark.parametrize(
    ("command", "result", "words"),
    [
        ("sensitivity", {**_sensitivity(), "sensitivity": [1.0, None]}, r"has no result.sensitivity.1"),
        ("sensitivity", {**_sensitivity(), "sensitivity": 3}, r"no list of values as result.sensitivity"),
        ("sensitivity", {**_sensitivity(), "sensitivity_nats": [1.0]}, r"4 sensitivities but 1 in nats"),
        ("sweep", _without(_sweep(), "curve", 1, "perplexity"), r"has no result.curve.1.perplexity"),
        ("sweep", _without(_sweep(), "curve", 0), r"no point with 0 blocks dropped"),
        ("sweep", {**_sweep(), "tokens": "70"}, r"has '70' as result.tokens where a number is needed"),
        ("bench", _without(_bench(), "plans", 0), r"no plan with 0 blocks dropped"),
        ("bench", _without(_bench(), "plans", 1, "collectives", "mlp", "real_ms"), r"no .*collectives.mlp.real_ms"),
        ("bench", _without(_bench(), "plans", 2, "ttft_ms", "spread"), r"has no result.plans.2.ttft_ms.spread"),
        ("eval", {"perplexity": 4.0}, r"nothing to report"),
    ],
)
def test_a_missing_number_is_an_error_and_nothing_is_written(put, tmp_path, command, result, words):
    with pytest.raises(SPDError, match=words) as caught:
        report([put(command, result)], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_plan_of_the_wrong_length_is_an_error(put, tmp_path):
    put("plan", {**_planned(), "classes": ["SB"]})
    with pytest.raises(SPDError, match="each of the 4 blocks one class"):
        report([put("sensitivity", _sensitivity()).parent], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not strict JSON"),
        ('{"schema": NaN}', "NaN"),
        ("[]", "not a record"),
        ('{"schema": 1}', "not a record: id: Field required"),
    ],
)
def test_a_malformed_record_is_an_error(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(SPDError, match=words):
        report([tmp_path / "bad.json"], tmp_path / "out")


def test_a_missing_record_and_an_unwritable_folder_are_errors(put, tmp_path):
    with pytest.raises(SPDError, match=r"Cannot read record .*gone.json: No such file"):
        load_records([tmp_path / "gone.json"])
    record = put("sweep", _sweep())
    with pytest.raises(SPDError, match="Cannot write"):
        report([record], record / "out")


def _scores(acc: float, lost: int) -> dict:
    compared = {"acc_full": 0.5, "difference": acc - 0.5, "stderr": 0.05, "lost": lost, "gained": 1, "p": 0.25}
    task = {"acc": acc, "stderr": 0.0625, "acc_norm": None, "n": 64, "chance": 0.25, "shots": 0, "source": "hub"}
    tasks = {name: task | {"compared": compared} for name in ("piqa", "mmlu")}
    mean = {"metric": "acc", "tasks": ["piqa"], "acc": acc, "stderr": 0.0625, "compared": compared}
    return {"tasks": tasks, "average": mean, "truncated": 0}


def test_accuracies_of_sweeps_and_of_a_plan(put, tmp_path):
    swept = _sweep()
    for point, acc in zip(swept["curve"], (0.5, 0.4375, 0.3125), strict=True):
        point |= _scores(acc, 3)
    records = [put("sweep", _sweep("b2b")), put("sweep", swept), put("eval", _scores(0.375, 9), plan=_plan(3))]
    report(records, tmp_path / "out")
    for name in ("accuracy.png", "accuracy-mmlu.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    rows = _rows(tmp_path / "out/accuracy.csv")
    assert [row["average"] for row in rows] == ["0.5", "0.4375", "0.3125"]  # the sweep without tasks has no row
    assert rows[2] | {"piqa": "0.3125", "lost": "3", "p": "0.25", "stderr": "0.0625"} == rows[2]
    task, *_ = _rows(tmp_path / "out/tasks.csv")
    assert task | {"task": "piqa", "acc": "0.375", "acc_full": "0.5", "lost": "9"} == task
    text = (tmp_path / "out/tables.md").read_text()
    assert "## accuracy" in text and "Questions: piqa 64 (hub), mmlu 64 (hub)" in text
    del swept["curve"][1]["average"]["compared"]["p"]
    with pytest.raises(SPDError, match=r"has no result.curve.1.average.compared.p, which the report needs"):
        tables(load_records([put("sweep", swept)]))


def _over(link: str, latency: float, **more) -> dict:
    """A bench record's result whose all-reduces take `latency` ms each, beside 20 ms of computation."""
    rates = {"matrix_gflops": 90.0, "memory_gb_per_s": 20.0, "all_reduce": {"ttft_ms": 0.1}}
    result = _bench() | {"link": link, "transport": "shared-memory", "dtype": "float32", "rates": rates, **more}
    for plan in result["plans"]:
        count = sum(point["count"] for point in plan["collectives"].values())
        plan["ttft_ms"] = _times(20.0 + latency * count)
        plan["collectives"] = {"mlp": {"count": count, "bytes": 64, "real_ms": 0.0, "emulated_ms": latency * count}}
        plan["communication_ms"] = {"median": latency * count}
        plan["floor"] = {"ttft_ms": 10.0 + latency * count, "ttft_communication_ms": latency * count}
    return result


def test_collectives_that_no_clock_saw_are_left_out_of_the_times(put, tmp_path):
    """As on GPUs: whole bars in place of parts, no transfer time, and no zero that nobody measured."""
    result = _bench()
    for plan in result["plans"]:
        plan["collectives"] = {"mlp": {"count": 4, "bytes": 64, "real_ms": None, "emulated_ms": 0.0}}
    record = put("bench", result, tp=2)
    assert "transfer" not in draw_method.figures(load_records([record]))
    report([record], tmp_path / "out")
    rows = _rows(tmp_path / "out/ttft.csv")
    assert [row["real_ms"] for row in rows] == [row["compute_ms"] for row in rows] == ["", "", ""]
    assert [row["count"] for row in rows] == ["4", "4", "4"] and float(rows[2]["speedup"]) == 40 / 32
    caption = Image.open(tmp_path / "out/ttft.png").info["Description"]
    assert "its collectives were not timed" in caption and "split into" not in caption
    for plan in result["plans"]:
        plan["communication_ms"] = {"median": 4.0}  # as of a graph: what it took longer than in silence
    report([put("bench", result, tp=2)], tmp_path / "out")
    first = _rows(tmp_path / "out/ttft.csv")[0]
    assert (first["real_ms"], first["compute_ms"]) == ("4.0", "36.0")


def test_links_are_compared_where_nothing_else_differs(put, tmp_path):
    put("bench", _over("1GBps,9ms", 9.0, prompt_len=99), tp=2)  # another prompt
    put("bench", _over("1GBps,5ms", 7.0), tp=2)  # timed again below
    records = [put("bench", _over(f"1GBps,{n}ms", n), tp=2) for n in (1, 5, 3)]
    write(records[0].parent.glob("*.json"), tmp_path / "out", draw_links.tables, draw_links.figures)
    rows = _rows(tmp_path / "out/links.csv")
    assert [row["link"] for row in rows[::3]] == ["1GBps, 5ms", "1GBps, 3ms", "1GBps, 1ms"]
    slowest = [row for row in rows if row["link"] == "1GBps, 5ms"]
    assert [float(row["transfer_ms"]) for row in slowest] == [40, 30, 20]
    assert float(slowest[-1]["speedup"]) == float(slowest[-1]["formula_speedup"]) == 60 / 40
    caption = Image.open(tmp_path / "out/links.png").info["Description"]
    assert "shared memory" in caption and "formula" in caption


def test_one_link_is_no_comparison(put, tmp_path):
    records = load_records([put("bench", _over("1GBps,1ms", 1.0), tp=2)])
    assert draw_links.tables(records) == [] and draw_links.figures(records) == {}
