"""Oracles of the pending residual stream, and the counted collectives."""

import pytest
import torch
import torch.nn.functional as F

from spd import Plan, SPDModel
from spd.comm import Link, Shards, Stream
from spd.errors import SPDError
from spd.plan import DROP, FULL

TOKENS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
EXACT = dict(rtol=0, atol=2e-5)  # float32 sums in another order


def drop_all(model):
    return Plan.dropping(model.config.num_blocks, attention=range(model.config.num_blocks))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["grouped-query", "all-biases"])
def test_spd_block_is_the_papers_equation(variants, variant):
    """x + sum_i P_i + b + sum_i Z_i, where Z_i saw x + P_i + b: section 4.1, from the dense weights."""
    folder, reference = variants(variant)
    tp, layer = 4, reference.model.layers[0]
    model = SPDModel.from_pretrained(folder, tp=tp).transformer
    stream = model.embed(TOKENS)
    ours = model.run_block(0, stream, (DROP, FULL), model.context(stream)).x

    x, caught = reference.model.embed_tokens(TOKENS), []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    reference(TOKENS)
    heads, o, mlp = caught[0].chunk(tp, dim=-1), layer.self_attn.o_proj, layer.mlp
    bias = o.bias if o.bias is not None else torch.zeros(32)
    down_bias = mlp.down_proj.bias if mlp.down_proj.bias is not None else torch.zeros(32)
    expected = x + bias + down_bias
    for i, rows in enumerate(torch.arange(64).chunk(tp)):
        p = heads[i] @ o.weight.chunk(tp, dim=1)[i].T
        seen = layer.post_attention_layernorm(x + p + bias)
        gate, up = (
            F.linear(seen, m.weight[rows], m.bias if m.bias is None else m.bias[rows])
            for m in (mlp.gate_proj, mlp.up_proj)
        )
        expected = expected + p + (F.silu(gate) * up) @ mlp.down_proj.weight[:, rows].T
    torch.testing.assert_close(ours, expected, **EXACT)


@torch.no_grad()
def test_without_an_mlp_dropping_changes_nothing(variants):
    model = SPDModel.from_pretrained(variants("all-biases")[0], tp=4).transformer
    for block in model.blocks:
        block.mlp.down.weight.zero_()
    full = model(TOKENS)
    model.plan = drop_all(model)
    torch.testing.assert_close(model(TOKENS), full, **EXACT)


@torch.no_grad()
def test_one_shard_has_nothing_to_drop(plain):
    model = SPDModel.from_pretrained(plain, tp=1).transformer
    full = model(TOKENS)
    model.plan = Plan.dropping(3, attention=range(3), mlp=range(3))
    torch.testing.assert_close(model(TOKENS), full, **EXACT)


@torch.no_grad()
def test_dropping_matters_on_several_shards(plain):
    model = SPDModel.from_pretrained(plain, tp=4).transformer
    full = model(TOKENS)
    for plan in (Plan.dropping(3, attention=[1]), Plan.dropping(3, mlp=[1])):
        model.plan = plan
        assert (model(TOKENS) - full).abs().max() > 0.1


@torch.no_grad()
def test_what_mlp_syncs_leave_pending_arrives_later(plain):
    """With both points dropped everywhere, the end holds x + the sum over shards of all they produced."""
    model = SPDModel.from_pretrained(plain, tp=2).transformer
    model.plan = Plan.dropping(3, attention=range(3), mlp=range(3))
    stream = model.embed(TOKENS)
    context = model.context(stream)
    for i, policies in enumerate(model.plan.blocks):
        stream = model.run_block(i, stream, policies, context)
    torch.testing.assert_close(stream.x, model.embed(TOKENS).x)
    flushed = model.shards.flush(stream)
    torch.testing.assert_close(flushed.x, stream.x + stream.pending.sum(0))
    assert flushed.pending is None


@torch.no_grad()
def test_collectives_are_counted(plain):
    model = SPDModel.from_pretrained(plain, tp=4).transformer
    payload = TOKENS.numel() * 32 * 4
    cases = {
        "FF FF FF": {"attention": 3, "mlp": 3},
        "DF FF DF": {"attention": 1, "mlp": 3},
        "DF DF DF": {"mlp": 3},
        "FD FF DF": {"attention": 2, "mlp": 2},
        "DD DD DD": {"flush": 1},
    }
    for letters, counts in cases.items():
        model.plan = Plan.from_letters(letters)
        model(TOKENS)
        taken = model.shards.take_collectives()
        assert {point: c.count for point, c in taken.items()} == counts
        assert all(c.bytes == c.count * payload for c in taken.values())
        assert model.plan.syncs() == sum(counts.values())


def test_stream_reads_and_produces():
    x, p = torch.ones(1, 2, 3), torch.arange(12.0).view(2, 1, 2, 3)
    stream = Stream(x)
    assert stream.read().shape == (1, 1, 2, 3)
    stream = stream.produce(p, bias=torch.full((3,), 10.0))
    assert stream.x[0, 0, 0] == 11 and torch.equal(stream.read(), stream.x + p)
    shared = Shards(tp=2).sync(stream.produce(p, None), FULL, "mlp")
    assert torch.equal(shared.x, x + 10 + 2 * p.sum(0)) and shared.pending is None


def test_hosted_shards():
    assert list(Shards(8, rank=1, world=4).hosted) == [2, 3]
    with pytest.raises(SPDError, match="tp=4 is not a multiple of the 3 processes"):
        Shards(4, rank=0, world=3)


def test_link_form_and_cost():
    link = Link.parse("10GBps,20us")
    assert link.all_reduce_seconds(10**9, 2) == pytest.approx(20e-6 + 0.1)
    assert link.all_reduce_seconds(10**9, 8) == pytest.approx(20e-6 + 2 * 7 / 8 * 0.1)
    assert link.all_reduce_seconds(10**9, 1) == 0
    for wrong in ("10Gbps,20us", "10GBps", "fast", "0GBps,1us", ""):
        with pytest.raises(SPDError, match="the form is BANDWIDTH,LATENCY as in '10GBps,20us'"):
            Link.parse(wrong)
