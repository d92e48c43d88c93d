"""Perplexity."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spd.comm import Stream
from spd.errors import SPDError
from spd.launch import Replicas
from spd.model import Transformer
from spd.plan import Plan

TOKENS_AT_ONCE = 1024  # in a forward pass: a small model's stay in cache, and one window of a large model's fills a GPU
LARGEST_NATS = 709.0  # whose exponential a float holds
Progress = Callable[..., None]  # told how many units of work were done, and numbers to show by name


def silent(*_, **__) -> None:
    """A `Progress` that shows nothing."""


def batches(tokens: Tensor) -> Iterator[Tensor]:
    """Windows (W, T) in groups of about `TOKENS_AT_ONCE` tokens."""
    yield from tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))


def negative_log_likelihood(model: Transformer, stream: Stream, tokens: Tensor) -> float:
    """Sum over the T - 1 predictions of each window (B, T), in nats, of a stream that left the last block."""
    logits = model.logits(stream)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.double().sum().item()


@torch.no_grad()
def not_finite(model: Transformer, tokens: Tensor, valid: Tensor | None = None, plan: Plan | None = None) -> SPDError:
    """The mistake to raise where logits of tokens (B, T) are not finite: it names the first block whose output is."""
    stream, plan, place = model.embed(tokens, valid=valid), plan or model.plan, "the last block"
    context = model.context(stream, valid=valid)
    for i, policies in enumerate((None, *plan.blocks)):
        stream = stream if policies is None else model.run_block(i - 1, stream, policies, context)
        if not model.shards.flush(stream).x.isfinite().all():
            place = f"block {i - 1}" if i else "the embedding"
            break
    return SPDError(
        f"The logits are not finite, first after {place}: values became too large for {stream.x.dtype}, or are no "
        "numbers; another dtype or plan may do."
    )


@torch.no_grad()
def perplexity(
    model: Transformer, tokens: Tensor, progress: Progress = silent, replicas: Replicas | None = None
) -> dict:
    """`perplexity` of windows (W, T) under the model's plan, `nats` (its logarithm), `tokens` (predictions), `windows`.

    Predictions are all W (T - 1); with `replicas`, copies of the model divide the windows.
    """
    replicas, predictions = replicas or Replicas(), tokens.shape[0] * (tokens.shape[1] - 1)

    def nats(batch: Tensor) -> float:
        batch = batch.to(model.embedding.weight.device)
        stream = model.embed(batch)
        context = model.context(stream)
        for i, policies in enumerate(model.plan.blocks):
            stream = model.run_block(i, stream, policies, context)
        progress(len(batch) * replicas.count)
        found = negative_log_likelihood(model, stream, batch)
        if not math.isfinite(found):
            raise not_finite(model, batch)
        return found

    total = sum(replicas.share(list(batches(tokens)), nats))
    return summary(total, predictions) | {"tokens": predictions, "windows": tokens.shape[0]}


def summary(total_nats: float, predictions: int) -> dict:
    """`perplexity` and `nats` of a sum of negative log-likelihoods."""
    nats = total_nats / predictions
    if nats > LARGEST_NATS:
        raise SPDError(f"The loss is {nats:.4g} nats a token, so that the perplexity is too large to be a number.")
    return {"perplexity": math.exp(nats), "nats": nats}
