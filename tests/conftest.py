"""Small models to test with: random ones made here, real ones from ../shared where it is there."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spd.cli import main
from spd.tiny import MODEL_DIR

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for one another

# One random model for each thing that LLaMA checkpoints differ in; 8 heads of 4, so that tp up to 8 is allowed.
VARIANTS = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True, "num_key_value_heads": 2},
    "all-biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 8},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        }
    },
    "llama3-rope": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip


def hf_config(**changes) -> LlamaConfig:
    shape = dict(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaConfig(**(shape | changes))


def random_model(folder: Path, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A transformers model with every parameter random (norms and biases too), saved in `folder`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(hf_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """Variant name -> (folder, transformers model), made when first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[name] = folder, with_tokenizer(folder, random_model(folder, **VARIANTS[name]))
        return made[name]

    return get


def with_tokenizer(folder: Path, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A word-level tokenizer over the model's vocabulary: `t7 t8` gives the ids 7 and 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = special | {f"t{i}": i for i in range(3, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return model


@pytest.fixture
def plain(variants) -> Path:
    return variants("plain")[0]


@pytest.fixture(scope="session")
def text_of_words(tmp_path_factory) -> Path:
    """600 words for the random models' tokenizer."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    ids = torch.randint(3, 96, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(f"t{i}" for i in ids))
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real models and texts of ../shared are not here")
    return SHARED


@pytest.fixture(scope="session")
def spd_tiny() -> Path:
    return MODEL_DIR


@pytest.fixture
def spd(monkeypatch, capsys, tmp_path):
    """Runs a command as a user would; gives (exit code, last line as JSON or None, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, mirror=False):
        words = ["spd", *map(str, arguments)] + ([] if mirror or "--help" in arguments else ["--no-mlflow"])
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        if isinstance(code, str):  # sys.exit("sentence") prints it and exits with 1
            code, err = 1, err + code
        lines = out.strip().splitlines()
        return code or 0, json.loads(lines[-1]) if lines and not code and lines[-1].startswith("{") else None, err

    return run
