"""Head grouping: which heads share a shard, and with which part of the MLP (section 4.2.4, equations 2 and 3).

What moves is a unit: a key/value head with its query heads (a single head where every query has its own keys). The
dense model is unchanged by it; a block whose attention sync is dropped is not.

Moving heads and neurons between shards: another tensor-parallel layout of the same dense function.

Where every sync point is `full` a block computes the same before and after, up to the order of its sums. Where
the attention sync is dropped, which heads and neurons share a shard decides what is lost (section 4.2.4).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd.comm import Shards, Stream
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.model import Block, Context

# ---------------------------------------------------------------- Moving heads and neurons between shards: an


@torch.no_grad()
def permute_heads(block: Block, order: Sequence[int] | Tensor, shards: Shards, config: ModelConfig) -> None:
    """Places the key/value group `order[p]` of today (its query heads with it) at position p of K, in place.

    Position p lies on shard p // (K / tp). Rows of the query, key and value projections (and their biases) move,
    and columns of the output projection.

    Raises:
        SPDError: not an order of the K groups, or K < tp, where shards hold copies of a key/value head.
    """
    if config.num_kv_heads < shards.tp:
        raise SPDError(
            f"Heads cannot be reordered at tp={shards.tp}: the {config.num_kv_heads} key/value heads are replicated."
        )
    attention = block.attention
    order = _checked(order, config.num_kv_heads, "key/value groups")
    sizes = [attention.h * attention.head_dim] + 2 * [attention.g * attention.head_dim]
    _permute_rows(attention.qkv.weight, sizes, attention.g, order, shards)
    if attention.qkv.bias is not None:
        _permute_rows(attention.qkv.bias, sizes, attention.g, order, shards)
    _permute_rows(attention.out.weight.transpose(1, 2), sizes[:1], attention.g, order, shards)


@torch.no_grad()
def permute_neurons(block: Block, order: Sequence[int] | Tensor, shards: Shards) -> None:
    """Places the MLP neuron `order[p]` of today at position p of F, in place; p lies on shard p // (F / tp).

    Rows of the gate and up projections (and their biases) move, and columns of the down projection.

    Raises:
        SPDError: not an order of the F neurons.
    """
    mlp = block.mlp
    neurons = mlp.down.weight.shape[2]
    order = _checked(order, neurons * shards.tp, "MLP neurons")
    _permute_rows(mlp.gate_up.weight, [neurons, neurons], neurons, order, shards)
    if mlp.gate_up.bias is not None:
        _permute_rows(mlp.gate_up.bias, [neurons, neurons], neurons, order, shards)
    _permute_rows(mlp.down.weight.transpose(1, 2), [neurons], neurons, order, shards)


def _checked(order: Sequence[int] | Tensor, count: int, things: str) -> Tensor:
    order = torch.as_tensor(order, dtype=torch.long)
    if order.shape != (count,) or not torch.equal(order.sort().values.cpu(), torch.arange(count)):
        raise SPDError(f"An order of {count} {things} must name each of 0..{count - 1} once.")
    return order


def _permute_rows(stacked: Tensor, sizes: list[int], units: int, order: Tensor, shards: Shards) -> None:
    """Reorders the rows of (k, rows, ...), in place.

    The rows of a shard are parts of `sizes`, and each part is `units` equal pieces; pieces are what moves, those of
    one unit together. `order` counts units over all tp shards.
    """
    for part in stacked.split(sizes, dim=1):
        pieces = shards.gather(part).unflatten(1, (units, -1)).flatten(0, 1)  # (tp * units, rows of one, ...)
        mine = order.view(shards.tp, units)[shards.hosted.start : shards.hosted.stop]
        part.copy_(pieces[mine.to(pieces.device)].flatten(1, 2))


# ---------------------------------------------------------------- Sharing out many things over few shards: an


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


# ---------------------------------------------------------------- Head grouping: which heads share a shard, a


EXACT_UNITS = 16  # up to here all groupings are searched: half a million steps at the most
SCORES_AT_ONCE = 2**25  # attention scores held at a time, of all heads together
RANDOM_GROUPINGS = 1000
RESTARTS = 32


@dataclass(frozen=True)
class Grouping:
    """A split of the units into equal groups, and how far apart its groups' members are (equation 2)."""

    groups: tuple[tuple[int, ...], ...]
    objective: float  # sum of the distances inside the groups
    best_random: float  # the same of the best of `RANDOM_GROUPINGS` random splits
    exact: bool  # whether no split is better


# ---------------------------------------------------------------- equation 2: head scattering


class HeadDistances:
    """Euclidean distances between the heads' attention scores on a stream of inputs, of which nothing is kept.

    Each head's scores softmax(QK^T) over all samples are one long vector; only their inner products accumulate.
    """

    def __init__(self, heads: int):
        self.products = torch.zeros(heads, heads, dtype=torch.float64)

    def update(self, queries: Tensor, keys: Tensor) -> None:
        """`queries` (H, B, T, d) and `keys` (H, B, T, d) of all heads, rotary embedding applied."""
        heads, batch, tokens, size = queries.shape
        rows = max(1, SCORES_AT_ONCE // (heads * batch * tokens))
        positions = torch.arange(tokens, device=queries.device)
        for some in positions.split(rows):
            logits = queries[:, :, some] @ keys.transpose(-1, -2) * size**-0.5
            logits.masked_fill_(positions > some[:, None], -torch.inf)
            scores = logits.float().softmax(-1).flatten(1)
            self.products += (scores @ scores.T).cpu()

    def distances(self) -> Tensor:
        """(H, H), float64."""
        squares = self.products.diagonal()
        return (squares[:, None] + squares - 2 * self.products).clamp(min=0).sqrt()


def head_distances(block: Block, inputs: Iterable[tuple[Stream, Context]], shards: Shards) -> Tensor:
    """Distances (H, H) between all query heads of a block, over its inputs."""
    attention = block.attention
    accumulator = HeadDistances(attention.h * shards.tp)
    for stream, context in inputs:
        q, k, _ = attention.project(block.attention_norm(stream.read()), context)
        k = k.repeat_interleave(attention.h // attention.g, dim=2)
        accumulator.update(*(shards.gather(t).transpose(1, 2).flatten(0, 1) for t in (q, k)))
    return accumulator.distances()


def unit_distances(distances: Tensor, units: int) -> np.ndarray:
    """Sums of head distances between units (units, units); on the diagonal those inside a unit, each pair once."""
    size = distances.shape[0] // units
    sums = distances.unflatten(0, (units, size)).unflatten(2, (units, size)).sum((1, 3))
    return (sums - torch.diag(sums.diagonal() / 2)).numpy()


def scatter(distances: np.ndarray, groups: int, seed: int = 0) -> Grouping:
    """Splits units into equal groups so that the distances inside them sum to the most (equation 2).

    Exact up to `EXACT_UNITS` units; beyond, the best of `RESTARTS` random splits improved by swaps.

    Raises:
        SPDError: units that cannot be split evenly, or distances that are not finite.
    """
    units = len(distances)
    if units % groups:
        raise SPDError(f"{units} heads cannot be split into {groups} equal groups.")
    if not np.isfinite(distances).all():
        raise SPDError("The attention scores are not finite, so heads cannot be compared by them.")
    generator = np.random.default_rng(seed)
    splits = [generator.permutation(units).reshape(groups, -1) for _ in range(RANDOM_GROUPINGS)]
    values = [objective(distances, split) for split in splits]
    exact = units <= EXACT_UNITS
    if exact:
        found = _search_all(distances, units // groups)
    else:
        found = max((_swap(distances, split) for split in splits[:RESTARTS]), key=lambda s: objective(distances, s))
    ordered = tuple(sorted(tuple(sorted(map(int, group))) for group in found))
    return Grouping(ordered, objective(distances, ordered), max(values), exact)


def objective(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Sum of the pairwise distances inside the groups (equation 2)."""
    inside = sum(distances[a, b] for group in groups for a, b in combinations(group, 2))
    return float(inside + np.trace(distances))


def _search_all(distances: np.ndarray, size: int) -> list[tuple[int, ...]]:
    """The best split into groups of `size`, by dynamic programming over the sets of units left."""
    rows = distances.tolist()

    @cache
    def best(left: tuple[int, ...]) -> tuple[float, tuple]:
        if not left:
            return 0.0, ()
        first, others = left[0], left[1:]
        options = []
        for mates in combinations(others, size - 1):
            group = (first, *mates)
            value, rest = best(tuple(unit for unit in others if unit not in mates))
            options.append((value + sum(rows[a][b] for a, b in combinations(group, 2)), (group, *rest)))
        return max(options)

    return list(best(tuple(range(len(rows))))[1])


def _swap(distances: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Exchanges the two units that gain most, until none gain."""
    apart = distances - np.diag(np.diag(distances))
    units, groups = len(apart), len(split)
    place = np.empty(units, dtype=int)
    for group, members in enumerate(split):
        place[members] = group
    while True:
        to_group = apart @ np.eye(groups)[place]  # distances of each unit to the members of each group
        to_other = to_group[:, place]
        own = np.diag(to_other)
        gain = to_other + to_other.T - own[:, None] - own - 2 * apart
        gain[place[:, None] == place] = 0
        a, b = np.unravel_index(gain.argmax(), gain.shape)
        if gain[a, b] <= 1e-9 * max(1.0, own.sum()):
            return np.argsort(place, kind="stable").reshape(groups, -1)
        place[a], place[b] = place[b], place[a]


# ---------------------------------------------------------------- equation 3: MLP matching


def matching_norms(block: Block, inputs: Iterable[tuple[Stream, Context]], shards: Shards) -> np.ndarray:
    """|| MLP_m(group g) || (g, m) over the inputs: MLP partition m fed by the heads that are on shard g now."""
    tp, here = shards.tp, shards.hosted
    # Where the block is: NCCL gathers nothing that lies in the host's memory.
    squares = torch.zeros(shards.k, tp, dtype=torch.float64, device=block.mlp.down.weight.device)
    for stream, context in inputs:
        y = block.attention(block.attention_norm(stream.read()), context, 0)
        groups = shards.gather(block.mlp_norm(stream.produce(y, block.attention.out.bias).read()))
        for shift in range(tp):
            z = block.mlp(groups.roll(shift, 0)[here.start : here.stop])
            fed_by = [(m - shift) % tp for m in here]
            squares[range(shards.k), fed_by] += z.double().square().sum((1, 2, 3))
    return shards.gather(squares).cpu().sqrt().T.numpy()


def match(norms: np.ndarray) -> list[int]:
    """The group for each MLP partition so that the norms sum to the most (equation 3).

    The sum takes one term a partition, so this is an assignment problem, solved exactly; the paper compares all tp!.

    Raises:
        SPDError: norms that are not finite.
    """
    if not np.isfinite(norms).all():
        raise SPDError("The MLP's outputs are not finite, so head groups cannot be matched to it.")
    partitions, groups = linear_sum_assignment(norms.T, maximize=True)
    return groups[np.argsort(partitions)].tolist()


# ---------------------------------------------------------------- both, on a block


@torch.no_grad()
def group_heads(
    block: Block, inputs: Sequence[tuple[Stream, Context]], shards: Shards, config: ModelConfig, seed: int = 0
) -> dict:
    """Scatters a block's heads over the shards and matches the groups to the MLP's parts, reordering it in place.

    Args:
        inputs: the block's inputs on calibration data, passed over twice.

    Returns:
        What was done, for a report: `order` (of the units), `scattering`, `matching`, and a `note` where the
        model's shape leaves less to choose.
    """
    units, tp = config.num_kv_heads, shards.tp
    if units < tp:
        note = f"the {units} key/value heads are copied to {tp} shards, so that no head can move"
        return {"order": None, "scattering": None, "matching": None, "note": note}
    report, order = {"note": None, "scattering": None}, np.arange(units).reshape(tp, -1)
    if units == tp:
        report["note"] = "a shard holds one key/value group, so that only the matching is left"
    else:
        found = scatter(unit_distances(head_distances(block, inputs, shards), units), tp, seed)
        order = np.array(found.groups)
        permute_heads(block, order.flatten(), shards, config)
        report["scattering"] = {"objective": found.objective, "best_random": found.best_random, "exact": found.exact}
    norms = matching_norms(block, inputs, shards)
    matched = match(norms)
    permute_heads(block, np.arange(units).reshape(tp, -1)[matched].flatten(), shards, config)
    chosen = float(sum(norms[group, m] for m, group in enumerate(matched)))
    report["matching"] = {"objective": chosen, "unmatched": float(np.trace(norms))}
    return report | {"order": order[matched].flatten().tolist()}
