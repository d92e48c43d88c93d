"""Memory that processes share against gloo: the same collectives, whatever the size, and in any number."""

import os

import pytest
import torch

from spd.bench import chosen_transport
from spd.errors import SPDError
from spd.launch import Runtime, nccl_settings, runtime, spawn
from spd.transport import PROCESS_GROUP, SHARED_MEMORY, ProcessGroup, SharedMemory, Transport

needs_ordered_writes = pytest.mark.skipif(not SharedMemory.works_here(), reason="not an x86-64 processor")
SIZES = (3, 5000, 1, 70000, 4096)  # in this order: the memory grows twice


def collectives(runtime: Runtime, processes: int) -> dict:
    """What both transports make of tensors that differ from process to process."""
    generator = torch.Generator().manual_seed(runtime.rank)
    found: dict[str, list] = {"differ": [], "gathered": []}
    transport: Transport = runtime.shards(processes).transport
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            mine = torch.randint(-99, 100, (1, size), generator=generator).to(dtype)
            ours, theirs = mine.clone(), mine.clone()
            transport.all_reduce(ours)
            ProcessGroup().all_reduce(theirs)
            found["differ"].append(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
            parts = zip(transport.all_gather(mine), ProcessGroup().all_gather(mine), strict=True)
            found["gathered"].append(all(torch.equal(*pair) for pair in parts))
            each = torch.cat([mine + 100 * i for i in range(processes)])
            found["gathered"].append(torch.equal(transport.exchange(each), ProcessGroup().exchange(each)))
    return found | {"transport": type(transport).__name__}


@needs_ordered_writes
@pytest.mark.parametrize("processes", [2, 3])
def test_shared_memory_does_what_gloo_does(processes):
    found = spawn(processes, collectives, processes, transport=SHARED_MEMORY)
    assert found["transport"] == "SharedMemory"
    assert all(found["gathered"]) and max(found["differ"]) < 2**-7  # bfloat16 sums round in another order
    assert len(found["differ"]) == 3 * len(SIZES)


def summed(runtime: Runtime, times: int) -> dict:
    """Every process adds what it has in every round, one of them always late: nobody may read another round."""
    transport, right = runtime.shards(runtime.world).transport, True
    for i in range(times):
        x = torch.full((257,), float(i + runtime.rank))
        if i % runtime.world == runtime.rank:
            torch.randn(40, 40) @ torch.randn(40, 40)
        transport.all_reduce(x)
        right &= bool((x == runtime.world * i + sum(range(runtime.world))).all())
        if i % 7 == 0:
            transport.barrier()
    return {"right": right}


@needs_ordered_writes
def test_no_process_reads_another_round():
    assert spawn(2, summed, 3000, transport=SHARED_MEMORY) == {"right": True}


def failing(runtime: Runtime) -> dict:
    transport = runtime.shards(runtime.world).transport
    transport.barrier()
    if runtime.rank == 1:
        raise SPDError("One of us failed.")
    transport.barrier()
    return {}


@needs_ordered_writes
def test_who_waits_for_a_failed_process_ends_with_it():
    with pytest.raises(SPDError, match="^One of us failed"):
        spawn(2, failing, transport=SHARED_MEMORY)


def test_processes_talk_through_gloo_unless_asked():
    assert spawn(2, collectives, 2)["transport"] == "ProcessGroup"
    assert Runtime().shards(4).transport is None


def test_the_transport_is_chosen_and_refused_in_words(monkeypatch):
    monkeypatch.setattr(SharedMemory, "works_here", staticmethod(lambda: True))
    assert chosen_transport(None) == chosen_transport(SHARED_MEMORY) == SHARED_MEMORY
    assert chosen_transport(PROCESS_GROUP) == chosen_transport(None, launched=True) == PROCESS_GROUP
    with pytest.raises(SPDError, match="^Unknown transport 'mail'; known: process-group, shared-memory"):
        chosen_transport("mail")
    monkeypatch.setattr(SharedMemory, "works_here", staticmethod(lambda: False))
    assert chosen_transport(None) == PROCESS_GROUP
    with pytest.raises(SPDError, match="^Shared memory joins processes that spd itself starts"):
        chosen_transport(SHARED_MEMORY)


def test_gpu_defaults_give_way_to_the_environment(monkeypatch):
    """Memory in segments that grow, NCCL's flight recorder on; what is set already stays, and the record says it."""
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": "mine", "NCCL_P2P_DISABLE": "1"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    with runtime("cuda") as here:
        assert here.device == "cuda:0"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "mine"
    assert nccl_settings() == {"NCCL_P2P_DISABLE": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
