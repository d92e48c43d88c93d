"""How close measured times come to what the machine allows: a lower bound of a pass from rates measured beside it.

A pass cannot be faster than its matrix FLOPs at the rate of the machine's best product, nor than its weights at the
rate memory is read; each all-reduce kept costs what the process group takes for one of its size when nothing else is
going on, and an emulated link what it is said to. Nothing overlaps.
"""

import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from spd.comm import Shards
from spd.kernels import linear
from spd.model import Transformer
from spd.timing.latency import Setting
from spd.timing.machines import Costs, FittedAllReduce, Machine
from spd.timing.work import Pass

# Bytes read to find the memory's rate, at most; smaller models are read whole, from caches if they fit there. A GPU
# needs enough of them to hide what launching takes.
LARGEST = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
REPEATS = 10


@dataclass(frozen=True)
class Rates:
    """What this process reaches while the others do the same."""

    flops: float  # a second, of the product that a prefill spends most on
    bytes: float  # a second, read once for one row
    all_reduce: dict[str, float]  # seconds, of `ttft` and `tpot`


@torch.no_grad()
def measure(model: Transformer, batch: int, prompt_len: int) -> Rates:
    """Best of a few repetitions of each; every process must call it."""
    config, weight = model.config, model.blocks[0].mlp.gate_up.weight[0]
    prompt = torch.randn(batch * prompt_len, config.hidden_size).to(weight)
    product = _best(lambda: linear(prompt, weight), model.shards, prompt)
    matrices = [block.mlp.gate_up.weight[0] for block in model.blocks]
    matrices = matrices[: max(1, LARGEST[weight.device.type] // (weight.numel() * weight.element_size()))]
    one = prompt[:1].contiguous()
    read = _best(lambda: [linear(one, matrix) for matrix in matrices], model.shards, prompt)
    rows = {"ttft": batch * prompt_len, "tpot": batch}
    sums = {kind: _all_reduce(torch.zeros(n, config.hidden_size).to(weight), model.shards) for kind, n in rows.items()}
    flops = 2 * len(prompt) * weight.numel() / product
    return Rates(flops, len(matrices) * weight.numel() * weight.element_size() / read, sums)


def _best(function, shards: Shards, like: torch.Tensor) -> float:
    taken = []
    shards.align()
    for _ in range(REPEATS):
        start = clock(like)
        function()
        taken.append(clock(like) - start)
    return min(taken)


def _all_reduce(tensor: torch.Tensor, shards: Shards) -> float:
    return _best(lambda: dist.all_reduce(tensor, group=shards.group), shards, tensor) if dist.is_initialized() else 0.0


def clock(like: torch.Tensor) -> float:
    """Seconds, after everything launched on the device of `like` has finished."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def floors(rates: Rates, model: Transformer, batch: int, prompt_len: int, new_tokens: int, syncs: int) -> dict:
    """Least TTFT and TPOT (ms) of a plan with `syncs` all-reduces a pass, and what of them is all-reduces."""
    shards, size = model.shards, model.embedding.weight.element_size()
    nowhere = Machine("", Costs(0, 0, 0, 0, 0), size), FittedAllReduce({}, 0)
    setting = Setting(model.config, *nowhere, shards.tp, batch, prompt_len, max(1, new_tokens))
    passes = {"ttft": setting.prefill(), "tpot": setting.decode()}
    found = {}
    for kind, a_pass in passes.items():
        waiting = syncs * (rates.all_reduce[kind] + _link_seconds(shards, a_pass))
        found |= {f"{kind}_ms": 1e3 * (_computing(rates, a_pass) + waiting), f"{kind}_communication_ms": 1e3 * waiting}
    return found


def _computing(rates: Rates, a_pass: Pass) -> float:
    work = a_pass.work()
    return max(work.flops / rates.flops, work.weight_bytes / rates.bytes)


def _link_seconds(shards: Shards, a_pass: Pass) -> float:
    return 0.0 if shards.link is None else shards.link.all_reduce_seconds(a_pass.payload, a_pass.tp)


def described(rates: Rates) -> dict:
    """For records."""
    sums = {f"{kind}_ms": 1e3 * seconds for kind, seconds in asdict(rates)["all_reduce"].items()}
    return {"matrix_gflops": rates.flops / 1e9, "memory_gb_per_s": rates.bytes / 1e9, "all_reduce": sums}
