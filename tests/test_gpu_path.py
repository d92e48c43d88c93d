"""Every command of a reproduction on GPUs that are not there (`fake_cuda`), at LLaMA2-70B's shapes.

What NCCL, a capture or a second device would refuse fails here; what a step launches, reads and copies is pinned. These
numbers are the code's, not a machine's: one that moves on purpose is written anew.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spd.engines import CALLS, WARMUP

ROOT = Path(__file__).parent.parent
STAGES = ("sensitivity", "b2b+hg", "closed-form", "eval", "bench", "compiled")
MIB = 2**20
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the guard of fake GPUs needs a C++ compiler"),
    pytest.mark.xdist_group("gpu"),  # on one worker: its fixtures take minutes
]


def commands(folder: Path, rank: int, world: int, *stages: str) -> dict:
    """What the stages asked of the GPU, as one rank."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, ROOT / "tests" / "gpu_commands.py", rank, world, folder, *stages]
    found = subprocess.run(list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, dict]:
    """Ranks 0 and 7 of eight, one after the other: the latter finds what the former had written at each barrier."""
    folder = tmp_path_factory.mktemp("eight")
    return {rank: commands(folder, rank, 8, *STAGES) for rank in (0, 7)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return commands(tmp_path_factory.mktemp("one"), 0, 1, "eval", "b2b+hg", "closed-form")


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_agree_on_every_collective(ranks, stage):
    first, last = (found[stage]["collectives"] for found in ranks.values())
    assert first == last
    assert first


def test_one_process_sends_nothing(alone):
    assert not any(found["collectives"] for found in alone.values())


def test_a_pass_reduces_twice_a_block(ranks):
    """A decode step at batch 1 sums D numbers twice a block and once gathers its part of the logits."""
    sums = [shape for name, shape, _ in ranks[0]["bench"]["collectives"] if name == "all_reduce"]
    assert {tuple(shape[-2:]) for shape in sums} == {(128, 8192), (1, 8192)}


@pytest.mark.parametrize("stage", ["b2b+hg", "closed-form"])
def test_a_repaired_block_leaves_nothing_behind(ranks, alone, stage):
    """Live bytes of the GPU after each block: gradients once stayed, 1.2 GiB a block of 13B on one GPU."""
    for found in (ranks[0], ranks[7], alone):
        after = found[stage]["noted"]["finish"]
        assert len(after) >= 3
        assert set(after) == {after[0]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_records_its_peak_and_its_nccl(ranks, stage):
    recorded = ranks[0][stage]["recorded"]
    assert recorded["peak_bytes"] == ranks[0][stage]["peak"] and recorded["nccl"] == "2.27.5"


def test_process_0_alone_takes_repaired_weights_to_its_host(ranks):
    """A part at a time: whole tensors of all shards, listed and joined, stood twice on every GPU, and on its host."""
    first, last = (found["b2b+hg"] for found in ranks.values())
    assert last["counts"]["from_gpu"] < first["counts"]["from_gpu"] / 20
    assert max(first["peak"], last["peak"]) < 6.5 * 2**30


def test_a_decode_step_launches_so_many_kernels(ranks):
    """Of three blocks, eager, with every sync: what a launch-bound step costs. It waits for nothing, copies nothing."""
    steps = ranks[0]["bench"]["noted"]["decode"]
    assert max(step["kernels"] for step in steps) == 67
    assert not any(step.get(what) for step in steps for what in ("host_reads", "to_gpu", "from_gpu"))


def test_collectives_are_timed_where_a_clock_can_see_them(ranks):
    """Between two events of the fake GPU, 1 ms apart, in a pass of their own; a graph's by what they add to TTFT."""
    eager, captured = (ranks[0][stage]["result"]["plans"][0] for stage in ("bench", "compiled"))
    counts = {"attention": 3, "mlp": 3, "head": 1}
    for row, each_ms in ((eager, 1.0), (captured, None)):
        for point, count in counts.items():
            real_ms = None if each_ms is None else pytest.approx(count * each_ms)
            assert row["collectives"][point].items() >= {"count": count, "real_ms": real_ms}.items()
    assert eager["communication_ms"]["median"] == pytest.approx(7)
    bounds = ranks[0]["compiled"]["result"]["bounds"]
    assert captured["communication_ms"]["repeats"] == 2
    sums = [shape for name, shape, _ in ranks[0]["bench"]["collectives"] if name == "all_reduce"]
    assert sums.count([128, 8192]) == (WARMUP + 1) * CALLS  # the rate of an idle one: many in a graph, replayed
    assert bounds["no_communication"]["communication_ms"]["median"] == 0


def test_a_distillation_step_reads_its_loss_alone(ranks):
    """Kernels of a step of one window (the second makes Adam's moments no more), and what it moves."""
    steps = ranks[0]["b2b+hg"]["noted"]["step"]
    assert {step["host_reads"] for step in steps} == {1}
    assert sorted({step["kernels"] for step in steps}) == [138, 150]
    assert not any(step.get(way) for step in steps for way in ("to_gpu", "from_gpu"))


def test_where_streams_leave_a_gpu_too_little_they_come_from_memory_that_is_not_paged(tmp_path):
    """Window by window, which the host need not wait for: its input and its target."""
    steps = commands(tmp_path, 0, 8, "little-memory")["little-memory"]["noted"]["step"]
    assert {step["from_pinned"] for step in steps} == {2 * 2048 * 8192 * 4}
    assert not any(step.get(way) for step in steps for way in ("to_gpu", "from_gpu"))


def test_repairs_alone_multiply_in_tf32(ranks):
    assert {step["tf32"] for step in ranks[0]["b2b+hg"]["noted"]["step"]} == {True}
    assert {step["tf32"] for step in ranks[0]["bench"]["noted"]["decode"]} == {False}
