"""Memory and time of commands, reckoned and not measured: counted from a model's shape and what a command does.

Rates are the data sheets' peaks times `UTILISATION`; reading weights and answering tasks are not counted. Memory is
that of a GPU (weights, gradients and optimiser, statistics, activations) and of a node (streams of hidden states, which
every process keeps for itself). Counts follow the code: repairs are in float32, for the worst class of block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd.closed_form import ClosedForm
from spd.config import HUB_IDS, SHAPES, ModelConfig
from spd.distill import Recipe, recipe_named, split
from spd.experiment import Experiment
from spd.latency import gpu_flops, gpu_memory
from spd.least_squares import RIDGES
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


def sweep(job: Job, options: Mapping[str, Any]) -> Budget:
    """Every strategy at every percentage, with the repairs it needs, which are kept."""
    blocks = job.config.num_blocks
    given = options.get("percentages")
    counts = sorted({blocks_of(float(p), blocks) for p in given.split(",")}) if given else range(blocks + 1)
    point = evaluation(job, min(options["windows"] or EVALUATION_WINDOWS, EVALUATION_WINDOWS), options["dtype"])
    total = Budget()
    for strategy in parse_strategies(options["strategies"]):
        total = total.then(point, len(counts))
        epochs = options.get("epochs")
        if strategy in BY_PLAN:
            for count in filter(None, counts):
                total = total.then(repair(job, options["calibration"], count, recipe_named(strategy)))
        elif strategy != ZERO_SHOT:  # one repair serves all plans
            total = total.then(repair(job, options["calibration"], blocks, recipe_named(strategy, epochs=epochs)))
    return total


def reckon(command: str, options: Mapping[str, Any], job: Job) -> Budget:
    """What a command with these options takes; nothing to speak of for those that load no model."""
    windows, dtype = options.get("windows") or EVALUATION_WINDOWS, options.get("dtype", "float32")
    if command == "sweep":
        return sweep(job, options)
    if command == "sensitivity":
        return sensitivity(job, windows, dtype)
    if command == "eval":
        return evaluation(job, windows, dtype)
    if command == "table1":  # six models, one after the other
        return evaluation(job, 6 * windows, dtype)
    if command == "distill":
        recipe = recipe_named(options["recipe"], options["strategy"], epochs=options["epochs"])
        return repair(job, windows, job.config.num_blocks, recipe)
    if command == "bench":
        return Budget(0.0, job.weights(SIZES[dtype]))
    return Budget()


# ---------------------------------------------------------------- for commands


def shape_of(model: str) -> ModelConfig | None:
    """Of a folder, of spd-tiny, or of a hub id whose shape is known here; None otherwise. Downloads nothing."""
    if Path(model).is_dir() or model == "spd-tiny":
        return ModelConfig.from_folder(resolve(model))
    return SHAPES[HUB_IDS[model]] if model in HUB_IDS else None


def reckoned(command: str, options: Mapping[str, Any], processes: int, gpu: str) -> str:
    """One line on what a command with these options takes on so many GPUs."""
    model = options.get("model")
    config = shape_of(str(model)) if model else None
    if model and config is None:
        return f"not reckoned: {model} is not here, and its shape is not known"
    job = Job(config, options["tp"], processes, processes, _seq_len(options, config), gpu) if config else None
    found = reckon(command, options, job) if job else Budget()
    return words(found, processes, gpu if options.get("device") == "cuda" else None)


def needed(experiment: Experiment, model: str, tp: int, processes: int, per_node: int, gpu: str = "a100") -> Budget:
    """The most that the long stages of an experiment take."""
    config, total = shape_of(model), Budget()
    for command in ("sensitivity", "sweep") if config else ():
        options = experiment.defaults(command, OPTIONS.keys())
        job = Job(config, tp, processes, per_node, _seq_len(options, config), gpu)
        total = total.then(reckon(command, OPTIONS | options, job))
    return total


OPTIONS = {"windows": None, "dtype": "float32", "seq_len": None, "percentages": None, "strategies": ZERO_SHOT,
           "calibration": 128, "epochs": None}  # fmt: skip


def _seq_len(options: Mapping[str, Any], config: ModelConfig) -> int:
    return options.get("seq_len") or min(config.max_positions, LONGEST_DEFAULT)


# ---------------------------------------------------------------- the table

MODELS = ("llama2-7b", "llama2-13b", "llama2-70b")
TP, WINDOWS, SEQ_LEN = 8, 128, 2048  # the paper's
RECIPES = {"b2b+hg": ("paper", "b2b+hg"), "closed-form": ("closed-form", "zs"), "best": ("best", "zs")}
GIB = 2**30


def table(gpu: str = "a100") -> dict:
    """All blocks of a model repaired, on the paper's calibration data.

    Returns:
        `gpu`, `device_bytes` (what one has), `tp`, `windows`, `seq_len`, and `rows`: one a model, number of GPUs and
        repair.
    """
    rows = []
    for model in MODELS:
        for gpus in (1, TP):
            for name, recipe in RECIPES.items():
                job = Job(SHAPES[model], TP, gpus, gpus, SEQ_LEN, gpu)
                found = repair(job, WINDOWS, job.config.num_blocks, recipe_named(*recipe))
                rows.append({"model": model, "gpus": gpus, "repair": name, **vars(found),
                             "fits": found.device_bytes <= gpu_memory(gpu)})  # fmt: skip
    return {"gpu": gpu, "device_bytes": gpu_memory(gpu), "tp": TP, "windows": WINDOWS, "seq_len": SEQ_LEN,
            "rows": rows}  # fmt: skip


def words(budget: Budget, processes: int, gpu: str | None) -> str:
    """One line; without a GPU only the memory, as nothing is known of the processor's speed."""
    if not budget.device_bytes:
        return "reckoned, not measured: next to nothing"
    hours, minutes = divmod(round(budget.seconds / 60), 60)
    where = f"{processes} {gpu}{'s' * (processes > 1)}" if gpu else "a processor"
    time = f"{hours} h {minutes:02} min on {where}" if gpu and budget.seconds else f"time not reckoned on {where}"
    places = {"each process" if gpu is None else "each GPU": budget.device_bytes, "each host": budget.host_bytes}
    places["disk"] = budget.disk_bytes
    sizes = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in places.items() if size)
    return f"reckoned, not measured: {time}; {sizes}"
