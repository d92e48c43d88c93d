"""The ten minutes on a GPU, as far as a machine without one goes: refusal, commands, comparison."""

import json
import os
import subprocess
from pathlib import Path

import gpu_check
import pytest
import torch

import spd.cli  # noqa: F401 (its commands are known)
from spd.errors import SPDError
from spd.options import COMMANDS

SCRIPT = Path(__file__).parent.parent / "experiments" / "gpu_check.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    python = os.environ | {"PYTHON": os.sys.executable}
    found = subprocess.run(["sh", SCRIPT, "--records", tmp_path], capture_output=True, text=True, env=python)
    assert found.returncode == 1 and not found.stdout and not list(tmp_path.iterdir())
    assert found.stderr == "Process 0 of this machine needs a GPU of its own, and 0 are visible.\n"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A check whose commands are only parsed; what each is answered may be put into `answers`, by its name."""
    answers, words = {}, []

    def run(command, **_):
        name, *given = command[3:]
        options = COMMANDS[name].parse(given)
        words.append((name, options))
        result = answers[name](options) | {"record": "r"}
        return subprocess.CompletedProcess(command, 0, json.dumps(result), "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "read_record", lambda path: {"gpu": answers.get("gpu")})
    return gpu_check.Check("cuda", tmp_path, float("inf")), answers, words


@pytest.mark.parametrize(("gpus", "ok"), [(8.004, True), (8.02, False)])
def test_parity_is_the_largest_difference_of_each_command(asked, gpus, ok):
    check, answers, words = asked
    for name in ("sensitivity", "distill", "generate"):
        key = {"sensitivity": "perplexity_from", "distill": "perplexity_after", "generate": "token_ids"}[name]
        answers[name] = lambda o, key=key: {key: gpus if o.device == "cuda" and key == "perplexity_after" else 8.0}
    found = check.parity()
    assert found["ok"] is ok and found["differ"]["sensitivity"] == 0
    assert found["differ"]["distillation"] == pytest.approx(gpus / 8 - 1)
    assert [(name, o.device) for name, o in words if name == "distill"] == [("distill", "cpu"), ("distill", "cuda")] * 2
    assert all(o.matmul == "fp32" for name, o in words if name == "distill")


def test_a_captured_step_must_come_near_the_rate_of_a_copy(asked, monkeypatch):
    check, answers, words = asked
    monkeypatch.setattr(gpu_check.Check, "copy_rate", lambda self: 2e12)
    weights = 6.607e9 * 2  # 7B without its embedding
    row = {"ttft_ms": {"median": 9.0}}
    answers["bench"] = lambda o: {"plans": [row | {"tpot_ms": {"median": 7.0 if o.compile else 25.0}}]}
    found = check.decoding()
    assert found["captured"]["of_bandwidth"] == pytest.approx(weights / 2e12 / 7e-3, rel=1e-2) and found["ok"]
    assert not found["eager"]["of_bandwidth"] > 0.85 and [o.shape for _, o in words] == ["llama2-7b"] * 2


def test_the_share_of_a_large_model_is_asked_for(asked):
    check, answers, words = asked
    answers["bench"] = lambda o: {"share": {}, "predicted": [{"tpot_ms": 9.0}, {"tpot_ms": 8.0}]}
    assert check.share()["ok"] and (words[0][1].tp, words[0][1].alone, words[0][1].compile) == (8, True, True)


def test_a_command_that_fails_says_why(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "a line\nThere is no such thing.\n")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SPDError, match=r"'spd bench' ended with 1: There is no such thing"):
        gpu_check.Check("cuda", tmp_path, float("inf")).run("bench")


def test_lists_of_other_lengths_differ_infinitely():
    assert gpu_check.difference([1, 2], [1]) == float("inf") and gpu_check.difference([4.0, 2.0], [4.0, 3.0]) == 0.5
