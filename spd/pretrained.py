"""The library's front door: a checkpoint, its tokenizer and a plan as one object."""

import logging
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spd.checkpoint import SafetensorsFolder, fill_randomly, load_weights
from spd.comm import Shards
from spd.config import ModelConfig
from spd.errors import SPDError
from spd.generate import Sampling, generate
from spd.model import Transformer
from spd.plan import Plan, plan_file, read_plan_document
from spd.repair.repaired import load_changed
from spd.shape_only import mark_of, name_of
from spd.tiny import MODEL_DIR

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*"]


def resolve(model: str | Path) -> Path:
    """The local folder of a path, of `spd-tiny`, or of a hub id (downloaded or found in the cache).

    Raises:
        SPDError: neither a folder nor a reachable, permitted hub repository.
    """
    if Path(model).is_dir():
        return Path(model)
    if str(model) == "spd-tiny":
        return MODEL_DIR
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise SPDError(f"There is no model folder {model}; a hub id has the form 'owner/name'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise SPDError(
            f"Access to {model} is gated: ask for it on its hub page, then log in with 'hf auth login'."
        ) from error
    except RepositoryNotFoundError as error:
        raise SPDError(
            f"The hub knows no model {model}, or not for your login; and there is no such folder."
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SPDError(f"{model} is neither a folder nor in the local cache, and the hub cannot be reached.") from error


def build(config: ModelConfig, shards: Shards, dtype: torch.dtype, device: str) -> Transformer:
    """An unfilled model: parameters are allocated once, in their final dtype and place."""
    with torch.device("meta"):
        model = Transformer(config, shards)
    return model.to(dtype).to_empty(device=device).eval().requires_grad_(False)


@dataclass
class SPDModel:
    """A LLaMA over logical shards: `transformer` computes; `folder` is None for random weights."""

    transformer: Transformer
    name: str
    fingerprint: str
    folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        tp: int = 1,
        plan: Plan | None = None,
        *,
        shards: Shards | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> "SPDModel":
        """Reads the hosted shards of a LLaMA checkpoint (folder, `spd-tiny` or hub id).

        `shards` says which of the `tp` shards this process hosts; left out, all of them.

        Raises:
            SPDError: no such model, not a LLaMA, damaged weights, or a tp that the shape does not allow.
        """
        folder = resolve(model)
        config = ModelConfig.from_folder(folder)
        shards = shards or Shards(tp)
        config.validate_tp(shards.tp)
        weights = SafetensorsFolder(folder)
        weights.validate(config)
        transformer = build(config, shards, DTYPES[dtype], device)
        load_weights(transformer, weights)
        loaded = cls(transformer, display_name(model), weights.fingerprint(config), folder)
        loaded.plan = plan or Plan.full(config.num_blocks)
        return loaded

    @classmethod
    def random(
        cls, config: ModelConfig, name: str, shards: Shards, dtype: str = "float32", device: str = "cpu", seed: int = 0
    ) -> "SPDModel":
        """Random weights of a given shape, for timing."""
        transformer = build(config, shards, DTYPES[dtype], device)
        fill_randomly(transformer, seed)
        return cls(transformer, f"{name} (random weights)", f"random-{name}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises SPDError where the model has none."""
        if self.folder is None:
            raise SPDError(f"{self.name} has no tokenizer.")
        return load_tokenizer(self.folder)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def tp(self) -> int:
        return self.transformer.shards.tp

    @property
    def plan(self) -> Plan:
        return self.transformer.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if len(plan) != self.config.num_blocks:
            raise SPDError(f"The plan has {len(plan)} blocks, the model {self.config.num_blocks}.")
        self.transformer.plan = plan

    def load_plan(self, path: Path) -> None:
        """Takes the plan at `path`; with a folder that `distill` made, also the weights repaired for it.

        Raises:
            SPDError: not a plan, made for another model or tp, or its weights are missing or damaged.
        """
        self.plan = self.load_repaired(path)

    def load_repaired(self, path: Path, blocks: Container[int] | None = None) -> Plan:
        """Takes the weights repaired for the plan at `path`, of all blocks or of some, and gives that plan.

        Raises:
            SPDError: as `load_plan` does.
        """
        document = read_plan_document(path, self.fingerprint, self.tp, self.config.num_blocks)
        if "changed" in document:
            load_changed(self.transformer, plan_file(path).parent / document["changed"], blocks)
        return Plan.from_policies(document["policies"])

    def generate(
        self, prompts: str | list[str], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Token ids, prompt included, of every prompt's continuation; `tokenizer.decode` makes them text."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        return generate(self.transformer, ids, max_new_tokens, sampling or Sampling())

    def describe(self) -> dict:
        return describe(self.config, self.name, self.fingerprint, self.folder)


def describe(config: ModelConfig, name: str, fingerprint: str, folder: Path | None = None) -> dict:
    """What a record or a plan says of a model; `shape_only` where its weights are random (`spd.shape_only`)."""
    mark = None if folder is None else mark_of(folder)
    described = {"name": name, "fingerprint": fingerprint}
    described |= {"blocks": config.num_blocks, "parameters": config.parameters()}
    return described | ({"shape_only": mark} if mark else {})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # "longer than the model's ..."
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        raise SPDError(f"{folder} holds no tokenizer that can be loaded ({type(error).__name__}).") from error


def display_name(model: str | Path) -> str:
    if not Path(model).is_dir():
        return str(model)
    mark = mark_of(Path(model))
    return name_of(mark) if mark else Path(model).resolve().name
