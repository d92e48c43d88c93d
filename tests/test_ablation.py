"""The repairs taken apart, and the paper's block design against its alternatives (table 1)."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from ablation import FULL, ZERO_SHOT, ablate, compared_recipes
from conftest import VARIANTS, random_model, with_tokenizer
from table1 import BiasBefore, ResidualAfter, block_designs, centre_model

from spd.cli import main
from spd.distill import identity_of
from spd.evaluate import perplexity
from spd.launch import Runtime, spawn
from spd.options import COMMANDS
from spd.plan import Plan
from spd.pretrained import SPDModel
from spd.sweep import Repairer

TOKENS = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ablation") / "model"
    with_tokenizer(path, random_model(path, **VARIANTS["grouped-query"]))
    return path


def load(folder, tp: int = 4):
    return SPDModel.from_pretrained(folder, tp)


def test_every_recipe_differs_from_the_one_before_it():
    recipes = list(compared_recipes({"epochs": 1, "learning_rate": 1e-3}).values())
    assert all(a != b for a, b in itertools.pairwise(recipes))
    assert recipes[1].block.epochs == 1 and recipes[1].block.learning_rate == 1e-3


def test_shares_recovered_and_interrupted_runs(folder, tmp_path):
    plan = Plan.from_letters("DF FF DF")
    few = {name: compared_recipes({})[name] for name in (ZERO_SHOT, "down projections refitted")}
    repairer = Repairer(lambda: load(folder), identity_of(load(folder)), TOKENS[:10], tmp_path)
    result = ablate(repairer, few, plan, TOKENS[10:])
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == [FULL, *few]
    assert rows[FULL]["recovered"] == 1 and rows[ZERO_SHOT]["recovered"] == 0
    model = load(folder)
    assert rows[FULL]["perplexity"] == pytest.approx(perplexity(model.transformer, TOKENS[10:])["perplexity"])
    again = ablate(repairer, few, plan, TOKENS[10:])
    assert again == result  # nothing was repaired anew, not even the seconds differ


def test_centred_values_and_their_biases_are_the_same_function(folder):
    model = load(folder).transformer
    before = model(TOKENS)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    centre_model(model, TOKENS)
    torch.testing.assert_close(model(TOKENS), before, atol=2e-5, rtol=1e-5)
    added = {name: p for name, p in model.named_parameters() if name not in weights}
    assert len(added) == 2 * len(model.blocks) and all(p.abs().max() > 1e-3 for p in added.values())


def test_designs_are_the_papers_where_nothing_is_dropped(folder):
    model = load(folder).transformer
    centre_model(model, TOKENS)
    expected = perplexity(model, TOKENS)["perplexity"]
    for altered in (ResidualAfter, BiasBefore):
        assert perplexity(altered(model), TOKENS)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_residual_after_keeps_each_shards_attention_for_itself(folder):
    """Written out for one block at tp=2, followed by the head."""
    model = load(folder, 2).transformer
    model.plan = Plan.dropping(3, attention=[0])
    stream = model.embed(TOKENS)
    context, block = model.context(stream), model.blocks[0]
    found = ResidualAfter(model).run_block(0, stream, model.plan.blocks[0], context)
    y = block.attention(block.attention_norm(stream.x[None]), context)
    z = block.mlp(block.mlp_norm(stream.x + y))
    torch.testing.assert_close(found.read(), stream.x + y + z.sum(0))
    last = ResidualAfter(model).logits(found)
    torch.testing.assert_close(last, model.head(model.norm(stream.x + y[0] + z.sum(0))))


def designs_here(runtime: Runtime, folder: str) -> dict:
    model = SPDModel.from_pretrained(folder, shards=runtime.shards(4)).transformer
    return block_designs(model, Plan.dropping(3, attention=[0]), TOKENS)


def test_table_1_alike_on_one_process_and_two(folder):
    alone = designs_here(Runtime(), str(folder))
    together = spawn(2, designs_here, str(folder))
    assert [row["design"] for row in alone["residual"]] == ["no SPD", "residual before", "residual after"]
    for kind in ("residual", "bias"):
        for one, other in zip(alone[kind], together[kind], strict=True):
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    assert alone["bias"][0]["perplexity"] == pytest.approx(alone["residual"][0]["perplexity"], rel=1e-5)


def test_on_a_trained_model_the_papers_design_wins_by_far():
    model = SPDModel.from_pretrained("spd-tiny", tp=8)
    from spd.data import read_windows

    tokens = read_windows("builtin", model.tokenizer, 256, 8).tokens
    found = block_designs(model.transformer, Plan.dropping(8, attention=[0]), tokens)
    for kind in ("residual", "bias"):
        scores = {row["design"]: row["perplexity"] for row in found[kind]}
        better, worse = ("residual before", "residual after") if kind == "residual" else ("bias after", "bias before")
        assert scores["no SPD"] < scores[better] < scores[worse]


# ---------------------------------------------------------------- the commands and their tables


def test_commands_and_the_tables_of_their_records(folder, tmp_path, monkeypatch, capsys):
    from draw_ablation import figures, tables

    from spd.records import load_records
    from spd.report import write

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 40)
    common = ["--model", folder, "--tp", 2, "--text", "text.txt", "--seq-len", 8, "--windows", 4, "--no-mlflow"]
    run(monkeypatch, "table1", *common)
    monkeypatch.setattr("ablation.compared_recipes", lambda *_: {ZERO_SHOT: compared_recipes({})[ZERO_SHOT]})
    run(monkeypatch, "ablate", *common, "--skip", 10, "--calibration", 10)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {table.name: table for table in tables(load_records(["runs"]))}
    subject = "model, text, tp=2, all blocks"
    assert found["ablation"].frame[subject][1] == printed["variants"][1]["perplexity"]
    assert found["table1"].frame["model"][0] == "model, text, tp=2, 1 of 3 blocks"
    write(["runs"], "figures", tables, figures)
    assert Path("figures/ablation.png").is_file()
    assert f"{subject} |" in Path("figures/tables.md").read_text()


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["spd", *map(str, arguments[1:])])
    with pytest.raises(SystemExit) as stop:
        main(COMMANDS[arguments[0]])
    assert not stop.value.code
