"""Options of the command line, commands with the options they take, and experiments, which give options their values.

In an experiment's YAML the values of `common` are every command's defaults, those of a section the command's own.
"""

import argparse
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from spd.errors import SPDError, one_of, reading, short


class Parser(argparse.ArgumentParser):
    """A wrong word ends as one sentence."""

    def error(self, message: str):
        self.exit(2, short(f"{message[0].upper()}{message[1:]}; see '{self.prog} --help'.") + "\n")


@dataclass(frozen=True)
class Option:
    """An argument of argparse's. `aside`: it changes no result, but where that goes and how it is shown."""

    flag: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    aside: bool = False
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser, **changes: Any) -> None:
        kind = {"action": argparse.BooleanOptionalAction} if self.type is bool else {"type": self.type}
        parser.add_argument(self.flag, **{"help": self.help, "default": self.default, **kind, **self.how, **changes})

    def read(self, value: Any, place: str) -> Any:
        """A value of an experiment, as if it were given. Raises SPDError saying at which place it is wrong."""
        if isinstance(value, bool) != (self.type is bool) or not isinstance(value, bool | int | float | str):
            raise SPDError(f"{place}: {reprlib.repr(value)} is not a value of this option.")
        try:
            found = value if self.type is bool else self.type(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise SPDError(f"{place}: {error} (given: {value!r}).") from None
        return [found] if self.how.get("action") == "append" else found


def option(
    flag: str, help: str, type: Callable[[str], Any] = str, default: Any = None, *, aside: bool = False, **how: Any
) -> Option:
    """`type` bool makes a switch, with its --no-; `how` is argparse's."""
    return Option(flag, help, type, default, aside, how)


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """The type of a number's option."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole' if kind is int else 'a'} number") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"it must be at least {least}, and is {text}")
        return value

    return number


def several(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """The type of a list of numbers, as in 1,32."""
    return lambda text: [kind(part) for part in text.split(",")]


def percentages(text: str) -> list[float]:
    """The type of a list of percentages."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SPDError(f"'{text}' is not a list of percentages; write them as in 0,25,50.") from None


def number_of_bits(text: str) -> int:
    """The type of a number of bits a value is sent in."""
    return int(one_of("number of bits", text, ("8", "4", "3", "2")))


OUTPUT = (
    option("--out", "Where to write the result, too; asked the same again, it is given from there.", Path, aside=True),
    option("--records", "Folder for the record of this run.", Path, Path("runs"), aside=True),
    option("--reproduction", "Name of what this run is a stage of (its parent run in MLflow).", aside=True),
    option("--mlflow", "Show the record in MLflow (MLFLOW_TRACKING_URI, else ./mlflow.db).", bool, True, aside=True),
)


# ---------------------------------------------------------------- options that several commands share

DEVICE = partial(one_of, "device", known=("cpu", "cuda"))
MATMUL = partial(one_of, "matmul", known=("tf32", "fp32"))
DTYPE = partial(one_of, "dtype", known=("float32", "bfloat16", "float16"))
COMPUTE = (
    option("--device", "cpu or cuda (one GPU a process).", DEVICE, "cpu"),
    option("--dtype", "Of weights and arithmetic: float32, bfloat16 or float16.", DTYPE, "float32"),
    option("--seed", "Seed of everything random.", int, 0),
)
MODEL = (
    option(
        "--model",
        "Folder of Hugging Face's form, GGUF file, 'spd-tiny', or hub id.",
        required=True,
        metavar="DIR|HUB_ID",
    ),
    option("--tp", "Logical tensor-parallel degree; it fixes the numbers, processes do not.", at_least(1), 1),
    *COMPUTE,
)
BUILTIN = "'builtin' (spd-tiny's held-out text), 'builtin-train', 'wikitext2-train', 'wikitext2-test'"
TEXT = (
    option("--text", f"Text file, or one of {BUILTIN}.", metavar="FILE|NAME"),
    option("--seq-len", "Tokens a window; left out: the model's positions, at most 2048.", int),
    option("--windows", "Use the first N windows; left out: all.", at_least(1)),
    option("--skip", "Pass over N windows first, to keep evaluation apart from calibration.", at_least(0), 0),
)
COPIES = option(
    "--data-parallel", "Copies of the model that divide the work, on equal parts of the processes.", at_least(1), 1
)
PLAN = option("--plan", "Plan file, or a folder made by 'distill'.", Path, metavar="PATH")
SENT = (
    option(
        "--bits",
        "Sync points not dropped send 8, 4, 3 or 2 bits; rounding errors go with the next.",
        number_of_bits,
    ),
    option("--bits-plain", "The same with rounding errors lost, for comparison.", number_of_bits),
    option("--group", "Dropped sync points still share inside groups of G shards.", at_least(1), metavar="G"),
)
PLANS = (
    PLAN,
    option("--drop", "Blocks whose attention sync is dropped: none, all, or as in 1,3,5-7.", metavar="SPEC"),
    option("--drop-mlp", "The same for the sync after the MLP.", metavar="SPEC"),
    *SENT,
)
PAPERS = "arc_easy, arc_challenge, hellaswag, lambada_openai, piqa, sciq, winogrande"
TASKS = (
    option("--tasks", f"Of the paper's {PAPERS}; mmlu; tiny_last_word and tiny_continuation.", metavar="NAME,NAME"),
    option("--tasks-dir", "Folder of NAME.jsonl with their rows; left out: the hub.", Path, metavar="DIR"),
    option("--limit", "Only the first N questions of a task (of each subject, for mmlu).", at_least(1)),
    option("--batch-size", "Contexts of tasks in a forward pass.", at_least(1), 16, aside=True),
)
THRESHOLDS = (
    option("--tau1", "ISB up to this sensitivity, SB above; perplexity points.", float, 0.05),
    option("--tau2", "SB up to this sensitivity, ESB above; perplexity points.", float, 10.0),
)
REPAIR = (
    option("--epochs", "Passes over the windows for each block; left out: the recipe's.", int),
    option("--learning-rate", "Adam's, or its share of each weight's size (best).", float),
    option("--joint-epochs", "Passes of all dropped blocks together, towards the logits (best).", int),
    option("--generated", "Windows that the model writes itself to learn from besides the text (best).", int),
    option("--matmul", "Float32 products of repairs on GPUs: tf32 where the card has it, or fp32.", MATMUL, "tf32"),
)
CALIBRATION = (
    option("--calibration", "Windows to repair on: the first, which --skip must pass over.", at_least(2), 128),
    option("--repairs", "Folder of repairs: an interrupted run goes on there.", Path, Path("repairs"), aside=True),
)
LENGTHS = (
    option("--batch", "Sequences.", at_least(1), 1),
    option("--prompt-len", "Tokens in the prompt.", at_least(1), 128),
    option("--new-tokens", "Tokens decoded to time TPOT; 0 leaves it out.", at_least(0), 16),
)
PROMPT = (
    *LENGTHS,
    option("--link", "Slowest hop and latency of an all-reduce, as in 10GBps,20us or 25Gbit,20us."),
)
WHOLE = several(at_least(1))
SITE = (
    option("--gpu", "Named GPU; left out: a100."),
    option("--machine", "A machine that 'profile' calibrated, not a GPU.", Path),
    option("--calibration", "The same.", Path),
    option("--nodes", "Nodes that the GPUs are spread over; left out: the link's, or 1.", at_least(1)),
    option("--link", "What joins them: a name, as nvlink4, a machine's label, or as in 10GBps,20us or 25Gbit,20us."),
    option("--launch-us", "Host time an operator waits for; 0 under CUDA graphs.", at_least(0, float), 0.0),
)
TARGET = (
    option("--target-speedup", "Of a phase, over everything full: the plan that loses least.", at_least(1, float)),
    option("--max-loss", "Nats a token that may be lost: the fastest plan.", at_least(0, float), metavar="NATS"),
    option("--phase", "What is to be fast: prefill or decode.", default="prefill"),
    option("--evaluations", "Neighbours that are measured with --text, beside two for each policy.", at_least(0), 4),
    option("--beside", "Plan of the other phase: can both use one key/value cache?", Path, metavar="PLAN.json"),
    option("--model", "Checkpoint that the scores are of; with --text, losses are measured.", metavar="DIR|HUB_ID"),
    option("--shape", "Or its named shape.", metavar="NAME"),
    *(*SITE, *LENGTHS),
)
PERCENTAGES = option("--percentages", "Of blocks to drop, as in 0,25,50; left out: every number.", percentages)
SENSITIVITY = option("sensitivity", "What 'sensitivity --out' wrote.", Path, metavar="SENSITIVITY.json")


# ---------------------------------------------------------------- commands and experiments

COMMANDS: dict[str, "Command"] = {}


@dataclass(frozen=True)
class Command:
    """`result_in` says where in `--out` its result is kept: "." the file itself, else a name in a folder; None: not."""

    name: str
    function: Callable  # of a `Session`
    options: tuple[Option, ...]
    result_in: str | None

    def parse(self, words: list[str], experiment: Path | None = None) -> argparse.Namespace:
        """Values of the options: those given, else an experiment's, else their defaults."""
        values = {} if experiment is None else self.values_of(experiment)
        parser = Parser(prog=f"spd {self.name}", description=self.function.__doc__, allow_abbrev=False)
        for each in self.options:
            each.add_to(parser, **({"default": values[each.name], "required": False} if each.name in values else {}))
        return parser.parse_args(words)

    def values_of(self, experiment: Path) -> dict[str, Any]:
        """What an experiment says of these options, its own section before `common`.

        Raises SPDError naming what is no option of a command, or no value of it.
        """
        sections, found = read_experiment(experiment), {}
        own = {each.name: each for each in self.options if each.flag.startswith("--")}
        everywhere = own.keys() | {each.name for command in COMMANDS.values() for each in command.options}
        for section, known in (("common", everywhere), (self.name, own)):
            for name, value in sections.get(section, {}).items():
                place = f"{experiment}: {section}.{name}"
                if name not in known:
                    raise SPDError(f"{place}: there is no such option (see 'spd {self.name} --help').")
                if name in own:
                    found[name] = own[name].read(value, place)
        return found


def command(*options: Option, name: str | None = None, result_in: str | None = "."):
    """Declares a command by its function, whose docstring is the help; where results go is every command's to say."""

    def declare(function: Callable) -> Command:
        called = name or function.__name__.replace("_", "-")
        COMMANDS[called] = Command(called, function, (*options, *OUTPUT), result_in)
        return COMMANDS[called]

    return declare


def read_experiment(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of an experiment: `common`, one a command, and those of scripts that lie beside it."""
    import yaml

    from spd.records import regular

    with reading(f"{path} cannot be read as YAML"):
        sections = yaml.safe_load(regular(path).read_text(encoding="utf-8")) or {}
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise SPDError(f"{path} is not an experiment: it needs sections of options, as 'common'.")
    for name in sections:
        if name not in ("common", *COMMANDS) and not (path.parent / f"{name}.py").is_file():
            raise SPDError(f"{path}: there is no command '{name}'; known: common, {', '.join(COMMANDS)}.")
    return sections
