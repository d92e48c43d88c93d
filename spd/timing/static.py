"""Prefill and decode with static shapes, two ways: eager, or compiled and, on GPUs, captured as CUDA graphs.

Both leave the token they choose on the device, so that nothing in the loop waits for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spd.model import StaticKVCache, Transformer

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
        self.steps = StaticKVCache(self.cache)
        for block in model.blocks:
            for part in ("attend", "transform"):
                setattr(block, part, torch.compile(getattr(type(block), part).__get__(block), backend=backend))
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            self.prefill, self.decode = (_ready(function, prompt) for function in (self._prefill, self._decode))

    def _prefill(self) -> None:
        self.cache.length = 0
        self._choose(self.model(self.prompt, self.cache, last_only=True))
        self.steps.position.fill_(self.prompt.shape[1])

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
