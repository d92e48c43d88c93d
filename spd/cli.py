"""The command line: thin subcommands, each a call of functions that a notebook can call as well."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spd.errors import SPDError

app = typer.Typer(
    help="Sync-point drop for tensor-parallel LLaMA models: which all-reduces can go, and what that gains.\n\n"
    "Every command prints one JSON document as its last line on stdout; progress goes to stderr. Start it under "
    "torchrun to spread the tp shards over processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="Hugging Face LLaMA folder, 'spd-tiny', or hub id.", metavar="DIR|HUB_ID")]
TP = Annotated[int, typer.Option(help="Logical tensor-parallel degree; it fixes the numbers, processes do not.", min=1)]
Text = Annotated[
    str | None,
    typer.Option(help="Text file, 'builtin' (spd-tiny's held-out text) or 'builtin-train'.", metavar="FILE|builtin"),
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a window; left out: the model's positions, at most 2048.")]
Windows = Annotated[int | None, typer.Option(help="Use the first N windows; left out: all.")]
Skip = Annotated[int, typer.Option(help="Pass over N windows first, to keep evaluation apart from calibration.")]
Drop = Annotated[
    str | None,
    typer.Option(help="Blocks whose attention sync is dropped: none, all, or as in 1,3,5-7 (from 0).", metavar="SPEC"),
]
DropMLP = Annotated[str | None, typer.Option("--drop-mlp", help="The same for the sync after the MLP.", metavar="SPEC")]
PlanPath = Annotated[Path | None, typer.Option("--plan", help="Plan file, or a folder made by 'distill'.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda (one GPU a process).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option(help="Also write the result here, whole or not at all.")]
Records = Annotated[Path, typer.Option(help="Folder for the record of this run.")]
Reproduction = Annotated[
    str | None, typer.Option(help="Name of the reproduction this run is a stage of (its parent run in MLflow).")
]
MLflow = Annotated[bool, typer.Option(help="Mirror the record to MLflow (MLFLOW_TRACKING_URI, else ./mlflow.db).")]
SensitivityPath = Annotated[Path, typer.Argument(help="What 'sensitivity --out' wrote.", metavar="SENSITIVITY.json")]
Percentages = Annotated[
    str | None, typer.Option(help="Percentages of blocks to drop, as in 0,25,50; left out: every number of blocks.")
]
Tau1 = Annotated[float, typer.Option(help="ISB up to this sensitivity, SB above; perplexity points.")]
Tau2 = Annotated[float, typer.Option(help="SB up to this sensitivity, ESB above; perplexity points.")]
RUNS = Path("runs")


@app.callback()
def defaults(
    context: typer.Context,
    experiment: Annotated[
        Path | None, typer.Option(help="YAML whose values become the defaults of the command's options.")
    ] = None,
) -> None:
    if experiment is not None:
        from spd.experiment import read_experiment

        command = context.command.commands.get(context.invoked_subcommand)
        names = {parameter.name for parameter in command.params}
        chosen = read_experiment(experiment).defaults(context.invoked_subcommand, names)
        context.default_map = {context.invoked_subcommand: chosen}


def _session(context: typer.Context):
    from spd.session import Session

    _check_choice("dtype", context.params, ("float32", "bfloat16", "float16"))
    _check_choice("device", context.params, ("cpu", "cuda"))
    return Session(context.info_name, context.params)


def _check_choice(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    if options.get(name, known[0]) not in known:
        raise SPDError(f"Unknown {name} '{options[name]}'; known: {', '.join(known)}.")


def _numbers(spec: str | None) -> list[float] | None:
    try:
        return None if spec is None else [float(part) for part in spec.split(",")]
    except ValueError:
        raise SPDError(f"'{spec}' is not a list of percentages; write them as in 0,25,50.") from None


@app.command("eval")
def eval_(
    context: typer.Context, model: Model, tp: TP = 1, text: Text = None, seq_len: SeqLen = None,
    windows: Windows = None, skip: Skip = 0, plan: PlanPath = None, drop: Drop = None, drop_mlp: DropMLP = None,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Perplexity of a text under a plan.

    The text is tokenised whole, without special tokens, and cut into consecutive windows; T - 1 predictions each.
    """
    from spd.evaluate import perplexity

    with _session(context) as session:
        loaded = session.load()
        loaded.plan = session.plan(loaded)
        data = session.windows(loaded)
        with session.progress(len(data.tokens), "windows") as done:
            result = perplexity(loaded.transformer, data.tokens, done)
        letters = str(loaded.plan)
        session.publish(result | {"plan": letters}, loaded.describe(), tp, data.describe(), letters)


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

    with _session(context) as session:
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

    with _session(context) as session:
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
    calibration: Annotated[
        int, typer.Option(help="Windows to repair on: the first of the text, which --skip must pass over.", min=2)
    ] = 128,
    repairs: Annotated[Path, typer.Option(help="Folder of the repairs; a sweep goes on there.")] = Path("repairs"),
    tau1: Tau1 = 0.05, tau2: Tau2 = 10.0,
    epochs: Annotated[int | None, typer.Option(help="Of the paper's distillation (b2b, b2b+hg).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the paper's distillation.")] = None,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Perplexity against the percentage of blocks dropped, the least sensitive first, for ways to repair them.

    The default repairs nothing (zero-shot). The others draw the upper panels of the paper's figure 7, and go past it.
    """
    from spd.planner import plans_by_percentage, read_sensitivity
    from spd.strategies import ZERO_SHOT, Repairs, curve, parse_strategies

    with _session(context) as session:
        names, wanted = parse_strategies(strategies), _numbers(percentages)
        loaded = session.load()
        measured = read_sensitivity(sensitivity, loaded.fingerprint, tp)["sensitivity"]
        data, prepared = session.windows(loaded), None
        if names != [ZERO_SHOT]:
            learnt = session.calibration(loaded, calibration).tokens
            prepared = Repairs(learnt, repairs, tau1, tau2, epochs, learning_rate, session.runtime.leads)
        total = len(names) * len(plans_by_percentage(measured, wanted))
        with session.progress(total, "points") as done:
            points = curve(session.load, measured, names, wanted, data.tokens, prepared, done)
        predictions = data.tokens.shape[0] * (data.tokens.shape[1] - 1)
        result = {"curve": points, "tokens": predictions, "windows": len(data.tokens)}
        session.publish(result, loaded.describe(), tp, data.describe())


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
    from spd.distill import distill as repair
    from spd.recipes import Options, total_steps

    options = Options.of(recipe, strategy, epochs, learning_rate, optimizer, joint_epochs, generated, seed)
    with _session(context) as session:
        loaded = session.load()
        document = session.plan_document(loaded)
        data = session.windows(loaded)
        with session.progress(total_steps(document, options, len(data.tokens)), "steps") as done:
            result = repair(loaded, data.tokens, document, options, out, session.runtime.leads, done)
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
    from spd.export import export as write
    from spd.plan import degree

    with _session(context) as session:
        session.options.tp = tp or degree(plan)
        loaded = session.load()
        session.plan(loaded)
        result = write(loaded, model, out, session.runtime.leads)
        session.publish(result, loaded.describe(), loaded.tp, plan=str(loaded.plan))


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

    with _session(context) as session:
        sampling = Sampling(temperature, top_k, top_p, seed)
        loaded = session.load()
        loaded.plan = session.plan(loaded)
        ids = loaded.generate(prompt, max_new_tokens, sampling)
        texts = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        single = len(prompt) == 1
        result = {"text": texts[0] if single else texts, "token_ids": ids[0] if single else ids}
        letters = str(loaded.plan)
        session.publish(result | {"plan": letters}, loaded.describe(), tp, plan=letters)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, 'spd-tiny' or hub id.")] = None,
    shape: Annotated[str | None, typer.Option(help="Named shape with random weights, as llama-125m.")] = None,
    tp: Annotated[int, typer.Option(help="Processes, one shard each; on CPU they are started here.", min=1)] = 1,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Plan file or folder (its policies: weights change no timing); again to compare."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Blocks that drop; give it again to compare.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Compare plans that drop the least sensitive blocks of this file first.")
    ] = None,
    percentages: Percentages = None,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded to time TPOT; 0 leaves it out.", min=0)] = 16,
    link: Annotated[
        str | None, typer.Option(help="Emulated link, waited for at every all-reduce, as in 10GBps,20us.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each plan.", min=1)] = 20,
    dtype: Dtype = "float32", device: Device = "cpu", seed: Seed = 0, out: Out = None, records: Records = RUNS,
    reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Time to first token and per output token of several plans, on real processes, interleaved.

    Beside them stand three bounds: everything full, every attention sync dropped, no communication at all.
    """
    from spd.bench import BenchSettings, plans_to_time, run

    with _session(context) as session:
        letters, described = plans_to_time(model, shape, tp, plan or [], drop or [], sensitivity, _numbers(percentages))
        settings = BenchSettings(letters, model, shape, batch, prompt_len, new_tokens, link, repeats,
                                 dtype=dtype, seed=seed)  # fmt: skip
        result = run(session.runtime, tp, settings)
        session.publish(result, described, tp)


@app.command("predict")
def predict_(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help="Named shape, as llama2-70b.")],
    gpu: Annotated[str | None, typer.Option(help="Named GPU; left out: a100.")] = None,
    tp: Annotated[int, typer.Option(help="GPUs, one shard each.", min=1)] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes they are on: which measured all-reduce counts.", min=1)] = 1,
    link: Annotated[
        str | None, typer.Option(help="Slowest hop and latency, as in 25GBps,10us; left out: the measured all-reduce.")
    ] = None,
    percent: Annotated[float, typer.Option(help="Percentage of blocks that drop their attention sync.")] = 70.0,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded; TPOT is their mean.", min=1)] = 16,
    launch_us: Annotated[float, typer.Option(help="Host time an operator waits for; 0 under CUDA graphs.", min=0)] = 0,
    calibration: Annotated[Path | None, typer.Option(help="A machine that 'profile' calibrated, not a GPU.")] = None,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Latency on machines that are not at hand: TTFT, TPOT, share of communication, what dropping gains, the ceiling.

    reduction is 1 - t_p/t_0, speedup t_0/t_p, both of TTFT; 'tpot' has its own.
    """
    from spd.predict import ask
    from spd.pretrained import describe

    with _session(context) as session:
        result, config = ask(
            shape, percent, tp, gpu_name=gpu, nodes=nodes, link=link, calibration=calibration, batch=batch,
            prompt_len=prompt_len, new_tokens=new_tokens, launch_us=launch_us,
        )  # fmt: skip
        session.publish(result, describe(config, shape, f"shape-{shape}"), tp)


@app.command("predict-paper")
def predict_paper_(
    context: typer.Context,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """The paper's latency figures (2 and 7) predicted for LLaMA2 7B, 13B and 70B, beside its claims.

    Also the map of links where dropping pays, where the time goes, and the model checked against a decode benchmark
    made by others. 'report' draws the record.
    """
    from spd.paper import predict_paper

    with _session(context) as session:
        session.publish(predict_paper())


@app.command()
def profile(
    context: typer.Context,
    bench_records: Annotated[
        list[Path], typer.Argument(help="Records of 'bench', or folders of them.", metavar="RECORDS...")
    ],
    check: Annotated[
        list[Path] | None, typer.Option(help="Records to predict, not to fit; give it again for more.")
    ] = None,
    out: Out = None, records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Calibrate the latency model on measurements of this machine, for 'predict --calibration'.

    The records should differ in shape, prompt, batch and link; the errors on those to --check are in the result.
    """
    from spd.calibration import profile as calibrate
    from spd.report import load_records

    with _session(context) as session:
        session.publish(calibrate(_benches(load_records(bench_records)), _benches(load_records(check or []))))


def _benches(records: list[dict]) -> list[dict]:
    return [record for record in records if record["command"] == "bench"]


@app.command()
def report(
    context: typer.Context,
    records_: Annotated[list[Path], typer.Argument(help="Record files, or folders of them.", metavar="RECORDS...")],
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path("paper_figures"),
    records: Records = RUNS, reproduction: Reproduction = None, mlflow: MLflow = True,
) -> None:  # fmt: skip
    """Tables and figures from records; the tables are also shown on stderr."""
    from spd.report import print_tables
    from spd.report import report as draw

    with _session(context) as session:
        result = draw(records_, out)
        print_tables(records_)
        session.publish(result, artifacts=[Path(file) for file in result["files"]])


def main() -> None:
    """Runs a command; a mistake of the user's ends as one sentence on stderr and exit code 1."""
    from spd.launch import environment_rank

    try:
        sys.exit(app(standalone_mode=False))
    except SPDError as error:
        who = f"rank {environment_rank()}: " if environment_rank() else ""
        sys.exit(f"{who}{error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a wrong option, with the usage
        sys.exit(error.exit_code)
