"""What to see in a figure or table, of which model, data and machine."""

from itertools import groupby
from pathlib import Path

from spd.report.records import Record, Sources, curves_of, model_key, number_in, taus_of, timings_of, value_in
from spd.transport import SHARED_MEMORY


def machine(record: Record) -> str:
    """GPUs, or the CPU and its cores."""
    hardware = record["hardware"]
    gpus = [f"{len(list(same))} × {name}" for name, same in groupby(sorted(hardware.get("gpus") or []))]
    return (
        ", ".join(gpus)
        if gpus
        else f"{value_in(record, 'hardware', 'cpu')}, {value_in(record, 'hardware', 'cores')} cores"
    )


def subject(record: Record) -> str:
    return f"{model_key(record)[0]} at tp={value_in(record, 'tp')}"


def _data_words(record: Record) -> str:
    text, seq_len = Path(str(value_in(record, "data", "text"))).name, value_in(record, "data", "seq_len")
    tokens, windows = number_in(record, "result", "tokens"), number_in(record, "result", "windows")
    return f"{tokens:,} predictions in {windows:,} windows of {seq_len} tokens of {text}"


def sensitivity_caption(sources: Sources) -> str:
    record = sources.sensitivity
    words = "Rise of the perplexity when one more block drops its attention sync point, the later blocks having dropped"
    words += " theirs and the earlier ones none"
    if sources.plan is not None:
        budget = number_in(sources.plan, "result", "budget", "blocks")
        words += f"; colours are the plan's classes, pale bars blocks outside its budget of {budget}"
    return f"{words}. {subject(record)}; {_data_words(record)}; {machine(record)}."


def perplexity_caption(sources: Sources) -> str:
    record = sources.sweeps[-1]
    words = "Perplexity against the share of blocks that drop their attention sync point;"
    return f"{words} dashed: every sync point kept. {subject(record)}; {_data_words(record)}; {machine(record)}."


def timing_words(record: Record) -> str:
    """The setting of a bench record but for its link: degree, processes and how they talk, batch, prompt."""
    tp, world = number_in(record, "result", "tp"), number_in(record, "result", "world")
    through = " (shared memory)" if record["result"].get("transport") == SHARED_MEMORY else ""
    words = f"tp={tp} on {world} process{'es' if world != 1 else ''}{through}"
    batch, prompt = (number_in(record, "result", key) for key in ("batch", "prompt_len"))
    return f"{words}, batch {batch}, {prompt} prompt tokens"


def _setting(record: Record) -> str:
    link = record["result"].get("link")
    nccl = "".join(f", {name}={value}" for name, value in (record["result"].get("nccl") or {}).items())
    return f"{timing_words(record)}, {f'emulated link {link}' if link else 'no emulated link'}{nccl}"


def ttft_caption(sources: Sources) -> str:
    record = sources.bench
    repeats = sorted(
        {number_in(record, "result", "plans", i, "ttft_ms", "repeats") for i in range(len(timings_of(record)))}
    )
    words = f"Median time to first token of {'/'.join(map(str, repeats))} runs (error bar: interquartile range), "
    emulated = any(row["emulated_ms"] for row in timings_of(record))
    words += "split into computation" + (", real collectives and the emulated link" if emulated else " and collectives")
    if any("formula_ms" in row for row in timings_of(record)):
        words += "; diamonds: no communication, measured, plus collectives by formula"
    return f"{words}. {model_key(record)[0]}, {_setting(record)}{_same_blocks(sources)}; {machine(record)}."


def rates_words(record: Record) -> str:
    """What the bounds of a bench record are made of."""
    flops, read = (number_in(record, "result", "rates", key) for key in ("matrix_gflops", "memory_gb_per_s"))
    sums = number_in(record, "result", "rates", "all_reduce", "ttft_ms")
    return (
        "saved_share = TTFT saved / time of the all-reduces removed, when all are kept; formula_ms = no communication,"
        " measured, + collectives by formula; of_bound = what the machine's rates allow / measured: a process"
        f" multiplies matrices at {flops:.0f} GFLOP/s, reads weights at {read:.1f} GB/s, and an idle all-reduce of the"
        f" prompt's size takes {sums:.2f} ms, the emulated link aside."
    )


def _same_blocks(sources: Sources) -> str:
    """Said when the timing's tp is not the accuracy's: whether the numbers of dropped blocks are the same."""
    if not sources.sweeps or sources.sweeps[-1]["tp"] == sources.bench["tp"]:
        return ""
    swept = {p["blocks"] for points in curves_of(sources.sweeps).values() for p in points}
    timed = {row["blocks_dropped"] for row in timings_of(sources.bench)}
    words = "the same numbers of dropped blocks as" if timed <= swept else "other numbers of dropped blocks than"
    return f", {words} the perplexities at tp={sources.sweeps[-1]['tp']}"


def overview_caption(sources: Sources) -> str:
    words = []
    if sources.sensitivity is not None:
        taus = "".join(f", {name} = {tau:g}" for name, tau in taus_of(sources).items())
        words.append(f"{subject(sources.sensitivity)}{taus}, {_data_words(sources.sensitivity)}.")
    if sources.sweeps:
        words.append(f"{subject(sources.sweeps[-1])}, {_data_words(sources.sweeps[-1])}.")
    if sources.bench is not None:
        words.append(f"{model_key(sources.bench)[0]}, {_setting(sources.bench)}{_same_blocks(sources)}.")
    places = ("Left", "Middle", "Right") if len(words) == 3 else ("Left", "Right")
    placed = [f"{place}: {text}" for place, text in zip(places, words, strict=False)]
    return " ".join([*placed, f"{machine(sources.present()[-1])}."])
