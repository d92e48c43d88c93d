"""How a model is run to be timed: eager, or with static shapes, compiled and, on GPUs, captured as CUDA graphs.

Both engines leave the token they choose on the device, so that nothing in the loop waits for it. Beside them stand
the `Rates` of the machine, measured in the same run, and the `floors` that they set: a pass cannot be faster than its
matrix FLOPs at the rate of the best product, nor than its weights at the rate memory is read; each all-reduce kept
costs what the process group takes for one of its size when nothing else is going on, and an emulated link what it is
said to. Nothing overlaps.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd.comm import Collective, Link, Shards
from spd.kernels import linear
from spd.links import link_all_reduce
from spd.machines import Pass
from spd.model import Transformer

WARMUP = 3  # passes before a capture: compilation, and what libraries allocate on their first calls
VARIANTS = 64  # forms of a part: prefill and decode, something pending or not, blocks 0 and 1 before the rest
# Bytes read to find the memory's rate, at most; smaller models are read whole, from caches if they fit there. A GPU
# needs enough of them to hide what launching takes.
LARGEST = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
REPEATS = 10  # of what gives a rate
CALLS = 10  # of it in a graph, on GPUs: launching one and waiting for it takes as long as a small product


class Eager:
    """Greedy decoding of one prompt (B, T), as the model stands. `token` (B, 1) is the last choice."""

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
    belongs to the plan that the model has when it is made.
    """

    def __init__(self, model: Transformer, prompt: Tensor, new_tokens: int, backend: str = "inductor"):
        self.model, self.prompt, self.token = model, prompt, prompt[:, -1:].clone()
        room = prompt.shape[1] + max(new_tokens, WARMUP)  # the warm-up decodes write too
        self.cache = model.new_cache(prompt.shape[0], room)
        self.steps = self.cache.static()
        if model.rotary is not None:  # whole before a capture, which goes on reading this one
            model.rotary.table(room, model.embedding.weight)
        for block in model.blocks:
            for part in ("attend", "transform"):
                setattr(block, part, torch.compile(getattr(type(block), part).__get__(block), backend=backend))
        ready = captured if prompt.is_cuda else called_once
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=VARIANTS):
            self.prefill, self.decode = ready(self._prefill, model.shards), ready(self._decode, model.shards)

    def _prefill(self) -> None:
        self.cache.length = 0
        self._choose(self.model(self.prompt, self.cache, last_only=True))
        self.steps.length.fill_(self.prompt.shape[1])

    def _decode(self) -> None:
        self._choose(self.model(self.token, self.steps, last_only=True))

    def _choose(self, logits: Tensor) -> None:
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))


def called_once(function: Callable[[], None], shards: Shards) -> Callable[[], None]:
    """`function`, compiled by a first call."""
    function()
    return function


def captured(function: Callable[[], None], shards: Shards) -> Callable[[], None]:
    """`function` as a CUDA graph, whose replays count the collectives that were captured; times them nothing can."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    shards.take_collectives()  # those of the warm-up
    with torch.cuda.graph(graph):
        function()
    counted = shards.take_collectives()

    def replay() -> None:
        graph.replay()
        for point, once in counted.items():
            shards.collectives[point].count += once.count
            shards.collectives[point].bytes += once.bytes

    return replay


def by_events(engine: Eager) -> dict[str, Collective]:
    """The collectives of one more prefill on a GPU, each timed between two events on its stream.

    That is the link, the wait for slower processes and, where the GPU is ahead of its host, the launch.
    """
    shards = engine.model.shards
    shards.align()
    shards.take_collectives()
    shards.events = []
    engine.prefill()
    clock(engine.prompt)
    found, events, shards.events = shards.take_collectives(), shards.events, None
    for point, start, end in events:
        found[point].real_seconds = (found[point].real_seconds or 0.0) + start.elapsed_time(end) / 1e3
    return found


def clock(like: Tensor) -> float:
    """Seconds, after everything launched on the device of `like` has finished."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Rates:
    """What this process reaches while the others do the same."""

    flops: float  # a second, of the product that a prefill spends most on
    bytes: float  # a second, read once for one row
    all_reduce: dict[str, float]  # seconds, of `ttft` and `tpot`
    all_gather: float  # seconds, of the last tokens' logits

    def document(self) -> dict:
        sums = {f"{kind}_ms": 1e3 * seconds for kind, seconds in self.all_reduce.items()}
        computing = {"matrix_gflops": self.flops / 1e9, "memory_gb_per_s": self.bytes / 1e9}
        return {**computing, "all_reduce": sums, "all_gather_ms": 1e3 * self.all_gather}


@torch.no_grad()
def measure(model: Transformer, passes: dict[str, Pass]) -> Rates:
    """Best of a few repetitions of each; every process must call it."""
    shards, width, weight = model.shards, model.config.hidden_size, model.blocks[0].mlp.gate_up.weight[0]

    def best(function: Callable, *arguments) -> float:
        taken, calls = [], CALLS if weight.is_cuda else 1

        def together() -> None:
            for _ in range(calls):
                function(*arguments)

        run = captured(together, shards) if weight.is_cuda else together
        shards.align()
        for _ in range(REPEATS):
            start = clock(weight)
            run()
            taken.append((clock(weight) - start) / calls)
        return min(taken)

    prompt = torch.randn(passes["ttft"].rows, width).to(weight)
    one, count = prompt[:1].contiguous(), max(1, LARGEST[weight.device.type] // weight.nbytes)
    matrices = [block.mlp.gate_up.weight[0] for block in model.blocks[:count]]
    flops = 2 * len(prompt) * weight.numel() / best(linear, prompt, weight)
    read = len(matrices) * weight.nbytes / best(lambda: [linear(one, matrix) for matrix in matrices])
    if shards.transport is None:  # no other processes
        return Rates(flops, read, dict.fromkeys(passes, 0.0), 0.0)
    streams = {kind: torch.zeros(a_pass.rows, width).to(weight) for kind, a_pass in passes.items()}
    sums = {kind: best(shards.transport.all_reduce, stream) for kind, stream in streams.items()}
    part = torch.zeros(passes["tpot"].rows, shards.width_of(model.config.vocab_size)).to(weight)
    return Rates(flops, read, sums, best(shards.transport.all_gather, part))


def floors(rates: Rates, passes: dict[str, Pass], link: Link | None, syncs: int, rounded: Sequence[int] = ()) -> dict:
    """Least TTFT and TPOT (ms) of a plan with `syncs` all-reduces a pass, and what of them is communication.

    `rounded` are the bytes a token of each sync that sends few bits; only what the link takes for them counts.
    """
    found = {}
    for kind, a_pass in passes.items():
        work = a_pass.work()
        computing = max(work.flop / rates.flops, work.weight_byte / rates.bytes)
        waiting = syncs * rates.all_reduce[kind] + (syncs > 0) * rates.all_gather
        waiting += a_pass.communication(link_all_reduce(link, a_pass.tp), syncs) if link is not None else 0.0
        waiting += sum(link.all_reduce_seconds(a_pass.rows * each, a_pass.tp) for each in rounded if link is not None)
        found |= {f"{kind}_ms": 1e3 * (computing + waiting), f"{kind}_communication_ms": 1e3 * waiting}
    return found
