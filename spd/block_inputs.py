"""A dropped block with the activations that it is repaired on, as the steps of the closed form see it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from spd.comm import Shards, Stream
from spd.evaluate import Progress, silent
from spd.least_squares import Moments
from spd.model import Block, Transformer, shard_linear

HELD_OUT = 10  # one window in so many chooses the ridge
ERROR_TOKENS = 2048  # on which a block's error is measured
POINT = "calibration"  # the name of these all-reduces in the counts


@dataclass(frozen=True)
class Batch:
    """Windows that enter a block (B, T, D), their targets (B, T, D) and what the heads gather (S, B, T, h d)."""

    x: Tensor
    target: Tensor
    mixed: Tensor
    held_out: Tensor  # (B,), True for windows that choose ridges


@dataclass(frozen=True)
class DroppedBlock:
    """A block whose attention sync is dropped, among its shards, and what it is repaired on.

    `inputs` are the residual streams (B, T, D) that enter it in the student, nothing pending, batch by batch;
    `targets` (B, T, D) what the teacher's block gave for the same tokens. Both are gone through several times. `mixed`
    keeps what the heads gather, which costs as much memory as the inputs and saves running the attention in every pass.
    """

    model: Transformer
    index: int
    inputs: Iterable[Tensor]
    targets: Iterable[Tensor]
    mixed: list[Tensor] | None = None
    progress: Progress = silent  # told of each pass

    @property
    def block(self) -> Block:
        return self.model.blocks[self.index]

    @property
    def shards(self) -> Shards:
        return self.model.shards

    @property
    def tokens(self) -> int:
        return sum(x.shape[0] * x.shape[1] for x in self.inputs)

    def batches(self, tokens: int | None = None) -> Iterator[Batch]:
        """All batches, or every n-th so that they hold at least about `tokens` tokens, if there are so many."""
        every, seen = max(1, self.tokens // tokens) if tokens else 1, 0
        mixed = map(self._mix, self.inputs) if self.mixed is None else self.mixed
        for x, target, heads in islice(zip(self.inputs, self.targets, mixed, strict=True), None, None, every):
            held_out = torch.arange(seen, seen + len(x)) % HELD_OUT == HELD_OUT - 1
            seen += len(x)
            yield Batch(x, target, heads, held_out)

    def _mix(self, x: Tensor) -> Tensor:
        context = self.model.context(Stream(x))
        return self.block.attention.mix(self.block.attention_norm(x[None]), context)

    def remember_heads(self) -> "DroppedBlock":
        """The same with what the heads gather computed once; valid while neither they nor their input change."""
        kept = replace(self, mixed=[self._mix(x) for x in self.inputs])
        self.progress(1)
        return kept

    def attended(self, batch: Batch, out: Tensor | None = None) -> Stream:
        """The stream with the attention's outputs pending, of output projections `out` in place of the block's."""
        layer = self.block.attention.out
        return Stream(batch.x).produce(shard_linear(batch.mixed, layer.weight if out is None else out), layer.bias)

    def pending(self, stream: Stream) -> Tensor:
        """Sum (B, T, D) of what is pending on all shards."""
        return self.shards.all_reduce(stream.pending.sum(0), POINT)

    def features(self, batch: Batch, attention: bool = False) -> Tensor:
        """Inputs (S, B, T, p) of the down projections, and with `attention` of the output projections too."""
        activations = self.block.mlp.activations(self.block.mlp_norm(self.attended(batch).read()))
        return torch.cat((activations, batch.mixed), -1) if attention else activations

    def missing(self, batch: Batch, features: Tensor) -> Tensor:
        """What the block's output, given the features of `features`, lacks of its target (B, T, D)."""
        down = self.block.mlp.down
        stream = self.attended(batch).produce(down(features[..., : down.weight.shape[2]]), down.bias)
        return batch.target - stream.x - self.pending(stream)

    def error(self) -> float:
        """Mean squared error of the block's output on `ERROR_TOKENS` tokens, the same number on every process."""
        total = count = 0
        for batch in self.batches(ERROR_TOKENS):
            missing = self.missing(batch, self.features(batch))
            total += missing.double().square().sum()
            count += missing.numel()
        self.progress(1)
        return self.shards.agreed(total / count).item()

    def moments(self, pair: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[Moments, Moments]:
        """Those of the windows to fit to, and of the ones held out.

        `pair` gives a batch's features (G, B, T, p) and targets (G, B, T, q).
        """
        sums: list[Moments] = []
        for batch in self.batches():
            features, targets = pair(batch)
            if not sums:
                shape = len(features), features.shape[-1], targets.shape[-1], features.device
                sums = [Moments(*shape), Moments(*shape)]
            for moments, some in zip(sums, (~batch.held_out, batch.held_out), strict=True):
                if some.all():
                    moments.add(features, targets)
                elif some.any():
                    moments.add(features[:, some], targets[:, some])
        self.progress(1)
        fit, held_out = sums
        return fit, held_out
