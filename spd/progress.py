"""Progress and time left, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(total: int, unit: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of `total` units; gives the function to call with the number of units done."""
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    with tqdm(total=total, unit=f" {unit}", disable=not shown, mininterval=every, dynamic_ncols=True) as progress:
        yield progress.update
