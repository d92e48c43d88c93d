"""Commands that take the method apart: what each step of a repair gives, and other block designs."""

from pathlib import Path

import typer

from spd.cli.app import app
from spd.cli.options import (
    RUNS,
    TP,
    Calibration,
    Device,
    Drop,
    Dtype,
    MLflow,
    Model,
    Out,
    PaperEpochs,
    PaperRate,
    Records,
    RepairsFolder,
    Reproduction,
    Seed,
    SeqLen,
    Skip,
    Text,
    Windows,
    open_session,
)


@app.command()
def ablate(
    context: typer.Context, model: Model, tp: TP = 1, text: Text = None, seq_len: SeqLen = None,
    windows: Windows = None, skip: Skip = 0, calibration: Calibration = 128, drop: Drop = "all",
    repairs: RepairsFolder = Path("repairs"), epochs: PaperEpochs = None, learning_rate: PaperRate = None,
    device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """What each step of a repair gives: the recipes taken apart, on text that they have not seen."""
    from ablation import ablate as compare
    from ablation import compared_recipes

    from spd.plan import Plan, parse_blocks
    from spd.sweep import Repairer

    compared = compared_recipes({"epochs": epochs, "learning_rate": learning_rate}, seed)
    with open_session(context) as session:
        loaded = session.load()
        blocks = loaded.config.num_blocks
        plan = Plan.dropping(blocks, parse_blocks(drop, blocks))
        learnt, data = session.calibration(loaded, calibration), session.windows(loaded)
        with session.progress(len(compared), "variants") as done:
            repairer = Repairer(learnt.tokens, repairs, compared, is_main=session.runtime.is_main,
                                progress=session.progress)  # fmt: skip
            result = compare(session.load, plan, data.tokens, repairer, done)
        session.publish(result, loaded.describe(), tp, data.describe(), str(plan))


@app.command("table1")
def table1_(
    context: typer.Context, model: Model, tp: TP = 1, text: Text = None, seq_len: SeqLen = None,
    windows: Windows = None, skip: Skip = 0, drop: Drop = "0", dtype: Dtype = "float32", device: Device = "cpu",
    seed: Seed = 0, out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """The paper's table 1: where an SPD block adds residual and bias, before the all-reduce or after it.

    Its default drops the first block's sync, as there. A model without biases gets some that leave it the same
    function.
    """
    from table1 import block_designs

    from spd.plan import Plan, parse_blocks

    with open_session(context) as session:
        loaded = session.load()
        blocks = loaded.config.num_blocks
        plan, data = Plan.dropping(blocks, parse_blocks(drop, blocks)), session.windows(loaded)
        result = block_designs(loaded.transformer, plan, data.tokens)
        session.publish(result, loaded.describe(), tp, data.describe(), str(plan))
