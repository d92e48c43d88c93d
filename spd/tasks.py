"""The paper's tasks as lm-evaluation-harness defines them, with rows from the hub, from local files, or of our own."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from spd.errors import SPDError
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
# hellaswag's local rows are already what its `process_docs` makes of the hub's.
LOCAL = {"hellaswag": {"process_docs": None, "doc_to_target": "gold"}}
_METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
_NORMED = [*_METRICS, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
BUILTIN = {
    "tiny_last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{word}}",
        "metric_list": _METRICS,
    },
    "tiny_continuation": {
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": _NORMED,
    },
}  # fmt: skip
KNOWN = (*PAPER, MMLU, *BUILTIN)


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


def load_tasks(spec: str, folder: Path | None = None) -> list[Task]:
    """The tasks named in a list like `piqa,mmlu`, with rows from `folder/NAME.jsonl` or, without a folder, the hub.

    `folder/NAME_test.jsonl` and `NAME_validation.jsonl` serve as well; the file's name is the task's `source`.

    Raises:
        SPDError: a task that is not known, or rows that are missing, damaged or of another form.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    names = list(dict.fromkeys(name.strip() for name in spec.split(",")))
    for name in names:
        if name not in KNOWN:
            raise SPDError(f"Unknown task '{name}'; known: {', '.join(KNOWN)}.")
    return [_load(name, folder) for name in names]


def _load(name: str, folder: Path | None) -> Task:
    if name in BUILTIN:
        config = BUILTIN[name] | {"task": name, "target_delimiter": ""}
        return Task(name, {name: _build(config, {"test": tiny.ROWS[name]()}, name)}, "builtin")
    if name == MMLU:
        return _mmlu(folder)
    config = load_yaml(HARNESS / PAPER[name], resolve_func=True)
    if folder is None:
        return Task(name, {name: _build(config, None, name)}, "hub")
    file = _file(folder, name)
    return Task(name, {name: _build(config | LOCAL.get(name, {}), {"test": read_rows(file)}, file)}, file.name)


def _mmlu(folder: Path | None) -> Task:
    definitions = sorted((HARNESS / "mmlu/default").glob("mmlu_*.yaml"))
    configs = [load_yaml(path, resolve_func=True) | {"num_fewshot": MMLU_SHOTS} for path in definitions]
    if folder is None:
        return Task(MMLU, {c["task"]: _build(c, None, MMLU) for c in configs}, "hub", MMLU_SHOTS)
    file, examples = _file(folder, MMLU), folder / "mmlu_dev.jsonl"
    test, dev = (_by_subject(path) for path in (file, examples))
    parts = {}
    for config in configs:
        subject = config["dataset_name"]
        if subject in test:
            if len(dev.get(subject, [])) < MMLU_SHOTS:
                raise SPDError(
                    f"{examples} has not {MMLU_SHOTS} rows of the subject {subject}, as mmlu's prompts need."
                )
            parts[config["task"]] = _build(config, {"test": test[subject], "dev": dev[subject]}, file)
    if not parts:
        raise SPDError(f"{file} has no row of a subject of mmlu.")
    return Task(MMLU, parts, file.name, MMLU_SHOTS)


def _by_subject(path: Path) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in read_rows(path):
        rows.setdefault(row.get("subject"), []).append(row)
    return rows


def _build(config: dict, splits: dict[str, list[dict]] | None, source: Path | str) -> ConfigurableTask:
    """A task of the harness, with its rows from the hub or from `splits`."""
    if splits is not None:
        rest = {"training_split": None, "validation_split": None, "test_split": "test"}
        config = config | rest | {"custom_dataset": partial(_dataset, splits), "dataset_path": "json"}
        if "dev" not in splits:
            config["fewshot_split"] = None
    try:
        return ConfigurableTask(config=dict(config))
    except Exception as error:  # whatever the hub, the file system or a template raises
        if splits is None:
            raise SPDError(
                f"The rows of {source} are not in the local cache and the hub does not give them "
                f"({type(error).__name__}); give files of them with --tasks-dir."
            ) from error
        raise SPDError(
            f"The rows of {source} are not of the form that lm-eval's task {config['task']} reads "
            f"({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error


def _dataset(splits: dict[str, list[dict]], **_) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})


def _file(folder: Path, name: str) -> Path:
    candidates = [folder / f"{name}{split}.jsonl" for split in ("", "_test", "_validation")]
    for path in candidates:
        if path.is_file():
            return path
    raise SPDError(f"There is no {candidates[0]}, which the task {name} reads (nor with _test or _validation).")


def read_rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines. Raises SPDError with the number of the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SPDError(f"The rows {path} cannot be read ({type(error).__name__}).") from error
    rows = list(_parsed(lines, path))
    if not rows:
        raise SPDError(f"{path} has no rows.")
    return rows


def _parsed(lines: list[str], path: Path) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise SPDError(f"Line {number} of {path} is not a JSON object.")
            yield row
