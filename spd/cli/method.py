"""Commands of the method: how sensitive each block is, what to drop, and what that costs."""

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import app
from spd.cli.options import (
    RUNS,
    TP,
    BatchSize,
    Calibration,
    Device,
    Drop,
    DropMLP,
    Dtype,
    Limit,
    MLflow,
    Model,
    Out,
    PaperEpochs,
    PaperRate,
    Percentages,
    PlanPath,
    Records,
    RepairsFolder,
    Reproduction,
    Seed,
    SensitivityPath,
    SeqLen,
    Skip,
    Tasks,
    TasksDir,
    Tau1,
    Tau2,
    Text,
    Windows,
    numbers,
    open_session,
)
from spd.errors import SPDError


@app.command("eval")
def eval_(
    context: typer.Context, model: Model, tp: TP = 1, text: Text = None, seq_len: SeqLen = None,
    windows: Windows = None, skip: Skip = 0, plan: PlanPath = None, drop: Drop = None, drop_mlp: DropMLP = None,
    tasks: Tasks = None, tasks_dir: TasksDir = None, limit: Limit = None, batch_size: BatchSize = 16,
    compare: Annotated[
        bool, typer.Option(help="Put the model with nothing dropped to the same questions: answers flipped, p-value.")
    ] = False,
    data_parallel: Annotated[
        int, typer.Option(help="Copies of the model, each on its part of the processes, that divide the work.", min=1)
    ] = 1,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Perplexity of a text, accuracy on tasks, or both, under a plan.

    The text is tokenised whole, without special tokens, and cut into consecutive windows; T - 1 predictions each.
    Tasks are lm-evaluation-harness's own; the average is over acc, mmlu apart.
    """
    from spd.evaluate import perplexity

    with open_session(context) as session:
        if text is None and tasks is None:
            raise SPDError("There is nothing to evaluate: give --text, --tasks or both.")
        accuracy, result, data = session.accuracy(), {}, None
        loaded = session.load()
        if accuracy is not None and compare:
            accuracy.compare_with(loaded)
        loaded.plan = session.plan(loaded)
        if text is not None:
            data = session.windows(loaded)
            with session.progress(len(data.tokens), "windows") as done:
                result |= perplexity(loaded.transformer, data.tokens, done, session.replicas)
        if accuracy is not None:
            result |= accuracy(loaded)
        letters = str(loaded.plan)
        session.publish(result | {"plan": letters}, loaded.describe(), tp, data and data.describe(), letters)


@app.command()
def sensitivity(
    context: typer.Context, model: Model, tp: TP = 1, text: Text = None, seq_len: SeqLen = None,
    windows: Windows = None, skip: Skip = 0, dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """How much each block suffers from losing its attention sync (the paper's section 4.2.1).

    Gives the L + 1 perplexities "sync dropped from block i on" and the L differences of neighbours, in perplexity
    points and in nats (which compare across models).
    """
    from spd.sensitivity import sensitivity as measure

    with open_session(context) as session:
        loaded = session.load()
        data = session.windows(loaded)
        with session.progress(len(data.tokens), "windows") as done:
            result = measure(loaded.transformer, data.tokens, done)
        session.publish(result, loaded.describe(), tp, data.describe())


@app.command()
def plan(
    context: typer.Context,
    sensitivity: SensitivityPath,
    budget: Annotated[str, typer.Option(help="Blocks to drop, as a number (6) or a percentage (70%).")] = "70%",
    tau1: Tau1 = 0.05, tau2: Tau2 = 10.0,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Which blocks drop their attention sync, and what each needs first (the paper's algorithm 1).

    Blocks are ranked by ascending sensitivity and dropped up to the budget. Classes: ISB is dropped as is, SB is
    distilled first, ESB has its heads grouped and is distilled. The plan holds for the model and tp it was made for.
    """
    from spd.planner import make_plan, read_sensitivity

    with open_session(context) as session:
        measured = read_sensitivity(sensitivity)
        result = make_plan(measured["sensitivity"], budget, tau1, tau2)
        session.publish(result, measured["model"], measured["tp"], measured.get("data"), result["plan"])


@app.command()
def sweep(
    context: typer.Context, sensitivity: SensitivityPath, model: Model, tp: TP = 1, text: Text = None,
    seq_len: SeqLen = None, windows: Windows = None, skip: Skip = 0, percentages: Percentages = None,
    strategies: Annotated[
        str, typer.Option(help="How blocks are repaired, of zs (not at all), b2b, b2b+hg, closed-form, best.")
    ] = "zs",
    calibration: Calibration = 128,
    calibration_text: Annotated[
        str | None, typer.Option(help="Text to repair on, where not the one measured on.", metavar="FILE|NAME")
    ] = None,
    repairs: RepairsFolder = Path("repairs"),
    tau1: Tau1 = 0.05, tau2: Tau2 = 10.0,
    epochs: PaperEpochs = None, learning_rate: PaperRate = None,
    joint_epochs: Annotated[int | None, typer.Option(help="Of all dropped blocks together (best).")] = None,
    generated: Annotated[int | None, typer.Option(help="Windows that the model writes itself (best).")] = None,
    tasks: Tasks = None, tasks_dir: TasksDir = None, limit: Limit = None, batch_size: BatchSize = 16,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Perplexity against the percentage of blocks dropped, the least sensitive first, for ways to repair them.

    The default repairs nothing (zero-shot). The others draw the upper panels of the paper's figure 7, and go past it.
    With --tasks also accuracy, compared with the model that drops nothing on the same questions.
    """
    from spd.planner import plans_by_percentage, read_sensitivity
    from spd.sweep import ZERO_SHOT, Points, Repairer, curve, parse_strategies, sweep_recipes

    with open_session(context) as session:
        names, wanted, accuracy = parse_strategies(strategies), numbers(percentages), session.accuracy()
        loaded = session.load()
        measured = read_sensitivity(sensitivity, loaded.fingerprint, tp)["sensitivity"]
        data, described, prepared = session.windows(loaded), loaded.describe(), None
        if names != [ZERO_SHOT]:
            learnt = session.calibration(loaded, calibration, calibration_text).tokens
            paper = {"epochs": epochs, "learning_rate": learning_rate}
            best = {"joint_epochs": joint_epochs, "generated": generated}
            recipes = sweep_recipes(paper, best, seed)
            prepared = Repairer(learnt, repairs, recipes, tau1, tau2, session.runtime.is_main, session.progress)
        if accuracy is not None:
            accuracy.compare_with(loaded)
        del loaded  # the curve reads it afresh for repairs, and two do not fit where one hardly does
        total = len(names) * len(plans_by_percentage(measured, wanted))
        same = session.digest(described, measured, data.describe(), apart=("percentages", "strategies"))
        with session.progress(total, "points") as done:
            points = curve(session.load, measured, names, wanted, data.tokens, prepared, accuracy, done,
                           Points(repairs / f"points-{same}.json", session.runtime.is_main))  # fmt: skip
        predictions = data.tokens.shape[0] * (data.tokens.shape[1] - 1)
        result = {"curve": points, "tokens": predictions, "windows": len(data.tokens)}
        session.publish(result, described, tp, data.describe())


@app.command()
def generate(
    context: typer.Context, model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it again for a batch.")],
    tp: TP = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the fewest tokens reaching probability p.")] = None,
    plan: PlanPath = None, drop: Drop = None, drop_mlp: DropMLP = None, dtype: Dtype = "float32",
    device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Continue a prompt under a plan, greedily or sampled.

    The result's text and token_ids hold prompt and continuation (lists where several prompts were given).
    """
    from spd.generate import Sampling

    with open_session(context) as session:
        sampling = Sampling(temperature, top_k, top_p, seed)
        loaded = session.load()
        loaded.plan = session.plan(loaded)
        ids = loaded.generate(prompt, max_new_tokens, sampling)
        texts = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        single = len(prompt) == 1
        result = {"text": texts[0] if single else texts, "token_ids": ids[0] if single else ids}
        letters = str(loaded.plan)
        session.publish(result | {"plan": letters}, loaded.describe(), tp, plan=letters)
