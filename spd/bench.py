"""Measured latency: time to first token (TTFT) and time per output token (TPOT), one shard a process.

Plans are compared in one run, interleaved: every repetition times each plan once, in an order of its own, so that
drift of the machine, and what a plan leaves behind for the next, meet all of them alike. Three bounds are always
measured beside them, and a fourth is computed: what the rates of the machine, measured in the same run, allow.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from spd.checkpoint import Checkpoint
from spd.comm import Collective, Link, Shards
from spd.config import named_shape
from spd.engines import Compiled, Eager, clock, floors, measure
from spd.errors import SPDError, one_of
from spd.launch import Runtime, bar, cores, nccl_settings, spawn
from spd.machines import Pass, check_length, communication, link_all_reduce, timed_passes
from spd.model import Transformer
from spd.plan import Plan, parse_blocks, read_plan
from spd.planner import plans_by_percentage, read_sensitivity
from spd.pretrained import SPDModel, describe, display_name, resolve
from spd.records import hardware
from spd.transport import PROCESS_GROUP, SHARED_MEMORY, TRANSPORTS, SharedMemory


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


class Case(NamedTuple):
    """A plan, and whether its collectives are left out."""

    plan: Plan
    silent: bool = False


@dataclass
class Sample:
    """One repetition of a case."""

    ttft: float  # seconds
    tpot: float | None
    collectives: dict[str, Collective]  # of the prefill

    @property
    def communication(self) -> float:
        """Seconds."""
        return sum(spent.real_seconds + spent.emulated_seconds for spent in self.collectives.values())


def cases_of(settings: BenchSettings) -> tuple[list[Case], dict[str, Case]]:
    """The plans asked for, and the bounds that are always beside them."""
    plans = [Case(Plan.from_letters(letters)) for letters in settings.plans]
    blocks = len(plans[0].plan)
    full, dropped = Plan.full(blocks), Plan.dropping(blocks, attention=range(blocks))
    bounds = {"all_full": Case(full), "all_attention_dropped": Case(dropped), "no_communication": Case(full, True)}
    return plans, bounds


def bench(runtime: Runtime, settings: BenchSettings) -> dict:
    """Times the plans and the bounds on this process group; every process must call it.

    Gives `plans` and `bounds`, each with `ttft_ms`, `tpot_ms`, the prefill's `communication_ms` and, of the repetition
    with the median TTFT, its `collectives` by sync point, the `floor` that the `rates` allow it, and, where it removes
    all-reduces, `saved`: the TTFT it saves beside the time that those all-reduces take when everything is full.

    With `share_of` instead `share`, rank 0's shard timed by itself without communication, and the plans `predicted`:
    its times, and their all-reduces by the link's formula.
    """
    alone = settings.share_of is not None
    if settings.link is not None and runtime.device != "cpu" and not alone:
        raise SPDError("An emulated link is waited for on the CPU; on GPUs the real link is measured.")
    model = _model(runtime, settings).transformer
    check_length(model.config, settings.prompt_len, settings.new_tokens)
    plans, bounds = cases_of(settings)
    # A plan that is a bound is timed once.
    cases = [bounds["no_communication"]] if alone else list(dict.fromkeys([*plans, *bounds.values()]))
    with bar((settings.repeats + settings.warmup) * len(cases), "timings", shown=runtime.is_main) as progress:
        samples = dict(zip(cases, _interleaved(model, cases, settings, progress), strict=True))
    sizes = settings.batch, settings.prompt_len, settings.new_tokens, model.embedding.weight.element_size()
    passes = timed_passes(model.config, model.shards.tp, *sizes)
    rates = measure(model, passes)
    rows = {}
    for case, taken in samples.items():
        syncs = 0 if case.silent else case.plan.syncs()
        floor = {"floor": floors(rates, passes, model.shards.link, syncs)}
        rows[case] = _row(case, taken) | floor | saved(samples.get(bounds["all_full"], taken), taken)
    found = {"rates": rates.document()}
    if alone:
        (share,) = rows.values()
        return found | {"share": share, "predicted": [_predicted(share, passes, model.shards.link, c) for c in plans]}
    named = {name: rows[case] for name, case in bounds.items()}
    return found | {"plans": [rows[case] for case in plans], "bounds": named}


def _model(runtime: Runtime, settings: BenchSettings) -> SPDModel:
    link = Link.parse(settings.link) if settings.link else None
    shards = runtime.shards(runtime.world, link)
    if settings.share_of is not None:
        shards = Shards(settings.share_of, 0, settings.share_of, link=link, silent=True)
    where = {"shards": shards, "dtype": settings.dtype, "device": runtime.device}
    if settings.shape is not None:
        return SPDModel.random(named_shape(settings.shape), settings.shape, **where, seed=settings.seed)
    return SPDModel.from_pretrained(settings.model, **where)


@torch.no_grad()
def _interleaved(model: Transformer, cases: list[Case], settings: BenchSettings, progress) -> list[list[Sample]]:
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_len)
    prompt = torch.randint(model.config.vocab_size, size, generator=generator).to(model.embedding.weight.device)
    engines = [Eager(model, prompt, settings.new_tokens)] * len(cases)
    if settings.compile:
        for i, case in enumerate(cases):
            model.plan, model.shards.silent = case
            engines[i] = Compiled(model, prompt, settings.new_tokens)
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


def _once(engine: Eager | Compiled, new_tokens: int) -> Sample:
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
    return Sample(first - start, (last - first) / new_tokens if new_tokens else None, collectives)


def _row(case: Case, samples: Sequence[Sample]) -> dict:
    # The collectives are those of the (lower) median TTFT: a part of a time that was really taken.
    typical = sorted(samples, key=lambda s: s.ttft)[(len(samples) - 1) // 2]
    return {
        "plan": str(case.plan),
        "blocks_dropped": len(case.plan.dropped()),
        "communicates": not case.silent,
        "ttft_ms": spread([s.ttft for s in samples]),
        "tpot_ms": None if samples[0].tpot is None else spread([s.tpot for s in samples]),
        "communication_ms": spread([s.communication for s in samples]),
        "collectives": {
            point: {
                "count": c.count,
                "bytes": c.bytes,
                "real_ms": 1e3 * c.real_seconds,
                "emulated_ms": 1e3 * c.emulated_seconds,
            }
            for point, c in typical.collectives.items()
        },
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


def saved(full: Sequence[Sample], samples: Sequence[Sample]) -> dict:
    """TTFT saved against `full` of the same repetition, and the time in it of the all-reduces left out; medians.

    That time is the mean of their sync point. Nothing where no all-reduce is left out, or none is timed (GPUs).
    """
    ttft, removed = [], []
    for one, other in zip(full, samples, strict=True):
        left = {point: other.collectives.get(point, Collective()).count for point in one.collectives}
        spent = {p: (c.real_seconds + c.emulated_seconds) / c.count for p, c in one.collectives.items()}
        removed.append(sum((c.count - left[p]) * spent[p] for p, c in one.collectives.items()))
        ttft.append(one.ttft - other.ttft)
    gained, gone = statistics.median(ttft), statistics.median(removed)
    return {"saved": {"saved_ms": 1e3 * gained, "removed_ms": 1e3 * gone, "share": gained / gone}} if gone > 0 else {}


def _predicted(share: dict, passes: dict[str, Pass], link: Link, case: Case) -> dict:
    """A timed shard's medians with a plan's all-reduces over the link added, and these alone (ms)."""
    added = {
        f"{kind}_ms": 1e3 * communication(a_pass, link_all_reduce(link, a_pass.tp), case.plan.syncs())
        for kind, a_pass in passes.items()
    }
    times = {kind: share[kind]["median"] + ms for kind, ms in added.items() if share[kind]}
    return {"plan": str(case.plan), **times, "communication_ms": added}


def describe_timed(model: str | None, shape: str | None, tp: int) -> dict:
    """What a record says of the model to time, exactly one of a checkpoint and a named shape."""
    if (model is None) == (shape is None):
        raise SPDError("Give either --model (a checkpoint) or --shape (random weights).")
    if shape is not None:
        config, folder = named_shape(shape), None
        name, fingerprint = f"{shape} (random weights)", f"random-{shape}"
    else:
        source = Checkpoint(resolve(model))
        config, folder = source.config, source.folder
        name, fingerprint = display_name(model), source.fingerprint()
    config.validate_tp(tp)
    return describe(config, name, fingerprint, folder)


def plans_to_time(
    described: dict,
    tp: int,
    files: Sequence[Path] = (),
    drops: Sequence[str] = (),
    sensitivity: Path | None = None,
    percentages: list[float] | None = None,
) -> tuple[str, ...]:
    """Letters of the plans asked for, duplicates removed, for the model that `describe_timed` describes."""
    blocks, fingerprint = described["blocks"], described["fingerprint"]
    if files and fingerprint.startswith("random-"):
        raise SPDError("A plan file belongs to a model; with --shape say what is dropped with --drop.")
    chosen = [read_plan(path, fingerprint, tp, blocks).plan for path in files]
    chosen += [Plan.dropping(blocks, parse_blocks(spec, blocks)) for spec in drops]
    if sensitivity is not None:
        values = read_sensitivity(sensitivity, fingerprint)["sensitivity"]
        chosen += plans_by_percentage(values, percentages).values()
    elif percentages is not None:  # which blocks they are changes no timing
        chosen += plans_by_percentage([0.0] * blocks, percentages).values()
    return tuple(dict.fromkeys(str(plan) for plan in chosen or [Plan.full(blocks)]))


def run(runtime: Runtime, tp: int, settings: BenchSettings) -> dict:
    """`bench` on the processes of a launcher, or on `tp` processes started here (CPU), with what was timed."""
    alone = settings.share_of is not None
    if alone and (settings.link is None or runtime.world > 1 or tp == 1):
        raise SPDError("One shard alone is timed in one process, with --tp above 1 and the --link to predict over.")
    if runtime.world > 1 and runtime.world != tp:
        raise SPDError(
            f"Latency is only measured with one shard a process: tp={tp}, and there are {runtime.world} processes."
        )
    here = runtime.world > 1 or tp == 1 or alone
    if not here and runtime.device != "cpu":
        raise SPDError(f"On GPUs start it as 'torchrun --nproc-per-node {tp} -m spd bench ...'.")
    if not here and tp > cores():
        raise SPDError(
            f"{tp} processes on {cores()} cores would time nothing but their waiting; use at most {cores()}."
        )
    transport = chosen_transport(settings.transport, here)
    measured = bench(runtime, settings) if here else spawn(tp, bench, settings, transport=transport)
    setting = {"tp": tp, "world": 1 if alone else tp, "transport": None if tp == 1 or alone else transport}
    asked = ("batch", "prompt_len", "new_tokens", "link", "dtype", "compile")
    setting |= {name: getattr(settings, name) for name in asked}
    if runtime.device != "cpu":
        setting["nccl"] = nccl_settings()
    return setting | measured | {"hardware": hardware()}


def chosen_transport(asked: str | None, launched: bool = False) -> str:
    """What processes that time themselves talk through: shared memory, if they are started here and it works here."""
    works = not launched and SharedMemory.works_here()
    if asked is None:
        return SHARED_MEMORY if works else PROCESS_GROUP
    if one_of("transport", asked, TRANSPORTS) == SHARED_MEMORY and not works:
        raise SPDError("Shared memory joins processes that spd itself starts (--tp on CPU), on x86-64 processors.")
    return asked
