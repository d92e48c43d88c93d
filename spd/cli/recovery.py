"""Commands that repair a model for its plan."""

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import app
from spd.cli.options import (
    RUNS,
    TP,
    Device,
    Drop,
    DropMLP,
    Dtype,
    MLflow,
    Model,
    PlanPath,
    Records,
    Reproduction,
    Seed,
    SeqLen,
    Skip,
    Text,
    Windows,
    open_session,
)


@app.command()
def distill(
    context: typer.Context, model: Model,
    out: Annotated[Path, typer.Option(help="Folder for plan, changed tensors and result; a run goes on in its own.")],
    tp: TP = 1, text: Text = None, seq_len: SeqLen = None, windows: Windows = None, skip: Skip = 0,
    plan: PlanPath = None, drop: Drop = None, drop_mlp: DropMLP = None,
    recipe: Annotated[
        str, typer.Option(help="zs (nothing), closed-form (no training), paper, or best.", metavar="NAME")
    ] = "closed-form",
    strategy: Annotated[
        str, typer.Option(help="Of the paper's recipe, as in its figure 7: zs, b2b or b2b+hg.", metavar="NAME")
    ] = "b2b+hg",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the windows for each block; left out: the recipe's.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Adam's (paper), or its share of each weight's size (best).")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam or adamw; the paper does not say.")] = None,
    joint_epochs: Annotated[
        int | None, typer.Option(help="Passes of all dropped blocks together, towards the logits (best).")
    ] = None,
    generated: Annotated[
        int | None, typer.Option(help="Windows that the model writes itself to learn from besides the text (best).")
    ] = None,
    device: Device = "cpu", seed: Seed = 0, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Repair the blocks that a plan drops, so that the model loses less.

    paper: algorithm 1 with the plan's classes: blocks are distilled one by one, extremely sensitive ones after their
    heads were grouped. best: closed form, then distillation in order, then all blocks together. A tenth of the windows
    is held out: a repair that does worse on it is undone. Give the folder to eval, generate or bench as --plan.
    Interrupted, the same command goes on after the last finished block.
    """
    from spd.distill import Options, total_steps
    from spd.distill import distill as repair

    options = Options.of(recipe, strategy, epochs, learning_rate, optimizer, joint_epochs, generated, seed)
    with open_session(context) as session:
        loaded = session.load()
        document = session.plan_document(loaded)
        data = session.windows(loaded)
        with session.progress(total_steps(document, options, len(data.tokens)), "steps") as done:
            result = repair(loaded, data.tokens, document, options, out, session.runtime.is_main, done)
        session.publish(result, loaded.describe(), tp, data.describe(), result["plan"])


@app.command()
def export(
    context: typer.Context, model: Model,
    plan: Annotated[Path, typer.Option(help="Folder made by 'distill', or a plan file.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    tp: Annotated[int | None, typer.Option(help="Left out: the one the plan was made for.", min=1)] = None,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Write the repaired model as a Hugging Face folder that transformers loads, with its plan (plan.json) inside.

    It is meant to be read again with that plan and tp, which gives what model and repair gave. Run densely, as
    transformers does, it is another function than the original model and a worse one: repaired blocks were fitted to
    what shards see without the sync.
    """
    from spd.plan import degree

    with open_session(context) as session:
        session.options.tp = tp or degree(plan)
        loaded = session.load()
        session.plan(loaded)
        result = loaded.save_pretrained(out, session.runtime.is_main)
        session.publish(result, loaded.describe(), loaded.tp, plan=str(loaded.plan))
