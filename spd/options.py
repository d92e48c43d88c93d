"""Options of the command line, commands with the options they take, and experiments, which give options their values.

In an experiment's YAML the values of `common` are every command's defaults, those of a section the command's own.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd.errors import SPDError


class Parser(argparse.ArgumentParser):
    """A wrong word ends as one sentence."""

    def error(self, message: str):
        self.exit(2, f"{message[0].upper()}{message[1:]}; see '{self.prog} --help'.\n")


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
            raise SPDError(f"{place}: {value!r} is not a value of this option.")
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


def percentages(text: str) -> list[float]:
    """The type of a list of percentages."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SPDError(f"'{text}' is not a list of percentages; write them as in 0,25,50.") from None


OUTPUT = (
    option("--out", "Where to write the result, too; asked the same again, it is given from there.", Path, aside=True),
    option("--records", "Folder for the record of this run.", Path, Path("runs"), aside=True),
    option("--reproduction", "Name of what this run is a stage of (its parent run in MLflow).", aside=True),
    option("--mlflow", "Show the record in MLflow (MLFLOW_TRACKING_URI, else ./mlflow.db).", bool, True, aside=True),
)


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
