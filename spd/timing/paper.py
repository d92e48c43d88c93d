"""The paper's latency figures predicted: figure 2, figure 7's speedup panels, and its claims beside them.

Two regimes. `lean`: the operator table without launch time (CUDA graphs) and the links as measured or as stated.
`paper`: what the paper's own numbers imply, fitted: each link to figure 2's axis, launch time to one claim. That claim
(19.7 %) is called a speedup in the text and a latency reduction in the abstract, so the fit is made for both readings.
"""

from collections.abc import Sequence
from dataclasses import asdict

from spd.comm import Link
from spd.config import SHAPES
from spd.errors import SPDError
from spd.reference import reference
from spd.timing.decode_check import decode_check
from spd.timing.latency import Prediction, Setting, parts_ms, syncs_at
from spd.timing.machines import AllReduce, Slower, gpu, measured_all_reduce, ring_bytes
from spd.timing.work import Pass

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
