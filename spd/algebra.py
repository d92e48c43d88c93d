"""The algebra of the pending residual stream, shown to hold on a model: what notebook 1 prints."""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spd.plan import DROP, FULL, Plan
from spd.pretrained import SPDModel, resolve


@torch.no_grad()
def statements(model: str, tp: int, tokens: Tensor) -> list[dict]:
    """Each `statement`, the `largest_difference` of logits between its two sides, and the all-reduces of the left one.

    `all_reduces` is counted while the left side runs; tokens (B, T). `scale` is the largest of the dense logits.
    """
    ours = SPDModel.from_pretrained(model, tp=tp)
    blocks = ours.config.num_blocks
    full, dropped = Plan.full(blocks), Plan.dropping(blocks, attention=range(blocks))
    dense = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32).eval()(tokens).logits
    silent = copy.deepcopy(ours)
    for block in silent.transformer.blocks:
        block.mlp.down.weight.zero_()
    alone = SPDModel.from_pretrained(model, tp=1)
    sides = {
        f"full everywhere at tp={tp} is the dense model": ((ours, full), dense),
        "with an MLP of zeros, drop is full": ((silent, dropped), _logits(silent, full, tokens)[0]),
        "on one shard, drop is full": ((alone, dropped), dense),
        "drop everywhere is another function": ((ours, dropped), dense),
    }
    rows = []
    for statement, (left, right) in sides.items():
        logits, count = _logits(*left, tokens)
        difference = (logits - right).abs().max().item()
        rows.append({"statement": statement, "largest_difference": difference, "scale": right.abs().max().item(),
                     "all_reduces": count, "expected": left[1].syncs()})  # fmt: skip
    return rows


def _logits(model: SPDModel, plan: Plan, tokens: Tensor) -> tuple[Tensor, int]:
    """Logits under a plan, and how many all-reduces they took."""
    model.plan = plan
    model.transformer.shards.take_collectives()
    logits = model.transformer(tokens)
    return logits, sum(point.count for point in model.transformer.shards.take_collectives().values())


@torch.no_grad()
def missing(model: str, tp: int, tokens: Tensor) -> list[dict]:
    """For each `block`, the share (`missing`) of its MLP's input that a shard lacks without the attention sync.

    The norm of the other shards' attention outputs over that of the whole input, mean over tokens (B, T) and shards.
    """
    transformer = SPDModel.from_pretrained(model, tp=tp).transformer
    stream = transformer.embed(tokens)
    context, rows = transformer.context(stream), []
    for i, block in enumerate(transformer.blocks):
        y = block.attention(block.attention_norm(stream.read()), context, i)
        seen = stream.produce(y, block.attention.out.bias)
        whole = transformer.shards.sync(seen, FULL, "attention").read()
        lacking = (whole - transformer.shards.sync(seen, DROP, "attention").read()).norm(dim=-1) / whole.norm(dim=-1)
        rows.append({"block": i, "missing": lacking.mean().item()})
        stream = transformer.run_block(i, stream, (FULL, FULL), context)
    return rows
