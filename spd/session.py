"""One run of a command: its processes, model and data; the question it answers; and one result, published.

Nothing heavy is imported here before it is needed: a question that was answered before is answered again at once.
"""

import hashlib
import json
import math
import os
import sys
import time
from argparse import Namespace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spd import __version__
from spd.errors import SPDError
from spd.options import Command

DROPS, SENT = ("drop", "drop_mlp"), ("bits", "bits_plain", "group")  # options that say what a plan would
LONGEST_DEFAULT = 2048  # tokens a window where none is asked for: the paper's, if the model has the positions
READ_WHOLE = 2**26  # bytes of a file that are read each time it is asked about; of larger ones samples
SAMPLES, SAMPLE_BYTES = 16, 4096


class Session:
    """A command with its options (an attribute each), on every process that was started for it."""

    def __init__(self, command: Command, options: Namespace):
        self.command, self.options, self.started = command, options, datetime.now(UTC)
        self.clock = time.monotonic()  # lengths are not the difference of two dates, which somebody may set back
        self.question = self.question_without()
        self.groups = {}  # shards of this process, by the copies of the model among whom it has them
        self.result_file = None  # where `--out` takes the result; the command may write there itself
        if options.out is not None and command.result_in is not None:
            self.result_file = options.out / command.result_in

    def question_without(self, *names: str) -> str:
        """A name for what a result depends on: command, version, options, and the content of files that they name."""
        asked = {o.name: _content(getattr(self.options, o.name)) for o in self.command.options if not o.aside}
        asked = {name: value for name, value in asked.items() if name not in names}
        text = json.dumps([self.command.name, __version__, asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self) -> None:
        """Answers from `--out` where it can, else on all processes."""
        if (document := self.answer()) is not None:
            print(f"{self.result_file} holds this answer already (remove it to ask again).", file=sys.stderr)
            print_result(document)
            return
        from spd import records
        from spd.launch import runtime

        with runtime(getattr(self.options, "device", "cpu")) as self.runtime:
            self.replicas = self.runtime.replicas(getattr(self.options, "data_parallel", 1))
            if self.runtime.is_main:  # before the work, lest its result have nowhere to go
                records.check_writable(self.options.records)
                if self.result_file is not None and self.result_file.is_dir():
                    raise SPDError(f"The result cannot be written to {self.result_file}: that is a folder.")
                if self.options.out is not None:
                    records.check_writable((self.result_file or self.options.out / "x").parent)
            self.command.function(self)

    def answer(self) -> dict | None:
        """The result in `--out`, if it answers this very question and its record is still there."""
        if self.result_file is None:
            return None
        from spd.records import strict_json

        try:
            document = strict_json(self.result_file)
            recorded = Path(self.options.records, f"{document['record']}.json").exists()
            return document if document["question"] == self.question and recorded else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SPDError):  # no file, or not of this kind
            return None

    # ------------------------------------------------------------ model and data

    def fewest_replicas(self):
        """As few copies of the model as the processes can be, each on a divisor of tp of them."""
        return self.runtime.replicas(self.runtime.world // math.gcd(self.runtime.world, self.options.tp))

    def shards(self, replicas):
        """This process's where so many copies of the model run; first asked for by all of them together."""
        if replicas not in self.groups:
            self.groups[replicas] = self.runtime.shards(self.options.tp, replicas=replicas)
        return self.groups[replicas]

    def load(self, dtype: str | None = None, replicas=None):
        """The `SPDModel` of the options, as read, perhaps of another type or on other copies' processes."""
        from spd.launch import say
        from spd.pretrained import SPDModel

        o, shards = self.options, self.shards(replicas or self.replicas)
        model = SPDModel.from_pretrained(o.model, shards=shards, dtype=dtype or o.dtype, device=self.runtime.device)
        if self.runtime.is_main and (note := model.config.padding_note(o.tp)):
            say(f"note: {note}")
        return model

    def windows(self, model, windows: int | None = None, skip: int | None = None, text: str | None = None):
        """The `Windows` of the options, or others."""
        from spd.data import read_windows
        from spd.launch import say

        o, text = self.options, text or self.options.text
        if text is None:
            raise SPDError("No text was given: --text FILE, 'builtin' or 'builtin-train'.")
        positions = model.config.max_positions
        seq_len = o.seq_len or min(positions, LONGEST_DEFAULT)
        model.config.validate_length(seq_len)
        skip = o.skip if skip is None else skip
        found = read_windows(text, model.tokenizer, seq_len, windows or o.windows, skip, positions)
        model.known(found.tokens.flatten().tolist())
        if found.note and self.runtime.is_main:
            say(f"warning: {found.note}")
        return found

    def calibration(self, model, text: str | None = None):
        """The first windows of a text, for repairs; if it is the command's own, its windows must come after them."""
        o, windows = self.options, self.options.calibration
        if text in (None, o.text) and o.skip < windows:
            raise SPDError(
                f"Calibration and evaluation overlap; --calibration {windows} needs --skip {windows} or more."
            )
        return self.windows(model, windows, 0, text)

    def accuracy(self):
        """What `--tasks` asks for (`spd.tasks.Accuracy`); None without."""
        o = self.options
        if o.tasks is None:
            return None
        from spd.tasks import Accuracy, load_tasks

        harness = {"batch_size": o.batch_size, "replicas": self.replicas, "is_main": self.runtime.is_main}
        return Accuracy(load_tasks(o.tasks, o.tasks_dir), o.limit, **harness)

    def site(self):
        """Where `--gpu` or `--machine`, `--nodes` and `--link` say that it runs."""
        from spd.latency import Site

        o = self.options
        return Site(o.gpu, o.machine or o.calibration, o.nodes, o.link, 1e-6 * o.launch_us)

    def shape(self):
        """Configuration of `--model` or `--shape`, its description, and its fingerprint where a plan is to be for it.

        A hub id that a named shape is of stands for that; of others the configuration alone is fetched.
        """
        from spd.checkpoint import Checkpoint
        from spd.config import HUB_IDS, ModelConfig, named_shape
        from spd.pretrained import describe, display_name, resolve

        o = self.options
        shape = getattr(o, "shape", None)
        if (o.model is None) == (shape is None):
            raise SPDError("Give either --model (a folder, GGUF file or hub id) or --shape (a name).")
        if name := HUB_IDS.get(o.model, shape):
            config = named_shape(name)
            return config, describe(config, name, f"shape-{name}"), None
        planned = getattr(o, "plan", None) is not None
        folder = resolve(o.model, *([] if planned else [["config.json"]]))
        config, name = ModelConfig.from_folder(folder), display_name(o.model)
        fingerprint = Checkpoint(folder).fingerprint() if planned else None
        return config, describe(config, name, fingerprint or f"shape-{name}"), fingerprint

    def plans(self, config, fingerprint: str | None) -> list:
        """Those that `--plan`, `--drop` or `--percent` ask to be timed, each with its percentage where it is one."""
        from spd.latency import plan_at
        from spd.plan import Plan

        o = self.options
        if o.plan or o.drop or o.drop_mlp:
            if o.percent:
                raise SPDError("--percent says what is dropped, and so do --plan and --drop: give one of them.")
            asked = [SimpleNamespace(config=config, tp=tp, fingerprint=fingerprint) for tp in o.tp]
            first, *_ = map(self.plan_document, asked)  # each degree is checked
            return [(Plan.from_document(first), None)]
        percents = o.percent or ([0.0] if o.bits or o.bits_plain else [70.0])
        found = [plan_at(config.num_blocks, percent).sending(o.bits, o.bits_plain, o.group) for percent in percents]
        for plan, tp in product(found, o.tp):
            plan.check_groups(tp)
        return list(zip(found, percents, strict=True))

    def plan_for_target(self, scored: dict) -> dict:
        """The document of a plan for `--target-speedup` or `--max-loss`; with `--text` it is searched and measured."""
        from spd.evaluate import perplexity
        from spd.plan import Plan, read_plan
        from spd.planner import read_sensitivity
        from spd.targets import Choices, Target, kept

        o = self.options
        o.tp = scored["tp"]
        if o.budget is not None:
            raise SPDError("A budget and a target are two ways to choose a plan: give one of them.")
        prediction = self.site().prediction(self.shape()[0], o.tp, o.batch, o.prompt_len, o.new_tokens)
        choices = Choices.of(scored.get("scores"), prediction, o.phase)
        target = Target(prediction, o.phase, o.target_speedup, o.max_loss)
        if o.text is None:
            result = target.promise(target.plan(choices), choices)
        else:
            model = self.load()
            read_sensitivity(o.sensitivity, model.fingerprint)
            windows = self.windows(model).tokens
            if len(windows) < 2:
                raise SPDError("Half of the windows serve the search, the others the measurement: give two or more.")

            def nats(part, plan) -> float:
                model.plan = plan
                return perplexity(model.transformer, part)["nats"]

            first, second = (partial(nats, part) for part in windows.split((len(windows) + 1) // 2))
            plan, most, shares = target.searched(choices, first, o.evaluations)
            result = target.promise(plan, choices, most)
            result["measured"] = kept(result, second, prediction.full) | {"of_estimates": shares}
        if o.beside is not None:
            other = read_plan(o.beside, scored["model"]["fingerprint"], o.tp).plan
            result["shares_cache"] = other.shares_cache(Plan.from_document(result))
        return result

    def plan_document(self, model) -> dict:
        """The content of `--plan` (policies, perhaps classes), or the policies of the options that stand for it.

        `model` is anything with a configuration, a degree and a fingerprint.
        """
        from spd.plan import Plan, parse_blocks, read_plan

        blocks = model.config.num_blocks
        drops, sent = ([getattr(self.options, name, None) for name in names] for names in (DROPS, SENT))
        if self.options.plan is None:
            plan = Plan.dropping(blocks, *(parse_blocks(d or "none", blocks) for d in drops)).sending(*sent)
            plan.check_groups(model.tp)
            return plan.document()
        if any((*drops, *sent)):
            others = ", ".join(f"--{name}".replace("_", "-") for name in (*DROPS, *SENT))
            raise SPDError(f"--plan already says what every sync point does; leave out {others}.")
        return read_plan(self.options.plan, model.fingerprint, model.tp, blocks).model_dump(exclude_unset=True)

    def take_plan(self, model) -> dict:
        """Gives the model its plan, with the repaired weights of a folder; what a result says of the plan."""
        from spd.plan import Plan

        model.plan = Plan.from_document(self.plan_document(model))
        if self.options.plan is not None:
            model.load_plan(self.options.plan)
        said = {"plan": str(model.plan)} | ({"group": model.plan.group} if model.plan.group else {})
        return said | {"bytes_share": model.plan.bytes_share(model.config.hidden_size, model.tp)}

    def progress(self, total: int, unit: str):
        """A bar on the main process; a context that gives the function to call with units done."""
        from spd.launch import bar

        return bar(total, unit, shown=self.runtime.is_main)

    # ------------------------------------------------------------ the result

    def publish(
        self, result: dict, model: dict | None = None, data: dict | None = None, tp: int | None = None, files=()
    ):
        """Writes the record, then `--out`, then stdout, then MLflow; on the main process alone.

        In this order a kill between leaves nothing that counts as done without its record. `model` and `data` are
        descriptions (`SPDModel.describe`, `Windows.describe`), `tp` is the option's where it is left out; a `plan` of
        the result is in letters. `files` are attached to MLflow's run.
        """
        if not self.runtime.is_main:
            return
        from spd import records, tracking
        from spd.launch import tracking_uri

        o = self.options
        stated = {"model": model, "tp": tp or getattr(o, "tp", None), "data": data}
        document = result | {name: value for name, value in stated.items() if value is not None}
        stated |= {"plan": result.get("plan"), "reproduction": o.reproduction}
        stated |= {"seconds": time.monotonic() - self.clock}
        record = records.make_record(self.command.name, vars(o), document, started=self.started, **stated)
        document |= {"question": self.question, "record": record["id"]}
        path = records.write_record(record | {"result": document}, o.records)
        if self.result_file is not None:
            records.write_json(self.result_file, document)
        print_result(document)
        if o.mlflow:
            tracking.mirror(path, files, tracking_uri())


def print_result(document: dict) -> None:
    """The last line of stdout."""
    print(json.dumps(document, separators=(",", ":"), allow_nan=False), flush=True)


def _content(value: Any) -> Any:
    """Of an option's value: a file's or folder's digest instead of its name."""
    if isinstance(value, list):
        return [_content(part) for part in value]
    if isinstance(value, str | Path) and os.path.exists(value):  # a prompt may be longer than a name can be
        return digest_of_path(Path(value))
    return str(value) if isinstance(value, Path) else value


def digest_of_path(path: Path) -> str:
    """Of a file's content, or of those of a folder; of large files size and samples."""
    from spd.records import regular

    digest = hashlib.sha256()
    for file in sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]:
        size = regular(file, math.inf).stat().st_size
        step, read = (size // SAMPLES, SAMPLE_BYTES) if size > READ_WHOLE else (READ_WHOLE, READ_WHOLE)
        digest.update(f"{file.name} {size} ".encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            for place in range(0, size, step):
                stream.seek(place)
                digest.update(stream.read(read))
    return digest.hexdigest()[:16]
