"""What every command does around its work: load, show progress, and publish one result."""

import hashlib
import json
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spd import mirror, track
from spd.data import Windows, read_windows
from spd.errors import SPDError
from spd.launch import Replicas, Runtime, bar, runtime, say, tracking_uri
from spd.plan import Plan, parse_blocks, read_plan_document
from spd.pretrained import SPDModel

NOT_NUMBERS = ("out", "records", "reproduction", "mlflow", "repairs", "batch_size")  # options that change no result
LONGEST_DEFAULT = 2048  # tokens a window where none is asked for: the paper's, if the model has the positions


class Session:
    """One run of a command with its options, on every process that was started for it."""

    def __init__(self, command: str, options: dict[str, Any]):
        self.command, self.options = command, SimpleNamespace(**options)
        self.started = datetime.now(UTC)
        self._stack = ExitStack()

    def __enter__(self) -> "Session":
        self.runtime: Runtime = self._stack.enter_context(runtime(getattr(self.options, "device", "cpu")))
        if self.runtime.is_main:  # before the work, lest its result have nowhere to go
            track.check_writable(self.options.records)
            if self.options.out is not None:
                track.check_writable(
                    self.options.out if self.command in ("report", "distill") else self.options.out.parent
                )
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    @cached_property
    def replicas(self) -> Replicas:
        """Copies of the model on the processes: `--data-parallel`, else one."""
        return self.runtime.replicas(getattr(self.options, "data_parallel", 1))

    def load(self) -> SPDModel:
        o = self.options
        shards = self.runtime.shards(o.tp, replicas=self.replicas)
        return SPDModel.from_pretrained(
            o.model, shards=shards, dtype=getattr(o, "dtype", "float32"), device=self.runtime.device
        )

    def calibration(self, model: SPDModel, windows: int, text: str | None = None) -> Windows:
        """The first `windows` of a text, for repairs; if it is the command's own, its windows must come after them."""
        if text in (None, self.options.text) and self.options.skip < windows:
            raise SPDError(
                f"Calibration and evaluation overlap; --calibration {windows} needs --skip {windows} or more."
            )
        return self.windows(model, windows, 0, text)

    def windows(
        self, model: SPDModel, windows: int | None = None, skip: int | None = None, text: str | None = None
    ) -> Windows:
        """Those of the options, or others."""
        o, text = self.options, text or self.options.text
        if text is None:
            raise SPDError("No text was given: --text FILE, 'builtin' or 'builtin-train'.")
        positions = model.config.max_positions
        seq_len = o.seq_len or min(positions, LONGEST_DEFAULT)
        found = read_windows(
            text, model.tokenizer, seq_len, windows or o.windows, o.skip if skip is None else skip, positions
        )
        if found.note and self.runtime.is_main:
            say(f"warning: {found.note}")
        return found

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

    def plan(self, model: SPDModel) -> Plan:
        """From `--plan`, with the repaired weights of a folder, or `--drop` and `--drop-mlp`, or everything `full`."""
        o, blocks = self.options, model.config.num_blocks
        if o.plan is None:
            return Plan.dropping(
                blocks, parse_blocks(o.drop or "none", blocks), parse_blocks(o.drop_mlp or "none", blocks)
            )
        self._refuse_plan_and_drop()
        model.load_plan(o.plan)
        return model.plan

    def plan_document(self, model: SPDModel) -> dict:
        """The content of `--plan` (policies, perhaps classes), or the policies of `--drop` and `--drop-mlp`."""
        if self.options.plan is None:
            return {"policies": self.plan(model).policies()}
        self._refuse_plan_and_drop()
        return read_plan_document(self.options.plan, model.fingerprint, model.tp, model.config.num_blocks)

    def _refuse_plan_and_drop(self) -> None:
        """Of a command with `--plan` given; not every one has `--drop`."""
        if any(getattr(self.options, name, None) is not None for name in ("drop", "drop_mlp")):
            raise SPDError("--plan already says what is dropped; leave out --drop and --drop-mlp.")

    def digest(self, *things: Any, apart: tuple[str, ...] = ()) -> str:
        """A name for what a result depends on: these things and the options, but for some and for where results go."""
        options = {k: v for k, v in vars(self.options).items() if k not in (*NOT_NUMBERS, *apart)}
        return hashlib.sha256(json.dumps([options, things], default=str, sort_keys=True).encode()).hexdigest()[:12]

    def progress(self, total: int, unit: str):
        return bar(total, unit, shown=self.runtime.is_main)

    def publish(
        self,
        result: dict,
        model: dict | None = None,
        tp: int | None = None,
        data: dict | None = None,
        plan: str | None = None,
        artifacts: list[Path] = (),
    ) -> None:
        """Writes `--out` and the record, prints the result, mirrors the record to MLflow; on rank 0 alone."""
        if not self.runtime.is_main:
            return
        document = result | {k: v for k, v in (("model", model), ("tp", tp), ("data", data)) if v is not None}
        o = self.options
        if o.out is not None and self.command not in ("report", "ledger", "export"):
            track.write_json(o.out / "result.json" if self.command == "distill" else o.out, document)
        record = track.make_record(
            self.command, vars(o), document, started=self.started, model=model, tp=tp, data=data, plan=plan,
            reproduction=o.reproduction,
        )  # fmt: skip
        path = track.write_record(record, o.records)
        print(json.dumps(document, separators=(",", ":"), allow_nan=False), flush=True)
        if o.mlflow:
            mirror.mirror_to_mlflow(record, path, artifacts, tracking_uri=tracking_uri() or mirror.DEFAULT_TRACKING_URI)
