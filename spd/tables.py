"""Records to tables of exact numbers: sensitivity, perplexity, accuracy on tasks, time to first token.

A number that is missing in a record is an error, never 0. Each `..._table` takes `load_records`' records of one model.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from spd.errors import SPDError

Record = Mapping[str, Any]
CLASSES = {"ISB": "ISB (in-sensitive)", "SB": "SB (sensitive)", "ESB": "ESB (extremely sensitive)"}
# Columns of tables, and where in a record their numbers stand: of a task or average, and of a point of a sweep.
SCORES = {"acc": "acc", "stderr": "stderr"}
COMPARED = {
    "acc_full": "compared.acc_full",
    "difference": "compared.difference",
    "difference_stderr": "compared.stderr",
    "lost": "compared.lost",
    "gained": "compared.gained",
    "p": "compared.p",
}
AVERAGED = {"average": "average.acc", "stderr": "average.stderr"}
AVERAGED |= {key: f"average.{place}" for key, place in COMPARED.items() if key != "acc_full"}


class Table(NamedTuple):
    """Exact numbers, what is said about them, and the records they are from."""

    name: str
    caption: str
    frame: pd.DataFrame
    records: Sequence[Record]
    form: str = ".5g"  # of numbers that are not whole, for reading
    columns: str = ""  # what is to be said of columns that a figure does not show

    def markdown(self) -> str:
        """Rounded for reading."""
        shown = self.frame.astype(object)  # so that whole numbers stay whole
        words = [i for i, name in enumerate(shown) if shown[name].map(lambda cell: isinstance(cell, str)).any()]
        shown = shown.where(shown.notna(), None)
        return shown.to_markdown(index=False, floatfmt=self.form, missingval="", disable_numparse=words)


def tables(records: Sequence[Record]) -> list[Table]:
    """Of `load_records`' records a table of each kind, model and degree."""
    return [t._replace(name=t.name + end) for end, mine in by_subject(records) for t in tables_of(mine).values()]


def tables_of(records: Sequence[Record]) -> dict[str, Table]:
    """Of the records of one model a table of each kind, by its kind."""
    made = [make(records) for command, make in MAKERS.items() if newest(records, command)]
    made += [accuracy_table(records)] if sweeps_of(records, tasks=True) else []
    return {table.name: table for table in made}


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


def column(record: Record, key: str, *inner: str) -> list[float]:
    """Of each item of the list `key` of a result the number at `inner`."""
    found = value(record, "result", key)
    if not isinstance(found, list) or not found:
        raise SPDError(f"Record {record['id']} has no list of values as result.{key}.")
    return [number(record, "result", key, i, *inner) for i in range(len(found))]


def numbers(record: Record, columns: Mapping[str, str], *keys: str | int) -> dict[str, float]:
    """Under the names of `columns` the numbers that stand, inside what stands at `keys`, at its places (`a.b`)."""
    return {name: number(record, *keys, *place.split(".")) for name, place in columns.items()}


def of_command(records: Iterable[Record], command: str) -> list[Record]:
    """Those of a command with what is tabled of it: no scores of one pass, no shard timed by itself."""
    needed = {"eval": "tasks", "sensitivity": "sensitivity", "bench": "plans"}.get(command)
    return [r for r in records if r["command"] == command and (needed is None or needed in r["result"])]


def newest(records: Iterable[Record], command: str) -> Record | None:
    """Of records, oldest first, the last one of a command."""
    return next(reversed(of_command(records, command)), None)


def by_subject(records: Sequence[Record], by: Sequence[str] = ("model", "tp")) -> list[tuple[str, list[Record]]]:
    """The records of each model and degree under the end of their files' names: `-MODEL` of several models, `-tpN` of
    a model with several degrees of one command; with `by=["model"]` of each model."""
    rows = [
        (re.sub(r"[^\w.-]+", "-", model_of(r)), str(value(r, "model", "fingerprint")), r["tp"], r["command"], r)
        for r in records
        if r.get("model") and r.get("tp")
    ]
    found = pd.DataFrame(rows, columns=["model", "weights", "tp", "command", "record"], dtype=object)
    found.loc[found.groupby("model")["weights"].transform("nunique") > 1, "model"] += "-" + found["weights"].str[:8]
    tabled = found.loc[[r["command"] in MAKERS and newest([r], r["command"]) is not None for r in found["record"]]]
    degrees = tabled.groupby(["model", "command"])["tp"].nunique().groupby("model").max()
    subjects = []
    for (model, *tp), _ in tabled.groupby(list(by), sort=False):
        end = f"-{model}" * (len(degrees) > 1) + "".join(f"-tp{n}" for n in tp if degrees[model] > 1)
        mine = (found["model"] == model) & found["tp"].isin(tp or found["tp"])
        subjects.append((end, list(found.loc[mine, "record"])))
    return subjects


# ---------------------------------------------------------------- words for captions


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
    """The text that perplexities are of."""
    text, seq_len = Path(str(value(record, "data", "text"))).name, value(record, "data", "seq_len")
    tokens, windows = number(record, "result", "tokens"), number(record, "result", "windows")
    return f"{tokens:,} predictions in {windows:,} windows of {seq_len} tokens of {text}"


def asked_words(record: Record, tasks: Mapping[str, Mapping]) -> str:
    """Which questions of which tasks were asked of which model."""
    shots = {name: f", {task['shots']} shots" if task.get("shots") else "" for name, task in tasks.items()}
    words = [f"{name} {task['n']} ({task['source']}{shots[name]})" for name, task in tasks.items()]
    return f"Questions: {', '.join(words)}. {subject(record)}; {machine(record)}."


def timing_words(record: Record) -> str:
    """The setting of a bench record but for its link: model, degree, processes and how they talk, batch, prompt."""
    tp, world, batch, prompt = (number(record, "result", key) for key in ("tp", "world", "batch", "prompt_len"))
    through = " (shared memory)" if record["result"].get("transport") == "shared-memory" else ""
    processes = f"tp={tp} on {world} process{'es' * (world != 1)}{through}"
    return f"{named(record)}, {processes}, batch {batch}, {prompt} prompt tokens"


def link_words(record: Record) -> str:
    link, nccl = record["result"].get("link"), record["result"].get("nccl") or {}
    emulated = f"emulated link {link}" if link else "no emulated link"
    return ", ".join([emulated, *(f"{name}={setting}" for name, setting in nccl.items())])


# ---------------------------------------------------------------- sensitivity, perplexity


def sensitivity_table(records: Sequence[Record]) -> Table:
    """Rise of the perplexity a block, with the classes of the newest plan if it was made of these sensitivities."""
    record, plan = newest(records, "sensitivity"), newest(records, "plan")
    points, nats = column(record, "sensitivity"), column(record, "sensitivity_nats")
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
    return {name: (task["n"], task["source"]) for name, task in record["result"]["curve"][0]["tasks"].items()}


def curve_of(sweeps: Sequence[Record], columns: Mapping[str, str]) -> pd.DataFrame:
    """The points of sweeps, of each strategy the newest sweep's, fewest blocks first.

    `columns` are further numbers of a point, by their name here and their place there, as `average.acc`.
    """
    rows = []
    for age, sweep in enumerate(sweeps):
        for i in range(len(column(sweep, "curve", "percent"))):
            row = {key: value(sweep, "result", "curve", i, key) for key in ("strategy", "blocks", "percent")}
            row |= numbers(sweep, columns, "result", "curve", i)
            rows.append(row | {"plan": value(sweep, "result", "curve", i, "plan"), "sweep": age})
    frame = pd.DataFrame(rows)
    frame = frame[frame["sweep"] == frame.groupby("strategy")["sweep"].transform("max")]
    lines = frame.drop(columns="sweep").sort_values("blocks", kind="stable").groupby("strategy", sort=False)
    return pd.concat([line for _, line in lines], ignore_index=True)


def perplexity_table(records: Sequence[Record]) -> Table:
    sweeps = sweeps_of(records)
    record, frame = sweeps[-1], curve_of(sweeps, {key: key for key in ("perplexity", "nats")})
    full = frame.loc[frame["blocks"] == 0, "perplexity"]
    if full.empty:
        raise SPDError(f"Record {record['id']} has no point with 0 blocks dropped to compare with.")
    frame.insert(len(frame.columns) - 1, "increase_percent", 100 * (frame["perplexity"] / full.iloc[0] - 1))
    caption = (
        "Perplexity against the share of blocks that drop their attention sync point; dashed: every sync point kept."
        f" {subject(record)}; {data_words(record)}; {machine(record)}."
    )
    return Table("perplexity", caption, frame, sweeps)


# ---------------------------------------------------------------- accuracy


def accuracy_table(records: Sequence[Record]) -> Table:
    """A row a strategy and percentage: accuracy of every task, and of their average what the full model is beside."""
    sweeps = sweeps_of(records, tasks=True)
    first = value(sweeps[-1], "result", "curve", 0)
    columns = {name: f"tasks.{name}.acc" for name in first["tasks"]} | (AVERAGED if "average" in first else {})
    caption = (
        "Accuracy (acc, as the harness defines it) of each task and their average, mmlu apart; stderr: the average's."
        " Against the model with every sync point kept, on the same questions: difference of the averages and its"
        " standard error, answers lost and gained, and McNemar's exact two-sided p of these."
        f" {asked_words(sweeps[-1], first['tasks'])}"
    )
    return Table("accuracy", caption, curve_of(sweeps, columns), sweeps)


def tasks_table(records: Sequence[Record]) -> Table:
    """A row a task of the newest evaluation that was put to tasks, and one of their average, if there is one."""
    record = newest(records, "eval")
    tasks, average = record["result"]["tasks"], record["result"].get("average")
    rows = []
    for name, scores in (tasks | ({"average": average} if average else {})).items():
        of = [tasks[task] for task in scores.get("tasks", [name])]
        row = {"task": name, "n": sum(task["n"] for task in of), "chance": sum(task["chance"] for task in of) / len(of)}
        place = ("average",) if scores is average else ("tasks", name)
        row |= numbers(record, SCORES | (COMPARED if "compared" in scores else {}), "result", *place)
        rows.append(row | {"acc_norm": scores.get("acc_norm")})
    caption = (
        f"Accuracy of plan {record['plan']} task by task. lost, gained: answers flipped against the model with every"
        f" sync point kept; p: McNemar's exact test of them. {asked_words(record, tasks)}"
    )
    return Table("tasks", caption, pd.DataFrame(rows).dropna(axis="columns", how="all"), [record])


# ---------------------------------------------------------------- time to first token


def timings(record: Record) -> pd.DataFrame:
    """A row a plan of a bench record, all full first, then fewest dropped first: times in ms, reduction 1 - t_p/t_0,
    speedup t_0/t_p."""
    dropped, plans = column(record, "plans", "blocks_dropped"), record["result"]["plans"]
    letters = [value(record, "result", "plans", i, "plan") for i in range(len(plans))]
    frame = pd.DataFrame({"blocks_dropped": dropped})
    frame["percent"] = [100 * n / len(plan.split()) for n, plan in zip(dropped, letters, strict=True)]
    for key in ("median", "spread", "min"):
        frame[f"ttft_{key}_ms"] = column(record, "plans", "ttft_ms", key)
    frame["repeats"] = column(record, "plans", "ttft_ms", "repeats")
    for key in ("real_ms", "emulated_ms"):
        frame[key] = [_of_all_points(record, i, key) for i in frame.index]
    together = [
        (plan.get("communication_ms") or {}).get("median") for plan in plans
    ]  # of a graph's they alone are known
    frame["real_ms"] = frame["real_ms"].fillna(pd.Series(together, dtype=float))
    frame["compute_ms"] = frame["ttft_median_ms"] - frame["real_ms"] - frame["emulated_ms"]  # NaN where a part is
    for i in frame.index[frame["compute_ms"] < 0]:
        raise SPDError(f"Record {record['id']}, plan {i}: its communication takes longer than its whole median TTFT.")
    for key in ("count", "bytes"):
        frame[key] = [_of_all_points(record, i, key) for i in frame.index]
    if plans[0].get("tpot_ms") is not None:
        for key in ("median", "spread"):
            frame[f"tpot_{key}_ms"] = column(record, "plans", "tpot_ms", key)
    if "floor" in plans[0]:
        silent = number(record, "result", "bounds", "no_communication", "ttft_ms", "median")
        frame["formula_ms"] = [silent + ms for ms in column(record, "plans", "floor", "ttft_communication_ms")]
        for time in ("ttft", "tpot") if "tpot_median_ms" in frame else ("ttft",):
            frame[f"{time}_of_bound"] = column(record, "plans", "floor", f"{time}_ms") / frame[f"{time}_median_ms"]
    if any("saved" in plan for plan in plans):
        frame["saved_share"] = [plan["saved"]["share"] if "saved" in plan else None for plan in plans]
    if min(dropped):
        raise SPDError(f"Record {record['id']} has no plan with 0 blocks dropped to compare with.")
    order = sorted(frame.index, key=lambda i: (set(letters[i]) != set("F "), dropped[i]))
    base = frame["ttft_median_ms"][order[0]]
    frame = frame.assign(reduction=1 - frame["ttft_median_ms"] / base, speedup=base / frame["ttft_median_ms"])
    return frame.assign(plan=letters).loc[order].reset_index(drop=True)


def _of_all_points(record: Record, i: int, key: str) -> float:
    """Of plan `i` of a bench record the sum over its sync points; NaN where a time was not measured (GPUs)."""
    place = ("result", "plans", i, "collectives")
    if any(key in spent and spent[key] is None for spent in value(record, *place).values()):
        return math.nan
    return sum(number(record, *place, point, key) for point in value(record, *place))


def ttft_table(records: Sequence[Record]) -> Table:
    record = newest(records, "bench")
    frame = timings(record)
    repeats = "/".join(map(str, sorted(set(frame["repeats"]))))
    parts = ", split into computation"
    parts += ", real collectives and the emulated link" if frame["emulated_ms"].any() else " and collectives"
    parts = parts if frame["compute_ms"].notna().all() else "; its collectives were not timed"
    formula = "; diamonds: no communication, measured, plus collectives by formula" if "formula_ms" in frame else ""
    caption = (
        f"Median time to first token of {repeats} runs (error bar: interquartile range){parts}"
        f"{formula}. {timing_words(record)}, {link_words(record)}; {machine(record)}."
    )
    columns = "reduction = 1 - t_p/t_0, speedup = t_0/t_p."
    if "saved_share" in frame or "formula_ms" in frame:
        flops, read = (number(record, "result", "rates", key) for key in ("matrix_gflops", "memory_gb_per_s"))
        idle = number(record, "result", "rates", "all_reduce", "ttft_ms")
        columns += (
            " saved_share = TTFT saved / time of the all-reduces removed, when all are kept; formula_ms = no"
            " communication, measured, + collectives by formula; of_bound = what the machine's rates allow / measured:"
            f" a process multiplies matrices at {flops:.0f} GFLOP/s, reads weights at {read:.1f} GB/s, and an idle"
            f" all-reduce of the prompt's size takes {idle:.2f} ms, the emulated link aside."
        )
    return Table("ttft", caption, frame, [record], columns=columns)


MAKERS = {"sensitivity": sensitivity_table, "sweep": perplexity_table, "bench": ttft_table, "eval": tasks_table}
