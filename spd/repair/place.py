"""Placing: each neuron to the shard whose input serves it best, and key/value groups where they let neurons be served.

F is the number of MLP neurons, K that of key/value groups.
"""

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spd.comm import Shards
from spd.model import Block
from spd.repair.assignment import balanced_assignment
from spd.repair.least_squares import Coefficients
from spd.repair.permute import permute_heads, permute_neurons
from spd.repair.site import Calibration, Site, all_reduced, attended

PLACEMENT_TOKENS = 16_384  # on which neurons are compared
SEARCH_TOKENS = 2_048  # on which groupings of heads are compared


@torch.no_grad()
def placement_costs(site: Site, data: Calibration, corrections: Coefficients | None, tokens: int) -> Tensor:
    """Squared error (F, tp) each neuron would cause in the block's output, summed over tokens, on each shard.

    The neuron's activation on the shard's input (after `corrections`, where given) against that on the
    undropped input, times the squared norm of its column of the down projection. Each process reckons its hosted
    shards' columns for all F neurons.
    """
    block, shards = site.block, site.shards
    weight, bias, power = all_neurons(block, shards)
    costs = torch.zeros(shards.k, weight.shape[1], dtype=torch.double, device=weight.device)
    for batch in data.batches(site, tokens):
        stream = attended(block, batch)
        wanted = activations_of(block.mlp_norm(stream.x + all_reduced(site, stream.pending)), weight, bias)
        for shard, pending in enumerate(stream.pending):
            seen = block.mlp_norm(stream.x + pending)
            if corrections is not None:
                seen = seen + corrections[shard : shard + 1](seen[None])[0].to(seen)
            error = activations_of(seen, weight, bias) - wanted
            costs[shard] += error.float().square().sum((0, 1))
    return shards.gather(costs * power).T


def all_neurons(block: Block, shards: Shards) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gate and up rows (2, F, D) of all shards, their biases (2, F), and the down columns' squared norms (F,)."""
    mlp, halves = block.mlp, (2, -1)
    weight = shards.gather(mlp.gate_up.weight).unflatten(1, halves).transpose(0, 1).flatten(1, 2)
    bias = mlp.gate_up.bias
    if bias is not None:
        bias = shards.gather(bias).unflatten(1, halves).transpose(0, 1).flatten(1, 2)
    return weight, bias, shards.gather(mlp.down.weight.square().sum(1, dtype=torch.double)).flatten()


def activations_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    gate, up = (F.linear(x, weight[half], None if bias is None else bias[half]) for half in (0, 1))
    return F.silu(gate) * up


@torch.no_grad()
def place_neurons(
    site: Site, data: Calibration, corrections: Coefficients | None = None, tokens: int = PLACEMENT_TOKENS
) -> float:
    """Moves every neuron to the shard that serves it best, equally many to each; the summed cost that remains."""
    costs = placement_costs(site, data, corrections, tokens).cpu().numpy()
    shard = balanced_assignment(costs)
    permute_neurons(site.block, torch.from_numpy(np.argsort(shard, kind="stable")), site.shards)
    return float(costs[np.arange(len(shard)), shard].sum())


# Grouping heads


@torch.no_grad()
def search_heads(site: Site, data: Calibration, tokens: int = SEARCH_TOKENS) -> int:
    """Moves key/value groups between shards to where neurons can be placed best; the number of swaps made.

    A local search from the present grouping: two groups of different shards change places while that lowers the cost
    of the best placement of neurons (`placement_costs`, uncorrected), which therefore judges heads and neurons
    together. Where every shard has one group nothing is left to search, since neurons follow them anywhere; where
    heads are spread over processes nothing is searched either.
    """
    shards, groups = site.shards, site.config.num_kv_heads
    if groups <= shards.tp or shards.world > 1 or shards.tp == 1:
        return 0
    cost = _grouping_cost(site, data, tokens)
    order = np.arange(groups).reshape(shards.tp, -1)
    best, swaps, improved = cost(order), 0, True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(groups), 2):
            i, j = divmod(a, order.shape[1]), divmod(b, order.shape[1])
            if i[0] == j[0]:
                continue
            candidate = order.copy()
            candidate[i], candidate[j] = order[j], order[i]
            if (lower := cost(candidate)) < best * (1 - 1e-6):
                order, best, swaps, improved = candidate, lower, swaps + 1, True
    permute_heads(site.block, order.ravel(), shards, site.config)
    return swaps


def _grouping_cost(site: Site, data: Calibration, tokens: int) -> Callable[[np.ndarray], float]:
    """A function of an order (tp, groups a shard): the summed cost of its best placement of neurons."""
    block = site.block
    weight, bias, power = all_neurons(block, site.shards)
    parts, streams, held = [], [], 0
    for batch in data.batches(site, tokens):
        windows = -(-(tokens - held) // batch.x.shape[1])
        parts.append(_group_outputs(block, batch.mixed[:, :windows]).flatten(1, 2))
        streams.append(attended(block, batch).x[:windows].flatten(0, 1))
        held += len(streams[-1])
        if held >= tokens:
            break
    outputs, x = torch.cat(parts, 1), torch.cat(streams)  # (K, N, D), (N, D)
    wanted = activations_of(block.mlp_norm(x + outputs.sum(0)), weight, bias)

    @cache
    def column(members: frozenset[int]) -> np.ndarray:
        seen = block.mlp_norm(x + outputs[sorted(members)].sum(0))
        error = (activations_of(seen, weight, bias) - wanted).float().square().sum(0)
        return (error.double() * power).cpu().numpy()

    def cost(order: np.ndarray) -> float:
        costs = np.stack([column(frozenset(shard.tolist())) for shard in order], 1)
        return float(costs[np.arange(len(costs)), balanced_assignment(costs)].sum())

    return cost


def _group_outputs(block: Block, mixed: Tensor) -> Tensor:
    """What each key/value group adds to the residual stream: (K, B, T, D) of gathered values (S, B, T, h d)."""
    size = block.attention.g, -1
    by_group = mixed.unflatten(-1, size).movedim(-2, 1).flatten(0, 1)
    weight = block.attention.out.weight.unflatten(-1, size).movedim(-2, 1).flatten(0, 1)
    return torch.einsum("kbti,kdi->kbtd", by_group, weight)
