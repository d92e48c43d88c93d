"""Records: written whole or not at all. MLflow: params, curves, parents; unreachable servers cost a warning."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spd.errors import SPDError
from spd.records import make_record, write_json, write_record
from spd.tracking import MIRROR_SECONDS, _mirror, curves, headline, metrics, mirror_to_mlflow, params

STARTED = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL = {"name": "some/where/synthetic-2", "fingerprint": "f00d", "blocks": 2}


def _point(blocks: int, perplexity: float, strategy: str = "zs") -> dict:
    plan = " ".join(["DF"] * blocks + ["FF"] * (2 - blocks))
    point = {"blocks": blocks, "percent": 50.0 * blocks, "perplexity": perplexity, "nats": 1.0, "plan": plan}
    return {**point, "strategy": strategy}


SWEEP = {"curve": [_point(0, 4.0), _point(1, 5.0), _point(2, 9.0), _point(2, 6.0, "b2b+hg")], "tokens": 70}
SENSITIVITY = {"perplexity_from": [9.0, 5.0, 4.0], "sensitivity": [4.0, 1.0], "sensitivity_nats": [0.5, 0.25]}


def _record(command: str = "sweep", result: dict = SWEEP, **more) -> dict:
    config = {"seed": 0, "text": Path("t.txt"), "note": "x" * 9000, "list": [1, 2], "off": None}
    more = {"model": MODEL, "tp": 8, "data": {"text": "t.txt", "seq_len": 8}, "seconds": 1.5, **more}
    return make_record(command, config, result, started=STARTED, argv=["spd", command], **more)


# ---------------------------------------------------------------- records and files


def test_a_record_is_whole_strict_json_that_describes_itself(tmp_path):
    record = _record()
    path = write_record(record, tmp_path / "runs")
    assert path.name.startswith("20200102T030405-sweep-") and path.stem == record["id"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert record["started"] == "2020-01-02T03:04:05.000000+00:00" and record["config"]["text"] == "t.txt"
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["cpu"] and record["versions"]["torch"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left


def test_two_records_of_one_second_have_different_names():
    assert _record()["id"] != _record()["id"]


def test_seconds_are_counted_when_left_out():
    record = make_record("eval", {}, {}, started=datetime.now(UTC))
    assert 0 <= record["seconds"] < 60 and record["model"] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_hold_is_named(tmp_path, bad):
    with pytest.raises(SPDError, match=r"curve\[1\]\.perplexity .*not a finite number"):
        write_json(tmp_path / "out.json", {"curve": [{"perplexity": 1.0}, {"perplexity": bad}]})
    assert not list(tmp_path.iterdir())


def test_something_without_a_json_form_is_refused(tmp_path):
    with pytest.raises(SPDError, match="not JSON serializable"):
        write_json(tmp_path / "out.json", {"x": object()})


def test_an_unwritable_place_is_one_sentence_with_path_and_reason(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(SPDError, match=r"Cannot write .*file/out.json: (Not a directory|File exists)\.$"):
        write_json(tmp_path / "file" / "out.json", {})
    with pytest.raises(SPDError, match=r"Cannot write .*: Is a directory"):
        write_json(tmp_path, {})


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "out.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SPDError, match=r"Cannot write .*out.json: No space left on device\.$"):
        write_json(tmp_path / "out.json", {"new": 2})
    assert json.loads((tmp_path / "out.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_link_is_followed_and_a_device_is_not_replaced(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join(5)
    assert json.loads(got[0]) == {"a": 1} and (tmp_path / "pipe").is_fifo()


# ---------------------------------------------------------------- what MLflow is shown


def test_curves_have_blocks_dropped_as_step_and_the_percentage_as_a_metric():
    found = metrics(SWEEP)
    assert ("curve/zs/perplexity", 5.0, 1) in found and ("curve/zs/percent", 50.0, 1) in found
    assert ("curve/b2b_hg/perplexity", 6.0, 2) in found and ("tokens", 70.0, 0) in found


def test_a_list_over_blocks_has_the_block_as_step_and_identifiers_are_no_metric():
    found = metrics({**SENSITIVITY, "ranking": [1, 0], "token_ids": [5, 6], "ok": True})
    assert [x for x in found if x[0] == "sensitivity"] == [("sensitivity", 4.0, 0), ("sensitivity", 1.0, 1)]
    assert {name for name, *_ in found} == set(SENSITIVITY)


def test_timings_have_blocks_dropped_as_step_too():
    plans = [{"plan": "DF FF", "blocks_dropped": 1, "ttft_ms": {"median": 2.0}, "tpot_ms": None}]
    bounds = {"no_communication": {"ttft_ms": {"median": 1.0}}}
    found = metrics({"plans": plans, "bounds": bounds})
    assert ("plans/ttft_ms/median", 2.0, 1) in found and ("plans/percent", 50.0, 1) in found
    assert ("bounds/no_communication/ttft_ms/median", 1.0, 0) in found


def test_params_are_flat_text():
    found = params(_record(plan="DF FF"))
    assert found["model"] == "synthetic-2" and found["model/fingerprint"] == "f00d" and found["tp"] == "8"
    assert found["plan"] == "DF FF" and found["config/list"] == "[1, 2]" and "config/off" not in found


def test_the_headline_compares_reproductions():
    found = headline(_record())
    assert found == {"perplexity/full": 4.0, "perplexity/zs_50": 5.0, "perplexity/zs_100": 9.0,
                     "perplexity/b2b_hg_100": 6.0, "rise_percent/zs_50": 25.0, "rise_percent/zs_100": 125.0,
                     "rise_percent/b2b_hg_100": 50.0, "seconds/sweep": 1.5}  # fmt: skip
    assert headline(_record("sensitivity", SENSITIVITY))["sensitivity/median"] == 2.5
    shares = headline(_record("plan", {"classes": ["ISB", "ESB"]}))
    assert (shares["blocks_percent/ISB"], shares["blocks_percent/SB"]) == (50.0, 0.0)
    plans = [{"plan": p, "blocks_dropped": b, "ttft_ms": {"median": t}} for p, b, t in (("FF", 0, 4.0), ("DF", 1, 3.0))]
    assert headline(_record("bench", {"plans": plans}))["ttft_reduction_percent/100"] == 25.0
    assert {name for name, *_ in curves(SWEEP)} == {f"curve/{s}/{k}" for s in ("zs", "b2b_hg") for k in
                                                    ("perplexity", "percent")}  # fmt: skip


# ---------------------------------------------------------------- MLflow itself


def _in_processes(directory: Path, *records: dict) -> None:
    """Mirror records at once, each from a process of its own, into the default store of `directory`."""
    script = (
        "import json, sys; from spd.tracking import mirror_to_mlflow as m; p = sys.argv[1];"
        "sys.exit(m(json.load(open(p)), p) is None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    commands = [[sys.executable, "-c", script, str(write_record(r, directory / "runs"))] for r in records]
    running = [subprocess.Popen(command, cwd=directory, env=environment) for command in commands]
    assert [process.wait(MIRROR_SECONDS) for process in running] == [0] * len(records)


def test_a_reproduction_interrupted_and_resumed_is_one_parent_with_its_stages(tmp_path, monkeypatch, capfd):
    """Two processes create the store at the same moment; a third comes later and continues one's reproduction."""
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "figure.svg"
    figure.write_text("<svg/>")
    stage, other = (_record("sensitivity", SENSITIVITY, reproduction=name) for name in ("tiny", "it's other"))
    _in_processes(tmp_path, stage, other)
    resumed, said = _record(reproduction="tiny"), []
    again = mirror_to_mlflow(resumed, write_record(resumed, tmp_path / "runs"), [figure], warn=said.append)
    assert again and not said
    printed = capfd.readouterr()
    assert not printed.out and not printed.err

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = {run.info.run_id: run for run in client.search_runs([client.get_experiment_by_name("spd").experiment_id])}
    parents = {r.data.tags["spd.reproduction"]: r for r in runs.values() if r.data.tags["spd.role"] == "parent"}
    assert len(runs) == 5 and set(parents) == {"tiny", "it_s other"}
    parent = parents["tiny"]
    stages = {run.data.tags.get("spd.record"): run for run in runs.values()}
    first = stages[stage["id"]].info.run_id
    assert {runs[i].data.tags["mlflow.parentRunId"] for i in (first, again)} == {parent.info.run_id}
    assert stages[other["id"]].data.tags["mlflow.parentRunId"] == parents["it_s other"].info.run_id
    assert parent.data.metrics["perplexity/zs_100"] == 9.0 and parent.data.params["sweep/seed"] == "0"
    assert len(client.get_metric_history(parent.info.run_id, "curve/zs/perplexity")) == 3
    assert parent.data.params["model"] == "synthetic-2" and parent.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["figure.svg"]

    run = runs[again]
    assert run.info.run_name == "sweep synthetic-2 tp8" and run.info.end_time - run.info.start_time == 1500
    assert len(run.data.params["config/note"]) == 6000 and run.data.params["config/seed"] == "0"
    curve = client.get_metric_history(again, "curve/zs/perplexity")
    assert sorted((m.step, m.value) for m in curve) == [(0, 4.0), (1, 5.0), (2, 9.0)]
    files = {f.path for f in client.list_artifacts(again)}
    assert files == {"figure.svg", f"{run.data.tags['spd.record']}.json"}
    blocks = client.get_metric_history(first, "sensitivity")
    assert sorted((m.step, m.value) for m in blocks) == [(0, 4.0), (1, 1.0)]
    changed = {**resumed, "config": {**resumed["config"], "seed": 1}}
    anew = client.get_run(_mirror(client, changed, [])).data.tags["mlflow.parentRunId"]
    assert anew != parent.info.run_id and client.get_run(anew).data.params["sweep/seed"] == "1"


@pytest.mark.parametrize("reason", ["Connection refused", "timed out|no answer"])
def test_an_unreachable_server_costs_one_line_within_ten_seconds(tmp_path, capfd, reason):
    """A port that nobody listens on, and one that accepts and never answers."""
    record = _record(reproduction="tiny")
    path = write_record(record, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if "refused" in reason:
            server.close()
        begin = time.monotonic()
        run_id = mirror_to_mlflow(record, path, tracking_uri=f"http://user:secret@127.0.0.1:{port}")
        seconds = time.monotonic() - begin
    said = capfd.readouterr().err
    assert run_id is None and seconds < 10 and path.exists()
    assert said.startswith("warning: ") and said.count("\n") == 1 and re.search(reason, said) and "secret" not in said


def test_a_server_that_answers_once_and_then_hangs_is_given_up(tmp_path, monkeypatch):
    """The probe gets its answer, the client's first request does not; the user's own timeout is honoured."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    record = _record()
    path, said = write_record(record, tmp_path), []

    def answer_once(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_once, args=(server,), daemon=True).start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert mirror_to_mlflow(record, path, tracking_uri=uri, warn=said.append) is None
    assert "ReadTimeoutError" in said[0] and len(said) == 1 and "\n" not in said[0]


def test_no_mlflow_and_a_broken_store_are_warnings_too(tmp_path, monkeypatch):
    record, said = _record(), []
    path = write_record(record, tmp_path)
    (tmp_path / "broken.db").write_text("this is no database, though long enough to look at" * 50)
    uri = f"sqlite:///{tmp_path}/broken.db"
    assert mirror_to_mlflow(record, path, tracking_uri=uri, warn=said.append) is None
    monkeypatch.setattr("spd.tracking.util.find_spec", lambda name: None)
    assert mirror_to_mlflow(record, path, tracking_uri=uri, warn=said.append) is None
    assert "not a database" in said[0] and "not installed" in said[1] and "\n" not in "".join(said)
