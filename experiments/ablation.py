"""What each step of a repair gives: the recipes taken apart, on one plan and on text that none of them has seen."""

from dataclasses import replace

from torch import Tensor

from spd.cli import main
from spd.closed_form import ClosedForm
from spd.distill import Recipe, identity_of, recipe_named
from spd.evaluate import Progress, perplexity, silent
from spd.options import CALIBRATION, MODEL, TEXT, command, option
from spd.plan import Plan, parse_blocks
from spd.pretrained import SPDModel
from spd.sweep import Repairer

FULL = "every sync point kept"
ZERO_SHOT = "zero-shot"


def compared_recipes(paper: dict, seed: int = 0) -> dict[str, Recipe]:
    """The repairs to compare, by name, each with one step more than the one before it.

    `paper` are changes to the paper's distillation as `recipe_named` takes them, such as its learning rate.
    """
    zero_shot, closed_form, best = (recipe_named(name, seed=seed) for name in ("zs", "closed-form", "best"))
    b2b, with_grouping = (recipe_named(name, seed=seed, **paper) for name in ("b2b", "b2b+hg"))
    nothing = ClosedForm(centre=False, correct=False, place=False, refit=False, refit_attention=False)

    def steps(**taken: bool) -> Recipe:
        return replace(closed_form, closed_form=replace(nothing, **taken))

    return {
        ZERO_SHOT: zero_shot,
        "paper: B2B": b2b,
        "paper: B2B + HG": with_grouping,
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
    repairer: Repairer, recipes: dict[str, Recipe], plan: Plan, evaluation: Tensor, progress: Progress = silent
) -> dict:
    """Perplexity of a plan on windows (W, T) after each of the recipes, which the repairer's calibration is apart from.

    Gives `variants`: of each `name`, `perplexity`, `nats`, `seconds` (of the repair)
    and `recovered`, the share of what zero-shot lost, in nats, that it wins back; first the model with every sync kept.
    """
    model = repairer.load()
    rows = [{"name": FULL, "seconds": 0.0} | _scores(model, evaluation)]
    for number, (name, recipe) in enumerate(recipes.items()):
        model = None  # first, lest there be two in memory
        folder, result = repairer.repair({"policies": plan.policies()}, recipe, f"variant-{number}")
        model = repairer.load()
        model.load_plan(folder)
        rows.append({"name": name, "seconds": result["seconds"]} | _scores(model, evaluation))
        progress(1)
    full, lost = (next(row["nats"] for row in rows if row["name"] == name) for name in (FULL, ZERO_SHOT))
    for row in rows:
        row["recovered"] = (lost - row["nats"]) / (lost - full) if lost != full else None
    counts = {"calibration": len(repairer.calibration), "evaluation": len(evaluation)}
    return {"variants": rows, "plan": str(plan), "windows": counts}


def _scores(model: SPDModel, evaluation: Tensor) -> dict:
    scores = perplexity(model.transformer, evaluation)
    return {name: scores[name] for name in ("perplexity", "nats")}


@command(
    *(*MODEL, *TEXT, *CALIBRATION),
    option("--drop", "Blocks, as in 1,3,5-7.", default="all"),
    option("--epochs", "Of the paper's distillation.", int),
    option("--learning-rate", "Of the paper's distillation.", float),
    name="ablate",
)
def ablation(session) -> None:
    """What each step of a repair gives: the recipes taken apart, on text that they have not seen."""
    o, model = session.options, session.load()
    compared = compared_recipes({"epochs": o.epochs, "learning_rate": o.learning_rate}, o.seed)
    blocks = model.config.num_blocks
    plan = Plan.dropping(blocks, parse_blocks(o.drop, blocks))
    learnt, data, described = session.calibration(model), session.windows(model), model.describe()
    identity = identity_of(model)
    del model  # each variant reads it afresh
    repairer = Repairer(session.load, identity, learnt.tokens, o.repairs, session.replicas, session.progress)
    with session.progress(len(compared), "variants") as progress:
        result = ablate(repairer, compared, plan, data.tokens, progress)
    session.publish(result, described, data.describe())


if __name__ == "__main__":
    main(ablation)
