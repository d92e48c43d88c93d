"""Records in MLflow, so that a team can compare them: a reproduction is a parent run, each of its stages a child.

A sweep is a child a strategy. All runs share a few metric names, over the number of blocks dropped (`sensitivity`: over
blocks), so that curves of strategies, models and machines overlay in one chart; the rest is in the record, attached.
"""

import argparse
import fcntl
import math
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spd.errors import SPDError
from spd.launch import environment, say
from spd.records import load_records

DEFAULT_URI, EXPERIMENT = "sqlite:///mlflow.db", "spd"
REACHED_WITHIN, DONE_WITHIN = 3, 120  # seconds
PARAMS = ("dtype", "device", "seed", "seq_len", "windows", "skip", "recipe", "strategy", "percentages", "calibration",
          "epochs", "learning_rate", "tasks", "limit", "shape", "batch", "prompt_len", "link")  # fmt: skip
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "GIT_PYTHON_REFRESH": "quiet",
}


def mirror(record: Path, files: Iterable[Path] = (), uri: str | None = None) -> None:
    """Shows a written record in MLflow, with `files` attached; whatever goes wrong costs a warning and no result.

    In a process of its own, with a time limit: importing MLflow takes seconds, and a server may hang.
    """
    uri = uri or DEFAULT_URI
    server = urlsplit(uri)
    try:
        if server.scheme in ("http", "https"):
            port = server.port or {"http": 80, "https": 443}[server.scheme]
            socket.create_connection((server.hostname, port), REACHED_WITHIN).close()
        words = [sys.executable, "-m", "spd.tracking", record, "--uri", uri, "--files", *files]
        done = subprocess.run(
            list(map(str, words)), env=environment(**ENVIRONMENT), capture_output=True, text=True, timeout=DONE_WITHIN
        )
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ["it gave no reason"])[-1])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        where = uri.replace(f"{server.username}:{server.password}@", "") if server.password else uri
        reason = " ".join(str(error).replace(server.password or "\n", "***").split())[-200:]  # the cause comes last
        say(f"warning: the run is not in MLflow at {where} ({reason}); its record is {record}.")


# ---------------------------------------------------------------- what is shown of a record


def curves(record: dict) -> Iterator[tuple[str | None, list[tuple[str, float, int]]]]:
    """(strategy or None, its metrics as name, value and step) of each run that a record becomes."""
    result = record["result"]
    if record["command"] == "sweep":
        for strategy in dict.fromkeys(point["strategy"] for point in result["curve"]):
            points = [point for point in result["curve"] if point["strategy"] == strategy]
            yield strategy, [metric for point in points for metric in _scores(point, point["blocks"])]
    else:
        yield None, [*_metrics(record["command"], result), ("seconds", record.get("seconds"), 0)]


def _metrics(command: str, result: dict) -> Iterator[tuple[str, Any, int]]:
    if command == "sensitivity":
        for name in ("sensitivity", "sensitivity_nats"):
            yield from ((name, value, block) for block, value in enumerate(result[name]))
    elif command == "bench":
        rows = [row for row in result["plans"] if row.get("communicates", True)]
        full = next((row["ttft_ms"]["median"] for row in rows if row["blocks_dropped"] == 0), None)
        for row in rows:
            step, ttft = row["blocks_dropped"], row["ttft_ms"]["median"]
            yield "ttft_ms", ttft, step
            yield "tpot_ms", (row.get("tpot_ms") or {}).get("median"), step
            yield "speedup", full and full / ttft, step
    elif command == "distill":
        yield "perplexity_before", result["perplexity_before"], 0
        yield "perplexity", result["perplexity_after"], _dropped(result)
        for block in result["blocks"]:
            yield "loss_before", block["loss_before"], block["index"]
            yield "loss_after", block["loss_after"], block["index"]
    elif command == "plan":
        yield "blocks_dropped", result["budget"]["blocks"], 0
    elif command == "eval":
        yield from _scores(result, _dropped(result))
    else:
        names = ("ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup", "ceiling")
        yield from ((name, result.get(name), 0) for name in names)


def _scores(result: dict, step: int) -> list[tuple[str, Any, int]]:
    """Perplexity, and accuracy over the tasks where there are some."""
    accuracy = (result.get("average") or {}).get("acc")
    return [("perplexity", result.get("perplexity"), step), ("nats", result.get("nats"), step),
            ("accuracy", accuracy, step)]  # fmt: skip


def _dropped(result: dict) -> int:
    """Blocks that lose a sync in a result's plan."""
    return sum("D" in letters for letters in (result.get("plan") or "").split())


def params(record: dict) -> dict[str, str]:
    model, config = record.get("model") or {}, record["config"]
    found = {"model": model.get("name"), "tp": record.get("tp"), "text": (record.get("data") or {}).get("text")}
    found |= {name: config.get(name) for name in PARAMS}
    return {name: str(value)[:250] for name, value in found.items() if value is not None}


def tags(record: dict, strategy: str | None) -> dict[str, str]:
    machine = record["hardware"]
    found = {
        "command": record["command"], "strategy": strategy, "reproduction": record.get("reproduction"),
        "plan": record.get("plan"), "machine": ", ".join(machine.get("gpus") or [machine.get("cpu") or "unknown"]),
        "commit": (record.get("git") or {}).get("commit"),
    }  # fmt: skip
    return {name: str(value)[:500] for name, value in found.items() if value is not None}


# ---------------------------------------------------------------- the process that talks to MLflow


class Store:
    """An MLflow store: which records are there already, and adding others."""

    def __init__(self, uri: str):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.client = MlflowClient(uri)
        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is None:
            with suppress(MlflowException):  # another process has just made it
                self.client.create_experiment(EXPERIMENT)
            found = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment, self.parents = found.experiment_id, {}

    def runs(self, condition: str = "") -> list:
        """Runs that meet a condition on tags, the oldest first."""
        found, page = [], None
        while page is None or page:
            some = self.client.search_runs(
                [self.experiment], condition, max_results=1000, order_by=["attributes.start_time ASC"], page_token=page
            )
            found, page = found + list(some), some.token or ""
        return found

    def add(self, record: dict, path: Path, files: Iterable[str]) -> None:
        """A run, or one a strategy, below the reproduction's."""
        from mlflow.entities import Metric, Param, RunTag

        start = int(1000 * datetime.fromisoformat(record["started"]).timestamp())
        end = start + int(1000 * (record.get("seconds") or 0))
        parent = self.parent(record["reproduction"], start) if record.get("reproduction") else None
        for strategy, points in curves(record):
            described = tags(record, strategy) | ({"mlflow.parentRunId": parent} if parent else {})
            model = (record.get("model") or {}).get("name")
            name = " ".join(filter(None, [record["command"], strategy, model and f"{model} tp={record.get('tp')}"]))
            run = self.client.create_run(self.experiment, start, described, name).info.run_id
            finite = [p for p in points if isinstance(p[1], int | float) and math.isfinite(p[1])]
            for place in range(0, max(1, len(finite)), 900):  # a request takes no more
                metrics = [Metric(key, value, end, step) for key, value, step in finite[place : place + 900]]
                self.client.log_batch(
                    run, metrics, [Param(*item) for item in params(record).items()] if not place else []
                )
            for file in (path, *files):
                self.client.log_artifact(run, str(file))
            self.client.log_batch(run, tags=[RunTag("record", record["id"])])  # last: only what is whole counts
            self.client.set_terminated(run, end_time=end)

    def parent(self, reproduction: str, start: int) -> str:
        """The run of a reproduction; of two that were made at once the older one."""
        if reproduction not in self.parents:
            name = reproduction.replace("'", "_")  # a condition has no way to quote it
            condition = f"tags.reproduction = '{name}' and tags.command = 'reproduction'"
            if not self.runs(condition):
                mark = {"reproduction": name, "command": "reproduction"}
                run = self.client.create_run(self.experiment, start, mark, name).info.run_id
                self.client.set_terminated(run, end_time=start)
                if (oldest := self.runs(condition)[0].info.run_id) != run:
                    self.client.delete_run(run)
                self.parents[reproduction] = oldest
            self.parents.setdefault(reproduction, self.runs(condition)[0].info.run_id)
        return self.parents[reproduction]


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Waits for other processes that write to the same file: two that create a store at once would fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with open(uri.removeprefix("sqlite:///") + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """`python -m spd.tracking RECORDS...`: brings in the records that are not there yet."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="record files, or folders of them")
    parser.add_argument("--files", nargs="*", default=[], help="to attach to each")
    parser.add_argument("--uri", default=DEFAULT_URI, help="of the store or server")
    given = parser.parse_args()
    try:
        paths = [f for p in given.records for f in (sorted(p.rglob("*.json")) if p.is_dir() else [p])]
        found = {record["id"]: (record, path) for path in paths for record in load_records([path])}
        with alone(given.uri):
            store = Store(given.uri)
            there = {run.data.tags.get("record") for run in store.runs()}
            missing = sorted(found.keys() - there)
            for number, (record, path) in enumerate((found[name] for name in missing), start=1):
                store.add(record, path, given.files)
                if len(missing) > 1:
                    end = "\n" if number == len(missing) else "\r"
                    print(f"{number} of {len(missing)} records brought in", end=end, file=sys.stderr, flush=True)
    except SPDError as error:
        sys.exit(str(error))
    except Exception as error:  # MLflow's, SQLAlchemy's, the network's
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


if __name__ == "__main__":
    main()
