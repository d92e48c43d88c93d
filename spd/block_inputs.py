"""A block among its shards and the data that it is repaired on, as the steps of the closed form see them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spd.comm import Shards, Stream
from spd.config import ModelConfig
from spd.least_squares import Moments
from spd.model import Block, Context, shard_linear

HELD_OUT = 10  # one window in so many chooses the ridge


POINT = "calibration"  # the name of these all-reduces in the counts


@dataclass(frozen=True)
class Site:
    """A block among its shards."""

    block: Block
    index: int
    shards: Shards
    config: ModelConfig

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """What the hosted heads gather from inputs (B, T, D): (S, B, T, h d)."""
        return self.block.attention.mix(self.block.attention_norm(x[None]), context, self.index)


@dataclass(frozen=True)
class Original:
    """What a block was before it was corrected: a copy of the weights that change, and no more of a large block."""

    block: Block  # for what does not change
    gate_up: Tensor
    out: Tensor

    @classmethod
    def of(cls, block: Block) -> "Original":
        return cls(block, block.mlp.gate_up.weight.clone(), block.attention.out.weight.clone())

    def attended(self, batch: "Batch") -> Stream:
        return Stream(batch.x).produce(shard_linear(batch.mixed, self.out), self.block.attention.out.bias)


@dataclass(frozen=True)
class Batch:
    """Windows that enter a block (B, T, D), their targets (B, T, D) and what the heads gather (S, B, T, h d)."""

    x: Tensor
    target: Tensor
    mixed: Tensor
    held_out: Tensor  # (B,), True for windows that choose ridges


@dataclass(frozen=True)
class Calibration:
    """What one block reads and should give, batch by batch; gone through several times, in the same order.

    `inputs` are the residual streams (B, T, D) that enter the block in the student, nothing pending; `targets`
    (B, T, D) what the teacher's block gave for the same tokens. `context` makes a batch's `Context`
    (`Transformer.context`). `mixed` keeps what the heads gather, which costs as much memory as the inputs and saves
    running the attention in every pass.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    context: Callable[[Stream], Context]
    mixed: Sequence[Tensor] | None = None

    @property
    def tokens(self) -> int:
        return sum(x.shape[0] * x.shape[1] for x in self.inputs)

    def batches(self, site: Site, tokens: int | None = None) -> Iterator[Batch]:
        """All batches, or every n-th so that they hold at least about `tokens` tokens, if there are so many."""
        every, seen = max(1, self.tokens // tokens) if tokens else 1, 0
        for number, (x, target) in enumerate(zip(self.inputs, self.targets, strict=True)):
            held_out = torch.arange(seen, seen + len(x)) % HELD_OUT == HELD_OUT - 1
            seen += len(x)
            if number % every == 0:
                mixed = site.mix(x, self.context(Stream(x))) if self.mixed is None else self.mixed[number]
                yield Batch(x, target, mixed, held_out)

    def remember_heads(self, site: Site) -> "Calibration":
        """The same with what the heads gather computed once; valid while neither they nor their input change."""
        return replace(self, mixed=[batch.mixed for batch in self.batches(site)])


@torch.no_grad()
def output_error(site: Site, data: Calibration) -> float:
    """Mean squared error of the dropped block's output."""
    total = count = 0
    for batch in data.batches(site):
        missing = missing_of(site, batch, features_of(site, batch)[1])
        total += missing.double().square().sum().item()
        count += missing.numel()
    return total / count


def all_reduced(site: Site, y: Tensor) -> Tensor:
    """Sum (B, T, D) of the shards' parts (S, B, T, D)."""
    return site.shards.all_reduce(y.sum(0), POINT)


def attended(block: Block, batch: Batch) -> Stream:
    """The stream with the attention's outputs pending."""
    return Stream(batch.x).produce(block.attention.out(batch.mixed), block.attention.out.bias)


def features_of(site: Site, batch: Batch, attention: bool = False) -> tuple[Tensor, Stream]:
    """Inputs (S, B, T, p) of the hosted projections to fit, and the dropped block's stream with all outputs pending."""
    stream, mlp = attended(site.block, batch), site.block.mlp
    activations = mlp.activations(site.block.mlp_norm(stream.read()))
    stream = stream.produce(mlp.down(activations), mlp.down.bias)
    return torch.cat((activations, batch.mixed), -1) if attention else activations, stream


def missing_of(site: Site, batch: Batch, stream: Stream) -> Tensor:
    """What the block's output (B, T, D) lacks of its target."""
    return batch.target - stream.x - all_reduced(site, stream.pending)


def accumulated(site: Site, data: Calibration, statistics: Callable, pair: Callable) -> tuple[Moments, Moments]:
    """Two of the `statistics` (`Moments` or `Rows`): of the windows to fit to, and of those held out.

    `pair` gives a batch's features (G, B, T, p) and targets (G, B, T, q).
    """
    fit, held_out = statistics(), statistics()
    for batch in data.batches(site):
        features, targets = pair(batch)
        fit.add(features[:, ~batch.held_out], targets[:, ~batch.held_out])
        held_out.add(features[:, batch.held_out], targets[:, batch.held_out])
    return fit, held_out
