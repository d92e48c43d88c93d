"""A user's question to the latency model: this shape, on that machine, over this link."""

from pathlib import Path

from spd.comm import Link
from spd.config import ModelConfig, named_shape
from spd.errors import SPDError
from spd.timing.calibration import over_link, read_calibration
from spd.timing.latency import Setting, predict
from spd.timing.machines import AllReduce, FittedAllReduce, Machine, gpu, measured_all_reduce

DEFAULT_GPU = "a100"
COMPARED = ("percent", "ttft_ms", "tpot_ms", "communication_share", "reduction", "speedup")
ASSUMPTIONS = {
    "table": "Operator times of an A100 table; for other GPUs its efficiencies at their data sheet's peaks.",
    "calibration": "Unit costs of the calibration; no operator table.",
    "attention": "The attention core is counted from FLOPs and bytes at the output projection's efficiency.",
    "serial": "Nothing overlaps; a dropped sync point saves its all-reduce and nothing else.",
}


def ask(
    shape: str,
    percent: float | list[float],
    tp: int = 8,
    *,
    gpu_name: str | None = None,
    nodes: int = 1,
    link: str | None = None,
    calibration: Path | None = None,
    batch: int = 1,
    prompt_len: int = 128,
    new_tokens: int = 16,
    launch_us: float = 0.0,
) -> tuple[dict, ModelConfig]:
    """The document of `spd predict`, with what was assumed, and the shape.

    Of several percentages the document is the last one's; `percentages` has TTFT, TPOT, reduction and speedup of all.

    The machine is a named GPU (a100 if none is named) or a calibration. Its all-reduce is the link given (beside a
    calibration's own: emulated after it), else NCCL's measured table, else the calibration's.

    Raises:
        SPDError: unknown shape or GPU, malformed link, impossible tp, or no all-reduce known for it.
    """
    config = named_shape(shape)
    config.validate_tp(tp)
    if tp % nodes:
        raise SPDError(f"tp={tp} cannot be spread evenly over {nodes} nodes.")
    if calibration is not None and gpu_name is not None:
        raise SPDError("A calibration is a machine already; give either --gpu or --calibration.")
    if calibration is not None:
        machine, own = read_calibration(calibration)
        all_reduce, words = over_link(own, link), f"calibrated{f', then {link}' if link else ''}"
    else:
        machine = gpu(gpu_name or DEFAULT_GPU, 1e-6 * launch_us)
        all_reduce, words = _gpu_link(machine, tp, nodes, link)
    setting = Setting(config, machine, all_reduce, tp, batch, prompt_len, new_tokens)
    asked_for = percent if isinstance(percent, list) else [percent]
    results = [predict(setting, one) for one in asked_for]
    result = results[-1]
    if len(results) > 1:
        result["percentages"] = [{key: one[key] for key in COMPARED} for one in results]
    asked = {"shape": shape, "machine": machine.name, "nodes": nodes, "link": words, "batch": batch,
             "prompt_len": prompt_len, "new_tokens": new_tokens, "launch_us": launch_us}  # fmt: skip
    source = "table" if calibration is None else "calibration"
    return result | asked | {"assumptions": [ASSUMPTIONS[k] for k in (source, "attention", "serial")]}, config


def _gpu_link(machine: Machine, tp: int, nodes: int, link: str | None) -> tuple[AllReduce, str]:
    if link is not None:
        return Link.parse(link), link
    if tp == 1:
        return FittedAllReduce({}, 0.0), "none"
    measured = measured_all_reduce(machine.name, tp, nodes)
    return measured, measured.name
