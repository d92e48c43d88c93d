"""Gradient steps: one block towards another's output (section 4.2.3), or all dropped blocks towards the logits.

Activations are residual streams (W, T, D) of all W calibration windows, with nothing pending. They stay on the host;
a few windows at a time are moved to the model's device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.checkpoint import block_parameters
from spd.comm import Stream
from spd.errors import SPDError
from spd.evaluate import TOKENS_AT_ONCE, Progress, silent
from spd.model import Context, Transformer
from spd.plan import Policy

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CLIP_NORM = 1.0  # of all gradients together, where the schedule is ours and not the paper's
WARMUP = 0.05  # share of the steps
SMALLEST_SCALE = 1e-3


def batches_of(windows: Tensor, rows: range | None = None) -> Iterator[slice]:
    """All of the windows (W, T, ...), or those of `rows`, in order, about `TOKENS_AT_ONCE` tokens at a time."""
    rows, step = rows or range(len(windows)), max(1, TOKENS_AT_ONCE // windows.shape[1])
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def stream_at(model: Transformer, activations: Tensor, rows: Tensor | slice) -> tuple[Stream, Context]:
    """Some windows, on the model's device and in its dtype, with their place in the sequence."""
    stream = Stream(activations[rows].to(model.embedding.weight))
    return stream, model.context(stream)


class Lazy(Sequence):
    """What `read` gives for each of some keys, made anew whenever it is asked for: never more than one at a time."""

    def __init__(self, keys: Sequence, read: Callable):
        self.keys, self.read = keys, read

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int):
        return self.read(self.keys[number])


@torch.no_grad()
def embedded(model: Transformer, tokens: Tensor) -> Tensor:
    """What enters the first block, of windows (W, T)."""
    device = model.embedding.weight.device
    return torch.cat([model.embed(tokens[rows].to(device)).x.cpu() for rows in batches_of(tokens)])


@torch.no_grad()
def through(
    model: Transformer, block: int, policies: tuple[Policy, Policy], activations: Tensor, in_place: bool = False
) -> Tensor:
    """What leaves the block under `policies`, of which the MLP's must be `full`; `in_place` saves memory."""
    out = activations if in_place else torch.empty_like(activations)
    for rows in batches_of(activations):
        stream, context = stream_at(model, activations, rows)
        out[rows] = model.run_block(block, stream, policies, context).x.to(out)
    return out


def snapshot(model: Transformer, blocks: list[int]) -> dict[str, Tensor]:
    """Copies of all parameters of some blocks (the hosted parts), by name."""
    return {name: p.detach().clone() for i in blocks for name, p in block_parameters(model, i).items()}


@torch.no_grad()
def put_back(model: Transformer, values: dict[str, Tensor]) -> None:
    """Gives the parameters of a `snapshot` the values they had then."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


@dataclass(frozen=True)
class Objective:
    """What some blocks of a model are to learn: the first `trained` of `windows` are for that, the rest is held out."""

    model: Transformer
    blocks: list[int]
    loss: Callable[[Tensor | slice], Tensor]  # mean over some windows
    windows: Tensor
    trained: int

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the windows held out."""
        rows, total = range(self.trained, len(self.windows)), 0.0
        for some in batches_of(self.windows, rows):
            total += self.loss(some).item() * (some.stop - some.start)
        return total / len(rows)


def towards_output(
    model: Transformer, block: int, policies: tuple[Policy, Policy], inputs: Tensor, targets: Tensor, trained: int
) -> Objective:
    """One block is to map `inputs` to `targets` (mean squared error), both activations."""

    def loss(rows: Tensor | slice) -> Tensor:
        stream, context = stream_at(model, inputs, rows)
        found = model.shards.flush(model.run_block(block, stream, policies, context)).x
        return F.mse_loss(found.float(), targets[rows].to(found.device).float())

    return Objective(model, [block], loss, inputs, trained)


def towards_logits(model: Transformer, blocks: list[int], tokens: Tensor, teacher: Tensor, trained: int) -> Objective:
    """Some blocks are to give the original model's distribution over the next token (KL divergence, nats a token).

    `teacher` is what left the original model's last block, of windows `tokens` (W, T).
    """

    def loss(rows: Tensor | slice) -> Tensor:
        with torch.no_grad():
            wanted = model.logits(stream_at(model, teacher, rows)[0]).float().log_softmax(-1).flatten(0, 1)
        found = model(tokens[rows].to(wanted.device)).float().log_softmax(-1).flatten(0, 1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    return Objective(model, blocks, loss, tokens, trained)


@dataclass(frozen=True)
class Schedule:
    """How a block, or all of them, are trained."""

    epochs: int
    learning_rate: float  # Adam's; with `relative`, a share of each parameter's root mean square
    optimizer: str = "adam"
    relative: bool = False  # makes one learning rate serve models whose weights differ in scale
    decay: bool = False  # warm up, then follow a cosine to zero, with gradients clipped
    keep_best: bool = False  # end with the weights of the epoch that did best on held-out windows
    batch: int = 1  # windows a step; the paper's is one

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise SPDError(f"Unknown optimizer '{self.optimizer}'; known: {', '.join(OPTIMIZERS)}.")
        if self.epochs < 0 or self.learning_rate <= 0:
            raise SPDError(
                f"Epochs must not be negative and the learning rate must be positive, "
                f"and they are {self.epochs} and {self.learning_rate}."
            )

    def steps_an_epoch(self, windows: int) -> int:
        return math.ceil(windows / self.batch)

    def steps(self, windows: int) -> int:
        return self.epochs * self.steps_an_epoch(windows)

    def factors(self, windows: int) -> Iterator[float]:
        """What the learning rate is multiplied by at each step."""
        steps = self.steps(windows)
        for step in range(steps):
            warm = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
            yield warm * 0.5 * (1 + math.cos(math.pi * step / steps)) if self.decay else 1.0


class Diverged(Exception):
    """The loss is no longer finite."""


def train(
    objective: Objective,
    schedule: Schedule,
    seed: int,
    progress: Progress = silent,
    state: dict | None = None,
    after_epoch: Callable[[int, dict], None] = lambda epoch, state: None,
) -> dict:
    """Trains the objective's blocks in place; gives `loss` (as the steps meet it) and `held_out`, of each epoch.

    `after_epoch` is given the epochs done and a state, with which a later call goes on. Raises `Diverged` where the
    loss is not finite; the blocks are then what they were at that step.
    """
    model, blocks, windows = objective.model, objective.blocks, objective.trained
    learner, order = Learner(model, blocks, schedule), torch.Generator().manual_seed(seed)
    if state is None:
        best = {"best": objective.held_out(), "best_values": snapshot(model, blocks)}
        state = {"epoch": 0, "curves": {"loss": [], "held_out": []}} | best
    else:
        put_back(model, state.pop("values"))
        learner.optimizer.load_state_dict(state.pop("optimizer"))
        learner.rates = state.pop("rates")
        order.set_state(state.pop("generator"))
    curves, steps_done = state["curves"], state["epoch"] * schedule.steps_an_epoch(windows)
    factors = islice(schedule.factors(windows), steps_done, None)
    progress(steps_done)
    for epoch in range(state["epoch"], schedule.epochs):
        losses = []
        for rows in torch.randperm(windows, generator=order).split(schedule.batch):
            losses.append(learner.step(objective.loss, rows, next(factors)))
            progress(1, loss=losses[-1])
        curves["loss"].append(sum(losses) / len(losses))
        curves["held_out"].append(objective.held_out())
        if schedule.keep_best and curves["held_out"][-1] < state["best"]:
            state |= {"best": curves["held_out"][-1], "best_values": snapshot(model, blocks)}
        state["epoch"] = epoch + 1
        reached = {"values": snapshot(model, blocks), "optimizer": learner.optimizer.state_dict()}
        after_epoch(epoch + 1, state | reached | {"rates": learner.rates, "generator": order.get_state()})
    if schedule.keep_best:
        put_back(model, state["best_values"])
    return curves


class Learner:
    """The parameters of some blocks and the optimiser that moves them, alike on every process."""

    def __init__(self, model: Transformer, blocks: list[int], schedule: Schedule):
        chosen = {name: p for i in blocks for name, p in block_parameters(model, i).items()}
        self.parameters = list(chosen.values())
        self.sharded = [p for name, p in chosen.items() if model.is_sharded(name)]
        self.replicated = [p for name, p in chosen.items() if not model.is_sharded(name)]
        self.shards, self.clip = model.shards, schedule.decay
        self.rates = [schedule.learning_rate * (self._scale(p) if schedule.relative else 1) for p in self.parameters]
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, self.rates, strict=True)]
        self.optimizer = OPTIMIZERS[schedule.optimizer](groups)

    def _scale(self, parameter: nn.Parameter) -> float:
        """Root mean square of a parameter's values, over all shards; a floor lets zero biases move."""
        mean = parameter.detach().double().square().mean()
        return max(SMALLEST_SCALE, (self.shards.all_reduce(mean, "scale") / self.shards.world).sqrt().item())

    def step(self, loss: Callable[[Tensor], Tensor], rows: Tensor, factor: float) -> float:
        """One step on some windows, at `factor` of the learning rate; gives the loss before it."""
        self._record(True)
        try:
            with torch.enable_grad():
                found = loss(rows)
                found.backward()
            self.shards.reduce_gradients(self.replicated, self.sharded)  # now those of the one loss of all processes
            if not math.isfinite(found.item()):
                raise Diverged
            if self.clip:
                shrink = 1 / max(1.0, self._gradient_norm() / CLIP_NORM)
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad *= shrink
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.step()
        finally:  # kept gradients would add up to the model's size, block after block
            self._record(False)
            self.optimizer.zero_grad()
        return found.item()

    def _record(self, wanted: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    def _gradient_norm(self) -> float:
        def squares(part: list[nn.Parameter]) -> Tensor:
            return torch.as_tensor(sum(p.grad.double().square().sum() for p in part if p.grad is not None))

        return math.sqrt(self.shards.all_reduce(squares(self.sharded), "norm") + squares(self.replicated))
