"""The one exception that the command line shows as a sentence; every mistake of input raises it."""

from collections.abc import Collection


class SPDError(Exception):
    """A mistake of input or environment that the user can mend; its message is one sentence."""


def one_of(kind: str, given: str, known: Collection[str]) -> str:
    """`given` where it is among the `known` names of a `kind`; a mistake otherwise."""
    if given not in known:
        raise SPDError(f"Unknown {kind} '{given}'; known: {', '.join(known)}.")
    return given
