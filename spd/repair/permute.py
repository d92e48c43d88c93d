"""Moving heads and neurons between shards: another tensor-parallel layout of the same dense function.

Where every sync point is `full` a block computes the same before and after, up to the order of its sums. Where
the attention sync is dropped, which heads and neurons share a shard decides what is lost (section 4.2.4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spd.comm import Shards
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.model import Block


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
