"""The ledger of the reproduction: every claim of the paper beside what the records say of it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from reference import reference

from spd.records import load_records, write_bytes
from spd.report.captions import machine
from spd.report.measures import MEASURES
from spd.report.records import Record, Sources, by_subject, model_key, newest
from spd.report.table import Table
from spd.report.tables import markdown

COLUMNS = ("claim", "paper", "ours", "on", "command", "status")
HELD = {"<": float.__lt__, ">": float.__gt__}
NEEDS = "needs hardware or gated weights"
PREDICT = "make predict"
TITLE = """# The paper's claims and this repository

Made by `make ledger` from the records named under each table; nothing is typed in but the paper's side, which stands in
`spd/profiles/paper.json`: Kim et al., *SPD: Sync-Point Drop for Efficient Tensor Parallelism of Large Language Models*,
ICML 2025.

**reproduced**, **differs**: measured on the paper's own model. **in kind**: the same effect looked for on models that
are small enough for the machines named, with the criterion stated; it says that the code does what the paper describes,
and nothing about LLaMA2. **predicted**: by the latency model (`spd predict-paper`), not measured; its regimes are
explained in [`paper_figures/predicted/tables.md`](paper_figures/predicted/tables.md). **needs hardware or gated
weights**: the command is there, and no record of it.
"""


class Evidence(NamedTuple):
    """What records say of a claim, the words of its status, the command that makes such records, and the records."""

    words: str
    status: str
    command: str
    records: list[Record]


def ledger(records: Sequence[Record]) -> list[Table]:
    """A table for each of the paper's tables and figures, one row a claim, from `load_records`' records."""
    subjects = dict(sorted(by_subject(records).items()))
    claims = [*reference()["accuracy_claims"], *reference()["claims"]]
    claims.sort(key=lambda claim: (claim["where"].startswith("figure"), claim["where"]))
    found = []
    for where, same in groupby(claims, key=lambda claim: claim["where"]):
        made = [_row(claim, subjects, records) for claim in same]
        used = {record["id"]: record for _, sources in made for record in sources}
        rows = [row for row, _ in made]
        found.append(Table(where, "", rows, dict.fromkeys(COLUMNS, ""), list(used.values())))
    return found


def write_ledger(records: Iterable[Path | str], out: Path) -> dict:
    """Write the ledger of record files or folders as Markdown; `claims` counts rows by status. Raises SPDError."""
    found = ledger(load_records(records))
    write_bytes(out, markdown(found, TITLE).encode())
    statuses = sorted(row["status"] for table in found for row in table.rows)
    return {"file": str(out), "claims": {status: len(list(same)) for status, same in groupby(statuses)}}


def _row(claim: Mapping, subjects: Mapping[tuple, Sources], records: Sequence[Record]) -> tuple[dict, list[Record]]:
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


def _direct(claim: Mapping, subjects: Mapping[tuple, Sources]) -> Evidence | None:
    """On the model that the claim is about."""
    for (name, tp), sources in subjects.items():
        if "measure" in claim and (_shape(name), tp) == (claim["model"], claim["tp"]):
            found = MEASURES[claim["measure"]](sources, claim)
            if found:
                status = "reproduced" if "relation" not in claim or _holds(claim, found[0]) else "differs"
                return Evidence(f"{found[0]:.3g}", status, _reproduce(claim), [found[1]])
    return None


def _in_kind(claim: Mapping, subjects: Mapping[tuple, Sources]) -> Evidence | None:
    """The same effect on every other model that has the records."""
    kind = claim.get("in_kind")
    if kind is None:
        return None
    measure = partial(MEASURES[kind["measure"]], claim=claim | kind)
    found = {key: f for key, sources in subjects.items() if _shape(key[0]) is None for f in [measure(sources)] if f}
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
    return f"{model_key(record)[0]}; {machine(record)}"
