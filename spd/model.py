"""The mathematics of a tensor-parallel LLaMA, or its like, whose sync points follow a plan.

Shapes: B batch, T tokens, D hidden, S shards hosted (1 where all shards see the same input), h query heads and
g key/value heads of one shard, d head size. Weights of all hosted shards are stacked along S.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd.comm import Shards, Stream
from spd.config import POSITIONS_OFFSET, ModelConfig
from spd.kernels import linear
from spd.plan import Plan, Policy


def shard_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each shard's own linear map: (S or 1, B, T, in) with weights (S, out, in) gives (S, B, T, out)."""
    shards, width, _ = weight.shape
    if shards == 1:
        y = linear(x[0], weight[0])[None]
    elif x.shape[0] == 1:  # one input for all: a single dense product
        y = linear(x[0], weight.flatten(0, 1)).unflatten(-1, (shards, width)).movedim(-2, 0)
    else:
        y = torch.bmm(x.flatten(1, 2), weight.transpose(1, 2)).unflatten(1, x.shape[1:3])
    return y if bias is None else y + bias[:, None, None]


class Norm(nn.Module):
    """RMS norm over the last dimension, or a layer norm where there is a bias."""

    def __init__(self, size: int, eps: float, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class ShardLinear(nn.Module):
    """Weights (S, out, in) and, where the model has one, a bias (S, out) of a column-parallel layer."""

    sharded = ("weight", "bias")  # of which each shard has its own part

    def __init__(self, shards: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shards, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(shards, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return shard_linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """A row-parallel layer: each shard gives its part (S, B, T, D) of a sum; the bias (D,) belongs to the sum."""

    sharded = ("weight",)

    def __init__(self, shards: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shards, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return shard_linear(x, self.weight)


class Held(NamedTuple):
    """One block's keys and values, (S, B, g, capacity, d) each, and the number of tokens held before this pass."""

    keys: Tensor
    values: Tensor
    length: int | Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' keys and values after those held, in place; returns all of them."""
        keys, values, length = self
        if isinstance(length, Tensor):
            keys[:, :, :, length], values[:, :, :, length] = k, v
            return keys, values
        end = length + k.shape[-2]
        keys[..., length:end, :] = k
        values[..., length:end, :] = v
        return keys[..., :end, :], values[..., :end, :]


class KVCache:
    """Keys and values of every block, (S, B, g, capacity, d) each, and the number of tokens they hold.

    `length` is a number or, for decoding one token at a time by code that is compiled or captured once, a tensor (1,)
    on the device: then all of the capacity is read, and no shape depends on how many tokens are held. A tensor a block
    lets compiled code write in place: in a view of all blocks' it would copy them all.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int | Tensor = 0):
        self.keys, self.values, self.length = keys, values, length

    def static(self) -> "KVCache":
        """The same keys and values, by a length on the device."""
        return KVCache(self.keys, self.values, torch.zeros(1, dtype=torch.long, device=self.keys[0].device))

    def of(self, block: int) -> Held:
        return Held(self.keys[block], self.values[block], self.length)

    def repeat(self, rows: Tensor, more: int) -> "KVCache":
        """A copy that holds these rows (R,) of the batch, with room for `more` tokens."""

        def copied(held: Tensor) -> Tensor:
            return F.pad(held[..., : self.length, :].index_select(1, rows), (0, 0, 0, more))

        return KVCache(*([copied(held) for held in both] for both in (self.keys, self.values)), self.length)

    def advance(self, tokens: int) -> None:
        """After a pass over `tokens` new tokens."""
        self.length += tokens  # in place where it is a tensor: captured code reads that one


class Rotary(nn.Module):
    """Cosines and signed sines (positions, d), computed up to the longest position asked for and kept."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.frequencies, self.factor = config.rotary_frequencies()
        self.kept = torch.empty(2, 0, config.head_dim)

    def table(self, length: int, like: Tensor) -> Tensor:
        """(2, at least `length`, d) in dtype and place of `like`; the first half of the sines is negative."""
        if self.kept.shape[1] < length or self.kept.dtype != like.dtype or self.kept.device != like.device:
            length = -(-length // 256) * 256  # decoding asks for one more position every time
            angles = torch.outer(torch.arange(length, dtype=torch.float), self.frequencies)
            cos, sin = (f(angles) * self.factor for f in (torch.cos, torch.sin))
            self.kept = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(like)
        return self.kept

    def forward(self, start: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) each, for positions start..start+T-1."""
        cos, sin = self.table(start + tokens, like)[:, start : start + tokens]
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints: (..., T, d); `sin` carries the signs."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, tp: int, k: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.h, self.g = config.heads_per_shard(tp), config.kv_heads_per_shard(tp)
        wide = (self.h + 2 * self.g) * self.head_dim
        self.qkv = ShardLinear(k, config.hidden_size, wide, config.attention_bias)
        self.out = RowLinear(k, self.h * self.head_dim, config.hidden_size, config.out_bias)
        norms = config.form.head_norms
        self.q_norm, self.k_norm = (Norm(config.head_dim, config.norm_eps) if norms else None for _ in "qk")

    def add_biases(self) -> None:
        """Biases of zero where there are none: the same function."""
        if self.qkv.bias is None:
            self.qkv.bias = nn.Parameter(self.qkv.weight.new_zeros(self.qkv.weight.shape[:2]), requires_grad=False)
        if self.out.bias is None:
            self.out.bias = nn.Parameter(self.out.weight.new_zeros(self.out.weight.shape[1]), requires_grad=False)

    def project(self, x: Tensor, context: "Context") -> tuple[Tensor, Tensor, Tensor]:
        """Queries (S, B, h, T, d), keys and values (S, B, g, T, d), after the rotary embedding."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(2, 3)  # (S, B, h + 2g, T, d)
        qk, v = heads[:, :, : -self.g], heads[:, :, -self.g :]
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, : self.h]), self.k_norm(qk[:, :, self.h :])), dim=2)
        if context.rotary is not None:
            qk = rotate(qk, *context.rotary)
        return *qk.split((self.h, self.g), dim=2), v

    def forward(self, x: Tensor, context: "Context", held: Held | None = None) -> Tensor:
        """Each shard's partial output: (S or 1, B, T, D) gives (S, B, T, D)."""
        return self.out(self.mix(x, context, held))

    def mix(self, x: Tensor, context: "Context", held: Held | None = None) -> Tensor:
        """What the heads gather from the values, before the output projection: (S, B, T, h d)."""
        q, k, v = self.project(x, context)
        if held is not None:
            k, v = held.extend(k, v)
        mask = None if context.mask is None else context.mask.repeat(q.shape[0], 1, 1, 1)
        y = F.scaled_dot_product_attention(
            *(t.flatten(0, 1) for t in (q, k, v)), mask, is_causal=context.causal, enable_gqa=self.h != self.g
        )
        return y.unflatten(0, q.shape[:2]).transpose(2, 3).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, tp: int, k: int):
        super().__init__()
        neurons = config.neurons_per_shard(tp)
        self.parts = 2 if config.form.gated else 1  # of the input projection: gate and up, or up alone
        self.gate_up = ShardLinear(k, config.hidden_size, self.parts * neurons, config.mlp_bias)
        self.down = RowLinear(k, neurons, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each shard's partial output: (S or 1, B, T, D) gives (S, B, T, D)."""
        return self.down(self.activations(x))

    def activations(self, x: Tensor) -> Tensor:
        """Of the shards' neurons: (S or 1, B, T, D) gives (S, B, T, n)."""
        return self.activate(self.gate_up(x))

    def activate(self, projected: Tensor) -> Tensor:
        """Neurons (..., n) of what the input projection gives them (..., n or 2n)."""
        if self.parts == 1:
            return F.relu(projected)
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up


class Block(nn.Module):
    """A decoder block. With policies `drop, full` it is the paper's SPD block (section 4.1, figure 3)."""

    def __init__(self, config: ModelConfig, tp: int, k: int):
        super().__init__()
        self.attention_norm = Norm(config.hidden_size, config.norm_eps, config.form.layer_norm)
        self.attention = Attention(config, tp, k)
        self.mlp_norm = Norm(config.hidden_size, config.norm_eps, config.form.layer_norm)
        self.mlp = MLP(config, tp, k)

    def forward(
        self, stream: Stream, policies: tuple[Policy, Policy], shards: Shards, context: "Context", block: int
    ) -> Stream:
        y = self.attend(stream, context, None if context.cache is None else context.cache.of(block))
        stream = shards.sync(stream.produce(y, self.attention.out.bias), policies[0], "attention")
        z = self.transform(stream)
        return shards.sync(stream.produce(z, self.mlp.down.bias), policies[1], "mlp")

    def attend(self, stream: Stream, context: "Context", held: Held | None) -> Tensor:
        return self.attention(self.attention_norm(stream.read()), context, held)

    def transform(self, stream: Stream) -> Tensor:
        return self.mlp(self.mlp_norm(stream.read()))


class Context:
    """Where in the sequence a forward pass stands: rotary tables, mask and cache, the same for every block."""

    def __init__(self, rotary: Rotary | None, x: Tensor, cache: KVCache | None, valid: Tensor | None):
        """`x` (B, T, D) are the new tokens; `valid` (B, past + T) is False at padding."""
        past, tokens = cache.length if cache is not None else 0, x.shape[1]
        self.cache, self.mask = cache, None
        if isinstance(past, Tensor):  # one token, whose position is data
            positions = torch.arange(cache.keys[0].shape[-2], device=x.device)
            table = None if rotary is None else rotary.table(len(positions), x)
            self.rotary = None if table is None else tuple(table.index_select(1, past))
            self.causal, self.mask = False, (positions <= past).expand(x.shape[0], 1, 1, -1)
            return
        self.rotary = None if rotary is None else rotary(past, tokens, x)
        self.causal = valid is None and past == 0 and tokens > 1
        if not self.causal and (valid is not None or tokens > 1):
            valid = torch.ones(1, past + tokens, dtype=torch.bool, device=x.device) if valid is None else valid
            self.mask = attention_mask(past, tokens, valid.expand(x.shape[0], -1))


def attention_mask(past: int, tokens: int, valid: Tensor) -> Tensor:
    """(B, 1, T, past + T), True where a query may look. Padding looks at itself, lest its softmax be empty."""
    queries = torch.arange(past, past + tokens, device=valid.device)[:, None]
    keys = torch.arange(past + tokens, device=valid.device)[None]
    return ((keys <= queries) & valid[:, None, :] | (keys == queries))[:, None]


class Transformer(nn.Module):
    """A decoder over the shards hosted here; `plan` may be exchanged at any time."""

    def __init__(self, config: ModelConfig, shards: Shards, plan: Plan | None = None):
        """Parameters are left unfilled."""
        super().__init__()
        config.validate_tp(shards.tp)
        self.config, self.shards = config, shards
        self.plan = Plan.full(config.num_blocks) if plan is None else plan
        self.embedding, learned = nn.Embedding(config.vocab_size, config.hidden_size), config.form.learned_positions
        rows = config.max_positions + POSITIONS_OFFSET
        self.positions = nn.Embedding(rows, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(config, shards.tp, shards.k) for _ in range(config.num_blocks))
        self.norm = Norm(config.hidden_size, config.norm_eps, config.form.layer_norm)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = None if learned else Rotary(config)
        self.sharded = frozenset(  # names of the parameters of which each shard has its own part; others are equal
            f"{path}.{kind}" for path, layer in self.named_modules() for kind in getattr(layer, "sharded", ())
        )

    def embed(self, tokens: Tensor, cache: KVCache | None = None, valid: Tensor | None = None) -> Stream:
        """Token ids (B, T), after those in a cache, to a stream with nothing pending."""
        x, past = self.embedding(tokens), 0 if cache is None else cache.length
        if self.positions is None:
            return Stream(x)
        places = past + torch.arange(tokens.shape[1], device=tokens.device)
        if valid is not None:  # counted from a row's first valid token; padding has a row of its own before that
            places = (valid.cumsum(1) * valid - 1)[:, past:]
        return Stream(x + self.positions(places + POSITIONS_OFFSET))

    def context(self, stream: Stream, cache: KVCache | None = None, valid: Tensor | None = None) -> Context:
        return Context(self.rotary, stream.x, cache, valid)

    def run_block(self, i: int, stream: Stream, policies: tuple[Policy, Policy], context: Context) -> Stream:
        return self.blocks[i](stream, policies, self.shards, context, i)

    def produce(self, n: int, stream: Stream, context: Context) -> Stream:
        """The stream with the output of the n-th sublayer pending: a block's attention, its MLP, the next attention."""
        block, mlp = self.blocks[n // 2], n % 2
        if mlp:
            return stream.produce(block.transform(stream), block.mlp.down.bias)
        return stream.produce(block.attend(stream, context, None), block.attention.out.bias)

    @property
    def vocabulary(self) -> Tensor:
        """(vocabulary, D), the output head's weights."""
        return (self.embedding if self.head is None else self.head).weight

    def logits(self, stream: Stream) -> Tensor:
        """Flushes what is pending; (B, T, vocabulary)."""
        return linear(self.norm(self.shards.flush(stream).x), self.vocabulary)

    def last_logits(self, stream: Stream) -> Tensor:
        """(B, 1, vocabulary) of the last tokens. Where none are trained each process computes a part of them.

        Reading the head's weights is much of a small model's decode step, and one gathering of logits costs less.
        """
        last = stream.last()
        if torch.is_grad_enabled():
            return self.logits(last)
        x, rows = self.norm(self.shards.flush(last).x), len(self.vocabulary)
        return self.shards.join(linear(x, self.vocabulary[self.shards.part_of(rows)]), rows, "head")

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, valid: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, vocabulary) of token ids (B, T), or (B, 1, vocabulary) of the last ones only.

        `cache` holds the tokens before these and is extended; `valid` (B, past + T) is False at padding.
        """
        stream = self.embed(tokens, cache, valid)
        context = self.context(stream, cache, valid)
        for i, policies in enumerate(self.plan.blocks):
            stream = self.run_block(i, stream, policies, context)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.last_logits(stream) if last_only else self.logits(stream)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        config, weight, shards = self.config, self.embedding.weight, self.shards
        shape = shards.k, batch, config.kv_heads_per_shard(shards.tp), capacity, config.head_dim
        return KVCache(*([weight.new_zeros(shape) for _ in range(config.num_blocks)] for _ in range(2)))
