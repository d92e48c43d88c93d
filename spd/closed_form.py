"""Repair of dropped blocks without training: neurons moved, projections refitted by least squares.

A block that drops its attention sync gives its MLP on shard i the input `x + y_i` in place of `x + sum_j y_j`.
Four things mend most of that, none of which needs a gradient:

centre   what the heads gather on average is given to all shards by a bias. Attention weights sum to one: taking a
         vector m from a head's values takes m from whatever the head gathers, and the output projection's bias can
         give `W m` back. The layer is the function it was, but where the sync is dropped the bias is still added to
         `x` once, for all shards to see, while the gathered part stays with its shard;
correct  each shard's gate and up projections get the matrix that best predicts, from the normalised input the shard
         sees, the normalised input it should see;
place    each neuron goes to the shard whose (corrected) input serves it best;
refit    the down projections of all shards, and the attention output projections, are regressed jointly on what the
         block still misses of its target.

Everything here needs the MLP's sync to stay `full`. Shapes as in `model.py`; F is the number of MLP neurons.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spd.block_inputs import (
    POINT,
    Batch,
    Calibration,
    Original,
    Site,
    accumulated,
    all_reduced,
    attended,
    features_of,
    missing_of,
    output_error,
)
from spd.comm import Shards
from spd.layout import balanced_assignment, permute_neurons
from spd.least_squares import Coefficients, Moments, Rows, best_ridge, conjugate_gradients
from spd.model import Attention, Block


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


@torch.no_grad()
def input_corrections(site: Site, original: Original, data: Calibration) -> Coefficients:
    """What to add to each hosted shard's MLP input, predicted from it, for the input it would have without a drop.

    `original` says which undropped MLP input is wanted, on the student's inputs; `site.block` may differ from it in
    its attention output projection. Inputs are meant after the norm. A shard for which no ridge predicts better on
    held-out windows than its own input is given no correction.
    """
    shards, width = site.shards.k, site.config.hidden_size
    few, device = data.tokens < width, original.block.mlp_norm.weight.device

    def seen_and_lacking(batch: Batch) -> tuple[Tensor, Tensor]:
        stream = original.attended(batch)
        wanted = original.block.mlp_norm(stream.x + all_reduced(site, stream.pending))
        seen = site.block.mlp_norm(attended(site.block, batch).read())
        return seen, wanted - seen

    statistics = Rows if few else partial(Moments, shards, width, width, device)
    fit, held_out = accumulated(site, data, statistics, seen_and_lacking)
    return (fit + held_out).solve(best_ridge(fit, held_out))


@torch.no_grad()
def apply_corrections(block: Block, original: Original, corrections: Coefficients) -> None:
    """Gate and up projections of `block` become the original's after the corrections, a shard at a time."""
    for shard, weight in enumerate(original.gate_up[:, None]):
        change = corrections[shard : shard + 1].after(weight)
        block.mlp.gate_up.weight[shard] = (weight.to(change) + change)[0].to(weight)


PLACEMENT_TOKENS = 16_384  # on which neurons are compared


@torch.no_grad()
def placement_costs(site: Site, data: Calibration, corrections: Coefficients | None, tokens: int) -> Tensor:
    """Squared error (F, tp) each neuron would cause in the block's output, summed over tokens, on each shard.

    The neuron's activation on the shard's input (after `corrections`, where given) against that on the
    undropped input, times the squared norm of its column of the down projection. Each process reckons its hosted
    shards' columns for all F neurons.
    """
    block, shards = site.block, site.shards
    weight, bias, power = all_neurons(block, shards)
    costs = torch.zeros(shards.k, weight.shape[1], dtype=torch.double, device=weight.device)
    for batch in data.batches(site, tokens):
        stream = attended(block, batch)
        wanted = activations_of(block.mlp_norm(stream.x + all_reduced(site, stream.pending)), weight, bias)
        for shard, pending in enumerate(stream.pending):
            seen = block.mlp_norm(stream.x + pending)
            if corrections is not None:
                seen = seen + corrections[shard : shard + 1](seen[None])[0].to(seen)
            error = activations_of(seen, weight, bias) - wanted
            costs[shard] += error.float().square().sum((0, 1))
    return shards.gather(costs * power).T


def all_neurons(block: Block, shards: Shards) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gate and up rows (2, F, D) of all shards, their biases (2, F), and the down columns' squared norms (F,)."""
    mlp, halves = block.mlp, (2, -1)
    weight = shards.gather(mlp.gate_up.weight).unflatten(1, halves).transpose(0, 1).flatten(1, 2)
    bias = mlp.gate_up.bias
    if bias is not None:
        bias = shards.gather(bias).unflatten(1, halves).transpose(0, 1).flatten(1, 2)
    return weight, bias, shards.gather(mlp.down.weight.square().sum(1, dtype=torch.double)).flatten()


def activations_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    gate, up = (F.linear(x, weight[half], None if bias is None else bias[half]) for half in (0, 1))
    return F.silu(gate) * up


@torch.no_grad()
def place_neurons(
    site: Site, data: Calibration, corrections: Coefficients | None = None, tokens: int = PLACEMENT_TOKENS
) -> float:
    """Moves every neuron to the shard that serves it best, equally many to each; the summed cost that remains."""
    costs = placement_costs(site, data, corrections, tokens).cpu().numpy()
    shard = balanced_assignment(costs)
    permute_neurons(site.block, torch.from_numpy(np.argsort(shard, kind="stable")), site.shards)
    return float(costs[np.arange(len(shard)), shard].sum())


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

    def pair(batch: Batch) -> tuple[Tensor, Tensor]:
        features, stream = features_of(site, batch, attention)
        return features, missing_of(site, batch, stream)[None]

    fit, held_out = accumulated(site, data, partial(Rows, joint), pair)
    ridge = best_ridge(fit, held_out).item() if ridge is None else ridge
    return (fit + held_out).solve(ridge), ridge


def _refit_joint(site: Site, data: Calibration, attention: bool, ridge: float | None) -> tuple[Coefficients, float]:
    """The same from one Gram matrix of all S p features."""
    shards, count, width = site.shards.k, _feature_count(site, attention), site.config.hidden_size

    def pair(batch: Batch) -> tuple[Tensor, Tensor]:
        features, stream = features_of(site, batch, attention)
        return features.movedim(0, -2).flatten(-2)[None], missing_of(site, batch, stream)[None]  # (1, B, T, S p)

    statistics = partial(Moments, 1, shards * count, width, site.block.mlp_norm.weight.device)
    fit, held_out = accumulated(site, data, statistics, pair)
    ridge = best_ridge(fit, held_out).item() if ridge is None else ridge
    found = (fit + held_out).solve(ridge).dense()[0]
    return Coefficients(found.unflatten(1, (shards, count)).movedim(1, 0)), ridge


def _refit_sweeps(
    site: Site, data: Calibration, attention: bool, ridge: float | None, sweeps: int
) -> tuple[Coefficients, float]:
    """The same with one Gram matrix a shard: only predictions (B, T, D) travel between processes.

    The ridge is the one which serves best when each shard regresses by itself.
    """
    shards, count, width = site.shards.k, _feature_count(site, attention), site.config.hidden_size

    def pair(batch: Batch) -> tuple[Tensor, Tensor]:
        features, stream = features_of(site, batch, attention)
        return features, missing_of(site, batch, stream).expand(shards, -1, -1, -1)

    def total(errors: Tensor) -> Tensor:
        return site.shards.all_reduce(errors.sum(1, keepdim=True), POINT)

    def apply(coefficients: Tensor) -> Tensor:
        cross = torch.zeros_like(coefficients)
        for batch in data.batches(site):
            features = features_of(site, batch, attention)[0].float().flatten(1, 2)
            prediction = site.shards.all_reduce((features @ coefficients.mT.float()).sum(0), POINT)
            cross += prediction.mT @ features
        return cross

    statistics = partial(Moments, shards, count, width, site.block.mlp_norm.weight.device)
    fit, held_out = accumulated(site, data, statistics, pair)
    ridge = best_ridge(fit, held_out, total).item() if ridge is None else ridge
    if not np.isfinite(ridge):
        return Coefficients(torch.zeros_like(fit.cross)), ridge
    both = fit + held_out
    found = conjugate_gradients(both, ridge, apply, lambda size: site.shards.all_reduce(size, POINT), sweeps)
    return Coefficients(found), ridge


@dataclass(frozen=True)
class ClosedForm:
    """Which steps are taken, and their limits."""

    centre: bool = True
    correct: bool = True
    place: bool = True
    refit: bool = True
    refit_attention: bool = True  # the output projection too; without it where it does not help
    joint_features: int = JOINT_FEATURES  # beyond it no Gram matrix of all shards is formed
    sweeps: int = SWEEPS  # over the data, where the shards' solutions are reconciled instead
    placement_tokens: int = PLACEMENT_TOKENS  # on which neurons are compared
    remember_heads: bool = True  # keep what the heads gather: a third activation stream, a third of the time


@torch.no_grad()
def repair_block(
    site: Site, data: Calibration, options: ClosedForm = ClosedForm(), saved: Mapping[str, Tensor] | None = None
) -> dict:
    """Repairs one block for a dropped attention sync, in place; every process ends with the same decision.

    A repair that would end worse than the block as it was, or not finite, is undone, with the caller's copy `saved`
    of its parameters where there is one (with biases, if options ask for centring: `Attention.add_biases`).

    Returns:
        `error_before`, `error_after` (mean squared error of the block's output on all the calibration data),
        `steps` (name and error after it of every step taken) and `kept` (False: undone).
    """
    if options.centre:
        site.block.attention.add_biases()
    saved = copy.deepcopy(site.block.state_dict()) if saved is None else saved
    before, steps = output_error(site, data), {}
    if math.isfinite(before):
        steps = dict(_steps(site, data, options))
    after = next(reversed(steps.values()), before)
    kept = after <= before  # False for NaN
    if not kept:
        site.block.load_state_dict(saved)
    return {"error_before": before, "error_after": after if kept else before, "steps": steps, "kept": kept}


def _steps(site: Site, data: Calibration, options: ClosedForm) -> Iterator[tuple[str, float]]:
    """Takes the steps; yields each one's name and the error after it."""
    block = site.block
    if options.centre:
        centre(site, data)
        yield "centre", output_error(site, data)
    if options.remember_heads:
        data = data.remember_heads(site)
    as_it_is = Original(block, block.mlp.gate_up.weight, block.attention.out.weight)
    corrections = input_corrections(site, as_it_is, data) if options.correct else None
    if options.place:
        place_neurons(site, data, corrections, options.placement_tokens)
    original = Original.of(block)
    if corrections is not None:
        apply_corrections(block, original, corrections)
    placed = output_error(site, data)
    if options.place or options.correct:
        yield ", ".join(["place"] * options.place + ["correct"] * options.correct), placed
    if not options.refit:
        return
    fit = partial(refit, site, data, joint_features=options.joint_features, sweeps=options.sweeps)
    if options.refit_attention:
        unfitted = block.mlp.down.weight.clone()
        ridge = fit(attention=True)
        if options.correct:  # the shards' inputs have changed
            apply_corrections(block, original, input_corrections(site, original, data))
        fit(ridge=ridge)
        error = output_error(site, data)
        if error < placed:
            yield "refit with attention", error
            return
        block.mlp.down.weight.copy_(unfitted)
        block.attention.out.weight.copy_(original.out)
        if corrections is not None:
            apply_corrections(block, original, corrections)
    fit()
    yield "refit", output_error(site, data)


@torch.no_grad()
def centre(site: Site, data: Calibration) -> None:
    """Gives the mean of what the heads gather to all shards by the attention's biases, in place."""
    total, tokens = 0.0, 0
    for batch in data.batches(site):
        total = total + batch.mixed.sum((1, 2), dtype=torch.double)
        tokens += batch.mixed.shape[1] * batch.mixed.shape[2]
    centre_heads(site.block.attention, total / tokens, site.shards)
