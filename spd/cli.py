"""The command line: commands that are thin calls of functions a notebook can call as well."""

import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import NoReturn

from spd.errors import SPDError, one_of, reading, short
from spd.options import (
    CALIBRATION,
    COMMANDS,
    COMPUTE,
    COPIES,
    MODEL,
    PERCENTAGES,
    PLAN,
    PLANS,
    PROMPT,
    REPAIR,
    SENSITIVITY,
    SENT,
    SITE,
    TARGET,
    TASKS,
    TEXT,
    THRESHOLDS,
    WHOLE,
    Command,
    Parser,
    at_least,
    command,
    option,
    percentages,
)
from spd.session import Session

FOREIGN = "Some record is not of the form that its command writes"

# ---------------------------------------------------------------- commands


@command(
    *(*MODEL, *TEXT, *PLANS, *TASKS),
    option("--compare", "Put the model with nothing dropped to the same questions.", bool, False),
    COPIES,
    name="eval",
)
def evaluate(session: Session) -> None:
    """Perplexity of a text, accuracy on tasks, or both, under a plan.

    The text is tokenised whole, without special tokens, and cut into consecutive windows; T - 1 predictions each.
    Tasks are lm-evaluation-harness's own; the average is over acc, mmlu apart.
    """
    from spd.evaluate import perplexity

    o = session.options
    if o.text is None and o.tasks is None:
        raise SPDError("There is nothing to evaluate: give --text, --tasks or both.")
    accuracy, data = session.accuracy(), None
    model = session.load()
    if accuracy is not None and o.compare:
        accuracy.compare_with(model)
    result = session.take_plan(model)
    if o.text is not None:
        data = session.windows(model)
        with session.progress(len(data.tokens), "windows") as progress:
            result |= perplexity(model.transformer, data.tokens, progress, session.replicas)
    if accuracy is not None:
        result |= accuracy(model)
    session.publish(result, model.describe(), data and data.describe())


@command(
    *(*MODEL, *TEXT),
    option("--fast", "Score policies at both sync points of every block, to first order, in one pass.", bool, False),
    option("--policies", "Those that --fast scores, as in drop,int4.", default="drop", metavar="NAME,NAME"),
)
def sensitivity(session: Session) -> None:
    """How much each block suffers from losing its attention sync (the paper's section 4.2.1).

    Gives the L + 1 perplexities "sync dropped from block i on" and the L differences of neighbours, in perplexity
    points and in nats (which compare across models). With --fast instead scores, which rank and are no perplexities.
    """
    from spd.plan import Plan
    from spd.sensitivity import block_evaluations, scores
    from spd.sensitivity import sensitivity as measure

    o, model = session.options, session.load()
    policies = [pair[0] for pair in Plan.from_policies((name, name) for name in o.policies.split(",")).blocks]
    data = session.windows(model)
    blocks = len(model.transformer.blocks)
    of_a_window, unit = (2 * blocks, "sync points") if o.fast else (block_evaluations(blocks), "blocks")
    with session.progress(len(data.tokens) * of_a_window, unit) as progress:
        asked = (model.transformer, data.tokens)
        result = scores(*asked, policies, progress) if o.fast else measure(*asked, progress)
    session.publish(result, model.describe(), data.describe())


@command(
    SENSITIVITY,
    option("--budget", "Blocks to drop, as a number (6) or a percentage (70%%); left out: 70%%, or by the target."),
    *(*THRESHOLDS, *TARGET, *TEXT, *COMPUTE),
)
def plan(session: Session) -> None:
    """Which blocks drop their attention sync, and what each needs first (the paper's algorithm 1); or for a target.

    Blocks are ranked by ascending sensitivity and dropped up to the budget. Classes: ISB is dropped as is, SB is
    distilled first, ESB has its heads grouped and is distilled. The plan holds for the model and tp it was made for.
    With a target any scored policy at any point, by dynamic programming: see the file's promise. --model and --text
    measure it; a promise that is not kept is a failed run.
    """
    from spd.planner import make_plan, read_sensitivity, thresholds

    o = session.options
    scored = read_sensitivity(o.sensitivity)
    if o.target_speedup is None and o.max_loss is None:
        result = make_plan(scored["sensitivity"], o.budget or "70%", *thresholds(scored, o.tau1, o.tau2))
    else:
        result = session.plan_for_target(scored)
    session.publish(result, scored["model"], scored.get("data"), scored["tp"])


@command(
    *(SENSITIVITY, *MODEL, *TEXT, PERCENTAGES, *SENT, *CALIBRATION, *THRESHOLDS, *REPAIR, *TASKS, COPIES),
    option("--strategies", "Of zs, b2b, b2b+hg, closed-form, best; as closed-form@50/100 at these %%.", default="zs"),
    option("--calibration-text", "Text to repair on, where not the one measured on.", metavar="FILE|NAME"),
)
def sweep(session: Session) -> None:
    """Perplexity against the percentage of blocks dropped, the least sensitive first, for ways to repair them.

    The default repairs nothing (zero-shot); the others draw the upper panels of the paper's figure 7, and go past it.
    Repairs are in float32, whatever --dtype evaluates. --tasks adds accuracy, compared with that of nothing dropped.
    Copies of the model divide the evaluation; for repairs there are as few as --tp allows, which divide those.
    """
    from spd.distill import identity_of
    from spd.evaluate import perplexity
    from spd.planner import read_sensitivity, thresholds
    from spd.sweep import BY_CLASS, ZERO_SHOT, Repairer, Sweep, parse_strategies, points_of, sweep_recipes

    o, accuracy, copies = session.options, session.accuracy(), session.fewest_replicas()
    strategies, model = parse_strategies(o.strategies), session.load()
    document = read_sensitivity(o.sensitivity, model.fingerprint, o.tp)
    measured, taus = document["sensitivity"], thresholds(document, o.tau1, o.tau2)
    if taus == (None, None) and any(BY_CLASS.get(name) for name in strategies):
        raise SPDError("Scores give no classes, which b2b and b2b+hg go by; measure sensitivities without --fast.")
    data, described, learnt = session.windows(model), model.describe(), None
    if [*strategies] != [ZERO_SHOT]:
        learnt = session.calibration(model, o.calibration_text).tokens
    load = partial(session.load, "float32", copies)
    session.shards(copies)  # every process must ask, and not all repair
    repairer = Repairer(load, identity_of(model), learnt, o.repairs, copies, session.progress)
    paper = {"epochs": o.epochs, "learning_rate": o.learning_rate}
    recipes = sweep_recipes(paper, {"joint_epochs": o.joint_epochs, "generated": o.generated}, o.seed, o.matmul)
    same = session.question_without("percentages", "strategies")
    if accuracy is not None:
        accuracy.compare_with(model, o.repairs / f"answers-{same}.json")
    del model  # the curve reads it afresh for repairs, and two do not fit where one hardly does

    def evaluate(model) -> dict:
        found = perplexity(model.transformer, data.tokens, replicas=session.replicas)
        scores = accuracy(model) if accuracy is not None else {}
        return {"perplexity": found["perplexity"], "nats": found["nats"]} | scores

    with session.progress(len(points_of(strategies, measured, o.percentages)), "points") as progress:
        sent = (o.bits, o.bits_plain, o.group)
        sweep = Sweep(measured, repairer, recipes, *taus, session.load, sent)
        found = sweep.curve(strategies, o.percentages, evaluate, progress, o.repairs / f"points-{same}.json")
    result = {"curve": found, "tokens": data.tokens[:, 1:].numel(), "windows": len(data.tokens)}
    session.publish(result, described, data.describe())


@command(
    *(*MODEL, *TEXT, *PLANS, *REPAIR),
    option("--recipe", "zs (nothing), closed-form (no training), paper, or best.", default="closed-form"),
    option("--strategy", "Of the paper's recipe, as in its figure 7: zs, b2b or b2b+hg.", default="b2b+hg"),
    option("--optimizer", "adam or adamw; the paper does not say."),
    result_in="result.json",
)
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
    names = ("epochs", "learning_rate", "optimizer", "joint_epochs", "generated", "matmul")
    named = one_of("strategy", o.strategy, PAPER) if o.recipe == "paper" else o.recipe
    recipe = recipe_named(named, o.seed, **{name: getattr(o, name) for name in names})
    model = session.load()
    document, data = session.plan_document(model), session.windows(model)
    with session.progress(total_steps(document, recipe, len(data.tokens)), "steps") as progress:
        result = repair(model, data.tokens, document, recipe, o.out, session.runtime.is_main, progress)
    session.publish(result, model.describe(), data.describe())


@command(*MODEL, PLAN, result_in=None)
def export(session: Session) -> None:
    """Write the repaired model as a Hugging Face folder that transformers loads, with its plan (plan.json) inside.

    It is meant to be read again with that plan and tp, which gives what model and repair gave. Run densely, as
    transformers does, it is another function than the original model and a worse one: repaired blocks were fitted to
    what shards see without the sync.
    """
    from spd.plan import read_plan

    o = session.options
    if o.plan is None or o.out is None:
        raise SPDError("An export needs --plan (a folder made by 'distill', or a plan file) and --out (a new folder).")
    o.tp = read_plan(o.plan).tp if o.tp == 1 else o.tp
    model = session.load()
    session.take_plan(model)
    session.publish(model.save_pretrained(o.out, session.runtime.is_main), model.describe())


@command(
    *(*MODEL, *PLANS),
    option("--prompt", "Text to continue; again for a batch.", action="append", required=True),
    option("--max-new-tokens", "Tokens to add at most.", at_least(1), 64),
    option("--temperature", "0 is greedy.", float, 0.0),
    option("--top-k", "Sample among the k most probable tokens.", int),
    option("--top-p", "Sample among the fewest tokens reaching probability p.", float),
)
def generate(session: Session) -> None:
    """Continue a prompt under a plan, greedily or sampled.

    The result's text and token_ids hold prompt and continuation (lists where several prompts were given).
    """
    from spd.generate import Sampling

    o = session.options
    sampling = Sampling(o.temperature, o.top_k, o.top_p, o.seed)
    model = session.load()
    taken = session.take_plan(model)
    ids = model.generate(o.prompt, o.max_new_tokens, sampling)
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    one = len(o.prompt) == 1
    result = {"text": texts[0] if one else texts, "token_ids": ids[0] if one else ids}
    session.publish(result | taken, model.describe())


@command(
    option("--model", "Checkpoint folder, GGUF file, 'spd-tiny' or hub id.", metavar="DIR|HUB_ID"),
    option("--shape", "Named shape with random weights, as llama-125m."),
    option("--tp", "Processes, one shard each; on CPU they are started here.", at_least(1), 1),
    option(
        "--plan", "Plan file or folder, for its policies; again to compare.", Path, [], action="append", metavar="PATH"
    ),
    option("--drop", "Blocks that drop; again to compare.", default=[], action="append", metavar="SPEC"),
    option("--sensitivity", "Compare plans that drop the least sensitive blocks of this file first.", Path),
    *(PERCENTAGES, *SENT, *PROMPT, *COMPUTE),
    option("--repeats", "Timed repetitions of each plan.", at_least(1), 20),
    option("--compile", "By torch.compile with static shapes; on GPUs also CUDA graphs.", bool, False),
    option("--alone", "Time rank 0's shard by itself; its all-reduces are predicted over --link.", bool, False),
    option("--transport", "How processes started here talk: shared-memory (where it works) or process-group."),
)
def bench(session: Session) -> None:
    """Time to first token and per output token of several plans, on real processes, interleaved.

    Beside them stand three bounds: everything full, every attention sync dropped, no communication at all.
    """
    from spd.bench import BenchSettings, Timed, run

    o = session.options
    timed = Timed(o.model, o.shape, o.tp)
    plans = timed.plans(o.plan, o.drop, o.sensitivity, o.percentages, (o.bits, o.bits_plain, o.group))
    same = ("batch", "prompt_len", "new_tokens", "link", "repeats", "dtype", "seed", "compile", "alone", "transport")
    settings = BenchSettings(plans, **{name: getattr(o, name) for name in same})
    session.publish(run(session.runtime, timed, settings), timed.described)


@command(
    option("--model", "Checkpoint folder, GGUF file or hub id, of which its shape is read.", metavar="DIR|HUB_ID"),
    option("--shape", "Or a named shape, as llama2-70b."),
    *(*SITE, *PLANS),
    option("--tp", "GPUs, one shard each; this and the next three may be lists, as in 2,4,8.", WHOLE, "8"),
    option("--batch", "Sequences.", WHOLE, "1"),
    option("--prompt-len", "Tokens in the prompt.", WHOLE, "128"),
    option("--percent", "Percentages of blocks that drop their attention sync, not a plan; left out: 70.", percentages),
    option("--new-tokens", "Tokens decoded, whose mean TPOT is.", at_least(0), 16),
    option("--break-even", "Below which bandwidth, above which latency it gains 5, 10, 20 %%.", bool, False),
)
def predict(session: Session) -> None:
    """Latency on machines that are not at hand: TTFT, TPOT, share of communication, what a plan gains, the ceiling.

    reduction is 1 - t_p/t_0, speedup t_0/t_p, both of TTFT; 'tpot' has its own. --link may be a name, as nvlink4;
    'help' lists the names, what measured each, and how far off it is at a size left out. With --nodes a link by formula
    joins the nodes. memory_bytes are of one GPU.
    """
    from itertools import product

    from spd.latency import ask
    from spd.links import preset_errors

    o = session.options
    if o.link == "help":
        return session.publish({"links": preset_errors()}, tp=0)
    config, described, fingerprint = session.shape()
    sizes = product(o.tp, o.batch, o.prompt_len, [o.new_tokens])
    result = ask(session.site(), config, session.plans(config, fingerprint), sizes, o.break_even)
    session.publish({"shape": described["name"]} | result, described, tp=result["tp"])


@command(
    option("benches", "Records of 'bench', or folders of them; or CSV tables.", Path, nargs="+", metavar="TABLE"),
    option("--check", "Records to predict, not to fit; again.", Path, [], action="append"),
    option("--statistic", "Time of a plan's repetitions: median, or min.", default="median"),
)
def profile(session: Session) -> None:
    """Calibrate the latency model on measurements of a machine, for 'predict --machine'.

    The records should differ in shape, prompt, batch and link; the errors on those to --check are in the result. CSV
    tables are all-reduces (devices,bytes,us), decoding, or operators, as in spd/profiles.
    """
    from spd.calibrate import profile as calibrate
    from spd.calibrate import profile_tables
    from spd.records import load_records

    o = session.options
    if all(path.suffix == ".csv" for path in o.benches):
        return session.publish(profile_tables(o.benches))
    fitted, checked = ([r for r in load_records(paths) if r["command"] == "bench"] for paths in (o.benches, o.check))
    with reading(FOREIGN):
        result = calibrate(fitted, checked, o.statistic)
    session.publish(result)


@command(option("drawn", "Record files, or folders of them.", Path, nargs="+", metavar="RECORDS"), result_in=None)
def report(session: Session) -> None:
    """Tables and figures from records, in the folder --out (default: figures); the tables are also shown on stderr."""
    from spd.report import report as draw

    out = session.options.out or Path("figures")
    with reading(FOREIGN):
        result = draw(session.options.drawn, out)
    print((out / "tables.md").read_text(), file=sys.stderr)
    session.publish(result, files=[Path(file) for file in result["files"]])


# ---------------------------------------------------------------- the program


def main(only: Command | None = None) -> None:
    """Runs a command, or the one of a script; a mistake of the user's ends as one sentence and exit code 1."""
    try:
        Session(*chosen(only)).run()
    except SPDError as error:
        fail(str(error), 1)
    except (KeyboardInterrupt, BrokenPipeError):  # the latter: who read the output has gone
        from spd.launch import leave

        leave(130)
    except OSError as error:  # a name too long, a disk that is full
        fail(f"{error.filename or 'A file or connection'}: {error.strerror or error}.", 1)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="spd-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        reason = " ".join(str(error).split())[:120]
        fail(f"This is a bug of spd: {type(error).__name__}: {reason} ({file.name}).", 70)
    sys.exit(0)


def chosen(only: Command | None):
    """The command that the words after the program's name ask for, and its options."""
    before = Parser(add_help=False, allow_abbrev=False)
    before.add_argument("--experiment", type=Path, metavar="FILE.yaml", help="Values of options, by command.")
    given, words = before.parse_known_args()
    if only is None:
        program = Parser(
            prog="spd",
            parents=[before],
            allow_abbrev=False,
            description="Sync-point drop for tensor-parallel LLaMA models: which all-reduces can go, and the gain.",
            epilog="Each command has --help, and prints one JSON document as its last line on stdout; progress goes to "
            "stderr. Start it under torchrun to spread the tp shards over processes.",
        )
        names = program.add_subparsers(dest="name", metavar="COMMAND", required=True)
        for each in COMMANDS.values():
            names.add_parser(each.name, help=each.function.__doc__.splitlines()[0], add_help=False)
        found, words = program.parse_known_args(words or ["--help"])
        only = COMMANDS[found.name]
    return only, only.parse(words, given.experiment)


def fail(sentence: str, code: int) -> NoReturn:
    from spd.launch import environment_rank, leave, say

    say(short(f"rank {environment_rank()}: {sentence}" if environment_rank() else sentence))
    leave(code)
