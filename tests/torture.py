"""Faults while `spd` works: kills at any moment, dead ranks, full disks, servers that go, two at once, newer records.

`make torture KILLS=100`: whatever happened, the same command once more ends with the record of a run that nothing
disturbed, but for times, dates and measured milliseconds; or it is refused in words. Not part of the test suite.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import psutil
import pytest
from test_fuzz import call

from spd import tracking
from spd.launch import environment
from spd.tiny.corpus import read

KILLS = int(os.environ.get("KILLS", 100))
SHARE = {"sweep": 0.35, "distill": 0.35, "report": 0.1, "mirror": 0.1, "bench": 0.1}  # of all kills
WITHIN = 30  # seconds, in which all ends after a death
TEXT = ["--model", "spd-tiny", "--tp", "4", "--text", "text.txt", "--seq-len", "32"]
BEST = ["--recipe", "best", "--generated", "2", "--joint-epochs", "2"]
SMALL = ["--skip", "3", "--windows", "2", "--percentages", "0,25", "--calibration", "3", "--epochs", "1"]
COMMANDS = {
    "sensitivity": ["sensitivity", *TEXT, "--windows", "2", "--out", "s.json"],
    "plan": ["plan", "s.json", "--budget", "2", "--out", "plan.json"],
    "sweep": ["sweep", "s.json", *TEXT, *SMALL, "--strategies", "zs,b2b,closed-form", "--out", "sweep.json"],
    "distill": ["distill", *TEXT, "--windows", "4", "--plan", "plan.json", *BEST, "--out", "repaired"],
    "report": ["report", "drawn", "--out", "figures"],
    "bench": ["bench", "--model", "spd-tiny", "--tp", "2", "--repeats", "2", "--drop", "0", "--out", "bench.json"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a text, sensitivities, a plan, and records to draw and to mirror; all that works is imported."""
    folder = tmp_path_factory.mktemp("base") / "base"
    folder.mkdir()
    (folder / "text.txt").write_text(read(True, 4000))
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setattr(sys, "argv", [])
        for name in ("sensitivity", "plan", "sweep", "distill"):
            assert not call(*COMMANDS[name]), name
        Path("runs").rename("drawn")
        assert not call(*COMMANDS["report"])
        for made in ("runs", "repairs", "repaired", "figures"):
            shutil.rmtree(made)
        Path("sweep.json").unlink()
    return folder


class Work:
    """A command in a folder, in a process forked from this one that writes files up to a size."""

    def __init__(self, name: str, folder: Path, largest: int = resource.RLIM_INFINITY):
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (until it has ended)
        self.number = os.fork()
        if not self.number:
            self.work(name, folder, largest)

    def work(self, name: str, folder: Path, largest: int) -> None:
        code = 99
        try:
            for stream in (1, 2):
                os.dup2(self.said.fileno(), stream)
            sys.stdout = sys.stderr = self.said
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            if name == "bench":  # it starts processes, which are no forks
                os.execve(sys.executable, python(*COMMANDS[name]), environment())
            sys.argv = ["tracking", "drawn", "--uri", "sqlite:///mlflow.db"]
            code = tracking.main() or 0 if name == "mirror" else call(*COMMANDS[name])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else print(ended.code) or 1
        finally:
            self.said.flush()
            os._exit(code)

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        self.said.seek(0)
        return code, self.said.read()


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", "spd", *words, "--no-mlflow"]


def outcome(name: str, folder: Path) -> list:
    """What of a command's records must always be the same."""
    if name == "mirror":
        store = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        runs = store.search_runs([e.experiment_id for e in store.search_experiments()])
        return sorted(
            [r.data.tags["record"], r.info.run_name, str(r.data.metrics)] for r in runs if "record" in r.data.tags
        )
    found = [json.loads(path.read_text())["result"] for path in (folder / "runs").iterdir()]
    if name == "bench":
        rows = [row for result in found for row in result["plans"]]
        return sorted(
            {str([row["plan"], [(c["count"], c["bytes"]) for c in row["collectives"].values()]]) for row in rows}
        )
    drawn = [path.name for path in (folder / "figures").rglob("*") if path.stat().st_size] if name == "report" else []
    return sorted({json.dumps(untimed(result)) for result in found}) + sorted(drawn)


def untimed(thing):
    if isinstance(thing, dict):
        return {name: untimed(part) for name, part in thing.items() if name not in ("seconds", "record")}
    return [untimed(part) for part in thing] if isinstance(thing, list) else thing


def nobody_is_left(folder: Path) -> bool:
    """Whether no process works in a folder, after some seconds if need be."""
    for _ in range(WITHIN):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                found += [process] if process.cwd() == str(folder) else []
        if not found:
            return True
        time.sleep(1)
    return False


@cache
def undisturbed(name: str, base: Path) -> tuple[list, float]:
    """What comes out of a command, and its seconds."""
    folder, began = shutil.copytree(base, base.with_name(name)), time.monotonic()
    code, said = Work(name, folder).end()
    assert code == 0, said
    return outcome(name, folder), time.monotonic() - began


def ends_as_ever(name: str, base: Path, folder: Path) -> None:
    code, said = Work(name, folder).end()
    assert code == 0, said
    assert outcome(name, folder) == undisturbed(name, base)[0]


@pytest.mark.parametrize("name", SHARE)
def test_killed_at_any_moment(name, base, tmp_path):
    dice, seconds, kills, rounds = random.Random(name), undisturbed(name, base)[1], 0, 0
    while kills < SHARE[name] * KILLS:
        folder, rounds = shutil.copytree(base, tmp_path / str(rounds)), rounds + 1
        for _ in range(dice.randint(1, 5)):
            work = Work(name, folder)
            time.sleep(dice.uniform(0, 1.1 * seconds))
            os.kill(work.number, signal.SIGKILL)
            kills += work.end()[0] == -signal.SIGKILL
            assert all(json.loads(file.read_text()) for file in folder.rglob("*.json"))
        assert nobody_is_left(folder)
        ends_as_ever(name, base, folder)
    print(f"\n{name}: {kills} kills in {seconds:.1f} s of work, {rounds} times ended as if nothing had been")


@pytest.mark.parametrize("first", ["torchrun", "bench"])
def test_a_rank_dies_in_the_middle_of_a_collective(first, base, tmp_path):
    folder, memory = shutil.copytree(base, tmp_path / "f"), os.listdir("/dev/shm")
    words = python(*COMMANDS["bench"], "--repeats", "100000")
    if first == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [sys.executable, *launcher, *python("sensitivity", *TEXT)[1:]]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(words, cwd=folder, stderr=said, env=environment())
    while (
        len(ranks := [p for p in psutil.Process(process.pid).children() if "resource_tracker" not in str(p.cmdline())])
        < 2
    ):
        time.sleep(0.1)
    while "%" not in (tmp_path / "said").read_text():  # at work
        time.sleep(0.1)
    ranks[1].kill()
    assert process.wait(WITHIN) != 0
    message = (tmp_path / "said").read_text()
    assert {"torchrun": "rank      : 1 ", "bench": "Process 1 of 2 ended unexpectedly"}[first] in message, message
    assert nobody_is_left(folder) and os.listdir("/dev/shm") == memory and not list(folder.glob("runs/*"))


@pytest.mark.parametrize("name", ["distill", "sweep", "report"])
@pytest.mark.parametrize("fault", ["No space left", "Read-only file system", "File too large"])
def test_a_disk_that_takes_no_more(name, fault, base, tmp_path):
    def mount(*words) -> bool:
        return not subprocess.run(["mount", *words, tmp_path]).returncode

    own = fault != "File too large"
    if own and not mount("-t", "tmpfs", "-o", "size=64m", "none"):
        pytest.skip("only root may mount")
    folder = shutil.copytree(base, tmp_path / "f")
    for room in (20, 60, 150):  # KiB
        if fault == "No space left":
            (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 1024 * room))
        assert fault != "Read-only file system" or mount("-o", "remount,ro")
        code, said = Work(name, folder, resource.RLIM_INFINITY if own else 1024 * room).end()
        assert (code == 1 and (fault in said or "want of room" in said)) or code == 0, said
        assert not list(folder.rglob("*.partial"))
        assert not own or mount("-o", "remount,rw")
        (tmp_path / "filler").unlink(missing_ok=True)
    ends_as_ever(name, base, folder)
    assert not own or not subprocess.run(["umount", "--lazy", tmp_path]).returncode


class Going(BaseHTTPRequestHandler):
    """A tracking server that answers once, and then no more."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"experiment": {"experiment_id": "1", "name": "spd", "lifecycle_stage": "active"}}')
        Thread(target=self.server.shutdown).start()


def test_a_tracking_server_that_goes_costs_a_warning(base, tmp_path):
    folder, server = shutil.copytree(base, tmp_path / "f"), HTTPServer(("127.0.0.1", 0), Going)
    Thread(target=server.serve_forever).start()
    uri = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.server_port}"}
    words = python(*COMMANDS["plan"], "--budget", "3")[:-1]
    done = subprocess.run(words, cwd=folder, env=environment() | uri, capture_output=True, text=True, timeout=150)
    server.server_close()
    assert done.returncode == 0 and "warning: the run is not in MLflow" in done.stderr, done.stderr
    assert len(list((folder / "runs").iterdir())) == 1


@pytest.mark.parametrize("name", ["distill", "sweep"])
def test_two_at_once_do_not_mix(name, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "f")
    first, second = sorted(work.end() for work in [Work(name, folder), Work(name, folder)])
    assert first[0] == 0 and (second[0] == 0 or "Another process is at work in" in second[1].splitlines()[-1])
    ends_as_ever(name, base, folder)


def test_a_record_of_a_newer_version_is_refused_in_words(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "f")
    record = json.loads(next((folder / "drawn").iterdir()).read_text())
    (folder / "drawn/newer.json").write_text(json.dumps(record | {"schema": 2}))
    for name in ("report", "mirror"):
        code, said = Work(name, folder).end()
        assert code == 1 and "schema: 2 is of another version of spd" in said
