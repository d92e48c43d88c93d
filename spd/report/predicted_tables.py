"""Tables of predictions: records of `predict-paper`."""

from collections.abc import Sequence

from spd.report.records import Record, newest, value_in
from spd.report.table import Table

DECODE_COSTS = {
    "launch and gaps": ("operator_us", "µs an operator"),
    "matrix rate": ("matrix_tflops", "TFLOPS"),
    "weights, matrix-vector": ("matrix_vector_tb_per_s", "TB/s"),
    "weights, matrix-matrix": ("matrix_matrix_tb_per_s", "TB/s"),
}


def predicted_tables(records: Sequence[Record]) -> list[Table]:
    """Tables of the newest `predict-paper` record."""
    chosen = newest(records, "predict-paper")
    return [] if chosen is None else [make(chosen) for make in (_claims, _fits, _summary, _transfers, _decode_errors)]


def _claims(record: Record) -> Table:
    rows = [dict(row) for row in value_in(record, "result", "claims")]
    regimes = list(value_in(record, "result", "regimes"))
    for row in rows:
        row |= {f"{name}: holds": "yes" if row[f"{name}: holds"] else "no" for name in regimes}
    formats = {"where": "", "claim": "", "shape": "", "setting": "", "percent": "g", "relation": "", "paper": "g"}
    for name in regimes:
        formats |= {name: ".1f", f"{name}: difference": "+.1f", f"{name}: holds": ""}
    caption = (
        "The paper's claims about time beside predictions. lean: no launch time, NCCL's table, LBW at the rate"
        " stated; paper: links fitted to figure 2's axis, launch time to the one equality, read as a reduction"
        " 1 - t_p/t_0 or as a speedup t_0/t_p - 1 (the lean column is a speedup). So that equality, and the transfer"
        " times at 0 % of the two paper columns, hold by fit; the others are predicted."
    )
    return Table("predicted-claims", caption, rows, formats, [record])


def _fits(record: Record) -> Table:
    fits = value_in(record, "result", "fits")
    rows = []
    for setting, link in fits["links"].items():
        to = f"figure 2's axis filled by {fits['axis_fill']:.0%}; latency {link['latency_us']:.0f} µs, NCCL's least"
        rows.append({"fitted": f"bandwidth of {setting}", "unit": "GB/s", "value": link["bandwidth_gb_per_s"],
                     "if_axis_full": link["bandwidth_gb_per_s_if_axis_full"], "stated": link["stated"],
                     "to": to})  # fmt: skip
    for reading, launch in fits["launch_us"].items():
        block = fits["launch_ms_a_block"][reading]
        rows.append({"fitted": f"launch, claim as {reading}", "unit": "µs an operator", "value": launch,
                     "to": f"{_equality(record)}; {block:.2f} ms a block"})  # fmt: skip
    described = value_in(record, "result", "decode_check", "costs")
    for words, (key, unit) in DECODE_COSTS.items():
        rows.append({"fitted": f"decode: {words}", "unit": unit, "value": described[key], "to": "all its rows"})
    for name, link in described["links"].items():
        latencies = ", ".join(f"{us:.0f} (tp={tp})" for tp, us in link["latency_us"].items())
        rows.append({"fitted": f"decode: ring, {name}", "unit": "GB/s", "value": link["ring_gb_per_s"],
                     "to": f"all its rows; latency in µs: {latencies}"})  # fmt: skip
    formats = {"fitted": "", "value": ".4g", "unit": "", "if_axis_full": ".4g", "stated": "", "to": ""}
    caption = "What was fitted, and to what; if_axis_full: had figure 2's bars reached the end of their axes."
    return Table("predicted-fits", caption, rows, formats, [record])


def _equality(record: Record) -> str:
    """The one claim that launch time is fitted to."""
    claim = next(claim for claim in value_in(record, "result", "claims") if claim["relation"] == "=")
    return f"{claim['paper']:g} % at {claim['percent']:g} % ({claim['shape']}, {claim['setting']})"


def _summary(record: Record) -> Table:
    formats = {"regime": "", "shape": "", "setting": "", "ttft_ms": ".2f", "communication_share": ".3f"}
    formats |= {f"{key}_{p}": ".3f" for p in (70, 100) for key in ("reduction", "speedup")}
    caption = (
        "Predicted TTFT and share of communication at 0 %, reduction 1 - t_p/t_0 and speedup t_0/t_p at 70 and 100 %,"
        " and the ceiling of any method: no communication at all."
    )
    formats |= {"speedup_no_communication": ".3f"}
    return Table("predicted-figure7", caption, value_in(record, "result", "figure7_summary"), formats, [record])


def _transfers(record: Record) -> Table:
    formats = {
        "setting": "",
        "percent": "g",
        **{f"{kind}_ms": ".2f" for kind in ("stated", "measured", "fitted")},
        "axis_upper_ms": "g",
    }
    caption = "Transfer time of LLaMA2-70B's all-reduces by kind of link, beside the end of figure 2's axis."
    return Table("predicted-figure2", caption, value_in(record, "result", "figure2"), formats, [record])


def _decode_errors(record: Record) -> Table:
    checks = value_in(record, "result", "decode_check", "checks")
    keys = ("variant", "p2p", "batch", "tp")
    rows = [dict(row) for row in checks["each row held out in turn"]["predicted"]]
    formats = {"variant": "", "p2p": "", "batch": "d", "tp": "d", "measured_ms": ".2f", "predicted_ms": ".2f"}
    formats |= {"error": "+.1%"}
    for name, check in checks.items():
        if check["fitted"]:
            found = {tuple(r[k] for k in keys): r["error"] for r in check["predicted"]}
            for row in rows:
                row[name] = found.get(tuple(row[k] for k in keys))
            formats |= {name: "+.1%"}
    worst = "; ".join(f"{name}: worst {c['worst_predicted']:.1%}, mean {c['mean_predicted']:.1%}" for name, c in
                      checks.items())  # fmt: skip
    caption = f"Time a step of the decode benchmark; error of predictions of rows that were not fitted. {worst}."
    return Table("predicted-decode", caption, rows, formats, [record])
