"""The paper's tasks as lm-evaluation-harness defines them, with rows from the hub, from local files, or of our own."""

import io
import logging
import sys
from collections import defaultdict
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.metrics import mean_stderr, unweighted_mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml
from pydantic import TypeAdapter, ValidationError
from scipy.stats import binomtest

from spd.errors import SPDError, one_of, reading
from spd.harness import SpdLM
from spd.plan import Plan
from spd.pretrained import SPDModel
from spd.records import regular, write_json
from spd.repairs import read_json
from spd.tiny import tasks as tiny

HARNESS = Path(lm_eval.tasks.__file__).parent
PAPER = {  # the seven whose mean the paper plots -> the harness's own definition
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
}
MMLU, MMLU_SHOTS = "mmlu", 5
KNOWN = (*PAPER, MMLU, *tiny.TASKS)
# hellaswag's local rows are already what its `process_docs` makes of the hub's.
LOCAL = {"hellaswag": {"process_docs": None, "doc_to_target": "gold"}}

LARGEST = 2**30  # bytes of a file of rows
Rows = list[dict]
Answers = dict[str, dict[str, list[float]]]  # part of a task -> metric -> whether right (1 or 0), question by question


@dataclass(frozen=True)
class Task:
    """One task: a part of the harness's for each of its subjects, one for those without subjects."""

    name: str
    parts: dict[str, ConfigurableTask]
    source: str  # `hub`, `builtin`, or the file of its rows
    shots: int = 0

    @property
    def chance(self) -> float:
        """What guessing would give: one over the number of choices, none where a word is asked for."""
        part = next(iter(self.parts.values()))
        return 1 / len(part.doc_to_choice(part.eval_docs[0])) if part.OUTPUT_TYPE == "multiple_choice" else 0.0


# ---------------------------------------------------------------- loading


def load_tasks(spec: str, folder: Path | None = None) -> list[Task]:
    """The tasks named in a list like `piqa,mmlu`, with rows from `folder/NAME.jsonl` or, without a folder, the hub.

    `folder/NAME_test.jsonl` and `NAME_validation.jsonl` serve as well; the file's name is the task's `source`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    names = dict.fromkeys(one_of("task", name.strip(), KNOWN) for name in spec.split(","))
    return [_load(name, folder) for name in names]


def _load(name: str, folder: Path | None) -> Task:
    if name in tiny.TASKS:
        rows, config = tiny.TASKS[name]
        return Task(name, {name: _build(config | {"task": name}, name, {"test": rows()})}, "builtin")
    file = None if folder is None else _file(folder, name)
    if name == MMLU:
        return _mmlu(file)
    config = load_yaml(HARNESS / PAPER[name], resolve_func=True)
    if file is None:
        return Task(name, {name: _build(config, name)}, "hub")
    return Task(name, {name: _build(config | LOCAL.get(name, {}), file, {"test": read_rows(file)})}, file.name)


def _mmlu(file: Path | None) -> Task:
    """All subjects, or those of a file, whose examples lie beside it in `mmlu_dev.jsonl`."""
    definitions = sorted((HARNESS / "mmlu/default").glob("mmlu_*.yaml"))
    configs = [load_yaml(path, resolve_func=True) | {"num_fewshot": MMLU_SHOTS} for path in definitions]
    if file is None:
        return Task(MMLU, {config["task"]: _build(config, MMLU) for config in configs}, "hub", MMLU_SHOTS)
    examples, parts = file.with_name("mmlu_dev.jsonl"), {}
    by_subject = defaultdict(lambda: {"test": [], "dev": []})
    for split, path in (("test", file), ("dev", examples)):
        for row in read_rows(path):
            by_subject[row.get("subject")][split].append(row)
    for config in configs:
        splits = by_subject[config["dataset_name"]]
        if splits["test"] and len(splits["dev"]) < MMLU_SHOTS:
            subject = config["dataset_name"]
            raise SPDError(f"{examples} has not {MMLU_SHOTS} rows of the subject {subject}, as mmlu's prompts need.")
        if splits["test"]:
            parts[config["task"]] = _build(config, file, splits)
    if not parts:
        raise SPDError(f"{file} has no row of a subject of mmlu.")
    return Task(MMLU, parts, file.name, MMLU_SHOTS)


def _build(config: dict, source: Path | str, splits: dict[str, Rows] | None = None) -> ConfigurableTask:
    """A task of the harness, with its rows from the hub or from `splits`; `source` names them in a mistake."""
    if splits is not None:

        def made(**_) -> DatasetDict:
            return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})

        used = {"training_split": None, "validation_split": None, "test_split": "test"}
        config = config | used | {"custom_dataset": made, "dataset_path": "json"}
        if "dev" not in splits:
            config["fewshot_split"] = None
    wrong = f"The rows of {source} are not of the form that lm-eval's task {config['task']} reads"
    if splits is None:
        wrong = f"The rows of {source} are not in the local cache and the hub does not give them (--tasks-dir: files)"
    with reading(wrong):  # whatever the hub, the file system or a template raises
        task = ConfigurableTask(config=dict(config))
        for row in task.eval_docs if splits is not None else ():
            parts = [task.doc_to_text(row), task.doc_to_target(row)]
            parts += task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else []
            if not all(isinstance(part, str | int) for part in parts):
                raise ValueError(f"{str(parts)[:80]} are not text")
        return task


def _file(folder: Path, name: str) -> Path:
    candidates = [folder / f"{name}{split}.jsonl" for split in ("", "_test", "_validation")]
    found = next(filter(Path.is_file, candidates), None)
    if found is None:
        raise SPDError(f"There is no {candidates[0]}, which the task {name} reads (nor with _test or _validation).")
    return found


def read_rows(path: Path) -> Rows:
    """The objects of a file of JSON lines; of one that is none, the mistake tells the number of the line."""
    try:
        text = regular(path, LARGEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SPDError(f"The rows {path} cannot be read ({type(error).__name__}).") from error
    rows, an_object = [], TypeAdapter(dict)
    for number, line in enumerate(text.split("\n"), 1):  # alone: a string may hold other ends of lines
        try:
            if line.strip():
                rows.append(an_object.validate_json(line))
        except ValidationError:
            raise SPDError(f"Line {number} of {path} is not a JSON object.") from None
    if not rows:
        raise SPDError(f"{path} has no rows.")
    return rows


# ---------------------------------------------------------------- scores


class Accuracy:
    """What a model scores on some tasks; called with a model, it gives `tasks`, `average` and `truncated`."""

    def __init__(self, tasks: list[Task], limit: int | None = None, **harness):
        """`limit`: only the first questions of each task (of each subject, for mmlu); the rest is for `SpdLM`."""
        self.tasks, self.limit, self._harness = tasks, limit, harness
        self._full: tuple[Answers, int] | None = None

    def compare_with(self, model: SPDModel, kept: Path | None = None) -> None:
        """From now on each model is compared with this one, as it was read and with nothing dropped.

        It is not run again for a plan that drops nothing: repairs belong to dropped blocks. Nor where its answers are
        `kept` in a file, whose name must say all that they depend on.
        """
        self._full = kept and read_json(kept, tuple[Answers, int])
        if self._full is None:
            self._full = self._answers(model)
            if kept and self._harness["is_main"]:
                write_json(kept, self._full)

    def __call__(self, model: SPDModel) -> dict:
        known = self._full if model.plan == Plan.full(model.config.num_blocks) else None
        answers, truncated = known or self._answers(model)
        found = {task.name: summary(task, answers, self._full and self._full[0]) for task in self.tasks}
        mean = average({name: scores for name, scores in found.items() if name != MMLU})
        return {"tasks": found, "truncated": truncated} | ({"average": mean} if mean else {})

    def _answers(self, model: SPDModel) -> tuple[Answers, int]:
        """Which questions the model gets right, and how many contexts were too long for it."""
        lm = SpdLM(model, **self._harness)
        parts = {name: part for task in self.tasks for name, part in task.parts.items()}
        with redirect_stderr(sys.stderr if lm.is_main else io.StringIO()):  # the harness's own bars
            samples = evaluate(lm, {"tasks": parts}, limit=self.limit, bootstrap_iters=0)["samples"]
        answers: Answers = {name: defaultdict(list) for name in samples}
        for name, rows in samples.items():
            for row in sorted(rows, key=lambda row: row["doc_id"]):
                for metric in row.keys() & {"acc", "acc_norm"}:
                    answers[name][metric].append(float(row[metric]))
        return answers, lm.truncated


def summary(task: Task, answers: Answers, full: Answers | None = None) -> dict:
    """A task's `acc`, `acc_norm` (None where it has none), their standard errors, and `compared` with `full`.

    Subjects count by their numbers of questions, as in the harness, and are given one by one too.
    """

    def pooled(of: Answers, metric: str) -> list[float]:
        return [value for name in task.parts for value in of[name].get(metric, [])]

    acc, normed = pooled(answers, "acc"), pooled(answers, "acc_norm")
    result = {"acc": fmean(acc), "stderr": stderr(acc), "acc_norm": None, "n": len(acc), "chance": task.chance}
    if normed:
        result |= {"acc_norm": fmean(normed), "acc_norm_stderr": stderr(normed)}
    result |= {"shots": task.shots, "source": task.source}
    if full is not None:
        result["compared"] = compare(pooled(full, "acc"), acc)
    if len(task.parts) > 1:
        result["subjects"] = {name: fmean(answers[name]["acc"]) for name in task.parts}
    return result


def stderr(values: list[float]) -> float:
    """Standard error of a mean; 0 of a single value."""
    return mean_stderr(values) if len(values) > 1 else 0.0


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

    def mean(of: list[dict], key: str) -> dict:
        return {key: fmean(s[key] for s in of), "stderr": float(unweighted_mean_stderr([s["stderr"] for s in of]))}

    found = {"metric": "acc", "tasks": list(tasks), **mean(list(tasks.values()), "acc")}
    compared = [scores["compared"] for scores in tasks.values() if "compared" in scores]
    if compared:
        flips = {key: sum(c[key] for c in compared) for key in ("lost", "gained")}
        full = {"acc_full": fmean(c["acc_full"] for c in compared)}
        found["compared"] = full | mean(compared, "difference") | flips | {"p": mcnemar(**flips)}
    return found
