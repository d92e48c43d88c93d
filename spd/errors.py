"""The one exception that the command line shows as a sentence; every mistake of input raises it."""

from collections.abc import Collection, Mapping

from pydantic import ValidationError


class SPDError(Exception):
    """A mistake of input or environment that the user can mend; its message is one sentence."""


def one_of(kind: str, given: str, known: Collection[str]) -> str:
    """`given` where it is among the `known` names of a `kind`; a mistake otherwise."""
    if given not in known:
        raise SPDError(f"Unknown {kind} '{given}'; known: {', '.join(known)}.")
    return given


def in_words(error: ValidationError, names: Mapping[str, str] = {}) -> str:
    """The first thing that is wrong, as `place: reason`; `names` are those that the reader's file has for places."""
    first = error.errors()[0]
    place = "".join(f"{names.get(part, part)}: " for part in first["loc"])
    return place + first["msg"].removeprefix("Value error, ")
