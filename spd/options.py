"""Options of the command line, each declared once, and commands, functions of a `Session` declared with theirs.

Values of an experiment's YAML become a command's defaults: those of `common`, then those of its own section.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd.errors import SPDError
from spd.session import Session, print_result


class Parser(argparse.ArgumentParser):
    """Of one command; a wrong word ends as one sentence."""

    def error(self, message: str):
        self.exit(2, f"{message[0].upper()}{message[1:]}; see '{self.prog} --help'.\n")


def option(*flags: str, **how: Any) -> tuple[tuple[str, ...], dict]:
    return flags, how


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


def choice(kind: str, *known: str) -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text not in known:
            raise SPDError(f"Unknown {kind} '{text}'; known: {', '.join(known)}.")
        return text

    return chosen


def numbers(text: str) -> str:
    """The type of a list of percentages, which stays as it was written."""
    try:
        return ",".join(f"{float(part):g}" for part in text.split(","))
    except ValueError:
        raise SPDError(f"'{text}' is not a list of percentages; write them as in 0,25,50.") from None


def floats(text: str | None) -> list[float] | None:
    return None if text is None else [float(part) for part in text.split(",")]


# ---------------------------------------------------------------- options that several commands share

COMPUTE = (
    option("--device", type=choice("device", "cpu", "cuda"), default="cpu", help="cpu or cuda (one GPU a process)."),
    option("--seed", type=int, default=0, help="Seed of everything random."),
)
DTYPE = (
    option("--dtype", type=choice("dtype", "float32", "bfloat16", "float16"), default="float32",
           help="float32, bfloat16 or float16."),
)  # fmt: skip
MODEL = (
    option("--model", required=True, metavar="DIR|HUB_ID", help="Hugging Face LLaMA folder, 'spd-tiny', or hub id."),
    option("--tp", type=at_least(1), default=1,
           help="Logical tensor-parallel degree; it fixes the numbers, processes do not."),
)  # fmt: skip
TEXT = (
    option("--text", metavar="FILE|NAME", help="Text file, 'builtin' (spd-tiny's held-out text), 'builtin-train', "
           "'wikitext2-train' or 'wikitext2-test'."),
    option("--seq-len", type=int, help="Tokens a window; left out: the model's positions, at most 2048."),
    option("--windows", type=at_least(1), help="Use the first N windows; left out: all."),
    option("--skip", type=at_least(0), default=0,
           help="Pass over N windows first, to keep evaluation apart from calibration."),
)  # fmt: skip
DROP = (
    option("--drop", metavar="SPEC", help="Blocks whose attention sync is dropped: none, all, or as in 1,3,5-7."),
    option("--drop-mlp", metavar="SPEC", help="The same for the sync after the MLP."),
)
PLAN = (option("--plan", type=Path, metavar="PATH", help="Plan file, or a folder made by 'distill'."),)
TASKS = (
    option("--tasks", metavar="NAMES", help="Tasks to answer, as in piqa,sciq: the paper's arc_easy, arc_challenge, "
           "hellaswag, lambada_openai, piqa, sciq, winogrande; mmlu; tiny_last_word and tiny_continuation."),
    option("--tasks-dir", type=Path, metavar="DIR", help="Folder of NAME.jsonl with their rows; left out: the hub."),
    option("--limit", type=at_least(1), help="Only the first N questions of a task (of each subject, for mmlu)."),
    option("--batch-size", type=at_least(1), default=16, help="Contexts of tasks in a forward pass."),
)  # fmt: skip
THRESHOLDS = (
    option("--tau1", type=float, default=0.05, help="ISB up to this sensitivity, SB above; perplexity points."),
    option("--tau2", type=float, default=10.0, help="SB up to this sensitivity, ESB above; perplexity points."),
)
REPAIR = (
    option("--epochs", type=int, help="Passes over the windows for each block; left out: the recipe's."),
    option("--learning-rate", type=float, help="Adam's, or its share of each weight's size (best)."),
    option("--joint-epochs", type=int, help="Passes of all dropped blocks together, towards the logits (best)."),
    option("--generated", type=int, help="Windows that the model writes itself to learn from besides the text (best)."),
)
CALIBRATION = (
    option("--calibration", type=at_least(2), default=128,
           help="Windows to repair on: the first of the text, which --skip must pass over."),
    option("--repairs", type=Path, default=Path("repairs"),
           help="Folder of the repairs; an interrupted run goes on there."),
)  # fmt: skip
PROMPT = (
    option("--batch", type=at_least(1), default=1, help="Sequences."),
    option("--prompt-len", type=at_least(1), default=128, help="Tokens in the prompt."),
    option("--new-tokens", type=at_least(0), default=16, help="Tokens decoded to time TPOT; 0 leaves it out."),
)
SENSITIVITY = option("sensitivity", type=Path, metavar="SENSITIVITY.json", help="What 'sensitivity --out' wrote.")
OUTPUT = (
    option("--out", type=Path, help="Also write the result here, whole or not at all; asked the same again, the "
           "command gives it at once."),
    option("--records", type=Path, default=Path("runs"), help="Folder for the record of this run."),
    option("--reproduction", help="Name of the reproduction this run is a stage of (its parent run in MLflow)."),
    option("--mlflow", action=argparse.BooleanOptionalAction, default=True,
           help="Mirror the record to MLflow (MLFLOW_TRACKING_URI, else ./mlflow.db)."),
)  # fmt: skip


COMPARE = option("--compare", action=argparse.BooleanOptionalAction, default=False,
                 help="Put the model with nothing dropped to the same questions.")  # fmt: skip
DATA_PARALLEL = option("--data-parallel", type=at_least(1), default=1,
                       help="Copies of the model, on equal parts of the processes, that divide the work.")  # fmt: skip
BUDGET = option("--budget", default="70%", help="Blocks to drop, as a number (6) or a percentage (70%%).")
PERCENTAGES = option("--percentages", type=numbers, help="Of blocks to drop, as in 0,25,50; left out: every number.")
STRATEGIES = option("--strategies", default="zs", help="How blocks are repaired, of zs (not at all), b2b, b2b+hg, "
                    "closed-form, best.")  # fmt: skip
CALIBRATION_TEXT = option("--calibration-text", metavar="FILE|NAME",
                          help="Text to repair on, where not the one measured on.")  # fmt: skip
RECIPE = option("--recipe", default="closed-form", help="zs (nothing), closed-form (no training), paper, or best.")
STRATEGY = option("--strategy", default="b2b+hg", help="Of the paper's recipe, as in its figure 7: zs, b2b or b2b+hg.")
OPTIMIZER = option("--optimizer", help="adam or adamw; the paper does not say.")
SAMPLING = (
    option("--max-new-tokens", type=at_least(1), default=64, help="Tokens to add at most."),
    option("--temperature", type=float, default=0.0, help="0 is greedy."),
    option("--top-k", type=int, help="Sample among the k most probable tokens."),
    option("--top-p", type=float, help="Sample among the fewest tokens reaching probability p."),
)
LINK = option("--link", metavar="SPEC", help="Slowest hop and latency of an all-reduce, as in 10GBps,20us: emulated "
              "(bench), or predicted over.")  # fmt: skip
TIMED = (
    option("--model", metavar="DIR|HUB_ID", help="Checkpoint folder, 'spd-tiny' or hub id."),
    option("--shape", help="Named shape with random weights, as llama-125m."),
    option("--tp", type=at_least(1), default=1, help="Processes, one shard each; on CPU they are started here."),
    option("--plan", type=Path, action="append", metavar="PATH",
           help="Plan file or folder (its policies: weights change no timing); again to compare."),
    option("--drop", action="append", metavar="SPEC", help="Blocks that drop; give it again to compare."),
    option("--sensitivity", type=Path, help="Compare plans that drop the least sensitive blocks of this file first."),
    PERCENTAGES,
)  # fmt: skip
ENGINE = (
    LINK,
    option("--repeats", type=at_least(1), default=20, help="Timed repetitions of each plan."),
    option("--compile", action=argparse.BooleanOptionalAction, default=False,
           help="By torch.compile with static shapes; on GPUs also CUDA graphs."),
    option("--alone", action=argparse.BooleanOptionalAction, default=False,
           help="Time rank 0's shard by itself; its all-reduces are predicted over --link."),
    option("--transport", help="How processes started here talk: shared-memory (where it works) or process-group."),
)  # fmt: skip
PREDICTED = (
    option("--shape", required=True, help="Named shape, as llama2-70b."),
    option("--gpu", help="Named GPU; left out: a100."),
    option("--tp", type=at_least(1), default=8, help="GPUs, one shard each."),
    option("--nodes", type=at_least(1), default=1, help="Nodes they are on: which measured all-reduce counts."),
    LINK,
    option("--percent", type=numbers, default="70", help="Percentages of blocks that drop their attention sync."),
    option("--launch-us", type=at_least(0, float), default=0.0,
           help="Host time an operator waits for; 0 under CUDA graphs."),
    option("--calibration", type=Path, help="A machine that 'profile' calibrated, not a GPU."),
)  # fmt: skip


# ---------------------------------------------------------------- commands and experiments

COMMANDS: dict[str, "Command"] = {}


@dataclass(frozen=True)
class Command:
    """`result_in` says where in `--out` its result is kept: "." the file itself, else a name in a folder; None: not."""

    name: str
    function: Callable[[Session], None]
    options: tuple[tuple[tuple[str, ...], dict], ...]
    result_in: str | None

    def parser(self) -> Parser:
        parser = Parser(prog=f"spd {self.name}", description=self.function.__doc__, allow_abbrev=False)
        for flags, how in self.options:
            parser.add_argument(*flags, **how)
        return parser

    def run(self, words: list[str], experiment: Path | None) -> None:
        """Answers from `--out` where it can, else runs on all processes."""
        parser = self.parser()
        if experiment is not None:
            take_experiment(parser, self.name, experiment)
        options = parser.parse_args(words)
        place = None
        if self.result_in is not None and options.out is not None:
            place = options.out if self.result_in == "." else options.out / self.result_in
        session = Session(self.name, options, place)
        if (document := session.answered()) is not None:
            print(f"{place} holds this answer already (remove it to ask again).", file=sys.stderr)
            print_result(document)
            return
        with session:
            self.function(session)


def command(*options: tuple, name: str | None = None, result_in: str | None = "."):
    """Declares a command by its function, whose docstring is the help."""

    def declare(function: Callable[[Session], None]) -> Command:
        called = name or function.__name__.replace("_", "-")
        COMMANDS[called] = Command(called, function, options, result_in)
        return COMMANDS[called]

    return declare


def read_experiment(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of an experiment: `common`, one a command, and those of scripts that lie beside it."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise SPDError(f"The experiment {path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SPDError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise SPDError(f"{path} is not an experiment: it needs sections of options, as 'common'.")
    for name in sections:
        if name not in ("common", *COMMANDS) and not (path.parent / f"{name}.py").is_file():
            raise SPDError(f"{path}: there is no command '{name}'; known: common, {', '.join(COMMANDS)}.")
    return sections


def take_experiment(parser: Parser, name: str, path: Path) -> None:
    """The experiment's values become defaults, each checked as if it were given. Raises SPDError naming a wrong one."""
    sections = read_experiment(path)
    own = {action.dest: action for action in parser._actions}
    everywhere = {action.dest for each in COMMANDS.values() for action in each.parser()._actions} | set(own)
    for section, known in (("common", everywhere), (name, set(own))):
        for key, value in sections.get(section, {}).items():
            place = f"{path}: {section}.{key}"
            if key not in known:
                raise SPDError(f"{place}: there is no such option (see 'spd {name} --help').")
            if key in own:
                own[key].default, own[key].required = _checked(parser, own[key], value, place), False


def _checked(parser: Parser, action: argparse.Action, value: Any, place: str) -> Any:
    if isinstance(value, list | dict) or isinstance(value, bool) != (action.nargs == 0):
        raise SPDError(f"{place}: {value!r} is not a value of this option.")
    try:
        return value if action.nargs == 0 else parser._get_value(action, str(value))
    except argparse.ArgumentError as error:
        raise SPDError(f"{place}: {error.message} (given: {value!r}).") from None
