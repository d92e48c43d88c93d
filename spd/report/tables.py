"""Tables as functions of records, for reading (Markdown, terminal) and for computing (CSV)."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spd.errors import SPDError
from spd.records import load_records
from spd.report.ablation import ablation_tables
from spd.report.accuracy import accuracy_tables
from spd.report.budget_tables import budget_tables
from spd.report.calibration import calibration_tables
from spd.report.captions import perplexity_caption, rates_words, sensitivity_caption, ttft_caption
from spd.report.link_figures import link_tables
from spd.report.method_figures import method_tables
from spd.report.peers import peer_tables
from spd.report.predicted_tables import predicted_tables
from spd.report.records import (
    Record,
    Sources,
    block_classes,
    choose,
    curves_of,
    full_perplexity,
    numbers_in,
    provenance,
    timings_of,
    value_in,
)
from spd.report.table import Table, cell


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of `load_records`' records: sensitivity, perplexity, TTFT, accuracy, predictions. Raises SPDError."""
    found = []
    for sources in choose(records)[0]:
        if sources.sensitivity:
            found.append(_sensitivity_table(sources))
        if sources.sweeps:
            found.append(_perplexity_table(sources))
        if sources.bench:
            found.append(_ttft_table(sources))
    found += link_tables(records) + ablation_tables(records) + accuracy_tables(records) + method_tables(records)
    return (
        found + peer_tables(records) + predicted_tables(records) + calibration_tables(records) + budget_tables(records)
    )


def _sensitivity_table(sources: Sources) -> Table:
    record = sources.sensitivity
    points, nats = numbers_in(record, "result", "sensitivity"), numbers_in(record, "result", "sensitivity_nats")
    if len(points) != len(nats):
        raise SPDError(f"Record {record['id']} has {len(points)} sensitivities but {len(nats)} in nats.")
    rows = [
        {"block": i, "sensitivity": s, "sensitivity_nats": n} for i, (s, n) in enumerate(zip(points, nats, strict=True))
    ]
    formats = {"block": "d", "sensitivity": ".4f", "sensitivity_nats": ".5f"}
    if sources.plan is not None:
        classes, dropped = block_classes(sources, len(points))
        treatments = [value_in(sources.plan, "result", "treatments", i) for i in range(len(points))]
        for row, name, treatment, inside in zip(rows, classes, treatments, dropped, strict=True):
            row |= {"class": name, "treatment": treatment, "dropped": "yes" if inside else "no"}
        formats |= {"class": "", "treatment": "", "dropped": ""}
    used = [r for r in (record, sources.plan) if r]
    return Table("sensitivity" + sources.suffix, sensitivity_caption(sources), rows, formats, used)


def _perplexity_table(sources: Sources) -> Table:
    curves = curves_of(sources.sweeps)
    full = full_perplexity(curves, sources.sweeps[-1])
    rows = [
        {"strategy": name, **point, "increase_percent": 100 * (point["perplexity"] / full - 1)}
        for name, points in curves.items()
        for point in points
    ]
    formats = {"strategy": "", "blocks": "d", "percent": ".1f", "perplexity": ".4f", "nats": ".4f"}
    formats |= {"increase_percent": "+.2f", "plan": ""}
    return Table("perplexity" + sources.suffix, perplexity_caption(sources), rows, formats, sources.sweeps)


def _ttft_table(sources: Sources) -> Table:
    rows = timings_of(sources.bench)
    times = ["ttft_median_ms", "ttft_spread_ms", "ttft_min_ms", "compute_ms", "real_ms", "emulated_ms"]
    formats = {"blocks_dropped": "d", "percent": ".1f", **dict.fromkeys(times, ".3f"), "repeats": "d", "count": "d"}
    formats |= {"bytes": "d", "reduction": ".4f", "speedup": ".4f"}
    if any("tpot_median_ms" in row for row in rows):
        formats |= {"tpot_median_ms": ".3f", "tpot_spread_ms": ".3f"}
    caption = ttft_caption(sources) + " reduction = 1 - t_p/t_0, speedup = t_0/t_p."
    bounded = {"saved_share": ".3f", "formula_ms": ".3f", "ttft_of_bound": ".3f", "tpot_of_bound": ".3f"}
    found = {key: form for key, form in bounded.items() if any(key in row for row in rows)}
    if found:
        formats |= found
        caption += " " + rates_words(sources.bench)
    return Table("ttft" + sources.suffix, caption, rows, {**formats, "plan": ""}, [sources.bench])


def csv_of(table: Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.formats)
    writer.writerows([row.get(column, "") for column in table.formats] for row in table.rows)
    return text.getvalue().encode()


TITLE = "# Tables\n\nMade from the records named under each table; nothing is typed in.\n"


def markdown(found: Sequence[Table], title: str = TITLE) -> str:
    parts = [title]
    for table in found:
        source = f"\n\nSource: {provenance(table.records)}." if table.records else ""
        caption = f"{table.caption}\n\n" if table.caption else ""
        parts.append(f"## {table.name}\n\n{caption}{table.markdown()}{source}\n")
    return "\n".join(parts)


def embed(page: str, found: Sequence[Table]) -> str:
    """`page` with the tables that it marks by `<!-- table NAME -->` and `<!-- end -->` put between the two.

    Raises:
        SPDError: it marks none of them.
    """
    embedded = 0
    for table in found:
        marked = re.compile(rf"(<!-- table {re.escape(table.name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda m, t=table: f"{m[1]}\n{t.markdown(t.essential)}\n\n{m[2]}", page)
        embedded = embedded or count
    if not embedded:
        names = ", ".join(table.name for table in found)
        raise SPDError(f"The page has no place marked for a table: <!-- table NAME -->, NAME one of {names}.")
    return page


# What fits 80 columns; the CSV has all of it, under full names.
HEADINGS = {
    "blocks_dropped": "blocks",
    "percent": "%",
    "ttft_median_ms": "TTFT\nms",
    "ttft_spread_ms": "IQR\nms",
    "compute_ms": "compute\nms",
    "real_ms": "real\nms",
    "emulated_ms": "link\nms",
    "tpot_median_ms": "TPOT\nms",
    "sensitivity_nats": "nats",
    "saved_share": "saved/\nremoved",
    "transformers_ttft_ms": "transf.\nTTFT ms",
    "transformers_tpot_ms": "transf.\nTPOT ms",
    "spd_ttft_ms": "spd\nTTFT ms",
    "spd_tpot_ms": "spd\nTPOT ms",
    "increase_percent": "increase\n%",
    "reduction": "reduc-\ntion",
    "difference": "differ-\nence",
    "speedup": "speed-\nup",
}
TERMINAL_LEAVES_OUT = {
    "saved_share",
    "threads",
    "logits_differ",
    "ttft_ratio_of_least",
    "tpot_ratio_of_least",
    "formula_ms",
    "ttft_of_bound",
    "tpot_of_bound",
    "spd_ttft_iqr",
    "spd_tpot_iqr",
    "transformers_ttft_iqr",
    "transformers_tpot_iqr",
    "plan",
    "ttft_min_ms",
    "repeats",
    "count",
    "bytes",
    "tpot_spread_ms",
}
TERMINAL_LEAVES_OUT |= {"stderr", "difference_stderr", "lost", "gained", "chance"}  # of accuracies


def print_tables(records: Iterable[Path | str], console: Any = None) -> None:
    """Print the tables of record files on a rich console (standard error when none is given). Raises SPDError."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    console = console or Console(stderr=True)
    for table in tables(load_records(records)):
        shown = [column for column in table.formats if column not in TERMINAL_LEAVES_OUT]
        rich = RichTable(
            title=table.name, caption=table.caption, caption_justify="left", box=SIMPLE, collapse_padding=True
        )
        for column in shown:
            heading = HEADINGS.get(column, column.replace("_", "\n"))
            rich.add_column(heading, justify="right" if table.formats[column] else "left")
        for row in table.rows:
            rich.add_row(*(cell(row.get(column), table.formats[column]) for column in shown))
        console.print(rich)
