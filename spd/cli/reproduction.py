"""Commands around a reproduction: what it needs, what it takes, and a stand-in for its model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import app
from spd.cli.options import RUNS, TP, Device, MLflow, Model, Records, Reproduction, Seed, open_session, say_if_dry
from spd.errors import SPDError


@app.command()
def preflight(
    context: typer.Context, model: Model, tp: TP = 1,
    texts: Annotated[list[str] | None, typer.Option("--text", help="Text that is read; again for more.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks that are evaluated, as arc_easy,piqa.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of their rows; left out: the hub.")] = None,
    device: Device = "cpu",
    processes: Annotated[int, typer.Option(help="Processes a node.", min=1)] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    folder: Annotated[Path, typer.Option(help="Where results will go.")] = RUNS,
    out: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
) -> None:  # fmt: skip
    """Check GPUs, memory, disk, weights, texts and tasks of a reproduction (--experiment) before anything long.

    Everything that is missing is said at once. Under torchrun with one process a node, every node is checked.
    """
    from spd.budget import Budget, needed
    from spd.launch import runtime
    from spd.preflight import Needs, missing
    from spd.track import write_json

    say_if_dry(context)
    experiment = context.obj.experiment
    budget = Budget()
    if experiment is not None:
        budget = needed(experiment, model, tp, processes * nodes, processes)
        texts, tasks = texts or experiment.texts(), tasks or experiment.sweep.tasks
        tasks_dir = tasks_dir or experiment.sweep.tasks_dir
    asked = Needs(model, tp, tuple(texts or ()), tuple(tasks.split(",") if tasks else ()), tasks_dir, device,
                  processes, nodes, folder, budget)  # fmt: skip
    with runtime("cpu") as here:
        lacking = {f"node {rank}": found for rank, found in enumerate(here.gather(missing(asked))) if found}
    lines = [f"{node + ': ' if nodes > 1 else ''}{line}" for node, found in lacking.items() for line in found]
    if lines:
        raise SPDError("Missing:\n" + "\n".join(f"- {line}" for line in lines) if here.leads else "see rank 0")
    if here.leads:
        result = {"missing": [], "reckoned": vars(budget)}
        if out is not None:
            write_json(out, result)
        print(json.dumps(result, separators=(",", ":")), flush=True)


@app.command("shape-only")
def shape_only_(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help="Named shape, as llama2-70b.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    blocks: Annotated[int, typer.Option(help="Blocks to keep.", min=1)] = 2,
    seed: Seed = 0,
) -> None:
    """Write a checkpoint of a true shape, cut to a few blocks, with random weights: to try a pipeline, never numbers.

    Whatever is made from it is marked as shape only.
    """
    from spd.shape_only import write_shape_only

    say_if_dry(context)
    print(json.dumps(write_shape_only(shape, blocks, out, seed), separators=(",", ":")), flush=True)


@app.command()
def budget(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="Named GPU.")] = "a100",
    out: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
    records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Memory and time of repairing LLaMA2 7B, 13B and 70B, reckoned and not measured; 'report' makes the table.

    For another model or other options: spd --dry-run PROCESSES distill ...
    """
    from spd.budget import table

    with open_session(context) as session:
        session.publish(table(gpu))
