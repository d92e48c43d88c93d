"""Tables made by others as machines: costs and links that made them are found, what is left out is predicted."""

import csv
import json

import pytest
from test_latency import ask

from spd.calibrate import decoded, profile_tables
from spd.config import SHAPES
from spd.errors import SPDError
from spd.latency import read
from spd.links import as_curve, ring_bytes
from spd.machines import Costs, Machine, Pass, read_profile

COSTS = Costs(5e-6, 2e-15, 3e-13, 1e-13, 2e-12)


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def machine_of(path, *tables):
    path.write_text(json.dumps(profile_tables(tables), allow_nan=False))
    return read(path)


def decode_rows(links):
    """Tokens a second of llama2-7b made by known costs, over links of (latency, further GPU, ring's byte)."""
    for tp in (2, 4, 8):
        for batch in (1, 4, 16):
            for link, costs in links.items():
                for syncs in (2, 0):
                    sizes = {"model": "llama2-7b", "tp": tp, "batch": batch, "prompt_len": 256, "new_tokens": 64}
                    row = {**sizes, "link": link, "syncs_per_block": syncs, "tokens_per_s": 1.0}
                    counts = decoded(row).counts
                    seconds = sum(getattr(COSTS, kind) * counts[kind] for kind in Costs._fields)
                    units = ("latency", "step", "ring_byte")
                    seconds += sum(c * counts.get((u, link), 0) for u, c in zip(units, costs, strict=True))
                    yield row | {"tokens_per_s": batch / seconds}


def test_decoding_finds_the_costs_and_links_that_made_it_and_predicts_as_they_do(tmp_path):
    links = {"fast": (1e-5, 1e-6, 4e-12), "slow": (3e-5, 8e-6, 5e-11)}
    table = write(tmp_path / "decode.csv", list(decode_rows(links)))
    result = profile_tables([table])
    assert result["worst_error"]["fitted"] < 1e-6 and result["worst_error"]["left_out"] < 1e-3
    assert result["speedup_points"]["left_out"] < 0.1
    for link, found in result["links"].items():
        assert tuple(found.values()) == pytest.approx(links[link], rel=1e-3)
    machine = machine_of(tmp_path / "m.json", table)
    assert machine.own(8, "slow")(1e6) == pytest.approx(3e-5 + 7 * 8e-6 + ring_bytes(1e6, 8) * 5e-11, rel=1e-3)
    asked = [ask("llama2-7b", 100, 8, calibration=tmp_path / "m.json", link=link) for link in links]
    assert asked[1]["speedup"] > asked[0]["speedup"] > 1
    assert "predicted between two syncs and none" in asked[0]["assumptions"][-1]


def test_the_published_decode_table_one_cell_left_out(shared):
    """Points are met. Five percent of time is not: two runs of tp=2 bend by 14 % from what the others imply."""
    result = profile_tables([shared / "profiles/decode_70b_syncs.csv"])
    assert len(result["errors"]["fitted"]) == len(result["errors"]["left_out"]) == 30
    assert result["speedup_points"]["left_out"] < 3
    assert result["median_error"]["left_out"] < 0.035 and result["worst_error"]["left_out"] < 0.145
    assert result["worst_error"]["fitted"] < 0.085


def test_one_sync_a_block_is_predicted_between_two_and_none(shared, tmp_path):
    machine_of(tmp_path / "m.json", shared / "profiles/decode_70b_syncs.csv")
    asked = {"calibration": tmp_path / "m.json", "link": "p2p-off", "prompt_len": 1024, "new_tokens": 512}
    result = ask("llama2-70b", [0, 100], 8, **asked)
    full, one = (row["tpot_ms"] for row in result["percentages"])
    none = result["ceiling"]["no_communication"]["tpot"]["ms"]
    assert none < one < full and one == pytest.approx((full + none) / 2, rel=0.02)
    with pytest.raises(SPDError, match="say which with --link: p2p-on, p2p-off"):
        ask("llama2-70b", 0, 8, calibration=tmp_path / "m.json")
    over = ask("llama2-70b", 0, 8, calibration=tmp_path / "m.json", link="nvlink4")
    assert over["link"].startswith("nvlink4") and over["machine"] == "decode_70b_syncs"


def test_operators_one_degree_left_out_and_the_machine_reads_its_own_rows(tmp_path):
    table = write(tmp_path / "operators.csv", read_profile("layer_ops_a100"))
    result = profile_tables([table])
    for tp in (1, 2, 4, 8):
        rows = sorted(abs(row["error"]) for row in result["errors"]["left_out"] if row["tp"] == tp)
        assert len(rows) == 20 and rows[10] < 0.04 and rows[-1] < 0.16
    machine = machine_of(tmp_path / "m.json", table).machine()
    row = read_profile("layer_ops_a100")[7]
    one = next(o for o in Pass(SHAPES["llama2-70b"], 1, tokens=int(row["tokens"])).block() if o.name == "gate_up_proj")
    assert 1e6 * machine.seconds(one, 1) == pytest.approx(float(row["gate_up_proj_us"]))


def test_all_reduces_join_a_gpu_or_a_machine(tmp_path):
    sizes = [2**k for k in range(13, 22)]
    rows = [{"devices": n, "bytes": b, "us": 10 + n + b / 1e4} for n in (2, 8) for b in sizes]
    table = write(tmp_path / "mine.csv", rows)
    found = machine_of(tmp_path / "m.json", table)
    assert found.machine() is None and found.own(8, "mine")(8192) == pytest.approx(18.8192e-6)
    six = found.own(6, "mine")
    eight = as_curve(sizes, [1e-6 * (18 + b / 1e4) for b in sizes])
    assert six(7e5) == pytest.approx(eight(ring_bytes(7e5, 6) / ring_bytes(1, 8))) and six.name == "mine, read for 6"
    result = ask("llama2-7b", 50, 8, gpu_name="h100", calibration=tmp_path / "m.json", link="mine")
    assert (result["machine"], result["link"]) == ("h100", "mine")
    decode = write(tmp_path / "decode.csv", list(decode_rows({"real": (1e-5, 0, 4e-12)})))
    assert set(machine_of(tmp_path / "both.json", decode, table).links) == {"real", "mine"}


def test_tables_that_are_none_are_refused_in_words(tmp_path):
    rows = [{"devices": 2, "bytes": 8192, "us": 10}, {"devices": 2, "bytes": 16384, "us": 11}]
    decode = list(decode_rows({"real": (1e-5, 0, 4e-12)}))
    refused = [
        (write(tmp_path / "few.csv", rows), "have 2 sizes"),
        (write(tmp_path / "zero.csv", [rows[0] | {"us": "fast"}]), "us is missing or wrong"),
        (write(tmp_path / "other.csv", [{"a": 1}]), "columns of one of these"),
        (tmp_path / "none.csv", "cannot be read"),
    ]
    for path, words in refused:
        with pytest.raises(SPDError, match=words):
            profile_tables([path])
    with pytest.raises(SPDError, match="a second time"):
        profile_tables([write(tmp_path / "one.csv", decode), write(tmp_path / "two.csv", decode)])


def test_a_machine_computes_as_its_costs_say(tmp_path):
    machine = machine_of(tmp_path / "m.json", write(tmp_path / "d.csv", list(decode_rows({"l": (1e-5, 0, 4e-12)}))))
    made, one = Machine("made", COSTS), Pass(SHAPES["llama2-7b"], 4, batch=2)
    seconds = [sum(m.seconds(o, 4) * n for o, n in one.operators()) for m in (machine.machine(), made)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)
