"""What few bits, and other roundings that stand in for `Rounded`, lose for their bytes, beside plans that drop."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import Tensor

from spd import comm, transport
from spd.cli import main
from spd.evaluate import perplexity
from spd.options import MODEL, PERCENTAGES, SENSITIVITY, TEXT, command
from spd.plan import PLAIN, Plan
from spd.planner import plans_by_percentage, read_sensitivity
from spd.transport import BLOCK, Rounded

ROUNDED_SUM = comm.Shards.rounded_sum


def in_blocks(x: Tensor, size: int) -> Tensor:
    """(..., n) as (..., ceil(n / size), size)."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def clipped(x: Tensor, bits: int) -> Tensor:
    """Of four clippings of each block that which leaves the least squared error, rounded."""
    blocks = in_blocks(x, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True) * torch.linspace(0.7, 1, 4).view(-1, *[1] * blocks.dim())
    tried = Rounded.of(blocks.clamp(-most, most), bits).values()
    best = (tried - blocks).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return tried.take_along_dim(best, 0)[0].flatten(-2)[..., : x.shape[-1]]


def rotated(x: Tensor, bits: int, rounding: Callable = lambda x, bits: Rounded.of(x, bits).values()) -> Tensor:
    """Rounded after a Hadamard rotation of 64 values with random signs, the same for all, and turned back."""
    signs = 2 * torch.randint(2, (64,), generator=torch.Generator().manual_seed(0)) - 1
    turn = torch.from_numpy(hadamard(64)).float() / 8
    found = in_blocks(rounding((in_blocks(x, 64) * signs @ turn).flatten(-2), bits), 64)
    return (found @ turn * signs).flatten(-2)[..., : x.shape[-1]]


def by_owners_alone(shards: comm.Shards, owed: Tensor, bits: int, point: str) -> tuple[Tensor, Tensor]:
    """`Shards.rounded_sum` where what the first rounding takes is lost, and only a slice's owner keeps an error."""
    total, errors = ROUNDED_SUM(shards, owed, bits, point)
    slices = in_blocks(owed, -(-owed.shape[-1] // shards.tp))
    return total, errors - (slices - Rounded.of(slices, bits).values()).flatten(-2)[..., : owed.shape[-1]]


def standing_in(rounding: Callable[[Tensor, int], Tensor]):
    """A context in which it rounds."""
    return patch.object(comm, "Rounded", SimpleNamespace(of=lambda *x: SimpleNamespace(values=lambda: rounding(*x))))


OTHERS = {
    "rotated": lambda: standing_in(rotated),
    "clipped": lambda: standing_in(clipped),
    "rotated, clipped": lambda: standing_in(partial(rotated, rounding=clipped)),
    "blocks of 16": lambda: patch.object(transport, "BLOCK", 16),
    "blocks of 64": lambda: patch.object(transport, "BLOCK", 64),
    "by owners alone": lambda: patch.object(comm.Shards, "rounded_sum", by_owners_alone),
}


def cases(full: Plan, dropping: list[Plan]) -> Iterator[tuple[str, Plan, Callable]]:
    """Names, plans and contexts of their evaluation: full, few bits by each rounding, drops, and both."""
    yield "full", full, nullcontext
    for bits in (3, 4, 8):
        yield f"{bits} bits, kept", full.sending(bits), nullcontext
        for name, other in OTHERS.items() if bits < 8 else ():
            yield f"{bits} bits, kept, {name}", full.sending(bits), other
    for bits in (3, 4):
        yield f"{bits} bits, lost", full.sending(plain=bits), nullcontext
    yield "4 bits, lost, the last point too", Plan(((PLAIN[4], PLAIN[4]),) * len(full)), nullcontext
    for plan in dropping:
        yield f"{len(plan.dropped())} dropped", plan, nullcontext
        yield f"{len(plan.dropped())} dropped, 4 bits, kept", plan.sending(4), nullcontext
    yield "all MLPs' dropped", Plan.dropping(len(full), (), range(len(full))), nullcontext


@command(SENSITIVITY, *MODEL, *TEXT, PERCENTAGES)
def policies(session) -> None:
    """Perplexity, loss over full in nats, and share of the bytes of policies and roundings."""
    o, model, rows = session.options, session.load(), []
    data, width = session.windows(model), model.config.hidden_size
    measured = read_sensitivity(o.sensitivity, model.fingerprint, model.tp)["sensitivity"]
    asked = [*cases(Plan.full(len(measured)), [*plans_by_percentage(measured, o.percentages).values()])]
    with session.progress(len(asked), "policies") as progress:
        for name, model.plan, changed in asked:
            with changed():
                found = perplexity(model.transformer, data.tokens)
                rows.append({"name": name, "bytes_share": model.plan.bytes_share(width, model.tp), **found})
            rows[-1] |= {"lost": found["nats"] - rows[0]["nats"], "plan": str(model.plan)}
            progress(1, bytes=rows[-1]["bytes_share"], lost=rows[-1]["lost"])
    session.publish({"policies": rows}, model.describe(), data.describe())


if __name__ == "__main__":
    main(policies)
