"""Measured latency: time to first token (TTFT) and time per output token (TPOT), one shard a process.

Plans are compared in one run, interleaved: every repetition times each plan once, in an order of its own, so that
drift of the machine, and what a plan leaves behind for the next, meet all of them alike. Three bounds are always
measured beside them, and a fourth is computed: what the rates of the machine, measured in the same run, allow.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from spd.checkpoint import Checkpoint
from spd.comm import Collective, Link, Shards
from spd.config import named_shape
from spd.engines import Compiled, Eager, by_events, clock, floors, measure
from spd.errors import SPDError, one_of
from spd.launch import Runtime, bar, cores, nccl_settings, spawn
from spd.machines import timed_passes
from spd.model import Transformer
from spd.plan import Plan, parse_blocks, read_plan
from spd.planner import plans_by_percentage, read_sensitivity
from spd.pretrained import SPDModel, describe, display_name, resolve
from spd.records import hardware
from spd.transport import PROCESS_GROUP, SHARED_MEMORY, TRANSPORTS, SharedMemory

ASKED = ("batch", "prompt_len", "new_tokens", "link", "dtype", "compile")  # what a result says of the settings


@dataclass(frozen=True)
class Timed:
    """What is timed over `tp` shards: either `model`, a checkpoint, or `shape`, a name, with random weights."""

    model: str | None = None
    shape: str | None = None
    tp: int = 1

    @cached_property
    def described(self) -> dict:
        """What a record says of it."""
        if (self.model is None) == (self.shape is None):
            raise SPDError("Give either --model (a checkpoint) or --shape (random weights).")
        if self.shape is not None:
            config = named_shape(self.shape)
            config.validate_tp(self.tp)
            return describe(config, f"{self.shape} (random weights)", f"random-{self.shape}")
        source = Checkpoint(resolve(self.model))
        source.config.validate_tp(self.tp)
        return describe(source.config, display_name(self.model), source.fingerprint(), source.folder)

    def plans(
        self,
        files: Sequence[Path] = (),
        drops: Sequence[str] = (),
        sensitivity: Path | None = None,
        percentages: list[float] | None = None,
        sent: tuple[int | None, ...] = (),
    ) -> tuple[Plan, ...]:
        """The plans asked for, duplicates removed; everything full where none is. `sent` is `Plan.sending`'s."""
        blocks, fingerprint = self.described["blocks"], self.described["fingerprint"]
        if files and self.shape is not None:
            raise SPDError("A plan file belongs to a model; with --shape say what is dropped with --drop.")
        files = [read_plan(path, fingerprint, self.tp, blocks).plan for path in files]
        chosen = [Plan.dropping(blocks, parse_blocks(spec, blocks)) for spec in drops]
        if sensitivity is not None or percentages is not None:
            values = [0.0] * blocks  # which blocks they are changes no timing
            if sensitivity is not None:
                values = read_sensitivity(sensitivity, fingerprint)["sensitivity"]
            chosen += plans_by_percentage(values, percentages).values()
        if not files and not chosen:
            chosen = [Plan.full(blocks)]
        chosen = [plan.sending(*sent) for plan in chosen]
        for plan in chosen:
            plan.check_groups(self.tp)
        return tuple(dict.fromkeys([*files, *chosen]))

    def load(self, shards: Shards, dtype: str, device: str, seed: int) -> Transformer:
        where = {"shards": shards, "dtype": dtype, "device": device}
        if self.shape is not None:
            return SPDModel.random(named_shape(self.shape), self.shape, **where, seed=seed).transformer
        return SPDModel.from_pretrained(self.model, **where).transformer


@dataclass(frozen=True)
class BenchSettings:
    """How it is timed."""

    plans: tuple[Plan, ...]
    batch: int = 1
    prompt_len: int = 128  # tokens
    new_tokens: int = 16  # decoded after the prompt to time TPOT; 0 leaves it out
    link: str | None = None
    repeats: int = 20
    warmup: int = 3
    dtype: str = "float32"
    seed: int = 0
    compile: bool = False  # torch.compile, and CUDA graphs on GPUs
    alone: bool = False  # time rank 0's shard by itself, and predict its all-reduces
    transport: str | None = None  # of the processes started here; left out: shared memory where it works


class Case(NamedTuple):
    """A plan, and whether its collectives are left out."""

    plan: Plan
    silent: bool = False

    def take(self, model: Transformer) -> None:
        model.plan, model.shards.silent = self


class Sample(NamedTuple):
    """One repetition of a case."""

    ttft: float  # seconds
    tpot: float | None
    collectives: dict[str, Collective]  # of the prefill; on GPUs of one more

    def spent(self, silent: "Sample | None") -> dict[str, float]:
        """Seconds of the collectives by sync point; a point that was not timed is left out.

        Those that a graph replays no clock sees: what all take is TTFT over that of `silent`, shared out by bytes.
        """
        timed = {point: one for point, one in self.collectives.items() if one.real_seconds is not None}
        if silent is not None and len(timed) < len(self.collectives):
            more = (self.ttft - silent.ttft) / sum(one.bytes for one in self.collectives.values())
            return {point: more * one.bytes for point, one in self.collectives.items()}
        return {point: one.real_seconds + one.emulated_seconds for point, one in timed.items()}


def bench(runtime: Runtime, timed: Timed, settings: BenchSettings) -> dict:
    """Times the plans and the bounds on this process group; every process must call it.

    Gives `plans` and `bounds`, each with `ttft_ms`, `tpot_ms`, the prefill's `communication_ms` and, of the repetition
    with the median TTFT, its `collectives` by sync point, the `floor` that the `rates` allow it, and, where it removes
    all-reduces, `saved`: the TTFT it saves beside the time that those all-reduces take when everything is full.

    With `alone` instead `share`, rank 0's shard timed by itself without communication, and the plans `predicted`:
    its times, and their all-reduces by the link's formula.
    """
    if settings.link is not None and runtime.device != "cpu" and not settings.alone:
        raise SPDError("An emulated link is waited for on the CPU; on GPUs the real link is measured.")
    link = Link.parse(settings.link) if settings.link else None
    shards = Shards(timed.tp, 0, timed.tp, link=link) if settings.alone else runtime.shards(timed.tp, link)
    model = timed.load(shards, settings.dtype, runtime.device, settings.seed)
    sizes = settings.batch, settings.prompt_len, settings.new_tokens, model.embedding.weight.element_size()
    passes, blocks = timed_passes(model.config, timed.tp, *sizes), model.config.num_blocks
    plans = [Case(plan) for plan in settings.plans]
    full, silent = Case(Plan.full(blocks)), Case(Plan.full(blocks), True)
    dropped = Case(Plan.dropping(blocks, range(blocks)))
    bounds = {"all_full": full, "all_attention_dropped": dropped, "no_communication": silent}
    cases = [silent] if settings.alone else list(dict.fromkeys([*plans, *bounds.values()]))  # each is timed once
    with bar((settings.repeats + settings.warmup) * len(cases), "timings", shown=runtime.is_main) as progress:
        samples = _interleaved(model, cases, settings, progress)
    rates = measure(model, passes)
    floor, width = {}, model.config.hidden_size
    for case in (*plans, *bounds.values()):
        syncs = 0 if case.silent else case.plan.syncs()
        floor[case] = floors(rates, passes, link, syncs, case.plan.rounded(width, timed.tp))
    rows = {case: row_of(case, taken, samples[silent]) | {"floor": floor[case]} for case, taken in samples.items()}
    for case, taken in samples.items():
        few_bits = case.plan.rounded(width, timed.tp)
        rows[case] |= {} if few_bits else saved(samples.get(full, taken), taken, samples[silent])
    note = model.config.padding_note(timed.tp)
    found = {"rates": rates.document()} | ({"note": note} if note else {})
    if settings.alone:
        predicted = [_predicted(case, rows[silent], floor[case]) for case in plans]
        return found | {"share": rows[silent], "predicted": predicted}
    named = {name: rows[case] for name, case in bounds.items()}
    return found | {"plans": [rows[case] for case in plans], "bounds": named}


@torch.no_grad()
def _interleaved(model: Transformer, cases: list[Case], settings: BenchSettings, progress) -> dict[Case, list[Sample]]:
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_len)
    prompt = torch.randint(model.config.vocab_size, size, generator=generator).to(model.embedding.weight.device)
    eager, engines, samples = Eager(model, prompt, settings.new_tokens), {}, {case: [] for case in cases}
    for case in cases:
        case.take(model)
        engines[case] = Compiled(model, prompt, settings.new_tokens) if settings.compile else eager
    shuffled = random.Random(settings.seed)  # the same order on every process
    for repeat in range(settings.warmup + settings.repeats):
        for case in shuffled.sample(cases, len(cases)):
            case.take(model)
            taken = _once(engines[case], settings.new_tokens)
            if repeat >= settings.warmup:
                samples[case].append(taken)
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
    if prompt.is_cuda and isinstance(engine, Eager):
        collectives = by_events(engine)
    return Sample(first - start, (last - first) / new_tokens if new_tokens else None, collectives)


def row_of(case: Case, samples: Sequence[Sample], silent: Sequence[Sample] | None = None) -> dict:
    """What was measured of a case. The collectives are those of the (lower) median TTFT: a part of a time really taken.

    On GPUs they are those of a pass of their own after it. None is what was not measured: TPOT without new tokens, and
    the time of each collective that a graph replays. `silent` are the same repetitions without any, if there are such.
    """
    typical = sorted(samples, key=lambda sample: sample.ttft)[(len(samples) - 1) // 2]
    collectives = {}
    for point, one in typical.collectives.items():
        real_ms = None if one.real_seconds is None else 1e3 * one.real_seconds
        emulated_ms = 1e3 * one.emulated_seconds
        collectives[point] = {"count": one.count, "bytes": one.bytes, "real_ms": real_ms, "emulated_ms": emulated_ms}
    spent = [sample.spent(other) for sample, other in zip(samples, silent or [None] * len(samples), strict=True)]
    return {
        "plan": str(case.plan),
        "group": case.plan.group,
        "blocks_dropped": len(case.plan.dropped()),
        "communicates": not case.silent,
        "ttft_ms": spread([sample.ttft for sample in samples]),
        "tpot_ms": spread([sample.tpot for sample in samples]),
        "communication_ms": spread([sum(s.values()) if s.keys() == collectives.keys() else None for s in spent]),
        "collectives": collectives,
    }


def spread(seconds: Sequence[float | None]) -> dict | None:
    """Median, interquartile range, minimum (ms) and number of repetitions; None where they were not measured."""
    if None in seconds:
        return None
    least, lower, median, upper = (1e3 * np.quantile(seconds, (0, 0.25, 0.5, 0.75))).tolist()
    return {"median": median, "spread": upper - lower, "min": least, "repeats": len(seconds)}


def saved(full: Sequence[Sample], samples: Sequence[Sample], silent: Sequence[Sample] | None = None) -> dict:
    """TTFT saved against `full` of the same repetition, and the time in it of the all-reduces left out; medians.

    That time is the mean of their sync point. Nothing where no all-reduce is left out, or nothing says what they take.
    """
    kept = {point: one.count for point, one in samples[0].collectives.items()}
    left_out = {point: 1 - kept.get(point, 0) / one.count for point, one in full[0].collectives.items()}
    spent = [one.spent(other) for one, other in zip(full, silent or [None] * len(full), strict=True)]
    removed = np.median([sum(left_out[point] * seconds for point, seconds in each.items()) for each in spent])
    gained = np.median([one.ttft - other.ttft for one, other in zip(full, samples, strict=True)])
    if not removed > 0:
        return {}
    found = {"saved_ms": 1e3 * gained, "removed_ms": 1e3 * removed, "share": gained / removed}
    return {"saved": {key: float(number) for key, number in found.items()}}


def _predicted(case: Case, share: dict, floor: dict) -> dict:
    """A timed shard's medians with a plan's all-reduces over the link added, and these alone (ms)."""
    added = {kind: floor[kind.replace("ms", "communication_ms")] for kind in ("ttft_ms", "tpot_ms")}
    times = {kind: share[kind]["median"] + ms for kind, ms in added.items() if share[kind]}
    return {"plan": str(case.plan), **times, "communication_ms": added}


def run(runtime: Runtime, timed: Timed, settings: BenchSettings) -> dict:
    """`bench` on the processes of a launcher, or on `tp` processes started here (CPU), with what was timed."""
    tp, alone = timed.tp, settings.alone
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
    measured = bench(runtime, timed, settings) if here else spawn(tp, bench, timed, settings, transport=transport)
    found = {"tp": tp, "world": 1 if alone else tp, "transport": None if tp == 1 or alone else transport}
    found |= {name: getattr(settings, name) for name in ASKED} | measured | {"hardware": hardware()}
    return found if runtime.device == "cpu" else found | {"nccl": nccl_settings()}


def chosen_transport(asked: str | None, launched: bool = False) -> str:
    """What processes that time themselves talk through: shared memory, if they are started here and it works here."""
    works = not launched and SharedMemory.works_here()
    if asked is None:
        return SHARED_MEMORY if works else PROCESS_GROUP
    if one_of("transport", asked, TRANSPORTS) == SHARED_MEMORY and not works:
        raise SPDError("Shared memory joins processes that spd itself starts (--tp on CPU), on x86-64 processors.")
    return asked
