"""Side by side with transformers: the same weights, the same threads, one run, every repetition timing both.

Each row of the comparison has processes of its own, so that neither engine meets what another row left behind. With
several processes the peer is transformers' own tensor parallelism, over gloo; spd is timed over gloo beside it, and,
where that works, through shared memory.
"""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spd.bench import chosen_transport, spread
from spd.checkpoint import random_tensors, write_weights
from spd.cli import main
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError, one_of
from spd.launch import Runtime, cores, spawn
from spd.model import Transformer
from spd.options import at_least, command, option
from spd.pretrained import DTYPES, SPDModel
from spd.records import hardware
from spd.transport import ProcessGroup, SharedMemory, Transport

SPD, OVER_GLOO, PEER = "spd", "spd_over_gloo", "transformers"


@dataclass(frozen=True)
class PeerSettings:
    """One row of the comparison."""

    shape: str
    dtype: str = "float32"
    tp: int = 1
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 8  # decoded after the first
    seconds: float = 12.0  # to spend on repetitions, warm-up and loading aside
    warmup: int = 2
    seed: int = 0


class Engine(Protocol):
    """Greedy decoding: `start` forgets everything, `step` reads tokens (B, T) and gives logits (B, vocabulary)."""

    def start(self) -> None: ...

    def step(self, tokens: Tensor) -> Tensor: ...


class Ours:
    def __init__(self, model: Transformer, transport: Transport | None, settings: PeerSettings):
        self.model, self.transport = model, transport
        self.cache = model.new_cache(settings.batch, settings.prompt_len + settings.new_tokens)

    def start(self) -> None:
        self.cache.length, self.model.shards.transport = 0, self.transport

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, self.cache, last_only=True)[:, -1]


class Theirs:
    """transformers at its leanest: SDPA, its own cache, logits of the last token only, no `generate` around it."""

    def __init__(self, folder: str, settings: PeerSettings):
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        split = {} if settings.tp == 1 else {
            "distributed_config": DistributedConfig(tp_plan="auto", tp_size=settings.tp)}  # fmt: skip
        options = {"dtype": DTYPES[settings.dtype], "attn_implementation": "sdpa", **split}
        self.model = LlamaForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)

    def start(self) -> None:
        self.cache = None

    def step(self, tokens: Tensor) -> Tensor:
        found = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.past_key_values
        return found.logits[:, -1]


@torch.no_grad()
def compare(runtime: Runtime, folder: str, settings: PeerSettings) -> dict:
    """Times both engines on the weights in `folder`; every process must call it.

    Returns:
        `ttft_ms` and `tpot_ms` of each engine, the ratios (transformers over ours: above 1 we are ahead), and how far
        the logits lie apart. Where transformers cannot split the model, `why_not` says what it raised.
    """
    engines, why_not = _ours(runtime, folder, settings), {}
    try:
        engines[PEER] = Theirs(folder, settings)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        why_not = {"why_not": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch, settings.prompt_len
    prompt = torch.randint(engines[SPD].model.config.vocab_size, size, generator=generator)
    row = {"shape": settings.shape, "dtype": settings.dtype, "tp": settings.tp, "threads": torch.get_num_threads()}
    for name, taken in zip(engines, _interleaved(list(engines.values()), prompt, settings), strict=True):
        row[name] = {"ttft_ms": spread([t for t, _ in taken]), "tpot_ms": spread([t for _, t in taken])}
    if PEER not in engines:
        return row | why_not
    ratios = {name: _ratio(row[PEER], row[name]) for name in engines if name != PEER}
    return row | {"ratio": ratios, **_agreement((engines[SPD], engines[PEER]), prompt)}


def _ours(runtime: Runtime, folder: str, settings: PeerSettings) -> dict[str, Engine]:
    """The same model once for each transport it can use here."""
    shards = runtime.shards(settings.tp)
    model = SPDModel.from_pretrained(folder, shards=shards, dtype=settings.dtype).transformer
    engines: dict[str, Engine] = {SPD: Ours(model, shards.transport, settings)}
    if isinstance(shards.transport, SharedMemory):
        engines[OVER_GLOO] = Ours(model, ProcessGroup(), settings)
    return engines


def _ratio(theirs: dict, ours: dict) -> dict[str, float]:
    return {kind: theirs[f"{kind}_ms"]["median"] / ours[f"{kind}_ms"]["median"] for kind in ("ttft", "tpot")}


def _agreement(engines: Sequence[Engine], prompt: Tensor) -> dict:
    """Largest difference of the first token's logits, and the largest logit to judge it by."""
    for engine in engines:
        engine.start()
    ours, theirs = (engine.step(prompt).float() for engine in engines)
    return {"logits_differ": float((ours - theirs).abs().max()), "logits_up_to": float(theirs.abs().max())}


def _interleaved(engines: Sequence[Engine], prompt: Tensor, settings: PeerSettings) -> list[list[tuple[float, float]]]:
    shuffled = random.Random(settings.seed)  # the same order on every process

    def repetition() -> dict[int, tuple[float, float]]:
        return {i: _once(engines[i], prompt, settings.new_tokens) for i in shuffled.sample(range(len(engines)),
                len(engines))}  # fmt: skip

    for _ in range(settings.warmup):
        start = time.perf_counter()
        repetition()
    taken = [repetition() for _ in range(_repeats(settings.seconds / (time.perf_counter() - start)))]
    return [[one[i] for one in taken] for i in range(len(engines))]


def _repeats(fitting: float) -> int:
    """At least 5 and at most 50, the same on every process."""
    count = torch.tensor([min(50, max(5, int(fitting)))])
    dist.broadcast(count, 0)
    return int(count)


def _once(engine: Engine, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds up to the first token's choice, and a token after it."""
    dist.barrier()
    engine.start()
    start = time.perf_counter()
    token = engine.step(prompt).argmax(-1, keepdim=True)
    first = time.perf_counter()
    for _ in range(new_tokens):
        token = engine.step(token).argmax(-1, keepdim=True)
    return first - start, (time.perf_counter() - first) / new_tokens


def compare_all(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    degrees: Sequence[int],
    progress: Callable[[int], None] = lambda n: None,
    **more,
) -> dict:
    """The whole table: a row for every shape, dtype and degree.

    Raises:
        SPDError: an unknown shape or dtype, a degree that a shape does not allow, more processes than cores.
    """
    for shape, tp in product(shapes, degrees):
        named_shape(shape).validate_tp(tp)
    for dtype in dtypes:
        one_of("dtype", dtype, DTYPES)
    if max(degrees) > cores():
        raise SPDError(f"{max(degrees)} processes on {cores()} cores would time nothing but their waiting.")
    rows, transport = [], chosen_transport(None)
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_random(named_shape(shape), Path(folder), more.get("seed", 0))
            for dtype, tp in product(dtypes, degrees):
                rows.append(spawn(tp, compare, folder, PeerSettings(shape, dtype, tp, **more), transport=transport))
                progress(1)
    ratios = [ratio for row in rows for engine in row.get("ratio", {}).values() for ratio in engine.values()]
    return {
        "rows": rows, "least_ratio": min(ratios, default=None), "transport": transport, "hardware": hardware()
    }  # fmt: skip


def degrees_of(spec: str) -> list[int]:
    """From `1,2`. Raises SPDError showing the form."""
    try:
        degrees = [int(part) for part in spec.split(",")]
    except ValueError:
        degrees = [0]
    if min(degrees) < 1:
        raise SPDError(f"'{spec}' does not give numbers of processes; write them as in 1,2.")
    return degrees


def write_random(config: ModelConfig, folder: Path, seed: int) -> None:
    """A Hugging Face folder of random weights in bfloat16, which float32 holds exactly: both dtypes get the same."""
    config.to_hf().save_pretrained(folder)
    write_weights(folder, config, random_tensors(config, seed))


@command(
    option("--shapes", "Named shapes with random weights.", default="llama-8m,llama-125m,llama3.2-1b"),
    option("--dtypes", "Of weights and arithmetic.", default="float32,bfloat16"),
    option("--degrees", "Processes, one shard each.", default="1,2"),
    option("--batch", "Sequences.", at_least(1), 1),
    option("--prompt-len", "Tokens in the prompt.", at_least(1), 128),
    option("--new-tokens", "Tokens decoded to time TPOT.", at_least(1), 8),
    option("--seconds", "Repetitions of a row; from 5 to 50 of them in any case.", float, 12.0),
    option("--seed", "Seed of the weights.", int, 0),
    name="bench-peers",
)
def peers(session) -> None:
    """Time to first token and per output token beside transformers', on CPU: same weights, same threads."""
    o = session.options
    asked = o.shapes.split(","), o.dtypes.split(","), degrees_of(o.degrees)
    setting = {"batch": o.batch, "prompt_len": o.prompt_len, "new_tokens": o.new_tokens}
    with session.progress(len(asked[0]) * len(asked[1]) * len(asked[2]), "rows") as progress:
        result = compare_all(*asked, progress, seconds=o.seconds, seed=o.seed, **setting)
    session.publish(result | setting)


if __name__ == "__main__":
    main(peers)
