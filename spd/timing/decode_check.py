"""The latency model against a decode benchmark of a 70B made by others, `profiles/decode_70b.csv`.

Its GPU is not stated, so every unit cost is fitted: on some rows, then the others are predicted. A row is tokens a
second of whole runs: prefill and decoding, divided by the new tokens (the source's benchmark times both together).
"""

from collections.abc import Callable
from dataclasses import replace

from spd.config import SHAPES
from spd.timing.calibration import Calibration, Observation, errors, fit, worst
from spd.timing.machines import read_profile, ring_bytes
from spd.timing.work import Pass, Work

SHAPE, PROMPT, NEW = "llama3.1-70b", 1024, 512  # the source's script: 1024 tokens in, 512 out
SPLITS: dict[str, Callable[[dict], bool]] = {  # which rows are predicted, not fitted
    "batch 16 held out": lambda label: label["batch"] == 16,
    "batch 64 held out": lambda label: label["batch"] == 64,
}


def observations() -> list[Observation]:
    """One a row of the table: seconds of a step of the whole batch, and the mean work of one."""
    return [_observation(row) for row in read_profile("decode_70b")]


def _observation(row: dict[str, str]) -> Observation:
    batch, tp, link = int(row["batch"]), int(row["tp"]), f"P2P {row['p2p']}"
    prefill = Pass(SHAPES[SHAPE], tp, batch, PROMPT)
    decode = Pass(SHAPES[SHAPE], tp, batch, 1, PROMPT + (NEW - 1) / 2)
    syncs = 2 * SHAPES[SHAPE].num_blocks * (row["variant"] == "standard")
    moved = syncs * (ring_bytes(prefill.payload, tp) + (NEW - 1) * ring_bytes(decode.payload, tp)) / NEW
    label = {"variant": row["variant"], "p2p": row["p2p"], "batch": batch, "tp": tp}
    work = (_work(prefill) + _work(decode) * (NEW - 1)) * (1 / NEW)
    return Observation(label, work, {(link, tp): syncs}, {link: moved}, batch / float(row["tokens_per_s"]))


def _work(a_pass: Pass) -> Work:
    """Of a pass in the source's engine, where every GPU computes the whole head and no logits are gathered."""
    part, whole = (replace(a_pass, tp=tp).ends()[-1].work for tp in (a_pass.tp, 1))
    return a_pass.work() + whole + part * -1


def decode_check() -> dict:
    """Errors of every split and of each row predicted from all others, and what was fitted to all rows."""
    rows = observations()
    checks = {name: _split(rows, [o for o in rows if held(o.label)]) for name, held in SPLITS.items()}
    alone = [_split(rows, [row])["predicted"][0] for row in rows]
    checks["each row held out in turn"] = {"fitted": [], "predicted": alone, **_summary([], alone)}
    return {"checks": checks, "costs": describe(fit(rows)), "rows": len(rows)}


def _split(rows: list[Observation], held_out: list[Observation]) -> dict:
    kept = [row for row in rows if row not in held_out]
    calibration = fit(kept)
    fitted, predicted = errors(calibration, kept), errors(calibration, held_out)
    return {"fitted": fitted, "predicted": predicted, **_summary(fitted, predicted)}


def _summary(fitted: list[dict], predicted: list[dict]) -> dict:
    mean = sum(abs(row["error"]) for row in predicted) / len(predicted)
    return {"worst_fitted": worst(fitted), "worst_predicted": worst(predicted), "mean_predicted": mean}


def describe(calibration: Calibration) -> dict:
    """Fitted costs in the units people know: bandwidths, rates, latencies."""
    costs, links = calibration.costs, calibration.links
    return {
        "operator_us": 1e6 * costs.operator,
        "matrix_tflops": _inverse(costs.flop, 1e-12),
        "matrix_vector_tb_per_s": _inverse(costs.weight_byte, 1e-12),
        "matrix_matrix_tb_per_s": _inverse(costs.weight_byte + costs.batched_weight_byte, 1e-12),
        "links": {name: {"latency_us": {str(d): 1e6 * s for d, s in link.latencies.items()},
                         "ring_gb_per_s": _inverse(link.ring_byte, 1e-9)} for name, link in links.items()},
    }  # fmt: skip


def _inverse(cost: float, unit: float) -> float | None:
    """Units a second; None where the fit found the work free."""
    return unit / cost if cost else None
