"""Ridge regression from sums over tokens, gathered in a stream.

Solutions are corrections: the ridge pulls towards no change. Its strength is relative to the power of each feature,
so that features of different scale are treated alike, and tokens may be fewer than features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
COLUMNS = 256  # of a Gram matrix, taken at once
DEFAULT_RIDGE = 1e-3  # where nothing is held out to choose by


class Moments:
    """Sums over tokens of features' products with each other and with targets, for G independent regressions.

    `gram` (G, p, p), of which the lower triangle counts, and `cross` (G, q, p) are sums in float64 of products taken
    in float32 a batch at a time; `power` (G,) is the targets' own.
    """

    def __init__(self, regressions: int, features: int, targets: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(regressions, features, features, dtype=torch.double, device=device)
        self.cross = torch.zeros(regressions, targets, features, dtype=torch.double, device=device)
        self.power = torch.zeros(regressions, dtype=torch.double, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Features (G, ..., p) and their targets (G, ..., q)."""
        f, t = features.float().flatten(1, -2), targets.float().flatten(1, -2)
        for start in range(0, f.shape[2], COLUMNS):  # what lies above the diagonal is the same
            some = slice(start, start + COLUMNS)
            self.gram[:, start:, some] += f[..., start:].mT @ f[..., some]
        self.cross += t.mT @ f
        self.power += t.double().square().sum((1, 2))

    def __iadd__(self, other: "Moments") -> "Moments":
        self.gram += other.gram
        self.cross += other.cross
        self.power += other.power
        return self

    def penalty(self, ridge: float | Tensor) -> Tensor:
        """(G, p), what the ridge adds to the diagonal; a feature that is never active gets a little too."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        floor = 1e-3 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float).tiny
        ridge = torch.as_tensor(ridge, dtype=floor.dtype, device=floor.device).reshape(-1, 1)
        return ridge * torch.maximum(diagonal, floor)

    def factor(self, ridge: float | Tensor) -> Tensor:
        """Cholesky factors (G, p, p) of the regularised Gram matrices."""
        return torch.linalg.cholesky(self.gram + torch.diag_embed(self.penalty(ridge)))

    def solve(self, ridge: float | Tensor) -> Tensor:
        """Coefficients (G, q, p) that minimise the squared error plus the ridge, one for all or (G,); 0 if inf."""
        ridge = torch.as_tensor(ridge, dtype=torch.double, device=self.gram.device).reshape(-1, 1, 1)
        factor = self.factor(torch.where(ridge.isfinite(), ridge, 1.0))
        return torch.where(ridge.isfinite(), torch.cholesky_solve(self.cross.mT, factor).mT, 0.0)

    def error(self, coefficients: Tensor) -> Tensor:
        """Sum of squared errors (G,) which coefficients (G, q, p) leave."""
        c, diagonal = coefficients, self.gram.diagonal(dim1=1, dim2=2)[:, None]
        quadratic = 2 * (c @ self.gram.tril() * c).sum((1, 2)) - (c.square() * diagonal).sum((1, 2))
        return self.power - 2 * (c * self.cross).sum((1, 2)) + quadratic


def best_ridge(fit: Moments, held_out: Moments, total: Callable[[Tensor], Tensor] = lambda errors: errors) -> Tensor:
    """The ridges (G,) of `RIDGES` with which coefficients of `fit` serve the held-out part best.

    They are tried from the strongest on, until one serves no regression better than those before it. Inf where no
    coefficients at all serve it better than any; `DEFAULT_RIDGE` where nothing is held out. `total` may sum errors (G,)
    over regressions and processes to (1,), for one choice.
    """
    least = total(held_out.power)
    ridges = torch.full_like(least, torch.inf)
    if not least.all():
        return torch.full_like(ridges, DEFAULT_RIDGE)
    for ridge in RIDGES:
        errors = total(held_out.error(fit.solve(ridge)))
        better = errors < least
        if not better.any():
            break
        least, ridges = torch.where(better, errors, least), torch.where(better, ridge, ridges)
    return ridges


def conjugate_gradients(
    moments: Moments,
    ridge: float,
    apply: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor],
    sweeps: int,
    tolerance: float = 1e-8,
) -> Tensor:
    """Coefficients (G, q, p) of one joint regression whose features are G groups, held by several processes.

    Only the Gram matrix of each group is known, as `moments`; it preconditions: each group first solves for itself,
    and the iteration reconciles them. In exact arithmetic it reaches the joint solution in at most as many sweeps as
    there are features, and the ridged error falls with each; every row of the coefficients has its own step.

    Args:
        apply: coefficients (G, q, p) to the cross moments (G, q, p) of their joint prediction (q) with the features
            held here: one pass over the data, in which only that prediction travels.
        total: sum of a (q,) tensor over the processes.
        sweeps: at most so many passes; fewer once every row's residual has fallen by `tolerance`.
    """
    factor, penalty = moments.factor(ridge), moments.penalty(ridge)[:, None]
    solution, residual = torch.zeros_like(moments.cross), moments.cross.clone()
    direction = torch.zeros_like(residual)
    first = previous = None
    for _ in range(sweeps):
        preconditioned = torch.cholesky_solve(residual.mT, factor).mT
        size = total((residual * preconditioned).sum((0, 2)))  # (q,)
        first = size if first is None else first
        if (size <= tolerance**2 * first).all():
            break
        direction = preconditioned + (0 if previous is None else _ratio(size, previous) * direction)
        image = apply(direction) + penalty * direction
        step = _ratio(size, total((direction * image).sum((0, 2))))
        solution, residual, previous = solution + step * direction, residual - step * image, size
    return solution


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """(q, 1), 0 where a row is already solved."""
    return torch.where(b > 0, a / b, 0.0)[:, None]
