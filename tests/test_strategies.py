"""Curves of repair strategies: what sweeps with different numbers share."""

from spd import SPDModel
from spd.data import read_windows
from spd.sweep import Repairs, curve, options_of

SENSITIVITY = [0.3, 0.1, 0.2]


def test_other_numbers_are_another_repair_beside_the_first(plain, text_of_words, tmp_path):
    tokens = read_windows(str(text_of_words), SPDModel.from_pretrained(plain).tokenizer, 16, 20).tokens
    for epochs in (1, 2, 1):
        options = options_of({"epochs": epochs, "learning_rate": 1e-3}, {})
        repairs = Repairs(tokens[:10], tmp_path, -1.0, 10.0, options)
        curve(lambda: SPDModel.from_pretrained(plain, tp=4), SENSITIVITY, ["b2b"], [100], tokens[10:], repairs)
    assert len(list(tmp_path.iterdir())) == 2
