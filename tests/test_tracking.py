"""MLflow: a parent a reproduction, a child a stage and a strategy, few names; unreachable servers cost a warning."""

import re
import socket
import subprocess
import sys
import time

import pytest
from test_records import SENSITIVITY, _record

from spd.launch import environment
from spd.records import write_record
from spd.tracking import curves, mirror, params, tags


def test_a_sweep_is_a_run_a_strategy_with_the_same_names_over_blocks_dropped():
    found = dict(curves(_record()))
    assert set(found) == {"zs", "b2b+hg"}
    assert [m for m in found["zs"] if m[0] == "perplexity"] == [
        ("perplexity", p, b) for b, p in enumerate((4.0, 5.0, 9.0))
    ]
    assert ("perplexity", 6.0, 2) in found["b2b+hg"]
    ((_, metrics),) = curves(_record("sensitivity", SENSITIVITY))
    assert [m for m in metrics if m[0] == "sensitivity"] == [("sensitivity", 4.0, 0), ("sensitivity", 1.0, 1)]
    assert dict(curves(_record("sensitivity", {"scores": {}}))) == {None: [("seconds", 1.5, 0)]}
    rows = [
        {"plan": plan, "blocks_dropped": blocks, "ttft_ms": {"median": ttft}, "tpot_ms": None}
        for plan, blocks, ttft in (("FF FF", 0, 4.0), ("DF FF", 1, 2.0))
    ]
    ((_, metrics),) = curves(_record("bench", {"plans": rows}))
    assert {("ttft_ms", 2.0, 1), ("speedup", 2.0, 1), ("speedup", 1.0, 0)} <= set(metrics)
    alone = [{"plan": plan, "ttft_ms": ttft, "tpot_ms": None} for plan, ttft in (("FF FF", 4.0), ("DF FF", 2.0))]
    ((_, metrics),) = curves(_record("bench", {"share": {}, "predicted": alone}))
    assert metrics == [("ttft_ms", 4.0, 0), ("ttft_ms", 2.0, 1), ("seconds", 1.5, 0)]
    repaired = {"blocks": [{"index": 2, "loss_before": 0.5, "loss_after": 0.25}], "plan": "FF FF DF"}
    repaired |= {"perplexity_before": 5.0, "perplexity_after": 4.0}
    ((_, metrics),) = curves(_record("distill", repaired))
    assert {("loss_after", 0.25, 2), ("perplexity", 4.0, 1)} <= set(metrics)


def test_a_run_has_few_names():
    """Of what a team compares by: at most 12 metrics and 20 parameters; the rest is in the record."""
    record = _record(plan="DF FF")
    found = params(record)
    assert found["model"] == MODEL_NAME and found["tp"] == "8" and found["seed"] == "0" and "note" not in found
    assert len(found) <= 20 and tags(record, "zs")["strategy"] == "zs" and tags(record, None)["plan"] == "DF FF"
    for _, metrics in curves(record):
        assert len({name for name, *_ in metrics}) <= 12


MODEL_NAME = "some/where/synthetic-2"


def test_a_reproduction_is_one_parent_also_of_stages_mirrored_at_once(tmp_path):
    """Three processes at the same moment, one of them of another reproduction; then everything again."""
    records = [_record("sensitivity", SENSITIVITY, reproduction=name) for name in ("tiny", "tiny", "it's other")]
    paths = [write_record(record, tmp_path / "runs") for record in records]
    words = [sys.executable, "-m", "spd.tracking"]
    running = [subprocess.Popen([*words, path], cwd=tmp_path, env=environment()) for path in paths]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    sweep = write_record(_record(reproduction="tiny"), tmp_path / "runs")
    figure = tmp_path / "figure.png"
    figure.write_text("a picture")
    words += [tmp_path / "runs", "--files", figure]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("spd").experiment_id])
    parents = {r.data.tags["reproduction"]: r.info.run_id for r in runs if r.data.tags["command"] == "reproduction"}
    assert set(parents) == {"tiny", "it's other"} and len(runs) == 2 + 3 + 2  # of the sweep one a strategy
    children = [r for r in runs if r.data.tags["command"] != "reproduction"]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == set(parents.values())
    (zs,) = [r for r in runs if r.data.tags.get("strategy") == "zs"]
    curve = client.get_metric_history(zs.info.run_id, "perplexity")
    assert sorted((m.step, m.value) for m in curve) == [(0, 4.0), (1, 5.0), (2, 9.0)]
    assert {f.path for f in client.list_artifacts(zs.info.run_id)} == {sweep.name, "figure.png"}
    assert zs.info.status == "FINISHED" and zs.info.end_time - zs.info.start_time == 1500


@pytest.mark.parametrize("reason", ["Connection refused", "timed out"])
def test_an_unreachable_server_costs_one_line_within_ten_seconds(tmp_path, capfd, reason):
    """A port that nobody listens on, and one that accepts and never answers."""
    path = write_record(_record(reproduction="tiny"), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if "refused" in reason:
            server.close()
        begin = time.monotonic()
        mirror(path, uri=f"http://user:secret@127.0.0.1:{port}")
        seconds = time.monotonic() - begin
    said = capfd.readouterr().err
    assert seconds < 15 and path.exists()
    assert said.startswith("warning: ") and said.count("\n") == 1 and re.search(reason, said) and "secret" not in said


def test_a_broken_store_is_a_warning_too(tmp_path, capfd):
    path = write_record(_record(), tmp_path)
    (tmp_path / "broken.db").write_text("this is no database, though long enough to look at" * 50)
    mirror(path, uri=f"sqlite:///{tmp_path}/broken.db")
    said = capfd.readouterr().err
    assert "not a database" in said and said.count("\n") == 1
