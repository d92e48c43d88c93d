"""How much each block suffers from losing its attention sync (sections 4.2.1 and C.1 of the paper).

And, by one gradient, how much each sync point suffers from any policy.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spd.errors import SPDError
from spd.evaluate import Progress, batches, negative_log_likelihood, not_finite, silent, summary
from spd.model import Transformer
from spd.plan import FULL, POINTS, SPD_BLOCK, TP_BLOCK, Plan, Policy


def block_evaluations(num_blocks: int) -> int:
    """Blocks run per batch: the L of the prefix, and L - i for each of the tails from i."""
    return num_blocks * (num_blocks + 3) // 2


@torch.no_grad()
def sensitivity(model: Transformer, tokens: Tensor, progress: Progress = silent) -> dict:
    """Perplexities "SPD from block i on" for i = 0..L, and their differences, on windows (W, T).

    Block i's sensitivity compares SPD and TP in block i while the blocks before it are TP and those after it
    SPD, so it is the difference of two neighbours; the TP prefix is shared by all and run once.

    `progress` is told of blocks run, `block_evaluations` of each window.

    Gives `perplexity_from` (L + 1), `sensitivity` (L, perplexity points), `sensitivity_nats` (L), `tokens`,
    `windows`, `block_evaluations` (of each batch).
    """
    blocks, predictions = len(model.blocks), tokens.shape[0] * (tokens.shape[1] - 1)
    totals = [0.0] * (blocks + 1)
    for batch in batches(tokens):
        batch = batch.to(model.embedding.weight.device)
        prefix = model.embed(batch)
        context = model.context(prefix)
        for i in range(blocks + 1):
            stream = prefix
            for j in range(i, blocks):
                stream = model.run_block(j, stream, SPD_BLOCK, context)
            found = negative_log_likelihood(model, stream, batch)
            if not math.isfinite(found):
                reason = not_finite(model, batch, plan=Plan.dropping(blocks, range(i, blocks)))
                raise SPDError(f"The perplexity with SPD from block {i} on is not finite. {reason}")
            totals[i] += found
            if i < blocks:
                prefix = model.run_block(i, prefix, TP_BLOCK, context)
            progress(len(batch) * (blocks - i + (i < blocks)))
    scores = [summary(total, predictions) for total in totals]
    curve, nats = [s["perplexity"] for s in scores], [s["nats"] for s in scores]
    return {
        "perplexity_from": curve,
        "sensitivity": [curve[i] - curve[i + 1] for i in range(blocks)],
        "sensitivity_nats": [nats[i] - nats[i + 1] for i in range(blocks)],
        "tokens": predictions,
        "windows": tokens.shape[0],
        "block_evaluations": block_evaluations(blocks),
    }


def scores(model: Transformer, tokens: Tensor, policies: Sequence[Policy], progress: Progress = silent) -> dict:
    """What a policy costs at each sync point, to first order, from one forward and backward pass over windows (W, T).

    With delta (D,) the change that the policy makes, on the original's inputs, to a token's stream where everything is
    next synchronised, one sync point later, and g the gradient there of the loss in nats, summed over predictions, a
    token's change of the loss is c = g . delta to first order, and c + c^2 / 2 with Fisher's information in the
    Hessian's place. A score is the root of the mean over tokens of c^2. A loss is the mean of c + c^2 / 2, of whose
    terms each is cut at a nat (the second grows linearly there): further off no expansion says anything. What the last
    MLP point leaves is flushed: 0. `progress` is told of sync points, 2 L of each window.

    Gives `scores` and `losses` of each point (`attention`, `mlp`), policy and block, `tokens`, `windows`.
    """
    totals = torch.zeros(2, len(policies), 2 * len(model.blocks), dtype=torch.double)
    for batch in batches(tokens):
        totals += _totals(model, batch.to(model.embedding.weight.device), policies, progress)
    squares, losses = totals / tokens.numel()
    if not totals.isfinite().all():
        raise SPDError("The scores are not finite.")

    def by_point(found: Tensor) -> dict:
        rows = dict(zip([policy.name for policy in policies], found, strict=True))
        return {point: {name: row[i::2].tolist() for name, row in rows.items()} for i, point in enumerate(POINTS)}

    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    found = {"scores": by_point(squares.sqrt()), "losses": by_point(losses)}
    return found | {"tokens": predictions, "windows": tokens.shape[0]}


def _totals(model: Transformer, batch: Tensor, policies: Sequence[Policy], progress: Progress) -> Tensor:
    """Sums over tokens of c^2 and of a loss's terms, for every policy and sync point: (2, policies, 2 L)."""
    shards, produced, synced = model.shards, [], []
    with torch.enable_grad():
        stream = model.embed(batch)
        stream.x.requires_grad_(True)
        context = model.context(stream)
        for n in range(2 * len(model.blocks)):
            produced.append(model.produce(n, stream, context))
            stream = shards.sync(produced[-1], FULL, POINTS[n % 2])
            synced.append(stream.x)
        loss = F.cross_entropy(
            model.logits(stream)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss, synced)
    totals = torch.zeros(2, len(policies), len(synced), dtype=torch.double)
    with torch.no_grad():
        for n, before in enumerate(produced[:-1]):
            gradient = shards.all_reduce(gradients[n + 1].clone(), "gradients") / shards.world
            for i, policy in enumerate(policies):
                changed = shards.sync(before, policy, POINTS[n % 2])
                delta = shards.flush(model.produce(n + 1, changed, context)).x - synced[n + 1]
                c = (gradient * delta).sum(-1, dtype=torch.double)
                second = F.huber_loss(c, torch.zeros_like(c), reduction="sum")
                totals[:, i, n] = torch.stack((c.square().sum(), c.clamp(-1, 1).sum() + second))
            progress(len(batch))
    progress(len(batch))  # the last point
    return totals
