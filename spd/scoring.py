"""How probable continuations are after their contexts: each context is run once, its continuations on its cache."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spd.generate import pad_left
from spd.model import KVCache, Transformer

Tokens = tuple[int, ...]
Score = tuple[float, bool]  # log-probability in nats, and whether greedy decoding would have given the same


@dataclass
class Question:
    """A context and the different continuations asked for after it."""

    context: Tokens
    continuations: list[Tokens]


def questions(asked: Iterable[tuple[Tokens, Tokens]]) -> list[Question]:
    """The different (context, continuation) pairs by context, the longest context first: neighbours pad little."""
    by_context: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in asked:
        by_context.setdefault(context, {})[continuation] = None
    found = [Question(context, list(continuations)) for context, continuations in by_context.items()]
    return sorted(found, key=lambda q: (-len(q.context), q.context))


def chunks(items: list, size: int) -> list[list]:
    """Consecutive parts of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def score(model: Transformer, batch: list[Question], rows_at_once: int) -> dict[tuple[Tokens, Tokens], Score]:
    """Scores of every (context, continuation) of a batch of questions.

    One forward pass over the contexts, which decides the first tokens; then, where a continuation has more, passes
    over at most `rows_at_once` of them. Nothing but the logits that are asked for is computed.
    """
    device = model.embedding.weight.device
    contexts, valid = pad_left([list(q.context) for q in batch], device)
    rows = [(owner, c) for owner, q in enumerate(batch) for c in q.continuations]
    longer = sorted((i for i, (_, c) in enumerate(rows) if len(c) > 1), key=lambda i: -len(rows[i][1]))
    cache = model.new_cache(*contexts.shape) if longer else None
    last = model(contexts, cache, valid, last_only=True)[:, 0]  # (questions, vocabulary)
    owners = torch.tensor([owner for owner, _ in rows], device=device)
    total, greedy = grade(last[owners, None], torch.tensor([[c[0]] for _, c in rows], device=device))
    for part in chunks(longer, rows_at_once):
        more, also = _rest(model, cache, valid, owners[part], [rows[i][1] for i in part])
        total[part] += more
        greedy[part] &= also
    keys = [(batch[owner].context, c) for owner, c in rows]
    return dict(zip(keys, zip(total.tolist(), greedy.tolist(), strict=True), strict=True))


def _rest(model: Transformer, cache: KVCache, valid: Tensor | None, owners: Tensor, rows: list[Tokens]):
    """Log-probabilities (R,) of all tokens but the first of each row, and whether they are the greedy ones (R,).

    `owners` (R,) says whose context in `cache` each row goes on from. Padding on the right is never looked at.
    """
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=owners.device)
    inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
    if valid is not None:
        valid = torch.cat((valid[owners], torch.ones_like(inputs, dtype=torch.bool)), dim=1)
    return grade(model(inputs, cache.repeat(owners, inputs.shape[1]), valid), targets)


def grade(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (R,) of targets (R, T) under logits (R, T, vocabulary), and whether all are the most probable.

    A target of -1 is padding and does not count.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="none")
    greedy = (logits.argmax(-1) == targets) | (targets < 0)
    return -losses.view_as(targets).double().sum(-1), greedy.all(-1)
