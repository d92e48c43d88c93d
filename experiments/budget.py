"""Memory and time of an experiment's stages, estimated and not measured: counted from the model's shape and the work.

    python experiments/budget.py experiments/llama2-70b.yaml --tp 8 --processes 8 --gpu a100     each stage
    python experiments/budget.py                 a record of what repairing LLaMA2 takes (`make budget`)

Plans, points, steps and passes are those that the commands go through. Rates are the data sheets' peaks times
`UTILISATION`; communication and the start of processes are not counted. Memory is that of a GPU (weights, gradients
and optimiser, statistics, activations) and of a node (streams of hidden states that processes keep off their GPUs).
Blocks that the paper does not call in-sensitive are reckoned as the worst class: all of a model it does not speak of.
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from spd.block_inputs import ERROR_TOKENS
from spd.cli import main
from spd.closed_form import JOINT_FEATURES, PLACEMENT_TOKENS, SWEEPS
from spd.config import DTYPES, HUB_IDS, SHAPES, ModelConfig
from spd.distill import DISTILL, GROUP, Recipe, recipe_named, repaired, split, total_steps
from spd.errors import SPDError
from spd.latency import Prediction
from spd.least_squares import RIDGES
from spd.machines import Pass, gpu, gpu_flops, gpu_memory
from spd.options import COMMANDS, command, option, percentages, read_experiment
from spd.plan import Plan
from spd.planner import blocks_of, parse_budget, plans_by_percentage
from spd.pretrained import resolve
from spd.sensitivity import block_evaluations
from spd.session import LONGEST_DEFAULT
from spd.sweep import Sweep, parse_strategies, points_of, sweep_recipes
from spd.training import ON_GPU

UTILISATION = 0.5  # of the peak
PAPER = Path(__file__).parents[1] / "paper_figures" / "paper.json"
READING, HOST_LINK = 1e9, 32e9  # bytes a second: of a checkpoint, on a node; peak between a host and its GPU (PCIe 4)
LAUNCH = 4e-5  # seconds of the host an operator where no graph is replayed: half a millisecond a block
BACKWARD = 3  # forward and backward, in forward passes
ADAM = 3  # gradient and two moments, in copies of the weights
TEXT_WINDOWS = 200  # where all of a text is asked for: more than WikiText2's test has
DESIGNS, BOUNDS, WARMUP = 6, 3, 3  # perplexities of table 1; of bench, plans always timed and repetitions not counted
# Questions of a task, and tokens of one with its choices (four characters each, mean of the rows).
QUESTIONS = {
    "arc_easy": (2376, 55), "arc_challenge": (1172, 66), "hellaswag": (10042, 195), "lambada_openai": (5153, 81),
    "piqa": (1838, 63), "sciq": (1000, 137), "winogrande": (1267, 50), "mmlu": (14042, 619),
    "tiny_last_word": (300, 60), "tiny_continuation": (300, 100),
}  # fmt: skip
SUBJECTS = {"mmlu": 57}  # to each of which a limit applies


@dataclass(frozen=True)
class Budget:
    """What something takes."""

    seconds: float = 0.0
    device_bytes: float = 0.0  # of each GPU, or of the process without one
    host_bytes: float = 0.0  # of each node, beside that
    disk_bytes: float = 0.0

    def then(self, other: "Budget", times: float = 1.0) -> "Budget":
        """This and afterwards, `times` over, the other, which keeps its files."""
        return Budget(
            self.seconds + times * other.seconds,
            max(self.device_bytes, other.device_bytes),
            max(self.host_bytes, other.host_bytes),
            self.disk_bytes + times * other.disk_bytes,
        )


@dataclass(frozen=True)
class Job:
    """A model at `tp` on `processes` GPUs, of which `per_node` share a node; windows of `seq_len` tokens."""

    config: ModelConfig
    tp: int
    processes: int
    per_node: int
    seq_len: int
    gpu: str = "a100"
    matmul: str = "tf32"  # products of repairs
    copies: int = 1  # of the model, that divide the work
    bring: float = 0.0  # seconds to bring both streams of a window to its block, where they are not on the GPU

    @property
    def shared_by(self) -> int:
        """GPUs that a copy of the model is on."""
        return self.processes // self.copies

    @property
    def block_parameters(self) -> int:
        return self.config.block_parameters()

    @property
    def end_parameters(self) -> int:
        """Of embedding, last norm and head, which every process holds whole."""
        return self.config.parameters() - self.config.num_blocks * self.block_parameters

    @property
    def block_flops(self) -> float:
        """Of one window's forward pass through a block, over all shards."""
        return self.flops_of(*{each.name for each in Pass(self.config, self.tp).block()})

    def flops_of(self, *operators: str) -> float:
        """Of one window's forward pass through these operators of a block, over all shards."""
        block = Pass(self.config, self.tp, tokens=self.seq_len).block()
        return self.tp * sum(each.work.flop for each in block if each.name in operators)

    @property
    def head_flops(self) -> float:
        """Of one window's logits; every process computes them whole."""
        return 2 * self.config.vocab_size * self.config.hidden_size * self.seq_len * self.shared_by

    @property
    def flops(self) -> float:
        """Of one window's forward pass, logits included."""
        return self.config.num_blocks * self.block_flops + self.head_flops

    def seconds(self, flops: float, dtype: str | None = None) -> float:
        """Without `dtype` that of a repair: the data sheets' peak in TF32 is half of that in 16 bits."""
        tf32 = dtype is None and self.matmul == "tf32"
        peak = gpu_flops(self.gpu, "bfloat16") / 2 if tf32 else gpu_flops(self.gpu, dtype or "float32")
        return flops / (self.processes * UTILISATION * peak)

    def weights(self, dtype: str = "float32") -> float:
        """Bytes on each GPU: its shards, and the ends whole."""
        inside = self.config.num_blocks * self.block_parameters
        return DTYPES[dtype].itemsize * (inside / self.shared_by + self.end_parameters)

    def block_activations(self, dtype: str = "float32") -> float:
        """Bytes that one window leaves for a block's backward pass, on each GPU."""
        c, k = self.config, self.tp / self.shared_by
        widths = k * (4 * c.hidden_size + 5 * c.intermediate_size / self.tp) + 4 * c.hidden_size
        return DTYPES[dtype].itemsize * self.seq_len * widths

    def passes(self, flops: float, dtype: str | None = None) -> Budget:
        """So many FLOPs of forward passes; logits stand there with their logarithms and exponents in float32."""
        kept = dtype or "float32"
        logits = self.seq_len * self.config.vocab_size * (DTYPES[kept].itemsize + 8)
        return Budget(self.seconds(flops, dtype), self.weights(kept) + logits + self.block_activations(kept))

    def load(self) -> Budget:
        """The model read from 16-bit files; each process reads its part, and a node each part once."""
        return Budget(2 * self.config.parameters() * min(1, self.per_node / self.shared_by) / READING)


# ---------------------------------------------------------------- repairs


def document_of(job: Job, blocks: int) -> dict:
    """A plan that drops so many blocks, whose classes are not known: each gets all that a recipe does."""
    return {"policies": Plan.dropping(job.config.num_blocks, range(blocks)).policies()}


def repair(job: Job, windows: int, document: dict, recipe: Recipe) -> Budget:
    """`distill`: the blocks repaired that a plan drops."""
    c, held_out, dropped = job.config, windows - split(windows), repaired(document, recipe)
    learnt = split(windows) + recipe.generated
    kept = 4 * job.block_parameters  # changed weights, and the block as it was
    window = job.seq_len * c.hidden_size * 4
    streams, remembered = 2 * (learnt + held_out) * window, (learnt + held_out) * window / job.processes
    on_gpu = streams + remembered <= ON_GPU * (gpu_memory(job.gpu) - job.weights())
    job = job if on_gpu else replace(job, bring=2 * window / (UTILISATION * HOST_LINK))
    moving = 2 * (learnt + held_out) * c.num_blocks
    found = job.passes(3 * held_out * job.flops).then(
        Budget(job.seconds(moving * job.block_flops) + moving * job.bring)
    )
    for block_class in dropped.values():
        each = _closed_form(job, split(windows)) if recipe.closed_form else Budget()
        each = each.then(_distilled(job, learnt, held_out, recipe, block_class))
        on_device = job.weights() + each.device_bytes + (streams if on_gpu else 0)
        on_host = job.per_node * (kept + (0 if on_gpu else streams))
        found = found.then(Budget(each.seconds, on_device, on_host, kept))
    if recipe.joint and dropped:
        steps = total_steps(document, replace(recipe, closed_form=None, block=None), windows)
        passes = BACKWARD * steps + recipe.joint.epochs * held_out
        memory = ADAM * len(dropped) * kept / job.processes + c.num_blocks * job.block_activations()
        seconds = job.seconds(passes * (job.flops + job.head_flops))  # towards the original's logits
        found = found.then(Budget(seconds, job.weights() + memory))
    return found


def _distilled(job: Job, learnt: int, held_out: int, recipe: Recipe, block_class: str | None) -> Budget:
    """A block: gradient steps, its heads grouped before (two passes), losses on the windows held out."""
    actions, steps = recipe.treatment(block_class), recipe.steps(block_class, learnt)
    passes = 2 * held_out + 2 * learnt * (GROUP in actions)
    passes += recipe.block.epochs * held_out if DISTILL in actions else 0
    seconds = job.seconds((passes + BACKWARD * steps) * job.block_flops) + (passes + steps) * job.bring
    memory = (1 + ADAM) * 4 * job.block_parameters / job.processes + job.block_activations()
    return Budget(seconds, memory if DISTILL in actions else 0.0)


def _closed_form(job: Job, windows: int) -> Budget:
    """A block: corrections, twice; placement; refits with and without attention, by Gram matrix or in sweeps."""
    c, tokens = job.config, windows * job.seq_len
    d, f, gpus = c.hidden_size, c.intermediate_size, job.processes
    measured = min(tokens, ERROR_TOKENS) / job.seq_len
    found = Budget(job.seconds((3 * windows + 5 * measured) * job.block_flops))  # heads and features; errors
    found = found.then(Budget((7 * windows + 5 * measured) * job.bring))
    found = found.then(Budget(job.seconds(min(tokens, PLACEMENT_TOKENS) * (job.tp + 1) * 4 * d * f)))
    found = found.then(_regression(job, tokens, job.tp, d), 2)
    for features in (f + d, f):
        if gpus == 1 and features <= JOINT_FEATURES:
            found = found.then(_regression(job, tokens, 1, features))
        else:
            a_sweep = job.seconds(windows * job.flops_of("o_proj", "gate_up_proj", "act") + tokens * 4 * features * d)
            a_sweep += job.seconds(4 * features * features / job.tp * d, "float64") + windows * job.bring
            found = found.then(_regression(job, tokens, job.tp, features / job.tp))
            found = found.then(Budget(a_sweep), SWEEPS)
    copies = 2 * 4 * job.block_parameters / gpus + tokens * c.num_heads * c.head_dim * 4 / gpus
    return replace(found, device_bytes=copies + found.device_bytes)


def _regression(job: Job, tokens: int, parts: int, features: float) -> Budget:
    """`parts` regressions onto D targets from Gram matrices, their ridges chosen."""
    d, hosted = job.config.hidden_size, max(1.0, parts / job.processes)
    single = parts * tokens * features * (features + 2 * d)
    double = parts * (len(RIDGES) + 1) * (features**3 / 3 + 4 * features**2 * d)
    memory = hosted * 8 * (4 * features**2 + 3 * features * d)
    return Budget(job.seconds(single) + job.seconds(double, "float64"), memory)


# ---------------------------------------------------------------- stages


def answers(job: Job, options: dict) -> Budget:
    """All questions of the tasks that are asked for."""
    tokens = 0
    for task in filter(None, (options.get("tasks") or "").split(",")):
        number, each = QUESTIONS[task]
        tokens += each * min(number, (options.get("limit") or number) * SUBJECTS.get(task, 1))
    return job.passes(tokens / job.seq_len * job.flops, options["dtype"])


def sensitivities(job: Job, model: str) -> list[float]:
    """Zeros for as many blocks as the paper (figure 6) finds in-sensitive at tp=8, which is taken for less too."""
    blocks, shares = job.config.num_blocks, json.loads(PAPER.read_text())["figure6"]["in_sensitive_percent"]
    harmless = blocks_of(shares.get(f"{HUB_IDS.get(model)} tp=8", 0), blocks)
    return [0.0] * harmless + [1.0] * (blocks - harmless)


def sweep(job: Job, options: dict) -> Budget:
    """The repairs of all strategies, which are kept, then each point that `Sweep.curve` evaluates."""
    sensitivity, strategies = sensitivities(job, options["model"]), parse_strategies(options["strategies"])
    best = {"joint_epochs": options["joint_epochs"], "generated": options["generated"]}
    recipes = sweep_recipes({"epochs": options["epochs"]}, best)
    reckoned = Sweep(sensitivity, None, recipes, 0.5, 0.5)  # a block is in-sensitive, or extremely sensitive
    asked, points = points_of(strategies, sensitivity, options["percentages"]), {}
    for strategy, plan in asked:
        dropped = plan.dropped()
        repaired = [(name, Plan.from_document(d).dropped()) for d, _, name in reckoned.repairs(strategy, len(dropped))]
        points[plan, frozenset((name, i) for name, some in repaired for i in some if i in dropped)] = None
    evaluating, copies = replace(job, copies=options["data_parallel"]), job.processes // math.gcd(job.processes, job.tp)
    answered, windows = answers(evaluating, options), min(options["windows"] or TEXT_WINDOWS, TEXT_WINDOWS)
    point = evaluating.passes(windows * evaluating.flops, options["dtype"])
    repairing, windows_learnt = replace(job, processes=job.processes // copies), options["calibration"]
    repairs = [job.load().then(repair(repairing, windows_learnt, d, recipe)) for d, recipe, _ in reckoned.needed(asked)]
    longest = max(sum(each.seconds for each in repairs[copy::copies]) for copy in range(copies))
    total = replace(functools.reduce(Budget.then, repairs, Budget()), seconds=longest)
    total, loaded = total.then(evaluating.load()).then(answered), None  # with nothing dropped
    for plan, files in points:
        if loaded is None or not loaded <= files:
            total = total.then(evaluating.load())
        total, loaded = total.then(point).then(answered, min(1, len(plan.dropped()))), files
    return total


def bench(job: Job, options: dict) -> Budget:
    """Plans and bounds timed, communication left out; on GPUs, one a shard, over two links, eager and captured."""
    on_gpu, found = options["device"] == "cuda", Budget()
    if on_gpu and job.processes != job.tp:
        return found
    timings = len(plans_by_percentage([0.0] * job.config.num_blocks, options["percentages"])) + BOUNDS
    lengths = options["batch"], options["prompt_len"], options["new_tokens"]
    for launch in (LAUNCH, 0.0, LAUNCH, 0.0) if on_gpu else (0.0,):
        predicted = Prediction(job.config, gpu(job.gpu, launch), lambda payload: 0.0, job.tp, *lengths)
        once = predicted.time("ttft", None).total + options["new_tokens"] * predicted.time("tpot", None).total
        timed = timings * (options["repeats"] + WARMUP) * once
        found = found.then(job.load()).then(Budget(timed, job.weights(options["dtype"])))
    return found


def stage_budget(stage: str, job: Job, options: dict, dropped: int) -> Budget:
    """What a stage with these options takes; `dropped` blocks are in the experiment's plan."""
    if stage in ("sweep", "bench"):
        return {"sweep": sweep, "bench": bench}[stage](job, options)
    windows, dtype = options["windows"] or TEXT_WINDOWS, options.get("dtype", "float32")
    if stage == "distill":
        changes = {name: options[name] for name in ("epochs", "joint_epochs", "generated")}
        name = options["strategy"] if options["recipe"] == "paper" else options["recipe"]
        return job.load().then(repair(job, windows, document_of(job, dropped), recipe_named(name, **changes)))
    if stage == "sensitivity":
        blocks = job.config.num_blocks
        flops = block_evaluations(blocks) * job.block_flops + (blocks + 1) * job.head_flops
    else:
        flops = job.flops * (DESIGNS if stage == "table1" else 1)
    found = job.load().then(job.passes(windows * flops, dtype))
    return found.then(answers(job, options), 1 + options["compare"]) if stage == "eval" else found


def stages(
    experiment: Path, model: str | None, tp: int, processes: int, per_node: int, gpu: str, copies: int = 1
) -> dict[str, Budget]:
    """Of each stage of an experiment, a sweep by so many copies. Raises SPDError for an unknown shape."""
    sections = read_experiment(experiment)
    model = model or sections["common"].get("model", "spd-tiny")
    config = shape_of(model)
    if config is None:
        raise SPDError(f"Nothing is estimated: {model} is not here, and its shape is not known.")
    config.validate_tp(tp)
    dropped, found = parse_budget(sections.get("plan", {}).get("budget", "100%"), config.num_blocks), {}
    for stage in ("sensitivity", *(name for name in sections if name not in ("common", "plan", "sensitivity"))):
        known = {each.name: each.default for each in COMMANDS[stage].options} if stage in COMMANDS else {}
        options = (
            {"matmul": "tf32"}
            | known
            | sections["common"]
            | sections.get(stage, {})
            | {"model": model, "data_parallel": copies}
        )
        given = options.get("percentages")
        options["percentages"] = percentages(given) if isinstance(given, str) else given
        seq_len = options.get("seq_len") or min(config.max_positions, LONGEST_DEFAULT)
        gpus = max(processes, copies) if stage == "sweep" else processes
        job = Job(config.padded(tp), tp, gpus, per_node * gpus // processes, seq_len, gpu, options["matmul"])
        found[stage] = stage_budget(stage, job, options, dropped)
    return found


def shape_of(model: str) -> ModelConfig | None:
    """Of a folder, of spd-tiny, or of a hub id whose shape is known here; None otherwise. Downloads nothing."""
    if Path(model).exists() or model == "spd-tiny":
        return ModelConfig.from_folder(resolve(model))
    return SHAPES[HUB_IDS[model]] if model in HUB_IDS else None


# ---------------------------------------------------------------- the table

MODELS = ("llama2-7b", "llama2-13b", "llama2-70b")
TP, WINDOWS, SEQ_LEN = 8, 128, 2048  # the paper's
GIB = 2**30


def table(gpu: str = "a100") -> dict:
    """All blocks of a model repaired on the paper's calibration data: a row a model, number of GPUs and repair."""
    rows = []
    for model in MODELS:
        for gpus in (1, TP):
            for name in ("b2b+hg", "closed-form", "best"):
                job = Job(SHAPES[model], TP, gpus, gpus, SEQ_LEN, gpu)
                found = repair(job, WINDOWS, document_of(job, job.config.num_blocks), recipe_named(name))
                fits = found.device_bytes <= gpu_memory(gpu)
                rows.append({"model": model, "gpus": gpus, "repair": name, **vars(found), "fits": fits})
    setting = {"gpu": gpu, "device_bytes": gpu_memory(gpu), "tp": TP, "windows": WINDOWS, "seq_len": SEQ_LEN}
    setting |= {"matmul": job.matmul}
    return setting | {"rows": rows}


@command(option("--gpu", "Named GPU.", default="a100"))
def budget(session) -> None:
    """Memory and time of repairing LLaMA2 7B, 13B and 70B, estimated and not measured."""
    session.publish(table(session.options.gpu))


def words(budget: Budget) -> str:
    hours, minutes = divmod(round(budget.seconds / 60), 60)
    places = {"each GPU": budget.device_bytes, "each host": budget.host_bytes, "disk": budget.disk_bytes}
    sizes = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in places.items() if size)
    return f"{hours:3} h {minutes:02} min; {sizes}"


def say_stages() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tp", type=int, default=TP)
    parser.add_argument("--processes", type=int, default=1, help="GPUs in all")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--data-parallel", type=int, default=1, help="GPUs that a sweep may use, a copy of the model each"
    )
    parser.add_argument("--gpu", default="a100")
    o = parser.parse_args()
    try:
        found = stages(o.experiment, o.model, o.tp, o.processes, o.processes // o.nodes, o.gpu, o.data_parallel)
    except SPDError as error:
        sys.exit(str(error))
    print(f"Estimated, not measured, on {o.processes} {o.gpu} at {UTILISATION:.0%} of the data sheet's peak:")
    for stage, each in found.items():
        print(f"  {stage:12}{words(each)}")
    print(f"  {'in all':12}{words(Budget(sum(each.seconds for each in found.values())))}".rstrip("; "))


if __name__ == "__main__":
    say_stages() if sys.argv[1:] and sys.argv[1].endswith(".yaml") else main(budget)
