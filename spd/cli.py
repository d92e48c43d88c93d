"""The command line: commands that are thin calls of functions a notebook can call as well."""

import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

from spd.errors import SPDError, one_of
from spd.options import (
    BUDGET,
    CALIBRATION,
    CALIBRATION_TEXT,
    COMMANDS,
    COMPARE,
    COMPUTE,
    DATA_PARALLEL,
    DROP,
    DTYPE,
    ENGINE,
    MODEL,
    OPTIMIZER,
    OUTPUT,
    PERCENTAGES,
    PLAN,
    PREDICTED,
    PROMPT,
    RECIPE,
    REPAIR,
    SAMPLING,
    SENSITIVITY,
    STRATEGIES,
    STRATEGY,
    TASKS,
    TEXT,
    THRESHOLDS,
    TIMED,
    Command,
    Parser,
    command,
    floats,
    option,
)
from spd.session import Session, question

PROGRAM = "Sync-point drop for tensor-parallel LLaMA models: which all-reduces can go, and what that gains."
AFTER = (
    "Every command prints one JSON document as its last line on stdout; progress goes to stderr. Start it under "
    "torchrun to spread the tp shards over processes."
)


@command(*MODEL, *TEXT, *PLAN, *DROP, *TASKS, COMPARE, DATA_PARALLEL, *DTYPE, *COMPUTE, *OUTPUT, name="eval")
def evaluate(session: Session) -> None:
    """Perplexity of a text, accuracy on tasks, or both, under a plan.

    The text is tokenised whole, without special tokens, and cut into consecutive windows; T - 1 predictions each.
    Tasks are lm-evaluation-harness's own; the average is over acc, mmlu apart.
    """
    from spd.evaluate import perplexity

    o = session.options
    if o.text is None and o.tasks is None:
        raise SPDError("There is nothing to evaluate: give --text, --tasks or both.")
    accuracy, result, data = session.accuracy(), {}, None
    model = session.load()
    if accuracy is not None and o.compare:
        accuracy.compare_with(model)
    letters = session.take_plan(model)
    if o.text is not None:
        data = session.windows(model)
        with session.progress(len(data.tokens), "windows") as progress:
            result |= perplexity(model.transformer, data.tokens, progress, session.replicas)
    if accuracy is not None:
        result |= accuracy(model)
    session.publish(result | {"plan": letters}, model.describe(), o.tp, data and data.describe(), letters)


@command(*MODEL, *TEXT, *DTYPE, *COMPUTE, *OUTPUT)
def sensitivity(session: Session) -> None:
    """How much each block suffers from losing its attention sync (the paper's section 4.2.1).

    Gives the L + 1 perplexities "sync dropped from block i on" and the L differences of neighbours, in perplexity
    points and in nats (which compare across models).
    """
    from spd.sensitivity import sensitivity as measure

    model = session.load()
    data = session.windows(model)
    with session.progress(len(data.tokens), "windows") as progress:
        result = measure(model.transformer, data.tokens, progress)
    session.publish(result, model.describe(), model.tp, data.describe())


@command(SENSITIVITY, BUDGET, *THRESHOLDS, *OUTPUT)
def plan(session: Session) -> None:
    """Which blocks drop their attention sync, and what each needs first (the paper's algorithm 1).

    Blocks are ranked by ascending sensitivity and dropped up to the budget. Classes: ISB is dropped as is, SB is
    distilled first, ESB has its heads grouped and is distilled. The plan holds for the model and tp it was made for.
    """
    from spd.planner import make_plan, read_sensitivity

    o = session.options
    measured = read_sensitivity(o.sensitivity)
    result = make_plan(measured["sensitivity"], o.budget, o.tau1, o.tau2)
    session.publish(result, measured["model"], measured["tp"], measured.get("data"), result["plan"])


@command(SENSITIVITY, *MODEL, *TEXT, PERCENTAGES, STRATEGIES, *CALIBRATION, CALIBRATION_TEXT, *THRESHOLDS, *REPAIR,
         *TASKS, *DTYPE, *COMPUTE, *OUTPUT)  # fmt: skip
def sweep(session: Session) -> None:
    """Perplexity against the percentage of blocks dropped, the least sensitive first, for ways to repair them.

    The default repairs nothing (zero-shot). The others draw the upper panels of the paper's figure 7, and go past it.
    With --tasks also accuracy, compared with the model that drops nothing on the same questions.
    """
    from spd.distill import identity_of
    from spd.evaluate import perplexity
    from spd.planner import plans_by_percentage, read_sensitivity
    from spd.sweep import ZERO_SHOT, Repairer, Sweep, parse_strategies, sweep_recipes

    o, accuracy = session.options, session.accuracy()
    names, wanted = parse_strategies(o.strategies), floats(o.percentages)
    model = session.load()
    measured = read_sensitivity(o.sensitivity, model.fingerprint, o.tp)["sensitivity"]
    data, described, learnt = session.windows(model), model.describe(), None
    if names != [ZERO_SHOT]:
        learnt = session.calibration(model, o.calibration, o.calibration_text).tokens
    is_main = session.runtime.is_main
    repairer = Repairer(session.load, identity_of(model), learnt, o.repairs, is_main, session.progress)
    paper = {"epochs": o.epochs, "learning_rate": o.learning_rate}
    recipes = sweep_recipes(paper, {"joint_epochs": o.joint_epochs, "generated": o.generated}, o.seed)
    if accuracy is not None:
        accuracy.compare_with(model)
    del model  # the curve reads it afresh for repairs, and two do not fit where one hardly does

    def evaluate(model) -> dict:
        found = perplexity(model.transformer, data.tokens)
        scores = accuracy(model) if accuracy is not None else {}
        return {"perplexity": found["perplexity"], "nats": found["nats"]} | scores

    kept = o.repairs / f"points-{question(session.command, vars(o), ('percentages', 'strategies'))}.json"
    with session.progress(len(names) * len(plans_by_percentage(measured, wanted)), "points") as progress:
        points = Sweep(measured, repairer, recipes, o.tau1, o.tau2).curve(names, wanted, evaluate, progress, kept)
    result = {"curve": points, "tokens": data.tokens[:, 1:].numel(), "windows": len(data.tokens)}
    session.publish(result, described, o.tp, data.describe())


@command(*MODEL, *TEXT, *PLAN, *DROP, RECIPE, STRATEGY, OPTIMIZER, *REPAIR, *COMPUTE, *OUTPUT, result_in="result.json")
def distill(session: Session) -> None:
    """Repair the blocks that a plan drops, so that the model loses less.

    paper: algorithm 1 with the plan's classes: blocks are distilled one by one, extremely sensitive ones after their
    heads were grouped. best: closed form, then distillation in order, then all blocks together. A tenth of the windows
    is held out: a repair that does worse on it is undone. Give the folder to eval, generate or bench as --plan.
    Interrupted, the same command goes on after the last finished block.
    """
    from spd.distill import PAPER, recipe_named, total_steps
    from spd.distill import distill as repair

    o = session.options
    if o.out is None:
        raise SPDError("A repair needs a folder of its own: --out DIR.")
    names = ("epochs", "learning_rate", "optimizer", "joint_epochs", "generated")
    named = one_of("strategy", o.strategy, PAPER) if o.recipe == "paper" else o.recipe
    recipe = recipe_named(named, o.seed, **{name: getattr(o, name) for name in names})
    model = session.load()
    document, data = session.plan_document(model), session.windows(model)
    with session.progress(total_steps(document, recipe, len(data.tokens)), "steps") as progress:
        result = repair(model, data.tokens, document, recipe, o.out, session.runtime.is_main, progress)
    session.publish(result, model.describe(), o.tp, data.describe(), result["plan"])


@command(*MODEL, *PLAN, *DTYPE, *COMPUTE, *OUTPUT, result_in=None)
def export(session: Session) -> None:
    """Write the repaired model as a Hugging Face folder that transformers loads, with its plan (plan.json) inside.

    It is meant to be read again with that plan and tp, which gives what model and repair gave. Run densely, as
    transformers does, it is another function than the original model and a worse one: repaired blocks were fitted to
    what shards see without the sync.
    """
    from spd.plan import degree

    o = session.options
    if o.plan is None or o.out is None:
        raise SPDError("An export needs --plan (a folder made by 'distill', or a plan file) and --out (a new folder).")
    o.tp = degree(o.plan) if o.tp == 1 else o.tp
    model = session.load()
    letters = session.take_plan(model)
    result = model.save_pretrained(o.out, session.runtime.is_main)
    session.publish(result, model.describe(), model.tp, plan=letters)


@command(*MODEL, option("--prompt", required=True, action="append", help="Text to continue; again for a batch."),
         *SAMPLING, *PLAN, *DROP, *DTYPE, *COMPUTE, *OUTPUT)  # fmt: skip
def generate(session: Session) -> None:
    """Continue a prompt under a plan, greedily or sampled.

    The result's text and token_ids hold prompt and continuation (lists where several prompts were given).
    """
    from spd.generate import Sampling

    o = session.options
    sampling = Sampling(o.temperature, o.top_k, o.top_p, o.seed)
    model = session.load()
    letters = session.take_plan(model)
    ids = model.generate(o.prompt, o.max_new_tokens, sampling)
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    one = len(o.prompt) == 1
    result = {"text": texts[0] if one else texts, "token_ids": ids[0] if one else ids, "plan": letters}
    session.publish(result, model.describe(), o.tp, plan=letters)


@command(*TIMED, *PROMPT, *ENGINE, *DTYPE, *COMPUTE, *OUTPUT)
def bench(session: Session) -> None:
    """Time to first token and per output token of several plans, on real processes, interleaved.

    Beside them stand three bounds: everything full, every attention sync dropped, no communication at all.
    """
    from spd.bench import BenchSettings, describe_timed, plans_to_time, run

    o = session.options
    described = describe_timed(o.model, o.shape, o.tp)
    letters = plans_to_time(described, o.tp, o.plan or [], o.drop or [], o.sensitivity, floats(o.percentages))
    settings = BenchSettings(
        letters, o.model, o.shape, o.batch, o.prompt_len, o.new_tokens, o.link, o.repeats, dtype=o.dtype, seed=o.seed,
        compile=o.compile, share_of=o.tp if o.alone else None, transport=o.transport,
    )  # fmt: skip
    session.publish(run(session.runtime, o.tp, settings), described, o.tp)


@command(*PREDICTED, *PROMPT, *OUTPUT)
def predict(session: Session) -> None:
    """Latency on machines that are not at hand: TTFT, TPOT, share of communication, what dropping gains, the ceiling.

    reduction is 1 - t_p/t_0, speedup t_0/t_p, both of TTFT; 'tpot' has its own.
    """
    from spd.calibrate import ask
    from spd.pretrained import describe

    o = session.options
    result, config = ask(
        o.shape, floats(o.percent), o.tp, gpu_name=o.gpu, nodes=o.nodes, link=o.link, calibration=o.calibration,
        batch=o.batch, prompt_len=o.prompt_len, new_tokens=o.new_tokens, launch_us=o.launch_us,
    )  # fmt: skip
    session.publish(result, describe(config, o.shape, f"shape-{o.shape}"), o.tp)


@command(option("benches", type=Path, nargs="+", metavar="RECORDS", help="Records of 'bench', or folders of them."),
         option("--check", type=Path, action="append", default=[], help="Records to predict, not to fit; again."),
         option("--statistic", default="median", help="Time of a plan's repetitions: median, or min."),
         *OUTPUT)  # fmt: skip
def profile(session: Session) -> None:
    """Calibrate the latency model on measurements of this machine, for 'predict --calibration'.

    The records should differ in shape, prompt, batch and link; the errors on those to --check are in the result.
    """
    from spd.calibrate import profile as calibrate
    from spd.records import load_records

    o = session.options
    fitted, checked = ([r for r in load_records(paths) if r["command"] == "bench"] for paths in (o.benches, o.check))
    session.publish(calibrate(fitted, checked, o.statistic))


@command(option("drawn", type=Path, nargs="+", metavar="RECORDS", help="Record files, or folders of them."),
         *OUTPUT, result_in=None)  # fmt: skip
def report(session: Session) -> None:
    """Tables and figures from records, in the folder --out (default: figures); the tables are also shown on stderr."""
    from spd.report import print_tables
    from spd.report import report as draw

    o = session.options
    result = draw(o.drawn, o.out or Path("figures"))
    print_tables(o.drawn)
    session.publish(result, files=[Path(file) for file in result["files"]])


# ---------------------------------------------------------------- the program


def main(only: Command | None = None) -> None:
    """Runs a command, or the one of a script; a mistake of the user's ends as one sentence and exit code 1."""
    before = Parser(prog="spd", add_help=False, allow_abbrev=False)
    before.add_argument("--experiment", type=Path)
    given, words = before.parse_known_args()
    try:
        if only is None:
            if not words or words[0] in ("-h", "--help"):
                sys.exit(print(overview()))
            if words[0] not in COMMANDS:
                before.error(f"there is no command '{words[0]}', known: {', '.join(COMMANDS)}")
            only, words = COMMANDS[words[0]], words[1:]
        only.run(words, given.experiment)
    except SPDError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, BrokenPipeError):  # the latter: who read the output has gone
        sys.exit(130)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="spd-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        reason = " ".join(str(error).split())[:120]
        _fail(f"This is a bug of spd: {type(error).__name__}: {reason} ({file.name}).", 70)
    sys.exit(0)


def _fail(sentence: str, code: int) -> NoReturn:
    from spd.launch import environment_rank, leave, say

    say(f"rank {environment_rank()}: {sentence}" if environment_rank() else sentence)
    leave(code)


def overview() -> str:
    lines = [f"  {name:12} {(c.function.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()]
    return "\n".join([f"{PROGRAM}\n\nspd [--experiment FILE.yaml] COMMAND ... (each has --help)\n", *lines, "", AFTER])
