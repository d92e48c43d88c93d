"""Memory and time of an experiment's stages, estimated and not measured: counted from the model's shape and the work.

    python experiments/budget.py experiments/llama2-70b.yaml --tp 8 --processes 8 --gpu a100     each stage
    python experiments/budget.py                 a record of what repairing LLaMA2 takes (`make budget`)

Rates are the data sheets' peaks times `UTILISATION`; reading weights and answering tasks are not counted. Memory is
that of a GPU (weights, gradients and optimiser, statistics, activations) and of a node (streams of hidden states, which
every process keeps for itself). Counts follow the code: repairs are in float32, for the worst class of block.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from spd.cli import main
from spd.closed_form import ClosedForm
from spd.config import HUB_IDS, SHAPES, ModelConfig
from spd.distill import Recipe, recipe_named, split
from spd.errors import SPDError
from spd.least_squares import RIDGES
from spd.machines import gpu_flops, gpu_memory
from spd.options import COMMANDS, command, option, read_experiment
from spd.planner import blocks_of
from spd.pretrained import resolve
from spd.session import LONGEST_DEFAULT
from spd.sweep import BY_PLAN, ZERO_SHOT, parse_strategies

UTILISATION = 0.5  # of the peak
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BACKWARD = 3  # forward and backward, in forward passes
ADAM = 3  # gradient and two moments, in copies of the weights
EVALUATION_WINDOWS = 200  # where all of a text is asked for: more than WikiText2's test has


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

    @property
    def block_parameters(self) -> int:
        c = self.config
        ends = c.hidden_size * (1 + c.vocab_size * (1 if c.tie_embeddings else 2))
        return (c.parameters() - ends) // c.num_blocks

    @property
    def block_flops(self) -> float:
        """Of one block's forward pass, a token, over all shards."""
        c = self.config
        return 2 * self.block_parameters + 2 * c.num_heads * c.head_dim * self.seq_len

    @property
    def head_flops(self) -> float:
        """Of the head, a token; every process computes it whole."""
        return 2 * self.config.vocab_size * self.config.hidden_size * self.processes

    def seconds(self, flops: float, dtype: str = "float32") -> float:
        return flops / (self.processes * UTILISATION * gpu_flops(self.gpu, dtype))

    def weights(self, size: int) -> float:
        """Bytes on each GPU: its shards, and embedding and head whole."""
        c = self.config
        inside = c.num_blocks * self.block_parameters
        return size * (inside / self.processes + c.parameters() - inside)

    def resident(self, size: int) -> float:
        """Weights and what scoring a window needs: its logits, with their logarithms and exponents in float32."""
        return self.weights(size) + self.seq_len * self.config.vocab_size * (size + 8) + self.block_activations(size)

    def block_activations(self, size: int) -> float:
        """What one window leaves for a block's backward pass, on each GPU."""
        c, k = self.config, self.tp / self.processes
        return size * self.seq_len * (k * (4 * c.hidden_size + 5 * c.intermediate_size / self.tp) + 4 * c.hidden_size)


def evaluation(job: Job, windows: int, dtype: str) -> Budget:
    """Perplexity of some windows."""
    flops = windows * job.seq_len * (job.config.num_blocks * job.block_flops + job.head_flops)
    return Budget(job.seconds(flops, dtype), job.resident(SIZES[dtype]))


def sensitivity(job: Job, windows: int, dtype: str) -> Budget:
    """L + 1 perplexities, the blocks before the first that drops shared."""
    blocks = job.config.num_blocks
    flops = (blocks * (blocks + 3) / 2 * job.block_flops + (blocks + 1) * job.head_flops) * windows * job.seq_len
    return Budget(job.seconds(flops, dtype), job.resident(SIZES[dtype]))


def repair(job: Job, windows: int, blocks: int, options: Recipe) -> Budget:
    """`distill`: `blocks` of the model repaired."""
    trained = split(windows)
    windows, learnt = windows + options.generated, trained + options.generated
    streams = 2 * windows * job.seq_len * job.config.hidden_size * 4
    kept = 4 * job.block_parameters
    each = (_closed_form(job, trained) if options.closed_form else Budget()).then(
        _distilled(job, windows, learnt, options)
    )
    passes = evaluation(job, 3 * (windows - trained), "float32")
    moving = Budget(job.seconds(2 * windows * job.seq_len * job.config.num_blocks * job.block_flops))
    memory = Budget(0, job.weights(4) + each.device_bytes, job.per_node * (streams + kept))
    together = _jointly(job, windows, learnt, blocks, options)
    return passes.then(moving).then(memory).then(Budget(each.seconds, disk_bytes=kept), blocks).then(together)


def _distilled(job: Job, windows: int, trained: int, options: Recipe) -> Budget:
    """A block: gradient steps, its heads grouped before (two passes), losses on the windows held out."""
    if options.block is None:
        return Budget()
    epochs, held_out = options.block.epochs, windows - trained
    passes = epochs * (BACKWARD * trained + held_out) + 2 * held_out + 2 * trained
    memory = (1 + ADAM) * 4 * job.block_parameters / job.processes + job.block_activations(4)
    return Budget(job.seconds(passes * job.seq_len * job.block_flops), memory)


def _jointly(job: Job, windows: int, trained: int, blocks: int, options: Recipe) -> Budget:
    """All repaired blocks at once, each block's activations kept, towards the original's logits."""
    if options.joint is None or not blocks:
        return Budget()
    c, epochs = job.config, options.joint.epochs
    a_pass = job.seq_len * (c.num_blocks * job.block_flops + 2 * job.head_flops)
    memory = ADAM * 4 * blocks * job.block_parameters / job.processes + c.num_blocks * job.block_activations(4)
    seconds = job.seconds(epochs * (BACKWARD * trained + windows - trained) * a_pass)
    return Budget(seconds, job.weights(4) + memory)


def _closed_form(job: Job, trained: int) -> Budget:
    """A block: corrections, twice; placement; refits with and without attention, by Gram matrix or in sweeps."""
    c, limits, tokens = job.config, ClosedForm(), trained * job.seq_len
    d, f, gpus = c.hidden_size, c.intermediate_size, job.processes
    single = 8 * tokens * job.block_flops  # errors and features
    single += min(tokens, limits.placement_tokens) * (job.tp + 1) * 4 * d * f
    parts = [_regression(job, tokens, job.tp, d), _regression(job, tokens, job.tp, d)]
    for features in (f + d, f):
        joint = tokens < features or (gpus == 1 and features <= limits.joint_features)
        parts.append(_regression(job, tokens, 1 if joint else job.tp, features if joint else features / job.tp))
        if not joint:
            sweep = tokens * (job.block_flops + 4 * features * d) + 4 * features * features / job.tp * d
            parts.append(Budget(job.seconds(limits.sweeps * sweep)))
    solving = sum((part.seconds for part in parts), job.seconds(single))
    copies = 2 * 4 * job.block_parameters / gpus + tokens * c.num_heads * c.head_dim * 4 / gpus
    return Budget(solving, copies + max(part.device_bytes for part in parts))


def _regression(job: Job, tokens: int, parts: int, features: float) -> Budget:
    """`parts` regressions onto D targets, their ridges chosen: Gram matrices, or, for few tokens, rows and a kernel."""
    d, solved, size = job.config.hidden_size, len(RIDGES) + 1, max(1.0, parts / job.processes)
    if tokens < features:
        single = parts * tokens * 2 * tokens * (2 * features + solved * d)
        return Budget(job.seconds(single, "float64"), 8 * size * tokens * (features + d))
    single = parts * tokens * 2 * features * (features + d)
    double = parts * solved * (features**3 / 3 + 4 * features**2 * d)
    memory = size * 8 * (4 * features**2 + 3 * features * d)
    return Budget(job.seconds(single) + job.seconds(double, "float64"), memory)


def sweep(job: Job, options: dict) -> Budget:
    """Every strategy at every percentage, with the repairs it needs, which are kept."""
    blocks = job.config.num_blocks
    given = options["percentages"]
    counts = sorted({blocks_of(float(p), blocks) for p in given.split(",")}) if given else range(blocks + 1)
    point = evaluation(job, min(options["windows"] or EVALUATION_WINDOWS, EVALUATION_WINDOWS), options["dtype"])
    total = Budget()
    for strategy in parse_strategies(options["strategies"]):
        total = total.then(point, len(counts))
        if strategy in BY_PLAN:
            for count in filter(None, counts):
                total = total.then(repair(job, options["calibration"], count, recipe_named(strategy)))
        elif strategy != ZERO_SHOT:  # one repair serves all plans
            recipe = recipe_named(strategy, epochs=options["epochs"])
            total = total.then(repair(job, options["calibration"], blocks, recipe))
    return total


def stage_budget(stage: str, job: Job, options: dict) -> Budget:
    """What a stage with these options takes."""
    windows, dtype = options.get("windows") or EVALUATION_WINDOWS, options.get("dtype", "float32")
    if stage == "sweep":
        return sweep(job, options)
    if stage == "sensitivity":
        return sensitivity(job, windows, dtype)
    if stage == "distill":
        name = options["strategy"] if options["recipe"] == "paper" else options["recipe"]
        return repair(job, windows, job.config.num_blocks, recipe_named(name, epochs=options["epochs"]))
    if stage == "bench":
        return Budget(0.0, job.weights(SIZES[dtype]))
    return evaluation(job, windows * (6 if stage == "table1" else 1), dtype)  # table 1 is of six models


def stages(experiment: Path, model: str | None, tp: int, processes: int, per_node: int, gpu: str) -> dict[str, Budget]:
    """Of each stage that an experiment asks for, of its own model or another. Raises SPDError for an unknown shape."""
    sections = read_experiment(experiment)
    model = model or sections["common"].get("model", "spd-tiny")
    config = shape_of(model)
    if config is None:
        raise SPDError(f"Nothing is estimated: {model} is not here, and its shape is not known.")
    found = {}
    for stage in ("sensitivity", *(name for name in sections if name not in ("common", "plan", "sensitivity"))):
        known = {each.name: each.default for each in COMMANDS[stage].options} if stage in COMMANDS else {}
        options = known | sections["common"] | sections.get(stage, {})
        seq_len = options.get("seq_len") or min(config.max_positions, LONGEST_DEFAULT)
        found[stage] = stage_budget(stage, Job(config, tp, processes, per_node, seq_len, gpu), options)
    return found


def shape_of(model: str) -> ModelConfig | None:
    """Of a folder, of spd-tiny, or of a hub id whose shape is known here; None otherwise. Downloads nothing."""
    if Path(model).is_dir() or model == "spd-tiny":
        return ModelConfig.from_folder(resolve(model))
    return SHAPES[HUB_IDS[model]] if model in HUB_IDS else None


# ---------------------------------------------------------------- the table

MODELS = ("llama2-7b", "llama2-13b", "llama2-70b")
TP, WINDOWS, SEQ_LEN = 8, 128, 2048  # the paper's
RECIPES = ("b2b+hg", "closed-form", "best")
GIB = 2**30


def table(gpu: str = "a100") -> dict:
    """All blocks of a model repaired on the paper's calibration data: a row a model, number of GPUs and repair."""
    rows = []
    for model in MODELS:
        for gpus in (1, TP):
            for name in RECIPES:
                job = Job(SHAPES[model], TP, gpus, gpus, SEQ_LEN, gpu)
                found = repair(job, WINDOWS, job.config.num_blocks, recipe_named(name))
                fits = found.device_bytes <= gpu_memory(gpu)
                rows.append({"model": model, "gpus": gpus, "repair": name, **vars(found), "fits": fits})
    setting = {"gpu": gpu, "device_bytes": gpu_memory(gpu), "tp": TP, "windows": WINDOWS, "seq_len": SEQ_LEN}
    return setting | {"rows": rows}


def words(budget: Budget) -> str:
    hours, minutes = divmod(round(budget.seconds / 60), 60)
    places = {"each GPU": budget.device_bytes, "each host": budget.host_bytes, "disk": budget.disk_bytes}
    sizes = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in places.items() if size)
    return f"{hours:3} h {minutes:02} min; {sizes}"


@command(option("--gpu", "Named GPU.", default="a100"))
def budget(session) -> None:
    """Memory and time of repairing LLaMA2 7B, 13B and 70B, estimated and not measured."""
    session.publish(table(session.options.gpu))


def say_stages() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tp", type=int, default=TP)
    parser.add_argument("--processes", type=int, default=1, help="GPUs in all")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu", default="a100")
    o = parser.parse_args()
    try:
        found = stages(o.experiment, o.model, o.tp, o.processes, o.processes // o.nodes, o.gpu)
    except SPDError as error:
        sys.exit(str(error))
    print(f"Estimated, not measured, on {o.processes} {o.gpu} at {UTILISATION:.0%} of their peak:")
    for stage, each in found.items():
        print(f"  {stage:12}{words(each)}")
    print(f"  {'in all':12}{words(Budget().then(Budget(sum(b.seconds for b in found.values()))))}".rstrip("; "))


if __name__ == "__main__":
    say_stages() if sys.argv[1:] and sys.argv[1].endswith(".yaml") else main(budget)
