"""What each step of a repair gives: the recipes taken apart, on one plan and on text that none of them has seen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from spd.cli import command, main
from spd.closed_form import ClosedForm
from spd.distill import Options, distill, total_steps
from spd.evaluate import perplexity
from spd.launch import bar
from spd.options import CALIBRATION, COMPUTE, MODEL, OUTPUT, TEXT, option
from spd.plan import Plan, parse_blocks
from spd.pretrained import SPDModel

FULL = "every sync point kept"
ZERO_SHOT = "zero-shot"


def variants(paper: dict, seed: int = 0) -> dict[str, Options]:
    """The repairs to compare, by name, each with one step more than the one before it.

    Args:
        paper: keyword arguments of `Options.of` for the paper's distillation, as its learning rate.
    """
    best, closed_form = (Options.of(recipe, seed=seed) for recipe in ("best", "closed-form"))
    b2b = Options.of("paper", "b2b", **paper, seed=seed)
    nothing = ClosedForm(centre=False, correct=False, place=False, refit=False, refit_attention=False)

    def steps(**taken: bool) -> Options:
        return replace(closed_form, closed_form=replace(nothing, **taken))

    return {
        ZERO_SHOT: Options.of("zs", seed=seed),
        "paper: B2B": b2b,
        "paper: B2B + HG": Options.of("paper", **paper, seed=seed),
        "B2B on the student's inputs": replace(b2b, students_inputs=True),
        "neurons placed": steps(place=True),
        "down projections refitted": steps(refit=True),
        "placed + refitted": steps(place=True, refit=True),
        "... + attention outputs refitted": steps(place=True, refit=True, refit_attention=True),
        "... + inputs corrected": steps(place=True, refit=True, refit_attention=True, correct=True),
        "heads centred": steps(centre=True),
        "closed-form: all five": closed_form,
        "closed-form + each block distilled": replace(best, joint=None, generated=0),
        "... + all blocks together": replace(best, generated=0),
        "best: ... + the model's own text": best,
    }


def ablate(
    load: Callable[[], SPDModel],
    plan: Plan,
    calibration: Tensor,
    evaluation: Tensor,
    compared: dict[str, Options],
    folder: Path,
    is_main: bool = True,
    bar: Callable = bar,
    progress: Callable[[int], None] = lambda n: None,
) -> dict:
    """Perplexity of a plan after each repair.

    Args:
        load: gives the model as read.
        calibration, evaluation: windows (W, T), apart from one another.
        folder: where the repairs are kept; an interrupted run goes on there.
        bar: `spd.launch.bar` or one like it, for each repair.
        progress: told of each variant done.

    Returns:
        `variants`: of each `name`, `perplexity`, `nats`, `seconds` (of the repair) and `recovered`, the share of what
        zero-shot lost, in nats, that it wins back; first the model with every sync point kept.

    Raises:
        SPDError: as `distill` does.
    """
    model = load()
    rows = [{"name": FULL, "seconds": 0.0} | _scores(model, evaluation)]
    for number, (name, options) in enumerate(compared.items()):
        model, document = load(), {"policies": plan.policies()}
        out = folder / f"variant-{number}"
        with bar(total_steps(document, options, len(calibration)), f"steps, {name}") as told:
            result = distill(model, calibration, document, options, out, is_main, told)
        model.load_plan(out)  # also where an earlier run had finished it
        rows.append({"name": name, "seconds": result["seconds"]} | _scores(model, evaluation))
        progress(1)
    full, lost = (next(row["nats"] for row in rows if row["name"] == name) for name in (FULL, ZERO_SHOT))
    for row in rows:
        row["recovered"] = (lost - row["nats"]) / (lost - full) if lost != full else None
    counts = {"calibration": len(calibration), "evaluation": len(evaluation)}
    return {"variants": rows, "plan": str(plan), "windows": counts}


def _scores(model: SPDModel, evaluation: Tensor) -> dict:
    scores = perplexity(model.transformer, evaluation)
    return {name: scores[name] for name in ("perplexity", "nats")}


@command(*MODEL, *TEXT, option("--drop", default="all", help="Blocks, as in 1,3,5-7."), *CALIBRATION,
         option("--epochs", type=int, help="Of the paper's distillation."),
         option("--learning-rate", type=float, help="Of the paper's distillation."), *COMPUTE, *OUTPUT,
         name="ablate")  # fmt: skip
def ablation(session) -> None:
    """What each step of a repair gives: the recipes taken apart, on text that they have not seen."""
    o = session.options
    compared = variants({"epochs": o.epochs, "learning_rate": o.learning_rate}, o.seed)
    model = session.load()
    blocks = model.config.num_blocks
    plan = Plan.dropping(blocks, parse_blocks(o.drop, blocks))
    learnt, data = session.calibration(model, o.calibration), session.windows(model)
    with session.progress(len(compared), "variants") as progress:
        result = ablate(session.load, plan, learnt.tokens, data.tokens, compared, o.repairs, session.runtime.is_main,
                        session.progress, progress)  # fmt: skip
    session.publish(result, model.describe(), o.tp, data.describe(), str(plan))


if __name__ == "__main__":
    main(ablation)
