"""Hidden states of all calibration windows between two blocks, kept on the host and moved on block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd.comm import Stream
from spd.evaluate import TOKENS_AT_ONCE
from spd.model import Context, Transformer
from spd.plan import Policy


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
