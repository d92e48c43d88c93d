"""Text that a model writes itself, as further calibration windows."""

import torch
from torch import Tensor

from spd.generate import Sampling, choose
from spd.model import Transformer

PROMPT = 8  # tokens of calibration text that each window goes on from
AT_ONCE = 64  # windows


@torch.no_grad()
def sample_windows(model: Transformer, tokens: Tensor, count: int, banned: list[int], seed: int) -> Tensor:
    """`count` windows (count, T) that continue random places of the windows (W, T), at temperature 1.

    `banned` tokens are never chosen: calibration windows hold no special tokens either, and never end.
    """
    length = tokens.shape[1]
    prompt = min(PROMPT, length - 1)
    generator = torch.Generator().manual_seed(seed)
    flat = tokens.flatten()
    starts = torch.randint(flat.numel() - prompt, (count,), generator=generator)
    prompts = flat[starts[:, None] + torch.arange(prompt)]
    written = [_continue(model, some, length, banned, seed + i) for i, some in enumerate(prompts.split(AT_ONCE))]
    return torch.cat(written) if count else tokens[:0]


def _continue(model: Transformer, prompts: Tensor, length: int, banned: list[int], seed: int) -> Tensor:
    device = model.embedding.weight.device
    generator, sampling = torch.Generator(device).manual_seed(seed), Sampling(temperature=1.0)
    cache = model.new_cache(len(prompts), length)
    pieces = [prompts.to(device)]
    for _ in range(length - prompts.shape[1]):
        logits = model(pieces[-1], cache, last_only=True)[:, -1]
        logits[:, banned] = -torch.inf
        pieces.append(choose(logits, sampling, generator)[:, None])
    return torch.cat(pieces, dim=1).cpu()
