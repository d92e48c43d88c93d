"""Measured latency: time to first token (TTFT) and time per output token (TPOT), one shard a process.

Plans are compared in one run, interleaved: every repetition times each plan once, in an order of its own, so that
drift of the machine, and what a plan leaves behind for the next, meet all of them alike. Three bounds are always
measured beside them, and a fourth is computed: what the rates of the machine, measured in the same run, allow.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spd.checkpoint import SafetensorsFolder
from spd.comm import Collective, Link, Shards
from spd.config import ModelConfig, named_shape
from spd.engines import Compiled, Eager, clock, described, floors, measure, passes
from spd.errors import SPDError
from spd.latency import communication
from spd.launch import Runtime, bar, cores, nccl_settings, spawn
from spd.model import Transformer
from spd.plan import Plan, parse_blocks, read_plan
from spd.planner import plans_by_percentage, read_sensitivity
from spd.pretrained import SPDModel, describe, display_name, resolve
from spd.records import hardware
from spd.transport import PROCESS_GROUP, SHARED_MEMORY, TRANSPORTS, SharedMemory

BOUNDS = ("all_full", "all_attention_dropped", "no_communication")


@dataclass(frozen=True)
class BenchSettings:
    """What is timed. Exactly one of `model` (a checkpoint) and `shape` (a name, random weights) is given."""

    plans: tuple[str, ...]  # letters
    model: str | None = None
    shape: str | None = None
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded after the prompt to time TPOT; 0 leaves it out
    link: str | None = None
    repeats: int = 20
    warmup: int = 3
    dtype: str = "float32"
    seed: int = 0
    compile: bool = False  # torch.compile, and CUDA graphs on GPUs
    share_of: int | None = None  # time one shard of so many alone, and predict its all-reduces
    transport: str | None = None  # of the processes started here; left out: shared memory where it works


@dataclass
class _Sample:
    ttft: float  # seconds
    tpot: float | None
    collectives: dict[str, Collective]  # of the prefill


def bench(runtime: Runtime, settings: BenchSettings, progress: Callable[[int], None] = lambda n: None) -> dict:
    """Times the plans and the bounds on this process group; every process must call it.

    Returns:
        `plans` and `bounds`, each with `ttft_ms`, `tpot_ms`, the prefill's `communication_ms` and, of the repetition
        with the median TTFT, its `collectives` by sync point, the `floor` that the `rates` allow it, and, where it
        removes all-reduces, `saved`: the TTFT it saves beside the time that those all-reduces take when everything is
        full.

    Raises:
        SPDError: a shape or model that cannot be split over the processes, or a prompt beyond its positions.
    """
    if settings.link is not None and runtime.device != "cpu" and settings.share_of is None:
        raise SPDError("An emulated link is waited for on the CPU; on GPUs the real link is measured.")
    link = Link.parse(settings.link) if settings.link else None
    model = _model(runtime, settings, link).transformer
    _check_length(model, settings)
    if settings.share_of is not None:
        return _share(model, settings, progress)
    plans, bounds = _cases(settings)
    cases = list(dict.fromkeys(plans + bounds))  # a plan that is a bound is timed once
    samples = dict(zip(cases, _interleaved(model, cases, settings, progress), strict=True))
    rates = measure(model, settings.batch, settings.prompt_len)
    rows = {case: _row(*case, taken) | _gained(samples[bounds[0]], taken) for case, taken in samples.items()}
    for (plan, silent), row in rows.items():
        syncs = 0 if silent else plan.syncs()
        row["floor"] = floors(rates, model, settings.batch, settings.prompt_len, settings.new_tokens, syncs)
    return {
        "rates": described(rates),
        "plans": [rows[case] for case in plans],
        "bounds": {name: rows[case] for name, case in zip(BOUNDS, bounds, strict=True)},
    }


def _cases(settings: BenchSettings) -> tuple[list, list]:
    """The plans asked for, and those of the `BOUNDS`, each with whether its collectives are left out."""
    plans = [Plan.from_letters(letters) for letters in settings.plans]
    blocks = len(plans[0])
    full, dropped = Plan.full(blocks), Plan.dropping(blocks, attention=range(blocks))
    return [(plan, False) for plan in plans], [(full, False), (dropped, False), (full, True)]


def _share(model: Transformer, settings: BenchSettings, progress: Callable[[int], None]) -> dict:
    """Rank 0's shard timed by itself, without communication; the all-reduces of the plans by the link's formula."""
    (taken,) = _interleaved(model, [(Plan.full(model.config.num_blocks), True)], settings, progress)
    rates = measure(model, settings.batch, settings.prompt_len)
    row = _row(Plan.full(model.config.num_blocks), True, taken)
    row["floor"] = floors(rates, model, settings.batch, settings.prompt_len, settings.new_tokens, 0)
    predicted = [{"plan": letters, **_with_link(model, settings, row, Plan.from_letters(letters).syncs())}
                 for letters in settings.plans]  # fmt: skip
    return {"share": row, "predicted": predicted, "rates": described(rates)}


def _with_link(model: Transformer, settings: BenchSettings, row: dict, syncs: int) -> dict:
    """A timed shard's medians with `syncs` all-reduces over the link added, and these alone (ms)."""
    found = {kind: 1e3 * communication(a_pass, model.shards.link, syncs) for kind, a_pass in
             passes(model, settings.batch, settings.prompt_len, settings.new_tokens).items()}  # fmt: skip
    times = {f"{kind}_ms": row[f"{kind}_ms"]["median"] + ms for kind, ms in found.items() if row[f"{kind}_ms"]}
    return times | {"communication_ms": {f"{kind}_ms": ms for kind, ms in found.items()}}


def _model(runtime: Runtime, settings: BenchSettings, link: Link | None) -> SPDModel:
    shards = runtime.shards(runtime.world, link)
    if settings.share_of is not None:
        shards = Shards(settings.share_of, 0, settings.share_of, link=link, silent=True)
    where = {"shards": shards, "dtype": settings.dtype, "device": runtime.device}
    if settings.shape is not None:
        return SPDModel.random(named_shape(settings.shape), settings.shape, **where, seed=settings.seed)
    return SPDModel.from_pretrained(settings.model, **where)


def _check_length(model: Transformer, settings: BenchSettings) -> None:
    total, positions = settings.prompt_len + settings.new_tokens, model.config.max_positions
    if total > positions:
        raise SPDError(
            f"{settings.prompt_len} + {settings.new_tokens} tokens exceed the model's {positions} positions."
        )


@torch.no_grad()
def _interleaved(model: Transformer, cases: list, settings: BenchSettings, progress) -> list[list[_Sample]]:
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_len)
    prompt = torch.randint(model.config.vocab_size, size, generator=generator).to(model.embedding.weight.device)
    engines = _engines(model, cases, prompt, settings)
    samples = [[] for _ in cases]
    shuffled = random.Random(settings.seed)  # the same order on every process
    for repeat in range(settings.warmup + settings.repeats):
        for i in shuffled.sample(range(len(cases)), len(cases)):
            model.plan, model.shards.silent = cases[i]
            taken = _once(engines[i], settings.new_tokens)
            if repeat >= settings.warmup:
                samples[i].append(taken)
            progress(1)
    return samples


def _engines(model: Transformer, cases: list, prompt: torch.Tensor, settings: BenchSettings) -> list:
    """One for all cases, or one for each, compiled for its plan."""
    if not settings.compile:
        return [Eager(model, prompt, settings.new_tokens)] * len(cases)
    made = []
    for model.plan, model.shards.silent in cases:
        made.append(Compiled(model, prompt, settings.new_tokens))
    return made


def _once(engine: Eager | Compiled, new_tokens: int) -> _Sample:
    """One prefill up to the first token's choice, then `new_tokens` decode steps."""
    shards, prompt = engine.model.shards, engine.prompt
    shards.align()
    shards.take_collectives()
    start = clock(prompt)
    engine.prefill()
    first = clock(prompt)
    collectives = shards.take_collectives()
    for _ in range(new_tokens):
        engine.decode()
    last = clock(prompt)
    return _Sample(first - start, (last - first) / new_tokens if new_tokens else None, collectives)


def _row(plan: Plan, silent: bool, samples: list[_Sample]) -> dict:
    return {
        "plan": str(plan),
        "blocks_dropped": len(plan.dropped()),
        "communicates": not silent,
        "ttft_ms": spread([s.ttft for s in samples]),
        "tpot_ms": None if samples[0].tpot is None else spread([s.tpot for s in samples]),
        "communication_ms": spread([sum(map(_waited, s.collectives.values())) for s in samples]),
        "collectives": {point: _collective(c) for point, c in _typical(samples).collectives.items()},
    }


def _waited(spent: Collective) -> float:
    return spent.real_seconds + spent.emulated_seconds


def _gained(full: list[_Sample], samples: list[_Sample]) -> dict:
    """TTFT saved against `full` of the same repetition, and the time in it of the all-reduces left out; medians.

    Nothing where no all-reduce is left out, or where none is timed (GPUs).
    """
    removed = statistics.median(_removed(*pair) for pair in zip(full, samples, strict=True))
    if removed <= 0:
        return {}
    saved = statistics.median(f.ttft - s.ttft for f, s in zip(full, samples, strict=True))
    return {"saved": {"saved_ms": 1e3 * saved, "removed_ms": 1e3 * removed, "share": saved / removed}}


def _removed(full: _Sample, sample: _Sample) -> float:
    """Seconds that the all-reduces missing in `sample` took in `full`, by the mean of their sync point."""
    seconds = 0.0
    for point, spent in full.collectives.items():
        left = sample.collectives.get(point, Collective()).count
        seconds += (spent.count - left) / spent.count * _waited(spent)
    return seconds


def _typical(samples: list[_Sample]) -> _Sample:
    """The sample of the (lower) median TTFT: its communication is a part of a time that was really taken."""
    return sorted(samples, key=lambda s: s.ttft)[(len(samples) - 1) // 2]


def _collective(spent: Collective) -> dict:
    return {
        "count": spent.count,
        "bytes": spent.bytes,
        "real_ms": 1e3 * spent.real_seconds,
        "emulated_ms": 1e3 * spent.emulated_seconds,
    }


def spread(seconds: list[float]) -> dict:
    """Median, interquartile range, minimum (ms) and number of repetitions."""
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median": 1e3 * statistics.median(seconds),
        "spread": 1e3 * (quarters[2] - quarters[0]),
        "min": 1e3 * min(seconds),
        "repeats": len(seconds),
    }


def plans_to_time(
    model: str | None,
    shape: str | None,
    tp: int,
    plans: list[Path],
    drops: list[str],
    sensitivity: Path | None,
    percentages: list[float] | None,
) -> tuple[tuple[str, ...], dict]:
    """Letters of the plans asked for, duplicates removed, and a description of the model they are for.

    Raises:
        SPDError: not exactly one of model and shape, or a plan that does not fit.
    """
    if (model is None) == (shape is None):
        raise SPDError("Give either --model (a checkpoint) or --shape (random weights).")
    if shape is not None and plans:
        raise SPDError("A plan file belongs to a model; with --shape say what is dropped with --drop.")
    config, described = _describe(model, shape)
    config.validate_tp(tp)
    blocks = config.num_blocks
    chosen = [read_plan(path, described["fingerprint"], tp, blocks) for path in plans]
    chosen += [Plan.dropping(blocks, parse_blocks(spec, blocks)) for spec in drops]
    if sensitivity is not None:
        values = read_sensitivity(sensitivity, described["fingerprint"])["sensitivity"]
        chosen += plans_by_percentage(values, percentages).values()
    elif percentages is not None:  # which blocks they are changes no timing
        chosen += plans_by_percentage([0.0] * blocks, percentages).values()
    return tuple(dict.fromkeys(str(plan) for plan in chosen or [Plan.full(blocks)])), described


def _describe(model: str | None, shape: str | None) -> tuple[ModelConfig, dict]:
    if shape is not None:
        config, name, fingerprint = named_shape(shape), f"{shape} (random weights)", f"random-{shape}"
        folder = None
    else:
        folder = resolve(model)
        config, name = ModelConfig.from_folder(folder), display_name(model)
        weights = SafetensorsFolder(folder)
        weights.validate(config)
        fingerprint = weights.fingerprint(config)
    return config, describe(config, name, fingerprint, folder)


def run(runtime: Runtime, tp: int, settings: BenchSettings) -> dict:
    """`bench` on the processes of a launcher, or on `tp` processes started here (CPU), with what was timed.

    Raises:
        SPDError: tp differs from the launcher's processes, or GPUs without a launcher.
    """
    _check_share(runtime, tp, settings)
    if runtime.world > 1 and runtime.world != tp:
        raise SPDError(
            f"Latency is only measured with one shard a process: tp={tp}, and there are {runtime.world} processes."
        )
    alone = settings.share_of is not None
    if runtime.world == 1 and tp > 1 and runtime.device != "cpu" and not alone:
        raise SPDError(f"On GPUs start it as 'torchrun --nproc-per-node {tp} -m spd bench ...'.")
    here = runtime.world > 1 or tp == 1 or alone
    if not here and tp > cores():
        raise SPDError(
            f"{tp} processes on {cores()} cores would time nothing but their waiting; use at most {cores()}."
        )
    transport = chosen_transport(settings.transport, here)
    measured = with_bar(runtime, settings) if here else spawn(tp, with_bar, settings, transport=transport)
    setting = {"tp": tp, "world": 1 if alone else tp, "batch": settings.batch, "prompt_len": settings.prompt_len,
               "new_tokens": settings.new_tokens, "link": settings.link, "dtype": settings.dtype,
               "compile": settings.compile, "transport": None if tp == 1 or alone else transport}  # fmt: skip
    if runtime.device != "cpu":
        setting["nccl"] = nccl_settings()
    return setting | measured | {"hardware": hardware()}


def chosen_transport(asked: str | None, launched: bool = False) -> str:
    """What processes that time themselves talk through: shared memory, if they are started here and it works here.

    Raises:
        SPDError: a transport that is unknown, or that does not work here.
    """
    works = not launched and SharedMemory.works_here()
    if asked is None:
        return SHARED_MEMORY if works else PROCESS_GROUP
    if asked not in TRANSPORTS:
        raise SPDError(f"Unknown transport '{asked}'; known: {', '.join(TRANSPORTS)}.")
    if asked == SHARED_MEMORY and not works:
        raise SPDError("Shared memory joins processes that spd itself starts (--tp on CPU), on x86-64 processors.")
    return asked


def _check_share(runtime: Runtime, tp: int, settings: BenchSettings) -> None:
    """Raises SPDError unless what `--alone` needs is there, where it is asked for."""
    if settings.share_of is not None and (settings.link is None or runtime.world > 1 or tp == 1):
        raise SPDError("One shard alone is timed in one process, with --tp above 1 and the --link to predict over.")


def with_bar(runtime: Runtime, settings: BenchSettings) -> dict:
    """`bench`, showing progress on the process that is_main."""
    plans, bounds = _cases(settings)
    cases = 1 if settings.share_of is not None else len({*plans, *bounds})
    total = (settings.repeats + settings.warmup) * cases
    with bar(total, "timings", shown=runtime.is_main) as done:
        return bench(runtime, settings, done)
