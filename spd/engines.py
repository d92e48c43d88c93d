"""How a model is run to be timed: eager, or with static shapes, compiled and, on GPUs, captured as CUDA graphs.

Both leave the token they choose on the device, so that nothing in the loop waits for it. Beside them stand the rates of
the machine, measured in the same run: a pass cannot be faster than its matrix FLOPs at the rate of the best product,
nor than its weights at the rate memory is read; an all-reduce costs what the process group takes for one of its size
when nothing else is going on, and an emulated link what it is said to. Nothing overlaps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd.comm import Shards
from spd.kernels import linear
from spd.latency import Setting, communication
from spd.machines import Costs, FittedAllReduce, Machine, Pass
from spd.model import Transformer

WARMUP = 3  # passes before a capture: compilation, and what libraries allocate on their first calls
VARIANTS = 64  # forms of a part: prefill and decode, something pending or not, blocks 0 and 1 before the rest


class Eager:
    """Greedy decoding of one prompt (B, T), as the model stands."""

    def __init__(self, model: Transformer, prompt: Tensor, new_tokens: int):
        self.model, self.prompt = model, prompt
        self.cache = model.new_cache(prompt.shape[0], prompt.shape[1] + new_tokens)

    def prefill(self) -> None:
        self.cache.length = 0
        self.token = self._choice(self.prompt)

    def decode(self) -> None:
        self.token = self._choice(self.token)

    def _choice(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, self.cache, last_only=True)[:, -1].argmax(-1, keepdim=True)


class Compiled:
    """The same, what lies between sync points made by `torch.compile`; on GPUs each whole pass is one CUDA graph.

    Sync points themselves are not compiled: they are the plan's, and clocks and counters are in them. An instance
    belongs to the plan that the model has when it is made. `token` (B, 1) is the last choice.
    """

    def __init__(self, model: Transformer, prompt: Tensor, new_tokens: int, backend: str = "inductor"):
        self.model, self.prompt, self.token = model, prompt, prompt[:, -1:].clone()
        self.cache = model.new_cache(prompt.shape[0], prompt.shape[1] + new_tokens)
        self.steps = self.cache.static()
        for block in model.blocks:
            for part in ("attend", "transform"):
                setattr(block, part, torch.compile(getattr(type(block), part).__get__(block), backend=backend))
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            self.prefill, self.decode = (_ready(function, prompt) for function in (self._prefill, self._decode))

    def _prefill(self) -> None:
        self.cache.length = 0
        self._choose(self.model(self.prompt, self.cache, last_only=True))
        self.steps.length.fill_(self.prompt.shape[1])

    def _decode(self) -> None:
        self._choose(self.model(self.token, self.steps, last_only=True))

    def _choose(self, logits: Tensor) -> None:
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))


@torch.no_grad()
def _ready(function: Callable[[], None], like: Tensor) -> Callable[[], None]:
    """`function` compiled by a first call, and captured where the device can; what it wrote meanwhile is void."""
    if not like.is_cuda:
        function()
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


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
    all_gather: float  # seconds, of the last tokens' logits


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
    sums = {kind: _collective_seconds("all_reduce", torch.zeros(n, config.hidden_size).to(weight), model.shards)
            for kind, n in rows.items()}  # fmt: skip
    part = torch.zeros(batch, model.shards.width_of(config.vocab_size)).to(weight)
    flops = 2 * len(prompt) * weight.numel() / product
    read_rate = len(matrices) * weight.numel() * weight.element_size() / read
    return Rates(flops, read_rate, sums, _collective_seconds("all_gather", part, model.shards))


def _collective_seconds(name: str, tensor: torch.Tensor, shards: Shards) -> float:
    """Seconds of one of the transport's collectives; none where there are no other processes."""
    transport = shards.transport
    return 0.0 if transport is None else _best(lambda: getattr(transport, name)(tensor), shards, tensor)


def _best(function, shards: Shards, like: torch.Tensor) -> float:
    taken = []
    shards.align()
    for _ in range(REPEATS):
        start = clock(like)
        function()
        taken.append(clock(like) - start)
    return min(taken)


def clock(like: torch.Tensor) -> float:
    """Seconds, after everything launched on the device of `like` has finished."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def passes(model: Transformer, batch: int, prompt_len: int, new_tokens: int) -> dict[str, Pass]:
    """What is timed as `ttft` and `tpot`, to be counted."""
    nowhere = Machine("", Costs(0, 0, 0, 0, 0), model.embedding.weight.element_size()), FittedAllReduce({}, 0)
    setting = Setting(model.config, *nowhere, model.shards.tp, batch, prompt_len, max(1, new_tokens))
    return {"ttft": setting.prefill(), "tpot": setting.decode()}


def floors(rates: Rates, model: Transformer, batch: int, prompt_len: int, new_tokens: int, syncs: int) -> dict:
    """Least TTFT and TPOT (ms) of a plan with `syncs` all-reduces a pass, and what of them is communication."""
    link, found = model.shards.link, {}
    for kind, a_pass in passes(model, batch, prompt_len, new_tokens).items():
        waiting = syncs * rates.all_reduce[kind] + (syncs > 0) * rates.all_gather
        waiting += communication(a_pass, link, syncs) if link is not None else 0.0
        found |= {f"{kind}_ms": 1e3 * (_computing(rates, a_pass) + waiting), f"{kind}_communication_ms": 1e3 * waiting}
    return found


def _computing(rates: Rates, a_pass: Pass) -> float:
    work = a_pass.work()
    return max(work.flops / rates.flops, work.weight_bytes / rates.bytes)


def described(rates: Rates) -> dict:
    """For records."""
    sums = {f"{kind}_ms": 1e3 * seconds for kind, seconds in rates.all_reduce.items()}
    return {"matrix_gflops": rates.flops / 1e9, "memory_gb_per_s": rates.bytes / 1e9, "all_reduce": sums,
            "all_gather_ms": 1e3 * rates.all_gather}  # fmt: skip
