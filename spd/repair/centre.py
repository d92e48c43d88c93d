"""The constant part of what heads gather, given to every shard by a bias; nothing is communicated for it.

Attention weights sum to one: taking a vector m from a head's values takes m from whatever the head gathers, and the
output projection's bias can give `W m` back. The layer is the function it was, but where the attention's sync is
dropped the bias is still added to `x` once, for all shards to see (the paper's design for layers with a bias), while
the gathered part stays with its shard. So each shard's MLP misses only what varies.
"""

import torch
from torch import Tensor

from spd.comm import Shards
from spd.model import Attention


@torch.no_grad()
def centre_heads(attention: Attention, gathered: Tensor, shards: Shards) -> None:
    """Moves the mean of what the heads of each key/value group gather into the biases, in place.

    Args:
        gathered: the mean over tokens of `Attention.mix`, (S, h d), with the biases as they are.
    """
    attention.add_biases()
    mean = gathered.unflatten(-1, (attention.g, -1, attention.head_dim)).mean(2)  # (S, g, d), of the group's heads
    values = slice((attention.h + attention.g) * attention.head_dim, None)
    attention.qkv.bias[:, values] -= mean.flatten(1).to(attention.qkv.bias)
    heads = mean.repeat_interleave(attention.h // attention.g, 1).flatten(1).to(attention.out.weight)
    part = torch.einsum("sdi,si->d", attention.out.weight, heads)
    attention.out.bias += shards.all_reduce(part, "bias")
