"""What the ledger of claims measures, as functions of the records of one model at one tp.

Each takes `Sources` and the claim that asks, and gives (value, record that it is from), or None where no record has it.
"""

from collections.abc import Callable, Mapping
from statistics import median

from reference import reference

from spd.planner import blocks_of, classify
from spd.report.records import Record, Sources, number_in, numbers_in, timings_of

Finding = tuple[float, Record] | None


def sensitivity_spread(sources: Sources, claim: Mapping) -> Finding:
    if sources.sensitivity is None:
        return None
    values = numbers_in(sources.sensitivity, "result", "sensitivity")
    return max(values) / median(values) if median(values) > 0 else float("inf"), sources.sensitivity


def classes_in(record: Record) -> list[str]:
    """Class of each block of a sensitivity record at the paper's thresholds."""
    thresholds = reference()["figure6"]["thresholds"]
    return [classify(s, thresholds["tau1"], thresholds["tau2"]) for s in numbers_in(record, "result", "sensitivity")]


def in_sensitive_percent(sources: Sources, claim: Mapping) -> Finding:
    if sources.sensitivity is None:
        return None
    classes = classes_in(sources.sensitivity)
    return 100 * classes.count("ISB") / len(classes), sources.sensitivity


def extremely_sensitive(sources: Sources, claim: Mapping) -> Finding:
    return None if sources.sensitivity is None else (classes_in(sources.sensitivity).count("ESB"), sources.sensitivity)


def transfer_reduction_percent(sources: Sources, claim: Mapping) -> Finding:
    if sources.bench is None:
        return None
    times = {row["percent"]: row["real_ms"] + row["emulated_ms"] for row in timings_of(sources.bench)}
    return (100 * (1 - times[100] / times[0]), sources.bench) if {0, 100} <= set(times) and times[0] else None


def ttft_speedup_percent(sources: Sources, claim: Mapping) -> Finding:
    """At the first percentage that was timed above the claim's."""
    if sources.bench is None:
        return None
    above = [row for row in timings_of(sources.bench) if row["percent"] > claim["percent"]]
    return (100 * (above[0]["speedup"] - 1), sources.bench) if above else None


# ---------------------------------------------------------------- perplexity and accuracy against the percentage


PERPLEXITY, ACCURACY, MMLU = ("perplexity",), ("average", "acc"), ("tasks", "mmlu", "acc")  # places in a point


def _value(sources: Sources, place: tuple[str, ...], strategy: str, percent: float) -> Finding:
    """At a percentage of the blocks, rounded as plans are; of the newest sweep that has it."""
    for record in reversed(sources.sweeps):
        blocks = blocks_of(percent, int(number_in(record, "model", "blocks")))
        for i, point in enumerate(record["result"]["curve"]):
            if (point["strategy"], point["blocks"]) == (strategy, blocks) and _has(point, place):
                return number_in(record, "result", "curve", i, *place), record
    return None


def _has(point: Mapping, place: tuple[str, ...]) -> bool:
    return not place or (place[0] in point and _has(point[place[0]], place[1:]))


def _difference(sources: Sources, place: tuple, high: tuple[str, float], low: tuple[str, float]) -> Finding:
    first, second = (_value(sources, place, *at) for at in (high, low))
    return None if first is None or second is None else (first[0] - second[0], second[1])


def _points(found: Finding) -> Finding:
    """Of accuracy, from a share."""
    return found and (100 * found[0], found[1])


def accuracy_lost(sources: Sources, claim: Mapping) -> Finding:
    strategy = claim["strategy"]
    return _points(_difference(sources, ACCURACY, (strategy, 0), (strategy, claim["percent"])))


def accuracy_lost_in_sensitive(sources: Sources, claim: Mapping) -> Finding:
    share = in_sensitive_percent(sources, claim)
    return None if not share or not share[0] else accuracy_lost(sources, {**claim, "percent": share[0]})


def accuracy_recovered(sources: Sources, claim: Mapping) -> Finding:
    at = claim["percent"]
    return _points(_difference(sources, ACCURACY, (claim["strategy"], at), (claim["over"], at)))


def rise_recovered_percent(sources: Sources, claim: Mapping) -> Finding:
    """How much of the perplexity's rise with `over` the strategy takes back."""
    at = claim["percent"]
    rise = _difference(sources, PERPLEXITY, (claim["over"], at), ("zs", 0))
    back = _difference(sources, PERPLEXITY, (claim["over"], at), (claim["strategy"], at))
    return None if not rise or not back or rise[0] <= 0 else (100 * back[0] / rise[0], back[1])


def mmlu_lost(sources: Sources, claim: Mapping) -> Finding:
    """Points at 100 %, where a sweep was asked for the task `mmlu`."""
    return _points(_difference(sources, MMLU, (claim["strategy"], 0), (claim["strategy"], 100)))


# ---------------------------------------------------------------- table 1


def table1(sources: Sources, claim: Mapping) -> Finding:
    """Perplexity of a design (`design`) of `residual` or `bias` (`of`), named as the command `table1` does.

    Of records that drop the first block's sync alone, as the paper does.
    """
    found = (r for r in reversed(sources.others) if r["command"] == "table1")
    record = next((r for r in found if r["plan"].split()[0] == "DF" and r["plan"].split().count("DF") == 1), None)
    rows = [] if record is None else record["result"][claim["of"]]
    return next(((row["perplexity"], record) for row in rows if row["design"] == claim["design"]), None)


def table1_ratio(sources: Sources, claim: Mapping) -> Finding:
    """The perplexity of a design over that of another (`over`)."""
    design, other = (table1(sources, {**claim, "design": claim[key]}) for key in ("design", "over"))
    return design and other and (design[0] / other[0], design[1])


MEASURES: dict[str, Callable[[Sources, Mapping], Finding]] = {
    f.__name__: f
    for f in (
        sensitivity_spread, in_sensitive_percent, extremely_sensitive, transfer_reduction_percent,
        ttft_speedup_percent, accuracy_lost, accuracy_lost_in_sensitive, accuracy_recovered, rise_recovered_percent,
        mmlu_lost, table1, table1_ratio,
    )
}  # fmt: skip
