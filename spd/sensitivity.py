"""How much each block suffers from losing its attention sync (sections 4.2.1 and C.1 of the paper)."""

import torch
from torch import Tensor

from spd.errors import SPDError
from spd.evaluate import Progress, batches, negative_log_likelihood, silent, summary
from spd.model import Transformer
from spd.plan import SPD_BLOCK, TP_BLOCK


def block_evaluations(num_blocks: int) -> int:
    """Blocks run per batch: the L of the prefix, and L - i for each of the tails from i."""
    return num_blocks * (num_blocks + 3) // 2


@torch.no_grad()
def sensitivity(model: Transformer, tokens: Tensor, progress: Progress = silent) -> dict:
    """Perplexities "SPD from block i on" for i = 0..L, and their differences, on windows (W, T).

    Block i's sensitivity compares SPD and TP in block i while the blocks before it are TP and those after it
    SPD, so it is the difference of two neighbours; the TP prefix is shared by all and run once.

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
            totals[i] += negative_log_likelihood(model, stream, batch)
            if i < blocks:
                prefix = model.run_block(i, prefix, TP_BLOCK, context)
        progress(len(batch))
    scores = [summary(total, predictions) for total in totals]
    curve, nats = [s["perplexity"] for s in scores], [s["nats"] for s in scores]
    if None in curve:
        raise SPDError(f"The perplexity with SPD from block {curve.index(None)} on is not finite.")
    return {
        "perplexity_from": curve,
        "sensitivity": [curve[i] - curve[i + 1] for i in range(blocks)],
        "sensitivity_nats": [nats[i] - nats[i + 1] for i in range(blocks)],
        "tokens": predictions,
        "windows": tokens.shape[0],
        "block_evaluations": block_evaluations(blocks),
    }
