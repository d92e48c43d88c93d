"""REPRODUCTION.md: every claim of the paper beside what the records say of it.

`python paper_figures/ledger.py RECORDS... --out REPRODUCTION.md`. What a claim measures is a function of the records of
one model at one tp and the claim that asks: (value, record that it is from), or None where no record has it.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
from draw import Record, Table, machine, main, model_of, newest, number
from reference import reference

from spd.planner import blocks_of, classify
from spd.records import load_records, write_bytes
from spd.report import markdown
from spd.tables import by_subject, numbers, sweeps_of, timings

Finding = tuple[float, Record] | None
COLUMNS = ("claim", "paper", "ours", "on", "command", "status")
HELD = {"<": float.__lt__, ">": float.__gt__}
NEEDS = "needs hardware or gated weights"
PREDICT = "make predict"
TITLE = """# The paper's claims and this repository

Made by `make ledger` from the records named under each table; nothing is typed in but the paper's side, which is in
`paper_figures/paper.json`: Kim et al., *SPD: Sync-Point Drop for Efficient Tensor Parallelism of Large Language
Models*, ICML 2025.

**reproduced**, **differs**: measured on the paper's own model. **in kind**: the same effect looked for on models that
are small enough for the machines named, with the criterion stated; it says that the code does what the paper describes,
and nothing about LLaMA2. **predicted**: by the latency model (`make predict`), not measured; its regimes are
explained in [`paper_figures/predicted/tables.md`](paper_figures/predicted/tables.md). **needs hardware or gated
weights**: the command is there, and no record of it.
"""


def _measured(records: Sequence[Record]) -> Record | None:
    """Of sensitivities measured on several texts, those of the text that the model predicts best."""
    measured = [r for r in records if r["command"] == "sensitivity"]
    return min(reversed(measured), key=full_perplexity_of, default=None)


def full_perplexity_of(sensitivity: Record) -> float:
    """With every sync point kept, of a sensitivity record."""
    return number(sensitivity, "result", "perplexity_from", -1)


def classes_in(record: Record) -> list[str]:
    """Class of each block of a sensitivity record at the paper's thresholds."""
    thresholds = reference()["figure6"]["thresholds"]
    return [classify(s, thresholds["tau1"], thresholds["tau2"]) for s in numbers(record, "result", "sensitivity")]


def sensitivity_spread(records: Sequence[Record], claim: Mapping) -> Finding:
    record = _measured(records)
    if record is None:
        return None
    values = numbers(record, "result", "sensitivity")
    return max(values) / median(values) if median(values) > 0 else float("inf"), record


def in_sensitive_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    record = _measured(records)
    if record is None:
        return None
    classes = classes_in(record)
    return 100 * classes.count("ISB") / len(classes), record


def extremely_sensitive(records: Sequence[Record], claim: Mapping) -> Finding:
    record = _measured(records)
    return record and (classes_in(record).count("ESB"), record)


def transfer_reduction_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    record = newest(records, "bench")
    if record is None:
        return None
    times = {row["percent"]: row["real_ms"] + row["emulated_ms"] for _, row in timings(record).iterrows()}
    return (100 * (1 - times[100] / times[0]), record) if {0, 100} <= set(times) and times[0] else None


def ttft_speedup_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    """At the first percentage that was timed above the claim's."""
    record = newest(records, "bench")
    if record is None:
        return None
    above = timings(record).query("percent > @claim['percent']")
    return (100 * (above["speedup"].iloc[0] - 1), record) if len(above) else None


# ---------------------------------------------------------------- perplexity and accuracy against the percentage


PERPLEXITY, ACCURACY, MMLU = ("perplexity",), ("average", "acc"), ("tasks", "mmlu", "acc")  # places in a point


def _value(records: Sequence[Record], place: tuple[str, ...], strategy: str, percent: float) -> Finding:
    """At a percentage of the blocks, rounded as plans are; of the newest sweep that has it."""
    for record in reversed(sweeps_of(records)):
        blocks = blocks_of(percent, int(number(record, "model", "blocks")))
        for i, point in enumerate(record["result"]["curve"]):
            if (point["strategy"], point["blocks"]) == (strategy, blocks) and _has(point, place):
                return number(record, "result", "curve", i, *place), record
    return None


def _has(point: Mapping, place: tuple[str, ...]) -> bool:
    return not place or (place[0] in point and _has(point[place[0]], place[1:]))


def _difference(records: Sequence[Record], place: tuple, high: tuple[str, float], low: tuple[str, float]) -> Finding:
    """Times 100: of accuracies, which are shares, percentage points."""
    first, second = (_value(records, place, *at) for at in (high, low))
    return None if first is None or second is None else (100 * (first[0] - second[0]), second[1])


def accuracy_lost(records: Sequence[Record], claim: Mapping) -> Finding:
    return _difference(records, ACCURACY, (claim["strategy"], 0), (claim["strategy"], claim["percent"]))


def accuracy_lost_in_sensitive(records: Sequence[Record], claim: Mapping) -> Finding:
    share = in_sensitive_percent(records, claim)
    return None if not share or not share[0] else accuracy_lost(records, {**claim, "percent": share[0]})


def accuracy_recovered(records: Sequence[Record], claim: Mapping) -> Finding:
    at = claim["percent"]
    return _difference(records, ACCURACY, (claim["strategy"], at), (claim["over"], at))


def rise_recovered_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    """How much of the perplexity's rise with `over` the strategy takes back."""
    at = claim["percent"]
    rise = _difference(records, PERPLEXITY, (claim["over"], at), ("zs", 0))
    back = _difference(records, PERPLEXITY, (claim["over"], at), (claim["strategy"], at))
    return None if not rise or not back or rise[0] <= 0 else (100 * back[0] / rise[0], back[1])


def mmlu_lost(records: Sequence[Record], claim: Mapping) -> Finding:
    """Points at 100 %, where a sweep was asked for the task `mmlu`."""
    return _difference(records, MMLU, (claim["strategy"], 0), (claim["strategy"], 100))


# ---------------------------------------------------------------- table 1


def table1(records: Sequence[Record], claim: Mapping) -> Finding:
    """Perplexity of a design (`design`) of `residual` or `bias` (`of`), named as the command `table1` does.

    Of records that drop the first block's sync alone, as the paper does.
    """
    found = (r for r in reversed(records) if r["command"] == "table1")
    record = next((r for r in found if r["plan"].split()[0] == "DF" and r["plan"].split().count("DF") == 1), None)
    rows = [] if record is None else record["result"][claim["of"]]
    return next(((row["perplexity"], record) for row in rows if row["design"] == claim["design"]), None)


def table1_ratio(records: Sequence[Record], claim: Mapping) -> Finding:
    """The perplexity of a design over that of another (`over`)."""
    design, other = (table1(records, {**claim, "design": claim[key]}) for key in ("design", "over"))
    return design and other and (design[0] / other[0], design[1])


MEASURES: dict[str, Callable[[Sequence[Record], Mapping], Finding]] = {
    measure.__name__: measure
    for measure in (
        sensitivity_spread,
        in_sensitive_percent,
        extremely_sensitive,
        transfer_reduction_percent,
        ttft_speedup_percent,
        accuracy_lost,
        accuracy_lost_in_sensitive,
        accuracy_recovered,
        rise_recovered_percent,
        mmlu_lost,
        table1,
        table1_ratio,
    )
}


# ---------------------------------------------------------------- the ledger


class Evidence(NamedTuple):
    """What records say of a claim, the words of its status, the command that makes such records, and the records."""

    words: str
    status: str
    command: str
    records: list[Record]


def ledger(records: Sequence[Record]) -> list[Table]:
    """A table for each of the paper's tables and figures, one row a claim, from `load_records`' records."""
    weights = [r for r in records if r.get("model") and not r["model"].get("shape_only")]  # random ones say nothing
    subjects = {(name, tp): mine for (name, _, tp), mine in sorted(by_subject(weights).items())}
    claims = [*reference()["accuracy_claims"], *reference()["claims"]]
    claims.sort(key=lambda claim: (claim["where"].startswith("figure"), claim["where"]))
    found = []
    for where, same in groupby(claims, key=lambda claim: claim["where"]):
        made = [_row(claim, subjects, records) for claim in same]
        used = {record["id"]: record for _, used in made for record in used}
        rows = [row for row, _ in made]
        found.append(Table(where, "", pd.DataFrame(rows, columns=COLUMNS), list(used.values())))
    return found


def write_ledger(records: Iterable[Path | str], out: Path) -> dict:
    """Write the ledger of record files or folders as Markdown; `claims` counts rows by status. Raises SPDError."""
    found = ledger(load_records(records))
    write_bytes(out, markdown(found, TITLE).encode())
    statuses = sorted(status for table in found for status in table.frame["status"])
    return {"file": str(out), "claims": {status: len(list(same)) for status, same in groupby(statuses)}}


def _row(
    claim: Mapping, subjects: Mapping[tuple, Sequence[Record]], records: Sequence[Record]
) -> tuple[dict, list[Record]]:
    row = {"claim": claim["words"], "paper": _paper(claim), "ours": "", "on": "", "command": ""}
    measured = _direct(claim, subjects) or _in_kind(claim, subjects)
    found = [evidence for evidence in (measured, _predicted(claim, records)) if evidence]
    if not found and "architecture" in claim:
        return row | {"status": f"{claim['architecture']} is not supported"}, []
    if not found:
        return row | {"command": f"`{_reproduce(claim)}`", "status": NEEDS}, []
    used = [record for evidence in found for record in evidence.records]
    row |= {"ours": [e.words for e in found], "on": dict.fromkeys(map(_where, used)),
            "command": [f"`{e.command}`" for e in found], "status": [e.status for e in found]}  # fmt: skip
    return {key: value if isinstance(value, str) else "<br>".join(value) for key, value in row.items()}, used


def _reproduce(claim: Mapping) -> str:
    """What measures a claim on the model that it is about."""
    return f"make reproduce-{(claim.get('model') or claim['models'][-1]).split('-')[-1]}"


def _paper(claim: Mapping) -> str:
    value, relation = claim.get("paper", claim.get("value", "drawn")), claim.get("relation", "")
    if isinstance(value, dict):
        return "; ".join(f"{setting}: {relation} {v:g}" for setting, v in value.items())
    return value if isinstance(value, str) else f"{relation} {value:g}".removeprefix("= ")


# ---------------------------------------------------------------- three kinds of evidence, the strongest first


def _direct(claim: Mapping, subjects: Mapping[tuple, Sequence[Record]]) -> Evidence | None:
    """On the model that the claim is about."""
    for (name, tp), mine in subjects.items():
        if "measure" in claim and (_shape(name), tp) == (claim["model"], claim["tp"]):
            found = MEASURES[claim["measure"]](mine, claim)
            if found:
                status = "reproduced" if "relation" not in claim or _holds(claim, found[0]) else "differs"
                return Evidence(f"{found[0]:.3g}", status, _reproduce(claim), [found[1]])
    return None


def _in_kind(claim: Mapping, subjects: Mapping[tuple, Sequence[Record]]) -> Evidence | None:
    """The same effect on every other model that has the records."""
    kind = claim.get("in_kind")
    if kind is None:
        return None
    measure = partial(MEASURES[kind["measure"]], claim=claim | kind)
    found = {key: f for key, mine in subjects.items() if _shape(key[0]) is None for f in [measure(mine)] if f}
    if not found:
        return None
    held = sum(_holds(kind, value) for value, _ in found.values())
    values = ", ".join(f"{name} tp={tp}: {value:.3g}" for (name, tp), (value, _) in found.items())
    status = {len(found): "reproduced in kind", 0: "differs in kind"}.get(held, f"in kind, on {held} of {len(found)}")
    wanted = kind.get("wanted", f"{kind['relation']} {kind['value']:g}")
    words = f"{kind['words']} (wanted: {wanted}): {values}"
    return Evidence(words, status, kind["command"], [record for _, record in found.values()])


def _predicted(claim: Mapping, records: Sequence[Record]) -> Evidence | None:
    """By the latency model, for the paper's own models and links."""
    record = newest(records, "predict-paper")
    rows = [r for r in (record["result"]["claims"] if record else []) if r["claim"] == claim["words"]]
    if not rows:
        return None
    words, held = [], []
    for regime in record["result"]["regimes"]:
        values = [row[regime] for row in rows]
        ends = sorted({f"{v:.3g}" for v in (min(values), max(values))}, key=float)
        words.append(f"{regime}: {'–'.join(ends)}")
        held.append(sum(row[f"{regime}: holds"] for row in rows))
    status = f"predicted: holds for {'/'.join(map(str, held))} of {len(rows)}"
    return Evidence(f"predicted, {'; '.join(words)}", status, PREDICT, [record])


def _holds(claim: Mapping, value: float) -> bool:
    if claim["relation"] == "=":
        return abs(value - claim["value"]) <= claim["tolerance"]
    return HELD[claim["relation"]](float(value), float(claim["value"]))


def _shape(name: str) -> str | None:
    """`llama2-7b` of `Llama-2-7b-hf`; None of a model that is not the paper's."""
    match = re.fullmatch(r"llama-?2-(7|13|70)b(-hf)?", name.lower())
    return f"llama2-{match[1]}b" if match else None


def _where(record: Record) -> str:
    if record["command"] == "predict-paper":
        return f"LLaMA2 on {record['result']['gpu'].upper()}, predicted"
    return f"{model_of(record)}; {machine(record)}"


if __name__ == "__main__":
    sys.exit(main(lambda asked: write_ledger(asked.records, asked.out), __doc__, "REPRODUCTION.md"))
