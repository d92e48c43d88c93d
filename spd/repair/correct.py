"""Correcting: gate and up projections get the matrix that predicts the undropped MLP input from the shard's own."""

import torch

from spd.model import Block
from spd.repair.least_squares import Coefficients, Moments, Rows, best_ridge
from spd.repair.site import Calibration, Original, Site, all_reduced, attended


@torch.no_grad()
def input_corrections(site: Site, original: Original, data: Calibration) -> Coefficients:
    """What to add to each hosted shard's MLP input, predicted from it, for the input it would have without a drop.

    `original` says which undropped MLP input is wanted, on the student's inputs; `site.block` may differ from it in
    its attention output projection. Inputs are meant after the norm. A shard for which no ridge predicts better on
    held-out windows than its own input is given no correction.
    """
    shards, width = site.shards.k, site.config.hidden_size
    few, device = data.tokens < width, original.block.mlp_norm.weight.device
    parts = [Rows() if few else Moments(shards, width, width, device) for _ in range(2)]
    for batch in data.batches(site):
        stream = original.attended(batch)
        wanted = original.block.mlp_norm(stream.x + all_reduced(site, stream.pending))
        seen = site.block.mlp_norm(attended(site.block, batch).read())
        for part, windows in zip(parts, (~batch.held_out, batch.held_out), strict=True):
            part.add(seen[:, windows], (wanted - seen)[:, windows])
    return (parts[0] + parts[1]).solve(best_ridge(*parts))


@torch.no_grad()
def apply_corrections(block: Block, original: Original, corrections: Coefficients) -> None:
    """Gate and up projections of `block` become the original's after the corrections, a shard at a time."""
    for shard, weight in enumerate(original.gate_up[:, None]):
        change = corrections[shard : shard + 1].after(weight)
        block.mlp.gate_up.weight[shard] = (weight.to(change) + change)[0].to(weight)
