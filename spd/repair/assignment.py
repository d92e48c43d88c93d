"""Sharing out many things over few shards: an exact transport solver."""

import numpy as np

from spd.errors import SPDError


def balanced_assignment(cost: np.ndarray) -> np.ndarray:
    """The shard (F,) of each of F things, F / S on every shard, with the least sum of `cost` (F, S).

    Starts from a greedy assignment and moves things along negative cycles of the graph of shards, where an arc from
    s to t costs what its cheapest mover would: F stays large and the graph has only S nodes. No negative cycle is
    left exactly when the assignment is optimal (Klein's theorem on minimum-cost flows).

    Raises:
        SPDError: costs that are not finite, or F not a multiple of S.
    """
    things, shards = cost.shape
    if things % shards:
        raise SPDError(f"{things} things cannot be shared out evenly over {shards} shards.")
    if not np.isfinite(cost).all():
        raise SPDError("The costs of an assignment are not finite.")
    shard = _greedy(cost)
    tolerance = 1e-12 * max(float(np.abs(cost).max()), np.finfo(float).tiny)
    movers, arcs = np.zeros((shards, shards), dtype=int), np.full((shards, shards), np.inf)
    stale = range(shards)
    while True:
        for s in stale:
            members = np.flatnonzero(shard == s)
            change = cost[members] - cost[members, s, None]
            movers[s], arcs[s] = members[change.argmin(0)], change.min(0)
            arcs[s, s] = np.inf
        cycle = negative_cycle(arcs, tolerance)
        if cycle is None:
            return shard
        for s, t in zip(cycle, np.roll(cycle, -1), strict=True):
            shard[movers[s, t]] = t
        stale = cycle


def _greedy(cost: np.ndarray) -> np.ndarray:
    """Those who would lose most by their second choice choose first, while there is room."""
    things, shards = cost.shape
    best = np.partition(cost, min(1, shards - 1), axis=1)
    room = np.full(shards, things // shards)
    shard = np.empty(things, dtype=int)
    for thing in np.argsort(-(best[:, min(1, shards - 1)] - best[:, 0]), kind="stable"):
        shard[thing] = np.where(room > 0, cost[thing], np.inf).argmin()
        room[shard[thing]] -= 1
    return shard


def negative_cycle(arcs: np.ndarray, tolerance: float = 0.0) -> list[int] | None:
    """The nodes, in order, of a cycle whose arcs (S, S) sum to less than -tolerance, or None (Bellman and Ford)."""
    nodes = len(arcs)
    distance, parent = np.zeros(nodes), np.full(nodes, -1)
    for _ in range(nodes):
        through = distance[:, None] + arcs
        nearest = through.argmin(0)
        shorter = through.min(0) < distance - tolerance
        if not shorter.any():
            return None
        distance, parent = np.where(shorter, through.min(0), distance), np.where(shorter, nearest, parent)
    node = int(np.flatnonzero(shorter)[0])
    for _ in range(nodes):  # far enough back to stand on the cycle
        node = int(parent[node])
    cycle = [node]
    while (node := int(parent[node])) != cycle[0]:
        cycle.append(node)
    cycle.reverse()
    return cycle if arcs[cycle, np.roll(cycle, -1)].sum() < 0 else None  # rounding can feign one
