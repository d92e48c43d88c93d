"""Repairs: recipes, what they write, that they go on where they stopped, and what they gain on a real model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED, VARIANTS, random_model, with_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spd import training
from spd.data import read_windows
from spd.distill import RECIPES, Recipe, distill, identity_of, recipe_named, split, total_steps
from spd.errors import SPDError
from spd.evaluate import perplexity
from spd.launch import Runtime, spawn
from spd.plan import Plan
from spd.pretrained import SPDModel
from spd.repairs import Repairs
from spd.sweep import Repairer, Sweep, parse_strategies, sweep_recipes
from spd.training import Diverged, Schedule

TOKENS = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(3))
QUICK = replace(RECIPES["best"], block=Schedule(1, 0.01, relative=True), joint=Schedule(1, 0.01, relative=True),
                generated=3)  # fmt: skip
LETTERS, CLASSES = "DF FF DF", ["SB", "ISB", "ESB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "model"
    with_tokenizer(path, random_model(path, **VARIANTS["grouped-query"]))
    return path


def document(letters: str = LETTERS, classes: list | None = CLASSES) -> dict:
    return {"policies": Plan.from_letters(letters).policies(), "classes": classes}


def repair(folder: Path, out: Path, recipe: Recipe = QUICK, letters: str = LETTERS, tp: int = 4, **more) -> dict:
    return distill(SPDModel.from_pretrained(folder, tp), TOKENS, document(letters), recipe, out, **more)


def changed_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the folder's plan lists."""
    files = json.loads((folder / "plan.json").read_text()).get("changed", [])
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def perplexity_with(folder: Path, plan: Path, tokens: torch.Tensor = TOKENS, tp: int = 4) -> float:
    model = SPDModel.from_pretrained(folder, tp)
    model.load_plan(plan)
    return perplexity(model.transformer, tokens)["perplexity"]


def repairer(folder: Path, out: Path, tokens: torch.Tensor = TOKENS) -> Repairer:
    identity = identity_of(SPDModel.from_pretrained(folder, tp=4))
    return Repairer(lambda: SPDModel.from_pretrained(folder, tp=4), identity, tokens, out)


def scores(model: SPDModel) -> dict:
    return {"perplexity": perplexity(model.transformer, TOKENS)["perplexity"]}


# ---------------------------------------------------------------- recipes and what they say


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zs", ["drop", "keep", "drop"]),
        ("b2b", ["distill, drop", "keep", "distill, drop"]),
        ("b2b+hg", ["distill, drop", "keep", "group heads, distill, drop"]),
    ],
)
def test_recipes_of_figure_7(folder, tmp_path, name, expected):
    options = recipe_named(name, epochs=1, learning_rate=1e-3)
    result = repair(folder, tmp_path, options, tp=2)
    assert [block["treatment"] for block in result["blocks"]] == expected
    assert [block["class"] for block in result["blocks"]] == CLASSES
    assert [block["loss_before"] is None for block in result["blocks"]] == [False, True, False]
    assert all(b["loss_after"] <= b["loss_before"] for b in result["blocks"] if b["loss_before"] is not None)
    assert ("grouping" in result["blocks"][2]) == (name == "b2b+hg")
    assert result["seconds"] > 0 and result["plan"] == LETTERS
    if name == "zs":
        assert result["perplexity_after"] == result["perplexity_before"]
        assert not changed_in(tmp_path)
    else:
        assert result["blocks"][0]["loss_after"] < result["blocks"][0]["loss_before"]
        assert len(result["curves"]["block_0"]["loss"]) == 1


def test_only_dropped_blocks_change_and_the_folder_gives_what_was_scored(folder, tmp_path):
    result = repair(folder, tmp_path, recipe_named("paper", epochs=1, learning_rate=1e-3))
    changed = changed_in(tmp_path)
    assert {name.split(".")[1] for name in changed} == {"0", "2"}
    assert changed["blocks.0.mlp.down.weight"].shape == (4, 32, 16)  # all shards
    held_out = TOKENS[split(len(TOKENS)) :]
    assert perplexity_with(folder, tmp_path, held_out) == result["perplexity_after"]
    assert perplexity_with(folder, tmp_path / "plan.json", held_out) == result["perplexity_after"]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "blocks"}
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    assert json.loads((tmp_path / "plan.json").read_text())["result"] == result


def test_best_trains_block_by_block_and_together(folder, tmp_path):
    result = repair(folder, tmp_path)
    assert set(result["curves"]) == {"block_0", "block_2", "joint"}
    assert result["windows"] == {"trained": 13, "held_out": 2}
    assert perplexity_with(folder, tmp_path, TOKENS[10:]) == result["perplexity_after"]


@pytest.mark.parametrize("letters", [LETTERS, "FD FF DF", "44 44 4F"])
@pytest.mark.parametrize("recipe", [QUICK, recipe_named("b2b", epochs=1)], ids=["best", "b2b"])
def test_steps_announced_are_steps_taken(folder, tmp_path, recipe, letters):
    taken = []
    repair(folder, tmp_path, recipe, letters, progress=lambda steps, **_: taken.append(steps))
    assert sum(taken) == total_steps(document(letters), recipe, len(TOKENS))


def test_divergence_leaves_the_block_zero_shot_and_says_so(folder, tmp_path):
    options = recipe_named("b2b", epochs=2, learning_rate=1e30)
    result = repair(folder, tmp_path, options)
    assert "non-finite" in result["blocks"][0]["note"]
    assert result["blocks"][0]["loss_after"] == result["blocks"][0]["loss_before"]
    assert result["perplexity_after"] == result["perplexity_before"]


def test_a_repair_that_does_worse_on_held_out_windows_is_undone(folder, tmp_path):
    result = repair(folder, tmp_path, recipe_named("b2b", epochs=1, learning_rate=0.3))
    assert "worse" in result["blocks"][0]["note"] and "zero-shot" in result["blocks"][0]["note"]
    assert result["perplexity_after"] == result["perplexity_before"]


@pytest.mark.parametrize("learning_rate", [1e-3, 1e30])
def test_no_gradient_outlives_a_block(folder, tmp_path, monkeypatch, learning_rate):
    """Kept, they add up to the model's size, block after block; a block that diverges keeps none either."""
    train, models = training.train, []

    def watched(objective, *rest, **how):
        models.append(objective.model)
        return train(objective, *rest, **how)

    monkeypatch.setattr("spd.distill.train", watched)
    repair(folder, tmp_path, recipe_named("b2b", epochs=1, learning_rate=learning_rate))
    assert models and all(p.grad is None for p in models[0].parameters())


def test_joint_training_that_diverges_is_undone(folder, tmp_path, monkeypatch):
    train = training.train

    def diverge(objective, *rest, **__):
        curves = train(objective, *rest)  # the weights are no longer what they were
        if len(objective.blocks) > 1:
            raise Diverged
        return curves

    monkeypatch.setattr("spd.distill.train", diverge)
    result = repair(folder, tmp_path / "diverged")
    assert "non-finite" in result["note"] and result["curves"]["joint"] is None
    without = repair(folder, tmp_path / "without", replace(QUICK, joint=None))
    assert result["perplexity_after"] == without["perplexity_after"]


def test_one_repair_serves_every_percentage(folder, tmp_path):
    """By the paper's recipe a block's repair does not depend on which other blocks are dropped."""
    recipes = sweep_recipes({"epochs": 1, "learning_rate": 1e-3}, {})
    sweep = Sweep([1.0, 0.0, 2.0], repairer(folder, tmp_path / "repairs"), recipes, 0.5, 1.5)  # SB, ISB, ESB
    points = sweep.curve(parse_strategies("b2b+hg"), None, scores)
    assert {path.name[:-9] for path in (tmp_path / "repairs").iterdir()} == {"b2b-SB", "b2b+hg-ESB"}
    for point, letters in zip(points, ("FF FF FF", "FF DF FF", "DF DF FF", "DF DF DF"), strict=True):
        model = SPDModel.from_pretrained(folder, 4)
        given = document(letters, ["SB", "ISB", "ESB"])
        distill(model, TOKENS, given, recipes["b2b+hg"], tmp_path / letters.replace(" ", ""))
        assert point["plan"] == letters
        assert point["perplexity"] == pytest.approx(perplexity(model.transformer, TOKENS)["perplexity"], rel=1e-6)


def test_a_sweep_evaluates_in_another_type_than_it_repairs_in(folder, tmp_path):
    """bfloat16 on GPUs, a sixteenth of float32's time there; repairs stay in float32, which they demand."""
    recipes, met = sweep_recipes({"epochs": 1, "learning_rate": 1e-3}, {}), []

    def evaluate(model: SPDModel) -> dict:
        met.append(model.transformer.embedding.weight.dtype)
        return scores(model)

    def load() -> SPDModel:
        return SPDModel.from_pretrained(folder, tp=4, dtype="bfloat16")

    sweep = Sweep([1.0, 0.0, 2.0], repairer(folder, tmp_path / "repairs"), recipes, 0.5, 1.5, load)
    (point,) = sweep.curve(parse_strategies("b2b"), [100.0], evaluate)
    assert met == [torch.bfloat16]
    assert point["plan"] == "DF DF DF"


# ---------------------------------------------------------------- every policy, at both points


TRAINED = replace(RECIPES["b2b+hg"], block=Schedule(2, 0.003, relative=True, decay=True, keep_best=True))


def states(folder: Path) -> list[torch.Tensor]:
    """The stream of the model as it was, nothing dropped, after each number of sublayers."""
    model = SPDModel.from_pretrained(folder, tp=1).transformer
    stream = model.embed(TOKENS)
    context, found = model.context(stream), [stream.x]
    for n in range(6):
        stream = model.shards.flush(model.produce(n, stream, context))
        found.append(stream.x)
    return found


@pytest.mark.parametrize("letters", ["DF FD FF", "FD FD DF", "33 3D wF", "DD DG FF"])
@pytest.mark.parametrize("recipe", [QUICK, TRAINED], ids=["best", "paper"])
@torch.no_grad()
def test_sublayers_learn_what_the_original_gave_where_all_is_next_synchronised(
    folder, tmp_path, monkeypatch, recipe, letters
):
    """Also the original's stream goes on through sublayers that another repair has not touched yet."""
    seen, made, expected = [], training.towards_output, states(folder)

    def recorded(inputs, stretch, targets, relative):
        assert relative == recipe.block.relative
        torch.testing.assert_close(targets.values[:10], expected[stretch.end][:10], atol=1e-4, rtol=1e-4)
        if not recipe.students_inputs:
            torch.testing.assert_close(inputs.values[:10], expected[stretch.first][:10], atol=1e-4, rtol=1e-4)
        seen.append(stretch)
        objective = made(inputs, stretch, targets, relative)
        if relative:  # a token's error counts by its stream's size
            found, wanted = inputs.run(slice(10, 12), stretch.end, stretch.policies), targets.values[10:12]
            shares = [
                ((f - w).square().mean() / w.square().mean()).item() for f, w in zip(found[0], wanted[0], strict=True)
            ]
            assert made(inputs, stretch, targets, True).loss(slice(10, 11)).item() == pytest.approx(
                sum(shares) / len(shares), rel=1e-4
            )
        return objective

    monkeypatch.setattr("spd.distill.towards_output", recorded)
    plan = {"policies": Plan.from_letters(letters, 2).policies(), "group": 2}
    result = distill(SPDModel.from_pretrained(folder, 4), TOKENS, plan, recipe, tmp_path)
    whole = Plan.from_letters(letters, 2)
    assert seen == (whole.whole() if recipe is QUICK else whole).stretches()
    notes = {("block", "mlp")[s.first % 2] + f" {s.first // 2}" for s in seen}
    rows = [("block", row) for row in result["blocks"] if row["loss_before"]]
    rows += [("mlp", row) for row in result.get("mlps", [])]
    assert {f"{kind} {row['index']}" for kind, row in rows} == notes
    assert all(row["loss_after"] <= row["loss_before"] for _, row in rows)
    assert rows[0][1]["loss_after"] < rows[0][1]["loss_before"]  # what follows has something to be apart from


def test_the_loss_of_a_dropped_mlp_is_that_after_the_next_attention(folder, tmp_path):
    """And only that MLP and that attention are trained."""
    result = repair(folder, tmp_path, recipe_named("b2b", epochs=1, learning_rate=1e-3), "FD FF FF")
    model = SPDModel.from_pretrained(folder, tp=4)
    model.plan = Plan.from_letters("FD FF FF")
    with torch.no_grad():
        blocks, shards = model.transformer.blocks, model.transformer.shards
        stream = model.transformer.embed(TOKENS[10:])
        context = model.transformer.context(stream)
        stream = model.transformer.run_block(0, stream, model.plan.blocks[0], context)
        assert stream.pending is not None
        y = blocks[1].attend(stream, context, None)
        found = stream.x + stream.pending.sum(0) + y.sum(0)
        wanted = states(folder)[3][10:]
    (row,) = result["mlps"]
    assert row["loss_before"] == pytest.approx((found - wanted).square().mean().item(), rel=1e-3)
    assert row["loss_after"] < row["loss_before"] and row["treatment"] == "distill, drop"
    parts = {".".join(name.split(".")[1:3]) for name in changed_in(tmp_path)}
    assert parts == {"0.mlp", "0.mlp_norm", "1.attention", "1.attention_norm"}
    assert perplexity_with(folder, tmp_path, TOKENS[10:]) == result["perplexity_after"]
    assert [block["treatment"] for block in result["blocks"]] == ["keep"] * 3 and shards.tp == 4


def test_what_has_no_closed_form_is_refused(folder, tmp_path):
    for letters in ("FD FF FF", "44 44 4F", "DD FF FF", "DF GF FF"):
        plan = {"policies": Plan.from_letters(letters, 2).policies(), "group": 2}
        with pytest.raises(SPDError, match="^Only dropped attention syncs .*'best' and 'paper' train"):
            distill(SPDModel.from_pretrained(folder, 4), TOKENS, plan, RECIPES["closed-form"], tmp_path)


# ---------------------------------------------------------------- going on after an interruption


PARTS = [*((QUICK, LETTERS, ["block 0", "block 2", "joint"], n) for n in range(3)),
         (QUICK, "FD FD FF", ["mlp 0", "mlp 1", "joint"], 0),
         *((recipe_named("b2b", epochs=1), "33 FF FF", ["block 0", "mlp 0"], n) for n in range(2))]  # fmt: skip


@pytest.mark.parametrize(("recipe", "letters", "stages", "stopped"), PARTS)
def test_interrupted_anywhere_it_ends_with_the_same_weights(
    folder, tmp_path, monkeypatch, recipe, letters, stages, stopped
):
    """Stopped right after a stage was written, and in the middle of the next: both end bitwise alike."""
    whole, stage = repair(folder, tmp_path / "whole", recipe, letters), stages[stopped]
    finish = Repairs.finish

    def stop_after(self, name, *arguments):
        finish(self, name, *arguments)
        if name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(Repairs, "finish", stop_after)
    with pytest.raises(KeyboardInterrupt):
        repair(folder, tmp_path / "parts", recipe, letters)
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "plan.json").exists()
    redone = []
    monkeypatch.setattr(Repairs, "finish", lambda self, name, *rest: (redone.append(name), finish(self, name, *rest)))
    resumed = repair(folder, tmp_path / "parts", recipe, letters)
    assert redone == stages[stopped + 1 :]
    assert_same(tmp_path / "whole", tmp_path / "parts", whole, resumed)


def assert_same(first: Path, second: Path, result: dict, other: dict) -> None:
    weights, others = changed_in(first), changed_in(second)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_interrupted_within_a_block_it_redoes_that_block(folder, tmp_path):
    whole = repair(folder, tmp_path / "whole")
    steps = []

    def stop(units, **_):
        steps.append(units)
        if sum(steps) == QUICK.units(None, 13) + QUICK.closed_form.passes + 7:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(folder, tmp_path / "parts", progress=stop)
    assert_same(tmp_path / "whole", tmp_path / "parts", whole, repair(folder, tmp_path / "parts"))


def test_interrupted_while_training_together_it_goes_on_after_the_last_epoch(folder, tmp_path, monkeypatch):
    options = replace(QUICK, joint=replace(RECIPES["best"].joint, epochs=3))
    whole = repair(folder, tmp_path / "whole", options)
    steps = []

    def stop(units, **_):
        steps.append(units)
        if sum(steps) == 2 * options.units(None, 13) + 2 * 13 + 5:  # two blocks, two epochs, and a little
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(folder, tmp_path / "parts", options, progress=stop)
    assert [path.name for path in (tmp_path / "parts/blocks").glob("epoch*")] == ["epoch-2.0-of-1.pt"]
    steps.clear()
    resumed = repair(folder, tmp_path / "parts", options, progress=lambda units, **_: steps.append(units))
    assert steps.count(1) == 13  # the third epoch alone
    assert_same(tmp_path / "whole", tmp_path / "parts", whole, resumed)


def test_a_finished_run_is_not_done_again_and_other_arguments_are_refused(folder, tmp_path, monkeypatch):
    first = repair(folder, tmp_path)
    monkeypatch.setattr("spd.distill.Activations", None)  # nothing is run
    assert repair(folder, tmp_path) == first
    with pytest.raises(SPDError, match=r"another run's work \(seed differ"):
        repair(folder, tmp_path, replace(QUICK, seed=1))


# ---------------------------------------------------------------- several processes


def distill_here(runtime: Runtime, folder: str, out: str) -> dict:
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(2))  # a shard's two units are scattered
    block = Schedule(2, 0.01, relative=True, decay=True, keep_best=True)  # with clipping, whose norm spans processes
    options = replace(RECIPES["b2b+hg"], block=block)
    result = distill(model, TOKENS, document("DF 3D DF"), options, Path(out), runtime.is_main)
    gathered = model.transformer.shards.gather(model.transformer.blocks[2].mlp.down.weight)
    return {"perplexity": result["perplexity_after"], "weights": gathered.flatten().tolist()}


def test_two_processes_end_where_one_does(folder, tmp_path):
    """Up to the order of sums, which Adam's first steps magnify where a gradient is nearly zero."""
    alone = distill_here(Runtime(), str(folder), str(tmp_path / "one"))
    together = spawn(2, distill_here, str(folder), str(tmp_path / "two"))
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-3)
    torch.testing.assert_close(torch.tensor(together["weights"]), torch.tensor(alone["weights"]), atol=5e-3, rtol=0)
    written = changed_in(tmp_path / "two")["blocks.2.mlp.down.weight"]
    assert torch.equal(written.flatten(), torch.tensor(together["weights"]))
    assert perplexity_with(folder, tmp_path / "two", TOKENS[10:], tp=2) == pytest.approx(
        together["perplexity"], rel=1e-5
    )


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_said_in_words(folder, tmp_path):
    for options, message in (
        (dict(name="nonsense"), "Unknown recipe"),
        (dict(name="paper", optimizer="sgd"), "Unknown optimizer"),
        (dict(name="paper", learning_rate=-1.0), "must be positive"),
        (dict(name="best", generated=-1), "must not be negative"),
    ):
        with pytest.raises(SPDError, match=message):
            recipe_named(**options)
    with pytest.raises(SPDError, match="1 calibration window"):
        distill(SPDModel.from_pretrained(folder, 4), TOKENS[:1], document(), QUICK, tmp_path)
    with pytest.raises(SPDError, match="float32"):
        distill(SPDModel.from_pretrained(folder, 4, dtype="bfloat16"), TOKENS, document(), QUICK, tmp_path)


def test_a_folder_for_another_tp_or_with_damaged_weights_is_refused(folder, tmp_path):
    repair(folder, tmp_path, recipe_named("b2b", epochs=1, learning_rate=1e-3))
    with pytest.raises(SPDError, match="made for tp=4"):
        perplexity_with(folder, tmp_path, tp=2)
    weights = next((tmp_path / "blocks").iterdir())
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SPDError, match="cannot be read"):
        perplexity_with(folder, tmp_path)
    weights.unlink()
    with pytest.raises(SPDError, match="cannot be read"):
        perplexity_with(folder, tmp_path)


# ---------------------------------------------------------------- export


B2B = recipe_named("b2b", epochs=1, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("tp", "key_value_heads", "options"), [(4, 4, B2B), (8, 8, B2B), (4, 4, RECIPES["closed-form"])]
)
def test_exported_folder_is_base_and_repair_together(folder, tmp_path, tp, key_value_heads, options):
    """At tp=8 the shards' copies of the 4 key/value heads have been trained apart: each becomes a head.

    The closed form gives the repaired blocks attention biases, which the exported ones all have.
    """
    repair(folder, tmp_path / "repair", options, tp=tp)
    model = SPDModel.from_pretrained(folder, tp)
    model.load_plan(tmp_path / "repair")
    result = model.save_pretrained(tmp_path / "exported")
    expected = perplexity(model.transformer, TOKENS)["perplexity"]
    assert perplexity_with(tmp_path / "exported", tmp_path / "exported", tp=tp) == pytest.approx(expected, rel=1e-5)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert hf.config.num_key_value_heads == key_value_heads
    assert hf.config.attention_bias == (options is not B2B)
    model.plan = Plan.full(3)
    with torch.no_grad():
        torch.testing.assert_close(hf(TOKENS).logits, model.transformer(TOKENS), rtol=1e-4, atol=1e-4)
    with pytest.raises(SPDError, match="not empty"):
        model.save_pretrained(tmp_path / "exported")
    assert result["plan"] == LETTERS


# ---------------------------------------------------------------- a real model


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real models and texts of ../shared are not here")
def test_distillation_recovers_a_real_model(shared, tmp_path):
    name = shared / "models" / "stories260K"
    model = SPDModel.from_pretrained(name, tp=4)
    tokens = read_windows(str(shared / "text/tinystories_v1_train_head.txt"), model.tokenizer, 128, 20).tokens
    whole = {"policies": Plan.dropping(5, range(5)).policies()}
    result = distill(model, tokens, whole, recipe_named("best", epochs=1, joint_epochs=1, generated=0), tmp_path)
    gap = result["perplexity_before"] - result["perplexity_full"]
    assert result["perplexity_after"] < result["perplexity_before"] - 0.25 * gap


# ---------------------------------------------------------------- sweeps


def test_other_numbers_are_another_repair_beside_the_first(plain, text_of_words, tmp_path):
    tokens = read_windows(str(text_of_words), SPDModel.from_pretrained(plain).tokenizer, 16, 20).tokens
    for epochs in (1, 2, 1):
        recipes = sweep_recipes({"epochs": epochs, "learning_rate": 1e-3}, {})
        sweep = Sweep([0.3, 0.1, 0.2], repairer(plain, tmp_path, tokens), recipes, -1.0, 10.0)
        sweep.curve(parse_strategies("b2b"), [100], scores)
    assert len(list(tmp_path.iterdir())) == 2


def test_points_alike_are_evaluated_once_and_all_are_listed(folder, tmp_path):
    """The same plan and the same repaired blocks: nothing dropped, or nothing that the recipe repairs."""
    evaluated = []

    def evaluate(model: SPDModel) -> dict:
        evaluated.append(str(model.plan))
        return scores(model)

    recipes = sweep_recipes({"epochs": 1, "learning_rate": 1e-3}, {})
    sweep = Sweep([1.0, 0.0, 2.0], repairer(folder, tmp_path / "repairs"), recipes, 0.5, 1.5)  # SB, ISB, ESB
    points = sweep.curve(parse_strategies("zs,b2b,b2b+hg"), None, evaluate, kept=tmp_path / "points.json")
    none, one, two, three = "FF FF FF", "FF DF FF", "DF DF FF", "DF DF DF"
    assert evaluated == [none, one, two, three, two, three, three]  # b2b+hg differs at the last block alone
    assert [(p["strategy"], p["blocks"], p["plan"]) for p in points] == [
        (name, blocks, plan) for name in ("zs", "b2b", "b2b+hg") for blocks, plan in enumerate((none, one, two, three))
    ]
    assert points[1]["perplexity"] == points[5]["perplexity"] and points[2]["perplexity"] != points[6]["perplexity"]
    again = sweep.curve(parse_strategies("b2b,zs@0/100"), None, None, kept=tmp_path / "points.json")
    assert again == [*points[4:8], points[0], points[3]]
    with pytest.raises(SPDError, match="'50%' is not a list of percentages"):
        parse_strategies("zs,closed-form@50%")
    (tmp_path / "points.json").write_text("[]")
    with pytest.raises(SPDError, match="points.json does not hold .*remove it"):
        sweep.curve(parse_strategies("zs"), None, evaluate, kept=tmp_path / "points.json")
