"""Curves of repair strategies: what is shared between percentages is what each would have had by itself."""

import pytest

from spd import SPDModel
from spd.data import read_windows
from spd.distill import distill
from spd.evaluate import perplexity
from spd.planner import make_plan
from spd.recipes import Options
from spd.strategies import Repairs, curve, options_of

SENSITIVITY = [0.3, 0.1, 0.2]


def test_one_repair_of_all_blocks_serves_every_percentage(plain, text_of_words, tmp_path):
    def load():
        return SPDModel.from_pretrained(plain, tp=4)

    tokens = read_windows(str(text_of_words), load().tokenizer, 16, 20).tokens
    options = options_of({"epochs": 2, "learning_rate": 1e-3}, {})
    repairs = Repairs(tokens[:10], tmp_path / "shared", -1.0, 0.25, options)
    points = curve(load, SENSITIVITY, ["b2b+hg"], [0, 34, 67, 100], tokens[10:], repairs)
    assert len(list((tmp_path / "shared").iterdir())) == 2  # of the two sensitive blocks, and the other
    for blocks in (1, 2, 3):
        model = load()
        document = make_plan(SENSITIVITY, str(blocks), -1.0, 0.25)
        distill(model, tokens[:10], document, Options.of("paper", "b2b+hg", 2, 1e-3), tmp_path / str(blocks))
        assert points[blocks]["perplexity"] == pytest.approx(perplexity(model.transformer, tokens[10:])["perplexity"])
    assert curve(load, SENSITIVITY, ["b2b+hg"], [67], tokens[10:], repairs)[0] == points[2]  # from what is kept


def test_other_numbers_are_another_repair_beside_the_first(plain, text_of_words, tmp_path):
    tokens = read_windows(str(text_of_words), SPDModel.from_pretrained(plain).tokenizer, 16, 20).tokens
    for epochs in (1, 2, 1):
        options = options_of({"epochs": epochs, "learning_rate": 1e-3}, {})
        repairs = Repairs(tokens[:10], tmp_path, -1.0, 10.0, options)
        curve(lambda: SPDModel.from_pretrained(plain, tp=4), SENSITIVITY, ["b2b"], [100], tokens[10:], repairs)
    assert len(list(tmp_path.iterdir())) == 2
