"""Policies beyond full and drop: what they keep, send and count, whatever hosts the shards."""

import itertools

import pytest
import torch

from spd import Plan, SPDModel
from spd.comm import Link, Shards, Stream
from spd.errors import SPDError
from spd.launch import Runtime, spawn
from spd.plan import DROP, FULL, GROUP, KEPT, PLAIN, POLICIES
from spd.sensitivity import scores
from spd.transport import BLOCK, FIELDS, PROCESS_GROUP, SHARED_MEMORY, Rounded, SharedMemory, packed_bytes

TOKENS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
# One plan a policy, at both points; the last point is full. Mixed: everything waits for everything else.
PLANS = {name: f"{p.letter}{p.letter} D{p.letter} {p.letter}F" for name, p in POLICIES.items()} | {"mixed": "DG 43 GD"}


def plan_of(name: str, group: int = 2) -> Plan:
    letters = PLANS[name]
    return Plan.from_letters(letters, group if "G" in letters else None)


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def everything(stream: Stream) -> torch.Tensor:
    """x + sum over groups of s_G + sum over shards of p_i."""
    total = stream.x
    if stream.shared is not None:
        total = total + stream.shared[:: stream.group].sum(0)
    return total if stream.pending is None else total + stream.pending.sum(0)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", FIELDS)
def test_rounding_is_to_the_nearest_of_its_block(bits):
    x, most = noise(3, 70, dtype=torch.float32), 2 ** (bits - 1) - 1
    x[0, :32] = 0
    rounded = Rounded.of(x, bits).values()
    for row, of in zip(x, rounded, strict=True):
        for block, found in zip(row.split(BLOCK), of.split(BLOCK), strict=True):
            step = (block.abs().max() / most).half().float()
            grid = step * torch.arange(-most, most + 1)
            nearest = grid[(block[:, None] - grid).abs().argmin(-1)]
            torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)
    assert (rounded[0, :32] == 0).all()


def test_rounding_at_the_ends_of_float16():
    assert torch.isfinite(Rounded.of(torch.full((1, 32), 1e30), 2).values()).all()
    assert (Rounded.of(torch.full((1, 32), 1e-30), 4).values() == 0).all()


@pytest.mark.parametrize("bits", FIELDS)
@pytest.mark.parametrize("size", [1, 8, 11, 32, 64, 70, 192])
def test_what_is_packed_is_unpacked_and_counted(bits, size):
    rounded = Rounded.of(noise(2, 3, size), bits)
    packed = rounded.pack()
    assert packed.dtype == torch.uint8 and packed.shape[-1] == packed_bytes(size, bits)
    again = Rounded.unpack(packed, size, bits)
    assert torch.equal(again.steps, rounded.steps) and torch.equal(again.scales, rounded.scales)
    if size == 192:
        assert packed_bytes(size, bits) == 192 * bits // 8 + 2 * 6


# ---------------------------------------------------------------- the algebra


@pytest.mark.parametrize("tp", range(2, 9))
@pytest.mark.parametrize("policy", [DROP, FULL, *KEPT.values(), *PLAIN.values(), GROUP], ids=lambda p: p.name)
def test_what_keeps_its_errors_changes_no_sum(tp, policy):
    """x + sum s_G + sum p_i, with something pending everywhere and shared inside groups; 30 channels are uneven."""
    groups = [g for g in range(1, tp + 1) if tp % g == 0]
    for group in groups:
        asked = Plan.from_policies([[policy.name] * 2], group).blocks[0][0] if policy == GROUP else policy
        inside = noise(tp // group, 2, 3, 30, seed=1).repeat_interleave(group, 0)
        stream = Stream(noise(2, 3, 30), noise(tp, 2, 3, 30, seed=2), inside, group)
        for known in (stream, Stream(stream.x, stream.pending)):
            after = Shards(tp).sync(known, asked, "mlp")
            lost = (everything(after) - everything(known)).abs().max()
            assert lost > 1e-3 if policy.plain else lost < 1e-6
            assert policy not in (FULL, *PLAIN.values()) or after.owed() is None
            if policy in KEPT.values() and policy.bits > 2:
                assert 0 < after.pending.abs().max() < known.owed().abs().max()


def test_groups_share_inside_and_owe_the_rest():
    shards, x = Shards(4), torch.zeros(1, 1, 2)
    pending = torch.arange(8.0).view(4, 1, 1, 2)
    group = Plan.from_letters("GG", 2).blocks[0][0]
    inside = shards.sync(Stream(x, pending), group, "attention")
    assert inside.read()[:, 0, 0].tolist() == [[2, 4], [2, 4], [10, 12], [10, 12]]
    twice = shards.sync(inside.produce(pending, None), group, "mlp")
    assert torch.equal(twice.read(), 2 * inside.read())
    assert inside.owed()[:, 0, 0].tolist() == [[1, 2], [1, 2], [5, 6], [5, 6]]  # s_G / |G|
    assert shards.flush(twice).x.flatten().tolist() == [24, 32]
    assert {p: c.count for p, c in shards.take_collectives().items()} == {
        "attention group": 1, "mlp group": 1, "flush": 1,
    }  # fmt: skip


@torch.no_grad()
def test_all_shards_in_one_group_are_full(plain):
    model = SPDModel.from_pretrained(plain, tp=4, dtype="float32").transformer.double()
    full = model(TOKENS)
    model.plan = Plan.from_letters("GG GG GG", 4)
    torch.testing.assert_close(model(TOKENS), full, rtol=0, atol=1e-10)
    for group, least in ((1, 0.1), (2, 0.1)):
        model.plan = Plan.from_letters("GG GG GF", group)
        found = model(TOKENS)
        assert (found - full).abs().max() > least
        if group == 1:
            model.plan = Plan.from_letters("DD DD DF")
            torch.testing.assert_close(model(TOKENS), found, rtol=0, atol=1e-10)


@torch.no_grad()
def test_kept_errors_cost_less_than_lost_ones(plain):
    model = SPDModel.from_pretrained(plain, tp=4).transformer
    full, errors = model(TOKENS), {}
    for bits in FIELDS:
        for plan in (f"int{bits}", f"int{bits}-plain"):
            model.plan = plan_of(plan)
            errors[plan] = (model(TOKENS) - full).square().mean().item()
    model.plan = Plan.from_letters("88 88 8F")
    assert (model(TOKENS) - full).abs().max() < 0.2
    assert errors["int8"] < errors["int4"] < errors["int3"] < errors["int2"]


# ---------------------------------------------------------------- tokens and rows are independent


@torch.no_grad()
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", PLANS)
def test_cached_decoding_and_single_rows_equal_a_full_pass(variants, name, tp):
    model = SPDModel.from_pretrained(variants("all-biases")[0], tp=tp).transformer.double()
    model.plan = plan_of(name)
    whole = model(TOKENS)
    cache = model.new_cache(len(TOKENS), TOKENS.shape[1])
    pieces = [model(TOKENS[:, :7], cache), *(model(TOKENS[:, i : i + 1], cache) for i in range(7, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(TOKENS[2:3]), whole[2:3], rtol=0, atol=1e-9)
    torch.testing.assert_close(model(TOKENS, last_only=True), whole[:, -1:], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- processes


def logits(runtime: Runtime, folder: str, tp: int) -> dict:
    """Of every plan the logits, the collectives and the gradient of the norm that is first; scores of the points."""
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(tp)).transformer.double()
    found = {}
    for name in PLANS:
        model.plan = plan_of(name)
        with torch.no_grad():
            values = model(TOKENS[:2])
        counted = {point: (one.count, one.bytes) for point, one in model.shards.take_collectives().items()}
        weight = model.blocks[0].attention_norm.weight.requires_grad_(True)
        model(TOKENS[:2]).square().mean().backward()
        model.shards.reduce_gradients([weight], [])
        grad, weight.grad = weight.grad.tolist(), None
        model.shards.take_collectives()
        found[name] = {"logits": values.tolist(), "counted": counted, "grad": grad}
    return {"plans": found, "scores": scores(model, TOKENS[:2], [DROP, KEPT[4]])["scores"]}


@pytest.mark.parametrize(
    ("processes", "transport"),
    [(4, PROCESS_GROUP), (2, SHARED_MEMORY)],
)
def test_the_same_on_any_number_of_processes(plain, processes, transport):
    """Numbers, gradients, and what is counted: packed bytes, as if every shard had a process."""
    if transport == SHARED_MEMORY and not SharedMemory.works_here():
        pytest.skip("not an x86-64 processor")
    one, several = logits(Runtime(), str(plain), 4), spawn(processes, logits, str(plain), 4, transport=transport)
    for name, expected in one["plans"].items():
        found = several["plans"][name]
        for what in ("logits", "grad"):
            a, b = (torch.tensor(each[what], dtype=torch.float64) for each in (found, expected))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=f"{name} {what}")
        assert {p: tuple(c) for p, c in found["counted"].items()} == expected["counted"], name
    for point, policy in itertools.product(("attention", "mlp"), ("drop", "int4")):
        assert several["scores"][point][policy] == pytest.approx(one["scores"][point][policy], rel=1e-6)
    tokens, width = 2 * 12, 32 // 4
    packed = tokens * 4 * packed_bytes(width, 4)
    assert one["plans"]["int4"]["counted"] == {
        "attention": (4, 2 * packed), "mlp": (5, 2 * packed + tokens * 32 * 8),
    }  # fmt: skip


def test_two_halves_cost_the_link_one_latency():
    link = Link.parse("1GBps,100ms")
    shards = Shards(2, link=link)
    shards.sync(Stream(noise(1, 5, 64), noise(2, 1, 5, 64)), KEPT[4], "mlp")
    spent = shards.take_collectives()["mlp"]
    assert (spent.count, spent.bytes) == (2, 5 * 2 * packed_bytes(32, 4))
    assert 1 <= spent.emulated_seconds / link.all_reduce_seconds(spent.bytes, 2) < 1.5  # a busy machine waits longer


def test_gradients_are_those_of_whole_values():
    """Straight through: the sum's gradient is full's, the kept errors have none."""
    pending = noise(4, 1, 2, 30).requires_grad_(True)
    after = Shards(4).sync(Stream(noise(1, 2, 30), pending), KEPT[3], "mlp")
    weights = noise(1, 2, 30, seed=3)
    ((after.x * weights).sum() + after.pending.square().sum()).backward()
    torch.testing.assert_close(pending.grad, weights.expand(4, -1, -1, -1))


# ---------------------------------------------------------------- plans


def test_letters_names_and_group_sizes_round_trip():
    plan = Plan.from_letters("D4 8h Gf 3t 2w FG", group=2)
    assert Plan.from_document(plan.document()) == plan
    assert plan.document()["group"] == 2 and plan.document()["policies"][2] == ["group", "int4-plain"]
    assert str(plan) == "D4 8h Gf 3t 2w FG" and plan.dropped() == [0, 2]
    assert plan.syncs() == 1 + 1  # one is full, and what the last leaves is flushed
    with pytest.raises(SPDError, match="how many shards a group has must be said"):
        Plan.from_letters("GF")
    with pytest.raises(SPDError, match="tp=6 shards cannot be divided into groups of 4; give a divisor of 6"):
        Plan.from_letters("GF", 4).check_groups(6)


def test_bits_and_groups_take_the_place_of_policies_but_the_last():
    plan = Plan.dropping(3, [1]).replaced({FULL: KEPT[4], DROP: Plan.from_letters("GG", 2).blocks[0][0]})
    assert str(plan) == "44 G4 4F"
    assert Plan.full(30).replaced({FULL: KEPT[4]}).bytes_share(576, 3) == pytest.approx(0.293, abs=5e-4)
    assert Plan.full(30).replaced({FULL: PLAIN[8]}).bytes_share(576, 3) == pytest.approx(0.54, abs=2e-3)
    assert Plan.dropping(30, range(30)).bytes_share(576, 3) == 0.5
