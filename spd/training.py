"""Gradient steps: one block towards another's output (section 4.2.3), or all dropped blocks towards the logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.comm import Stream
from spd.errors import SPDError
from spd.evaluate import TOKENS_AT_ONCE
from spd.model import Context, Transformer
from spd.plan import Policy

# ---------------------------------------------------------------- Hidden states of all calibration windows be


@dataclass
class Activations:
    """The residual stream of W windows: `x` (W, T, D) and, where something is pending, `pending` (S, W, T, D)."""

    x: Tensor
    pending: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def embedded(cls, model: Transformer, tokens: Tensor) -> "Activations":
        """What enters the first block, of windows (W, T)."""
        device = model.embedding.weight.device
        return cls(torch.cat([model.embed(rows.to(device)).x.cpu() for rows in tokens.split(_rows_at_once(tokens))]))

    def __len__(self) -> int:
        return len(self.x)

    def at(self, rows: Tensor | slice, model: Transformer) -> tuple[Stream, Context]:
        """Some windows, on the model's device and in its dtype, with their place in the sequence."""
        like = model.embedding.weight
        pending = None if self.pending is None else self.pending[:, rows].to(like)
        stream = Stream(self.x[rows].to(like), pending)
        return stream, model.context(stream)

    def batches(self, model: Transformer, rows: range | None = None) -> Iterator[tuple[slice, Stream, Context]]:
        """All windows, or those of `rows`, in order, about `TOKENS_AT_ONCE` tokens at a time."""
        rows, step = rows or range(len(self)), _rows_at_once(self.x)
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            yield some, *self.at(some, model)

    @torch.no_grad()
    def through(
        self, model: Transformer, block: int, policies: tuple[Policy, Policy], in_place: bool = False
    ) -> "Activations":
        """What leaves the block under `policies`; `in_place` gives up the inputs, to save their memory."""
        x, pending = self.x if in_place else torch.empty_like(self.x), []
        for rows, stream, context in self.batches(model):
            stream = model.run_block(block, stream, policies, context)
            x[rows] = stream.x.to(x)
            if stream.pending is not None:
                pending.append(stream.pending.to(x))
        return Activations(x, torch.cat(pending, dim=1) if pending else None)


class Batches(Sequence):
    """Hidden states of some windows, nothing pending, (B, T, D) at a time, moved to the model's device when read."""

    def __init__(self, activations: Activations, model: Transformer, rows: range):
        self.like, self.parts = model.embedding.weight, activations.x[rows.start : rows.stop]
        self.parts = self.parts.split(_rows_at_once(activations.x))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Tensor:
        return self.parts[number].to(self.like)


class Passes:
    """The batches of some activations as a sequence that may be passed over again and again."""

    def __init__(self, activations: Activations, model: Transformer, rows: range):
        self.activations, self.model, self.rows = activations, model, rows

    def __iter__(self) -> Iterator[tuple[Stream, Context]]:
        return ((stream, context) for _, stream, context in self.activations.batches(self.model, self.rows))


def _rows_at_once(windows: Tensor) -> int:
    return max(1, TOKENS_AT_ONCE // windows.shape[1])


# ---------------------------------------------------------------- Gradient steps: one block towards another's


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CLIP_NORM = 1.0  # of all gradients together, where the schedule is ours and not the paper's
WARMUP = 0.05  # share of the steps
SMALLEST_SCALE = 1e-3

Told = Callable[..., None]  # progress: told how many steps were done, and `loss`


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


def train_block(
    model: Transformer,
    block: int,
    policies: tuple[Policy, Policy],
    inputs: Activations,
    targets: Activations,
    windows: int,
    schedule: Schedule,
    seed: int,
    told: Told = lambda *_, **__: None,
) -> dict:
    """Trains one block, in place, so that it maps `inputs` to `targets` (mean squared error).

    The first `windows` windows are trained on, the others held out.

    Returns:
        `loss` (of each epoch, on training windows as they come) and `held_out` (after each epoch).

    Raises:
        Diverged: the loss became non-finite; the block is then what it was at that step.
    """

    def loss(rows: Tensor) -> Tensor:
        return _block_loss(model, block, policies, inputs, targets, rows)

    def held_out() -> float:
        return block_loss(model, block, policies, inputs, targets, range(windows, len(inputs)))

    names = [f"blocks.{block}."]
    return _train(model, names, loss, held_out, windows, schedule, seed, told)


def _block_loss(model, block, policies, inputs: Activations, targets: Activations, rows) -> Tensor:
    stream, context = inputs.at(rows, model)
    found = model.shards.flush(model.run_block(block, stream, policies, context)).x
    return F.mse_loss(found.float(), targets.x[rows].to(found.device).float())


@torch.no_grad()
def block_loss(
    model: Transformer,
    block: int,
    policies: tuple[Policy, Policy],
    inputs: Activations,
    targets: Activations,
    rows: range,
) -> float:
    """Mean squared error of the block's output over some windows."""
    total = 0.0
    for some, _, _ in inputs.batches(model, rows):
        total += _block_loss(model, block, policies, inputs, targets, some).item() * (some.stop - some.start)
    return total / len(rows)


def train_jointly(
    model: Transformer,
    blocks: list[int],
    tokens: Tensor,
    teacher: Activations,
    windows: int,
    schedule: Schedule,
    seed: int,
    told: Told = lambda *_, **__: None,
    state: dict | None = None,
    after_epoch: Callable[[int, dict], None] = lambda *_: None,
) -> dict:
    """Trains some blocks together, in place, towards the original model's distribution over the next token.

    Args:
        tokens: windows (W, T), of which the first `windows` are trained on and the others held out.
        teacher: what left the original model's last block.
        state: where to go on, if an earlier run was interrupted: the last that its `after_epoch` was given.
        after_epoch: told of the number of epochs done and of the state then.

    Returns and raises as `train_block` does; the loss is Kullback-Leibler, in nats a token.
    """

    def loss(rows: Tensor) -> Tensor:
        return _divergence(model, tokens[rows], teacher, rows)

    def held_out() -> float:
        return joint_loss(model, tokens, teacher, range(windows, len(tokens)))

    prefixes = [f"blocks.{i}." for i in blocks]
    return _train(model, prefixes, loss, held_out, windows, schedule, seed, told, state, after_epoch)


def _divergence(model: Transformer, tokens: Tensor, teacher: Activations, rows) -> Tensor:
    with torch.no_grad():
        wanted = model.logits(teacher.at(rows, model)[0]).float().log_softmax(-1).flatten(0, 1)
    found = model(tokens.to(wanted.device)).float().log_softmax(-1).flatten(0, 1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def joint_loss(model: Transformer, tokens: Tensor, teacher: Activations, rows: range) -> float:
    """Kullback-Leibler divergence from the original model over some windows, nats a token."""
    total = 0.0
    for some, _, _ in teacher.batches(model, rows):
        total += _divergence(model, tokens[some], teacher, some).item() * (some.stop - some.start)
    return total / len(rows)


# ---------------------------------------------------------------- the loop both share


def _train(
    model: Transformer,
    prefixes: list[str],
    loss_of: Callable[[Tensor], Tensor],
    held_out: Callable[[], float],
    windows: int,
    schedule: Schedule,
    seed: int,
    told: Told,
    state: dict | None = None,
    after_epoch: Callable[[int, dict], None] = lambda *_: None,
) -> dict:
    """Epochs from the first, or from where `state` stands, which `after_epoch` was given in an earlier run."""
    trained = _Trained(model, prefixes, schedule)
    generator = torch.Generator().manual_seed(seed)
    state = trained.restore(state, generator) if state else {
        "epoch": 0, "curves": {"loss": [], "held_out": []}, "best": held_out(), "best_values": trained.copy(),
    }  # fmt: skip
    curves = state["curves"]
    factors = islice(schedule.factors(windows), state["epoch"] * schedule.steps_an_epoch(windows), None)
    told(state["epoch"] * schedule.steps_an_epoch(windows))
    for epoch in range(state["epoch"], schedule.epochs):
        losses = []
        for rows in torch.randperm(windows, generator=generator).split(schedule.batch):
            with trained.gradients():
                loss = loss_of(rows)
                loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged
            trained.step(next(factors))
            told(1, loss=losses[-1])
        curves["loss"].append(sum(losses) / len(losses))
        curves["held_out"].append(held_out())
        if schedule.keep_best and curves["held_out"][-1] < state["best"]:
            state |= {"best": curves["held_out"][-1], "best_values": trained.copy()}
        after_epoch(epoch + 1, state | {"epoch": epoch + 1} | trained.state(generator))
    if schedule.keep_best:
        trained.paste(state["best_values"])
    return curves


class _Trained:
    """The parameters being trained, and how they take a step, alike on every process."""

    def __init__(self, model: Transformer, prefixes: list[str], schedule: Schedule):
        chosen = [(n, p) for n, p in model.named_parameters() if n.startswith(tuple(prefixes))]
        self.parameters = [p for _, p in chosen]
        self.sharded = [p for n, p in chosen if model.is_sharded(n)]
        self.replicated = [p for n, p in chosen if not model.is_sharded(n)]
        self.shards, self.clip = model.shards, schedule.decay
        self.rates = [schedule.learning_rate * (self._scale(p) if schedule.relative else 1) for p in self.parameters]
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, self.rates, strict=True)]
        self.optimizer = OPTIMIZERS[schedule.optimizer](groups)

    def _scale(self, parameter: nn.Parameter) -> float:
        """Root mean square of a parameter's values, over all shards; a floor lets zero biases move."""
        mean = parameter.detach().double().square().mean()
        return max(SMALLEST_SCALE, (self.shards.all_reduce(mean, "scale") / self.shards.world).sqrt().item())

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within, operations are recorded; afterwards the gradients are those of the one loss of all processes."""
        self.optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
        self.shards.reduce_gradients(self.replicated, self.sharded)

    def step(self, factor: float) -> None:
        """One step at `factor` of the learning rate."""
        if self.clip:
            excess = self._gradient_norm() / CLIP_NORM
            factor_of_gradients = 1 / max(1.0, excess)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad *= factor_of_gradients
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()

    def _gradient_norm(self) -> float:
        squares = [sum(p.grad.double().square().sum() for p in part if p.grad is not None)
                   for part in (self.sharded, self.replicated)]  # fmt: skip
        return math.sqrt(self.shards.all_reduce(torch.as_tensor(squares[0]), "norm") + squares[1])

    def state(self, generator: torch.Generator) -> dict:
        """All that the next step depends on."""
        return {
            "values": self.copy(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator.get_state(),
            "rates": self.rates,
        }

    def restore(self, state: dict, generator: torch.Generator) -> dict:
        """Goes back to a `state`; gives what else it holds."""
        self.paste(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        self.rates = state["rates"]
        return {name: state[name] for name in ("epoch", "curves", "best", "best_values")}

    def copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def paste(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
