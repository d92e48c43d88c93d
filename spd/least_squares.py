"""Ridge regression: from statistics gathered in a stream, or, where tokens are fewer than features, from the tokens.

Solutions are corrections: the ridge pulls towards no change. Its strength is relative to the power of each feature,
so that features of different scale are treated alike.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_RIDGE = 1e-3  # where nothing is held out to choose by


@dataclass(frozen=True)
class Coefficients:
    """Matrices (G, q, p): `left` as it is, or `left` (G, q, n) times `right` (G, n, p), of a low rank n."""

    left: Tensor
    right: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Predictions (G, ..., q) from features (G, ..., p)."""
        flat = features.flatten(1, -2).to(self.left)
        if self.right is not None:
            flat = flat @ self.right.mT
        return (flat @ self.left.mT).unflatten(1, features.shape[1:-1])

    def after(self, weights: Tensor) -> Tensor:
        """Products (G, o, p) of weights (G, o, q) and the matrices."""
        product = weights.to(self.left) @ self.left
        return product if self.right is None else product @ self.right

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def __getitem__(self, some: slice) -> "Coefficients":
        """Of some of the regressions."""
        return Coefficients(self.left[some], None if self.right is None else self.right[some])


class Moments:
    """Sums over tokens of features' products with each other and with targets, for G independent regressions.

    `gram` (G, p, p) and `cross` (G, q, p) are sums in float64 of products taken in float32 a batch at a time;
    `power` (G,) is the targets' own.
    """

    def __init__(self, regressions: int, features: int, targets: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(regressions, features, features, dtype=torch.double, device=device)
        self.cross = torch.zeros(regressions, targets, features, dtype=torch.double, device=device)
        self.power = torch.zeros(regressions, dtype=torch.double, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Features (G, ..., p) and their targets (G, ..., q)."""
        f, t = features.float().flatten(1, -2), targets.float().flatten(1, -2)
        self.gram += f.mT @ f
        self.cross += t.mT @ f
        self.power += t.double().square().sum((1, 2))

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(0, 0, 0)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.power = self.power + other.power
        return total

    def penalty(self, ridge: float | Tensor) -> Tensor:
        """(G, p), what the ridge adds to the diagonal; a feature that is never active gets a little too."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        floor = 1e-3 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float).tiny
        return torch.as_tensor(ridge).to(floor).reshape(-1, 1) * torch.maximum(diagonal, floor)

    def factor(self, ridge: float | Tensor) -> Tensor:
        """Cholesky factors (G, p, p) of the regularised Gram matrices."""
        return torch.linalg.cholesky(self.gram + torch.diag_embed(self.penalty(ridge)))

    def solve(self, ridge: float | Tensor) -> Coefficients:
        """Those that minimise the squared error plus the ridge, one for all or (G,); 0 if inf."""
        ridge = _each(ridge, self.power)
        factor = self.factor(torch.where(ridge.isfinite(), ridge, 1.0))
        return Coefficients(torch.where(ridge.isfinite(), torch.cholesky_solve(self.cross.mT, factor).mT, 0.0))

    def solutions(self, ridges: Iterable[float | Tensor]) -> Iterator[Coefficients]:
        return map(self.solve, ridges)

    def error(self, coefficients: Coefficients) -> Tensor:
        """Sum of squared errors (G,) which coefficients leave."""
        c = coefficients.dense().double()
        return self.power - 2 * (c * self.cross).sum((1, 2)) + (c @ self.gram * c).sum((1, 2))


class Rows:
    """The same regressions in their dual form, on the tokens themselves: for N tokens, systems of N equations.

    With F the features (N, p), T the targets (N, q), r the ridge and P the power of each feature (a diagonal matrix),

        T' F (F' F + r P)^-1  =  ((F P^-1 F' + r)^-1 T)' F P^-1

    which costs N^3 in place of p^3, and the coefficients are of rank N. `joint` makes one regression of all G groups
    of features: it sums a tensor over groups and processes, of which each then knows the coefficients of its own
    features, without iteration. Its targets are one group's.
    """

    def __init__(self, joint: Callable[[Tensor], Tensor] | None = None):
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.joint = joint

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Features (G, ..., p) and their targets (G, ..., q), or (1, ..., q) where joint."""
        self.features.append(features.float().flatten(1, -2))
        self.targets.append(targets.float().flatten(1, -2))

    def __add__(self, other: "Rows") -> "Rows":
        total = Rows(self.joint)
        total.features, total.targets = self.features + other.features, self.targets + other.targets
        return total

    @property
    def power(self) -> Tensor:
        """(G,), the targets' own."""
        return sum(t.double().square().sum((1, 2)) for t in self.targets)

    def penalty(self) -> Tensor:
        """P (G, p), as `Moments.penalty` has it for a ridge of 1."""
        diagonal = sum(f.double().square().sum(1) for f in self.features)
        mean = diagonal.mean(1, keepdim=True)
        if self.joint is not None:
            mean = self.joint(mean) / self.joint(torch.ones_like(mean))
        return torch.maximum(diagonal, 1e-3 * mean + torch.finfo(torch.float).tiny)

    def solve(self, ridge: float | Tensor) -> Coefficients:
        """As `Moments.solve`."""
        return next(self.solutions([ridge]))

    def solutions(self, ridges: Iterable[float | Tensor]) -> Iterator[Coefficients]:
        """One for each ridge, from one decomposition; in its basis, where no small difference of large numbers is."""
        features = torch.cat(self.features, 1)
        penalty = self.penalty()[:, None]
        kernel = torch.stack([f @ (f / p).mT for f, p in zip(features.double(), penalty, strict=True)])
        if self.joint is not None:
            kernel = self.joint(kernel)
        values, basis = torch.linalg.eigh((kernel + kernel.mT) / 2)
        rotated = (basis.mT @ torch.cat(self.targets, 1).double()).mT  # (G or 1, q, N)
        turn = basis.expand(len(features), -1, -1).mT
        right = torch.stack([(v @ f.double() / p).to(f) for v, f, p in zip(turn, features, penalty, strict=True)])
        for ridge in ridges:
            left = rotated / (values.clamp(min=0)[:, None] + _each(ridge, values))
            yield Coefficients(left.to(right).expand(len(features), -1, -1), right)

    def error(self, coefficients: Coefficients) -> Tensor:
        """As `Moments.error`."""
        total = 0
        for features, targets in zip(self.features, self.targets, strict=True):
            predicted = coefficients(features)
            missing = targets - (predicted if self.joint is None else self.joint(predicted))
            total += missing.double().square().sum((1, 2))
        return total


def _each(ridge: float | Tensor, like: Tensor) -> Tensor:
    """(G, 1, 1) or (1, 1, 1)."""
    return torch.as_tensor(ridge, dtype=torch.double, device=like.device).reshape(-1, 1, 1)


def best_ridge(
    fit: Moments | Rows, held_out: Moments | Rows, total: Callable[[Tensor], Tensor] = lambda errors: errors
) -> Tensor:
    """The ridges (G,) of `RIDGES` with which coefficients of `fit` serve the held-out part best.

    Inf where no coefficients at all serve it better than any; `DEFAULT_RIDGE` where nothing is held out. `total` may
    sum the errors (R, G) over regressions and processes to (R, 1), for one choice.
    """
    errors = torch.stack([*map(held_out.error, fit.solutions(RIDGES)), held_out.power])
    best = total(errors).argmin(0)
    ridges = torch.tensor((*RIDGES, torch.inf), dtype=torch.double, device=best.device)[best]
    return ridges if total(held_out.power[None]).all() else torch.full_like(ridges, DEFAULT_RIDGE)


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
