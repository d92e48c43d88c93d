"""The chain of stages that `make reproduce-*` runs, with a recording stub in place of Python; checks before it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import preflight
import pytest
import table1  # noqa: F401  (its section of an experiment is then known)
import torch
from budget import LAUNCH, QUESTIONS, Budget, Job, answers, bench, document_of, repair, stages, sweep, table
from preflight import Needs, missing
from shape_only import write_shape_only
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import spd.cli  # noqa: F401  (declares the commands)
from spd.config import SHAPES
from spd.data import read_windows
from spd.distill import recipe_named
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.machines import Pass, gpu_row
from spd.options import COMMANDS, read_experiment
from spd.plan import Plan
from spd.pretrained import SPDModel
from spd.records import load_records
from spd.tasks import KNOWN

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))

# Says how it was called; fails at the command $FAIL.
STUB = """#!/bin/sh
echo "$*" >> log
case " $* " in *" ${FAIL:-no such command} "*) exit 1 ;; esac
"""


class Chain:
    """A folder with the Makefile and the experiments, where stages are only noted."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("records"))
        (folder / "python").write_text(STUB)
        (folder / "python").chmod(0o755)

    def make(self, *words: str, fail: str = "", code: int = 0) -> list[str]:
        """The commands that were started."""
        (self.folder / "log").write_text("")
        environment = {"PATH": "/usr/bin:/bin", "FAIL": fail}
        done = subprocess.run(
            [MAKE, *words, "PYTHON=./python"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode != 0) == bool(code), done.stderr
        self.output = done.stdout + done.stderr
        return (self.folder / "log").read_text().splitlines()

    def stages(self, *words: str, **how) -> list[str]:
        return [stage_of(call) for call in self.make(*words, **how)]


def stage_of(call: str) -> str:
    script = re.search(r"experiments/(\w+)\.py", call)
    return script[1] if script else re.search(r"-m spd (?:--experiment \S+ )?(\S+)", call)[1]


@pytest.fixture
def chain(tmp_path):
    if MAKE is None:
        pytest.skip("make is not installed")
    return Chain(tmp_path)


PAPER = ["preflight", "sensitivity", "plan", "sweep", *4 * ["bench"], "report"]


def test_the_stages_of_a_reproduction_in_order(chain):
    calls = chain.make("reproduce-tiny", "MODEL=models/llama", "TEXT=some.txt", "TP=4", "-j4")
    stages = ["sensitivity", "plan", "sweep", "table1", "distill", "eval", "bench", "report"]
    assert [stage_of(call) for call in calls] == stages
    options = dict(zip(stages, calls, strict=True))
    for name in ("sensitivity", "sweep", "table1", "distill", "eval"):
        assert "--tp 4 --model models/llama --text some.txt" in options[name]
    assert "--plan runs/llama-tp4/repaired" in options["eval"]
    assert "--tp" not in options["bench"]  # as many processes as the experiment says
    assert all("--records runs/llama-tp4/records --reproduction llama-tp4" in call for call in calls)
    assert "--out runs/llama-tp4/figures" in options["report"]


def test_any_experiment_is_a_target_and_a_failing_stage_is_the_last(chain):
    (chain.folder / "experiments/mine.yaml").write_text("common:\n  model: m\n")
    assert chain.stages("reproduce-mine") == ["sensitivity", "plan", "sweep", "bench", "report"]
    assert chain.stages("reproduce-mine", fail="sweep", code=1)[-1] == "sweep"
    assert chain.stages("reproduce-70b") == PAPER
    assert chain.stages("reproduce-llama3.1-8b", "NPROC=8") == PAPER
    for name in ("reproduce-13b", "reproduce-70b"):
        assert chain.stages(name, fail="experiments/preflight.py", code=1) == ["preflight"], "nothing long before it"


def test_the_paper_s_degrees_and_the_processes_they_have(chain):
    calls = chain.make("reproduce-7b", "MODEL=models/seven", "TEXT=a.txt")
    assert [re.search(r"--tp (\d)", c)[1] for c in calls if " sensitivity " in c] == ["8", "4"]
    assert not [c for c in calls if " bench " in c] and "Latency was left out" in chain.output
    assert not [c for c in calls if c.startswith("-m torch")]
    sweep = next(c for c in calls if " sweep " in c)
    assert "--model models/seven" in sweep and "--calibration-text a.txt --skip 128" in sweep
    calls = chain.make("reproduce-7b", "NPROC=8", "TEXT=a.txt", "EVAL_TEXT=b.txt", "STRATEGIES=best")
    launched = [re.match(r"-m torch.distributed.run --standalone --nproc-per-node (\d)", c) for c in calls]
    assert [m[1] for m in launched if m] == ["8"] * 7 + ["4", "8"] + ["4"] * 5, "a sweep is by copies"
    assert ["--data-parallel 8" in c for c in calls if " sweep " in c] == [True, True]
    assert "--calibration-text a.txt --text b.txt --strategies best" in re.sub(" +", " ", calls[3])
    calls = chain.make("reproduce-70b")
    assert calls[1].startswith("-m torch.distributed.run --standalone --nproc-per-node 8 "), "the node's GPUs by itself"


def test_nodes_after_the_first_take_part_in_what_many_processes_do(chain):
    nodes = ("reproduce-70b", "NNODES=2", "NPROC=4", "RDZV=first:29500")
    calls = chain.make(*nodes, "NODE_RANK=1")
    assert [stage_of(call) for call in calls] == ["preflight", "sensitivity", "sweep", *4 * ["bench"]]
    meeting = "-m torch.distributed.run --nnodes 2 --node-rank 1 --rdzv-endpoint first:29500 --nproc-per-node "
    assert [call.startswith(f"{meeting}{n} ") for call, n in zip(calls, "1444444", strict=True)] == [True] * 7
    assert chain.stages(*nodes, "NODE_RANK=0") == PAPER


EVERYWHERE = """common: {model: spd-tiny, tp: 2, text: builtin, seq_len: 32, windows: 3}
sweep: {skip: 4, calibration: 4, percentages: "0,100", strategies: "zs,closed-form@100"}
"""
# Really runs what several processes do, and notes the rest.
LAUNCHES = """#!/bin/sh
case "$*" in *torch.distributed.run*\\ spd\\ *) exec "$REAL" "$@" ;; esac
echo "$*" >> log
"""


def test_two_nodes_meet_and_sweep_together(chain):
    """Two agents of one process each, the Makefile's own words: shards over both, then a copy of the model on each."""
    (chain.folder / "experiments/both.yaml").write_text(EVERYWHERE)
    (chain.folder / "python").write_text(LAUNCHES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {
        "REAL": sys.executable,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    words = [
        MAKE,
        "reproduce-both",
        "TP=2",
        "GPUS=1",
        "NNODES=2",
        f"RDZV=127.0.0.1:{port}",
        "PYTHON=./python",
        "ARGS=--no-mlflow",
    ]
    nodes = [
        subprocess.Popen(
            [*words, f"NODE_RANK={n}"], cwd=chain.folder, env=os.environ | here, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    said = [node.communicate(timeout=900)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    run = chain.folder / "runs/both-tp2"
    assert sorted(r["command"] for r in load_records([run / "records"])) == ["sensitivity", "sweep"], "one node writes"
    assert [stage_of(line) for line in (chain.folder / "log").read_text().splitlines()] == ["plan", "bench", "report"]
    points = json.loads((run / "sweep.json").read_text())["curve"]
    model = SPDModel.from_pretrained("spd-tiny", tp=2)
    windows = read_windows("builtin", model.tokenizer, 32, 3, 4).tokens
    for point, drops in zip(points[:2], (range(0), range(8)), strict=True):
        model.plan = Plan.dropping(8, drops)
        assert point["perplexity"] == pytest.approx(perplexity(model.transformer, windows)["perplexity"], rel=1e-5)
    assert points[2]["strategy"] == "closed-form" and points[2]["perplexity"] < points[1]["perplexity"]


def test_a_dry_run_says_every_command_and_does_nothing(chain):
    before = {p: p.stat().st_mtime_ns for p in chain.folder.rglob("*") if p.is_file()}
    assert chain.stages("reproduce-70b", "DRY_RUN=1", "TEXT=another.txt") == ["budget"]
    printed = [line for line in chain.output.splitlines() if "./python " in line and not line.startswith("make")]
    assert [stage_of(line) for line in printed] == [*PAPER, "report"]
    timed = [("--compile" in line, "NCCL_P2P_DISABLE=1" in line) for line in printed[4:8]]
    assert timed == [(False, False), (True, False), (False, True), (True, True)]
    after = {p: p.stat().st_mtime_ns for p in chain.folder.rglob("*") if p.is_file() and p.name != "log"}
    assert after == before


def test_shape_only_runs_the_same_chain_on_random_weights(chain):
    calls = chain.make("reproduce-70b", "SHAPE_ONLY=1")
    assert [stage_of(c) for c in calls] == ["shape_only", "sensitivity", "plan", "sweep", "bench", "report"]
    assert "--shape llama2-70b --blocks 2" in calls[0]
    assert "--model runs/llama2-70b-shape-only/model" in calls[1]
    assert "runs/llama2-70b-shape-only-tp8/figures" in calls[-1]


# Experiments and what they take


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid(path):
    for section in {*read_experiment(path), *COMMANDS} - {"common"}:
        if section in COMMANDS:  # as table1 is, since its script was imported
            COMMANDS[section].values_of(path)


def test_the_paper_s_numbers():
    for size, tau1 in (("7b", 0.05), ("13b", 0.05), ("70b", 0.02)):
        sections = read_experiment(ROOT / "experiments" / f"llama2-{size}.yaml")
        sweep, plan = sections["sweep"], sections["plan"]
        assert (sweep["tau1"], sweep["tau2"], plan["tau1"], plan["tau2"]) == (tau1, 10, tau1, 10)
        numbers = (sweep["epochs"], sweep["learning_rate"], sweep["calibration"], sections["common"]["seq_len"])
        assert numbers == (10, 5e-5, 128, 2048)
        assert sweep["percentages"] == sections["bench"]["percentages"]
        assert sweep["strategies"] == "zs,b2b,b2b+hg,closed-form@50/70/100"


def test_budgets_count_weights_and_grow_with_the_work():
    job = Job(SHAPES["llama2-7b"], 8, 1, 1, 2048)
    assert job.weights() == pytest.approx(4 * SHAPES["llama2-7b"].parameters())
    one, all_of_them = (repair(job, 128, document_of(job, n), recipe_named("b2b+hg")) for n in (1, 32))
    assert one.seconds < all_of_them.seconds < 32 * one.seconds
    assert one.device_bytes == all_of_them.device_bytes > job.weights()
    assert all_of_them.disk_bytes == pytest.approx(32 * one.disk_bytes)
    spread = Job(SHAPES["llama2-7b"], 8, 8, 8, 2048)
    assert repair(spread, 128, document_of(job, 32), recipe_named("b2b+hg")).host_bytes == pytest.approx(
        8 * all_of_them.host_bytes
    )
    assert Budget(1, 2, 3, 4).then(Budget(1, 5, 1, 1), 2) == Budget(3, 5, 3, 6)


def test_streams_are_reckoned_on_the_gpu_where_they_leave_it_half_of_what_is_free():
    """One of 80 GB has room for those of 7B; beside 13B in float32 they stay on the host, and are brought each time."""
    for model, on_host in (("llama2-7b", 0), ("llama2-13b", 2 * 128 * 2048 * 5120 * 4)):
        job = Job(SHAPES[model], 8, 1, 1, 2048)
        found = repair(job, 128, document_of(job, 1), recipe_named("b2b"))
        assert found.host_bytes == 4 * job.block_parameters + on_host


def test_a_pass_is_counted_as_torch_counts_it():
    """One token: torch counts attention over all positions, of which a causal kernel reads those before."""
    model = SPDModel.from_pretrained("spd-tiny", tp=4).transformer
    job, tokens = Job(model.config, 4, 1, 1, 1), torch.tensor([[5]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        model(tokens)
    assert counted.get_total_flops() == job.flops


def test_tasks_loads_and_timings_are_counted_in_hours():
    job = Job(SHAPES["llama2-70b"], 8, 8, 8, 2048)
    asked = {"tasks": "piqa,mmlu", "limit": None, "dtype": "bfloat16"}
    everything, some = answers(job, asked), answers(job, asked | {"limit": 10})
    tokens = 1838 * 63 + 14042 * 619
    assert everything.seconds == pytest.approx(job.seconds(tokens * job.flops / 2048, "bfloat16"))
    assert some.seconds / everything.seconds == pytest.approx((10 * 63 + 570 * 619) / tokens)
    assert answers(job, asked | {"tasks": None}).seconds == 0
    options = {"percentages": [0, 50, 100], "repeats": 7, "batch": 1, "prompt_len": 128, "new_tokens": 16,
               "dtype": "bfloat16", "device": "cuda"}  # fmt: skip
    timed, steps = bench(job, options).seconds - 4 * job.load().seconds, 4 * (3 + 3) * (7 + 3) * 17
    read = steps * job.weights("bfloat16") / float(gpu_row("a100")["memory_bytes_per_second"])
    launched = steps / 2 * LAUNCH * sum(times for _, times in Pass(job.config, 8).operators())
    assert read < timed - launched < 2 * read, "a decode step reads the weights once"
    assert bench(replace(job, processes=4), options) == Budget(), "latency is then left out"
    assert job.load().seconds == pytest.approx(2 * SHAPES["llama2-70b"].parameters() / 1e9)
    assert set(QUESTIONS) == set(KNOWN)


def test_the_estimate_of_an_experiment_has_each_stage():
    found = stages(ROOT / "experiments/llama2-70b.yaml", None, 8, 8, 8, "a100")
    assert list(found) == ["sensitivity", "sweep", "bench"]
    assert found["sweep"].seconds > found["sensitivity"].seconds > 0 and found["sweep"].disk_bytes > 0
    tiny = stages(ROOT / "experiments/tiny.yaml", None, 8, 1, 1, "a100")
    assert list(tiny) == ["sensitivity", "table1", "distill", "eval", "sweep", "bench"]
    with pytest.raises(SPDError, match="someone/else is not here, and its shape is not known"):
        stages(ROOT / "experiments/tiny.yaml", "someone/else", 8, 1, 1, "a100")


@pytest.mark.parametrize(
    ("model", "tp", "gpus", "copies", "hours"),
    [("70b", 8, 8, 1, 8), ("7b", 8, 8, 8, 1), ("7b", 4, 4, 8, 1), ("7b", 8, 1, 1, 4), ("7b", 4, 1, 1, 4)],
)
def test_the_paper_s_models_are_reproduced_within_hours(model, tp, gpus, copies, hours):
    found = stages(ROOT / f"experiments/llama2-{model}.yaml", None, tp, gpus, gpus, "a100", copies)
    assert sum(each.seconds for each in found.values()) < 3600 * hours
    assert all(each.device_bytes < 75 * 2**30 for each in found.values())


def test_repairs_take_the_time_of_their_products():
    job = Job(SHAPES["llama2-70b"], 8, 8, 8, 2048)
    assert job.seconds(1.0) == job.seconds(1.0, "bfloat16") * 2 == replace(job, matmul="fp32").seconds(1.0) / 8
    assert replace(job, matmul="fp32").seconds(1.0) == job.seconds(1.0, "float32")


def test_a_sweep_is_counted_point_by_point_and_each_repair_once(monkeypatch):
    """The paper's 70B has 60 blocks that are in-sensitive: up to 75 % its recipes differ in nothing."""
    met = []
    monkeypatch.setattr("budget.repair", lambda job, windows, document, recipe: met.append(document) or Budget(1e9))
    monkeypatch.setattr("budget.answers", lambda *_: Budget(1e3))
    monkeypatch.setattr(Job, "passes", lambda *_: Budget(1.0))
    monkeypatch.setattr(Job, "load", lambda *_: Budget())
    options = {"model": "meta-llama/Llama-2-70b-hf", "percentages": [0.0, 50.0, 80.0, 100.0], "dtype": "bfloat16",
               "strategies": "zs,b2b,b2b+hg,closed-form@100", "windows": 9, "calibration": 128, "epochs": 10,
               "joint_epochs": None, "generated": None, "data_parallel": 1}  # fmt: skip
    job = Job(SHAPES["llama2-70b"], 8, 8, 8, 2048)
    found = sweep(job, options).seconds
    assert [sum("drop" in pair for pair in d["policies"]) for d in met] == [20, 20, 80]
    assert found == 3e9 + 1e3 * (1 + 3 + 2 + 2 + 1) + (4 + 2 + 2 + 1)
    assert sweep(job, options | {"model": "someone/else"}).seconds == 3e9 + 1e3 * (1 + 3 * 3 + 1) + (4 + 3 + 3 + 1)


def test_the_committed_table_is_the_reckoned_one():
    (record,), reckoned = load_records([ROOT / "experiments/records/budget"]), json.loads(json.dumps(table()))
    assert {name: record["result"][name] for name in reckoned} == reckoned


# Before anything long


@pytest.fixture
def complete(tmp_path):
    from tests.test_shape_only import SMALL

    write_shape_only(SMALL, 1, tmp_path / "model")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "piqa.jsonl").write_text("{}")
    return Needs(
        str(tmp_path / "model"), 2, (str(tmp_path / "text.txt"), "builtin"), ("piqa",), tmp_path, folder=tmp_path
    )


def test_nothing_is_missing_where_all_is_there(complete):
    assert missing(complete) == []


def test_all_that_is_missing_is_said_at_once(complete, tmp_path, monkeypatch):
    asked = replace(
        complete,
        texts=("nowhere.txt",),
        tasks=("piqa", "sciq", "boolq"),
        device="cuda",
        processes=2,
        gpus=2,
        budget=Budget(1, 1e9, 1e18, 1e18),
    )
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    found = missing(asked)
    assert len(found) == 6
    patterns = (
        "2 GPUs are needed.*0 are visible",
        "host memory are needed",
        "GiB of disk are needed.*free under",
        "holds no tokenizer",
        "There is no text nowhere.txt",
        "no rows of sciq, boolq",
    )
    for pattern, line in zip(patterns, found, strict=True):
        assert re.search(pattern, line), line
    next((tmp_path / "model").glob("*.safetensors")).write_bytes(b"cut")
    assert any("truncated" in line for line in missing(asked))
    assert missing(replace(complete, processes=4))[0].startswith("tp=2 is not a multiple of the 4 processes")
    assert "cannot be reached" in missing(replace(complete, model="meta-llama/Llama-2-7b-hf"))[0]


def test_gpus_that_do_not_compute_or_have_no_room_are_named(complete, monkeypatch):
    asked = replace(complete, device="cuda", gpus=1, budget=Budget(device_bytes=30 * 2**30))
    assert "built without CUDA" in missing(asked)[0]
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (20 * 2**30, 80 * 2**30))
    old, ones = RuntimeError("The driver on your system is too old\n(found 12040)"), torch.ones
    monkeypatch.setattr("torch.ones", Mock(side_effect=old))
    (line,) = missing(asked)
    assert re.search(r"do not compute with this torch \(2.*, CUDA 13.0\): The driver on your system is too old$", line)
    monkeypatch.setattr("torch.ones", lambda *size, device: ones(*size))
    assert re.search("30 GiB of memory are needed on each GPU .*the fullest has 20 free", missing(asked)[0])
    assert missing(replace(asked, budget=Budget())) == []


def test_processes_must_sum_before_anything_long(monkeypatch, tmp_path):
    assert preflight._together(2) == []
    (tmp_path / "broken.py").write_text("raise ValueError('NCCL Error 2: no way')")
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "broken.py"))
    assert re.search("An all-reduce of 2 processes fails .*NCCL Error 2: no way", preflight._together(2)[0])
    monkeypatch.setattr(preflight, "disk_usage", lambda folder: Mock(free=64e6))
    assert "NCCL needs 1 GiB of /dev/shm, and 0.06 are free" in preflight._together(2)[0]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_missing_ends_a_reproduction_unless_it_is_forced(monkeypatch, capsys, force):
    words = ["preflight", str(ROOT / "experiments/tiny.yaml"), "--tp", "4", "--text", "nowhere.txt"]
    monkeypatch.setattr("sys.argv", [*words, *["--force"] * force])
    with pytest.raises(SystemExit) as ended:
        preflight.main()
    said = capsys.readouterr().err.splitlines()
    assert bool(ended.value.code) != force and ("going on" in said[0]) == force and "FORCE=1" in said[0]
    assert "There is no text nowhere.txt" in said[1]
