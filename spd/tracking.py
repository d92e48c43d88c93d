"""Records in MLflow, so that a team can compare them: a reproduction is a parent run, each of its stages a child.

A sweep is a child a strategy. All runs share a few metric names, over the number of blocks dropped (`sensitivity`: over
blocks), so that curves of strategies, models and machines overlay in one chart; the rest is in the record, attached.
"""

import argparse
import fcntl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from spd.errors import SPDError
from spd.records import files_of, read_record

DEFAULT_URI, EXPERIMENT = "sqlite:///mlflow.db", "spd"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
DONE_WITHIN = 120  # seconds
SCORES = ("perplexity", "nats", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup", "ceiling")
PARAMS = (
    *("dtype", "device", "seed", "seq_len", "windows", "skip", "tasks", "limit", "shape", "batch", "prompt_len"),
    *("recipe", "strategy", "percentages", "calibration", "epochs", "learning_rate", "link"),
)
Points = Iterator[tuple[int, dict[str, float | None]]]  # step, and metrics by their names; None: not measured


def mirror(record: Path, files: Iterable[Path] = (), uri: str | None = None) -> None:
    """Shows a written record in MLflow, with `files` attached; whatever goes wrong costs a warning and no result.

    In a process of its own, with a time limit: importing MLflow takes seconds, and a server may hang.
    """
    from spd.launch import environment, say

    uri = uri or DEFAULT_URI
    words = [sys.executable, "-m", "spd.tracking", str(record), "--uri", uri, "--files", *map(str, files)]
    try:
        subprocess.run(
            words, env=environment(**ENVIRONMENT), capture_output=True, text=True, timeout=DONE_WITHIN, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        secret = urlsplit(uri).netloc.rpartition("@")[0]  # user and password
        message = f"warning: the run is not in MLflow at {uri} ({reason[-200:]}); its record is {record}."
        say(message.replace(f"{secret}@", "") if secret else message)


# ---------------------------------------------------------------- what is shown of a record


def curves(record: dict) -> Iterator[tuple[str | None, list[tuple[str, float, int]]]]:
    """(strategy or None, its metrics as name, value and step) of each run that a record becomes."""
    if record["command"] == "sweep":
        runs = {point["strategy"]: [] for point in record["result"]["curve"]}
        for point in record["result"]["curve"]:
            runs[point["strategy"]].append((point["blocks"], _scores(point)))
    else:
        runs = {None: [*_points(record["command"], record["result"]), (0, {"seconds": record.get("seconds")})]}
    for strategy, points in runs.items():
        measured = ((name, value, step) for step, values in points for name, value in values.items())
        yield strategy, [(name, value, step) for name, value, step in measured if value is not None]


def _points(command: str, result: dict) -> Points:
    if command == "sensitivity":
        for name in ("sensitivity", "sensitivity_nats"):  # neither, where it is scores of one pass
            yield from ((block, {name: value}) for block, value in enumerate(result.get(name, [])))
    elif command == "bench" and "plans" in result:
        rows = [row for row in result["plans"] if row.get("communicates", True)]
        full = next((row["ttft_ms"]["median"] for row in rows if row["blocks_dropped"] == 0), None)
        for row in rows:
            ttft, tpot = row["ttft_ms"]["median"], (row.get("tpot_ms") or {}).get("median")
            yield row["blocks_dropped"], {"ttft_ms": ttft, "tpot_ms": tpot, "speedup": full and full / ttft}
    elif command == "distill":
        yield 0, {"perplexity_before": result["perplexity_before"]}
        yield _dropped(result), {"perplexity": result["perplexity_after"]}
        for block in result["blocks"]:
            yield block["index"], {name: block[name] for name in ("loss_before", "loss_after")}
    elif command == "plan":
        yield 0, {"blocks_dropped": result["budget"]["blocks"]}
    else:  # `bench` of a shard by itself predicts several plans
        yield from ((_dropped(row), _scores(row)) for row in result.get("predicted", [result]))


def _scores(result: dict) -> dict[str, float | None]:
    """Those of a result or of a point of a curve, and accuracy over the tasks where there are some."""
    return {name: result.get(name) for name in SCORES} | {"accuracy": (result.get("average") or {}).get("acc")}


def _dropped(result: dict) -> int:
    """Blocks that lose a sync in a result's plan."""
    return sum("D" in letters for letters in (result.get("plan") or "").split())


def params(record: dict) -> dict[str, str]:
    found = {name: record["config"].get(name) for name in PARAMS} | {"tp": record.get("tp")}
    found |= {"model": (record.get("model") or {}).get("name"), "text": (record.get("data") or {}).get("text")}
    return {name: str(value)[:250] for name, value in found.items() if value is not None}


def tags(record: dict, strategy: str | None) -> dict[str, str]:
    machine = record["hardware"]
    found = {name: record.get(name) for name in ("command", "reproduction", "plan")} | {"strategy": strategy}
    found |= {"machine": ", ".join(machine.get("gpus") or [machine.get("cpu") or "unknown"])}
    found |= {"commit": (record.get("git") or {}).get("commit")}
    return {name: str(value)[:500] for name, value in found.items() if value is not None}


# ---------------------------------------------------------------- the process that talks to MLflow


class Store:
    """An MLflow store: which records are there already, and adding others."""

    def __init__(self, uri: str):
        import mlflow

        mlflow.set_tracking_uri(uri)
        self.client, self.experiment = mlflow.MlflowClient(), mlflow.set_experiment(EXPERIMENT).experiment_id
        found = [run.data.tags | {"id": run.info.run_id} for run in mlflow.search_runs(output_format="list")]
        self.records = {run.get("record") for run in found}
        self.parents = {run["reproduction"]: run["id"] for run in found if run.get("command") == "reproduction"}

    def add(self, record: dict, files: Iterable[Path]) -> None:
        """A run, or one a strategy, below the reproduction's."""
        from mlflow.entities import Metric, Param

        start = int(1000 * datetime.fromisoformat(record["started"]).timestamp())
        end = start + int(1000 * (record.get("seconds") or 0))
        below = {"mlflow.parentRunId": self.parent(record["reproduction"], start)} if record.get("reproduction") else {}
        described = params(record)
        on = f"{described['model']} tp={described.get('tp')}" if "model" in described else None
        for strategy, points in curves(record):
            name = " ".join(filter(None, (record["command"], strategy, on)))
            run = self.client.create_run(self.experiment, start, tags(record, strategy) | below, name).info.run_id
            metrics = [Metric(key, value, end, step) for key, value, step in points]
            self.client.log_batch(run, metrics, [Param(*item) for item in described.items()])
            for file in files:
                self.client.log_artifact(run, str(file))
            self.client.set_tag(run, "record", record["id"])  # last: only what is whole counts
            self.client.set_terminated(run, end_time=end)

    def parent(self, reproduction: str, start: int) -> str:
        """The run of a reproduction, which has no length of its own."""
        if reproduction not in self.parents:
            mark = {"reproduction": reproduction, "command": "reproduction"}
            run = self.client.create_run(self.experiment, start, mark, reproduction).info.run_id
            self.client.set_terminated(run, end_time=start)
            self.parents[reproduction] = run
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
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="to attach to each")
    parser.add_argument("--uri", default=DEFAULT_URI, help="of the store or server")
    given = parser.parse_args()
    try:
        found = {record["id"]: (record, path) for path in files_of(given.records) for record in [read_record(path)]}
        with alone(given.uri):
            store = Store(given.uri)
            missing = sorted(found.keys() - store.records)
            for record, path in map(found.get, tqdm(missing, unit=" records", disable=len(missing) < 2)):
                store.add(record, [path, *given.files])
    except SPDError as error:
        sys.exit(str(error))
    except Exception as error:  # MLflow's, SQLAlchemy's, the network's
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


if __name__ == "__main__":
    main()
