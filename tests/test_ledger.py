"""The ledger: a row for every claim of the paper, and what the records say of it. All numbers here are made up."""

from datetime import UTC, datetime, timedelta

import pytest
from ledger import MEASURES, NEEDS, ledger, write_ledger
from reference import reference

from spd.records import load_records, make_record, write_record

HARDWARE = {"cpu": "Synthetic CPU", "cores": 3, "memory_gib": 1.0, "gpus": []}


@pytest.fixture
def put(tmp_path):
    """Writes a synthetic record of a model of four blocks, each a second younger than the one before."""
    count = []

    def write(command: str, result: dict, name: str = "synthetic", tp: int = 8, plan: str | None = None, **model):
        started = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=len(count))
        described = {"name": f"hub/{name}", "fingerprint": name, "blocks": 4, **model}
        data = {"text": "t.txt", "seq_len": 8, "windows": 1, "skip": 0}
        record = make_record(command, {}, result, started=started, model=described, tp=tp, data=data, plan=plan,
                             seconds=1.0)  # fmt: skip
        count.append(write_record(record | {"hardware": HARDWARE}, tmp_path / "runs"))

    return write


def _row(tmp_path, words: str) -> dict:
    tables = ledger(load_records([tmp_path / "runs"]))
    return next(row for table in tables for row in table.frame.to_dict("records") if words in row["claim"])


def _sensitivity(values: list[float]) -> dict:
    return {"sensitivity": values, "sensitivity_nats": values, "perplexity_from": [9.0, 8.0, 7.0, 6.0, 5.0]}


def _sweep(**at_100: tuple[float, float]) -> dict:
    """Strategy -> (perplexity, accuracy) at 100 %; 4.0 and 0.7 where nothing is dropped."""
    points = [(name, 0, 4.0, 0.7) for name in at_100] + [(name, 4, *scores) for name, scores in at_100.items()]
    return {"curve": [{"strategy": s, "blocks": b, "percent": 25.0 * b, "perplexity": p, "average": {"acc": a}}
                      for s, b, p, a in points]}  # fmt: skip


def test_every_claim_has_a_row_and_without_records_nothing_is_claimed():
    rows = [row for table in ledger([]) for row in table.frame.to_dict("records")]
    assert len(rows) == len(reference()["claims"]) + len(reference()["accuracy_claims"])
    assert {row["status"] for row in rows} == {NEEDS}
    assert not any(row["ours"] for row in rows)
    assert {table.name.split(",")[0] for table in ledger([])} == {
        "table 1",
        *(f"figure {n}" for n in (2, 4, 6, 7, 8, 9)),
    }


def test_every_measure_that_a_claim_names_exists():
    claims = [*reference()["claims"], *reference()["accuracy_claims"]]
    named = {c["measure"] for c in claims if "measure" in c} | {
        c["in_kind"]["measure"] for c in claims if "in_kind" in c
    }
    assert named == set(MEASURES)


def test_the_papers_own_model_is_reproduced_or_differs(put, tmp_path):
    put("sensitivity", _sensitivity([0.01, 0.02, 0.3, 12.0]), name="Llama-2-7b-hf")
    assert _row(tmp_path, "in-sensitive blocks of LLaMA2-7B")["status"] == "differs"
    spread = _row(tmp_path, "few blocks are much more")
    assert spread["ours"] == "75" and spread["status"] == "reproduced" and "Synthetic CPU" in spread["on"]
    put("sweep", _sweep(zs=(9.0, 0.4), b2b=(5.0, 0.6)), name="Llama-2-7b-hf", tp=4)
    row = _row(tmp_path, "B2B recovers for LLaMA2-7B, tp=4")
    assert (row["ours"], row["status"], row["command"]) == ("20", "reproduced", "`make reproduce-7b`")


def test_other_models_are_in_kind_and_random_weights_are_nothing(put, tmp_path):
    put("sweep", _sweep(zs=(9.0, 0.4), b2b=(5.0, 0.6)))
    row = _row(tmp_path, "B2B recovers for LLaMA2-7B, tp=4")
    assert row["status"] == "reproduced in kind" and "synthetic tp=8: 80" in row["ours"]
    put("sweep", _sweep(zs=(9.0, 0.4), b2b=(8.5, 0.4)), name="other")
    assert _row(tmp_path, "B2B recovers for LLaMA2-7B, tp=4")["status"] == "in kind, on 1 of 2"
    put("sensitivity", _sensitivity([0.01, 0.02, 0.3, 12.0]), name="Llama-2-7b-hf", shape_only="two blocks")
    assert _row(tmp_path, "in-sensitive blocks of LLaMA2-7B")["status"] == NEEDS


TABLE1 = {
    "residual": [{"design": "residual before", "perplexity": 5.0}, {"design": "residual after", "perplexity": 50.0}],
    "bias": [{"design": "bias before", "perplexity": 6.0}, {"design": "bias after", "perplexity": 5.0}],
}


def test_table_1_is_read_from_its_record(put, tmp_path):
    put("table1", TABLE1, plan="DF FF FF FF")
    worse = [{"design": "residual before", "perplexity": 9.0}, {"design": "residual after", "perplexity": 900.0}]
    put("table1", TABLE1 | {"residual": worse}, plan="DF DF DF DF")  # the paper drops the first block's alone
    row = _row(tmp_path, "but its output added after")
    assert row["status"] == "reproduced in kind" and "synthetic tp=8: 10" in row["ours"]
    assert "synthetic tp=8: 1.2" in _row(tmp_path, "OPT-6.7B: perplexity")["ours"]


def test_it_is_written_with_the_count_of_each_status(put, tmp_path):
    put("table1", TABLE1, plan="DF FF FF FF")
    result = write_ledger([tmp_path / "runs"], tmp_path / "L.md")
    text = (tmp_path / "L.md").read_text()
    assert result["claims"]["reproduced in kind"] == 2 and "| reproduced in kind " in text and "table1" in text


def test_the_largest_model_comes_first_and_weak_criteria_and_fits_are_named(put, tmp_path):
    put("sensitivity", _sensitivity([0.01, 0.02, 0.3, 12.0]), name="small", parameters=10)
    put("sensitivity", _sensitivity([0.01, 0.02, 0.3, 12.0]), name="large", parameters=1000)
    row = _row(tmp_path, "in-sensitive blocks of LLaMA2-70B")
    assert row["ours"].index("large tp=8") < row["ours"].index("small tp=8")
    assert row["status"] == "reproduced in kind, weak"
    rows = [
        {"claim": "TTFT speedup of 19.7 % at 70 % (a latency reduction in the abstract)", "a": 20.0, "a: holds": True}
    ]
    put("predict-paper", {"claims": rows, "regimes": ["a"], "gpu": "a100"})
    assert _row(tmp_path, "TTFT speedup of 19.7 %")["status"] == "predicted, by fit: holds for 1 of 1"
