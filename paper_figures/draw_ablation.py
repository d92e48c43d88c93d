"""What each step of a repair gives, the paper's table 1, and what repairs would take: records of `ablate`, `table1`
and `budget`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from spd.report import canvas, finish
from spd.tables import Record, Table, column, machine, model_of, newest, number, value

GIB = 2**30


def tables(records: Sequence[Record]) -> list[Table]:
    """One table of all `ablate` records and one of all `table1` records (of one model, tp, text and plan the newest),
    and one of the newest `budget` record."""
    ablated, compared, budget = _newest(records, "ablate"), _newest(records, "table1"), newest(records, "budget")
    makers = ((_ablation, ablated), (_table1, compared), (_budget, budget))
    return [make(chosen) for make, chosen in makers if chosen]


def _newest(records: Sequence[Record], command: str) -> dict[str, Record]:
    """The newest record of each model, text, tp and number of dropped blocks, under these words."""
    found = {}
    for record in (r for r in records if r["command"] == command):
        text, letters = Path(value(record, "data", "text")).stem, value(record, "plan").split()
        dropped, blocks = letters.count("DF"), len(letters)
        where = "all blocks" if dropped == blocks else f"{dropped} of {blocks} blocks"
        found[f"{model_of(record)}, {text}, tp={value(record, 'tp')}, {where}"] = record
    return found


def _windows(chosen: Mapping[str, Record]) -> str:
    parts = []
    for subject, record in chosen.items():
        calibration, evaluation = (number(record, "result", "windows", key) for key in ("calibration", "evaluation"))
        seq_len = value(record, "data", "seq_len")
        parts.append(f"{subject}: {calibration} calibration and {evaluation} evaluation windows of {seq_len} tokens")
    machines = ", ".join(dict.fromkeys(map(machine, chosen.values())))
    return f"{'; '.join(parts)}. {len(chosen)} records; {machines}."


def _ablation(chosen: Mapping[str, Record]) -> Table:
    columns = {}
    for subject, record in chosen.items():
        names = [variant["name"] for variant in value(record, "result", "variants")]
        columns[subject] = pd.Series(column(record, "variants", "perplexity"), names)
        columns[f"{subject}: recovered %"] = 100 * pd.Series(column(record, "variants", "recovered"), names)
        columns[f"{subject}: seconds"] = pd.Series(column(record, "variants", "seconds"), names)
    caption = (
        "What each step of a repair gives: perplexity with attention syncs dropped, on text the repairs have not seen;"
        " the share of the loss (in nats) that zero-shot adds and the repair takes back; seconds it took."
        f" {_windows(chosen)}"
    )
    frame = pd.concat(columns, axis=1).rename_axis("repair").reset_index()
    return Table("ablation", caption, frame, list(chosen.values()), ".2f")


def _table1(chosen: Mapping[str, Record]) -> Table:
    rows = []
    for subject, record in chosen.items():
        row = {"model": subject}
        for kind in ("residual", "bias"):
            for design, perplexity in zip(
                value(record, "result", kind), column(record, kind, "perplexity"), strict=True
            ):
                name = design["design"]
                row[f"{kind}: {name}" if name == "no SPD" else name] = perplexity
        rows.append(row)
    caption = (
        "The paper's table 1 on small real models: perplexity where an SPD block adds its attention output (residual)"
        " before the one all-reduce, as the method does, or after it, so that it stays with its shard for good; and"
        " where the output projection's bias is added after it, as the method does, or before it, tp times. The biases"
        " are the values' means, taken from the values and given back after the projection: the same function."
    )
    return Table("table1", caption, pd.DataFrame(rows), list(chosen.values()), ".2f")


def _budget(record: Record) -> Table:
    result = record["result"]
    rows = pd.DataFrame(value(record, "result", "rows"))
    sizes = {"GiB a GPU": "device_bytes", "GiB a host": "host_bytes", "GiB on disk": "disk_bytes"}
    frame = rows[["model", "gpus", "repair"]].rename(columns={"gpus": "GPUs"})
    frame = frame.assign(**{words: rows[key] / GIB for words, key in sizes.items()})
    frame["hours"] = (rows["seconds"] / 3600).map("{:.1f}".format).where(rows["fits"], "does not fit")
    caption = (
        f"Reckoned, not measured: all blocks of a model repaired on {result['windows']} windows of {result['seq_len']}"
        f" tokens at tp={result['tp']}, on {result['gpu']} GPUs of {number(record, 'result', 'device_bytes') / GIB:.0f}"
        f" GiB at half their peak, products of repairs in {result['matmul'].upper()}."
    )
    return Table("budget", caption, frame, [record], ".0f")


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Of all `ablate` records the share of the loss that each repair takes back."""
    chosen = _newest(records, "ablate")
    if not chosen:
        return {}
    table = _ablation(chosen)
    frame = table.frame.iloc[1:]  # without the model whose sync points are all kept
    recovered = frame.set_index("repair").filter(regex=": recovered %$").rename(columns=lambda c: c.rsplit(":", 1)[0])
    points = recovered.melt(var_name="on", value_name="recovered", ignore_index=False).reset_index()
    caption = (
        "Share of the loss that dropping adds (in nats) and that a repair takes back, on text that it has not seen;"
        f" right is better, 100 % is the model with every sync point kept. {_windows(chosen)}"
    )
    figure = canvas(8.2, 2.2 + 0.34 * len(frame))
    ax = figure.subplots()
    sns.stripplot(points, x="recovered", y="repair", hue="on", dodge=True, jitter=False, palette="colorblind", ax=ax)
    ax.axvline(0, color="0.25", linewidth=0.8)
    ax.axvline(100, color="0.25", linewidth=0.8, linestyle="--")
    ax.set(xlabel="loss taken back (%)", ylabel="", xlim=(max(ax.get_xlim()[0], -60), 106))
    ax.grid(visible=True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    ax.get_legend().remove()
    return {"ablation": finish(figure, caption, table.records)}
