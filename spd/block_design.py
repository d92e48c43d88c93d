"""The paper's block design against its alternatives (section 4.1, figure 3 and table 1).

An SPD block adds the shards' attention outputs to the residual stream before the one all-reduce it keeps, and a bias of
the output projection after it. Both the other way round, to see what that costs:

residual after   shard i keeps `x + y_i + sum_j z_j`: the y_i are never shared, and stay apart for good
bias before      every shard adds the bias, so that the sum holds it tp times
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spd.comm import Shards, Stream
from spd.evaluate import batches, perplexity
from spd.model import Attention, Context, Transformer
from spd.plan import DROP, Plan, Policy

FOR_MEANS = 16  # windows


class _Altered:
    """A model some of whose parts are replaced, for `perplexity`."""

    def __init__(self, model: Transformer):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)


class ResidualAfter(_Altered):
    """Attention outputs that were not synchronised stay with their shard; the logits are those of shard 0."""

    def run_block(self, i: int, stream: Stream, policies: tuple[Policy, Policy], context: Context) -> Stream:
        block, own = self._model.blocks[i], stream.pending
        y = block.attention(block.attention_norm(stream.read()), context, i)
        attended = stream.produce(y, block.attention.out.bias)
        if policies[0] is not DROP:
            attended = Stream(self._summed(attended.x, y, "attention"), own)
        z = block.mlp(block.mlp_norm(attended.read()))
        x = attended.produce(z, block.mlp.down.bias).x
        return Stream(self._summed(x, z, "mlp"), attended.pending)

    def _summed(self, x: Tensor, partial: Tensor, point: str) -> Tensor:
        return x + self._model.shards.all_reduce(partial.sum(0), point)

    def logits(self, stream: Stream) -> Tensor:
        return self._model.logits(Stream(stream.read()[0]))


class BiasBefore(_Altered):
    """In a block that drops its attention sync, every shard's part holds the output projection's bias."""

    def run_block(self, i: int, stream: Stream, policies: tuple[Policy, Policy], context: Context) -> Stream:
        stream = self._model.run_block(i, stream, policies, context)
        if policies[0] is DROP:
            stream.x = stream.x + (self._model.shards.tp - 1) * self._model.blocks[i].attention.out.bias
        return stream


@torch.no_grad()
def centre_values(model: Transformer, tokens: Tensor) -> None:
    """Gives a model without attention biases ones that leave it the function it was, in place.

    The values' mean over windows (W, T) is taken from them by a bias; since attention weights sum to one, every head's
    output misses just that mean, and the output projection's bias gives it back.
    """
    totals = [torch.zeros(()) for _ in model.blocks]
    for batch in batches(tokens):
        stream = model.embed(batch.to(model.embedding.weight.device))
        context = model.context(stream)
        for i, block in enumerate(model.blocks):
            values = block.attention.qkv(block.attention_norm(stream.read()))[..., _value_rows(block.attention)]
            totals[i] = totals[i].to(values) + values.sum((1, 2))
            stream = model.run_block(i, stream, model.plan.blocks[i], context)
    for block, total in zip(model.blocks, totals, strict=True):
        _give_bias(block.attention, total / tokens.numel(), model.shards)


def _value_rows(attention: Attention) -> slice:
    return slice((attention.h + attention.g) * attention.head_dim, None)


def _give_bias(attention: Attention, mean: Tensor, shards: Shards) -> None:
    """`mean` (S, g d) is taken from the values and, through the output projection, given back to the sum."""
    bias = torch.zeros(attention.qkv.weight.shape[:2]).to(mean)
    bias[:, _value_rows(attention)] = -mean
    heads = mean.unflatten(-1, (attention.g, -1)).repeat_interleave(attention.h // attention.g, 1).flatten(1)
    part = torch.einsum("sdi,si->d", attention.out.weight, heads)
    attention.qkv.bias = nn.Parameter(bias, requires_grad=False)
    attention.out.bias = nn.Parameter(shards.all_reduce(part, "bias"), requires_grad=False)


@torch.no_grad()
def block_designs(model: Transformer, plan: Plan, tokens: Tensor) -> dict[str, list[dict]]:
    """Table 1: perplexities of windows (W, T) with every sync point kept and, under `plan`, for each design.

    A model without biases is given some (`centre_values`, on the first windows), in place.

    Returns:
        Rows of `design`, `perplexity` and `nats`: `residual`, of the model as it is, and `bias`, with its biases.
    """

    def score(design: str, plan: Plan, altered: Callable = lambda model: model) -> dict:
        model.plan = plan
        scores = perplexity(altered(model), tokens)
        return {"design": design, "perplexity": scores["perplexity"], "nats": scores["nats"]}

    full = Plan.full(len(plan))
    residual = [score("no SPD", full), score("residual before", plan), score("residual after", plan, ResidualAfter)]
    model.plan = full
    if model.blocks[0].attention.out.bias is None:
        centre_values(model, tokens[:FOR_MEANS])
    bias = [score("no SPD", full), score("bias before", plan, BiasBefore), score("bias after", plan)]
    return {"residual": residual, "bias": bias}
