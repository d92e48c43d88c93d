"""The chain of stages that `make reproduce-*` runs, with a recording stub in place of Python; checks before it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from budget import Budget, Job, reckoned, repair, table
from draw_ablation import tables
from preflight import Needs, missing
from shape_only import write_shape_only

from spd.config import SHAPES
from spd.distill import Options
from spd.experiment import read_experiment
from spd.records import load_records
from spd.report import embed

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))

# Says how it was called and makes what --out names; fails at the command $FAIL.
STUB = """#!/bin/sh
echo "$*" >> log
case " $* " in *" ${FAIL:-no such command} "*) exit 1 ;; esac
out=
for word; do [ "$last" = --out ] && out=$word; last=$word; done
case " $* " in
  *" --dry-run "*) echo reckoned >&2 ;;
  *" report "*) mkdir -p "$out" && echo done > "$out/tables.md" ;;
  *" shape-only "*) mkdir -p "$out" ;;
  *) [ -z "$out" ] || { mkdir -p "${out%/*}"; echo done > "$out"; } ;;
esac
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
        done = subprocess.run([MAKE, *words, "PYTHON=./python"], cwd=self.folder, env=environment,
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert (done.returncode != 0) == bool(code), done.stderr
        self.output = done.stdout + done.stderr
        return (self.folder / "log").read_text().splitlines()

    def stages(self, *words: str, **how) -> list[str]:
        found = [re.search(r"\.yaml (?:--dry-run \d+ )?(\S+)", call) for call in self.make(*words, **how)]
        return [match[1] for match in found]

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / "experiments" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))


@pytest.fixture
def chain(tmp_path):
    if MAKE is None:
        pytest.skip("make is not installed")
    return Chain(tmp_path)


ALL = ["preflight", "sensitivity", "plan", "sweep", "bench", "bench", "report", "report"]


def test_a_changed_number_redoes_what_depends_on_it_and_nothing_else(chain):
    make = ("reproduce-70b",)
    assert chain.stages(*make) == ALL
    assert chain.stages(*make) == ["preflight"]
    for old, new, redone in (
        ("learning_rate: 0.00005", "learning_rate: 0.0001", ["sweep", "report", "report"]),
        ("budget: 70%", "budget: 60%", ["plan", "report", "report"]),
        ("repeats: 50", "repeats: 60", ["bench", "bench", "report", "report"]),
        ("# calibration", "# another remark", []),
        ("windows: 128", "windows: 64", ALL[1:]),
    ):
        chain.edit("llama2-70b.yaml", old, new)
        assert chain.stages(*make) == ["preflight", *redone], new
    assert chain.stages(*make, "TASKS_DIR=rows") == ["preflight", "sweep", "report", "report"]
    assert chain.stages(*make, "TASKS_DIR=rows") == ["preflight"]


def test_an_interrupted_chain_goes_on_at_the_stage_it_was_in(chain):
    assert chain.stages("reproduce-70b", fail="sweep", code=1)[-1] == "sweep"
    assert chain.stages("reproduce-70b") == ["preflight", *ALL[3:]]
    assert chain.stages("reproduce-13b", fail="preflight", code=1) == ["preflight"], "nothing long before the check"


def test_the_paper_s_degrees_and_the_processes_they_have(chain):
    calls = chain.make("reproduce-7b", "MODEL=models/seven", "TEXT=a.txt")
    assert [re.search(r"--tp (\d)", c)[1] for c in calls if " sensitivity " in c] == ["8", "4"]
    assert not [c for c in calls if " bench " in c] and "Latency was left out" in chain.output
    assert not [c for c in calls if c.startswith("-m torch")]
    sweep = next(c for c in calls if " sweep " in c)
    assert "--model models/seven --device cuda" in sweep and "--calibration-text a.txt --skip 128" in sweep
    calls = chain.make("reproduce-7b", "NPROC=8", "TEXT=a.txt", "EVAL_TEXT=b.txt", "STRATEGIES=best")
    launched = [re.match(r"-m torch.distributed.run --standalone --nproc-per-node (\d)", c) for c in calls]
    assert [m[1] for m in launched if m] == ["8"] * 5 + ["4"] * 5, "never more processes than shards"
    assert "--calibration-text a.txt --text b.txt --strategies best" in next(c for c in calls if " sweep " in c)


def test_nodes_after_the_first_take_part_in_what_many_processes_do(chain):
    nodes = ("reproduce-70b", "NNODES=2", "NPROC=4", "MASTER_ADDR=first")
    chain.make(*nodes, "NODE_RANK=1")
    calls = (chain.folder / "log").read_text().splitlines()
    pattern = r"-m torch.distributed.run --nnodes 2 --node-rank 1 --master-addr first --master-port (\d+) --nproc-per-"
    ports = [
        re.match(pattern + r"node (\d) -m spd --experiment experiments/llama2-70b.yaml (\S+)", c).groups()
        for c in calls
    ]
    assert [p[1:] for p in ports] == [
        ("1", "preflight"),
        ("4", "sensitivity"),
        ("4", "sweep"),
        ("4", "bench"),
        ("4", "bench"),
    ]
    assert len({port for port, *_ in ports}) == 5
    assert not list(chain.folder.glob("runs/*/asked-*")), "what is to be done is the first node's to say"
    shutil.rmtree(chain.folder / "runs")
    assert chain.stages(*nodes, "NODE_RANK=0") == ALL


def test_a_dry_run_says_every_command_and_does_nothing(chain):
    chain.make("reproduce-70b")
    before = {p: p.stat().st_mtime_ns for p in chain.folder.rglob("*") if p.is_file() and p.name != "log"}
    calls = chain.make("reproduce-70b", "DRY_RUN=1", "TEXT=another.txt")
    assert [c.split()[6] for c in calls] == ALL
    assert all("--dry-run" in c for c in calls)
    printed = [
        line for line in chain.output.splitlines() if line.startswith(("./python", "NCCL_P2P_DISABLE=1 ./python"))
    ]
    assert len(printed) == len(ALL) and chain.output.count("reckoned") == len(ALL)
    after = {p: p.stat().st_mtime_ns for p in chain.folder.rglob("*") if p.is_file() and p.name != "log"}
    assert after == before


def test_shape_only_runs_the_same_chain_on_random_weights(chain):
    calls = chain.make("reproduce-70b", "SHAPE_ONLY=1")
    names = [re.search(r"\.yaml (\S+)", c)[1] for c in calls]
    assert names == ["shape-only", "preflight", "sensitivity", "plan", "sweep", "bench", "report"]
    assert "--shape llama2-70b --blocks 2" in calls[0]
    assert "--model runs/reproduce-llama2-70b-shape-only/model" in calls[2]
    assert "paper_figures/llama2-70b-shape-only" in calls[-1]
    assert chain.stages("reproduce-70b", "SHAPE_ONLY=1") == ["preflight"]


# Experiments and what they take


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid(path):
    read_experiment(path)


def test_the_paper_s_numbers():
    for size, tau1 in (("7b", 0.05), ("13b", 0.05), ("70b", 0.02)):
        experiment = read_experiment(ROOT / "experiments" / f"llama2-{size}.yaml")
        sweep = experiment.sweep
        assert (sweep.tau1, sweep.tau2, experiment.plan.tau1, experiment.plan.tau2) == (tau1, 10, tau1, 10)
        assert (sweep.epochs, sweep.learning_rate, sweep.calibration, experiment.common.seq_len) == (
            10,
            5e-5,
            128,
            2048,
        )
        assert sweep.percentages == experiment.bench.percentages and sweep.strategies == "zs,b2b,b2b+hg"


def test_budgets_count_weights_and_grow_with_the_work():
    job = Job(SHAPES["llama2-7b"], 8, 1, 1, 2048)
    assert job.weights(4) == pytest.approx(4 * SHAPES["llama2-7b"].parameters())
    one, all_of_them = (repair(job, 128, blocks, Options.of("paper")) for blocks in (1, 32))
    assert one.seconds < all_of_them.seconds < 32 * one.seconds
    assert one.device_bytes == all_of_them.device_bytes > job.weights(4)
    assert all_of_them.disk_bytes == pytest.approx(32 * one.disk_bytes)
    spread = Job(SHAPES["llama2-7b"], 8, 8, 8, 2048)
    assert repair(spread, 128, 32, Options.of("paper")).host_bytes == pytest.approx(8 * all_of_them.host_bytes)
    assert Budget(1, 2, 3, 4).then(Budget(1, 5, 1, 1), 2) == Budget(3, 5, 3, 6)


def test_reckoning_for_a_command():
    options = {"model": "meta-llama/Llama-2-70b-hf", "tp": 8, "windows": 128, "dtype": "bfloat16", "device": "cuda"}
    line = reckoned("sensitivity", options, 8, "a100")
    assert re.fullmatch(r"reckoned, not measured: \d+ h \d\d min on 8 a100s; each GPU [\d.]+ GiB", line)
    assert "time not reckoned on a processor" in reckoned("eval", {"model": "spd-tiny", "tp": 8}, 1, "a100")
    assert reckoned("eval", {"model": "someone/else", "tp": 8}, 1, "a100").startswith("not reckoned: someone/else")
    assert reckoned("plan", {}, 1, "a100") == "reckoned, not measured: next to nothing"


def test_the_committed_table_is_the_reckoned_one():
    record = load_records([ROOT / "experiments/records/budget"])[-1]
    assert record["result"] == json.loads(json.dumps(table()))


@pytest.mark.parametrize("name", ["ablation", "budget"])
def test_the_readme_s_tables_are_those_of_the_committed_records(name):
    page, found = (ROOT / "README.md").read_text(), tables(load_records([ROOT / "experiments/records" / name]))
    assert embed(page, found) == page


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
    from dataclasses import replace

    asked = replace(complete, texts=("nowhere.txt",), tasks=("piqa", "sciq", "boolq"), device="cuda", processes=2,
                    budget=Budget(1, 1e9, 1e18, 1e18))  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    found = missing(asked)
    assert len(found) == 6
    patterns = ("2 GPUs are needed.*0 are visible", "host memory are needed", "GiB of disk are needed.*free under",
                "holds no tokenizer", "There is no text nowhere.txt", "no rows of sciq, boolq")  # fmt: skip
    for pattern, line in zip(patterns, found, strict=True):
        assert re.search(pattern, line), line
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    assert any("truncated" in line for line in missing(asked))
    assert missing(replace(complete, processes=4))[0].startswith("tp=2 is not a multiple of the 4 processes")
    assert "cannot be reached" in missing(replace(complete, model="meta-llama/Llama-2-7b-hf"))[0]
