"""Records: self-describing, written whole or not at all."""

import json
import os
import shutil
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spd import records
from spd.errors import SPDError
from spd.records import load_records, make_record, write_json, write_record

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
    assert record["gpu"] is None  # that nobody used
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["cpu"] and record["versions"]["torch"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left


def test_two_records_of_one_second_have_different_names():
    assert _record()["id"] != _record()["id"]


def test_the_commit_is_that_of_the_package_and_no_other_repository_s(tmp_path, monkeypatch):
    """In a checkout, in one with a local change, and in a copy that lies inside somebody else's repository."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "spd").mkdir()
    (tmp_path / "spd" / "records.py").write_text("one")
    git("init")
    git("add", "spd")
    git("commit", "-m", "one")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "spd" / "records.py"))
    assert records.git_state() == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "spd" / "records.py").write_text("two")
    (tmp_path / "untracked").touch()
    assert records.git_state()["dirty"] is True
    monkeypatch.setattr(records, "__file__", str(tmp_path / "lib" / "spd" / "records.py"))
    assert records.git_state() is None


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


# ---------------------------------------------------------------- reading


def test_records_are_read_once_each_and_the_oldest_first(tmp_path):
    late, early = _record(), _record("sensitivity", SENSITIVITY)
    early["started"] = "2019-01-01T00:00:00+00:00"
    paths = [write_record(record, tmp_path / "a" / "b") for record in (late, early)]
    assert load_records([tmp_path, *paths]) == [json.loads(json.dumps(record)) for record in (early, late)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "is not a record: schema: 2 is of another version of spd; this one reads 1"),
        ({"hardware": None}, "is not a record: hardware: Input should be a valid dictionary"),
        ({"started": "yesterday"}, "is not a record: started: "),
        ({"result": {"perplexity": float("nan")}}, "is not strict JSON: "),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(tmp_path, changes, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(_record() | changes))
    with pytest.raises(SPDError, match=message) as refused:
        load_records([path])
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(SPDError, match="Cannot read record .*No such file"):
        load_records([tmp_path / "missing.json"])
