"""The table beside transformers: records of `bench-peers`."""

from collections.abc import Sequence

from spd.report.captions import machine
from spd.report.records import Record, newest, number_in, value_in
from spd.report.table import Table

ENGINES = ("spd", "spd_over_gloo", "transformers")


def peer_tables(records: Sequence[Record]) -> list[Table]:
    """The table of the newest `bench-peers` record, none without one."""
    record = newest(records, "bench-peers")
    return [] if record is None else [_peers(record)]


def _peers(record: Record) -> Table:
    rows = [_row(record, i) for i in range(len(value_in(record, "result", "rows")))]
    formats = {"shape": "", "dtype": "", "tp": "d", "threads": "d"}
    for kind in ("ttft", "tpot"):
        for engine in (e for e in ENGINES if any(f"{e}_{kind}_ms" in row for row in rows)):
            formats |= {f"{engine}_{kind}_ms": ".2f", f"{engine}_{kind}_iqr": ".2f"}
        for engine in (e for e in ENGINES[:-1] if any(f"{e}_{kind}_ratio" in row for row in rows)):
            formats |= {f"{engine}_{kind}_ratio": ".2f"}
    if any("why_not" in row for row in rows):
        formats |= {"why_not": ""}
    formats |= {"repeats": "d", "logits_differ": ".1e"}
    said = {"batch": "in the batch", "prompt_len": "prompt tokens", "new_tokens": "decoded"}
    setting = ", ".join(f"{number_in(record, 'result', key)} {words}" for key, words in said.items())
    caption = (
        "Time to first token and per output token beside transformers"
        f" {value_in(record, 'versions', 'transformers')} (SDPA; with tp processes its own tensor parallelism, tp_plan"
        " auto over gloo): the same random weights, the same threads a process, medians of interleaved repetitions and"
        " their interquartile range. With several processes spd talks through shared memory, and, in spd_over_gloo, the"
        " way transformers does. ratio = transformers / spd of the medians, above 1 where spd is ahead; logits_differ:"
        f" the largest difference of the first token's logits. {setting}; {machine(record)}."
    )
    return Table("peers", caption, rows, formats, [record])


def _row(record: Record, i: int) -> dict:
    source = value_in(record, "result", "rows", i)
    row = {key: source[key] for key in ("shape", "dtype", "tp", "threads", "why_not", "logits_differ") if key in source}
    row["repeats"] = number_in(record, "result", "rows", i, "spd", "ttft_ms", "repeats")
    for engine in ENGINES:
        if engine in source:
            for kind in ("ttft", "tpot"):
                row[f"{engine}_{kind}_ms"] = number_in(record, "result", "rows", i, engine, f"{kind}_ms", "median")
                row[f"{engine}_{kind}_iqr"] = number_in(record, "result", "rows", i, engine, f"{kind}_ms", "spread")
    for engine, ratios in source.get("ratio", {}).items():
        row |= {f"{engine}_{kind}_ratio": ratio for kind, ratio in ratios.items()}
    return row
