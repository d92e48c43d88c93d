"""The one exception that stands for a mistake the user can mend."""


class SPDError(Exception):
    """A mistake of input or environment that the user can mend; its message is one sentence."""
