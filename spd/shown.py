"""What of a record MLflow is shown: parameters, metrics, and the few numbers by which reproductions are compared."""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PLUMBING = ("model", "records", "reproduction", "out", "mlflow", "sensitivity", "repairs")  # options of no influence
HEADLINE_PERCENTAGES = (50, 100)
STEPS = ("blocks", "blocks_dropped", "index")  # of a point on a curve, the first that it has
CURVES = ("perplexity", "average/acc", "sensitivity", "ttft_ms/median", "percent")  # which the parent run shows as well


def params(record: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a stage's run: the options under `config/`, model, data, tp, plan letters, machine, versions."""
    hardware, config = record["hardware"], {f"config/{key}": value for key, value in record["config"].items()}
    machine = {"cpu": hardware["cpu"], "cores": hardware["cores"], "gpus": ", ".join(hardware["gpus"])}
    package = {f"version/{name}": version for name, version in record["versions"].items()}
    named = {"command": record["command"], "tp": record["tp"], "plan": record["plan"] or record["result"].get("plan")}
    data = {f"data/{key}": value for key, value in (record["data"] or {}).items()}
    return _texts({**named, **_model_params(record), **data, **machine, **config, **package})


def parent_params(record: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that a reproduction's run takes from a stage: the model, and the stage's options by its name."""
    options = {f"{record['command']}/{k}": v for k, v in record["config"].items() if k not in PLUMBING}
    return _texts({**_model_params(record), **(options if record["model"] else {})})


def _model_params(record: Mapping[str, Any]) -> dict[str, Any]:
    model = dict(record["model"] or {})
    if "name" in model:  # not the folder it lies in, so that the same model has the same name everywhere
        model["name"] = Path(str(model["name"])).name
    return {"model" if key == "name" else f"model/{key}": value for key, value in model.items()}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    flat = {_key(key): value for key, value in _flatten(values)}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flat.items()
        if value not in ("", [])
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    return re.sub(r"[^\w .:/-]", "_", name)[:250]


# ---------------------------------------------------------------- metrics


def metrics(result: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """MLflow metrics (name, value, step) of a result document.

    A number is a metric at step 0. A list of fractional numbers (`sensitivity`) is a curve over its index: the block.
    A list of objects (`curve`, `plans`, `blocks`) is a set of curves whose step is the number of blocks dropped, or
    the block's index, with the percentage as a metric of its own; `curve/zs/perplexity` names the strategy.
    """
    return [(_key(name), value, step) for name, value, step in _metrics(result, "", 0)]


def _metrics(values: Mapping[str, Any], prefix: str, step: int) -> Iterator[tuple[str, float, int]]:
    for key, value in values.items():
        if _is_number(value):
            yield f"{prefix}{key}", float(value), step
        elif isinstance(value, Mapping):
            yield from _metrics(value, f"{prefix}{key}/", step)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield from _curves(value, f"{prefix}{key}/")
        elif isinstance(value, list) and any(isinstance(item, float) for item in value) and all(map(_is_number, value)):
            yield from ((f"{prefix}{key}", float(item), index) for index, item in enumerate(value))


def _curves(points: Iterable[Mapping[str, Any]], prefix: str) -> Iterator[tuple[str, float, int]]:
    for position, point in enumerate(points):
        key = next((k for k in STEPS if type(point.get(k)) is int), None)
        step = position if key is None else point[key]
        name = f"{prefix}{point['strategy']}/" if isinstance(point.get("strategy"), str) else prefix
        if "blocks_dropped" in point and isinstance(point.get("plan"), str):
            point = {"percent": _percent(point), **point}
        yield from _metrics({k: v for k, v in point.items() if k != key}, name, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _percent(plan: Mapping[str, Any]) -> float:
    return 100 * plan["blocks_dropped"] / len(plan["plan"].split())


def curves(result: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Those of `metrics` that a reproduction's run shows as well, to be drawn over those of another reproduction."""
    shown = (found for found in metrics(result) if found[0].startswith(("curve/", "plans/", "sensitivity")))
    return [found for found in shown if found[0].endswith(CURVES)]


# ---------------------------------------------------------------- headline


def headline(record: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of a record by which reproductions are compared, of other models and degrees too.

    Perplexity (and accuracy, where it was measured) with nothing dropped, and at 50 and 100 % by strategy; TTFT and
    what dropping takes off it; the spread of the sensitivities; the share of each class; what the stage took.
    """
    result, command = record["result"], record["command"]
    of = {"sensitivity": _of_sensitivity, "plan": _of_plan, "sweep": _of_sweep, "bench": _of_bench}
    found = of.get(command, _of_scores)(result)
    return {_key(name): value for name, value in found.items()} | {f"seconds/{command}": record["seconds"]}


def _of_sensitivity(result: Mapping[str, Any]) -> dict[str, float]:
    values = result["sensitivity"]
    return {f"sensitivity/{f.__name__}": f(values) for f in (max, statistics.median, min)}


def _of_plan(result: Mapping[str, Any]) -> dict[str, float]:
    classes = result["classes"]
    return {f"blocks_percent/{name}": 100 * classes.count(name) / len(classes) for name in ("ISB", "SB", "ESB")}


def _of_sweep(result: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for point in result["curve"]:
        at = "full" if point["blocks"] == 0 else f"{point['strategy']}_{point['percent']:g}"
        if point["blocks"] == 0 or point["percent"] in HEADLINE_PERCENTAGES:
            found[f"perplexity/{at}"] = point["perplexity"]
            if "average" in point:  # of the tasks that were asked for
                found[f"accuracy/{at}"] = point["average"]["acc"]
    full = found.get("perplexity/full")
    rises = {name.split("/")[1]: value for name, value in found.items() if name.startswith("perplexity/") and full}
    return found | {f"rise_percent/{at}": 100 * (value / full - 1) for at, value in rises.items() if at != "full"}


def _of_bench(result: Mapping[str, Any]) -> dict[str, float]:
    times = {_percent(plan): plan["ttft_ms"]["median"] for plan in result["plans"]}
    if 0 not in times:
        return {}
    found = {"ttft_ms/full": times[0]}
    for percent in HEADLINE_PERCENTAGES:
        if percent in times:
            found |= {f"ttft_ms/{percent}": times[percent]}
            found |= {f"ttft_reduction_percent/{percent}": 100 * (1 - times[percent] / times[0])}
    return found


def _of_scores(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: result[key] for key in ("perplexity", "perplexity_before", "perplexity_after")
            if _is_number(result.get(key))}  # fmt: skip
