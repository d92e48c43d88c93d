"""Side by side with transformers: the same weights, the same threads, one run, every repetition timing both.

Each row of the comparison has processes of its own, so that neither engine meets what another row left behind. With
several processes the peer is transformers' own tensor parallelism, over gloo; spd is timed over gloo beside it, and,
where that works, through shared memory.
"""

import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

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
TIMES = ("ttft_ms", "tpot_ms")


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


Engine = Callable[[Tensor, bool], Tensor]  # tokens (B, T), whether to forget all before them, to logits (B, vocabulary)


def ours(model: Transformer, transport: Transport | None, settings: PeerSettings) -> Engine:
    cache = model.new_cache(settings.batch, settings.prompt_len + settings.new_tokens)

    def step(tokens: Tensor, afresh: bool) -> Tensor:
        if afresh:
            cache.length, model.shards.transport = 0, transport
        return model(tokens, cache, last_only=True)[:, -1]

    return step


def theirs(folder: str, settings: PeerSettings) -> Engine:
    """transformers at its leanest: SDPA, its own cache, logits of the last token only, no `generate` around it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": DTYPES[settings.dtype], "attn_implementation": "sdpa"}
    if settings.tp > 1:
        options["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=settings.tp)
    model, cache = LlamaForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False), None

    def step(tokens: Tensor, afresh: bool) -> Tensor:
        nonlocal cache
        found = model(tokens, past_key_values=None if afresh else cache, use_cache=True, logits_to_keep=1)
        cache = found.past_key_values
        return found.logits[:, -1]

    return step


@torch.no_grad()
def compare(runtime: Runtime, folder: str, settings: PeerSettings) -> dict:
    """Times both engines on the weights in `folder`; every process must call it.

    Gives `ttft_ms` and `tpot_ms` of each engine, the ratios (transformers over ours: above 1 we are ahead), and how far
    the first token's logits lie apart. Where transformers cannot split the model, `why_not` says what it raised.
    """
    shards = runtime.shards(settings.tp)
    model = SPDModel.from_pretrained(folder, shards=shards, dtype=settings.dtype).transformer
    engines = {SPD: ours(model, shards.transport, settings)}
    if isinstance(shards.transport, SharedMemory):
        engines[OVER_GLOO] = ours(model, ProcessGroup(), settings)
    row = {"shape": settings.shape, "dtype": settings.dtype, "tp": settings.tp, "threads": torch.get_num_threads()}
    try:
        engines[PEER] = theirs(folder, settings)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        row["why_not"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    generator = torch.Generator().manual_seed(settings.seed)
    prompt = torch.randint(model.config.vocab_size, (settings.batch, settings.prompt_len), generator=generator)
    for name, taken in _interleaved(engines, prompt, settings).items():
        row[name] = {kind: spread(times) for kind, times in zip(TIMES, zip(*taken, strict=True), strict=True)}
    if PEER not in engines:
        return row
    median = {name: {kind: row[name][kind]["median"] for kind in TIMES} for name in engines}
    peer = median.pop(PEER)
    ratios = {n: {kind.removesuffix("_ms"): peer[kind] / mine[kind] for kind in TIMES} for n, mine in median.items()}
    mine, other = (engines[name](prompt, True).float() for name in (SPD, PEER))
    apart = {"logits_differ": float((mine - other).abs().max()), "logits_up_to": float(other.abs().max())}
    return {**row, "ratio": ratios, **apart}


def _interleaved(
    engines: dict[str, Engine], prompt: Tensor, settings: PeerSettings
) -> dict[str, list[tuple[float, float]]]:
    shuffled = random.Random(settings.seed)  # the same order on every process

    def repetition() -> dict[str, tuple[float, float]]:
        return {name: _once(engines[name], prompt, settings) for name in shuffled.sample(list(engines), len(engines))}

    for _ in range(settings.warmup):
        start = time.perf_counter()
        repetition()
    repeats = torch.tensor([min(50, max(5, int(settings.seconds / (time.perf_counter() - start))))])
    dist.broadcast(repeats, 0)  # as many on every process
    taken = [repetition() for _ in range(int(repeats))]
    return {name: [one[name] for one in taken] for name in engines}


def _once(engine: Engine, prompt: Tensor, settings: PeerSettings) -> tuple[float, float]:
    """Seconds up to the first token's choice, and a token after it."""
    dist.barrier()
    start = time.perf_counter()
    token = engine(prompt, True).argmax(-1, keepdim=True)
    first = time.perf_counter()
    for _ in range(settings.new_tokens):
        token = engine(token, False).argmax(-1, keepdim=True)
    return first - start, (time.perf_counter() - first) / settings.new_tokens


def compare_all(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    degrees: Sequence[int],
    progress: Callable[[int], None] = lambda n: None,
    **more,
) -> dict:
    """The whole table: a row for every shape, dtype and degree; `more` goes to each row's `PeerSettings`."""
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
    least = min(ratios, default=None)
    return {"rows": rows, "least_ratio": least, "transport": transport, "hardware": hardware()}


def degrees_of(spec: str) -> list[int]:
    """From `1,2`. Raises SPDError showing the form."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", spec):
        raise SPDError(f"'{spec}' does not give numbers of processes; write them as in 1,2.")
    return [int(part) for part in spec.split(",")]


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
