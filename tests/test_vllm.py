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

import spd.vllm
from spd import Plan, SPDModel
from spd.comm import Stream
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
        p = block.attend(Stream(x), context, 1)
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
