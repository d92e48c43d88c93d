"""One self-describing JSON record a run, and its mirror in MLflow.

The record on disk is the truth: it is written whole or not at all, and everything else (MLflow, tables, figures) is
a function of it. MLflow is fed by a child process with a time limit, so that neither its import, its log lines, its
retries nor a server that never answers can touch the run whose result is already on disk.
"""

import hashlib
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from socket import create_connection
from ssl import SSLCertVerificationError
from typing import Any
from urllib.parse import urlsplit

from spd import __version__
from spd.errors import SPDError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

SCHEMA = 1
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
EXPERIMENT = "spd"
LOCAL = ("", "sqlite", "file")  # schemes of stores that are files
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "mlflow", "lm-eval")
PROBE_SECONDS = 4  # a server that has not answered anything by then is unreachable
UNPROBED_SECONDS = 9  # a store whose address cannot be probed: everything, import included
MIRROR_SECONDS = 90  # a store that is there: creating the local one takes some 5 s on an idle machine
REQUEST_SECONDS = 5  # one request to a server that answered the probe

# ---------------------------------------------------------------- records


def make_record(
    command: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    *,
    started: datetime,
    seconds: float | None = None,
    model: Mapping[str, Any] | None = None,
    tp: int | None = None,
    data: Mapping[str, Any] | None = None,
    plan: str | None = None,
    reproduction: str | None = None,
    argv: Sequence[str] | None = None,
) -> dict:
    """The record of one run: what was asked, of what, by which code, on which machine, and what came out.

    `started` is an aware datetime; `seconds` is counted from it to now when left out. `config` holds every option of
    the command, `result` the document the command prints, `plan` the letters, `model` at least `name`, `fingerprint`
    and `blocks`, `data` `text`, `fingerprint`, `seq_len`, `windows` and `skip`.
    """
    started = started.astimezone(UTC)
    return {
        "schema": SCHEMA,
        "id": f"{started:%Y%m%dT%H%M%S}-{command}-{secrets.token_hex(3)}",
        "command": command,
        "argv": ["spd", *sys.argv[1:]] if argv is None else list(argv),
        "config": json.loads(json.dumps(dict(config), default=str)),  # paths, also in lists, as text
        "model": None if model is None else dict(model),
        "tp": tp,
        "data": None if data is None else dict(data),
        "plan": plan,
        "result": dict(result),
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "started": started.isoformat(timespec="microseconds"),
        "seconds": (datetime.now(UTC) - started).total_seconds() if seconds is None else seconds,
        "reproduction": reproduction,
    }


def write_record(record: Mapping[str, Any], directory: Path | str = "runs") -> Path:
    """Write `record` as `directory/ID.json` and return the path. Raises SPDError as `write_json` does."""
    path = Path(directory) / f"{record['id']}.json"
    write_json(path, record)
    return path


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those installed packages that can move a number; imports none."""
    found = {"python": platform.python_version(), "spd": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, and the name of each GPU that torch sees."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    return {"cpu": _cpu_model(), "cores": cores, "memory_gib": memory, "gpus": _gpus()}


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from and whether tracked files differ from it; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside some other repository
        commit = git("rev-parse", "HEAD").strip()
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------- files


def write_json(path: Path | str, document: Any) -> None:
    """Write `document` as strict JSON, whole or not at all.

    Raises SPDError when a number is not finite, when something has no JSON form, or when the file cannot be written.
    """
    place = next(_non_finite(document), None)
    if place is not None:
        raise SPDError(f"{path} was not written: {place} is not a finite number, which JSON cannot hold.")
    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SPDError(f"{path} was not written: {error}.") from error
    write_bytes(path, (text + "\n").encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename: readers see the old file or the whole new one.

    Missing folders are made; a link is followed; a device or pipe (`/dev/null`) is written to, not replaced.
    Raises SPDError with the path and the reason.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(content)
            return
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            _forget(partial)
            raise
    except OSError as error:
        raise SPDError(f"Cannot write {path}: {error.strerror or error}.") from error


def check_writable(folder: Path | str) -> None:
    """Raises SPDError unless a file can be written into `folder`, which is made where it is missing."""
    probe = Path(folder) / f".{os.getpid()}.probe"
    write_bytes(probe, b"")
    _forget(probe)


def _forget(path: Path) -> None:
    with suppress(OSError):  # the reason already on its way up is the one worth reading
        path.unlink(missing_ok=True)


def _non_finite(document: Any, place: str = "document") -> Iterator[str]:
    if isinstance(document, float) and not math.isfinite(document):
        yield f"{place} ({document})"
    elif isinstance(document, Mapping):
        for key, value in document.items():
            yield from _non_finite(value, str(key) if place == "document" else f"{place}.{key}")
    elif isinstance(document, (list, tuple)):
        for index, value in enumerate(document):
            yield from _non_finite(value, f"{place}[{index}]")


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
    "from spd.track import _child; _child(job)"
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
    run_id = run.info.run_id
    _log(client, run_id, params(record), metrics(record["result"]), end)
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
        return client.create_experiment(EXPERIMENT)
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return found.experiment_id


def _parent(client: Any, experiment: str, record: Mapping[str, Any]) -> str:
    """The run of this reproduction, made if it is not there; the oldest, should two stages have made one at once."""
    name = re.sub(r"[^\w .+:/-]", "_", record["reproduction"])
    condition = f"tags.`spd.reproduction` = '{name}' AND tags.`spd.role` = 'parent'"

    def oldest() -> str | None:
        runs = client.search_runs([experiment], condition)
        return min(runs, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id if runs else None

    found = oldest()
    if found is not None:
        return found
    tags = {"spd.reproduction": name, "spd.role": "parent"}
    mine = client.create_run(experiment, start_time=_milliseconds(record), tags=tags, run_name=name).info.run_id
    found = oldest()
    if found not in (mine, None):
        client.delete_run(mine)
    return found or mine


def _update_parent(client: Any, parent: str, record: Mapping[str, Any], files: Sequence[str], end: int) -> None:
    """Give the parent what makes reproductions comparable: model, tp a stage, the stage's end values, its figures."""
    run = client.get_run(parent)
    wanted = {f"{record['command']}/tp": record["tp"], **_model_params(record), **_data_params(record)}
    new = {k: v for k, v in wanted.items() if v is not None and k not in run.data.params}
    _log(client, parent, _texts(new), [(name, value, 0) for name, value in summary(record).items()], end)
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
    tags = {"spd.record": record["id"], "spd.command": record["command"], "mlflow.source.name": "spd"}
    if parent is not None:
        tags |= {"mlflow.parentRunId": parent, "spd.role": "stage"}
    if record["git"]:
        tags |= {"mlflow.source.git.commit": record["git"]["commit"], "spd.dirty": str(record["git"]["dirty"]).lower()}
    return tags


# ---------------------------------------------------------------- what of a record MLflow is shown


def params(record: Mapping[str, Any]) -> dict[str, str]:
    """MLflow parameters of a record: the options under `config/`, model, data, tp, plan letters, machine, versions."""
    hardware, config = record["hardware"], {f"config/{key}": value for key, value in record["config"].items()}
    machine = {"cpu": hardware["cpu"], "cores": hardware["cores"], "gpus": ", ".join(hardware["gpus"])}
    package = {f"version/{name}": version for name, version in record["versions"].items()}
    named = {"command": record["command"], "tp": record["tp"], "plan": record["plan"] or record["result"].get("plan")}
    return _texts({**named, **_model_params(record), **_data_params(record), **machine, **config, **package})


def _model_params(record: Mapping[str, Any]) -> dict[str, Any]:
    model = record["model"] or {}
    return {"model" if key == "name" else f"model/{key}": value for key, value in model.items()}


def _data_params(record: Mapping[str, Any]) -> dict[str, Any]:
    return {f"data/{key}": value for key, value in (record["data"] or {}).items()}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    flat = {_key(key): value for key, value in _flatten(values)}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items() if value != ""}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    return re.sub(r"[^\w .:/-]", "_", name)[:250]


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
        step = next((point[k] for k in ("blocks", "blocks_dropped", "index") if type(point.get(k)) is int), position)
        name = f"{prefix}{point['strategy']}/" if isinstance(point.get("strategy"), str) else prefix
        if "blocks_dropped" in point and "percent" not in point and isinstance(point.get("plan"), str):
            point = {**point, "percent": 100 * step / len(point["plan"].split())}
        yield from _metrics(point, name, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of a record by which whole reproductions are compared (perplexity and TTFT at 0 and 100 %)."""
    result, found = record["result"], {}
    if record["command"] == "sweep":
        for point in result["curve"]:
            strategy = point.get("strategy", "zs")
            if round(point["percent"]) in (0, 100):
                found[_key(f"perplexity/{strategy}/{round(point['percent'])}_percent")] = point["perplexity"]
    elif record["command"] == "bench":
        for plan in result["plans"]:
            percent = 100 * plan["blocks_dropped"] / len(plan["plan"].split())
            if percent in (0, 100):
                found[f"ttft_ms/{percent:g}_percent"] = plan["ttft_ms"]["median"]
    else:
        found = {f"{record['command']}/{k}": result[k] for k in ("perplexity", "nats") if _is_number(result.get(k))}
    return {**found, f"seconds/{record['command']}": record["seconds"]}
