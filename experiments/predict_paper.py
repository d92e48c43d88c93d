"""The paper's latency figures predicted: figure 2, figure 7's speedup panels, and its claims beside them.

Two regimes. `lean`: the operator table without launch time (CUDA graphs) and the links as measured or as stated.
`paper`: what the paper's own numbers imply, fitted: each link to figure 2's axis, launch time to one claim. That claim
(19.7 %) is called a speedup in the text and a latency reduction in the abstract, so the fit is made for both readings.

Beside them the latency model is held against a decode benchmark of a 70B made by others, `profiles/decode_70b.csv`,
whose GPU is not stated: tokens a second of whole runs, prefill and decoding together.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product

from reference import reference

from spd.calibrate import profile_decoding
from spd.cli import main
from spd.comm import Link
from spd.config import SHAPES
from spd.errors import SPDError
from spd.latency import Prediction, plan_at
from spd.links import AllReduce, all_reduce_table, link_all_reduce, measured_all_reduce, ring_bytes
from spd.machines import Pass, gpu, read_profile
from spd.options import command

PAPER = reference()
TP, SETTINGS = PAPER["tp"], PAPER["settings"]
GPU = "a100"
LEAN = "lean"
READINGS = ("reduction", "speedup")  # of the claim that the launch time is fitted to
HEAT_POINTS, HEAT_PERCENT, HEAT_SHAPE = 41, 70, "llama2-70b"  # points: a side of the heat map


def decode_check() -> dict:
    """What `spd profile` makes of the decode benchmark: costs fitted to all of it, and errors.

    `left_out` are those of each degree and batch, predicted from all others.
    """
    sizes = {"model": "llama2-70b", "prompt_len": 1024, "new_tokens": 512}  # those of the benchmark's script
    rows = []
    for row in read_profile("decode_70b"):
        syncs, link = 2 * (row["variant"] == "standard"), f"P2P {row['p2p']}"
        timed = {"tp": int(row["tp"]), "batch": int(row["batch"]), "tokens_per_s": float(row["tokens_per_s"])}
        rows.append(sizes | timed | {"link": link, "syncs_per_block": syncs})
    return profile_decoding(rows, "decode_70b")


def least_latency(setting: str) -> float:
    """Seconds: the shortest all-reduce measured on as many nodes."""
    return min(all_reduce_table(GPU, TP, SETTINGS[setting]["nodes"])[1])


def measured(setting: str) -> AllReduce:
    return measured_all_reduce(GPU, TP, SETTINGS[setting]["nodes"])


def stated_link(setting: str) -> Link:
    """The slowest hop that the paper states for a setting, with the least latency measured."""
    return Link.parse(f"{SETTINGS[setting]['slowest_hop']},{1e6 * least_latency(setting):g}us")


def lean_all_reduce(setting: str) -> AllReduce:
    """NCCL's table for HBW; for LBW the slower of it and the ring over the stated slowest hop, which sets the pace."""
    table, stated = measured(setting), link_all_reduce(stated_link(setting), TP)
    slower = AllReduce(f"{table.name}, or {stated.name}", lambda payload: max(table(payload), stated(payload)))
    return table if setting.endswith("HBW") else slower


def axis_fill() -> float:
    """How much of its axis figure 2's bar fills at 0 % on 1x8 HBW, where NCCL's table says how long it is."""
    return _transfer_ms(measured("1x8 HBW"), 0) / PAPER["figure2"]["axis_upper_ms"]["1x8 HBW"]


def fitted_link(setting: str, fill: float | None = None) -> Link:
    """A link on which figure 2's bar at 0 % fills `fill` of its axis (as 1x8 HBW's does, if left out)."""
    seconds = 1e-3 * (fill or axis_fill()) * PAPER["figure2"]["axis_upper_ms"][setting]
    a_pass, latency = _figure2_pass(), least_latency(setting)
    each = seconds / (2 * a_pass.config.num_blocks)
    bandwidth = ring_bytes(a_pass.payload, TP) / (each - latency)
    return Link(bandwidth, latency, f"{bandwidth / 1e9:.3g}GBps,{1e6 * latency:.3g}us")


def fitted_all_reduce(setting: str) -> AllReduce:
    """NCCL's table is what 1x8 HBW's axis is read by, so there it stands."""
    return measured(setting) if setting == "1x8 HBW" else link_all_reduce(fitted_link(setting), TP)


def _figure2_pass() -> Pass:
    return Pass(SHAPES[PAPER["figure2"]["shape"]], TP, PAPER["batch"], PAPER["prompt_len"])


def _transfer_ms(all_reduce: AllReduce, percent: float) -> float:
    a_pass = _figure2_pass()
    return 1e3 * plan_at(a_pass.config.num_blocks, percent).syncs() * all_reduce(a_pass.payload)


def prediction(shape: str, setting: str, launch: float | None) -> Prediction:
    """Of the lean regime where `launch` (seconds an operator) is None, else of the paper's."""
    all_reduce = lean_all_reduce(setting) if launch is None else fitted_all_reduce(setting)
    return Prediction(SHAPES[shape], gpu(GPU, launch or 0.0), all_reduce, TP, PAPER["batch"], PAPER["prompt_len"])


def fitted_launch(reading: str) -> float:
    """Seconds an operator that give the paper's one equality (70B, 1x8 LBW, 70 %) under a reading of it.

    With T the time of the all-reduces kept at 0 %, d of those dropped and g the gain, the whole takes
    d / g (reduction) or d (1 + g) / g (speedup); what is neither device time nor T is launch.
    """
    claim = next(c for c in PAPER["claims"] if c["relation"] == "=")
    without = prediction(claim["models"][0], claim["settings"][0], 0.0)
    full, dropped = (without.dropping("ttft", p).total for p in (0, claim["percent"]))
    saved, g = full - dropped, claim["value"] / 100
    whole = saved / g if reading == "reduction" else saved * (1 + g) / g
    if whole < full:
        raise SPDError("The paper's claim is larger than its link alone explains: no launch time fits it.")
    return (whole - full) / without.passes["ttft"].work().operator


def regimes() -> dict[str, float | None]:
    """Launch time (seconds an operator) by regime; None for the lean one."""
    return {LEAN: None} | {f"paper, as {reading}": fitted_launch(reading) for reading in READINGS}


def predictions() -> Iterator[tuple[dict, Prediction]]:
    """Those of each regime, model and setting, with their names."""
    for (regime, launch), shape, setting in product(regimes().items(), PAPER["models"], SETTINGS):
        yield {"regime": regime, "shape": shape, "setting": setting}, prediction(shape, setting, launch)


def figure2() -> list[dict]:
    """Transfer time (ms) by percentage for each setting and kind of link, beside the upper end of the axis."""
    rows = []
    for setting in SETTINGS:
        links = {"stated": link_all_reduce(stated_link(setting), TP), "fitted": fitted_all_reduce(setting)}
        if setting.endswith("HBW"):
            links["measured"] = measured(setting)  # NCCL's tables have no machine with slow links
        for percent in sorted({0, *PAPER["figure2"]["percent"]}):
            row = {"setting": setting, "percent": percent, "axis_upper_ms": PAPER["figure2"]["axis_upper_ms"][setting]}
            rows.append(row | {f"{kind}_ms": _transfer_ms(link, percent) for kind, link in links.items()})
    return rows


def figure7() -> list[dict]:
    """TTFT, reduction and speedup by percentage for each model, setting and regime."""
    return [
        {**of, "percent": percent, **predicted.compare("ttft", percent)}
        for of, predicted in predictions()
        for percent in sorted({0, *PAPER["figure7"]["percent"][of["shape"]]})
    ]


def figure7_summary() -> list[dict]:
    """A line a model, setting and regime: TTFT at 0 %, reduction and speedup at 70 and 100 %, and the ceiling."""
    rows = []
    for of, predicted in predictions():
        full = predicted.compare("ttft", 0)
        row = {**of, "ttft_ms": full["ms"], "communication_share": full["communication_share"]}
        for percent in (70, 100):
            at = predicted.compare("ttft", percent)
            row |= {f"{gain}_{percent}": at[gain] for gain in READINGS}
        rows.append(row | {"speedup_no_communication": predicted.bound("ttft")["speedup"]})
    return rows


def where_time_goes() -> list[dict]:
    """Milliseconds by part at 0 %, for each model, setting and of TTFT and TPOT, in the lean regime."""
    return [
        {"time": kind, "shape": shape, "setting": setting}
        | {"parts_ms": prediction(shape, setting, None).dropping(kind, 0).parts_ms()}
        for kind, shape, setting in product(("ttft", "tpot"), PAPER["models"], SETTINGS)
    ]


def heat_map() -> dict:
    """TTFT and TPOT speedup of one model at one percentage over links of every bandwidth and latency (lean)."""
    ends = (1e9, 1e12), (1e-6, 1e-3)
    bandwidths, latencies = ([a * (b / a) ** (i / (HEAT_POINTS - 1)) for i in range(HEAT_POINTS)] for a, b in ends)
    predicted = prediction(HEAT_SHAPE, "1x8 HBW", None)

    def speedup(kind: str, link: Link) -> float:
        return replace(predicted, all_reduce=link_all_reduce(link, TP)).compare(kind, HEAT_PERCENT)["speedup"]

    speedups = {kind: [[speedup(kind, Link(b, a)) for b in bandwidths] for a in latencies] for kind in ("ttft", "tpot")}
    marks = {s: asdict(stated_link(s)) for s in SETTINGS}
    marks |= {f"{s}, fitted": asdict(fitted_link(s)) for s in SETTINGS if s != "1x8 HBW"}
    found = {"shape": HEAT_SHAPE, "percent": HEAT_PERCENT, "bandwidths": bandwidths, "latencies": latencies}
    return {**found, "speedup": speedups, "marks": marks}


def claims() -> list[dict]:
    """Every claim about time, for each model and setting it covers: the paper's value, each regime's, whether it holds.

    A gain is read as the regime reads it: as a speedup in the lean one. A claim is looked up at its percentage, or at
    the first of figure 7 above `percent_above`.
    """
    rows, launches = [], regimes()
    for claim in PAPER["claims"]:
        for shape, setting in product(claim["models"], claim["settings"]):
            above = (p for p in PAPER["figure7"]["percent"][shape] if p > claim.get("percent_above", 0))
            percent = claim["percent"] if "percent" in claim else min(above)
            paper = claim["value"][setting] if isinstance(claim["value"], dict) else claim["value"]
            row = {"where": claim["where"], "claim": claim["words"], "shape": shape, "setting": setting}
            row |= {"percent": percent, "relation": claim["relation"], "paper": paper}
            for regime, launch in launches.items():
                ours = _claimed(claim["metric"], prediction(shape, setting, launch), percent, regime)
                row |= {regime: ours, f"{regime}: difference": ours - paper}
                row[f"{regime}: holds"] = holds(claim["relation"], ours, paper)
            rows.append(row)
    return rows


def _claimed(metric: str, predicted: Prediction, percent: float, regime: str) -> float:
    if metric == "ttft_gain_percent":
        row = predicted.compare("ttft", percent)
        return 100 * (row["reduction"] if regime.endswith("reduction") else row["speedup"] - 1)
    full, dropped = (predicted.dropping("ttft", p).communication for p in (0, percent))
    return 1e3 * dropped if metric == "transfer_ms" else 100 * (1 - dropped / full)


def holds(relation: str, predicted: float, paper: float, tolerance: float = 0.05) -> bool:
    """Whether a claim holds; an equality within `tolerance` points."""
    return {"<": predicted < paper, ">": predicted > paper, "=": abs(predicted - paper) <= tolerance}[relation]


def fits() -> dict:
    """What was fitted, to what, and how it moves when figure 2's bars fill their axes wholly."""
    links = {}
    for setting in SETTINGS:
        if setting != "1x8 HBW":
            fills = (("", None), ("_if_axis_full", 1.0))
            links[setting] = {f"bandwidth_gb_per_s{end}": fitted_link(setting, f).bandwidth / 1e9 for end, f in fills}
            links[setting] |= {"stated": SETTINGS[setting]["slowest_hop"], "latency_us": 1e6 * least_latency(setting)}
    launch, operators = {reading: fitted_launch(reading) for reading in READINGS}, len(_figure2_pass().block())
    return {
        "axis_fill": axis_fill(),
        "links": links,
        "launch_us": {reading: 1e6 * seconds for reading, seconds in launch.items()},
        "launch_ms_a_block": {reading: 1e3 * seconds * operators for reading, seconds in launch.items()},
    }


def predict_paper() -> dict:
    """Everything the predicted figures and tables show, as one document."""
    return {
        "source": PAPER["source"],
        "gpu": GPU,
        "asked": {key: PAPER[key] for key in ("tp", "batch", "prompt_len")},
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


@command(name="predict-paper")
def predict(session) -> None:
    """The paper's latency figures (2 and 7) predicted for LLaMA2 7B, 13B and 70B, beside its claims."""
    session.publish(predict_paper())


if __name__ == "__main__":
    main(predict)
