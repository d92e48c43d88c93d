"""The library's front door: a checkpoint, its tokenizer and a plan as one object."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spd import __version__
from spd.checkpoint import (
    SINGLE,
    Checkpoint,
    dense_tensors,
    exported_config,
    load_changed,
    load_weights,
    randomize,
    write_weights,
)
from spd.comm import Shards
from spd.config import DTYPES, ModelConfig, hf_shapes
from spd.errors import SPDError, reading
from spd.generate import Sampling, generate
from spd.launch import cache_folder, say
from spd.model import Transformer
from spd.plan import Plan, read_plan
from spd.records import inside, parsed, regular, write_json, write_whole
from spd.repairs import ended
from spd.tiny import MODEL_DIR
from spd.vllm import FAMILIES, unservable

HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "merges.txt"]
COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "generation_config.json", "chat_template*")
DESCRIBED = (  # what an export says anew in config.json
    *("model_type", "num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim"),
    *("attention_bias", "max_position_embeddings"),
)
CARD = """\
**Loaded without its plan, as a dense model, this folder is {dense}.**

# {name} for tensor parallelism of {tp}, with {syncs} all-reduces a pass instead of {all}

In {dropped} of {blocks} blocks the all-reduce after attention is left out (Sync-Point Drop, ICML 2025){repaired}.
The plan, two letters a block for attention and MLP (F: kept, D: dropped):

    {plan}

{serving}
{measured}
Written by `spd export`, version {version}, from {name} ({fingerprint}).
"""
SERVING = """\
vLLM serves it on {tp} ranks with the plug-in of `spd`, installed from a checkout in vLLM's own environment:

```bash
pip install --no-deps CHECKOUT_OF_SPD
vllm serve {folder} --tensor-parallel-size {tp}
```"""
MEASURED = """
| | perplexity, {windows} windows held out of the calibration |
| --- | --- |
| {name} | {full} |
| with the plan, not repaired | {before} |
| with the plan, repaired: this folder | {after} |
"""
MARK = "shape_only.json"  # of a folder with random weights: their `name`, `shape`, `blocks` and `of` how many


def resolve(model: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a path, of a GGUF file, of `spd-tiny`, or of a hub id (downloaded or found in the cache)."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).suffix == ".gguf":
        return dequantised(Path(model))
    if str(model) == "spd-tiny":
        return MODEL_DIR
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise SPDError(f"There is no model folder {model}; a hub id has the form 'owner/name'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=files))
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


def dequantised(file: Path) -> Path:
    """The folder in the user's cache that holds a GGUF file's weights in float32, made where it is not there."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise SPDError(f"The model {file} cannot be read ({error.strerror}).") from error
    target = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            partial = Path(folder, target.name)
            partial.mkdir()
            _dequantise(file, partial)
            partial.replace(target)
        say(f"The weights of {file} are kept in float32 in {target}.")
    except OSError as error:
        if not target.is_dir():  # else another process was first
            raise SPDError(f"{file} cannot be dequantised to {target} ({error.strerror or error}).") from error
    return target


def _dequantise(file: Path, folder: Path) -> None:
    """Writes configuration, weights and tokenizer, as transformers reads them."""
    from transformers import AutoConfig, AutoModelForCausalLM  # imported here: a second, for this alone

    source = {"pretrained_model_name_or_path": str(file.resolve().parent), "gguf_file": file.name}
    with reading(f"{file} is damaged or no GGUF file of a model that is supported"):
        try:
            description = AutoConfig.from_pretrained(**source).to_dict()
            config = ModelConfig.from_hf(description)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except ImportError as error:
            raise SPDError(
                f"{file} is read by the package gguf, which is not here: pip install gguf==0.19.0."
            ) from error
    held = model.state_dict()
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise SPDError(f"{len(missing)} of {len(hf_shapes(config))} tensors are missing in {file}: {missing[0]}.")
    for name in ("quantization_config", "_name_or_path"):
        description.pop(name, None)
    write_json(folder / "config.json", description | {"architectures": [type(model).__name__], "dtype": "float32"})
    tensors = {name: held[name].contiguous() for name in hf_shapes(config)}
    write_whole(folder / SINGLE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    tokenizer.save_pretrained(folder)


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
    repair: dict | None = None  # the result of the repair whose weights were loaded

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
        """Reads the hosted shards of a LLaMA checkpoint (folder, GGUF file, `spd-tiny` or hub id).

        `shards` says which of the `tp` shards this process hosts; left out, all of them."""
        source, shards = Checkpoint(resolve(model)), shards or Shards(tp)
        source.config.validate_tp(shards.tp)
        transformer = build(source.config, shards, DTYPES[dtype], device)
        load_weights(transformer, source)
        loaded = cls(transformer, display_name(model), source.fingerprint(), source.folder)
        if plan is not None:
            loaded.plan = plan
        return loaded

    @classmethod
    def random(
        cls, config: ModelConfig, name: str, shards: Shards, dtype: str = "float32", device: str = "cpu", seed: int = 0
    ) -> "SPDModel":
        """Random weights of a given shape, for timing."""
        transformer = build(config, shards, DTYPES[dtype], device)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter_name, parameter in transformer.named_parameters():
            randomize(parameter_name, parameter, generator)
        return cls(transformer, f"{name} (random weights)", f"random-{name}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises SPDError where the model has none."""
        if self.folder is None:
            raise SPDError(f"{self.name} has no tokenizer.")
        return load_tokenizer(self.folder)

    def known(self, ids: list[int]) -> list[int]:
        """Token ids of the tokenizer, which may have more than the model."""
        if max(ids, default=0) >= self.config.vocab_size:
            raise SPDError(
                f"The tokenizer of {self.folder} gives the token id {max(ids)}, and the model knows ids below "
                f"{self.config.vocab_size}: tokenizer and weights do not belong together."
            )
        return ids

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
        """Takes the plan at `path`; with a folder that `distill` made, also the weights repaired for it."""
        found = read_plan(path, self.fingerprint, self.tp, self.config.num_blocks)
        for name in found.changed:
            load_changed(self.transformer, inside(path if path.is_dir() else path.parent, name))
        done = ended(path)
        self.plan, self.repair = found.plan, done and done.result

    def generate(
        self, prompts: str | list[str], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Token ids, prompt included, of every prompt's continuation; `tokenizer.decode` makes them text."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.known(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        return generate(self.transformer, ids, max_new_tokens, sampling or Sampling())

    def save_pretrained(self, folder: Path, is_main: bool = True) -> dict:
        """Writes model, tokenizer, plan and model card to a new folder; gives `files`, `plan`, `exported`.

        The folder is a plain dense LLaMA: each shard's rows and columns at their places, which is what tensor
        parallelism splits again in the same way. Read with the plan and tp it was made for, it computes what base and
        repair computed. Run densely it is another function than the original, and a worse one: repaired projections
        were fitted to the partial inputs that shards see without the sync. Where the plan drops something config.json
        tells vLLM (`vllm.py`), and README.md people.

        Raises SPDError where the folder is not empty, or where vLLM could not serve what the plan drops.
        """
        drops = self.plan != Plan.full(len(self.plan))
        served = {"tp": self.tp, "plan": str(self.plan)} if drops else {}
        if drops and (reason := unservable(served)):
            raise SPDError(reason)
        if is_main and folder.exists() and any(folder.iterdir()):
            raise SPDError(f"{folder} is not empty; a model is exported to a new folder.")
        config = exported_config(self.transformer)
        partial = folder.with_name(folder.name + ".partial")
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._copy_descriptions(partial, config, served)
            if drops:
                write_whole(partial / "README.md", lambda path: path.write_text(self._card(folder.name)))
        write_weights(partial, config, dense_tensors(self.transformer, config), is_main)
        if not is_main:
            return {}
        described = describe(config, folder.name, Checkpoint(partial).fingerprint())
        plan = self.plan.document() | {"plan": str(self.plan), "model": described, "tp": self.tp}
        write_json(partial / "plan.json", plan)
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
        files = sorted(str(path) for path in folder.iterdir())
        return {"files": files, "plan": plan["plan"], "exported": described}

    def _copy_descriptions(self, target: Path, config: ModelConfig, served: dict) -> None:
        """The tokenizer's files, and a `config.json` that says what is other than in the model's own."""
        description, own = json.loads((self.folder / "config.json").read_text()), config.to_hf().to_dict()
        if config.family != self.config.family:  # what the other family has in another form, or not at all
            windows = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
            description = {name: value for name, value in description.items() if name not in windows}
            description["rope_parameters"] = own["rope_parameters"]
        architecture = config.form.architecture
        description = {name: value for name, value in description.items() if name not in ("torch_dtype", "spd")}
        description |= {"architectures": [f"SPD{architecture}" if served else architecture]}
        description |= {"spd": served} if served else {}
        description |= {name: own[name] for name in DESCRIBED if name in own}
        description |= {} if config.family == "opt" else {"head_dim": config.head_dim}
        description["dtype"] = str(self.transformer.embedding.weight.dtype).removeprefix("torch.")
        write_json(target / "config.json", description)
        for file in (file for pattern in COPIED for file in self.folder.glob(pattern)):
            shutil.copy(file, target / file.name)

    def _card(self, folder: str) -> str:
        """The model card, whose first line warns of a dense load."""
        said = {"name": self.name, "tp": self.tp, "plan": self.plan, "blocks": len(self.plan), "folder": folder}
        said |= {"syncs": self.plan.syncs(), "all": 2 * len(self.plan), "dropped": len(self.plan.dropped())}
        said |= {"version": __version__, "fingerprint": self.fingerprint, "repaired": "", "measured": ""}
        said["dense"] = "another function than under it"
        served = self.config.form.architecture in FAMILIES  # an export's is LLaMA else
        own = (
            "The plug-in for vLLM does not know the family; `spd eval --model {folder} --plan {folder} --tp {tp}` does."
        )
        said["serving"] = (SERVING if served else own).format(**said)
        if self.repair:
            figures = {key: self.repair[f"perplexity_{key}"] for key in ("full", "before", "after")}
            figures = {key: "not finite" if value is None else f"{value:.3f}" for key, value in figures.items()}
            said["measured"] = MEASURED.format(name=self.name, windows=self.repair["windows"]["held_out"], **figures)
            said["repaired"] = f", and the blocks are repaired for that (recipe `{self.repair['recipe']}`)"
            said["dense"] = f"worse than {self.name}"
        return CARD.format(**said)

    def describe(self) -> dict:
        return describe(self.config, self.name, self.fingerprint, self.folder)


def describe(config: ModelConfig, name: str, fingerprint: str, folder: Path | None = None) -> dict:
    """What a record or a plan says of a model; `shape_only` where its folder holds random weights."""
    mark = None if folder is None else mark_of(folder)
    described = {"name": name, "fingerprint": fingerprint}
    described |= {"blocks": config.num_blocks, "parameters": config.parameters()}
    return described | ({"shape_only": mark} if mark else {})


def display_name(model: str | Path) -> str:
    """A folder's name, or what its random weights are called; any other name as it is."""
    folder = Path(model)
    if not folder.is_dir():
        return folder.stem if folder.suffix == ".gguf" else str(model)
    return (mark_of(folder) or {}).get("name", folder.resolve().name)


def mark_of(folder: Path) -> dict | None:
    path = folder / MARK
    return parsed(path, dict, "does not say which weights are random") if path.exists() else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # "longer than the model's ..."
    with reading(f"{folder} holds no tokenizer that can be loaded"):
        for file in filter(Path.exists, (file for pattern in COPIED for file in folder.glob(pattern))):
            regular(file)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some of what is wrong shows only here
        return tokenizer
