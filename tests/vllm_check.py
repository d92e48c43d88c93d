"""What vLLM itself makes of an exported folder, beside the engine: `make check-vllm`, on CPU processes (gloo).

Two ranks hold vLLM's model alone, for many plans and shapes and for three ways to do it wrong; then `vllm.LLM` serves
what the five commands made: scheduler, paged cache, worker processes and all. MODEL=DIR serves that model as well.
"""

import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from conftest import VARIANTS, random_model
from test_families import CONFIGS
from transformers import AutoModelForCausalLM
from vllm_stand_ins import reduced

import spd.vllm
from spd import Plan, SPDModel
from spd.data import read_windows
from spd.evaluate import perplexity

ROOT = Path(__file__).parent.parent
TOKENS = torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(0))
PLANS = ("FF FF FF", "FF DF FF", "DF FF DF", "DF DF DF")
MODELS = {
    "plain": VARIANTS["plain"],
    "all-biases": VARIANTS["all-biases"],
    "grouped-query": VARIANTS["grouped-query"] | {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1, "attention_bias": True},  # replicated on both ranks
    "nine heads": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 65},
    "repaired": VARIANTS["grouped-query"],
    "repaired copies": {"num_key_value_heads": 1},  # copies that differ: each has become a head
}
RELATIVES = {family: config for family, config in CONFIGS.items() if family != "opt"}
SOURCES = [*MODELS, *RELATIVES, *(f"repaired {family}" for family in RELATIVES)]
SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
PLAIN = {"custom_ops": ["none"]}  # every operator as PyTorch computes it


@pytest.fixture(scope="session", autouse=True)
def plugins(tmp_path_factory):
    """Settings for this process and its children; they find the plug-ins as installed ones are found."""
    site = tmp_path_factory.mktemp("site")
    plugin = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    (site / "spd_check-0.dist-info").mkdir()
    (site / "spd_check-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: spd-check\nVersion: 0\n")
    (site / "spd_check-0.dist-info" / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nspd = {plugin['spd']}\nstand-ins = vllm_stand_ins:register\n"
    )
    paths = [str(path) for path in (site, ROOT, ROOT / "tests")]
    os.environ.update(SETTINGS)
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path[:0] = paths


# ---------------------------------------------------------------- two ranks, vLLM's model alone


def repair_randomly(model: SPDModel) -> None:
    """Every shard's parameters of the dropped blocks moved apart, and biases where there were none."""
    generator = torch.Generator().manual_seed(1)
    for i in model.plan.dropped():
        model.transformer.blocks[i].attention.add_biases()
        for parameter in model.transformer.blocks[i].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def random_source(folder: Path, name: str) -> None:
    """The model of that name in `MODELS`, or of the family that the name ends with."""
    family = name.split()[-1]
    if family not in RELATIVES:
        random_model(folder, **MODELS[name])
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RELATIVES[family])
    for key, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)


def dropped_layers(model) -> list:
    return [layer for layer in model.model.layers if not layer.self_attn.o_proj.reduce_results]


def leave_the_all_reduce_out(model) -> None:
    """The obvious four lines: the block itself stays as it was."""
    for layer in dropped_layers(model):
        layer.__class__ = type(layer).__base__
        layer.mlp.down_proj.reduce_results, layer.self_attn.o_proj.skip_bias_add = True, False


def give_rank_0_the_bias(model) -> None:
    for layer in dropped_layers(model):
        layer.self_attn.o_proj.skip_bias_add = False
    spd.vllm.dropped_block = lambda p, residual, bias, *parts: RIGHT(p, residual, None, *parts)


def send_the_residual_through_the_norm(model) -> None:
    def wrong(p, residual, bias, norm, mlp, all_reduce):
        h, residual = norm(p, residual if bias is None else residual + bias)
        return all_reduce(p + mlp(h)), residual

    spd.vllm.dropped_block = wrong


RIGHT = spd.vllm.dropped_block
WRONG = (leave_the_all_reduce_out, give_rank_0_the_bias, send_the_residual_through_the_norm)


def causal(attention, q, k, v):
    """In place of vLLM's paged attention: one sequence, no cache."""
    q, k, v = (t.view(len(t), -1, attention.head_size).transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def run_rank(rank: int, jobs: dict, folder: Path) -> None:
    """Each job's logits, hidden states before the head and number of all-reduces, saved as this rank sees them."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None
    load_general_plugins()
    Attention.forward = causal
    found = {}
    for number, (name, (model_folder, wrong)) in enumerate(jobs.items()):
        config = EngineArgs(
            str(model_folder), tensor_parallel_size=2, dtype="float32", skip_tokenizer_init=True,
            enforce_eager=True, compilation_config=PLAIN,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config), set_forward_context(None, config), torch.no_grad():
            if number == 0:
                init_distributed_environment(2, rank, f"file://{folder}/rendezvous", rank, "gloo")
                initialize_model_parallel(2)
            model = get_model(vllm_config=config)
            spd.vllm.dropped_block = RIGHT
            if wrong is not None:
                wrong(model)
            reduced.clear()
            hidden = model(TOKENS, torch.arange(len(TOKENS)), None)
            found[name] = {"all_reduces": len(reduced), "hidden": hidden, "logits": model.compute_logits(hidden)}
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, plugins):
    """Name of a job -> the engine's logits, and what each of two ranks found."""
    folder, jobs, wanted = tmp_path_factory.mktemp("ranks"), {}, {}
    for name in SOURCES:
        source = folder / name.replace("/", "-")
        random_source(source, name)
        for letters in PLANS:
            model = SPDModel.from_pretrained(source, tp=2, plan=Plan.from_letters(letters))
            if name.startswith("repaired"):
                repair_randomly(model)
            job, exported = f"{name} {letters}", folder / f"{source.name}-{letters.replace(' ', '')}"
            model.save_pretrained(exported)
            jobs[job] = exported, None
            wanted[job] = model.transformer(TOKENS[None])[0].detach()
    for wrong in WRONG:
        jobs[wrong.__name__] = jobs["all-biases DF FF DF"][0], wrong
        wanted[wrong.__name__] = wanted["all-biases DF FF DF"]
    torch.multiprocessing.spawn(run_rank, (jobs, folder), nprocs=2)
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    return {job: (wanted[job], [of_rank[job] for of_rank in found]) for job in jobs}


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("letters", PLANS)
@pytest.mark.parametrize("name", SOURCES)
def test_two_ranks_compute_what_the_engine_does(ranks, name, letters):
    wanted, found = ranks[f"{name} {letters}"]
    for rank in found:
        assert rank["all_reduces"] == 1 + Plan.from_letters(letters).syncs()  # vLLM's embedding is one more
        assert off(rank["logits"], wanted) < 1e-4 * wanted.abs().max()
    assert torch.equal(found[0]["hidden"], found[1]["hidden"])
    print(f"{rank['all_reduces']} all-reduces, logits off by {off(rank['logits'], wanted):.1e}")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_ways_are_found_out(ranks, wrong):
    wanted, found = ranks[wrong.__name__]
    apart = off(found[0]["hidden"], found[1]["hidden"])
    assert off(found[0]["logits"], wanted) > 0.1
    assert (apart > 0.1) == (wrong is not give_rank_0_the_bias)  # which leaves the ranks equal, and wrong
    print(f"logits off by {off(found[0]['logits'], wanted):.2f}, ranks apart by {apart:.2f}")


# ---------------------------------------------------------------- vllm.LLM


SERVED = [("spd-tiny", 2), *((os.environ["MODEL"], tp) for tp in (2, 3) if os.environ.get("MODEL"))]


def command(*arguments) -> dict:
    """The result of one command line."""
    done = subprocess.run(
        [sys.executable, "-m", "spd", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def made_by_commands(model: str, tp: int, folder: Path) -> Path:
    """From a model to the folder that vLLM serves: a third of the blocks dropped and repaired."""
    on = ("--model", model, "--tp", tp, "--records", folder / "records")
    command("sensitivity", *on, "--text", "builtin-train", "--windows", 4, "--seq-len", 64, "--out", folder / "s.json")
    command("plan", folder / "s.json", "--budget", "33%", "--records", folder / "records", "--out", folder / "p.json")
    command(
        "distill", *on, "--plan", folder / "p.json", "--recipe", "closed-form",
        "--text", "builtin-train", "--windows", 20, "--seq-len", 128, "--out", folder / "repaired",
    )  # fmt: skip
    command("export", *on, "--plan", folder / "repaired", "--out", folder / "served")
    return folder / "served"


@pytest.mark.parametrize(("name", "tp"), SERVED)
def test_served_model_is_the_engines(tmp_path, name, tp):
    compare_served(made_by_commands(name, tp, tmp_path), tp)


def compare_served(folder: Path, tp: int) -> None:
    """Three prompts of different lengths in one batch; perplexity of four windows; all-reduces of a single pass."""
    from vllm import LLM, SamplingParams

    model = SPDModel.from_pretrained(folder, tp)
    model.load_plan(folder)
    llm = LLM(
        str(folder), tensor_parallel_size=tp, dtype="float32", max_model_len=256, compilation_config=PLAIN,
        enforce_eager=True, enable_prefix_caching=False, worker_extension_cls="vllm_stand_ins.Counting",
    )  # fmt: skip

    def serve(prompts: list, **options) -> list:
        return llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, **options), use_tqdm=False)

    prompts = ["Returns the mean of", "The", "If the array is empty, a copy of the input, as a new array, whose shape"]
    gap = 0.0
    for output in serve(prompts, max_tokens=40, logprobs=5):
        prompt, (given,) = output.prompt_token_ids, output.outputs
        with torch.no_grad():
            wanted = model.transformer(torch.tensor([[*prompt, *given.token_ids]]))[0].log_softmax(-1)
        assert len(given.logprobs) == 40
        for position, candidates in enumerate(given.logprobs, start=len(prompt) - 1):
            gap = max(gap, *(abs(found.logprob - wanted[position, t].item()) for t, found in candidates.items()))
    assert gap < 1e-4

    windows = read_windows("builtin", model.tokenizer, 128, 4).tokens
    outputs = serve([{"prompt_token_ids": window} for window in windows.tolist()], max_tokens=1, prompt_logprobs=0)
    scores = [o.prompt_logprobs[i][o.prompt_token_ids[i]].logprob for o in outputs for i in range(1, 128)]
    served, wanted = math.exp(-mean(scores)), perplexity(model.transformer, windows)["perplexity"]
    assert served == pytest.approx(wanted, rel=1e-3)

    llm.collective_rpc("take_all_reduces")
    serve(prompts[:1], max_tokens=1)
    counts = [len(shapes) for shapes in llm.collective_rpc("take_all_reduces")]
    llm.llm_engine.engine_core.shutdown()
    assert counts == [1 + model.plan.syncs()] * tp and model.plan.syncs() < 2 * len(model.plan)
    found = f"log-probabilities off by {gap:.1e}, perplexity {served:.5f} ({wanted:.5f})"
    print(f"{model.plan}: {counts[0]} all-reduces a pass, {found}")


def test_another_degree_is_refused_in_a_sentence(tmp_path):
    """Before any worker is started; so that the sentence is the last line of `vllm serve` too."""
    SPDModel.from_pretrained("spd-tiny", tp=4, plan=Plan.dropping(8, [1])).save_pretrained(tmp_path / "served")
    start = "import sys, vllm\nif __name__ == '__main__': vllm.LLM(sys.argv[1], tensor_parallel_size=2)"
    done = subprocess.run(
        [sys.executable, "-c", start, tmp_path / "served"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: This model's plan was made for tensor parallelism of 4, not 2: "
        "start vLLM with --tensor-parallel-size 4, or make a plan and export for 2."
    )
