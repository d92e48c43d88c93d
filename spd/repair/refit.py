"""Refitting: the projections that end a block, regressed by all shards jointly on what its output misses."""

import numpy as np
import torch
from torch import Tensor

from spd.repair.least_squares import Coefficients, Moments, Rows, best_ridge, conjugate_gradients
from spd.repair.site import POINT, Calibration, Site, features_of, missing_of

JOINT_FEATURES = 16_384  # up to so many features of all shards one Gram matrix is formed, in one process
SWEEPS = 30  # over the data, where the shards' solutions are reconciled instead


@torch.no_grad()
def refit(
    site: Site,
    data: Calibration,
    attention: bool = False,
    ridge: float | None = None,
    joint_features: int = JOINT_FEATURES,
    sweeps: int = SWEEPS,
) -> float:
    """Ridge regression of all shards' down projections, jointly, on what the block's output misses; in place.

    With `attention` the attention output projections join, as if they did not feed the MLP: the MLP's input changes
    with them, so that the block needs correcting and refitting after it.

    Returns:
        The ridge, the one given or else the one that served the held-out windows best; inf: nothing was changed. A
        choice on windows that an earlier refit has seen would favour no change.
    """
    features = site.config.intermediate_size + (site.config.hidden_size if attention else 0)
    if data.tokens < features:
        change, ridge = _refit_rows(site, data, attention, ridge)
    elif site.shards.world == 1 and features <= joint_features:
        change, ridge = _refit_joint(site, data, attention, ridge)
    else:
        change, ridge = _refit_sweeps(site, data, attention, ridge, sweeps)
    down, out = site.block.mlp.down.weight, site.block.attention.out.weight
    for shard in range(site.shards.k):
        mine = change[shard : shard + 1].dense()[0]
        for weight, part in ((down[shard], mine[:, : down.shape[2]]), (out[shard], mine[:, down.shape[2] :])):
            if part.shape[1]:
                weight.copy_((weight.to(part) + part).to(weight))
    return ridge


def _feature_count(site: Site, attention: bool) -> int:
    mlp, out = site.block.mlp.down.weight, site.block.attention.out.weight
    return mlp.shape[2] + (out.shape[2] if attention else 0)


def _refit_rows(site: Site, data: Calibration, attention: bool, ridge: float | None) -> tuple[Coefficients, float]:
    """Changes (S, D, p) of the projections where tokens are fewer than features; only kernels of tokens travel."""

    def joint(parts: Tensor) -> Tensor:
        return site.shards.all_reduce(parts.sum(0, keepdim=True), POINT)

    parts = [Rows(joint) for _ in range(2)]
    for batch in data.batches(site):
        features, stream = features_of(site, batch, attention)
        missing = missing_of(site, batch, stream)[None]
        for part, windows in zip(parts, (~batch.held_out, batch.held_out), strict=True):
            part.add(features[:, windows], missing[:, windows])
    ridge = best_ridge(*parts).item() if ridge is None else ridge
    return (parts[0] + parts[1]).solve(ridge), ridge


def _refit_joint(site: Site, data: Calibration, attention: bool, ridge: float | None) -> tuple[Coefficients, float]:
    """The same from one Gram matrix of all S p features."""
    shards, count, width = site.shards.k, _feature_count(site, attention), site.config.hidden_size
    moments = [Moments(1, shards * count, width, site.block.mlp_norm.weight.device) for _ in range(2)]
    for batch in data.batches(site):
        features, stream = features_of(site, batch, attention)
        missing, features = missing_of(site, batch, stream), features.movedim(0, -2).flatten(-2)  # (B, T, S p)
        for moment, windows in zip(moments, (~batch.held_out, batch.held_out), strict=True):
            moment.add(features[None, windows], missing[None, windows])
    ridge = best_ridge(*moments).item() if ridge is None else ridge
    found = (moments[0] + moments[1]).solve(ridge).dense()[0]
    return Coefficients(found.unflatten(1, (shards, count)).movedim(1, 0)), ridge


def _refit_sweeps(
    site: Site, data: Calibration, attention: bool, ridge: float | None, sweeps: int
) -> tuple[Coefficients, float]:
    """The same with one Gram matrix a shard: only predictions (B, T, D) travel between processes.

    The ridge is the one which serves best when each shard regresses by itself.
    """
    shards, count, width = site.shards.k, _feature_count(site, attention), site.config.hidden_size
    moments = [Moments(shards, count, width, site.block.mlp_norm.weight.device) for _ in range(2)]
    for batch in data.batches(site):
        features, stream = features_of(site, batch, attention)
        missing = missing_of(site, batch, stream).expand(shards, -1, -1, -1)
        for moment, windows in zip(moments, (~batch.held_out, batch.held_out), strict=True):
            moment.add(features[:, windows], missing[:, windows])

    def total(errors: Tensor) -> Tensor:
        return site.shards.all_reduce(errors.sum(1, keepdim=True), POINT)

    def apply(coefficients: Tensor) -> Tensor:
        cross = torch.zeros_like(coefficients)
        for batch in data.batches(site):
            features = features_of(site, batch, attention)[0].float().flatten(1, 2)
            prediction = site.shards.all_reduce((features @ coefficients.mT.float()).sum(0), POINT)
            cross += prediction.mT @ features
        return cross

    ridge = best_ridge(*moments, total).item() if ridge is None else ridge
    if not np.isfinite(ridge):
        return Coefficients(torch.zeros_like(moments[0].cross)), ridge
    both = moments[0] + moments[1]
    found = conjugate_gradients(both, ridge, apply, lambda size: site.shards.all_reduce(size, POINT), sweeps)
    return Coefficients(found), ridge
