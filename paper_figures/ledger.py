"""REPRODUCTION.md: every claim of the paper beside what the records say of it.

`python paper_figures/ledger.py RECORDS... --out REPRODUCTION.md`. What a claim measures is a function of the records of
one model at one tp and the claim that asks: (value, record that it is from), or None where no record has it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from reference import reference

from spd.errors import SPDError
from spd.planner import blocks_of, classify
from spd.records import load_records, write_bytes
from spd.report import markdown
from spd.tables import (
    CLASSES,
    Record,
    Table,
    column,
    machine,
    model_of,
    newest,
    number,
    of_command,
    sweeps_of,
    timings,
    value,
)

Finding = tuple[float, Record] | None
COLUMNS = ["claim", "paper", "ours", "on", "command", "status"]
ACCURACY = "average.acc"
NEEDS = "needs hardware or gated weights"
TITLE = """# The paper's claims and this repository

Made by `make ledger` from the records named under each table; nothing is typed in but the paper's side, which is in
`paper_figures/paper.json`: Kim et al., *SPD: Sync-Point Drop for Efficient Tensor Parallelism of Large Language
Models*, ICML 2025.

**reproduced**, **differs**: measured on the paper's own model. **in kind**: the same effect looked for on models that
are small enough for the machines named, the largest first, with the criterion stated; it says that the code does what
the paper describes, and nothing about LLaMA2. **weak**: a criterion that almost any model, or any slow link, would
meet. **predicted**: by the latency model (`make predict`), not measured; its regimes are explained in
[`paper_figures/predicted/tables.md`](paper_figures/predicted/tables.md). **by fit**: but for the lean regime, a
constant was solved for this very claim. **needs hardware or gated weights**: the command is there, and no record of it.
"""


# ---------------------------------------------------------------- sensitivity and time


def best_text(records: Sequence[Record]) -> Record | None:
    """Of sensitivities measured on several texts, those of the text that the model predicts best, the newest."""
    measured = of_command(records, "sensitivity")
    return min(reversed(measured), key=full_perplexity_of, default=None)


def full_perplexity_of(sensitivity: Record) -> float:
    """With every sync point kept, of a sensitivity record."""
    return number(sensitivity, "result", "perplexity_from", -1)


def classes_in(record: Record) -> pd.Series:
    """The number of blocks of a sensitivity record in each class at the paper's thresholds."""
    thresholds = reference()["figure6"]["thresholds"]
    classes = [classify(s, thresholds["tau1"], thresholds["tau2"]) for s in column(record, "sensitivity")]
    return pd.Series({name: classes.count(name) for name in CLASSES})


def sensitivity_spread(records: Sequence[Record], claim: Mapping) -> Finding:
    record = best_text(records)
    if record is None:
        return None
    values = column(record, "sensitivity")
    return max(values) / np.median(values) if np.median(values) > 0 else float("inf"), record


def in_sensitive_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    record = best_text(records)
    if record is None:
        return None
    blocks = classes_in(record)
    return 100 * blocks["ISB"] / blocks.sum(), record


def extremely_sensitive(records: Sequence[Record], claim: Mapping) -> Finding:
    record = best_text(records)
    return record and (classes_in(record)["ESB"], record)


def transfer_reduction_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    record = newest(records, "bench")
    if record is None:
        return None
    frame = timings(record).set_index("percent")
    times = (frame["real_ms"] + frame["emulated_ms"]).dropna()  # on GPUs collectives are not timed
    return (100 * (1 - times[100] / times[0]), record) if {0, 100} <= set(times.index) and times[0] else None


def ttft_speedup_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    """At the first percentage that was timed above the claim's."""
    record = newest(records, "bench")
    if record is None:
        return None
    above = timings(record).query("percent > @claim['percent']")
    return (100 * (above["speedup"].iloc[0] - 1), record) if len(above) else None


# ---------------------------------------------------------------- perplexity and accuracy against the percentage


def _difference(records: Sequence[Record], key: str, high: tuple[str, float], low: tuple[str, float]) -> Finding:
    """Of a number between two (strategy, percentage), times 100: of accuracies, which are shares, percentage points."""
    first, second = (_point(records, key, *at) for at in (high, low))
    return first and second and (100 * (first[0] - second[0]), second[1])


def _point(records: Sequence[Record], key: str, strategy: str, percent: float) -> Finding:
    """At a percentage of the blocks, rounded as plans are; of the newest sweep that has it."""
    for record in reversed(sweeps_of(records)):
        blocks = blocks_of(percent, number(record, "model", "blocks"))
        points = pd.json_normalize(value(record, "result", "curve"))
        asked = points[(points["strategy"] == strategy) & (points["blocks"] == blocks)]
        if key in asked and asked[key].notna().any():
            return asked[key].iloc[0], record
    return None


def accuracy_lost(records: Sequence[Record], claim: Mapping) -> Finding:
    return _difference(records, ACCURACY, (claim["strategy"], 0), (claim["strategy"], claim["percent"]))


def accuracy_lost_in_sensitive(records: Sequence[Record], claim: Mapping) -> Finding:
    share = in_sensitive_percent(records, claim)
    return accuracy_lost(records, {**claim, "percent": share[0]}) if share and share[0] else None


def accuracy_recovered(records: Sequence[Record], claim: Mapping) -> Finding:
    at = claim["percent"]
    return _difference(records, ACCURACY, (claim["strategy"], at), (claim["over"], at))


def rise_recovered_percent(records: Sequence[Record], claim: Mapping) -> Finding:
    """How much of the perplexity's rise with `over` the strategy takes back."""
    at = claim["percent"]
    rise = _difference(records, "perplexity", (claim["over"], at), ("zs", 0))
    back = _difference(records, "perplexity", (claim["over"], at), (claim["strategy"], at))
    return (100 * back[0] / rise[0], back[1]) if rise and back and rise[0] > 0 else None


def mmlu_lost(records: Sequence[Record], claim: Mapping) -> Finding:
    """Points at 100 %, where a sweep was asked for the task `mmlu`."""
    return _difference(records, "tasks.mmlu.acc", (claim["strategy"], 0), (claim["strategy"], 100))


# ---------------------------------------------------------------- table 1


def table1(records: Sequence[Record], claim: Mapping) -> Finding:
    """Perplexity of a design (`design`) of `residual` or `bias` (`of`), named as the command `table1` does.

    Of records that drop the first block's sync alone, as the paper does.
    """
    alone = [r for r in records if r["command"] == "table1" and re.fullmatch("DF( FF)*", r["plan"])]
    rows = alone[-1]["result"][claim["of"]] if alone else []
    return next(((row["perplexity"], alone[-1]) for row in rows if row["design"] == claim["design"]), None)


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


# ---------------------------------------------------------------- three kinds of evidence, the strongest first


class Evidence(NamedTuple):
    """What records say of a claim, the words of its status, the command that makes such records, and the records."""

    words: str
    status: str
    command: str
    records: list[Record]


Subjects = Mapping[tuple[str, int], Sequence[Record]]  # the records of each model at each tp


def _direct(claim: Mapping, subjects: Subjects) -> Evidence | None:
    """On the model that the claim is about."""
    for (name, tp), mine in subjects.items():
        if "measure" in claim and (_shape(name), tp) == (claim["model"], claim["tp"]):
            found = MEASURES[claim["measure"]](mine, claim)
            if found:
                status = "reproduced" if "relation" not in claim or _holds(claim, found[0]) else "differs"
                return Evidence(f"{found[0]:.3g}", status, _reproduce(claim), [found[1]])
    return None


def _in_kind(claim: Mapping, subjects: Subjects) -> Evidence | None:
    """The same effect on every other model that has the records."""
    if "in_kind" not in claim:
        return None
    kind = claim["in_kind"]
    found = {key: MEASURES[kind["measure"]](mine, claim | kind) for key, mine in subjects.items() if not _shape(key[0])}
    found = {key: finding for key, finding in found.items() if finding}
    if not found:
        return None
    held = sum(_holds(kind, value) for value, _ in found.values())
    values = ", ".join(f"{name} tp={tp}: {value:.3g}" for (name, tp), (value, _) in found.items())
    status = {len(found): "reproduced in kind", 0: "differs in kind"}.get(held, f"in kind, on {held} of {len(found)}")
    status += ", weak" * kind.get("weak", False)
    wanted = kind.get("wanted", f"{kind['relation']} {kind['value']:g}")
    words = f"{kind['words']} (wanted: {wanted}): {values}"
    return Evidence(words, status, kind["command"], [record for _, record in found.values()])


def _predicted(claim: Mapping, records: Sequence[Record]) -> Evidence | None:
    """By the latency model, for the paper's own models and links."""
    record = newest(records, "predict-paper")
    rows = [r for r in (record["result"]["claims"] if record else []) if r["claim"] == claim["words"]]
    if not rows:
        return None
    frame, words, held = pd.DataFrame(rows), [], []
    for regime in record["result"]["regimes"]:
        ends = sorted({f"{v:.3g}" for v in (frame[regime].min(), frame[regime].max())}, key=float)
        words.append(f"{regime}: {'–'.join(ends)}")
        held.append(str(frame[f"{regime}: holds"].sum()))
    kind = "predicted, by fit" if claim.get("by_fit") else "predicted"
    status = f"{kind}: holds for {'/'.join(held)} of {len(frame)}"
    return Evidence(f"predicted, {'; '.join(words)}", status, "make predict", [record])


def _holds(claim: Mapping, value: float) -> bool:
    if claim["relation"] == "=":
        return abs(value - claim["value"]) <= claim["tolerance"]
    return value < claim["value"] if claim["relation"] == "<" else value > claim["value"]


def _shape(name: str) -> str | None:
    """`llama2-7b` of `Llama-2-7b-hf`; None of a model that is not the paper's."""
    match = re.fullmatch(r"llama-?2-(7|13|70)b(-hf)?", name.lower())
    return f"llama2-{match[1]}b" if match else None


def _reproduce(claim: Mapping) -> str:
    """What measures a claim on the model that it is about."""
    return f"make reproduce-{(claim.get('model') or claim['models'][-1]).removeprefix('llama2-')}"


# ---------------------------------------------------------------- the ledger


def ledger(records: Sequence[Record]) -> list[Table]:
    """A table for each of the paper's tables and figures, one row a claim, from `load_records`' records."""
    subjects: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        if r.get("tp") and r.get("model") and not r["model"].get("shape_only"):  # random weights say nothing
            subjects.setdefault((model_of(r), r["tp"]), []).append(r)
    subjects = dict(sorted(subjects.items(), key=lambda each: (-each[1][-1]["model"].get("parameters", 0), each[0])))
    claims = [*reference()["accuracy_claims"], *reference()["claims"]]
    claims.sort(key=lambda claim: (claim["where"].startswith("figure"), claim["where"]))
    rows = pd.DataFrame([_row(claim, subjects, records) for claim in claims])
    found = []
    for where, mine in rows.groupby("where", sort=False):
        used = {record["id"]: record for row in mine["records"] for record in row}
        found.append(Table(where, "", mine[COLUMNS], list(used.values())))
    return found


def _row(claim: Mapping, subjects: Subjects, records: Sequence[Record]) -> dict:
    measured = _direct(claim, subjects) or _in_kind(claim, subjects)
    found = [evidence for evidence in (measured, _predicted(claim, records)) if evidence]
    used = [record for evidence in found for record in evidence.records]
    row = {"where": claim["where"], "claim": claim["words"], "paper": _paper(claim), "records": used}
    row |= {"ours": "<br>".join(e.words for e in found), "on": "<br>".join(dict.fromkeys(map(_where, used)))}
    if found:
        words = {"command": [f"`{e.command}`" for e in found], "status": [e.status for e in found]}
        return row | {key: "<br>".join(each) for key, each in words.items()}
    return row | {"command": f"`{_reproduce(claim)}`", "status": NEEDS}


def _paper(claim: Mapping) -> str:
    stated, relation = claim.get("paper", claim.get("value", "drawn")), claim.get("relation", "")
    if isinstance(stated, dict):
        return "; ".join(f"{setting}: {relation} {v:g}" for setting, v in stated.items())
    return stated if isinstance(stated, str) else f"{relation} {stated:g}".removeprefix("= ")


def _where(record: Record) -> str:
    if record["command"] == "predict-paper":
        return f"LLaMA2 on {record['result']['gpu'].upper()}, predicted"
    return f"{model_of(record)}; {machine(record)}"


def write_ledger(records: Iterable[Path | str], out: Path) -> dict:
    """Write the ledger of record files or folders as Markdown; `claims` counts rows by status. Raises SPDError."""
    found = ledger(load_records(records))
    write_bytes(out, markdown(found, TITLE).encode())
    counted = pd.concat([table.frame["status"] for table in found]).value_counts().sort_index()
    return {"file": str(out), "claims": counted.to_dict()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("REPRODUCTION.md"), help="where to write")
    asked = parser.parse_args()
    try:
        print(json.dumps(write_ledger(asked.records, asked.out)))
    except SPDError as error:
        sys.exit(f"error: {error}")
