"""The one exception that the command line shows as a sentence; every mistake of input raises it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a tenth of a second, which a command that answers at once has no use for
    from pydantic import ValidationError

LONGEST = 300  # characters of a message


class SPDError(Exception):
    """A mistake of input or environment that the user can mend; its message is one sentence."""


def one_of(kind: str, given: str, known: Collection[str]) -> str:
    """`given` where it is among the `known` names of a `kind`; a mistake otherwise."""
    if given not in known:
        raise SPDError(f"Unknown {kind} '{given}'; known: {', '.join(known)}.")
    return given


def in_words(error: "ValidationError", names: Mapping[str, str] = {}) -> str:
    """The first thing that is wrong, as `place: reason`; `names` are those that the reader's file has for places."""
    first = error.errors()[0]
    place = "".join(f"{names.get(part, part)}: " for part in first["loc"])
    return place + first["msg"].removeprefix("Value error, ")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises while it parses something from outside becomes `what` with the reason."""
    try:
        yield
    except SPDError:
        raise
    except Exception as error:
        raise SPDError(f"{what}: {' '.join(str(error).split())[:150]} ({type(error).__name__}).") from error


def short(message: str) -> str:
    """One line of at most `LONGEST` characters: of a longer message the beginning and, for what would do, the end."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:190]} … {line[-107:]}"
