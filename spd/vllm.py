"""Serves an exported folder with vLLM: blocks whose attention sync the plan drops run without that all-reduce.

A plug-in of vLLM (entry point `vllm.general_plugins`): installed beside a server's own torch with `--no-deps` it needs
torch and vLLM alone, and vLLM only once vLLM calls it. The plan stands in the folder's `config.json`, as
`"spd": {"tp": 2, "plan": "DF FF ..."}` beside `"architectures": ["SPDLlamaForCausalLM"]`; nothing is to be set.
Shards are vLLM's own, contiguous and even, which is how a folder is exported: uneven ones are filled up with zeros.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor, nn, zeros

FAMILIES = {  # vLLM's class -> its module; all of them call the parts of a block by the same names
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SEQUENCE_PARALLEL = ("enable_sp", "fuse_gemm_comms")  # passes that would deal the residual stream out to the ranks


def dropped_block(
    p: Tensor, residual: Tensor, bias: Tensor | None, norm: Callable, mlp: Callable, all_reduce: Callable
) -> tuple[Tensor, Tensor]:
    """What follows the attention of a block with policies `drop, full`: its one sum over ranks, and the residual.

    `p` (..., D) is attention's output of this rank alone, without the bias (D,), which belongs to the sum; `residual`
    (..., D), the stream before the block, is equal on all ranks; `mlp` gives this rank's partial output. `norm` takes
    one argument: given the residual as a second one, vLLM's would keep `p` in the stream.
    """
    residual = residual if bias is None else residual + bias
    return all_reduce(p + mlp(norm(residual + p))), residual


def unservable(made_for: dict | None, tp: int | None = None) -> str | None:
    """Why vLLM cannot serve what `config.json` holds under `spd` (on `tp` ranks), in a sentence; None where it can."""
    if not made_for:
        return "The folder's config.json holds no plan ('spd'); write the folder again with 'spd export'."
    others = sorted({pair for pair in made_for["plan"].split() if pair not in ("FF", "DF")})
    if others:
        return (
            f"vLLM cannot serve a plan with {', '.join(others)} in it: only attention's sync points can be dropped "
            "there (FF and DF), lest something that one rank alone holds reach the next block."
        )
    if tp not in (None, made_for["tp"]):
        return (
            f"This model's plan was made for tensor parallelism of {made_for['tp']}, not {tp}: "
            f"start vLLM with --tensor-parallel-size {made_for['tp']}, or make a plan and export for {tp}."
        )
    return None


def served_plan(vllm_config) -> list[str]:
    """Two letters a block. Raises RuntimeError with a sentence where this configuration cannot serve the plan."""
    made_for = getattr(vllm_config.model_config.hf_config, "spd", None)
    reason = unservable(made_for, vllm_config.parallel_config.tensor_parallel_size)
    passes = vllm_config.compilation_config.pass_config
    if not reason and any(getattr(passes, name, False) for name in SEQUENCE_PARALLEL):
        reason = f"Dropped sync points cannot be served with {' or '.join(SEQUENCE_PARALLEL)}: switch these passes off."
    if reason:
        raise RuntimeError(reason)  # a ValueError would come out wrapped into a report on the whole configuration
    return made_for["plan"].split()


@cache
def _dropped(layer: type[nn.Module]) -> type[nn.Module]:
    from vllm.distributed import tensor_model_parallel_all_reduce

    class Dropped(layer):
        def forward(self, positions, hidden_states, residual, t_cond=None):  # `t_cond`: Mistral's, None for text
            if residual is None:
                hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
            else:
                hidden_states, residual = self.input_layernorm(hidden_states, residual)
            p = self.self_attn(positions=positions, hidden_states=hidden_states)
            bias, norm = self.self_attn.o_proj.bias, self.post_attention_layernorm
            return dropped_block(p, residual, bias, norm, self.mlp, tensor_model_parallel_all_reduce)

    return Dropped


@cache
def _served(family: str) -> type[nn.Module]:
    class Served(getattr(import_module(f"vllm.model_executor.models.{FAMILIES[family]}"), family)):
        def __init__(self, *, vllm_config, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            plan, biased = served_plan(vllm_config), getattr(self.config, "attention_bias", False)
            for i in range(self.model.start_layer, self.model.end_layer):  # those of this pipeline stage
                layer, o_proj = self.model.layers[i], self.model.layers[i].self_attn.o_proj
                if biased and o_proj.bias is None:  # transformers' Qwen3 has one, vLLM's has no room for it
                    o_proj.bias = nn.Parameter(zeros(o_proj.output_size, dtype=o_proj.params_dtype), False)
                if plan[i] == "DF" and "forward" in vars(layer):  # an offloader's, which calls the class's own
                    raise RuntimeError("Dropped sync points cannot be served with weights offloaded to the host.")
                if plan[i] == "DF":
                    o_proj.reduce_results = layer.mlp.down_proj.reduce_results = False
                    o_proj.skip_bias_add, layer.__class__ = True, _dropped(type(layer))

    Served.__name__ = Served.__qualname__ = f"SPD{family}"
    return Served


def __getattr__(name: str) -> type[nn.Module]:
    """`SPDLlamaForCausalLM` and its relatives, made when vLLM asks for them."""
    if name[:3] != "SPD" or name[3:] not in FAMILIES:
        raise AttributeError(f"module 'spd.vllm' has no attribute '{name}'")
    return _served(name[3:])


def register() -> None:
    """vLLM calls this in each of its processes; what cannot be served is refused before any other is started."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    check = type("Check", (VerifyAndUpdateConfig,), {"verify_and_update_config": staticmethod(served_plan)})
    for family in FAMILIES:
        ModelRegistry.register_model(f"SPD{family}", f"spd.vllm:SPD{family}")
        MODELS_CONFIG_MAP[f"SPD{family}"] = check
