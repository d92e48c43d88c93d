"""Which heads and neurons share a shard: another tensor-parallel layout of the same dense function (section 4.2.4).

Where every sync point is `full` a block computes the same before and after, up to the order of its sums. Where the
attention sync is dropped, the layout decides what is lost. Heads are spread over the shards by equation 2 and matched
with parts of the MLP by equation 3; neurons are shared out by what each would cost on each shard (`closed_form`).

What moves of the attention is a unit: a key/value head with its query heads.
"""

from collections.abc import Iterable, Sequence
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

EXACT_UNITS = 16  # up to here all groupings are searched: half a million steps at the most
RANDOM_SPLITS = 1000  # to compare with
PRICE_ROUNDS = 4
RESTARTS = 32  # of these are improved where there are more units
SCORES_AT_ONCE = 2**25  # attention scores held at a time, of all heads together

# Moving


@torch.no_grad()
def permute_heads(block: Block, order: Sequence[int] | Tensor, shards: Shards, config: ModelConfig) -> None:
    """Places the key/value group `order[p]` of today (its query heads with it) at position p of K, in place.

    Position p lies on shard p // (K / tp). Rows of the query, key and value projections (and their biases) move,
    and columns of the output projection.

    Raises:
        SPDError: not an order of the K groups, or tp does not divide K: shards hold copies of key/value heads.
    """
    if config.num_kv_heads % shards.tp:
        reason = f"the {config.num_kv_heads} key/value heads are replicated, or not equally many on each shard."
        raise SPDError(f"Heads cannot be reordered at tp={shards.tp}: {reason}")
    attention, size = block.attention, block.attention.head_dim
    queries_keys_values = [attention.h * size, attention.g * size, attention.g * size]
    parts = [
        p for t in (attention.qkv.weight, attention.qkv.bias) if t is not None for p in t.split(queries_keys_values, 1)
    ]
    _permute([*parts, attention.out.weight.mT], order, attention.g, "key/value groups", shards)


@torch.no_grad()
def permute_neurons(block: Block, order: Sequence[int] | Tensor, shards: Shards) -> None:
    """Places the MLP neuron `order[p]` of today at position p of F, in place; p lies on shard p // (F / tp).

    Rows of the gate and up projections (and their biases) move, and columns of the down projection.

    Raises:
        SPDError: not an order of the F neurons.
    """
    mlp = block.mlp
    parts = [p for t in (mlp.gate_up.weight, mlp.gate_up.bias) if t is not None for p in t.chunk(mlp.parts, 1)]
    _permute([*parts, mlp.down.weight.mT], order, mlp.down.weight.shape[2], "MLP neurons", shards)


def _permute(parts: list[Tensor], order: Sequence[int] | Tensor, units: int, things: str, shards: Shards) -> None:
    """Reorders the rows of each part (k, rows, ...), in place: equal pieces, `units` on each of the tp shards."""
    order, count = torch.as_tensor(order, dtype=torch.long), units * shards.tp
    if order.shape != (count,) or not torch.equal(order.sort().values.cpu(), torch.arange(count)):
        raise SPDError(f"An order of {count} {things} must name each of 0..{count - 1} once.")
    mine = order.view(shards.tp, units)[shards.hosted.start : shards.hosted.stop]
    for part in parts:
        pieces = shards.gather(part).unflatten(1, (units, -1)).flatten(0, 1)  # (tp * units, rows of one, ...)
        part.copy_(pieces[mine.to(pieces.device)].flatten(1, 2))


# Neurons


def balanced_assignment(cost: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The shard (F,) of each of F things, of which the S shards take `counts`, with the least sum of `cost` (F, S).

    Each goes where cost and the shard's price are least, prices being such that the shards' numbers are about right;
    then, one after another, things move along the cheapest path from a shard that has too many to one that has too
    few. A step of a path, from s to t, moves the thing of s that loses least by it, so that the graph has only S
    nodes. Whatever numbers the shards hold meanwhile, no assignment with these is cheaper (successive shortest paths).

    Raises:
        SPDError: costs that are not finite, or `counts` that are not those of F things.
    """
    things, shards = cost.shape
    if len(counts) != shards or sum(counts) != things:
        raise SPDError(f"{things} things cannot be shared out to {shards} shards that take {list(counts)}.")
    if not np.isfinite(cost).all():
        raise SPDError("The costs of an assignment are not finite.")
    prices = np.zeros(shards)
    for s in PRICE_ROUNDS * list(range(shards)):  # its number of things prefer s to any other
        prices[s] = 0
        others = np.delete(cost + prices, s, axis=1).min(1, initial=np.inf)
        prices[s] = np.partition(others - cost[:, s], -counts[s])[-counts[s]]
    turns = (np.arange(things)[:, None] + np.arange(shards)) % shards  # things that are alike take turns
    best = np.take_along_axis(cost + prices, turns, 1).argmin(1)
    shard = turns[np.arange(things), best]
    toll = 1e-12 * max(float(np.abs(cost).max()), np.finfo(float).tiny)  # lest rounding make a circle of steps a gain
    movers, steps = np.zeros((shards, shards), dtype=int), np.full((shards, shards), np.inf)
    changed = range(shards)
    while True:
        excess = np.bincount(shard, minlength=shards) - counts
        if not excess.any():
            return shard
        for s in changed:
            members, steps[s] = np.flatnonzero(shard == s), np.inf
            if len(members):
                change = cost[members] - cost[members, s, None] + toll
                movers[s], steps[s] = members[change.argmin(0)], change.min(0)
        lengths, previous = steps.copy(), np.arange(shards)[:, None].repeat(shards, 1)
        for via in range(shards):  # Floyd and Warshall
            through = lengths[:, via, None] + lengths[via]
            previous = np.where(through < lengths, previous[via], previous)
            lengths = np.minimum(lengths, through)
        wanted = np.where((excess[:, None] > 0) & (excess < 0), lengths, np.inf)
        source, at = np.unravel_index(wanted.argmin(), wanted.shape)
        changed = [at]
        while at != source:
            shard[movers[previous[source, at], at]] = at
            at = previous[source, at]
            changed.append(at)


# Equation 2: heads scattered


def score_products(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products (H, H), float64, of the heads' attention scores softmax(QK^T), each one long vector.

    `queries` and `keys` (H, B, T, d) are those of all heads, rotary embedding applied.
    """
    heads, batch, tokens, size = queries.shape
    products = torch.zeros(heads, heads, dtype=torch.float64)
    positions = torch.arange(tokens, device=queries.device)
    for some in positions.split(max(1, SCORES_AT_ONCE // (heads * batch * tokens))):
        logits = queries[:, :, some] @ keys.transpose(-1, -2) * size**-0.5
        logits.masked_fill_(positions > some[:, None], -torch.inf)
        scores = logits.float().softmax(-1).flatten(1)
        products += (scores @ scores.T).cpu()
    return products


def head_distances(block: Block, inputs: Iterable[tuple[Stream, Context]], shards: Shards) -> Tensor:
    """Euclidean distances (H, H), float64, between all query heads' attention scores on a block's inputs."""
    attention, products = block.attention, 0
    for stream, context in inputs:
        q, k, _ = attention.project(block.attention_norm(stream.read()), context)
        k = k.repeat_interleave(attention.h // attention.g, dim=2)
        products += score_products(*(shards.gather(t).transpose(1, 2).flatten(0, 1) for t in (q, k)))
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp(min=0).sqrt()


def unit_distances(distances: Tensor, units: int) -> np.ndarray:
    """Sums of head distances between units (units, units); on the diagonal those inside a unit, each pair once."""
    size = distances.shape[0] // units
    sums = distances.unflatten(0, (units, size)).unflatten(2, (units, size)).sum((1, 3))
    return (sums - torch.diag(sums.diagonal() / 2)).numpy()


def scatter(distances: np.ndarray, groups: int, seed: int = 0) -> list[list[int]]:
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
    if units <= EXACT_UNITS:
        found = _search_all(distances, units // groups)
    else:
        improved = (_swap(distances, split) for split in random_splits(units, groups, seed)[:RESTARTS])
        found = max(improved, key=lambda split: objective(distances, split))
    return sorted(sorted(map(int, group)) for group in found)


def random_splits(units: int, groups: int, seed: int = 0) -> list[np.ndarray]:
    """`RANDOM_SPLITS` of them, (groups, units / groups) each."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(units).reshape(groups, -1) for _ in range(RANDOM_SPLITS)]


def objective(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Sum of the pairwise distances inside the groups (equation 2)."""
    inside = sum(distances[a, b] for group in groups for a, b in combinations(group, 2))
    return float(inside + np.trace(distances))


def _search_all(distances: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
    """The best split into groups of `size`, by dynamic programming over the sets of units left."""
    rows = distances.tolist()

    @cache
    def best(left: tuple[int, ...]) -> tuple[float, tuple]:
        if not left:
            return 0.0, ()
        options = []
        for mates in combinations(left[1:], size - 1):
            group = (left[0], *mates)
            value, others = best(tuple(unit for unit in left if unit not in group))
            options.append((value + sum(rows[a][b] for a, b in combinations(group, 2)), (group, *others)))
        return max(options)

    return best(tuple(range(len(rows))))[1]


def _swap(distances: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Exchanges the two units that gain most, until none gain."""
    apart, groups = distances - np.diag(np.diag(distances)), len(split)
    place = np.argsort(split, axis=None) // split.shape[1]  # each unit's group
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


# Equation 3: groups matched with parts of the MLP


def matching_norms(block: Block, inputs: Iterable[tuple[Stream, Context]], shards: Shards) -> np.ndarray:
    """|| MLP_m(group g) || (g, m) over the inputs: MLP partition m fed by the heads that are on shard g now."""
    tp, here = shards.tp, shards.hosted
    # Where the block is: NCCL gathers nothing that lies in the host's memory.
    squares = torch.zeros(shards.k, tp, dtype=torch.float64, device=block.mlp.down.weight.device)
    for stream, context in inputs:
        y = block.attention(block.attention_norm(stream.read()), context)
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
    return linear_sum_assignment(norms.T, maximize=True)[1].tolist()


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
    units, tp, device = config.num_kv_heads, shards.tp, block.mlp.down.weight.device
    report = {"order": None, "scattering": None, "matching": None, "note": None}
    if units < tp:
        return report | {"note": f"the {units} key/value heads are copied to {tp} shards, so that no head can move"}
    if units % tp:
        return report | {"note": f"{units} key/value groups are not shared out evenly to {tp} shards: no head moves"}
    as_it_is = order = torch.arange(units, device=device).view(tp, -1)
    if units == tp:
        report["note"] = "a shard holds one key/value group, so that only the matching is left"
    else:
        distances = unit_distances(head_distances(block, inputs, shards), units)
        order = shards.agreed(torch.tensor(scatter(distances, tp, seed), device=device))
        permute_heads(block, order.flatten(), shards, config)
        report["scattering"] = {
            "objective": objective(distances, order.tolist()),
            "best_random": max(objective(distances, split) for split in random_splits(units, tp, seed)),
            "exact": units <= EXACT_UNITS,
        }
    norms = matching_norms(block, inputs, shards)
    matched = shards.agreed(torch.tensor(match(norms), device=device))
    permute_heads(block, as_it_is[matched].flatten(), shards, config)
    chosen = float(sum(norms[group, m] for m, group in enumerate(matched.tolist())))
    report["matching"] = {"objective": chosen, "unmatched": float(np.trace(norms))}
    return report | {"order": order[matched].flatten().tolist()}
