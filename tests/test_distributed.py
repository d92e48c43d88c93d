"""Real processes (gloo) against one process: the same numbers, the counted collectives, the launchers."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd import Plan, Sampling, SPDModel
from spd.bench import BenchSettings, Timed, bench
from spd.data import read_windows
from spd.distill import distill, recipe_named
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.launch import Replicas, Runtime, environment, spawn
from spd.sensitivity import sensitivity

TOKENS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
PLANS = ("FF FF FF", "DF FF DF", "DD FD DD")


def counted(model: SPDModel) -> dict[str, list[int]]:
    """Number and bytes of the collectives since the last call, by sync point."""
    return {point: [c.count, c.bytes] for point, c in model.transformer.shards.take_collectives().items()}


def everything(runtime: Runtime, folder: str, text: str, tp: int) -> dict:
    """All that one process can compute, on the shards of this one."""
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(tp))
    found = {kind: {} for kind in ("logits", "last", "cached", "collectives", "gathered")}
    for letters in PLANS:
        model.plan = Plan.from_letters(letters)
        with torch.no_grad():
            counted(model)
            found["logits"][letters] = model.transformer(TOKENS).tolist()
            found["collectives"][letters] = counted(model)
            found["last"][letters] = model.transformer(TOKENS, last_only=True).tolist()
            found["gathered"][letters] = counted(model).get("head")
            cache = model.transformer.new_cache(*TOKENS.shape)
            pieces = [model.transformer(piece, cache) for piece in TOKENS.split([13, 1, 1, 1], dim=1)]
        found["cached"][letters] = torch.cat(pieces, 1).tolist()
    found["sampled"] = model.generate(["t5 t6 t7", "t8"], 10, Sampling(temperature=1.0, seed=3))
    windows = read_windows(text, model.tokenizer, 16, 10).tokens
    found["perplexity"] = perplexity(model.transformer, windows)["perplexity"]
    found["sensitivity"] = sensitivity(model.transformer, windows)["sensitivity"]
    return found


@pytest.mark.parametrize(("processes", "tp", "variant"), [(2, 8, "grouped-query"), (4, 4, "all-biases")])
def test_several_processes_equal_one(variants, text_of_words, processes, tp, variant):
    folder = str(variants(variant)[0])
    alone = everything(Runtime(), folder, str(text_of_words), tp)
    together = spawn(processes, everything, folder, str(text_of_words), tp)
    for kind in ("logits", "last", "cached"):
        for letters in PLANS:
            torch.testing.assert_close(
                torch.tensor(together[kind][letters]), torch.tensor(alone[kind][letters]), rtol=0, atol=2e-5
            )
    assert together["collectives"] == alone["collectives"]
    assert together["collectives"]["FF FF FF"] == {"attention": [3, 3 * 4096], "mlp": [3, 3 * 4096]}
    assert set(map(str, together["gathered"].values())) == {str([1, 2 * 96 * 4])}  # two tokens' logits, whole
    assert set(alone["gathered"].values()) == {None}
    assert together["sampled"] == alone["sampled"]
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert together["sensitivity"] == pytest.approx(alone["sensitivity"], rel=1e-3, abs=1e-3)


def copied(runtime: Runtime, folder: str, text: str, copies: int) -> dict:
    """Perplexity on `copies` of the model, and where in its copy this process is."""
    replicas = runtime.replicas(copies)
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(4, replicas=replicas))
    windows = read_windows(text, model.tokenizer, 100, 50).tokens
    place = {"rank": model.transformer.shards.rank, "world": model.transformer.shards.world}
    return perplexity(model.transformer, windows, replicas=replicas) | place


def answered(runtime: Runtime, folder: str, rows: str) -> dict:
    """Accuracy with one copy of the model on each process, and with one on all together."""
    from spd.tasks import (
        Accuracy,  # only here: each process of each test imports this file
        load_tasks,
    )

    found, tasks = {}, load_tasks("piqa", Path(rows))
    for name, copies in (("apart", runtime.world), ("together", 1)):
        replicas = runtime.replicas(copies)
        model = SPDModel.from_pretrained(folder, shards=runtime.shards(4, replicas=replicas))
        model.plan = Plan.from_letters("DF FF DF")
        found[name] = Accuracy(tasks, batch_size=2, replicas=replicas, is_main=runtime.is_main)(model)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_copies_of_the_model_divide_the_windows(variants, text_of_words, processes):
    """Two copies. To the last bit the same where each has one process: whoever runs a batch, it is the same batch."""
    arguments = str(variants("plain")[0]), str(text_of_words)
    found, alone = spawn(processes, copied, *arguments, 2), copied(Runtime(), *arguments, 1)
    assert (found["rank"], found["world"], alone["world"]) == (0, processes // 2, 1)
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=0 if processes == 2 else 1e-6)


def test_copies_of_the_model_divide_the_questions(variants, tmp_path):
    rows = [
        {"goal": f"t{i} " * (i % 5 + 1), "sol1": f"t{i + 2} t9", "sol2": "t7", "label": i % 2} for i in range(5, 22)
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = str(variants("plain")[0]), str(tmp_path)
    found, alone = spawn(2, answered, *arguments), answered(Runtime(), *arguments)
    assert found["apart"] == found["together"] == alone["apart"] == alone["together"]


def joined(runtime: Runtime, size: int) -> dict:
    """Of 0..size-1, with and without communication."""
    shards = runtime.shards(runtime.world)
    mine = torch.arange(size, dtype=torch.bfloat16)[None, shards.part_of(size)]
    found = {"whole": shards.join(mine, size, "head").tolist()}
    shards.silent = True
    found["silent"] = shards.join(mine, size, "head").shape[-1]
    found["bytes"] = shards.take_collectives()["head"].bytes
    return found


@pytest.mark.parametrize("size", [8, 5, 3])
def test_parts_of_any_width_are_joined(size):
    expected = {"whole": [list(range(size))], "silent": size, "bytes": 2 * size}
    assert spawn(4, joined, size) == expected


def test_processes_that_cannot_be_divided():
    with pytest.raises(
        SPDError, match=r"^3 copies of the model need as many equal parts of the processes, which are 2"
    ):
        Runtime(world=2).replicas(3)
    with pytest.raises(SPDError, match=r"^tp=2 is not a multiple of the 4 processes"):
        Runtime(world=8).shards(2, replicas=Replicas(1, 4))


def test_bench_counts_what_it_times(variants):
    letters = ("FF FF FF", "DF FF DF")
    plans = tuple(Plan.from_letters(each) for each in letters)
    settings = BenchSettings(plans, prompt_len=8, new_tokens=2, repeats=3, warmup=1, link="1GBps,2ms")
    found = spawn(2, bench, Timed(str(variants("plain")[0]), tp=2), settings)
    assert [row["plan"] for row in found["plans"]] == list(letters)
    counts = [{point: c["count"] for point, c in row["collectives"].items()} for row in found["plans"]]
    assert counts == [{"attention": 3, "mlp": 3, "head": 1}, {"attention": 1, "mlp": 3, "head": 1}]
    payload = 8 * 32 * 4
    for row in found["plans"]:
        head = row["collectives"].pop("head")
        assert head["bytes"] == 96 * 4 and head["emulated_ms"] >= 2 + 96 * 4 / 2 / 1e6
        for c in row["collectives"].values():
            assert c["bytes"] == c["count"] * payload
            assert c["emulated_ms"] >= c["count"] * (2 + payload / 1e6)  # 2 (n-1)/n is 1 for two processes
        assert (
            row["ttft_ms"]["repeats"] == 3
            and row["ttft_ms"]["median"] > sum(c["emulated_ms"] for c in row["collectives"].values()) / 2
        )
        assert row["tpot_ms"]["median"] > 0
    assert list(found["bounds"]) == ["all_full", "all_attention_dropped", "no_communication"]
    assert found["bounds"]["no_communication"]["collectives"] == {}
    assert list(found["bounds"]["all_attention_dropped"]["collectives"]) == ["mlp", "head"]


def refuse(runtime: Runtime) -> dict:
    raise SPDError("This cannot be.")


def end(runtime: Runtime) -> dict:
    os._exit(3)


def test_what_a_process_raises_reaches_the_caller():
    with pytest.raises(SPDError, match=r"^This cannot be\.$"):
        spawn(2, refuse)
    with pytest.raises(SPDError, match="of 2 ended unexpectedly"):
        spawn(2, end)


def launched(words: list[str]) -> subprocess.CompletedProcess:
    """Python with these words, its processes on the loopback."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    there = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=loopback)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=there, timeout=300)


def two_processes(*arguments: str) -> subprocess.CompletedProcess:
    """A command under torchrun."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spd", *arguments]
    return launched(words)


def test_under_torchrun_rank_0_alone_writes(plain, text_of_words, tmp_path):
    options = [
        "eval",
        "--model",
        str(plain),
        "--tp",
        "4",
        "--text",
        str(text_of_words),
        "--seq-len",
        "16",
        "--drop",
        "1",
    ]
    run = two_processes(*options, "--no-mlflow",
                   "--records", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json"))  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert len(list((tmp_path / "runs").iterdir())) == 1
    model = SPDModel.from_pretrained(plain, tp=4, plan=Plan.dropping(3, [1]))
    alone = perplexity(model.transformer, read_windows(str(text_of_words), model.tokenizer, 16).tokens)
    assert result["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


@pytest.mark.parametrize("windows", [3, 12])  # fewer tokens than features, and more
def test_under_torchrun_a_repair_is_the_one_of_one_process(plain, text_of_words, tmp_path, windows):
    options = ["distill", "--model", str(plain), "--tp", "4", "--text", str(text_of_words), "--seq-len", "8",
               "--windows", str(windows), "--drop", "0,2"]  # fmt: skip
    run = two_processes(*options, "--no-mlflow",
                   "--records", str(tmp_path / "runs"), "--out", str(tmp_path / "two"))  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.strip().splitlines()) == len(list((tmp_path / "runs").iterdir())) == 1
    model = SPDModel.from_pretrained(plain, tp=4)
    tokens = read_windows(str(text_of_words), model.tokenizer, 8, windows).tokens
    document = {"policies": Plan.dropping(3, [0, 2]).policies()}
    alone, together = (
        distill(model, tokens, document, recipe_named("closed-form"), tmp_path / "one"),
        json.loads(run.stdout),
    )
    for key in ("perplexity_before", "perplexity_after"):
        assert together[key] == pytest.approx(alone[key], rel=1e-3)
    files = [sorted((tmp_path / folder / "blocks").iterdir()) for folder in ("one", "two")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    weights = [{name: t for path in some for name, t in load_file(path).items()} for some in files]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=5e-3)


def test_torchrun_with_a_degree_that_does_not_fit(plain, text_of_words, tmp_path):
    options = [
        "eval",
        "--model",
        str(plain),
        "--tp",
        "1",
        "--text",
        str(text_of_words),
        "--no-mlflow",
        "--records",
        str(tmp_path / "r"),
    ]
    run = two_processes(*options)
    assert run.returncode != 0
    assert "tp=1 is not a multiple of the 2 processes that share it." in run.stderr
    assert not run.stdout.strip()


FAILING = """
import atexit, os, sys, time
from spd.cli import main
from spd.errors import SPDError
from spd.model import Transformer

def run_block(self, *arguments, whole=Transformer.run_block, done=[]):
    done.append(1)
    if len(done) == 3 and os.environ["RANK"] == "1":
        print(f"failed at {time.time()}", file=sys.stderr, flush=True)
        raise SPDError("This process is out of luck.")
    return whole(self, *arguments)

atexit.register(time.sleep, 600)  # as NCCL's end, which waits for processes that never come
Transformer.run_block = run_block
main()
"""


def test_where_one_process_fails_all_end_at_once_with_its_sentence(plain, text_of_words, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", tmp_path / "failing.py", "eval"]
    command += ["--model", plain, "--tp", "3", "--text", text_of_words, "--no-mlflow", "--records", tmp_path / "r"]
    run = launched(list(map(str, command)))
    ended = time.time()
    assert run.returncode != 0 and not run.stdout.strip()
    assert "rank 1: This process is out of luck.\n" in run.stderr and "bug of spd" not in run.stderr
    assert ended - float(re.search(r"failed at ([\d.]+)", run.stderr)[1]) < 30


def test_an_interrupted_process_waits_for_no_other(monkeypatch):
    """Its interpreter's end would destroy the group, and NCCL's waits."""
    from spd import cli, launch

    def interrupted(_):
        raise KeyboardInterrupt

    left = []
    monkeypatch.setattr(cli, "chosen", interrupted)
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.os, "_exit", lambda code: left.append(code) or sys.exit(code))
    with pytest.raises(SystemExit):
        cli.main()
    assert left == [130]


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_is_taken_down_on_a_clean_end_alone(monkeypatch, fails):
    """Where one process fails, NCCL's end waits for the others, and the sentence that says why is never seen."""
    from spd import launch

    done = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(launch.dist, "destroy_process_group", lambda: done.append(1))
    with contextlib.suppress(SPDError), launch.runtime():
        if fails:
            raise SPDError("One process failed.")
    assert len(done) == (not fails)
