"""What joins GPUs: all-reduces by bytes, of links by formula, of published tables, of links that have a name."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.interpolate import PchipInterpolator

from spd.comm import Link
from spd.errors import SPDError, one_of
from spd.machines import gpu_row, interpolate, read_profile


@dataclass(frozen=True)
class AllReduce:
    """A function from bytes to seconds, for a number of processes, with a name."""

    name: str
    seconds: Callable[[float], float]
    nodes: int = 1
    halved: Callable[[float], float] | None = None  # seconds of two halves of it; None: each is one of half the bytes

    def __call__(self, payload: float) -> float:
        return self.seconds(payload)

    def rounded(self, payload: float) -> float:
        """Of a sync in few bits: all to their owners, and from these to all (`Shards.rounded_sum`), of packed bytes.

        Each moves half as much as an all-reduce and is timed as one of half the bytes, as nobody's table has them: the
        least time is paid twice. Where a link is emulated each has half of its latency, which `halved` says.
        """
        return 2 * self(payload / 2) if self.halved is None else self.halved(payload)


def link_all_reduce(link: Link, tp: int) -> AllReduce:
    """A ring of `tp` whose slowest hop is `link`."""

    def seconds(payload: float) -> float:
        return link.all_reduce_seconds(payload, tp)

    return AllReduce(link.spec, seconds, halved=seconds)


def fitted_all_reduce(latencies: dict[int, float], ring_byte: float, tp: int, name: str = "calibrated") -> AllReduce:
    """One latency (seconds) a degree, one cost (seconds) of a byte that the ring moves."""
    if tp > 1 and tp not in latencies:
        known = ", ".join(map(str, sorted(latencies))) or "none"
        raise SPDError(f"The calibration has no all-reduce over tp={tp}; degrees calibrated: {known}.")
    latency = latencies[tp] if tp > 1 else 0.0  # and the ring moves nothing
    return AllReduce(name, lambda payload: latency + ring_bytes(payload, tp) * ring_byte)


def followed_by(first: AllReduce, second: AllReduce) -> AllReduce:
    """One after the other, of the same bytes."""

    def halved(payload: float) -> float:
        return first.rounded(payload) + second.rounded(payload)

    name = f"{first.name}, then {second.name}"
    return AllReduce(name, lambda payload: first(payload) + second(payload), halved=halved)


NOTHING_TO_REDUCE = AllReduce("none", lambda payload: 0.0)


def measured_all_reduce(gpu_name: str, tp: int, nodes: int) -> AllReduce:
    """NCCL's on the nodes that a named GPU comes in, read as a table; or the named link that joins it in a node."""
    if tp == 1:
        return NOTHING_TO_REDUCE
    system, link = (gpu_row(gpu_name)[key] for key in ("all_reduce_system", "link"))
    if link and nodes == 1:
        return preset_all_reduce(link, tp)
    return AllReduce(
        f"NCCL measured on {system}, {nodes} x {tp // nodes}", as_table(*all_reduce_table(gpu_name, tp, nodes))
    )


def as_table(sizes: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds by bytes, interpolated in the logarithms of both; beyond it the least size's, and the last bandwidth."""

    def interpolated(payload: float) -> float:
        within = float(np.exp(interpolate(payload, sizes, np.log(seconds))))
        return within * max(1, payload / sizes[-1])

    return interpolated


def as_curve(sizes: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """The same by a monotone cubic, which a table of few sizes is nearer to at those between."""
    curve = PchipInterpolator(np.log(sizes), np.log(seconds))

    def interpolated(payload: float) -> float:
        within = float(np.exp(curve(np.log(np.clip(payload, sizes[0], sizes[-1])))))
        return within * max(1, payload / sizes[-1])

    return interpolated


@cache
def all_reduce_table(gpu_name: str, tp: int, nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes and seconds of NCCL's all-reduces over `tp` GPUs spread evenly over `nodes`."""
    system, tables = gpu_row(gpu_name)["all_reduce_system"], {}
    for row in read_profile("all_reduce_a100"):
        if row["system"] == system:
            table = tables.setdefault((int(row["workers"]), int(row["workers"]) // int(row["devices_per_node"])), [])
            table.append((float(row["bytes"]), 1e-6 * float(row["all_reduce_us"])))
    if (tp, nodes) not in tables:
        known = ", ".join(f"tp={w} on {n} node{'s' * (n > 1)}" for w, n in tables) or "none"
        raise SPDError(
            f"No all-reduce table for {gpu_name} with tp={tp} on {nodes} node{'s' * (nodes > 1)} (measured: {known}); "
            f"give the link as --link BANDWIDTH,LATENCY, as in '25GBps,10us', or by name ({', '.join(presets())})."
        )
    return tuple(zip(*sorted(tables[tp, nodes]), strict=True))


@cache
def presets() -> dict[str, list[dict[str, str]]]:
    """Links by name: for each number of GPUs it was measured with, what and who measured it; or one formula."""
    found = {}
    for row in read_profile("presets"):
        found.setdefault(row["preset"], []).append(row)
    return found


def formula(name: str) -> Link | None:
    """The slowest hop of a link given as `10GBps,20us`, or of a name that stands for a formula."""
    found = name if "," in name else presets().get(name, [{}])[0].get("formula")
    return Link.parse(found) if found else None


@cache
def preset_table(name: str, devices: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes and seconds of a preset's all-reduces, marked outliers left out."""
    rows = [row for row in read_profile("links") if (row["preset"], row["devices"]) == (name, devices)]
    kept = [(float(row["bytes"]), 1e-6 * float(row["us"])) for row in rows if not row["note"].startswith("outlier")]
    return tuple(zip(*sorted(kept), strict=True))


def preset_all_reduce(name: str, tp: int, nodes: int | None = None) -> AllReduce:
    """That of the table with the number of GPUs nearest to `tp`, at payloads whose ring moves as many bytes."""
    rows = presets()[one_of("link", name, presets())]
    if tp == 1:
        return NOTHING_TO_REDUCE
    if link := formula(name):
        return replace(link_all_reduce(link, tp), name=f"{name}, by formula {link.spec}")
    row = min(rows, key=lambda one: abs(np.log(int(one["devices"]) / tp)))
    if nodes not in (None, int(row["nodes"])):
        raise SPDError(f"The link {name} was measured on {row['nodes']} node(s), so --nodes {nodes} is not what it is.")
    told = f"{name}: {row['all_reduce']} on {row['system']}"
    return scaled_all_reduce(told, int(row["devices"]), preset_table(name, row["devices"]), tp, int(row["nodes"]))


def scaled_all_reduce(
    name: str, devices: int, table: tuple[Sequence[float], Sequence[float]], tp: int, nodes: int = 1
) -> AllReduce:
    """A table (bytes, seconds) of some number of GPUs for `tp`, read where its ring moves as many bytes."""
    seconds, scale = as_curve(*table), ring_bytes(1, tp) / ring_bytes(1, devices)
    told = name if scale == 1 else f"{name}, read for {tp}"
    return AllReduce(told, lambda payload: seconds(scale * payload), nodes)


def preset_errors() -> list[dict]:
    """A row a preset and number of GPUs: who measured it, and how far off each size is when it is left out."""
    found = []
    for name, row in ((name, row) for name, rows in presets().items() for row in rows):
        told = {key: int(row[key]) if row[key] else None for key in ("devices", "nodes")}
        told = {"link": name, **told, **{key: row[key] for key in ("system", "all_reduce", "formula", "source")}}
        errors = left_out_errors(*preset_table(name, row["devices"])) if row["devices"] else []
        worst = max(errors, default=None)
        found.append({**told, "median_error": float(np.median(errors)) if errors else None, "worst_error": worst})
    return found


def left_out_errors(sizes: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Relative errors, without sign, of each size read from all others."""
    found = []
    for i, (size, measured) in enumerate(zip(sizes, seconds, strict=True)):
        others = [(*values[:i], *values[i + 1 :]) for values in (sizes, seconds)]
        found.append(abs(as_curve(*others)(size) / measured - 1))
    return found


def ring_bytes(payload: float, participants: int) -> float:
    """Bytes that a ring moves over its slowest hop: 2 (n-1)/n of the payload."""
    return 2 * (participants - 1) / participants * payload


def all_reduce_over(link: str, tp: int, nodes: int | None = None, labels: Iterable[str] = ()) -> AllReduce:
    """Of a link's name (`labels`: what else would be one), or of its slowest hop and latency as in `10GBps,20us`."""
    if "," in link:
        return link_all_reduce(Link.parse(link), tp)
    if link in presets():
        return preset_all_reduce(link, tp, nodes)
    known = ", ".join([*labels, *presets()])
    raise SPDError(f"'{link}' is not a link; give BANDWIDTH,LATENCY as in '10GBps,20us', or one of {known}.")
