"""Tables of what each step of a repair gives, and of the paper's table 1: records of `ablate` and `table1`."""

from collections.abc import Sequence
from pathlib import Path

from spd.report.records import Record, model_key, number_in, value_in
from spd.report.table import Table


def ablation_tables(records: Sequence[Record]) -> list[Table]:
    """One table of all `ablate` records and one of all `table1` records; of one model, tp, text and plan the newest."""
    found = []
    for command, make in (("ablate", _ablation), ("table1", _table1)):
        chosen = {_subject(r): r for r in records if r["command"] == command}
        if chosen:
            found.append(make(chosen))
    return found


def _subject(record: Record) -> str:
    text = Path(str(value_in(record, "data", "text"))).stem
    dropped = str(value_in(record, "plan")).split().count("DF")
    blocks = len(str(record["plan"]).split())
    where = "all blocks" if dropped == blocks else f"{dropped} of {blocks} blocks"
    return f"{model_key(record)[0]}, {text}, tp={value_in(record, 'tp')}, {where}"


def _ablation(chosen: dict[str, Record]) -> Table:
    rows: dict[str, dict] = {}
    for subject, record in chosen.items():
        for i, variant in enumerate(value_in(record, "result", "variants")):
            row = rows.setdefault(variant["name"], {"repair": variant["name"]})
            row[subject] = number_in(record, "result", "variants", i, "perplexity")
            row[f"{subject}: recovered %"] = 100 * number_in(record, "result", "variants", i, "recovered")
            row[f"{subject}: seconds"] = number_in(record, "result", "variants", i, "seconds")
    formats = {"repair": ""}
    for subject in chosen:
        formats |= {subject: ".2f", f"{subject}: recovered %": ".0f", f"{subject}: seconds": ".0f"}
    caption = "What each step of a repair gives: perplexity with attention syncs dropped, on text the repairs have not"
    caption += " seen; the share of the loss (in nats) that zero-shot adds and the repair takes back; seconds it took. "
    return Table("ablation", caption + _windows(chosen), list(rows.values()), formats, list(chosen.values()),
                 essential=("repair", *chosen))  # fmt: skip


def _windows(chosen: dict[str, Record]) -> str:
    parts = []
    for subject, record in chosen.items():
        counts = value_in(record, "result", "windows")
        seq_len = value_in(record, "data", "seq_len")
        parts.append(f"{subject}: {counts['calibration']} calibration and {counts['evaluation']} evaluation windows of"
                     f" {seq_len} tokens")  # fmt: skip
    return "; ".join(parts) + "."


def _table1(chosen: dict[str, Record]) -> Table:
    rows = []
    for subject, record in chosen.items():
        row = {"model": subject}
        for kind in ("residual", "bias"):
            for i, design in enumerate(value_in(record, "result", kind)):
                name = f"{kind}: {design['design']}" if design["design"] == "no SPD" else design["design"]
                row[name] = number_in(record, "result", kind, i, "perplexity")
        rows.append(row)
    formats = {"model": ""} | {name: ".2f" for name in rows[0] if name != "model"}
    caption = (
        "The paper's table 1 on small real models: perplexity where an SPD block adds its attention output (residual)"
        " before the one all-reduce, as the method does, or after it, so that it stays with its shard for good; and"
        " where the output projection's bias is added after it, as the method does, or before it, tp times. The biases"
        " are the values' means, taken from the values and given back after the projection: the same function."
    )
    return Table("table1", caption, rows, formats, list(chosen.values()))
