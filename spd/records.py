"""One self-describing JSON record a run.

The record on disk is the truth: it is written whole or not at all, and everything else (MLflow, tables, figures) is
a function of it.
"""

import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from spd import __version__
from spd.errors import SPDError

SCHEMA = 1
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "mlflow", "lm-eval")

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


# ---------------------------------------------------------------- reading


def load_records(paths: Iterable[Path | str]) -> list[dict]:
    """Records of the given files, and of the JSON files in the given folders and theirs, oldest first.

    Raises SPDError when a file cannot be read, is not strict JSON, or is not a record of this schema.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    records = {record["id"]: record for record in map(_load, files)}
    return sorted(records.values(), key=lambda record: (record["started"], record["id"]))


def _load(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise SPDError(f"Cannot read record {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise SPDError(f"Record {path} is not strict JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise SPDError(f"{path} is not a record: it has no key schema with the value {SCHEMA}.")
    missing = [key for key in ("id", "command", "result", "started", "hardware") if record.get(key) is None]
    if missing:
        raise SPDError(f"Record {path} has no {', '.join(missing)}.")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")
