"""The one exception that the command line shows as a sentence."""


class SPDError(Exception):
    """A mistake of input or environment that the user can mend; its message is one sentence."""
