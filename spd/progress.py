"""Progress and time left, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(total: int, unit: str, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of `total` units; gives the function to call with the number of units done, and values to show."""
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    with tqdm(total=total, unit=f" {unit}", disable=not shown, mininterval=every, dynamic_ncols=True) as progress:

        def done(units: int, **shown: float) -> None:
            if shown:
                progress.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            progress.update(units)

        yield done
