"""One run of a command: its processes, model and data; the question it answers; and one result, published.

Nothing heavy is imported here before it is needed: a question that was answered before is answered again at once.
"""

import hashlib
import json
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from spd import __version__, records
from spd.errors import SPDError

# Options that change no result, but where it goes and how it is shown.
ASIDE = ("out", "records", "reproduction", "mlflow", "repairs", "batch_size")
LONGEST_DEFAULT = 2048  # tokens a window where none is asked for: the paper's, if the model has the positions
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file too large to be read whole each time it is asked about


def digest_of_path(path: Path) -> str:
    """Of a file's content, or of those of a folder; of large files size and samples."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode() if path.is_dir() else b"")
            with file.open("rb") as stream:
                if size <= 2**26:
                    digest.update(stream.read())
                else:
                    for place in range(SAMPLES):
                        stream.seek(place * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                        digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def question(command: str, options: dict[str, Any], aside: tuple[str, ...] = ()) -> str:
    """A name for what a result depends on: command, version, options, and the content of files that they name."""

    def content(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [content(part) for part in value]
        if isinstance(value, str | Path) and str(value) and Path(value).exists():
            return digest_of_path(Path(value))
        return str(value) if isinstance(value, Path) else value

    asked = {name: content(value) for name, value in options.items() if name not in (*ASIDE, *aside)}
    return hashlib.sha256(json.dumps([command, __version__, asked], sort_keys=True).encode()).hexdigest()[:16]


class Session:
    """A command with its options (an attribute each), on every process that was started for it.

    `result_file` is where `--out` takes the result (None: the command writes there itself, or there is no --out).
    """

    def __init__(self, command: str, options: Any, result_file: Path | None):
        self.command, self.options, self.result_file = command, options, result_file
        self.question = question(command, vars(options))
        self.started = datetime.now(UTC)
        self._stack = ExitStack()

    def answered(self) -> dict | None:
        """The result in `--out`, if it answers this very question and its record is still there."""
        try:
            document = json.loads(self.result_file.read_text())
            recorded = Path(self.options.records, f"{document['record']}.json").exists()
            return document if document["question"] == self.question and recorded else None
        except (AttributeError, OSError, ValueError, KeyError, TypeError):  # no file, or not of this kind
            return None

    def __enter__(self) -> "Session":
        from spd.launch import runtime

        self.runtime = self._stack.enter_context(runtime(getattr(self.options, "device", "cpu")))
        if self.runtime.is_main:  # before the work, lest its result have nowhere to go
            records.check_writable(self.options.records)
            if self.options.out is not None:
                records.check_writable((self.result_file or Path(self.options.out, "x")).parent)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    # ------------------------------------------------------------ model and data

    @cached_property
    def replicas(self):
        """Copies of the model on the processes: `--data-parallel`, else one."""
        return self.runtime.replicas(getattr(self.options, "data_parallel", 1))

    def load(self):
        """The `SPDModel` of the options, as read."""
        from spd.pretrained import SPDModel

        o = self.options
        shards = self.runtime.shards(o.tp, replicas=self.replicas)
        dtype = getattr(o, "dtype", "float32")
        return SPDModel.from_pretrained(o.model, shards=shards, dtype=dtype, device=self.runtime.device)

    def windows(self, model, windows: int | None = None, skip: int | None = None, text: str | None = None):
        """The `Windows` of the options, or others."""
        from spd.data import read_windows
        from spd.launch import say

        o, text = self.options, text or self.options.text
        if text is None:
            raise SPDError("No text was given: --text FILE, 'builtin' or 'builtin-train'.")
        positions = model.config.max_positions
        seq_len = o.seq_len or min(positions, LONGEST_DEFAULT)
        skip = o.skip if skip is None else skip
        found = read_windows(text, model.tokenizer, seq_len, windows or o.windows, skip, positions)
        if found.note and self.runtime.is_main:
            say(f"warning: {found.note}")
        return found

    def calibration(self, model, windows: int, text: str | None = None):
        """The first `windows` of a text, for repairs; if it is the command's own, its windows must come after them."""
        if text in (None, self.options.text) and self.options.skip < windows:
            raise SPDError(
                f"Calibration and evaluation overlap; --calibration {windows} needs --skip {windows} or more."
            )
        return self.windows(model, windows, 0, text)

    def accuracy(self):
        """What `--tasks` asks for (`spd.tasks.Accuracy`); None without."""
        o = self.options
        if o.tasks is None:
            return None
        try:
            from spd.tasks import Accuracy, load_tasks
        except ImportError as error:
            raise SPDError(f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}).") from error
        options = {"batch_size": o.batch_size, "replicas": self.replicas, "is_main": self.runtime.is_main}
        return Accuracy(load_tasks(o.tasks, o.tasks_dir), o.limit, **options)

    def plan_document(self, model) -> dict:
        """The content of `--plan` (policies, perhaps classes), or the policies of `--drop` and `--drop-mlp`."""
        from spd.plan import Plan, parse_blocks, read_plan_document

        o, blocks = self.options, model.config.num_blocks
        drops = [getattr(o, name, None) for name in ("drop", "drop_mlp")]
        if o.plan is None:
            return {"policies": Plan.dropping(blocks, *(parse_blocks(d or "none", blocks) for d in drops)).policies()}
        if any(drops):
            raise SPDError("--plan already says what is dropped; leave out --drop and --drop-mlp.")
        return read_plan_document(o.plan, model.fingerprint, model.tp, blocks)

    def take_plan(self, model) -> str:
        """Gives the model its plan, with the repaired weights of a folder; the plan's letters."""
        from spd.plan import Plan

        policies = self.plan_document(model)["policies"]
        if self.options.plan is None:
            model.plan = Plan.from_policies(policies)
        else:
            model.load_plan(self.options.plan)
        return str(model.plan)

    def progress(self, total: int, unit: str):
        """A bar on the main process; a context that gives the function to call with units done."""
        from spd.launch import bar

        return bar(total, unit, shown=self.runtime.is_main)

    # ------------------------------------------------------------ the result

    def publish(self, result: dict, model=None, tp=None, data=None, plan=None, files=()) -> None:
        """Writes the record, then `--out`, then stdout, then MLflow; on the main process alone.

        In this order a kill between leaves nothing that counts as done without its record. `model` and `data` are
        descriptions (`SPDModel.describe`, `Windows.describe`), `plan` letters; `files` are attached to MLflow's run.
        """
        if not self.runtime.is_main:
            return
        o, stated = self.options, {"model": model, "tp": tp, "data": data}
        document = result | {name: value for name, value in stated.items() if value is not None}
        record = records.make_record(
            self.command, vars(o), document, started=self.started, **stated, plan=plan, reproduction=o.reproduction
        )
        document |= {"question": self.question, "record": record["id"]}
        path = records.write_record(record | {"result": document}, o.records)
        if self.result_file is not None:
            records.write_json(self.result_file, document)
        print_result(document)
        if o.mlflow:
            from spd import tracking
            from spd.launch import tracking_uri

            tracking.mirror(path, files, tracking_uri())


def print_result(document: dict) -> None:
    """The last line of stdout."""
    print(json.dumps(document, separators=(",", ":"), allow_nan=False), flush=True)
