"""The paper's block design against its alternatives (section 4.1, figure 3 and table 1).

An SPD block adds the shards' attention outputs to the residual stream before the one all-reduce it keeps, and a bias of
the output projection after it. Both the other way round, to see what that costs:

residual after   shard i keeps `x + y_i + sum_j z_j`: the y_i are never shared, and stay apart for good
bias before      every shard adds the bias, so that the sum holds it tp times
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spd.cli import main
from spd.closed_form import centre_heads
from spd.comm import Stream
from spd.evaluate import batches, perplexity
from spd.model import Context, Transformer
from spd.options import MODEL, TEXT, command, option
from spd.plan import DROP, Plan, Policy, parse_blocks

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
        y = block.attention(block.attention_norm(stream.read()), context)
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
def centre_model(model: Transformer, tokens: Tensor) -> None:
    """Gives a model attention biases that leave it the function it was (`spd.closed_form`), in place.

    The means are those over windows (W, T), of the model under its plan.
    """
    totals = [0.0] * len(model.blocks)
    for batch in batches(tokens):
        stream = model.embed(batch.to(model.embedding.weight.device))
        context = model.context(stream)
        for i, block in enumerate(model.blocks):
            totals[i] += block.attention.mix(block.attention_norm(stream.read()), context).sum((1, 2))
            stream = model.run_block(i, stream, model.plan.blocks[i], context)
    for block, total in zip(model.blocks, totals, strict=True):
        centre_heads(block.attention, total / tokens.numel(), model.shards)


@torch.no_grad()
def block_designs(model: Transformer, plan: Plan, tokens: Tensor) -> dict[str, list[dict]]:
    """Table 1: perplexities of windows (W, T) with every sync point kept and, under `plan`, for each design.

    A model without biases is given some (`centre_model`, on the first windows), in place. Gives rows of `design`,
    `perplexity` and `nats`: `residual`, of the model as it is, and `bias`, with its biases.
    """

    def score(design: str, plan: Plan, altered: Callable = lambda model: model) -> dict:
        model.plan = plan
        scores = perplexity(altered(model), tokens)
        return {"design": design, "perplexity": scores["perplexity"], "nats": scores["nats"]}

    full = Plan.full(len(plan))
    residual = [score("no SPD", full), score("residual before", plan), score("residual after", plan, ResidualAfter)]
    model.plan = full
    if model.blocks[0].attention.out.bias is None:
        centre_model(model, tokens[:FOR_MEANS])
    bias = [score("no SPD", full), score("bias before", plan, BiasBefore), score("bias after", plan)]
    return {"residual": residual, "bias": bias}


@command(*MODEL, *TEXT, option("--drop", "Blocks, as in 0 (the paper's) or all.", default="0"))
def table1(session) -> None:
    """The paper's table 1: where an SPD block adds residual and bias, before the all-reduce or after it.

    A model without biases gets some that leave it the same function.
    """
    o, model = session.options, session.load()
    blocks = model.config.num_blocks
    plan, data = Plan.dropping(blocks, parse_blocks(o.drop, blocks)), session.windows(model)
    result = block_designs(model.transformer, plan, data.tokens)
    session.publish(result | {"plan": str(plan)}, model.describe(), data.describe())


if __name__ == "__main__":
    main(table1)
