"""Repair of dropped blocks without training: heads and neurons moved, projections refitted by least squares.

A block that drops its attention sync gives its MLP on shard i the input `x + y_i` in place of `x + sum_j y_j`.
Four things mend most of that, none of which needs a gradient:

centre   what the heads gather on average is given to all shards by a bias (`centre.py`);
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

import torch
from torch import Tensor

from spd.repair.centre import centre_heads
from spd.repair.correct import apply_corrections, input_corrections
from spd.repair.place import PLACEMENT_TOKENS, SEARCH_TOKENS, place_neurons, search_heads
from spd.repair.refit import JOINT_FEATURES, SWEEPS, refit
from spd.repair.site import Calibration, Original, Site, output_error


@dataclass(frozen=True)
class Options:
    """Which steps are taken, and their limits."""

    centre: bool = True
    correct: bool = True
    place: bool = True
    refit: bool = True
    refit_attention: bool = True  # the output projection too; without it where it does not help
    search_heads: bool = False  # where a shard has several key/value groups; slow, and gains little once corrected
    joint_features: int = JOINT_FEATURES  # beyond it no Gram matrix of all shards is formed
    sweeps: int = SWEEPS  # over the data, where the shards' solutions are reconciled instead
    placement_tokens: int = PLACEMENT_TOKENS  # on which neurons are compared
    search_tokens: int = SEARCH_TOKENS  # on which groupings of heads are compared
    remember_heads: bool = True  # keep what the heads gather: a third activation stream, a third of the time


@torch.no_grad()
def repair_block(
    site: Site, data: Calibration, options: Options = Options(), saved: Mapping[str, Tensor] | None = None
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


def _steps(site: Site, data: Calibration, options: Options) -> Iterator[tuple[str, float]]:
    """Takes the steps; yields each one's name and the error after it."""
    block = site.block
    if options.search_heads and search_heads(site, data, options.search_tokens):
        yield "heads", output_error(site, data)
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
