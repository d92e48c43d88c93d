"""Shape of a model and its family: read from a Hugging Face `config.json` or chosen by name, validated in words."""

import math
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from transformers import LlamaConfig, MistralConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spd.errors import SPDError, in_words, one_of, reading
from spd.records import parsed

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length seen
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # bytes: `.itemsize`
HF_NAMES = {  # fields of `ModelConfig` that transformers calls otherwise
    "num_blocks": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
OWN_FORM = ("rope", "eos_token_ids", "pad_token_id", "family", "sliding_window")  # not simply transformers' own

PARTS = {  # what checkpoints call the parts of a decoder, and, further down, those of a block
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OPT_PARTS = PARTS | {
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm",
    "blocks": "model.decoder.layers",
    "attention_norm": "self_attn_layer_norm",
    "out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
OPT_FORM = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True}


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Family:
    """In what models of a family differ from LLaMA: norms, activation, positions and biases, and nothing else."""

    label: str
    hf: type[PreTrainedConfig]
    names: dict[str, str] = field(default_factory=dict)  # beyond `HF_NAMES`
    parts: dict[str, str] = field(default_factory=lambda: PARTS)
    fixed: dict[str, bool] = field(default_factory=dict)  # fields that its config.json does not have
    out_bias: bool = True  # whether the output projection has a bias where queries, keys and values have
    layer_norm: bool = False  # with a bias, in place of the RMS norm
    head_norms: bool = False  # of each query and key head
    learned_positions: bool = False  # added to the embeddings, in place of the rotary embedding
    gated: bool = True  # silu(gate) up, or relu(up)

    @property
    def architecture(self) -> str:
        """transformers' class of its models."""
        return self.hf.__name__.replace("Config", "ForCausalLM")


FAMILIES = {  # by transformers' model_type
    "llama": Family("LLaMA", LlamaConfig),
    "mistral": Family("Mistral", MistralConfig, fixed={"attention_bias": False, "mlp_bias": False}, out_bias=False),
    "qwen2": Family("Qwen2", Qwen2Config, fixed={"attention_bias": True, "mlp_bias": False}, out_bias=False),
    "qwen3": Family("Qwen3", Qwen3Config, fixed={"mlp_bias": False}, head_norms=True),
    "opt": Family(
        "OPT",
        OPTConfig,
        {"intermediate_size": "ffn_dim", "attention_bias": "enable_bias", "mlp_bias": "enable_bias"},
        OPT_PARTS,
        layer_norm=True,
        learned_positions=True,
        gated=False,
    ),
}
POSITIONS_OFFSET = 2  # rows of a table of learned positions before that of the first token


Count = Annotated[PositiveInt, Field(le=2**16)]  # of what a list is made for each
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class ModelConfig:
    """A decoder's shape. Letters as in the docstrings of `model.py`."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt  # D
    intermediate_size: PositiveInt  # width of the MLP
    num_blocks: Count  # L
    num_heads: PositiveInt  # H, query heads
    num_kv_heads: PositiveInt  # K, key/value heads
    head_dim: Count
    max_positions: PositiveInt
    norm_eps: PositiveFloat = 1e-5
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[TokenId, ...] = ()
    pad_token_id: TokenId | None = None
    family: str = "llama"
    sliding_window: PositiveInt | None = None  # tokens; `max_positions` is no more, so that it never slides

    def __post_init__(self):
        if self.rope["rope_type"] not in ROPE_TYPES:
            raise SPDError(
                f"RoPE scaling of type '{self.rope['rope_type']}' is not supported; supported: {', '.join(ROPE_TYPES)}."
            )
        if self.num_heads % self.num_kv_heads:
            raise SPDError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly.")

    @property
    def form(self) -> Family:
        return FAMILIES[self.family]

    @property
    def out_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and self.form.out_bias

    def validate_length(self, tokens: int) -> None:
        """A mistake where an attention over so many tokens would be cut off by a sliding window."""
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise SPDError(
                f"{tokens} tokens exceed the model's sliding window of {self.sliding_window}, beyond which its "
                "attention is another than is computed here; ask for no more."
            )

    # ------------------------------------------------------------ shards: what each of tp holds, and has room for

    def heads_of(self, tp: int, shard: int) -> range:
        """Query heads of a shard: `tensor_split(range(H), tp)[shard]`, the first shards one more."""
        return _part(self.num_heads, tp, shard)

    def kv_heads_of(self, tp: int, shard: int) -> list[range]:
        """The key/value heads that a shard's query heads belong to, in order, in runs.

        Equal shares of whole groups, or of parts of one group, hold each of theirs once. On other shards every query
        head has a copy of its own: only so do all of them group alike.
        """
        shared = self.num_heads // self.num_kv_heads
        heads = self.heads_of(tp, shard)
        if self.shares_kv_heads(tp):
            return [range(heads.start // shared, (heads.stop - 1) // shared + 1)]
        return [range(head // shared, head // shared + 1) for head in heads]

    def neurons_of(self, tp: int, shard: int) -> range:
        """MLP neurons of a shard, split like the query heads."""
        return _part(self.intermediate_size, tp, shard)

    def shares_kv_heads(self, tp: int) -> bool:
        """Whether the heads of every shard are whole groups of a key/value head, or parts of one, alike on all."""
        return self.num_heads % tp == 0 and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)

    def heads_per_shard(self, tp: int) -> int:
        """Those of the first shard; of others that have fewer, zeros take the place."""
        return len(self.heads_of(tp, 0))

    def kv_heads_per_shard(self, tp: int) -> int:
        """Each serves equally many of the shard's query heads."""
        return sum(map(len, self.kv_heads_of(tp, 0)))

    def neurons_per_shard(self, tp: int) -> int:
        return len(self.neurons_of(tp, 0))

    def padded(self, tp: int) -> "ModelConfig":
        """The shape whose equal shares are what tp shards have room for: this one, where tp divides it."""
        heads, neurons = tp * self.heads_per_shard(tp), tp * self.neurons_per_shard(tp)
        kv_heads = self.num_kv_heads if self.shares_kv_heads(tp) else heads
        return replace(self, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=neurons)

    def padding_note(self, tp: int) -> str | None:
        """What zeros in the places of missing heads and neurons, and copies of key/value heads, cost; None: nothing."""
        more = self.padded(tp).parameters() / self.parameters() - 1
        if not more:
            return None
        held = f"{self.num_heads} query heads ({self.num_kv_heads} key/value) and {self.intermediate_size} MLP neurons"
        return f"tp={tp} does not divide {held} evenly: with zeros and copies the shards hold {more:.1%} more weights."

    def degrees(self) -> range:
        """Every tensor-parallel degree that this shape allows."""
        return range(1, min(self.num_heads, self.intermediate_size) + 1)

    def validate_tp(self, tp: int) -> None:
        """A mistake unless every one of `tp` shards has a query head and an MLP neuron."""
        if tp not in self.degrees():
            has = f"the model has {self.num_heads} query heads and {self.intermediate_size} MLP neurons"
            raise SPDError(f"tp={tp} is impossible: {has} to share out; valid: 1 to {self.degrees()[-1]}.")

    def parameters(self) -> int:
        """Number of parameters of the dense model."""
        return sum(math.prod(shape) for shape in hf_shapes(self).values())

    def block_parameters(self) -> int:
        """What one block more would add."""
        return replace(self, num_blocks=self.num_blocks + 1).parameters() - self.parameters()

    def rotary_frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (head_dim / 2,) and the factor on cosine and sine, after RoPE scaling."""
        with torch.device("cpu"):  # also where the model around it is being built on the meta device
            if self.rope["rope_type"] == "default":
                exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
                return self.rope["rope_theta"] ** -exponents, 1.0
            return ROPE_INIT_FUNCTIONS[self.rope["rope_type"]](self.to_hf(), torch.device("cpu"))

    def to_hf(self) -> PreTrainedConfig:
        """The same shape for transformers."""
        known = {f.name for f in fields(self.form.hf)}
        named = {theirs: getattr(self, ours) for ours, theirs in _names(self.form).items() if theirs in known}
        return self.form.hf(**named, **({} if self.form.learned_positions else {"rope_parameters": dict(self.rope)}))

    @classmethod
    def from_hf(cls, source: dict) -> "ModelConfig":
        """From the content of a `config.json`; both `rope_parameters` and the older keys are understood."""
        kind = source.get("model_type")
        if kind not in FAMILIES:
            raise SPDError(
                f"The model is of type '{kind}'; only LLaMA models and their like are supported: {', '.join(FAMILIES)}."
            )
        form = FAMILIES[kind]
        invalid = f"The model's config.json is not a valid {form.label} configuration"
        with reading(invalid):  # transformers validates with several exception types
            hf = form.hf(**{key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")})
        _check_form(form, hf)
        found = {ours: getattr(hf, theirs) for ours, theirs in _names(form).items() if hasattr(hf, theirs)}
        found = {"num_kv_heads": hf.num_attention_heads, "head_dim": None} | found | form.fixed
        found["head_dim"] = found["head_dim"] or hf.hidden_size // hf.num_attention_heads
        eos, window = hf.eos_token_id, getattr(hf, "sliding_window", None)
        if kind != "llama" and window is not None:
            found |= {"sliding_window": window, "max_positions": min(window, hf.max_position_embeddings)}
        if not form.learned_positions:
            found["rope"] = dict(hf.rope_parameters)
        try:
            config = cls(
                **found,
                eos_token_ids=tuple([] if eos is None else eos if isinstance(eos, list) else [eos]),
                pad_token_id=hf.pad_token_id,
                family=kind,
            )
        except ValidationError as error:
            raise SPDError(f"{invalid}: {in_words(error, HF_NAMES | form.names)}.") from None
        with reading(f"{invalid}: its RoPE parameters give no frequencies"):
            frequencies, factor = config.rotary_frequencies()
            if not math.isfinite(factor) or not frequencies.isfinite().all():
                raise ValueError("they are not finite")
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        missing = f"{folder} holds no config.json, so it is not a Hugging Face model folder."
        return cls.from_hf(parsed(folder / "config.json", dict, "is not valid JSON for a model", missing))


def _part(count: int, tp: int, shard: int) -> range:
    """Of `count` things those of a shard; the first shards have one more where they do not divide evenly."""
    each, more = divmod(count, tp)
    start = shard * each + min(shard, more)
    return range(start, start + each + (shard < more))


def _names(form: Family) -> dict[str, str]:
    """Fields that transformers has as well, and its names for them."""
    names = HF_NAMES | form.names
    return {f.name: names.get(f.name, f.name) for f in fields(ModelConfig) if f.name not in OWN_FORM}


def _check_form(form: Family, hf: PreTrainedConfig) -> None:
    """A mistake where a model is another one than its family's."""
    name, wanted = ("hidden_act", ("silu", "swish")) if form.gated else ("activation_function", ("relu",))
    if getattr(hf, name) not in wanted:
        raise SPDError(f"Activation '{getattr(hf, name)}' is not {form.label}'s; only '{wanted[0]}' is supported.")
    if form.label != "OPT":
        return
    if hf.word_embed_proj_dim != hf.hidden_size or any(getattr(hf, name) != value for name, value in OPT_FORM.items()):
        raise SPDError(
            "This OPT normalises after its layers or projects its embeddings, as OPT-350M does; only OPT with norms "
            "before attention and MLP, and at the end, and embeddings of the hidden size is supported."
        )


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds, block by block at the end."""
    d, f, form, parts = config.hidden_size, config.intermediate_size, config.form, config.form.parts
    q, kv, one = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, (config.head_dim,)
    bias, mlp_bias = config.attention_bias, config.mlp_bias
    linear = {"q": (q, d, bias), "k": (kv, d, bias), "v": (kv, d, bias), "out": (d, q, config.out_bias)}
    linear |= {"gate": (f, d, mlp_bias)} if form.gated else {}
    linear |= {"up": (f, d, mlp_bias), "down": (d, f, mlp_bias)}
    norm_kinds = ("weight", "bias") if form.layer_norm else ("weight",)
    shapes = {f"{parts['embedding']}.weight": (config.vocab_size, d)}
    if form.learned_positions:
        shapes[f"{parts['positions']}.weight"] = (config.max_positions + POSITIONS_OFFSET, d)
    shapes |= {f"{parts['norm']}.{kind}": (d,) for kind in norm_kinds}
    if not config.tie_embeddings:
        shapes[f"{parts['head']}.weight"] = (config.vocab_size, d)
    for i in range(config.num_blocks):
        prefix = f"{parts['blocks']}.{i}."
        shapes |= {f"{prefix}{parts[name]}.{k}": (d,) for name in ("attention_norm", "mlp_norm") for k in norm_kinds}
        shapes |= {f"{prefix}{parts[name]}.weight": one for name in ("q_norm", "k_norm") if form.head_norms}
        for name, (rows, columns, biased) in linear.items():
            shapes[f"{prefix}{parts[name]}.weight"] = (rows, columns)
            if biased:
                shapes[f"{prefix}{parts[name]}.bias"] = (rows,)
    return shapes


def _llama(layers, hidden, heads, kv_heads, mlp, vocab=32000, positions=4096, **more) -> ModelConfig:
    return ModelConfig(vocab, hidden, mlp, layers, heads, kv_heads, hidden // heads, positions, **more)


def _opt(layers, hidden, heads) -> ModelConfig:
    biases = {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True, "family": "opt"}
    return ModelConfig(50272, hidden, 4 * hidden, layers, heads, heads, hidden // heads, 2048, **biases)


_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32_ROPE = {**_LLAMA31_ROPE, "factor": 32.0}

SHAPES = {
    "llama2-7b": _llama(32, 4096, 32, 32, 11008),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672),
    "llama3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 131072, rope=_LLAMA31_ROPE),
    "llama3.1-70b": _llama(80, 8192, 64, 8, 28672, 128256, 131072, rope=_LLAMA31_ROPE),
    "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 131072, rope=_LLAMA32_ROPE, tie_embeddings=True),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "llama-125m": _llama(12, 768, 12, 12, 2048),
    "llama-33m": _llama(8, 512, 8, 8, 1376, 8192),
    "llama-8m": _llama(6, 256, 8, 8, 688, 8192),
}
HUB_IDS = {f"meta-llama/Llama-2-{size}-hf": f"llama2-{size}" for size in ("7b", "13b", "70b")}  # of named shapes
HUB_IDS |= {f"facebook/{name}": name for name in SHAPES if name.startswith("opt-")}


def named_shape(name: str) -> ModelConfig:
    return SHAPES[one_of("shape", name, SHAPES)]
