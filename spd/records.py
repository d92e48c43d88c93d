"""One self-describing JSON record a run, and the one way in which files are opened and written.

The record on disk is the truth: it is written whole or not at all, and everything else (MLflow, tables, figures) is
a function of it.
"""

import json
import math
import os
import platform
import re
import secrets
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter, ValidationError, field_validator

from spd import __version__
from spd.errors import SPDError, in_words

SCHEMA = 1
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "mlflow", "lm-eval")
LARGEST = 2**26  # bytes of a file that describes something: a configuration, an index, a plan, a record
T = TypeVar("T")

# ---------------------------------------------------------------- records


def make_record(command: str, config: Mapping, result: Mapping, *, started: datetime, **stated: Any) -> dict:
    """The record of one run: what was asked, of what, by which code, on which machine, and what came out.

    `config` holds every option of the command, `result` the document it prints, `started` is an aware datetime.
    `stated` are `tp`, `plan` (letters), `reproduction`, `model` (at least `name`, `fingerprint`, `blocks`), `data`
    (`text`, `fingerprint`, `seq_len`, `windows`, `skip`); and `argv` and `seconds` where they are not this process's.
    """
    from spd.launch import gpu_state

    started = started.astimezone(UTC)
    record = {
        "schema": SCHEMA,
        "id": f"{started:%Y%m%dT%H%M%S}-{command}-{secrets.token_hex(3)}",
        "command": command,
        "argv": ["spd", *sys.argv[1:]],
        "config": json.loads(json.dumps(dict(config), default=str)),  # paths, also in lists, as text
        **dict.fromkeys(("model", "tp", "data", "plan", "reproduction")),
        "result": dict(result),
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "gpu": gpu_state(),
        "started": started.isoformat(timespec="microseconds"),
        "seconds": (datetime.now(UTC) - started).total_seconds(),
    }
    return record | stated


def write_record(record: Mapping[str, Any], directory: Path | str = "runs") -> Path:
    """Writes `directory/ID.json` and gives its path."""
    path = Path(directory) / f"{record['id']}.json"
    write_json(path, record)
    return path


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those installed packages that can move a number; imports none."""
    found = {"python": platform.python_version(), "spd": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, and the name of each GPU that torch sees."""
    import psutil
    import torch

    from spd.launch import cores

    described = Path("/proc/cpuinfo")  # of Linux; `platform` does not know the model there
    model = re.search(r"^model name\s*:\s*(.+)", described.read_text() if described.exists() else "", re.MULTILINE)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from and whether tracked files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[1]  # named, as an installed copy may lie inside some other repository
    command = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", "describe", "--exclude=*"]
    command += ["--always", "--abbrev=40", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}


class Record(BaseModel):
    """What every record has; `schema` is also a name of pydantic's."""

    schema_: int = Field(alias="schema")
    id: str
    command: str
    result: dict
    hardware: dict
    started: AwareDatetime

    @field_validator("schema_")
    @classmethod
    def _readable(cls, schema: int) -> int:
        if schema != SCHEMA:
            raise ValueError(f"{schema} is of another version of spd; this one reads {SCHEMA}")
        return schema


def load_records(paths: Iterable[Path | str]) -> list[dict]:
    """Records of the given files, and of the JSON files in the given folders and theirs, oldest first.

    Raises SPDError when a file cannot be read, is not strict JSON, or is not a record of this schema.
    """
    found = {record["id"]: record for path in files_of(paths) for record in [read_record(path)]}
    return sorted(found.values(), key=lambda record: (record["started"], record["id"]))


def files_of(paths: Iterable[Path | str]) -> list[Path]:
    """The given files, and the JSON files in the given folders and theirs."""
    return [file for path in map(Path, paths) for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]


def read_record(path: Path) -> dict:
    try:
        record = strict_json(path)
        Record.model_validate(record)
        json.dumps(record, ensure_ascii=False).encode()  # half a character can be written in JSON, and nowhere else
        return record
    except OSError as error:
        raise SPDError(f"Cannot read record {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        raise SPDError(f"{path} is not a record: {in_words(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise SPDError(f"Record {path} is not strict JSON: {error}.") from error


def strict_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where that is not strict JSON, or where a number is not finite."""
    return json.loads(regular(path).read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number of JSON")
    return value


# ---------------------------------------------------------------- files


def regular(path: Path, largest: float = LARGEST) -> Path:
    """The path of a file that can be read to its end: not a folder, not a pipe that waits for ever, not too large.

    Raises OSError where nothing is there, SPDError otherwise.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise SPDError(f"{path} cannot be read: it is a {'folder' if path.is_dir() else 'pipe or device'}, not a file.")
    if found.st_size > largest:
        raise SPDError(f"{path} has {found.st_size:,} bytes, more than the {largest:,} that such a file may have.")
    return path


def inside(folder: Path, name: str) -> Path:
    """The file that an index or plan in a folder names, by a path and links that stay in the folder.

    In the hub's cache links lead from snapshots to blobs.
    """
    try:
        home, path = folder.resolve(), (folder / name).resolve()
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        if ".." in Path(name).parts or not any(map(path.is_relative_to, homes)):
            raise SPDError(f"The file {name}, which {folder} names, does not lie in it and is not opened.")
        return regular(folder / name, math.inf)
    except (OSError, ValueError, RuntimeError) as error:  # the last: links that go round
        raise SPDError(f"The file {name}, which {folder} names, cannot be read ({error}).") from error


def parsed(path: Path, form: type[T], wrong: str, missing: str | None = None) -> T:
    """What a JSON file from outside holds, as pydantic reads a `form`.

    Raises SPDError: `missing` where there is no such file, and what is `wrong` with one of another form.
    """
    try:
        return TypeAdapter(form).validate_json(regular(path).read_bytes())
    except OSError as error:
        absent = missing if isinstance(error, FileNotFoundError) else None
        raise SPDError(absent or f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise SPDError(f"{path} {wrong}: {in_words(error)}.") from None


def write_json(path: Path | str, document: Any) -> None:
    """Writes strict JSON, whole or not at all.

    Raises SPDError when a number is not finite, when something has no JSON form, or when the file cannot be written.
    """
    for place, value in _leaves(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise SPDError(f"{path} was not written: {place} ({value}) is not a finite number, which JSON cannot hold.")
    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SPDError(f"{path} was not written: {error}.") from error
    write_bytes(path, (text + "\n").encode(errors="replace"))  # half a character, of a file's name


def _leaves(document: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, Mapping):
        for key, part in document.items():
            yield from _leaves(part, f"{place}.{key}".lstrip("."))
    elif isinstance(document, list | tuple):
        for index, part in enumerate(document):
            yield from _leaves(part, f"{place}[{index}]")
    else:
        yield place, document


def write_bytes(path: Path | str, content: bytes) -> None:
    """`write_whole` of some bytes."""
    write_whole(path, lambda partial: partial.write_bytes(content))


def write_whole(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path`, then renames it: readers see the old file or the whole new one.

    Missing folders are made; a link is followed; a device or pipe (`/dev/null`) is written to, not replaced.
    Raises SPDError with the path and the reason.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file() and not target.is_dir():
            write(target)
            return
        write(partial)
        with open(partial, "rb") as file:  # on the disk before it has its name
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise SPDError(f"Cannot write {path}: {error.strerror or error}.") from error
    except Exception as error:  # torch and safetensors have errors of their own for a disk that is full
        reason = " ".join(str(error).split())[:100]
        raise SPDError(f"Cannot write {path}, perhaps for want of room ({reason}).") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            partial.unlink()


def check_writable(folder: Path | str) -> None:
    """Raises SPDError unless a file can be written into `folder`, which is made where it is missing."""
    probe = Path(folder) / f".{os.getpid()}.probe"
    write_bytes(probe, b"")
    probe.unlink(missing_ok=True)
