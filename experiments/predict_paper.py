"""The paper's latency figures predicted: figure 2, figure 7's speedup panels, and its claims beside them.

Two regimes. `lean`: the operator table without launch time (CUDA graphs) and the links as measured or as stated.
`paper`: what the paper's own numbers imply, fitted: each link to figure 2's axis, launch time to one claim. That claim
(19.7 %) is called a speedup in the text and a latency reduction in the abstract, so the fit is made for both readings.

The latency model against a decode benchmark of a 70B made by others, `profiles/decode_70b.csv`.

Its GPU is not stated, so every unit cost is fitted: on some rows, then the others are predicted. A row is tokens a
second of whole runs: prefill and decoding, divided by the new tokens (the source's benchmark times both together).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from reference import reference

from spd.calibrate import Calibration, Observation, errors, fit, worst
from spd.cli import main
from spd.comm import Link
from spd.config import SHAPES
from spd.errors import SPDError
from spd.latency import Prediction, Setting, parts_ms, syncs_at
from spd.machines import AllReduce, Pass, Slower, Work, gpu, measured_all_reduce, read_profile, ring_bytes
from spd.options import OUTPUT, command

# ---------------------------------------------------------------- The latency model against a decode benchmar


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


# ---------------------------------------------------------------- The paper's latency figures predicted: figu


GPU = "a100"
LEAN = "lean"
READINGS = ("reduction", "speedup")  # of the claim that the launch time is fitted to
HEAT_POINTS = 41  # a side of the heat map
HEAT_PERCENT = 70
HEAT_SHAPE = "llama2-70b"
GB = 1e9


# ---------------------------------------------------------------- links


def stated_link(setting: str) -> Link:
    """The slowest hop that the paper states for a setting, with the least latency measured on as many nodes."""
    latency = _measured(setting).latency
    bandwidth = reference()["settings"][setting]["slowest_hop"]
    return Link.parse(f"{bandwidth},{1e6 * latency:g}us")


def lean_link(setting: str) -> AllReduce:
    """NCCL's table for HBW; for LBW the slower of it and the ring over the stated slowest hop."""
    return _measured(setting) if setting.endswith("HBW") else Slower(_measured(setting), stated_link(setting))


def _measured(setting: str):
    return measured_all_reduce(GPU, reference()["tp"], reference()["settings"][setting]["nodes"])


def axis_fill() -> float:
    """How much of its axis figure 2's bar fills at 0 % on 1x8 HBW, where NCCL's table says how long it is."""
    axis = reference()["figure2"]["axis_upper_ms"]["1x8 HBW"]
    return _transfer_ms(_measured("1x8 HBW"), 0) / axis


def fitted_link(setting: str, fill: float | None = None) -> AllReduce:
    """A link on which figure 2's bar at 0 % fills `fill` of its axis (as 1x8 HBW's does, if left out)."""
    if setting == "1x8 HBW":
        return _measured(setting)
    seconds = 1e-3 * (fill or axis_fill()) * reference()["figure2"]["axis_upper_ms"][setting]
    a_pass, latency = _figure2_pass(), _measured(setting).latency
    each = seconds / (2 * a_pass.config.num_blocks)
    bandwidth = ring_bytes(a_pass.payload, a_pass.tp) / (each - latency)
    return Link(bandwidth, latency, f"{bandwidth / GB:.3g}GBps,{1e6 * latency:.3g}us")


def _figure2_pass() -> Pass:
    ref = reference()
    return Pass(SHAPES[ref["figure2"]["shape"]], ref["tp"], ref["batch"], ref["prompt_len"])


def _transfer_ms(all_reduce: AllReduce, percent: float) -> float:
    a_pass = _figure2_pass()
    return 1e3 * syncs_at(a_pass.config, percent) * all_reduce.all_reduce_seconds(a_pass.payload, a_pass.tp)


# ---------------------------------------------------------------- regimes


def prediction(shape: str, setting: str, launch: float | None) -> Prediction:
    """Of the lean regime where `launch` (seconds an operator) is None, else of the paper's."""
    ref = reference()
    link = lean_link(setting) if launch is None else fitted_link(setting)
    machine = gpu(GPU, launch or 0.0)
    return Prediction(Setting(SHAPES[shape], machine, link, ref["tp"], ref["batch"], ref["prompt_len"]))


def gain_percent(row: dict, reading: str) -> float:
    """Speedup t_0/t_p - 1 or reduction 1 - t_p/t_0, in percent."""
    return 100 * (row["speedup"] - 1 if reading == "speedup" else row["reduction"])


def fitted_launch(reading: str) -> float:
    """Seconds an operator that give the paper's one equality (70B, 1x8 LBW, 70 %) under a reading of it.

    With T the time of the all-reduces kept at 0 %, d of those dropped and g the gain, the whole takes
    d / g (reduction) or d (1 + g) / g (speedup); what is neither device time nor T is launch.
    """
    claim = next(c for c in reference()["claims"] if c["relation"] == "=")
    lean = prediction(claim["models"][0], claim["settings"][0], 0.0)
    full, dropped = (lean.dropping("ttft", p) for p in (0, claim["percent"]))
    saved, g = full.total - dropped.total, claim["value"] / 100
    whole = saved / g if reading == "reduction" else saved * (1 + g) / g
    operators = lean.passes["ttft"].work().operators
    if whole < full.total:
        raise SPDError("The paper's claim is larger than its link alone explains: no launch time fits it.")
    return (whole - full.total) / operators


def regimes() -> dict[str, float | None]:
    """Launch time (seconds an operator) by regime; None for the lean one."""
    return {LEAN: None} | {f"paper, as {reading}": fitted_launch(reading) for reading in READINGS}


def reading_of(regime: str) -> str:
    return next((reading for reading in READINGS if regime.endswith(reading)), "speedup")


# ---------------------------------------------------------------- figures' numbers


def figure2() -> list[dict]:
    """Transfer time (ms) by percentage for each setting and kind of link, beside the upper end of the axis."""
    ref, rows = reference(), []
    for setting in ref["settings"]:
        links = {"stated": stated_link(setting), "measured": _measured(setting), "fitted": fitted_link(setting)}
        if setting.endswith("LBW"):
            del links["measured"]  # NCCL's tables have no machine with slow links
        axis = ref["figure2"]["axis_upper_ms"][setting]
        for percent in _percentages(ref["figure2"]["percent"]):
            rows.append({"setting": setting, "percent": percent, "axis_upper_ms": axis}
                        | {f"{kind}_ms": _transfer_ms(link, percent) for kind, link in links.items()})  # fmt: skip
    return rows


def _percentages(listed: Sequence[float]) -> list[float]:
    return sorted({0, *listed})


def figure7() -> list[dict]:
    """TTFT, reduction and speedup by percentage for each model, setting and regime."""
    ref, rows = reference(), []
    for regime, launch in regimes().items():
        for shape in ref["models"]:
            for setting in ref["settings"]:
                predicted = prediction(shape, setting, launch)
                for percent in _percentages(ref["figure7"]["percent"][shape]):
                    rows.append({"regime": regime, "shape": shape, "setting": setting, "percent": percent}
                                | predicted.compare("ttft", percent))  # fmt: skip
    return rows


def figure7_summary() -> list[dict]:
    """A line a model, setting and regime: TTFT at 0 %, reduction and speedup at 70 and 100 %, and the ceiling."""
    rows = []
    for regime, launch in regimes().items():
        for shape in reference()["models"]:
            for setting in reference()["settings"]:
                predicted = prediction(shape, setting, launch)
                row = {"regime": regime, "shape": shape, "setting": setting}
                full = predicted.compare("ttft", 0)
                row |= {"ttft_ms": full["ms"], "communication_share": full["communication_share"]}
                for percent in (70, 100):
                    at = predicted.compare("ttft", percent)
                    row |= {f"reduction_{percent}": at["reduction"], f"speedup_{percent}": at["speedup"]}
                rows.append(row | {"speedup_no_communication": predicted.bound("ttft")["speedup"]})
    return rows


def where_time_goes() -> list[dict]:
    """Milliseconds by part at 0 %, for each model, setting and of TTFT and TPOT, in the lean regime."""
    ref, rows = reference(), []
    for kind in ("ttft", "tpot"):
        for shape in ref["models"]:
            for setting in ref["settings"]:
                time = prediction(shape, setting, None).dropping(kind, 0)
                rows.append({"time": kind, "shape": shape, "setting": setting, "parts_ms": parts_ms(time)})
    return rows


def heat_map() -> dict:
    """TTFT and TPOT speedup of one model at one percentage over links of every bandwidth and latency (lean)."""
    bandwidths, latencies = _decades(1e9, 1e12), _decades(1e-6, 1e-3)
    predicted = prediction(HEAT_SHAPE, "1x8 HBW", None)
    speedup = {
        kind: [[predicted.compare(kind, HEAT_PERCENT, Link(b, a))["speedup"] for b in bandwidths] for a in latencies]
        for kind in ("ttft", "tpot")
    }
    marks = {s: asdict(stated_link(s)) for s in reference()["settings"]}
    marks |= {f"{s}, fitted": asdict(fitted_link(s)) for s in marks if s != "1x8 HBW"}
    return {"shape": HEAT_SHAPE, "percent": HEAT_PERCENT, "bandwidths": bandwidths, "latencies": latencies,
            "speedup": speedup, "marks": marks}  # fmt: skip


def _decades(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (i / (HEAT_POINTS - 1)) for i in range(HEAT_POINTS)]


# ---------------------------------------------------------------- claims


def claims() -> list[dict]:
    """Every claim about time, for each model and setting it covers: the paper's value, each regime's, whether it holds.

    A gain is read as the regime reads it: as a speedup in the lean one.
    """
    rows, launches = [], regimes()
    for claim in reference()["claims"]:
        for shape in claim["models"]:
            for setting in claim["settings"]:
                percent = _percent_of(claim, shape)
                paper = claim["value"][setting] if isinstance(claim["value"], dict) else claim["value"]
                row = {"where": claim["where"], "claim": claim["words"], "shape": shape, "setting": setting,
                       "percent": percent, "relation": claim["relation"], "paper": paper}  # fmt: skip
                for regime, launch in launches.items():
                    row[regime] = _claimed(claim["metric"], shape, setting, percent, regime, launch)
                    row[f"{regime}: difference"] = row[regime] - paper
                    row[f"{regime}: holds"] = holds(claim["relation"], row[regime], paper)
                rows.append(row)
    return rows


def _percent_of(claim: dict, shape: str) -> float:
    """Where a claim is looked up; `percent_above` is the figure's first percentage above it."""
    if "percent" in claim:
        return claim["percent"]
    return min(p for p in reference()["figure7"]["percent"][shape] if p > claim["percent_above"])


def _claimed(metric: str, shape: str, setting: str, percent: float, regime: str, launch: float | None) -> float:
    predicted = prediction(shape, setting, launch)
    if metric == "ttft_gain_percent":
        return gain_percent(predicted.compare("ttft", percent), reading_of(regime))
    full, dropped = (predicted.dropping("ttft", p).communication for p in (0, percent))
    return 1e3 * dropped if metric == "transfer_ms" else 100 * (1 - dropped / full)


def fits() -> dict:
    """What was fitted, to what, and how it moves when figure 2's bars fill their axes wholly."""
    settings = [s for s in reference()["settings"] if s != "1x8 HBW"]
    links = {s: {f"bandwidth_gb_per_s{suffix}": fitted_link(s, fill).bandwidth / GB
                 for suffix, fill in (("", None), ("_if_axis_full", 1.0))} for s in settings}  # fmt: skip
    for setting in settings:
        links[setting] |= {"stated": reference()["settings"][setting]["slowest_hop"],
                           "latency_us": 1e6 * _measured(setting).latency}  # fmt: skip
    a_pass = _figure2_pass()
    launch = {reading: fitted_launch(reading) for reading in READINGS}
    return {
        "axis_fill": axis_fill(),
        "links": links,
        "launch_us": {reading: 1e6 * seconds for reading, seconds in launch.items()},
        "launch_ms_a_block": {reading: 1e3 * s * len(a_pass.block()) for reading, s in launch.items()},
    }


def predict_paper() -> dict:
    """Everything the predicted figures and tables show, as one document."""
    return {
        "source": reference()["source"],
        "gpu": GPU,
        "asked": {key: reference()[key] for key in ("tp", "batch", "prompt_len")},
        "regimes": {name: None if launch is None else 1e6 * launch for name, launch in regimes().items()},
        "fits": fits(),
        "figure2": figure2(),
        "figure7": figure7(),
        "figure7_summary": figure7_summary(),
        "claims": claims(),
        "where_time_goes": where_time_goes(),
        "heat_map": heat_map(),
        "decode_check": decode_check(),
    }


def holds(relation: str, predicted: float, paper: float, tolerance: float = 0.05) -> bool:
    """Whether a claim holds; an equality within `tolerance` points."""
    return {"<": predicted < paper, ">": predicted > paper, "=": abs(predicted - paper) <= tolerance}[relation]


@command(*OUTPUT, name="predict-paper")
def predict(session) -> None:
    """The paper's latency figures (2 and 7) predicted for LLaMA2 7B, 13B and 70B, beside its claims."""
    session.publish(predict_paper())


if __name__ == "__main__":
    main(predict)
