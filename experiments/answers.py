"""Does tensor parallelism pay on a link, and what is best left out? LLaMA2-70B predicted, SmolLM2 as records have it.

The planner's mix is planned on SmolLM2's scores with LLaMA2-70B's times, and carried over by the share of each policy.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from spd.cli import main
from spd.config import SHAPES, ModelConfig
from spd.latency import Site, plan_at
from spd.options import SENSITIVITY, command, option
from spd.plan import DROP, FULL, Plan
from spd.planner import read_sensitivity
from spd.records import load_records
from spd.targets import PHASES, Choices

SHAPE, GPU, TP, NATS, NEW = "llama2-70b", "a100", 8, 0.05, 16
LINKS = {"NVLink": "nvlink3", "PCIe, P2P": "pcie5-p2p", "PCIe, no P2P": "pcie4-no-p2p", "two nodes": "ib-2x4"}
LINKS |= {"25 GbE": "tcp-25gbe", "10 GbE": "tcp-10gbe"}
ASKED = {"TTFT of 128": ("prefill", 1, 128), "TTFT of 2048": ("prefill", 1, 2048)}  # phase, batch, prompt
ASKED |= {"token, batch 1": ("decode", 1, 1024), "token, batch 32": ("decode", 32, 1024)}
FRONTS = ("NVLink", "PCIe, no P2P", "two nodes", "10 GbE"), {"prefill": (8, 2048), "decode": (1, 128)}
ALONE = {  # which policies are allowed at a point (0: attention, 1: MLP)
    "SPD alone": lambda policy, point: policy == DROP and point == 0,
    "few bits alone": lambda policy, point: policy.bits is not None,
    "mixed": lambda policy, point: True,
}


def carried(plan: Plan, blocks: int) -> Plan:
    """The same share of each policy in so many blocks: places change no time, and the last point is full."""
    points = sorted((policy for pair in plan.blocks for policy in pair), key=lambda policy: policy.letter)
    spread = [points[i * len(points) // (2 * blocks)] for i in range(2 * blocks)]
    return Plan(tuple(zip(spread[::2], spread[1::2], strict=True)))


def predicted(scores: dict) -> Iterator[dict]:
    """Of LLaMA2-70B: times of every way on every link, and of the mix what it is estimated to lose on SmolLM2."""
    config, scored = SHAPES[SHAPE], replace(SHAPES[SHAPE], num_blocks=len(scores["attention"]["drop"]))
    for (link, name), (asked, (phase, batch, prompt)) in product(LINKS.items(), ASKED.items()):
        made, kind = Site(GPU, link=name).prediction(config, TP, batch, prompt, NEW), PHASES[phase]
        choices = Choices.of(scores, replace(made, config=scored), phase)
        mix = choices.best(nats=NATS)
        ways = {"all full": made.full} | {f"SPD {share} %": plan_at(len(made.full), share) for share in (50, 90)}
        ways |= {"4 bits kept": made.full.sending(bits=4), "planner's mix": carried(mix, len(made.full))}
        ways["no communication"] = None
        for way, plan in ways.items():
            found = {"mix": str(mix), "estimated": choices.loss(mix)} if way == "planner's mix" else {}
            found |= made.time(kind, plan).against(made.time(kind, made.full))
            yield {"link": link, "over": made.all_reduce.name, "asked": asked, "way": way, **found}


def fronts(scores: dict, config: ModelConfig, tp: int, measured: list[dict]) -> Iterator[dict]:
    """Of the scored model: least estimated loss by predicted time, and measured losses at that."""
    for link, (phase, sizes) in product(FRONTS[0], FRONTS[1].items()):
        made, kind = Site(GPU, link=LINKS[link]).prediction(config, tp, *sizes, NEW), PHASES[phase]
        choices, seconds = Choices.of(scores, made, phase), made.time(kind, made.full).total
        mine = [row for row in measured if row["way"] == "zs" and row["text"] == measured[-1]["text"]]
        rows = [("measured", Plan.from_letters(row["plan"]), row["lost"]) for row in mine]
        for way, allowed in ALONE.items():
            kept = [[p == FULL or allowed(p, n % 2) for p in choices.policies] for n in range(len(choices.losses))]
            some = replace(choices, losses=np.where(kept, choices.losses, np.inf))
            plans = filter(None, (some.best(seconds=s) for s in np.linspace(some.rest, seconds, 30)))
            rows += [(way, plan, some.loss(plan)) for plan in dict.fromkeys(plans)]
        for way, plan, nats in rows:
            ms = 1e3 * made.time(kind, plan).total
            yield {"link": link, "phase": phase, "way": way, "ms": ms, "nats": nats, "plan": str(plan)}


def measured(records: list[dict], fingerprint: str, tp: int) -> list[dict]:
    """Losses of a model's plans, in nats over full on the same windows: of `sweep`, `policies` and `eval` records.

    `way` is the strategy that repaired the plan, `zs` for none, or how bits were rounded where not to the nearest.
    """
    found, full, of = [], {}, ("sweep", "policies", "eval")
    mine = [r for r in records if r["tp"] == tp and (r["model"] or {}).get("fingerprint") == fingerprint]
    for record in (r for r in mine if r["command"] in of):
        result, data = record["result"], str(record["data"])
        same = {"record": record["id"], "data": data, "text": Path((record["data"] or {}).get("text", "")).stem}
        for row in result.get("curve") or result.get("policies") or [result] * (record["command"] == "eval"):
            rounded = row.get("name", "").partition("kept, ")[2].replace("kept", "")
            folder = Path(record["config"].get("plan") or ".json") if record["command"] == "eval" else Path(".json")
            repaired = "" if folder.name.endswith(".json") else "repaired"
            way = row.get("strategy") or rounded or repaired or "zs"
            found.append({"way": way, "plan": row["plan"], "nats": row["nats"], **same})
            full |= {data: row["nats"]} if not set(row["plan"]) - set("F ") else {}
    return [row | {"lost": row["nats"] - full[row["data"]]} for row in found if row["data"] in full]


def timed(records: list[dict], fingerprint: str) -> Iterator[dict]:
    """Of a model's `bench` records over emulated links: every plan's medians (ms), everything full's first."""
    for record in records:
        result = record["result"]
        if record["command"] == "bench" and result["link"] and record["model"]["fingerprint"] == fingerprint:
            same = {key: result[key] for key in ("link", "tp", "batch", "prompt_len")}
            for row in (result["bounds"]["all_full"], *result["plans"]):
                medians = {f"{kind}_ms": (row[f"{kind}_ms"] or {}).get("median") for kind in ("ttft", "tpot")}
                yield same | {"plan": row["plan"], **medians}


@command(
    SENSITIVITY,
    option("--model", "The model that the scores are of.", required=True, metavar="DIR|HUB_ID"),
    option("--measured", "Records of what was measured on it.", Path, Path("experiments/records")),
)
def answers(session) -> None:
    """What ways to spare communication take on LLaMA2-70B over links, by prediction, and lose on SmolLM2, measured."""
    o, scored = session.options, read_sensitivity(session.options.sensitivity)
    config, described, _ = session.shape()
    records, fingerprint = load_records([o.measured]), scored["model"]["fingerprint"]
    known = measured(records, fingerprint, scored["tp"])
    result = {"predicted": [*predicted(scored["scores"])], "measured": known, "nats": NATS, "gpu": GPU, "shape": SHAPE}
    result["timed"] = [*timed(records, fingerprint)]
    result["fronts"] = [*fronts(scored["scores"], config, scored["tp"], known)]
    session.publish(result, described, scored.get("data"), scored["tp"])


if __name__ == "__main__":
    main(answers)
