"""Records to tables of exact numbers: sensitivity, perplexity, accuracy on tasks, time to first token.

A number that is missing in a record is an error, never 0. Each `..._table` takes `load_records`' records of one model.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from spd.errors import SPDError

Record = Mapping[str, Any]
CLASSES = ("ISB", "SB", "ESB")


class Table(NamedTuple):
    """Exact numbers, what is said about them, and the records they are from."""

    name: str
    caption: str
    frame: pd.DataFrame
    records: Sequence[Record]
    essential: Sequence[str] = ()  # the columns for a page of text; none named: all
    form: str = ".5g"  # of numbers that are not whole, for reading

    def markdown(self, columns: Sequence[str] = ()) -> str:
        """Rounded for reading, with all columns or some."""
        shown = self.frame[list(columns) or list(self.frame)].astype(object)  # so that whole numbers stay whole
        words = [i for i, name in enumerate(shown) if shown[name].map(lambda cell: isinstance(cell, str)).any()]
        shown = shown.where(shown.notna(), None)
        return shown.to_markdown(index=False, floatfmt=self.form, missingval="", disable_numparse=words)


# ---------------------------------------------------------------- records


def value(record: Record, *keys: str | int) -> Any:
    """What stands at `keys` in a record; an error when nothing does."""
    found: Any = record
    for depth, key in enumerate(keys, 1):
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            found = None
        if found is None:
            raise SPDError(f"Record {record['id']} has no {'.'.join(map(str, keys[:depth]))}, which the report needs.")
    return found


def number(record: Record, *keys: str | int) -> float:
    found = value(record, *keys)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise SPDError(f"Record {record['id']} has {found!r} as {'.'.join(map(str, keys))} where a number is needed.")
    return found


def places(record: Record, *keys: str) -> range:
    """The indices of a list in a record."""
    found = value(record, *keys)
    if not isinstance(found, list) or not found:
        raise SPDError(f"Record {record['id']} has no list of values as {'.'.join(keys)}.")
    return range(len(found))


def numbers(record: Record, *keys: str) -> list[float]:
    return [number(record, *keys, i) for i in places(record, *keys)]


def newest(records: Sequence[Record], command: str) -> Record | None:
    """Of records, oldest first, the last of a command; of `eval` the last with tasks."""
    return next((r for r in reversed(records) if r["command"] == command and _useful(r)), None)


def _useful(record: Record) -> bool:
    return record["command"] != "eval" or "tasks" in record["result"]


def model_of(record: Record) -> str:
    return Path(str(value(record, "model", "name"))).name


def named(record: Record) -> str:
    """The model, and that its weights are random where they are."""
    only = record["model"].get("shape_only") or "(random weights)" in model_of(record)
    return model_of(record).removesuffix(" (random weights)") + (" (random weights, shape only)" if only else "")


def subject(record: Record) -> str:
    """The model and its degree."""
    return f"{named(record)} at tp={value(record, 'tp')}"


def machine(record: Record) -> str:
    """GPUs, or the CPU and its cores."""
    gpus = [f"{len(list(same))} × {name}" for name, same in groupby(sorted(record["hardware"].get("gpus") or []))]
    return ", ".join(gpus) or f"{value(record, 'hardware', 'cpu')}, {value(record, 'hardware', 'cores')} cores"


def provenance(records: Sequence[Record]) -> str:
    """Ids and commits of records, as written into every file made of them."""
    git = {r["git"]["commit"] + (" (with local changes)" if r["git"]["dirty"] else "") for r in records if r.get("git")}
    ids = ", ".join(r["id"] for r in records)
    return f"records {ids}; commit {', '.join(sorted(git)) or 'unknown'}" if ids else "drawn from no record"


def data_words(record: Record) -> str:
    text, seq_len = Path(str(value(record, "data", "text"))).name, value(record, "data", "seq_len")
    tokens, windows = number(record, "result", "tokens"), number(record, "result", "windows")
    return f"{tokens:,} predictions in {windows:,} windows of {seq_len} tokens of {text}"


def by_subject(records: Sequence[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """Records of each (model's name, fingerprint, tp), oldest first."""
    found: dict[tuple[str, str, int], list[Record]] = {}
    for r in records:
        if r.get("model") and r.get("tp") and _useful(r):
            found.setdefault((model_of(r), str(value(r, "model", "fingerprint")), r["tp"]), []).append(r)
    return found


def suffixed(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """`by_subject` under the ends of its files' names: `-MODEL` of several models, `-tpN` where degrees meet."""
    subjects = by_subject(records)
    commands = {key: {r["command"] for r in mine} & set(MAKERS) for key, mine in subjects.items()}
    models = {key[:2] for key in subjects if commands[key]}
    found = []
    for key in filter(commands.get, subjects):
        name, print_, tp = key
        slug = "-" + re.sub(r"[^\w.-]+", "-", name)
        if [other for other, _ in models].count(name) > 1:
            slug += "-" + re.sub(r"[^0-9a-zA-Z]", "", print_)[:8]
        degrees = [other for other in subjects if other[:2] == key[:2] and commands[key] & commands[other]]
        found.append((slug * (len(models) > 1) + f"-tp{tp}" * (len(degrees) > 1), subjects[key]))
    return found


# ---------------------------------------------------------------- tables


def tables(records: Sequence[Record]) -> list[Table]:
    """Of `load_records`' records a table of each kind, model and degree."""
    found = []
    for suffix, mine in suffixed(records):
        made = [make(mine) for command, make in MAKERS.items() if newest(mine, command)]
        made += [accuracy_table(mine)] if sweeps_of(mine, tasks=True) else []
        found += [table._replace(name=table.name + suffix) for table in made]
    return found


def sensitivity_table(records: Sequence[Record]) -> Table:
    """Rise of the perplexity a block, with the classes of the newest plan if it was made of these sensitivities."""
    record, plan = newest(records, "sensitivity"), newest(records, "plan")
    points, nats = numbers(record, "result", "sensitivity"), numbers(record, "result", "sensitivity_nats")
    if len(points) != len(nats):
        raise SPDError(f"Record {record['id']} has {len(points)} sensitivities but {len(nats)} in nats.")
    frame = pd.DataFrame({"block": range(len(points)), "sensitivity": points, "sensitivity_nats": nats})
    words, used = "", [record]
    if plan is not None and plan["result"].get("sensitivity") == points:
        classes, policies, treatments = (value(plan, "result", key) for key in ("classes", "policies", "treatments"))
        if not len(classes) == len(policies) == len(points) or set(classes) - set(CLASSES):
            raise SPDError(f"Record {plan['id']} does not give each of the {len(points)} blocks one class and policy.")
        dropped = ["yes" if policy[0] == "drop" else "no" for policy in policies]
        frame = frame.assign(**{"class": classes, "treatment": treatments, "dropped": dropped})
        budget, tau1, tau2 = (number(plan, "result", *key) for key in (("budget", "blocks"), ("tau1",), ("tau2",)))
        words = f"; colours are the plan's classes (τ₁ = {tau1:g}, τ₂ = {tau2:g}), pale bars blocks outside its budget"
        words, used = f"{words} of {budget}", [record, plan]
    caption = (
        "Rise of the perplexity when one more block drops its attention sync point, the later blocks having dropped"
        f" theirs and the earlier ones none{words}. {subject(record)}; {data_words(record)}; {machine(record)}."
    )
    return Table("sensitivity", caption, frame, used)


def sweeps_of(records: Sequence[Record], tasks: bool = False) -> list[Record]:
    """Those on the newest one's data, or, with `tasks`, with the newest one's questions; none of no sweep."""
    found = [r for r in records if r["command"] == "sweep" and (not tasks or "tasks" in value(r, "result", "curve", 0))]
    key = _questions if tasks else lambda record: record.get("data")
    return [r for r in found if key(r) == key(found[-1])]


def _questions(record: Record) -> dict[str, tuple]:
    at = partial(value, record, "result", "curve", 0, "tasks")
    return {name: (at(name, "n"), at(name, "source")) for name in at()}


def curve_of(sweeps: Sequence[Record], read: Callable[[Record, int], dict]) -> pd.DataFrame:
    """A row a strategy and percentage, of two records the newer's, with what `read(record, its place)` gives."""
    rows: dict[str, list] = {}
    for record in sweeps:
        mine: dict[str, list] = {}
        for i in places(record, "result", "curve"):
            at = partial(number, record, "result", "curve", i)
            name, plan = (value(record, "result", "curve", i, key) for key in ("strategy", "plan"))
            row = {"strategy": name, "blocks": int(at("blocks")), "percent": at("percent")}
            mine.setdefault(name, []).append(row | read(record, i) | {"plan": plan})
        rows |= mine
    return pd.DataFrame([row for points in rows.values() for row in sorted(points, key=lambda row: row["blocks"])])


def perplexity_table(records: Sequence[Record]) -> Table:
    sweeps = sweeps_of(records)
    record, keys = sweeps[-1], ("perplexity", "nats")
    frame = curve_of(sweeps, lambda source, i: {key: number(source, "result", "curve", i, key) for key in keys})
    full = frame.loc[frame["blocks"] == 0, "perplexity"]
    if full.empty:
        raise SPDError(f"Record {record['id']} has no point with 0 blocks dropped to compare with.")
    frame.insert(len(frame.columns) - 1, "increase_percent", 100 * (frame["perplexity"] / full.iloc[0] - 1))
    caption = (
        "Perplexity against the share of blocks that drop their attention sync point; dashed: every sync point kept."
        f" {subject(record)}; {data_words(record)}; {machine(record)}."
    )
    return Table("perplexity", caption, frame, sweeps)


def scores(record: Record, *keys: str | int) -> dict[str, dict]:
    """Accuracies at `keys` in a record, task by task and, where there is one, the `average`; each in one flat row."""
    found = {name: _score(record, *keys, "tasks", name) for name in value(record, *keys, "tasks")}
    if "average" in value(record, *keys):
        of = [found[name] for name in value(record, *keys, "average", "tasks")]
        chance, questions = sum(task["chance"] for task in of) / len(of), sum(task["n"] for task in of)
        found["average"] = _score(record, *keys, "average") | {"chance": chance, "n": questions}
    return found


def _score(record: Record, *keys: str | int) -> dict:
    found = value(record, *keys)
    row = {key: found[key] for key in ("n", "chance", "shots", "source") if found.get(key) is not None}
    row |= {key: number(record, *keys, key) for key in ("acc", "stderr")}
    row |= {} if found.get("acc_norm") is None else {"acc_norm": found["acc_norm"]}
    if "compared" in found:
        at = partial(number, record, *keys, "compared")
        row |= {key: at(key) for key in ("acc_full", "difference")} | {"difference_stderr": at("stderr")}
        row |= {key: at(key) for key in ("lost", "gained", "p")}
    return row


def asked_words(found: Mapping[str, Mapping], record: Record) -> str:
    shots = {name: f", {row['shots']} shots" if row.get("shots") else "" for name, row in found.items()}
    tasks = [f"{name} {found[name]['n']} ({found[name]['source']}{shots[name]})" for name in found if name != "average"]
    return f"Questions: {', '.join(tasks)}. {subject(record)}; {machine(record)}."


def accuracy_table(records: Sequence[Record]) -> Table:
    """A row a strategy and percentage: accuracy of every task, and of their average what the full model is beside."""
    sweeps = sweeps_of(records, tasks=True)

    def read(record: Record, i: int) -> dict:
        found = scores(record, "result", "curve", i)
        average, of_it = found.get("average", {}), ("stderr", "difference", "difference_stderr", "lost", "gained", "p")
        return {task: score["acc"] for task, score in found.items()} | {k: average[k] for k in of_it if k in average}

    caption = (
        "Accuracy (acc, as the harness defines it) of each task and their average, mmlu apart; stderr: the average's."
        " Against the model with every sync point kept, on the same questions: difference of the averages and its"
        " standard error, answers lost and gained, and McNemar's exact two-sided p of these."
        f" {asked_words(scores(sweeps[-1], 'result', 'curve', 0), sweeps[-1])}"
    )
    return Table("accuracy", caption, curve_of(sweeps, read), sweeps)


def tasks_table(records: Sequence[Record]) -> Table:
    record = newest(records, "eval")
    found = scores(record, "result")
    frame = pd.DataFrame([{"task": name, **row} for name, row in found.items()]).drop(columns=["source", "shots"])
    caption = (
        f"Accuracy of plan {record['plan']} task by task. lost, gained: answers flipped against the model with every"
        f" sync point kept; p: McNemar's exact test of them. {asked_words(found, record)}"
    )
    return Table("tasks", caption, frame, [record])


def timings(record: Record) -> pd.DataFrame:
    """A row a plan of a bench record, fewest dropped first: times in ms, reduction 1 - t_p/t_0, speedup t_0/t_p."""
    rows = sorted((_timing(record, i) for i in places(record, "result", "plans")), key=lambda r: r["blocks_dropped"])
    if rows[0]["blocks_dropped"]:
        raise SPDError(f"Record {record['id']} has no plan with 0 blocks dropped to compare with.")
    full = next((row for row in rows if set(row["plan"].split()) == {"FF"}), rows[0])
    rows = [full, *(row for row in rows if row is not full)]
    base, frame = full["ttft_median_ms"], pd.DataFrame(rows)
    frame = frame.assign(reduction=1 - frame["ttft_median_ms"] / base, speedup=base / frame["ttft_median_ms"])
    return frame[[*frame.columns.drop("plan"), "plan"]]


def _timing(record: Record, i: int) -> dict:
    at, plan = partial(number, record, "result", "plans", i), value(record, "result", "plans", i)
    letters, dropped = value(record, "result", "plans", i, "plan"), int(at("blocks_dropped"))
    row = {"plan": letters, "blocks_dropped": dropped, "percent": 100 * dropped / len(letters.split())}
    row |= {f"ttft_{key}_ms": at("ttft_ms", key) for key in ("median", "spread", "min")}
    row["repeats"], points = int(at("ttft_ms", "repeats")), value(record, "result", "plans", i, "collectives")
    row |= {f"{kind}_ms": sum(at("collectives", p, f"{kind}_ms") for p in points) for kind in ("real", "emulated")}
    row["compute_ms"] = row["ttft_median_ms"] - row["real_ms"] - row["emulated_ms"]
    if row["compute_ms"] < 0:
        raise SPDError(f"Record {record['id']}, plan {i}: its communication takes longer than its whole median TTFT.")
    row |= {key: int(sum(at("collectives", point, key) for point in points)) for key in ("count", "bytes")}
    decoded = plan.get("tpot_ms") is not None
    row |= {f"tpot_{key}_ms": at("tpot_ms", key) for key in ("median", "spread") if decoded}
    row |= {"saved_share": at("saved", "share")} if "saved" in plan else {}
    if "floor" in plan:
        silent = number(record, "result", "bounds", "no_communication", "ttft_ms", "median")
        row["formula_ms"] = silent + at("floor", "ttft_communication_ms")
        for kind in ("ttft", "tpot")[: 1 + decoded]:
            row[f"{kind}_of_bound"] = at("floor", f"{kind}_ms") / at(f"{kind}_ms", "median")
    return row


def timing_words(record: Record) -> str:
    """The setting of a bench record but for its link: degree, processes and how they talk, batch, prompt."""
    tp, world, batch, prompt = (number(record, "result", key) for key in ("tp", "world", "batch", "prompt_len"))
    through = " (shared memory)" if record["result"].get("transport") == "shared-memory" else ""
    return f"tp={tp} on {world} process{'es' * (world != 1)}{through}, batch {batch}, {prompt} prompt tokens"


def setting_words(record: Record) -> str:
    link = record["result"].get("link")
    nccl = "".join(f", {name}={setting}" for name, setting in (record["result"].get("nccl") or {}).items())
    link = f"emulated link {link}" if link else "no emulated link"
    return f"{named(record)}, {timing_words(record)}, {link}{nccl}"


def ttft_table(records: Sequence[Record]) -> Table:
    record = newest(records, "bench")
    frame = timings(record)
    repeats = "/".join(map(str, sorted(set(frame["repeats"]))))
    parts = ", real collectives and the emulated link" if frame["emulated_ms"].any() else " and collectives"
    formula = "; diamonds: no communication, measured, plus collectives by formula" if "formula_ms" in frame else ""
    words = (
        f"Median time to first token of {repeats} runs (error bar: interquartile range), split into computation{parts}"
        f"{formula}. {setting_words(record)}; {machine(record)}. reduction = 1 - t_p/t_0, speedup = t_0/t_p."
    )
    if "saved_share" in frame or "formula_ms" in frame:
        flops, read = (number(record, "result", "rates", key) for key in ("matrix_gflops", "memory_gb_per_s"))
        sums = number(record, "result", "rates", "all_reduce", "ttft_ms")
        words += (
            " saved_share = TTFT saved / time of the all-reduces removed, when all are kept; formula_ms = no"
            " communication, measured, + collectives by formula; of_bound = what the machine's rates allow / measured:"
            f" a process multiplies matrices at {flops:.0f} GFLOP/s, reads weights at {read:.1f} GB/s, and an idle"
            f" all-reduce of the prompt's size takes {sums:.2f} ms, the emulated link aside."
        )
    return Table("ttft", words, frame, [record])


MAKERS = {"sensitivity": sensitivity_table, "sweep": perplexity_table, "bench": ttft_table, "eval": tasks_table}
