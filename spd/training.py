"""Gradient steps: one block towards another's output (section 4.2.3), or all dropped blocks towards the logits."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from spd.checkpoint import block_parameters
from spd.comm import Stream
from spd.errors import SPDError, one_of
from spd.evaluate import TOKENS_AT_ONCE, Progress, silent
from spd.model import Context, Transformer
from spd.plan import FULL, POINTS, Policy, Stretch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CLIP_NORM = 1.0  # of all gradients together, where the schedule is ours and not the paper's
WARMUP = 0.05  # share of the steps
SMALLEST_SCALE = 1e-3
ON_GPU = 0.5  # of a GPU's free memory, at most, that streams take: training a block, and regressions, need the rest


@dataclass(frozen=True)
class Windows:
    """Calibration windows (W, T): `given` to train on, the original model's own up to `trained`, and those held out."""

    tokens: Tensor
    given: int
    trained: int

    def batches(self, start: int = 0, stop: int | None = None) -> list[slice]:
        """Those from `start` to `stop`, in order, about `TOKENS_AT_ONCE` tokens at a time."""
        stop, step = len(self.tokens) if stop is None else stop, max(1, TOKENS_AT_ONCE // self.tokens.shape[1])
        return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


@dataclass(frozen=True)
class Activations:
    """Residual streams (W, T, D) of all windows after so many sublayers, nothing pending, in the model's dtype.

    They lie on its device if two of them and what the heads gather leave a GPU half of its free memory. Else they stay
    on the host, in memory that it does not page, and a few windows at a time are moved.
    """

    model: Transformer
    windows: Windows
    values: Tensor
    passed: int = 0

    @classmethod
    @torch.no_grad()
    def embedded(cls, model: Transformer, windows: Windows) -> "Activations":
        """What enters the first sublayer."""
        weight, shards = model.embedding.weight, model.shards
        shape = *windows.tokens.shape, weight.shape[1]
        kept = (2 + shards.k / shards.tp) * math.prod(shape) * weight.element_size()
        too_many = weight.is_cuda and kept > ON_GPU * torch.cuda.mem_get_info(weight.device)[0]
        place = {"pin_memory": True} if too_many else {"device": weight.device}
        values = torch.empty(shape, dtype=weight.dtype, **place)
        for rows in windows.batches():
            values[rows] = model.embed(windows.tokens[rows].to(weight.device)).x
        return cls(model, windows, values)

    def empty(self) -> "Activations":
        """Others, at the same place."""
        return replace(self, values=torch.empty_like(self.values, pin_memory=self.values.is_pinned()))

    def copy(self) -> "Activations":
        copied = self.empty()
        copied.values.copy_(self.values)
        return copied

    def on_device(self, rows: slice) -> Tensor:
        """Some windows (B, T, D), where the model is."""
        return self.values[rows].to(self.model.embedding.weight, non_blocking=True)

    def at(self, rows: slice) -> tuple[Stream, Context]:
        """Some windows, with their place in the sequence."""
        stream = Stream(self.on_device(rows))
        return stream, self.model.context(stream)

    def run(self, rows: slice, stop: int, policies: tuple[Policy, ...] = ()) -> Tensor:
        """Some windows through the sublayers up to `stop`, `full` after those with a policy, and flushed: (B, T, D)."""
        stream, context = self.at(rows)
        shards, sublayers = self.model.shards, range(self.passed, stop)
        for n, policy in zip_longest(sublayers, policies, fillvalue=FULL):
            stream = shards.sync(self.model.produce(n, stream, context), policy, POINTS[n % 2])
        return shards.flush(stream).x

    @torch.no_grad()
    def through(self, stop: int, policies: tuple[Policy, ...] = (), in_place: bool = False) -> "Activations":
        """What leaves the sublayers up to `stop`; `in_place` saves memory."""
        if self.passed == stop:
            return self
        out = self if in_place else self.empty()
        for rows in self.windows.batches():
            out.values[rows] = self.run(rows, stop, policies)
        return replace(out, passed=stop)


@dataclass(frozen=True)
class Again:
    """What `read` gives for each of some keys, made anew each time it is gone through: one is in memory at a time."""

    keys: list
    read: Callable

    def __iter__(self) -> Iterator:
        return map(self.read, self.keys)


def snapshot(model: Transformer, blocks: Iterable[int]) -> dict[str, Tensor]:
    """Copies of all parameters of some blocks (the hosted parts), by name: `load_state_dict` takes them back."""
    return {name: p.detach().clone() for i in blocks for name, p in block_parameters(model, i).items()}


@dataclass(frozen=True)
class Objective:
    """What some blocks of a model are to learn, on the windows to train on."""

    model: Transformer
    windows: Windows
    blocks: list[int]
    loss: Callable[[slice], Tensor]  # mean over some windows

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on the windows held out."""
        start, stop = self.windows.trained, len(self.windows.tokens)
        rows = self.windows.batches(start, stop)
        return sum(self.loss(some).item() * (some.stop - some.start) for some in rows) / (stop - start)

    @cached_property
    def parameters(self) -> dict[bool, list[nn.Parameter]]:
        """Those to move: True, of which each shard has its own part; False, which are equal on all."""
        named = [(name, p) for i in self.blocks for name, p in block_parameters(self.model, i).items()]
        return {kind: [p for name, p in named if (name in self.model.sharded) is kind] for kind in (True, False)}


def towards_output(inputs: Activations, stretch: Stretch, targets: Activations, relative: bool = False) -> Objective:
    """The sublayers of a stretch are to map `inputs` to `targets` (mean squared error); others are not reached.

    `relative`: each token's error over the mean square of its target. What reads the stream norms it, so that the few
    tokens whose stream is a thousand times as long as others', as many models' first one, count like any other.
    """

    def loss(rows: slice) -> Tensor:
        found, wanted = inputs.run(rows, stretch.end, stretch.policies).float(), targets.on_device(rows).float()
        if not relative:
            return F.mse_loss(found, wanted)
        return ((found - wanted).square().mean(-1) / wanted.square().mean(-1)).mean()

    return Objective(inputs.model, inputs.windows, [*stretch.blocks], loss)


def towards_logits(teacher: Activations, blocks: list[int]) -> Objective:
    """Some blocks are to give the original model's distribution over the next token (KL divergence, nats a token).

    `teacher` is what left the original model's last block.
    """
    model, tokens = teacher.model, teacher.windows.tokens

    def loss(rows: slice) -> Tensor:
        with torch.no_grad():
            wanted = model.logits(teacher.at(rows)[0]).float().log_softmax(-1).flatten(0, 1)
        found = model(tokens[rows].to(wanted.device)).float().log_softmax(-1).flatten(0, 1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    return Objective(model, teacher.windows, blocks, loss)


@dataclass(frozen=True)
class Schedule:
    """How a block, or all of them, are trained, a window a step."""

    epochs: int
    learning_rate: float  # Adam's; with `relative`, a share of each parameter's root mean square
    optimizer: str = "adam"
    relative: bool = False  # one learning rate serves models whose weights differ in scale, and so do errors of tokens
    decay: bool = False  # warm up, then follow a cosine to zero, with gradients clipped
    keep_best: bool = False  # end with the weights of the epoch that did best on held-out windows

    def __post_init__(self):
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.epochs < 0 or self.learning_rate <= 0:
            raise SPDError(
                f"Epochs must not be negative and the learning rate must be positive, "
                f"and they are {self.epochs} and {self.learning_rate}."
            )

    def factor(self, windows: int, step: int) -> float:
        """What the learning rate is multiplied by at a step."""
        steps = max(1, self.epochs * windows)
        warm = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps)) if self.decay else 1.0

    def optimizer_of(self, objective: Objective) -> torch.optim.Optimizer:
        """Adam with a learning rate for each parameter, alike on every process."""
        shards = objective.model.shards

        def scale(parameter: nn.Parameter) -> float:
            """Root mean square of a parameter's values, over all shards; a floor lets zero biases move."""
            mean = parameter.detach().double().square().mean()
            return max(SMALLEST_SCALE, (shards.all_reduce(mean, "scale") / shards.world).sqrt().item())

        every = [p for kind in objective.parameters.values() for p in kind]
        groups = [{"params": [p], "lr": self.learning_rate * (scale(p) if self.relative else 1)} for p in every]
        return OPTIMIZERS[self.optimizer](groups)


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
    model, blocks, windows = objective.model, objective.blocks, objective.windows.trained
    optimizer, order = schedule.optimizer_of(objective), torch.Generator().manual_seed(seed)
    if state is None:
        best = {"best": objective.held_out(), "best_values": snapshot(model, blocks)}
        state = {"epoch": 0, "curves": {"loss": [], "held_out": []}} | best
    else:
        model.load_state_dict(state.pop("values"), strict=False)
        optimizer.load_state_dict(state.pop("optimizer"))
        order.set_state(state.pop("generator"))
    curves, done = state["curves"], state["epoch"] * windows
    rate = LambdaLR(optimizer, partial(schedule.factor, windows), last_epoch=done - 1)
    progress(done)
    for epoch in range(state["epoch"], schedule.epochs):
        losses = []
        for window in torch.randperm(windows, generator=order).tolist():
            losses.append(_step(objective, slice(window, window + 1), optimizer, clip=schedule.decay))
            rate.step()
            progress(1, loss=losses[-1])
        curves["loss"].append(sum(losses) / len(losses))
        curves["held_out"].append(objective.held_out())
        if schedule.keep_best and curves["held_out"][-1] < state["best"]:
            state |= {"best": curves["held_out"][-1], "best_values": snapshot(model, blocks)}
        state["epoch"] = epoch + 1
        reached = {"values": snapshot(model, blocks), "optimizer": optimizer.state_dict()}
        after_epoch(epoch + 1, state | reached | {"generator": order.get_state()})
    if schedule.keep_best:
        model.load_state_dict(state["best_values"], strict=False)
    return curves


@torch.enable_grad()
def _step(objective: Objective, rows: slice, optimizer: torch.optim.Optimizer, clip: bool) -> float:
    """One step on some windows; gives the loss before it."""
    shards, sharded, replicated = objective.model.shards, objective.parameters[True], objective.parameters[False]
    try:
        for parameter in (*sharded, *replicated):
            parameter.requires_grad_(True)
        loss = objective.loss(rows)
        loss.backward()
        shards.reduce_gradients(replicated, sharded)  # now those of the one loss of all processes
        found = loss.item()
        if not math.isfinite(found):
            raise Diverged
        if clip:
            reached = [[p.grad for p in part if p.grad is not None] for part in (sharded, replicated)]
            ours, shared = (sum(grad.double().square().sum() for grad in part) for part in reached)
            norm = math.sqrt(shards.all_reduce(ours, "norm") + shared)
            for grad in chain(*reached):
                grad *= 1 / max(1.0, norm / CLIP_NORM)
        optimizer.step()
    finally:  # kept gradients would add up to the model's size, block after block
        for parameter in (*sharded, *replicated):
            parameter.requires_grad_(False)
            parameter.grad = None
    return found
