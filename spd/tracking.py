"""The mirror of records in MLflow.

MLflow is fed by a child process with a time limit, so that neither its import, its log lines, its retries nor a server
that never answers can touch the run whose record is already on disk.
"""

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import util
from pathlib import Path
from socket import create_connection
from ssl import SSLCertVerificationError
from typing import Any
from urllib.parse import urlsplit

# ---------------------------------------------------------------- What of a record MLflow is shown: parameter


PLUMBING = ("model", "records", "reproduction", "out", "mlflow", "sensitivity", "repairs")  # options of no influence
HEADLINE_PERCENTAGES = (50, 100)
STEPS = ("blocks", "blocks_dropped", "index")  # of a point on a curve, the first that it has
CURVES = ("perplexity", "average/acc", "sensitivity", "ttft_ms/median", "percent")  # which the parent run shows as well


def params(record: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a stage's run: the options under `config/`, model, data, tp, plan letters, machine, versions."""
    hardware, config = record["hardware"], {f"config/{key}": value for key, value in record["config"].items()}
    machine = {"cpu": hardware["cpu"], "cores": hardware["cores"], "gpus": ", ".join(hardware["gpus"])}
    package = {f"version/{name}": version for name, version in record["versions"].items()}
    named = {"command": record["command"], "tp": record["tp"], "plan": record["plan"] or record["result"].get("plan")}
    data = {f"data/{key}": value for key, value in (record["data"] or {}).items()}
    return _texts({**named, **_model_params(record), **data, **machine, **config, **package})


def parent_params(record: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that a reproduction's run takes from a stage: the model, and the stage's options by its name."""
    options = {f"{record['command']}/{k}": v for k, v in record["config"].items() if k not in PLUMBING}
    return _texts({**_model_params(record), **(options if record["model"] else {})})


def _model_params(record: Mapping[str, Any]) -> dict[str, Any]:
    model = dict(record["model"] or {})
    if "name" in model:  # not the folder it lies in, so that the same model has the same name everywhere
        model["name"] = Path(str(model["name"])).name
    return {"model" if key == "name" else f"model/{key}": value for key, value in model.items()}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    flat = {_key(key): value for key, value in _flatten(values)}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flat.items()
        if value not in ("", [])
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    return re.sub(r"[^\w .:/-]", "_", name)[:250]


# ---------------------------------------------------------------- metrics


def metrics(result: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """MLflow metrics (name, value, step) of a result document.

    A number is a metric at step 0. A list of fractional numbers (`sensitivity`) is a curve over its index: the block.
    A list of objects (`curve`, `plans`, `blocks`) is a set of curves whose step is the number of blocks dropped, or
    the block's index, with the percentage as a metric of its own; `curve/zs/perplexity` names the strategy.
    """
    return [(_key(name), value, step) for name, value, step in _metrics(result, "", 0)]


def _metrics(values: Mapping[str, Any], prefix: str, step: int) -> Iterator[tuple[str, float, int]]:
    for key, value in values.items():
        if _is_number(value):
            yield f"{prefix}{key}", float(value), step
        elif isinstance(value, Mapping):
            yield from _metrics(value, f"{prefix}{key}/", step)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield from _curves(value, f"{prefix}{key}/")
        elif isinstance(value, list) and any(isinstance(item, float) for item in value) and all(map(_is_number, value)):
            yield from ((f"{prefix}{key}", float(item), index) for index, item in enumerate(value))


def _curves(points: Iterable[Mapping[str, Any]], prefix: str) -> Iterator[tuple[str, float, int]]:
    for position, point in enumerate(points):
        key = next((k for k in STEPS if type(point.get(k)) is int), None)
        step = position if key is None else point[key]
        name = f"{prefix}{point['strategy']}/" if isinstance(point.get("strategy"), str) else prefix
        if "blocks_dropped" in point and isinstance(point.get("plan"), str):
            point = {"percent": _percent(point), **point}
        yield from _metrics({k: v for k, v in point.items() if k != key}, name, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _percent(plan: Mapping[str, Any]) -> float:
    return 100 * plan["blocks_dropped"] / len(plan["plan"].split())


def curves(result: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Those of `metrics` that a reproduction's run shows as well, to be drawn over those of another reproduction."""
    shown = (found for found in metrics(result) if found[0].startswith(("curve/", "plans/", "sensitivity")))
    return [found for found in shown if found[0].endswith(CURVES)]


# ---------------------------------------------------------------- headline


def headline(record: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of a record by which reproductions are compared, of other models and degrees too.

    Perplexity (and accuracy, where it was measured) with nothing dropped, and at 50 and 100 % by strategy; TTFT and
    what dropping takes off it; the spread of the sensitivities; the share of each class; what the stage took.
    """
    result, command = record["result"], record["command"]
    of = {"sensitivity": _of_sensitivity, "plan": _of_plan, "sweep": _of_sweep, "bench": _of_bench}
    found = of.get(command, _of_scores)(result)
    return {_key(name): value for name, value in found.items()} | {f"seconds/{command}": record["seconds"]}


def _of_sensitivity(result: Mapping[str, Any]) -> dict[str, float]:
    values = result["sensitivity"]
    return {f"sensitivity/{f.__name__}": f(values) for f in (max, statistics.median, min)}


def _of_plan(result: Mapping[str, Any]) -> dict[str, float]:
    classes = result["classes"]
    return {f"blocks_percent/{name}": 100 * classes.count(name) / len(classes) for name in ("ISB", "SB", "ESB")}


def _of_sweep(result: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for point in result["curve"]:
        at = "full" if point["blocks"] == 0 else f"{point['strategy']}_{point['percent']:g}"
        if point["blocks"] == 0 or point["percent"] in HEADLINE_PERCENTAGES:
            found[f"perplexity/{at}"] = point["perplexity"]
            if "average" in point:  # of the tasks that were asked for
                found[f"accuracy/{at}"] = point["average"]["acc"]
    full = found.get("perplexity/full")
    rises = {name.split("/")[1]: value for name, value in found.items() if name.startswith("perplexity/") and full}
    return found | {f"rise_percent/{at}": 100 * (value / full - 1) for at, value in rises.items() if at != "full"}


def _of_bench(result: Mapping[str, Any]) -> dict[str, float]:
    times = {_percent(plan): plan["ttft_ms"]["median"] for plan in result["plans"]}
    if 0 not in times:
        return {}
    found = {"ttft_ms/full": times[0]}
    for percent in HEADLINE_PERCENTAGES:
        if percent in times:
            found |= {f"ttft_ms/{percent}": times[percent]}
            found |= {f"ttft_reduction_percent/{percent}": 100 * (1 - times[percent] / times[0])}
    return found


def _of_scores(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: result[key] for key in ("perplexity", "perplexity_before", "perplexity_after")
            if _is_number(result.get(key))}  # fmt: skip


# ---------------------------------------------------------------- The mirror of records in MLflow


try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
EXPERIMENT = "spd"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # which pages the UI opens with
SOURCE = {"mlflow.source.name": "spd", "mlflow.source.type": "LOCAL"}
LOCAL = ("", "sqlite", "file")  # schemes of stores that are files
PROBE_SECONDS = 4  # a server that has not answered anything by then is unreachable
UNPROBED_SECONDS = 9  # a store whose address cannot be probed: everything, import included
MIRROR_SECONDS = 90  # a store that is there: creating the local one takes some 5 s on an idle machine
REQUEST_SECONDS = 5  # one request to a server that answered the probe

# ---------------------------------------------------------------- MLflow, seen from the run


def mirror_to_mlflow(
    record: Mapping[str, Any],
    path: Path | str,
    artifacts: Sequence[Path | str] = (),
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    warn: Callable[[str], None] | None = None,
) -> str | None:
    """Mirror a written record to MLflow; the id of the MLflow run, or None after one line of warning.

    Never raises, and gives up on a server that cannot be reached within 10 seconds. `path` (the record's file) and
    `artifacts` are stored with the run. A record with a `reproduction` becomes a child of the parent run of that
    name, which is made by the first stage and found again by every later one.
    """
    warn = warn or (lambda sentence: print(f"warning: {sentence}", file=sys.stderr))
    try:
        reason, seconds = _reach(tracking_uri)
        if reason is None:
            job = {"record": record, "files": [str(path), *map(str, artifacts)], "tracking_uri": tracking_uri}
            run_id, reason = _run_child(job, seconds)
    except Exception as error:
        reason = _one_line(f"{type(error).__name__}: {error}")
    if reason is None:
        return run_id
    warn(_without_password(f"the run is recorded in {path} but not in MLflow at {tracking_uri}: {reason}"))
    return None


def _reach(tracking_uri: str) -> tuple[str | None, float]:
    """Why the store cannot be used (None if it can) and how many seconds mirroring may take."""
    if util.find_spec("mlflow") is None:
        return "the package mlflow is not installed", 0
    address = urlsplit(tracking_uri)
    if address.scheme in LOCAL:
        return None, MIRROR_SECONDS
    if address.scheme in ("http", "https"):
        return _probe(lambda: _probe_http(tracking_uri)), MIRROR_SECONDS
    if address.hostname and address.port:
        host = (address.hostname, address.port)
        return _probe(lambda: create_connection(host, PROBE_SECONDS).close()), MIRROR_SECONDS
    return None, UNPROBED_SECONDS


def _probe(attempt: Callable[[], None]) -> str | None:
    """Run `attempt` for at most PROBE_SECONDS (a name that does not resolve blocks longer than any socket timeout)."""
    outcome: list[str | None] = []

    def run() -> None:
        try:
            attempt()
            outcome.append(None)
        except Exception as error:
            outcome.append(_one_line(str(getattr(error, "reason", error)) or type(error).__name__))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer within {PROBE_SECONDS} s"


def _probe_http(uri: str) -> None:
    try:
        bare = re.sub(r"//[^/@]*@", "//", uri)  # urllib takes a name and password for a part of the host
        urllib.request.urlopen(bare, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:  # whatever its status, a server is there
        answer.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, SSLCertVerificationError):  # MLflow has its own settings for certificates
            raise


# The child gets the parent's import path, so that it finds this package installed or not.
_CHILD = (
    "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['sys_path']; "
    "from spd.tracking import _child; _child(job)"
)


def _run_child(job: Mapping[str, Any], seconds: float) -> tuple[str | None, str | None]:
    """(run id, None) or (None, reason) from a process that mirrors `job` and is ended after `seconds`."""
    text = json.dumps({**job, "sys_path": sys.path})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], input=text, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"not finished after {seconds:g} s"
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None, _one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return answer.get("run_id"), answer.get("error")


def _one_line(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)


# ---------------------------------------------------------------- MLflow, in the child process


def _child(job: Mapping[str, Any]) -> None:
    """Entry point of the child process: mirror `job`, and say the run id or the error as the last line of stdout."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "30")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    try:
        from mlflow import MlflowClient

        uri = job["tracking_uri"]
        with _one_at_a_time(uri):
            answer = {"run_id": _mirror(MlflowClient(tracking_uri=uri), job["record"], job["files"])}
    except Exception as error:
        answer = {"error": _one_line(f"{type(error).__name__}: {error}")}
    print("\n" + json.dumps(answer), flush=True)


@contextmanager
def _one_at_a_time(tracking_uri: str) -> Iterator[None]:
    """Let one process after the other use a local store: two that create an sqlite store at once fail each other."""
    if fcntl is None or urlsplit(tracking_uri).scheme not in LOCAL:
        yield
        return
    name = hashlib.sha256(f"{os.getuid()} {os.getcwd()} {tracking_uri}".encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"spd-mlflow-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mirror(client: Any, record: Mapping[str, Any], files: Sequence[str]) -> str:
    experiment = _experiment(client)
    parent = _parent(client, experiment, record) if record["reproduction"] else None
    begin = _milliseconds(record)
    end = begin + round(1000 * record["seconds"])
    run = client.create_run(experiment, start_time=begin, tags=_tags(record, parent), run_name=_run_name(record))
    run_id, compared = run.info.run_id, [(name, value, 0) for name, value in headline(record).items()]
    _log(client, run_id, params(record), metrics(record["result"]) + compared, end)
    for file in files:
        client.log_artifact(run_id, file)
    client.set_terminated(run_id, "FINISHED", end)
    if parent is not None:
        _update_parent(client, parent, record, files[1:], end)
    return run_id


def _experiment(client: Any) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, tags=EXPERIMENT_TAGS)
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return found.experiment_id


def _parent(client: Any, experiment: str, record: Mapping[str, Any]) -> str:
    """The run of this reproduction, made if there is none whose parameters this record agrees with.

    MLflow's parameters are written once, so that a changed hyper-parameter begins a run of its own. Of several made
    at once the oldest counts.
    """
    name, asked = re.sub(r"[^\w .+:/-]", "_", record["reproduction"]), parent_params(record)
    condition = f"tags.`spd.reproduction` = '{name}' AND tags.`spd.role` = 'parent'"

    def agreeing() -> list[str]:
        runs = client.search_runs([experiment], condition)
        runs = [run for run in runs if all(run.data.params.get(k, v) == v for k, v in asked.items())]
        return [run.info.run_id for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))]

    found = agreeing()
    if found:
        return found[-1]
    tags = {"spd.reproduction": name, "spd.role": "parent", **SOURCE}
    mine = client.create_run(experiment, start_time=_milliseconds(record), tags=tags, run_name=name).info.run_id
    first = (agreeing() or [mine])[0]
    if first != mine:
        client.delete_run(mine)
    return first


def _update_parent(client: Any, parent: str, record: Mapping[str, Any], files: Sequence[str], end: int) -> None:
    """Give the parent what makes reproductions comparable: options, headline numbers, curves, and the figures."""
    run = client.get_run(parent)
    new = {key: value for key, value in parent_params(record).items() if key not in run.data.params}
    compared = [(name, value, 0) for name, value in headline(record).items()]
    _log(client, parent, new, curves(record["result"]) + compared, end)
    for file in files:
        client.log_artifact(parent, file)
    client.set_terminated(parent, "FINISHED", max(end, run.info.end_time or 0))


def _log(client: Any, run_id: str, texts: Mapping[str, str], points: Sequence[tuple], timestamp: int) -> None:
    from mlflow.entities import Metric, Param
    from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

    entries = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in texts.items()]
    values = [Metric(key, value, timestamp, step) for key, value, step in points]
    for part in _chunks(entries, MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=part)
    for part in _chunks(values, MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=part)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(1000 * datetime.fromisoformat(record["started"]).timestamp())


def _run_name(record: Mapping[str, Any]) -> str:
    model = (record["model"] or {}).get("name")
    parts = [record["command"], model and Path(str(model)).name, record["tp"] and f"tp{record['tp']}"]
    return " ".join(str(part) for part in parts if part)


def _tags(record: Mapping[str, Any], parent: str | None) -> dict[str, str]:
    tags = {"spd.record": record["id"], "spd.command": record["command"], **SOURCE}
    if parent is not None:
        tags |= {"mlflow.parentRunId": parent, "spd.role": "stage"}
    if record["git"]:
        tags |= {"mlflow.source.git.commit": record["git"]["commit"], "spd.dirty": str(record["git"]["dirty"]).lower()}
    return tags
