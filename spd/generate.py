"""Prefill and single-token decode: greedy or sampled continuation of a batch of prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd.errors import SPDError
from spd.evaluate import not_finite
from spd.model import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k most probable tokens
    top_p: float | None = None  # only the fewest tokens whose probabilities reach p
    seed: int = 0
    banned: tuple[int, ...] = ()  # never these tokens

    def __post_init__(self):
        if self.temperature < 0:
            raise SPDError(f"The temperature must not be negative, and is {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise SPDError(f"top-k must be at least 1, and is {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SPDError(f"top-p must lie in (0, 1], and is {self.top_p}.")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens (B,) from logits (B, vocabulary)."""
    if sampling.banned:
        logits = logits.index_fill(-1, torch.tensor(sampling.banned, device=logits.device), -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) and where they are valid, or None where nothing had to be padded."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    valid = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return tokens, None if bool(valid.all()) else valid


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Prompts and their continuations as token ids; a row ends with the model's end-of-sequence token.

    `stop` is asked after each step whether a row's new tokens are enough; all rows end once none needs more.
    """
    if not prompts or not all(prompts):
        raise SPDError("A prompt without any token cannot be continued.")
    if max_new_tokens < 1:
        raise SPDError(f"At least 1 new token must be asked for, not {max_new_tokens}.")
    device, config = model.embedding.weight.device, model.config
    prompt, valid = tokens, valid = pad_left(prompts, device)
    capacity = tokens.shape[1] + max_new_tokens
    config.validate_length(capacity)
    if capacity > config.max_positions:
        raise SPDError(
            f"{tokens.shape[1]} prompt and {max_new_tokens} new tokens are more than the model's "
            f"{config.max_positions} positions."
        )
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.new_cache(len(prompts), capacity)
    ends = torch.tensor(config.eos_token_ids, dtype=torch.long, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new = []
    for _ in range(max_new_tokens):
        logits = model(tokens, cache, valid, last_only=True)[:, -1]
        if not logits.isfinite().all():
            raise not_finite(model, torch.cat((prompt, *new), 1), valid)
        tokens = choose(logits, sampling, generator)[:, None]
        new.append(tokens)
        finished |= torch.isin(tokens[:, 0], ends)
        if stop is not None:
            finished |= torch.tensor([stop(row) for row in torch.cat(new, 1).tolist()], device=device)
        if valid is not None:
            valid = torch.cat((valid, torch.ones_like(tokens, dtype=torch.bool)), dim=1)
        if bool(finished.all()):
            break
    rows = torch.cat(new, 1).tolist()
    return [prompt + _until(row, config.eos_token_ids) for prompt, row in zip(prompts, rows, strict=True)]


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens up to and with the first of `ends`."""
    stop = next((i for i, token in enumerate(tokens, start=1) if token in ends), None)
    return tokens[:stop]


PROMPT = 8  # tokens of calibration text that each window goes on from
AT_ONCE = 64  # windows


def sample_windows(model: Transformer, tokens: Tensor, count: int, banned: list[int], seed: int) -> Tensor:
    """`count` windows (count, T) that continue random places of the windows (W, T), at temperature 1.

    `banned` tokens are never chosen: calibration windows hold no special tokens either, and never end.
    """
    length = tokens.shape[1]
    prompt = min(PROMPT, length - 1)
    flat, generator = tokens.flatten(), torch.Generator().manual_seed(seed)
    starts = torch.randint(flat.numel() - prompt, (count,), generator=generator)
    prompts = flat[starts[:, None] + torch.arange(prompt)]
    never = (*banned, *model.config.eos_token_ids)
    written = []
    for i, some in enumerate(prompts.split(AT_ONCE) if count else ()):
        written += generate(model, some.tolist(), length - prompt, Sampling(1.0, seed=seed + i, banned=never))
    return torch.tensor(written, dtype=tokens.dtype).view(count, length)
