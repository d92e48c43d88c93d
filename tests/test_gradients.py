"""Gradients do not depend on how many processes share the shards, nor corrupt what they are computed from."""

import pytest
import torch
import torch.nn.functional as F

from spd.comm import Shards
from spd.config import ModelConfig
from spd.launch import Runtime, spawn
from spd.model import Transformer
from spd.plan import Plan
from spd.pretrained import build

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=24, num_blocks=3, num_heads=8, num_kv_heads=4, head_dim=4,
    max_positions=32, attention_bias=True, mlp_bias=True, tie_embeddings=True,
)  # fmt: skip
LETTERS = "DF FF DD"  # the last block leaves something for the final flush
TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))


def _model(shards: Shards) -> Transformer:
    """Float64, every parameter random: the same model for every number of processes."""
    whole = build(CONFIG, Shards(shards.tp), torch.float64, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        parameter.normal_(0, 0.4, generator=generator)
    model = build(CONFIG, shards, torch.float64, "cpu")
    for mine, all_of_it in zip(model.parameters(), whole.parameters(), strict=True):
        stacked = mine.shape != all_of_it.shape
        mine.copy_(all_of_it[shards.hosted.start : shards.hosted.stop] if stacked else all_of_it)
    model.plan = Plan.from_letters(LETTERS)
    return model.requires_grad_(True)


def _loss(model: Transformer) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def gradients(runtime: Runtime) -> dict:
    """Runs on every process: each parameter's gradient for all shards, and the collectives that it took."""
    model = _model(runtime.shards(4))
    shards = model.shards
    sharded = {name for name, _ in model.named_parameters() if name in model.sharded}
    loss = _loss(model)
    loss.backward()
    parameters = dict(model.named_parameters())
    shards.reduce_gradients(
        [p for name, p in parameters.items() if name not in sharded], [parameters[name] for name in sharded]
    )
    counts = {point: spent.count for point, spent in shards.take_collectives().items()}
    gathered = {n: shards.gather(p.grad) if n in sharded else p.grad for n, p in parameters.items()}
    equal = [_same_everywhere(gathered[name], shards) for name in parameters if name not in sharded]
    return {
        "loss": loss.item(),
        "gradients": {name: grad.flatten().tolist() for name, grad in gathered.items()},
        "replicas_equal": all(equal),
        "counts": counts,
    }


def _same_everywhere(tensor: torch.Tensor, shards: Shards) -> bool:
    return bool((shards.gather(tensor[None].repeat(shards.k, *[1] * tensor.ndim)) == tensor).all())


@pytest.fixture(scope="module")
def in_one_process():
    return gradients(Runtime())


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_equal_over_processes(processes, in_one_process):
    """Float64: what is left is the order of the sums. Every parameter, replicated ones included."""
    found = spawn(processes, gradients)
    assert found["loss"] == pytest.approx(in_one_process["loss"], rel=1e-12)
    assert found["replicas_equal"]
    for name, expected in in_one_process["gradients"].items():
        expected, mine = torch.tensor(expected), torch.tensor(found["gradients"][name])
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12, msg=name)
    # a dropped sync point costs nothing backward either
    counts = found["counts"]
    assert (counts["attention"], counts["mlp"], counts["flush"]) == (1, 2, 1)
    assert (counts["attention backward"], counts["mlp backward"], counts["flush backward"]) == (1, 2, 1)


def test_gradients_are_those_of_finite_differences():
    model = _model(Shards(4))
    _loss(model).backward()
    for name in ("blocks.0.attention_norm.weight", "blocks.0.attention.out.bias", "blocks.1.mlp.down.weight"):
        parameter = dict(model.named_parameters())[name]
        place, step = (0,) * parameter.ndim, 1e-6
        with torch.no_grad():
            parameter[place] += step
            above = _loss(model).item()
            parameter[place] -= 2 * step
            below = _loss(model).item()
            parameter[place] += step
        assert parameter.grad[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)


def test_reduction_leaves_its_input_alone_where_gradients_flow():
    """In place, a sum over processes would change values that a backward pass has kept."""
    shards = Shards(2)
    values = torch.ones(3, requires_grad=True)
    total = shards.all_reduce(values * 1, "attention")
    total.add_(1)
    assert torch.equal(values, torch.ones(3))
    plain = torch.ones(3)
    assert shards.all_reduce(plain, "attention") is plain
