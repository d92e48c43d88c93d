"""Reordering heads and neurons over shards: the dense function stays, the layout does not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spd.comm import Shards
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.layout import permute_heads, permute_neurons
from spd.model import Transformer
from spd.plan import Plan
from spd.pretrained import build
from spd.transport import ProcessGroup

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=24, num_blocks=2, num_heads=8, num_kv_heads=4, head_dim=4,
    max_positions=64, attention_bias=True, mlp_bias=True,
)  # fmt: skip
TOKENS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


def _model(shards: Shards, config: ModelConfig = CONFIG) -> Transformer:
    """Every parameter random, biases and norms too; the same dense model for every number of processes."""
    whole = build(config, Shards(shards.tp), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        parameter.normal_(0, 0.4, generator=generator)
    if shards.world == 1:
        return whole
    model = build(config, shards, torch.float32, "cpu")
    for mine, all_of_it in zip(model.parameters(), whole.parameters(), strict=True):
        stacked = mine.shape != all_of_it.shape
        mine.copy_(all_of_it[shards.hosted.start : shards.hosted.stop] if stacked else all_of_it)
    return model


def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _shuffle(model: Transformer) -> None:
    for seed, block in enumerate(model.blocks):
        permute_heads(block, _order(CONFIG.num_kv_heads, seed), model.shards, CONFIG)
        permute_neurons(block, _order(CONFIG.intermediate_size, seed), model.shards)


@pytest.mark.parametrize("tp", [2, 4])
def test_dense_function_is_unchanged_and_the_layout_is_not(tp):
    model = _model(Shards(tp))
    before = model(TOKENS)
    model.plan = Plan.from_letters("DF DF")
    dropped_before = model(TOKENS)
    _shuffle(model)
    assert not torch.allclose(model(TOKENS), dropped_before, atol=1e-3)
    model.plan = Plan.full(2)
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-5)


def test_identity_changes_no_bit():
    model = _model(Shards(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    permute_heads(model.blocks[0], range(4), model.shards, CONFIG)
    permute_neurons(model.blocks[0], range(24), model.shards)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_groups_and_neurons_go_where_the_order_says():
    model = _model(Shards(2))
    block, old = model.blocks[0], _model(Shards(2)).blocks[0]
    permute_heads(block, [3, 0, 1, 2], model.shards, CONFIG)
    permute_neurons(block, [23, *range(23)], model.shards)
    # two groups a shard, of two query heads of four: the last query group of shard 1 is_main shard 0
    assert torch.equal(block.attention.qkv.weight[0, :8], old.attention.qkv.weight[1, 8:16])
    assert torch.equal(block.attention.qkv.bias[0, 16:20], old.attention.qkv.bias[1, 20:24])
    assert torch.equal(block.attention.out.weight[0, :, :8], old.attention.out.weight[1, :, 8:])
    assert torch.equal(block.mlp.gate_up.weight[1, 12], old.mlp.gate_up.weight[0, 23])
    assert torch.equal(block.mlp.down.weight[1, :, 0], old.mlp.down.weight[0, :, 11])


def test_orders_that_are_none_and_replicated_heads_are_refused():
    model = _model(Shards(2))
    with pytest.raises(SPDError, match=r"0\.\.3 once"):
        permute_heads(model.blocks[0], [0, 1, 2, 2], model.shards, CONFIG)
    with pytest.raises(SPDError, match="24 MLP neurons"):
        permute_neurons(model.blocks[0], range(12), model.shards)
    replicated = _model(Shards(8))
    with pytest.raises(SPDError, match="replicated"):
        permute_heads(replicated.blocks[0], range(8), replicated.shards, CONFIG)


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = _model(Shards(4, rank, world, ProcessGroup()))
    _shuffle(model)
    model.plan = Plan.from_letters("DF DF")
    if rank == 0:
        torch.save(model(TOKENS), f"{folder}/logits.pt")
    else:
        model(TOKENS)
    dist.destroy_process_group()


def test_processes_reorder_as_one_does(tmp_path: Path):
    mp.spawn(_process, args=(2, str(tmp_path)), nprocs=2)
    model = _model(Shards(4))
    _shuffle(model)
    model.plan = Plan.from_letters("DF DF")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(TOKENS), rtol=0, atol=1e-5)
