"""Speed without other numbers: the products, the compiled passes, the peer, and what bench says of its own bounds."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from unittest.mock import MagicMock

import draw_peers
import pytest
import torch
from bench_peers import PeerSettings, compare, compare_all, degrees_of, write_random
from torch._dynamo.backends.common import aot_autograd

from spd import Plan, SPDModel
from spd.bench import BenchSettings, Case, Sample, Timed, row_of, run, saved
from spd.comm import Collective, Link, Shards
from spd.config import SHAPES, ModelConfig
from spd.engines import WARMUP, Compiled, Eager, Rates, captured, floors
from spd.errors import SPDError
from spd.kernels import linear
from spd.launch import Runtime, spawn
from spd.machines import timed_passes
from spd.model import Rotary, rotate
from spd.records import make_record
from spd.tables import tables
from spd.transport import PROCESS_GROUP, SHARED_MEMORY

TINY = ModelConfig(96, 32, 64, 3, 4, 2, 8, 128)


@pytest.mark.parametrize("rows", [1, 64])
def test_products_are_the_same_whoever_computes_them(rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((2, rows, 512), (4096, 512)))
    expected = x.double() @ weight.double().T
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight).double(), expected, rtol=0, atol=1e-3)
        row = torch.randn(1, 1, 1, 1024, generator=generator).bfloat16()  # large enough for a way of its own
        wide = torch.randn(4096, 1024, generator=generator).bfloat16()
        assert linear(row, wide).shape == (1, 1, 1, 4096)
        torch.testing.assert_close(linear(row, wide), torch.nn.functional.linear(row, wide), rtol=2**-7, atol=0.5)
    weight.requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad[0], x.sum((0, 1)), rtol=1e-4, atol=1e-3)


def test_rotary_tables_grow_and_keep_their_values():
    rotary, x = Rotary(TINY), torch.randn(1, 1, 2, 1, 8)
    early = rotary(3, 1, x)
    late = rotary(700, 1, x)  # beyond what was kept
    assert all(torch.equal(a, b) for a, b in zip(early, rotary(3, 1, x), strict=True))
    first, second = x.chunk(2, -1)
    angles = 700 * rotary.frequencies.repeat(2)
    expected = x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    torch.testing.assert_close(rotate(x, *late), expected, rtol=0, atol=1e-4)
    assert rotary(0, 1, x.bfloat16())[0].dtype is torch.bfloat16


@torch.no_grad()
def _tokens(engine: Eager | Compiled, steps: int) -> list[list[int]]:
    engine.prefill()
    chosen = [engine.token.clone()]
    for _ in range(steps):
        engine.decode()
        chosen.append(engine.token.clone())
    return torch.cat(chosen, 1).tolist()


@pytest.mark.parametrize("letters", ["FF FF FF", "DF FF DD"])
def test_compiled_passes_choose_the_tokens_of_eager_ones(letters):
    """Through dynamo and autograd's tracer; the code generator behind them is torch's own affair and takes a minute."""
    torch._dynamo.reset()
    model = SPDModel.random(TINY, "tiny", Shards(2)).transformer
    model.plan = Plan.from_letters(letters)
    prompt = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = _tokens(Eager(model, prompt, 6), 6)
    compiled = Compiled(model, prompt, 6, backend="aot_eager")
    assert _tokens(compiled, 6) == expected
    assert _tokens(compiled, 6) == expected  # a second prompt meets nothing of the first


def test_compiled_decoding_writes_keys_and_values_in_place():
    """Each cache's only new version is itself with one token put in: what Inductor writes in place, without a copy.

    Views of one tensor of all blocks were scattered back into it, which copied all of it in every block.
    """
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = SPDModel.random(TINY, "tiny", Shards(2)).transformer
    prompt = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    as_inductor = {"inference_compiler": keep, "keep_inference_input_mutations": True}
    engine = Compiled(model, prompt, 6, backend=aot_autograd(fw_compiler=keep, **as_inductor))
    graphs.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        engine.decode()
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    assert not [node for node in nodes if "scatter" in str(node.target)]
    put = [node for node in nodes if node.target is torch.ops.aten.index_put.default]
    assert len(put) == 2  # keys and values: one graph serves all blocks
    for node in put:
        assert node.args[0].op == "placeholder"
        back = [user.args for user in node.users if user.target is torch.ops.aten.copy_.default]
        assert back == [(node.args[0], node)]


@pytest.mark.parametrize("new_tokens", [0, 1, 2])
def test_a_compiled_engine_warms_up_within_its_cache(new_tokens):
    """The warm-up decodes are more than the tokens asked for."""
    torch._dynamo.reset()
    model = SPDModel.random(TINY, "tiny", Shards(2)).transformer
    prompt = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(0))
    engine = Compiled(model, prompt, new_tokens, backend="aot_eager")
    engine.prefill()
    for _ in range(WARMUP):
        engine.decode()
    expected = _tokens(Eager(model, prompt, new_tokens), new_tokens)
    assert _tokens(engine, new_tokens) == expected


def test_the_rotary_table_of_a_capture_is_never_replaced(monkeypatch):
    """A captured prefill goes on reading the table it met, and decoding past its end must not free that one."""
    torch._dynamo.reset()
    model = SPDModel.random(replace(TINY, max_positions=512), "tiny", Shards(1)).transformer
    prompt = torch.randint(96, (1, 250), generator=torch.Generator().manual_seed(0))
    met = []
    monkeypatch.setattr("spd.engines.called_once", lambda function, shards: met.append(model.rotary.kept) or function)
    engine = Compiled(model, prompt, 10, backend="eager")
    _tokens(engine, 10)
    assert all(table is model.rotary.kept for table in met)


def _against(runtime: Runtime, folder: str, tp: int) -> dict:
    torch.set_num_threads(1)
    return compare(runtime, folder, PeerSettings("tiny", "float32", tp, prompt_len=8, new_tokens=2, seconds=0))


@pytest.mark.parametrize(("tp", "transport"), [(1, PROCESS_GROUP), (2, PROCESS_GROUP), (2, SHARED_MEMORY)])
def test_the_peer_has_the_same_weights_and_the_same_numbers(tmp_path, tp, transport):
    write_random(TINY, tmp_path, 0)
    row = spawn(tp, _against, str(tmp_path), tp, transport=transport)
    assert set(row["ratio"]) == {"spd"} | ({"spd_over_gloo"} if transport == SHARED_MEMORY else set())
    assert row["logits_differ"] < 1e-4 < row["logits_up_to"]
    assert row["spd"]["ttft_ms"]["repeats"] == row["transformers"]["ttft_ms"]["repeats"] == 5
    assert row["ratio"]["spd"]["ttft"] == row["transformers"]["ttft_ms"]["median"] / row["spd"]["ttft_ms"]["median"]


def test_the_table_beside_transformers_says_who_is_ahead_or_why_there_is_no_peer():
    def times(median: float) -> dict:
        return {kind: {"median": median, "spread": 0.5, "min": 1.0, "repeats": 7} for kind in ("ttft_ms", "tpot_ms")}

    both = {"shape": "llama-8m", "dtype": "float32", "tp": 1, "threads": 2, "spd": times(4.0), "logits_differ": 1e-6}
    both |= {"transformers": times(5.0), "ratio": {"spd": {"ttft": 1.25, "tpot": 1.25}}}
    alone = {
        "shape": "llama-8m",
        "dtype": "float32",
        "tp": 2,
        "threads": 1,
        "spd": times(4.0),
        "why_not": "OSError: no",
    }
    result = {"rows": [both, alone], "batch": 1, "prompt_len": 128, "new_tokens": 8}
    record = make_record("bench-peers", {}, result, started=datetime.now(UTC))
    (table,), figure = draw_peers.tables([record]), draw_peers.figures([record])["peers"]
    rows = table.frame.to_dict("records")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["llama-8m, float32, tp=1"]
    assert rows[0]["spd_ttft_ratio"] == 1.25 and rows[0]["repeats"] == 7
    assert rows[1]["why_not"] == "OSError: no" and rows[1]["transformers_ttft_ms"] != rows[1]["transformers_ttft_ms"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((["llama-9m"], ["float32"], [1]), "llama-8m"),
        ((["llama-8m"], ["int8"], [1]), "float32, bfloat16"),
        ((["llama-8m"], ["float32"], [9]), "valid: 1 to 8"),
        ((["llama2-70b"], ["float32"], [64]), "processes on"),
    ],
)
def test_mistakes_in_what_is_compared_are_answered_in_words(asked, words):
    with pytest.raises(SPDError, match=words):
        compare_all(*asked)


@pytest.mark.parametrize("spec", ["", "0", "1,x"])
def test_degrees_show_their_form(spec):
    with pytest.raises(SPDError, match="as in 1,2"):
        degrees_of(spec)


# ---------------------------------------------------------------- what bench says of its own times


def test_time_saved_is_compared_with_the_all_reduces_removed_of_the_same_repetition():
    def sample(ttft: float, attention: int) -> Sample:
        sums = {"mlp": Collective(4, 0, 0.4, 0.4)}
        if attention:
            sums["attention"] = Collective(attention, 0, 0.1 * attention, 0.2 * attention)
        return Sample(ttft, None, sums)

    full, half, none = (sample(10.0, 4), sample(9.5, 2), sample(8.8, 0))
    assert saved([full], [half])["saved"] == pytest.approx({"saved_ms": 500, "removed_ms": 600, "share": 5 / 6})
    assert saved([full], [none])["saved"]["share"] == pytest.approx(1.0)
    assert saved([full], [full]) == {}


def test_what_no_clock_saw_is_null_and_not_zero():
    """As on GPUs, whose collectives are only launched where they are counted."""
    sums = {"attention": Collective(3, 96), "mlp": Collective(3, 96)}
    full, dropped = Sample(2.0, None, sums), Sample(1.5, None, {"mlp": Collective(3, 96)})
    row = row_of(Case(Plan.full(3)), [full])
    assert row["tpot_ms"] is None and row["communication_ms"] is None
    assert row["collectives"]["mlp"] == {"count": 3, "bytes": 96, "real_ms": None, "emulated_ms": 0.0}
    assert saved([full], [dropped]) == {}
    silent = row_of(Case(Plan.full(3), True), [Sample(1.0, 0.5, {})])
    assert silent["communication_ms"]["median"] == 0 and silent["tpot_ms"]["median"] == 500


def test_what_a_graph_s_collectives_take_is_what_a_pass_without_any_does_not():
    """No clock sees one of them: all together are TTFT over that of the same repetition in silence, shared by bytes."""
    full = [Sample(ttft, None, {"attention": Collective(3, 90), "mlp": Collective(3, 90)}) for ttft in (2.0, 3.0)]
    dropped = [Sample(ttft, None, {"mlp": Collective(3, 90)}) for ttft in (1.5, 2.6)]
    silent = [Sample(1.0, None, {}), Sample(2.2, None, {})]
    row = row_of(Case(Plan.full(3)), full, silent)
    assert row["communication_ms"]["median"] == pytest.approx(900) and row["communication_ms"]["repeats"] == 2
    assert row["collectives"]["attention"]["real_ms"] is None
    assert row_of(Case(Plan.full(3), True), silent, silent)["communication_ms"]["median"] == 0
    found = saved(full, dropped, silent)["saved"]
    assert found == pytest.approx({"saved_ms": 450, "removed_ms": 450, "share": 1.0})


def test_a_replay_counts_the_collectives_of_its_capture(monkeypatch):
    """A CUDA graph runs no Python, so that its collectives would be lost from the count; this one is a stand-in."""
    shards, calls = Shards(2), []

    def one_pass() -> None:
        calls.append(shards.all_reduce(torch.zeros(4), "attention"))
        shards.all_reduce(torch.zeros(4), "mlp")
        shards.all_reduce(torch.zeros(4), "mlp")

    graph = MagicMock()
    for name in ("Stream", "stream", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    replay = captured(one_pass, shards)
    assert len(calls) == WARMUP + 1 and shards.take_collectives() == {}
    replay()
    replay()
    found = shards.take_collectives()
    assert len(calls) == WARMUP + 1 and graph.replay.call_count == 2
    assert {point: (one.count, one.bytes) for point, one in found.items()} == {"attention": (2, 32), "mlp": (4, 64)}


def test_bounds_are_work_over_rates_plus_the_sync_points():
    rates = Rates(flops=1e9, bytes=1e9, all_reduce={"ttft": 2e-3, "tpot": 1e-3}, all_gather=5e-4)
    passes = timed_passes(TINY, 2, 1, 16, 4, 4)
    silent, kept = (floors(rates, passes, Link.parse("1GBps,1ms"), syncs) for syncs in (0, 6))
    gather = 0.5 + 1 + 96 * 4 / 2 / 1e6  # the logits go round once
    assert kept["ttft_ms"] - silent["ttft_ms"] == pytest.approx(6 * (2 + 1 + 16 * 32 * 4 / 1e6) + gather)
    assert kept["tpot_communication_ms"] == pytest.approx(6 * (1 + 1 + 32 * 4 / 1e6) + gather)
    q_kv_o = 32 * (16 + 2 * 8) + 16 * 32  # one shard: 2 of 4 heads, 1 of 2 key/value heads
    weights = 3 * (q_kv_o + 3 * 32 * 32) + 96 // 2 * 32
    assert silent["tpot_ms"] == pytest.approx(1e3 * 4 * weights / 1e9)


def test_bench_gives_bounds_and_times_one_shard_alone():
    sizes = {"prompt_len": 8, "new_tokens": 1, "repeats": 2, "warmup": 0}
    found = run(Runtime(), Timed(shape="llama-8m"), BenchSettings((Plan.full(6),), **sizes))
    assert found["rates"]["matrix_gflops"] > 0 and found["rates"]["all_reduce"]["ttft_ms"] == 0
    assert found["plans"][0]["floor"]["ttft_ms"] > 0 and "saved" not in found["plans"][0]
    model = {"name": "llama-8m", "fingerprint": "f", "blocks": 6}
    (table,) = tables([make_record("bench", {}, found, started=datetime.now(UTC), model=model, tp=1)])
    assert table.frame["formula_ms"][0] == found["bounds"]["no_communication"]["ttft_ms"]["median"]
    assert table.frame["ttft_of_bound"][0] > 0 and "GFLOP/s" in table.columns
    plans = (Plan.full(6), Plan.dropping(6, range(6)))
    settings = BenchSettings(plans, alone=True, link="1GBps,1ms", **sizes)
    found = run(Runtime(), Timed(shape="llama-8m", tp=4), settings)
    times = [row["ttft_ms"] for row in found["predicted"]]
    assert found["world"] == 1 and found["tp"] == 4 and not found["share"]["collectives"]
    assert times[0] - times[1] == pytest.approx(6 * (1 + 1.5 * 8 * 256 * 4 / 1e6))
    json.dumps(found, allow_nan=False)


def test_a_share_alone_needs_a_link_to_predict_over():
    with pytest.raises(SPDError, match="--link"):
        run(Runtime(), Timed(shape="llama-8m", tp=4), BenchSettings((Plan.full(6),), alone=True))
    assert SHAPES["llama-8m"].num_blocks == 6
