"""Accuracy on tasks: what records of `sweep --tasks` and `eval --tasks` hold, its figures and its tables."""

from collections.abc import Iterable, Sequence
from functools import partial

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes

from spd.report.captions import machine, subject
from spd.report.figures import STRATEGY_NAMES, Sheet, axis_of_blocks, figure_single, line_style
from spd.report.records import Record, Sources, choose, count_in, number_in, value_in
from spd.report.table import Table


def accuracy_sheets(single: Sequence[Sources]) -> list[Sheet]:
    """Of `choose`'s sources the figures of those whose sweeps had tasks."""
    with sns.plotting_context("paper"), sns.axes_style("whitegrid"), mpl.rc_context({"svg.hashsalt": "spd"}):
        return [sheet for sources in single for sheet in _sheets(sources)]


def accuracy_tables(records: Sequence[Record]) -> list[Table]:
    """Of `load_records`' records: a table a sweep with tasks, and one of the newest `eval` of tasks."""
    found = []
    for sources in choose(records)[0]:
        found += _curve_tables(sources) + ([_tasks_table(sources)] if sources.tasks else [])
    return found


# ---------------------------------------------------------------- records


def accuracies_of(sweeps: Sequence[Record]) -> dict[str, list[dict]]:
    """Points of each strategy as `curves_of` gives them, with `scores`: those of each task, and of the `average`.

    Of the sweeps with tasks only those count that put the newest one's questions.
    """
    asked = [(record, _questions(record)) for record in sweeps if "tasks" in record["result"]["curve"][0]]
    curves: dict[str, list[dict]] = {}
    for record in (record for record, questions in asked if questions == asked[-1][1]):
        found: dict[str, list[dict]] = {}
        for i in range(count_in(record, "result", "curve")):
            at = partial(number_in, record, "result", "curve", i)
            point = {"blocks": int(at("blocks")), "percent": at("percent")}
            point |= {"plan": value_in(record, "result", "curve", i, "plan")}
            point["scores"] = scores_of(record, "result", "curve", i)
            found.setdefault(value_in(record, "result", "curve", i, "strategy"), []).append(point)
        curves |= found
    return {name: sorted(points, key=lambda p: p["blocks"]) for name, points in curves.items()}


def _questions(record: Record) -> dict[str, tuple]:
    """How many questions of each task, from where."""
    tasks = value_in(record, "result", "curve", 0, "tasks")
    return {
        name: tuple(value_in(record, "result", "curve", 0, "tasks", name, k) for k in ("n", "source")) for name in tasks
    }


def scores_of(record: Record, *keys: str | int) -> dict[str, dict]:
    """Accuracies at `keys` in a record, task by task and, where there is one, the `average`; each in one flat row."""
    tasks = {name: _scores(record, *keys, "tasks", name) for name in value_in(record, *keys, "tasks")}
    if "average" in value_in(record, *keys):
        of = value_in(record, *keys, "average", "tasks")
        tasks["average"] = _scores(record, *keys, "average")
        tasks["average"] |= {"chance": sum(tasks[name]["chance"] for name in of) / len(of), "of": len(of)}
        tasks["average"]["n"] = sum(tasks[name]["n"] for name in of)
    return tasks


def _scores(record: Record, *keys: str | int) -> dict:
    """Of a task or the average: numbers that must be there, then those that only some have."""
    found = value_in(record, *keys)
    row = {key: number_in(record, *keys, key) for key in ("acc", "stderr")}
    row |= {key: found[key] for key in ("acc_norm", "n", "chance", "shots", "source") if found.get(key) is not None}
    if "compared" in found:
        at = partial(number_in, record, *keys, "compared")
        row |= {key: at(key) for key in ("acc_full", "difference", "lost", "gained", "p")}
        row["difference_stderr"] = at("stderr")
    return row


# ---------------------------------------------------------------- captions


def accuracy_caption(sources: Sources, name: str) -> str:
    """Of the curve of the `average` or of one task."""
    record = sources.sweeps[-1]
    scores = next(iter(accuracies_of(sources.sweeps).values()))[0]["scores"]
    of = f"mean over {scores['average']['of']} tasks of the" if name == "average" else name
    words = f"Accuracy ({of} harness's acc) against the share of blocks that drop their attention sync point; bars: "
    words += (
        "standard error of the difference from the model with every sync point kept (dashed) on the same questions;"
    )
    names = [task for task in _names(scores) if task != "mmlu"] if name == "average" else [name]
    return f"{words} dotted: guessing. {_asked(scores, names)}. {subject(record)}; {machine(record)}."


def _names(scores: dict[str, dict]) -> list[str]:
    """Of the tasks."""
    return [name for name in scores if name != "average"]


def _asked(scores: dict[str, dict], names: Iterable[str]) -> str:
    shots = {task: f", {scores[task]['shots']} shots" if scores[task].get("shots") else "" for task in names}
    return "Questions: " + ", ".join(
        f"{task} {scores[task]['n']} ({scores[task]['source']}{shots[task]})" for task in names
    )


def accuracies_caption(sources: Sources) -> str:
    """Of the table of a sweep's accuracies."""
    record = sources.sweeps[-1]
    scores = next(iter(accuracies_of(sources.sweeps).values()))[0]["scores"]
    words = (
        "Accuracy (acc, as the harness defines it) of each task and their average, mmlu apart; stderr: the average's."
    )
    words += " Against the model with every sync point kept, on the same questions: difference of the averages and its"
    words += " standard error, answers lost and gained, and McNemar's exact two-sided p of these."
    return f"{words} {_asked(scores, _names(scores))}. {subject(record)}; {machine(record)}."


def tasks_caption(sources: Sources) -> str:
    record = sources.tasks
    scores = scores_of(record, "result")
    words = (
        f"Accuracy of plan {record['plan']} task by task. lost, gained: answers flipped against the model with every"
    )
    words += " sync point kept; p: McNemar's exact test of them."
    return f"{words} {_asked(scores, _names(scores))}. {subject(record)}; {machine(record)}."


# ---------------------------------------------------------------- figures and tables


def _panel_accuracy(ax: Axes, sources: Sources, of: str = "average") -> None:
    """Accuracy of one task, or of the average, in percent."""
    curves = accuracies_of(sources.sweeps)
    for i, (name, points) in enumerate(curves.items()):
        aside = 0.8 * (i - (len(curves) - 1) / 2)  # so that bars of equal percentage do not hide one another
        x, scores = [p["percent"] + aside for p in points], [p["scores"][of] for p in points]
        y, error = ([100 * s[key] for s in scores] for key in ("acc", "difference_stderr"))
        bars = {"elinewidth": 0.8, "capsize": 2} | line_style(i)
        ax.errorbar(x, y, error, label=STRATEGY_NAMES.get(name, name), **bars)
    full, chance = 100 * scores[0]["acc_full"], 100 * scores[0]["chance"]
    ax.axhline(full, color="0.25", linestyle="--", linewidth=1, label=f"all full: {full:.1f} %")
    ax.axhline(chance, color="0.5", linestyle=":", linewidth=1, label=f"guessing: {chance:.1f} %")
    ax.set(ylabel="average accuracy (%)" if of == "average" else f"accuracy on {of} (%)")
    axis_of_blocks(ax, number_in(sources.sweeps[-1], "model", "blocks"))
    ax.legend(loc="best")


def _sheets(sources: Sources) -> list[Sheet]:
    """The upper panels of the paper's figures 7 and 8 (average) and of its figure 9 (mmlu), where sweeps had tasks."""
    curves = accuracies_of(sources.sweeps)
    known = next(iter(curves.values()))[0]["scores"] if curves else {}
    found = []
    for of, name in (("average", "accuracy"), ("mmlu", "accuracy-mmlu")):
        if of in known:
            caption = accuracy_caption(sources, of)
            figure = figure_single(partial(_panel_accuracy, of=of), caption, sources, 6.4)
            found.append(Sheet(name + sources.suffix, "Accuracy", caption, sources.sweeps, figure))
    return found


def _curve_tables(sources: Sources) -> list[Table]:
    """None where no sweep had tasks."""
    rows = []
    for name, points in accuracies_of(sources.sweeps).items():
        for point in points:
            row = {"strategy": name, **{key: point[key] for key in ("blocks", "percent", "plan")}}
            row |= {task: scores["acc"] for task, scores in point["scores"].items()}
            mean = point["scores"].get("average", {})
            rows.append(row | {key: mean[key] for key in _AVERAGED if key in mean})
    if not rows:
        return []
    formats = {"strategy": "", "blocks": "d", "percent": ".1f"}
    formats |= {key: ".3f" for key in rows[0] if key not in formats and key not in _AVERAGED and key != "plan"}
    formats |= {key: form for key, form in _AVERAGED.items() if key in rows[0]} | {"plan": ""}
    return [Table("accuracy" + sources.suffix, accuracies_caption(sources), rows, formats, sources.sweeps)]


_COMPARED = {"difference": "+.3f", "difference_stderr": ".3f", "lost": "d", "gained": "d", "p": ".2g"}
_AVERAGED = {"stderr": ".3f", **_COMPARED}  # columns of the average, beside its accuracy


def _tasks_table(sources: Sources) -> Table:
    rows = [{"task": name, **scores} for name, scores in scores_of(sources.tasks, "result").items()]
    formats = {"task": "", "n": "d", "chance": ".3f", "acc": ".3f", "stderr": ".3f", "acc_norm": ".3f"}
    if "difference" in rows[0]:
        formats |= {"acc_full": ".3f", **_COMPARED}
    return Table("tasks" + sources.suffix, tasks_caption(sources), rows, formats, [sources.tasks])
