"""What repairs of the paper's models take, reckoned: records of `budget`."""

from collections.abc import Sequence

from spd.report.records import Record, newest, number_in, value_in
from spd.report.table import Table

GIB = 2**30


def budget_tables(records: Sequence[Record]) -> list[Table]:
    """The table of the newest `budget` record."""
    record = newest(records, "budget")
    return [] if record is None else [_budget(record)]


def _budget(record: Record) -> Table:
    result = record["result"]
    rows = []
    for row in value_in(record, "result", "rows"):
        sizes = {f"GiB a {where}": row[f"{key}_bytes"] / GIB for where, key in (("GPU", "device"), ("host", "host"))}
        hours = row["seconds"] / 3600 if row["fits"] else "does not fit"
        rows.append({"model": row["model"], "GPUs": row["gpus"], "repair": row["repair"], **sizes,
                     "GiB on disk": row["disk_bytes"] / GIB, "hours": hours})  # fmt: skip
    formats = {"model": "", "GPUs": "d", "repair": "", "GiB a GPU": ".0f", "GiB a host": ".0f", "GiB on disk": ".0f"}
    has = number_in(record, "result", "device_bytes") / GIB
    caption = (
        f"Reckoned, not measured: all blocks of a model repaired on {result['windows']} windows of {result['seq_len']}"
        f" tokens at tp={result['tp']}, on {result['gpu']} GPUs of {has:.0f} GiB at half their peak in float32."
    )
    return Table("budget", caption, rows, formats | {"hours": ".1f"}, [record])
