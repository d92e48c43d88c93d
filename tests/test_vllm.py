"""The plug-in for vLLM as far as it goes without vLLM; `make check-vllm` (vllm_check.py) runs it in vLLM itself."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from test_families import CONFIGS
from transformers import AutoModelForCausalLM

import spd.vllm
from spd import Plan, SPDModel
from spd.comm import Stream
from spd.errors import SPDError
from spd.vllm import dropped_block, unservable

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_WITHOUT = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import spd.vllm

spd.vllm.unservable(None)
print(json.dumps([name for name in sys.modules if name.startswith("spd")]))
"""


@pytest.mark.parametrize("variant", ["plain", "grouped-query", "attention-bias", "all-biases"])
@pytest.mark.parametrize("tp", [2, 4])
def test_dropped_block_is_the_engines(variants, variant, tp):
    """The ranks stacked, their sum by hand. As in vLLM the MLP's bias is in rank 0's part, attention's in nobody's."""
    model = SPDModel.from_pretrained(variants(variant)[0], tp, Plan.from_letters("FF DF FF")).transformer
    block, x = model.blocks[1], torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))

    def mlp(h: torch.Tensor) -> torch.Tensor:
        z = block.mlp(h)
        if block.mlp.down.bias is not None:
            z[0] += block.mlp.down.bias
        return z

    with torch.no_grad():
        context = model.context(Stream(x))
        wanted = model.run_block(1, Stream(x), model.plan.blocks[1], context)
        p = block.attend(Stream(x), context, None)
        y, residual = dropped_block(p, x, block.attention.out.bias, block.mlp_norm, mlp, lambda parts: parts.sum(0))
    assert wanted.pending is None
    torch.testing.assert_close(y + residual, wanted.x, rtol=0, atol=1e-5)


def test_it_needs_torch_alone():
    """It is installed with `--no-deps` beside a server's own torch."""
    names = {re.split("==", pin)[0].replace("-", "_").replace("pyyaml", "yaml") for pin in PROJECT["dependencies"]}
    hidden = names - {"torch", "numpy"} | {"vllm"}
    assert {"mlflow", "lm_eval", "pandas", "transformers", "pydantic"} < hidden
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, *hidden], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["spd", "spd.vllm"]


def test_entry_point_is_what_vllm_calls():
    (name, value), *others = PROJECT["entry-points"]["vllm.general_plugins"].items()
    assert name == "spd" and not others
    assert EntryPoint(name, value, "vllm.general_plugins").load() is spd.vllm.register


def test_classes_are_those_of_known_families_alone():
    with pytest.raises(AttributeError, match="no attribute 'SPDGemmaForCausalLM'"):
        _ = spd.vllm.SPDGemmaForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'LlamaForCausalLM'"):
        _ = spd.vllm.LlamaForCausalLM


@pytest.mark.parametrize(
    ("made_for", "tp", "sentence"),
    [
        ({"tp": 2, "plan": "DF FF"}, 2, None),
        ({"tp": 2, "plan": "DF FF"}, None, None),
        ({"tp": 2, "plan": "DF FF"}, 4, "of 2, not 4: start vLLM with --tensor-parallel-size 2, or"),
        ({"tp": 2, "plan": "DF FD 8F"}, 2, "cannot serve a plan with 8F, FD in it: only attention's"),
        (None, 2, "holds no plan"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_a_sentence(made_for, tp, sentence):
    reason = unservable(made_for, tp)
    assert reason is None if sentence is None else (sentence in reason and reason.endswith("."))


# ---------------------------------------------------------------- what an export tells engines and people


def export(model: SPDModel, folder: Path) -> dict:
    """The folder's config.json."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_export_tells_vllm_the_plan_and_transformers_loads_it_densely(plain, tmp_path):
    model = SPDModel.from_pretrained(plain, tp=4, plan=Plan.from_letters("DF FF DF"))
    config = export(model, tmp_path / "served")
    assert config["architectures"] == ["SPDLlamaForCausalLM"]
    assert config["spd"] == {"tp": 4, "plan": "DF FF DF"}
    assert {"tokenizer.json", "generation_config.json", "plan.json"} < {f.name for f in (tmp_path / "served").iterdir()}

    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    with torch.no_grad():
        model.plan = Plan.full(3)
        torch.testing.assert_close(dense(tokens).logits, model.transformer(tokens), rtol=0, atol=1e-4)

    again = export(SPDModel.from_pretrained(tmp_path / "served", tp=2), tmp_path / "plain")
    assert again["architectures"] == ["LlamaForCausalLM"] and "spd" not in again
    assert not (tmp_path / "plain" / "README.md").exists()


def test_card_of_an_export_warns_of_a_dense_load_and_says_how_to_serve(plain, tmp_path):
    model = SPDModel.from_pretrained(plain, tp=4, plan=Plan.from_letters("DF FF DF"))
    export(model, tmp_path / "served")
    first, *rest = (tmp_path / "served" / "README.md").read_text().splitlines()
    assert first == "**Loaded without its plan, as a dense model, this folder is another function than under it.**"
    assert "# model for tensor parallelism of 4, with 4 all-reduces a pass instead of 6" in rest
    assert "vllm serve served --tensor-parallel-size 4" in rest and "    DF FF DF" in rest

    model.repair = {"recipe": "best", "perplexity_full": 9.25, "perplexity_before": None, "perplexity_after": 10.5}
    model.repair["windows"] = {"held_out": 12}
    export(model, tmp_path / "repaired")
    first, *rest = (tmp_path / "repaired" / "README.md").read_text().splitlines()
    assert first == "**Loaded without its plan, as a dense model, this folder is worse than model.**"
    assert [line for line in rest if line.startswith("| ")] == [
        "| | perplexity, 12 windows held out of the calibration |",
        "| --- | --- |",
        "| model | 9.250 |",
        "| with the plan, not repaired | not finite |",
        "| with the plan, repaired: this folder | 10.500 |",
    ]


def test_card_says_where_vllm_cannot_serve_the_family(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["opt"]).save_pretrained(tmp_path / "opt")
    export(SPDModel.from_pretrained(tmp_path / "opt", tp=3, plan=Plan.from_letters("DF FF DF")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "does not know the family; `spd eval --model out --plan out --tp 3` does." in card
    assert "vllm serve" not in card


def test_plan_that_a_folder_cannot_carry_is_refused_before_anything_is_written(plain, tmp_path):
    model = SPDModel.from_pretrained(plain, tp=4, plan=Plan.from_letters("DF FD DF"))
    with pytest.raises(SPDError, match="plan with FD in it: only attention's sync points can be dropped"):
        model.save_pretrained(tmp_path / "served")
    assert list(tmp_path.iterdir()) == []
