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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spd.block_inputs import POINT, Batch, DroppedBlock
from spd.comm import Shards
from spd.layout import balanced_assignment, permute_neurons
from spd.least_squares import best_ridge, conjugate_gradients
from spd.model import Attention, Block, shard_linear

PLACEMENT_TOKENS = 16_384  # on which neurons are compared; rare inputs, as of first tokens, decide some
JOINT_FEATURES = 16_384  # up to so many features of all shards one Gram matrix is formed, in one process
SWEEPS = 30  # over the data, where the shards' solutions are reconciled instead


@dataclass(frozen=True)
class ClosedForm:
    """Which steps are taken."""

    centre: bool = True
    correct: bool = True
    place: bool = True
    refit: bool = True
    refit_attention: bool = True  # the output projection too; without it where it does not help

    @property
    def passes(self) -> int:
        """Passes over the calibration data that a repair makes at the most, and tells `progress` of."""
        with_attention = self.refit_attention * (3 + self.correct)
        return 3 + self.centre + self.correct + self.place + self.refit * (with_attention + 2)


@torch.no_grad()
def repair_block(
    dropped: DroppedBlock, options: ClosedForm = ClosedForm(), saved: Mapping[str, Tensor] | None = None
) -> dict:
    """Repairs one block for a dropped attention sync, in place; every process ends with the same decision.

    A repair that would end worse than the block as it was, or not finite, is undone, with the caller's copy `saved`
    of its parameters where there is one (with biases, if options ask for centring: `Attention.add_biases`).

    Returns:
        `error_before`, `error_after` (mean squared error of the block's output, `DroppedBlock.error`),
        `steps` (name and error after it of every step taken) and `kept` (False: undone).
    """
    block, progress, done = dropped.block, dropped.progress, []

    def count(passes: int) -> None:
        done.append(passes)
        progress(passes)

    dropped = replace(dropped, progress=count).remember_heads()
    if options.centre:
        block.attention.add_biases()
    saved = copy.deepcopy(block.state_dict()) if saved is None else saved
    before = dropped.error()
    steps = dict(_steps(dropped, options)) if math.isfinite(before) else {}
    after = next(reversed(steps.values()), before)
    kept = after <= before  # False for NaN
    if not kept:
        block.load_state_dict(saved)
    progress(options.passes - sum(done))  # those that were not needed
    return {"error_before": before, "error_after": after if kept else before, "steps": steps, "kept": kept}


def _steps(dropped: DroppedBlock, options: ClosedForm) -> Iterator[tuple[str, float]]:
    """Takes the steps; yields each one's name and the error after it."""
    block = dropped.block
    if options.centre:
        total = sum(mixed.sum((1, 2), dtype=torch.double) for mixed in dropped.mixed)
        taken = centre_heads(block.attention, total / dropped.tokens, dropped.shards)
        for mixed in dropped.mixed:
            mixed -= taken[:, None, None]
        yield "centre", dropped.error()
    out = block.attention.out.weight.clone()  # of the input that a shard should see, whatever becomes of the block
    corrections = input_corrections(dropped, out) if options.correct else None
    if options.place:
        place_neurons(dropped, corrections)
    gate_up = block.mlp.gate_up.weight.clone()
    if options.correct:
        correct(block, gate_up, corrections)
    placed = dropped.error()
    if options.place or options.correct:
        yield ", ".join(["place"] * options.place + ["correct"] * options.correct), placed
    if not options.refit:
        return
    if options.refit_attention:
        down = block.mlp.down.weight.clone()
        ridge = refit(dropped, attention=True)
        if math.isfinite(ridge):
            if options.correct:  # the shards' inputs have changed
                correct(block, gate_up, input_corrections(dropped, out))
            refit(dropped, ridge=ridge)
            error = dropped.error()
            if error < placed:
                yield "refit with attention", error
                return
        block.mlp.down.weight.copy_(down)
        block.attention.out.weight.copy_(out)
        if options.correct:
            correct(block, gate_up, corrections)
    refit(dropped)
    yield "refit", dropped.error()


@torch.no_grad()
def centre_heads(attention: Attention, gathered: Tensor, shards: Shards) -> Tensor:
    """Moves the mean of what the heads of each key/value group gather into the biases, in place.

    Args:
        gathered: the mean over tokens of `Attention.mix`, (S, h d), with the biases as they are.

    Returns:
        By how much less each head gathers from now on, (S, h d).
    """
    attention.add_biases()
    mean = gathered.unflatten(-1, (attention.g, -1, attention.head_dim)).mean(2)  # (S, g, d), of the group's heads
    values = slice((attention.h + attention.g) * attention.head_dim, None)
    attention.qkv.bias[:, values] -= mean.flatten(1).to(attention.qkv.bias)
    heads = mean.repeat_interleave(attention.h // attention.g, 1).flatten(1).to(attention.out.weight)
    part = torch.einsum("sdi,si->d", attention.out.weight, heads)
    attention.out.bias += shards.all_reduce(part, "bias")
    return heads


@torch.no_grad()
def input_corrections(dropped: DroppedBlock, out: Tensor) -> Tensor:
    """Matrices (S, D, D): what to add to each hosted shard's MLP input, predicted from it, for the one it should see.

    That is the input of an undropped block with the output projections `out` (S, D, h d). Inputs are meant after the
    norm. A shard for which no ridge predicts better on held-out windows than its own input is given no correction.
    """
    norm = dropped.block.mlp_norm

    def seen_and_lacking(batch: Batch) -> tuple[Tensor, Tensor]:
        seen, whole = norm(dropped.attended(batch).read()), dropped.attended(batch, out)
        return seen, norm(whole.x + dropped.pending(whole)) - seen

    fit, held_out = dropped.moments(seen_and_lacking)
    ridges = best_ridge(fit, held_out)
    fit += held_out
    return fit.solve(ridges)


@torch.no_grad()
def correct(block: Block, gate_up: Tensor, corrections: Tensor) -> None:
    """Gate and up projections become `gate_up` (S, 2n, D) after the corrections, in place, a shard at a time."""
    for weight, original, correction in zip(block.mlp.gate_up.weight, gate_up, corrections, strict=True):
        original = original.to(correction)
        weight.copy_(original + original @ correction)


@torch.no_grad()
def placement_costs(dropped: DroppedBlock, corrections: Tensor | None = None) -> Tensor:
    """Squared error (F, tp) each neuron would cause in the block's output, summed over tokens, on each shard.

    The neuron's activation on the shard's input (after `corrections`, where given) against that on the
    undropped input, times the squared norm of its column of the down projection. Each process reckons its hosted
    shards' columns for all F neurons.
    """
    block, shards, bias = dropped.block, dropped.shards, dropped.block.mlp.gate_up.bias
    weight = shards.gather(block.mlp.gate_up.weight)
    bias = None if bias is None else shards.gather(bias)

    def activations(x: Tensor) -> Tensor:
        """Of all neurons, (tp, B, T, n), on one input (B, T, D)."""
        return block.mlp.activate(shard_linear(x[None], weight, bias))

    power = shards.gather(block.mlp.down.weight.square().sum(1, dtype=torch.double)).flatten()
    costs = torch.zeros(shards.k, len(power), dtype=torch.double, device=power.device)
    for batch in dropped.batches(PLACEMENT_TOKENS):
        stream = dropped.attended(batch)
        wanted = activations(block.mlp_norm(stream.x + dropped.pending(stream)))
        for shard, seen in enumerate(block.mlp_norm(stream.read())):
            if corrections is not None:
                seen = seen + seen @ corrections[shard].mT.to(seen)
            costs[shard] += (activations(seen) - wanted).float().square().sum((1, 2)).flatten()
    dropped.progress(1)
    return shards.gather(costs * power).T


@torch.no_grad()
def place_neurons(dropped: DroppedBlock, corrections: Tensor | None = None) -> None:
    """Moves every neuron to the shard that serves it best, as many to each as it has; free places stay free."""
    costs, config, tp = placement_costs(dropped, corrections).cpu(), dropped.model.config, dropped.shards.tp
    counts = [len(config.neurons_of(tp, shard)) for shard in range(tp)]
    places = torch.arange(len(costs)).view(tp, -1)
    taken = torch.cat([row[:count] for row, count in zip(places, counts, strict=True)])
    shard = torch.from_numpy(balanced_assignment(costs[taken].numpy(), counts))
    for number, count in enumerate(counts):
        places[number, :count] = taken[shard == number]
    order = dropped.shards.agreed(places.flatten().to(dropped.block.mlp.down.weight.device))
    permute_neurons(dropped.block, order, dropped.shards)


@torch.no_grad()
def refit(dropped: DroppedBlock, attention: bool = False, ridge: float | None = None) -> float:
    """Ridge regression of all shards' down projections, jointly, on what the block's output misses; in place.

    With `attention` the attention output projections join, as if they did not feed the MLP: the MLP's input changes
    with them, so that the block needs correcting and refitting after it. Where one process holds all features and
    they are not too many, one Gram matrix of all of them gives the solution; otherwise there is one a shard, and only
    predictions (B, T, D) travel. The ridge is then the one which serves best when each shard regresses by itself.

    Returns:
        The ridge, the one given or else the one that served the held-out windows best; inf: nothing was changed. A
        choice on windows that an earlier refit has seen would favour no change.
    """
    block, shards, config = dropped.block, dropped.shards, dropped.model.config
    down, out = block.mlp.down.weight, block.attention.out.weight
    count = config.intermediate_size + config.num_heads * config.head_dim * attention
    joint = shards.world == 1 and count <= JOINT_FEATURES

    def pair(batch: Batch) -> tuple[Tensor, Tensor]:
        features = dropped.features(batch, attention)
        missing = dropped.missing(batch, features)
        if joint:
            return torch.cat(tuple(features), -1)[None], missing[None]  # (1, B, T, S p)
        return features, missing.expand(shards.k, -1, -1, -1)

    def total(errors: Tensor) -> Tensor:
        return shards.all_reduce(errors.sum(0, keepdim=True), POINT)

    def apply(coefficients: Tensor) -> Tensor:
        """Cross moments (S, D, p) of the features with what the coefficients (S, D, p) predict from all of them."""
        cross = torch.zeros_like(coefficients)
        for batch in dropped.batches():
            features = dropped.features(batch, attention).float().flatten(1, 2)
            prediction = shards.all_reduce((features @ coefficients.mT.float()).sum(0), POINT)
            cross += prediction.mT @ features
        return cross

    moments, held_out = dropped.moments(pair)
    if ridge is None:
        ridge = shards.agreed(best_ridge(moments, held_out, total)).item()
    if not math.isfinite(ridge):
        return ridge
    moments += held_out
    if joint:
        change = moments.solve(ridge)[0].unflatten(1, (shards.k, -1)).movedim(1, 0)
    else:
        change = conjugate_gradients(moments, ridge, apply, lambda size: shards.all_reduce(size, POINT), SWEEPS)
    down.copy_(down.double() + change[..., : down.shape[2]])
    if attention:
        out.copy_(out.double() + change[..., down.shape[2] :])
    return ridge
