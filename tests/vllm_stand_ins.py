"""What vLLM's published wheel lacks on a CPU, in plain PyTorch, and a count of all-reduces: a plug-in of the checks.

The wheel's kernels are CUDA's. Six operators that the CPU build would compile are set under the names that vLLM calls,
in each of its processes; nothing of vLLM itself is patched but for the count.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

reduced = []  # the shape of every all-reduce in this process since the last `take_all_reduces`


class Counting:
    """Extends vLLM's workers: `collective_rpc("take_all_reduces")`."""

    def take_all_reduces(self) -> list[tuple[int, ...]]:
        shapes = reduced.copy()
        reduced.clear()
        return shapes


def register() -> None:
    """vLLM calls this in each of its processes."""
    from vllm.distributed.parallel_state import GroupCoordinator

    original = GroupCoordinator.all_reduce

    def counted(self, tensor):
        reduced.append(tuple(tensor.shape))
        return original(self, tensor)

    GroupCoordinator.all_reduce = counted
    for operator in (
        init_cpu_memory_env,
        compute_slot_mapping_kernel_impl,
        get_scheduler_metadata,
        cpu_attn_reshape_and_cache,
        cpu_attention_with_kv_cache,
        greedy_argmax,
    ):
        setattr(torch.ops._C, operator.__name__, operator)


def init_cpu_memory_env(nodes):
    pass


def get_scheduler_metadata(*shape):
    return torch.empty(0)


def greedy_argmax(logits):
    return logits.argmax(-1)


def compute_slot_mapping_kernel_impl(starts, positions, block_table, slots, size):
    """Where in the cache each new token goes: block and place in it as one number; -1 for padding."""
    request = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
    at = positions[: len(request)]
    slots.fill_(-1)
    slots[: len(request)] = block_table[request, at // size] * size + at % size


def cpu_attn_reshape_and_cache(key, value, keys, values, slots, *_):
    """Puts new keys and values (tokens, g, d) into the caches (blocks, g, size, d)."""
    size, kept = keys.shape[2], slots >= 0
    for cache, new in ((keys, key), (values, value)):
        cache[slots[kept] // size, :, slots[kept] % size] = new[: len(slots)][kept]


def cpu_attention_with_kv_cache(
    query, keys, values, output, starts, lengths, scale, causal, alibi, window, block_table, softcap, *_
):
    """Attention of each request's new tokens (tokens, h, d) to all that its blocks of the cache hold."""
    assert causal and alibi is None and window == -1 and not softcap
    for i, (start, end) in enumerate(pairwise(starts.tolist())):
        length, new = int(lengths[i]), end - start
        blocks = block_table[i, : -(-length // keys.shape[2])].long()
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (keys, values))
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        q = query[start:end].transpose(0, 1)
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, enable_gqa=True)[0]
        output[start:end] = y.transpose(0, 1)
