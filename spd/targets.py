"""Plans that meet a target of speedup or loss: over blocks, sync points and policies, for a link and a phase.

Losses and times are sums over sync points, so that dynamic programming finds the best plan of every time. What a policy
loses at a point is half the square of its score, in nats a token: the loss to second order, with the mean of
(g . delta)^2 (Fisher's information) in the Hessian's place. A score supposes that everything is synchronised one point
later; of drops in a row the k-th therefore counts k times. What a policy takes is the latency model's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from spd.errors import SPDError, one_of
from spd.latency import TIMES, Prediction
from spd.plan import DROP, FULL, POINTS, Plan, Policy
from spd.planner import KEEP

PHASES = dict(zip(("prefill", "decode"), TIMES, strict=True))
UNITS = 400  # that a full sync takes: times are whole numbers of them, rounded up; what takes more gains nothing
RUNS = 8  # drops in a row that are told apart
MARGIN = 0.8  # of what is promised, which is measured on other windows than the search is
SHARES = 0.02, 50.0  # least and most of an estimate that a measurement is taken for: noise makes no policy free
Measure = Callable[[Plan], float]  # nats a token


@dataclass(frozen=True, eq=False)
class Choices:
    """The policies that every sync point may have but the last MLP's, which is always full."""

    policies: tuple[Policy, ...]  # full first
    losses: np.ndarray  # (2 L - 1, policies), nats a token; points in the order they are reached
    costs: np.ndarray  # (policies,), seconds at any point
    rest: float  # seconds of everything else

    @classmethod
    def of(cls, scores: dict[str, dict[str, list[float]]] | None, prediction: Prediction, phase: str) -> "Choices":
        """Full, and those that `sensitivity --fast` scored, for `prefill` or `decode`."""
        kind, blocks = PHASES[one_of("phase", phase, PHASES)], prediction.config.num_blocks
        if scores is None:
            raise SPDError("A target takes scores of policies at both points: 'spd sensitivity --fast' gives them.")
        if prediction.tp == 1:
            raise SPDError("One GPU alone synchronises nothing that a plan could leave out.")
        names = list(scores[POINTS[0]])
        squares = np.array([[scores[point][name] for name in names] for point in POINTS]) ** 2 / 2
        if squares.shape[-1] != blocks:
            raise SPDError(f"The scores are of {squares.shape[-1]} blocks, and the model has {blocks}.")
        losses = np.insert(squares.transpose(2, 0, 1).reshape(2 * blocks, -1)[:-1], 0, 0.0, axis=1)
        policies = (FULL, *(pair[0] for pair in Plan.from_policies((name, name) for name in names).blocks))
        bare = Plan.dropping(blocks, range(blocks), range(blocks - 1))
        with_one = [Plan(((policy, bare.blocks[0][1]), *bare.blocks[1:])) for policy in policies]
        rest, *costs = (prediction.time(kind, plan).total for plan in (bare, *with_one))
        return cls(policies, losses, np.array(costs) - rest, rest)

    @cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, ...]]]:
        """Units of each policy; the least loss (runs, units) of all points by the drops in a row that they end with.

        And of every point, by units: the best policy but drop, the run before that, and whether the longest run stays.
        """
        units = np.ceil(self.costs / self.costs[0] * UNITS - 1e-6).astype(int)
        least, steps = np.full((RUNS + 1, UNITS * len(self.losses) + 1), np.inf), []
        least[0] = 0.0
        others = [p for p, policy in enumerate(self.policies) if policy != DROP and units[p] <= UNITS]
        for losses in self.losses:
            before, longest = least.min(0), np.minimum(least[-1], least[-2])
            ways = [np.append(np.full(units[p], np.inf), before[: before.size - units[p]]) + losses[p] for p in others]
            steps.append((np.array(others)[np.argmin(ways, 0)], least.argmin(0), least[-1] < least[-2]))
            dropped = losses[self.policies.index(DROP)] if DROP in self.policies else np.inf
            runs = np.arange(1, RUNS + 1)[:, None] * dropped
            least = np.concatenate((np.min(ways, 0)[None], np.append(least[: RUNS - 1], longest[None], 0) + runs))
        return units, least, steps

    def best(self, seconds: float = np.inf, nats: float = np.inf) -> Plan | None:
        """The plan that loses least within so many seconds, or the fastest within so many nats; None: there is none."""
        units, least, steps = self._steps
        left = np.argmax(least.min(0) <= nats) if nats < np.inf else least.shape[1] - 1
        left = int(min(left, np.floor((seconds - self.rest) / self.costs[0] * UNITS + 1e-6)))
        if left < 0 or np.isinf(least[:, left].min()):
            return None
        taken, run = [], int(least[:, left].argmin())
        for chosen, run_before, stays in reversed(steps):
            if run:
                taken.append(self.policies.index(DROP))
                run -= not (run == RUNS and stays[left])
            else:
                taken.append(chosen[left])
                left -= units[taken[-1]]
                run = int(run_before[left])
        return self.plan(taken[::-1])

    def plan(self, numbers: Sequence[int]) -> Plan:
        """Of policies' numbers, point by point."""
        points = [self.policies[number] for number in numbers] + [FULL]
        return Plan(tuple(zip(points[::2], points[1::2], strict=True)))

    def numbers(self, plan: Plan) -> np.ndarray:
        """The other way."""
        return np.array([self.policies.index(policy) for pair in plan.blocks for policy in pair][:-1])

    def loss(self, plan: Plan) -> float:
        """Nats a token that a plan is estimated to lose."""
        total, run = 0.0, 0
        for losses, number in zip(self.losses, self.numbers(plan), strict=True):
            run = run + 1 if self.policies[number] == DROP else 0
            total += losses[number] * min(max(run, 1), RUNS)
        return float(total)

    def exchanges(self, plan: Plan) -> list[Plan]:
        """Plans as fast, with the policies of two points exchanged, those that are estimated to lose least first."""
        chosen, found = self.numbers(plan), []
        for pair in combinations(range(len(chosen)), 2):
            a, b = pair
            if chosen[a] != chosen[b]:
                other = chosen.copy()
                other[[a, b]] = chosen[[b, a]]
                found.append(self.plan(other))
        return sorted(found, key=self.loss)


@dataclass(frozen=True)
class Target:
    """What a plan is to reach in a phase: a speedup over everything full, or a loss (nats a token) that it keeps to."""

    prediction: Prediction
    phase: str = "prefill"
    speedup: float | None = None
    nats: float | None = None

    def __post_init__(self):
        if (self.speedup is None) == (self.nats is None):
            raise SPDError("A target is either a speedup (--target-speedup) or a loss in nats (--max-loss).")

    def seconds(self, plan: Plan | None) -> float:
        return self.prediction.time(PHASES[self.phase], plan).total

    def plan(self, choices: Choices) -> Plan:
        """That which loses least, or is fastest. Raises SPDError with what could be met."""
        full = self.seconds(self.prediction.full)
        if plan := choices.best(nats=self.nats) if self.speedup is None else choices.best(full / self.speedup):
            return plan
        fastest = choices.best(nats=np.finfo(float).max)
        raise SPDError(
            f"A speedup of {self.speedup:g} in {self.phase} cannot be met over {self.prediction.all_reduce.name}: these"
            f" policies give at most {full / self.seconds(fastest):.3f}, at an estimated loss of "
            f"{choices.loss(fastest):.3g} nats a token; no communication at all would give "
            f"{full / self.seconds(None):.3f}."
        )

    def promise(self, plan: Plan, choices: Choices, nats: float | None = None) -> dict:
        """A plan's document, as `make_plan` has it, with the times and the loss that it promises: the estimated one."""
        made, full, dropped = self.prediction, self.prediction.full, plan.dropped()
        estimated = choices.loss(plan)
        promise = {"phase": self.phase, "loss_nats": nats or self.nats or estimated, "estimated_nats": estimated}
        promise |= {kind: made.time(kind, plan).against(made.time(kind, full)) for kind in TIMES}
        promise |= {name: getattr(made, name) for name in ("batch", "prompt_len", "new_tokens")}
        return {
            **plan.document(),
            "plan": str(plan),
            "classes": [None] * len(plan),
            "treatments": ["drop" if i in dropped else KEEP for i in range(len(plan))],
            "budget": {"blocks": len(dropped), "percent": 100 * len(dropped) / len(plan)},
            "promise": promise | {"machine": made.machine.name, "link": made.all_reduce.name},
            "measured": None,
        }

    def searched(self, choices: Choices, measure: Measure, evaluations: int) -> tuple[Plan, float, dict[str, float]]:
        """A plan by a local search on measured losses, what it may lose on other windows, and shares of estimates.

        First each policy alone, in the half of the points where it is estimated to lose least: what is measured there
        scales all that is estimated of it. Then the best plan by these, and neighbours: the best when what was measured
        last scales everything again (a loss's target), or two points exchanged. Everything full where nothing will do.
        """
        full, best = self.prediction.full, (True, np.inf, np.inf, self.prediction.full)
        aim = self if self.nats is None else replace(self, nats=MARGIN * self.nats)
        base, points = measure(full), np.arange(len(choices.losses))
        shares, tried = np.ones(len(choices.policies)), set()
        for number in range(1, len(shares)):
            least = np.argsort(choices.losses[:, number])[: (points.size + 1) // 2]
            alone = choices.plan(np.where(np.isin(points, least), number, 0))
            shares[number] = np.clip((measure(alone) - base) / (choices.loss(alone) + 1e-12), *SHARES)
        known = replace(choices, losses=choices.losses * shares)
        for _ in range(evaluations + 1):
            plan = next(one for one in (aim.plan(known), *known.exchanges(best[-1]), full) if one not in tried)
            tried |= {plan} - {full}
            lost = measure(plan) - base
            best = min(best, (lost > (aim.nats or np.inf), self.seconds(plan), lost, plan), key=lambda found: found[:3])
            known = replace(known, losses=known.losses * np.clip(lost / (known.loss(plan) + 1e-12), 0.5, 4.0))
        failed, _, lost, plan = best
        named = {policy.name: float(share) for policy, share in zip(choices.policies[1:], shares[1:], strict=True)}
        return full if failed else plan, self.nats or max(lost, 1e-4) / MARGIN, named


def kept(result: dict, measure: Measure, full: Plan) -> dict:
    """The measured loss of a plan's document. Raises SPDError where that breaks its promise."""
    promise, before, after = result["promise"]["loss_nats"], measure(full), measure(Plan.from_document(result))
    if after - before > promise:
        raise SPDError(
            f"The plan breaks its promise and is not kept: at most {promise:.4g} nats a token were to be lost, and "
            f"{after - before:.4g} were, on other windows than it was searched on; ask for less, or give more windows."
        )
    return {"nats": after, "perplexity": float(np.exp(after)), "full_nats": before, "loss_nats": after - before}
