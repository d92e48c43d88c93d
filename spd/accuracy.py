"""Accuracy on tasks: with its standard error, and question by question against the model with every sync kept."""

import io
import math
import sys
from contextlib import redirect_stderr
from statistics import fmean

from lm_eval.evaluator import evaluate
from scipy.stats import binomtest

from spd.comm import Replicas
from spd.harness import BATCH, SpdLM
from spd.plan import Plan
from spd.pretrained import SPDModel
from spd.tasks import MMLU, Task

METRICS = ("acc", "acc_norm")
Answers = dict[str, dict[str, list[float]]]  # part of a task -> metric -> whether right (1 or 0), question by question


class Accuracy:
    """What a model scores on some tasks; called with a model, it gives `tasks`, `average` and `truncated`."""

    def __init__(
        self,
        tasks: list[Task],
        limit: int | None = None,
        batch_size: int = BATCH,
        replicas: Replicas | None = None,
        leads: bool = True,
    ):
        """`limit`: only the first questions of each task (of each subject, for mmlu); the rest as `SpdLM`'s."""
        self.tasks, self.limit = tasks, limit
        self._options = {"batch_size": batch_size, "replicas": replicas, "leads": leads}
        self._full: tuple[Answers, int] | None = None

    def compare_with(self, model: SPDModel) -> None:
        """From now on each model is compared with this one, as it was read and with nothing dropped.

        It is not run again for a plan that drops nothing: repairs belong to dropped blocks.
        """
        self._full = self._answers(model)

    def __call__(self, model: SPDModel) -> dict:
        known = self._full if model.plan == Plan.full(model.config.num_blocks) else None
        answers, truncated = known or self._answers(model)
        found = {task.name: summary(task, answers, self._full and self._full[0]) for task in self.tasks}
        mean = average({name: scores for name, scores in found.items() if name != MMLU})
        return {"tasks": found, "truncated": truncated} | ({"average": mean} if mean else {})

    def _answers(self, model: SPDModel) -> tuple[Answers, int]:
        """Which questions the model gets right, and how many contexts were too long for it."""
        lm = SpdLM(model, **self._options)
        parts = {name: part for task in self.tasks for name, part in task.parts.items()}
        with redirect_stderr(sys.stderr if lm.leads else io.StringIO()):  # the harness's own bars
            found = evaluate(lm, {"tasks": parts}, limit=self.limit, bootstrap_iters=0)
        return {name: _right(rows) for name, rows in found["samples"].items()}, lm.truncated


def _right(samples: list[dict]) -> dict[str, list[float]]:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return {metric: [float(s[metric]) for s in samples] for metric in METRICS if metric in samples[0]}


def summary(task: Task, answers: Answers, full: Answers | None = None) -> dict:
    """A task's `acc`, `acc_norm` (None where it has none), their standard errors, and `compared` with `full`.

    Subjects count by their numbers of questions, as in the harness, and are given one by one too.
    """
    acc = _pooled(task, answers, "acc")
    result = {"acc": fmean(acc), "stderr": stderr(acc), "acc_norm": None, "n": len(acc), "chance": task.chance}
    if normed := _pooled(task, answers, "acc_norm"):
        result |= {"acc_norm": fmean(normed), "acc_norm_stderr": stderr(normed)}
    result |= {"shots": task.shots, "source": task.source}
    if full is not None:
        result["compared"] = compare(_pooled(task, full, "acc"), acc)
    if len(task.parts) > 1:
        result["subjects"] = {name: fmean(answers[name]["acc"]) for name in task.parts}
    return result


def _pooled(task: Task, answers: Answers, metric: str) -> list[float]:
    return [value for name in task.parts for value in answers[name].get(metric, [])]


def stderr(values: list[float]) -> float:
    """Standard error of a mean."""
    mean, n = fmean(values), len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def compare(full: list[float], other: list[float]) -> dict:
    """Two models on the same questions: the other's gain in accuracy, answers flipped each way, McNemar's exact p."""
    differences = [b - a for a, b in zip(full, other, strict=True)]
    flips = {"lost": sum(d < 0 for d in differences), "gained": sum(d > 0 for d in differences)}
    gain = {"acc_full": fmean(full), "difference": fmean(differences), "stderr": stderr(differences)}
    return gain | flips | {"p": mcnemar(**flips)}


def mcnemar(lost: int, gained: int) -> float:
    """Probability of flips at least as one-sided as these if either direction were as likely (exact, two-sided)."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def average(tasks: dict[str, dict]) -> dict | None:
    """Mean over tasks of `acc`, which the paper plots over its seven, each task counting alike; None of no task.

    The tasks' errors are independent, so their squares add up; flips and p are of all questions together.
    """
    if not tasks:
        return None
    found = {"metric": "acc", "tasks": list(tasks), **_mean(tasks.values(), "acc")}
    compared = [scores["compared"] for scores in tasks.values() if "compared" in scores]
    if compared:
        flips = {key: sum(c[key] for c in compared) for key in ("lost", "gained")}
        full = {"acc_full": fmean(c["acc_full"] for c in compared)}
        found["compared"] = full | _mean(compared, "difference") | flips | {"p": mcnemar(**flips)}
    return found


def _mean(of, key: str) -> dict:
    of = list(of)
    return {key: fmean(s[key] for s in of), "stderr": math.sqrt(sum(s["stderr"] ** 2 for s in of)) / len(of)}
