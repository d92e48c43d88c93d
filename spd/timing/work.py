"""What one forward pass does on one shard: operators with their FLOPs and bytes, counted from the shape.

Operators carry the names of `profiles/layer_ops_a100.csv`. B sequences of T new tokens each, `past` tokens before
them; a shard has h of H query heads, g key/value heads and f MLP neurons. Nothing here knows a machine.
"""

from dataclasses import dataclass, fields

from spd.config import ModelConfig

MATRIX = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "head")  # the others but attention are pointwise


@dataclass(frozen=True)
class Work:
    """Counted work, which machines put a time on. Sums and multiples of work are work."""

    operators: float = 0.0  # kernels of the fused kind that the operator table lists
    flops: float = 0.0  # of matrix products and attention; pointwise ones are free beside their bytes
    weight_bytes: float = 0.0
    batched_weight_bytes: float = 0.0  # those read for several tokens at once: another kernel than matrix-vector
    activation_bytes: float = 0.0  # activations and key/value cache, read and written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in self.values()))

    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Operator:
    """One kernel on one shard."""

    name: str
    work: Work
    tokens: int  # rows it works on

    @property
    def kind(self) -> str:
        return "matrix products" if self.name in MATRIX else "attention" if self.name == "attention" else "pointwise"


@dataclass(frozen=True)
class Pass:
    """One forward pass of a shape on each of `tp` shards: a prefill, or a decode step with `tokens` = 1."""

    config: ModelConfig
    tp: int
    batch: int = 1
    tokens: int = 1  # T, new tokens a sequence
    past: float = 0  # tokens a sequence before them; a mean where steps are averaged
    element_size: int = 2  # bytes

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def payload(self) -> int:
        """Bytes of one all-reduce."""
        return self.rows * self.config.hidden_size * self.element_size

    @property
    def logits(self) -> int:
        """Bytes of the last tokens' logits, which one all-gather joins."""
        return self.batch * self.config.vocab_size * self.element_size

    def collectives(self, syncs: int) -> list[tuple[int, float]]:
        """How many all-reduces of how many bytes a pass with `syncs` of them takes; none at all without them.

        The last, on a ring, stands for the all-gather of the logits: those bytes go round once, and not twice.
        """
        return [(syncs, self.payload), (1, self.logits / 2)] if syncs else []

    def block(self) -> list[Operator]:
        """A decoder block's operators in the order they run; each of the two residual additions is one."""
        c, n = self.config, self.rows
        d, heads, neurons = c.hidden_size, c.num_heads // self.tp, c.intermediate_size // self.tp
        kv_heads = max(1, c.num_kv_heads // self.tp)  # beyond the key/value heads, tp replicates them
        q, kv = heads * c.head_dim, kv_heads * c.head_dim
        add = self._pointwise("residual_add", 3 * n * d)
        return [
            self._pointwise("input_norm", 2 * n * d),
            self._matrix("qkv_proj", n, d, q + 2 * kv),
            self._pointwise("rope", 2 * n * (q + kv)),
            self._attention(q, kv),
            self._matrix("o_proj", n, q, d),
            add,
            self._pointwise("post_attention_norm", 2 * n * d),
            self._matrix("gate_up_proj", n, d, 2 * neurons),
            self._pointwise("act", 3 * n * neurons),
            self._matrix("down_proj", n, neurons, d),
            add,
        ]

    def ends(self) -> list[Operator]:
        """Embedding and last norm, which every shard computes whole, and its part of the last tokens' logits."""
        d, part = self.config.hidden_size, -(-self.config.vocab_size // self.tp)
        return [
            self._pointwise("embedding", 2 * self.rows * d),
            self._pointwise("final_norm", 2 * self.batch * d, self.batch),
            self._matrix("head", self.batch, d, part),
        ]

    def work(self) -> Work:
        """Of the whole pass."""
        block = sum((operator.work for operator in self.block()), Work())
        return block * self.config.num_blocks + sum((operator.work for operator in self.ends()), Work())

    def _matrix(self, name: str, rows: int, inputs: int, outputs: int) -> Operator:
        weights = inputs * outputs * self.element_size
        activations = rows * (inputs + outputs) * self.element_size
        return Operator(name, Work(1, 2 * rows * inputs * outputs, weights, weights * (rows > 1), activations), rows)

    def _pointwise(self, name: str, elements: int, rows: int | None = None) -> Operator:
        return Operator(name, Work(1, activation_bytes=elements * self.element_size), rows or self.rows)

    def _attention(self, q: int, kv: int) -> Operator:
        """A fused causal kernel: scores and their weighted sum, queries and output, keys and values once."""
        context = self.past + (self.tokens + 1) / 2  # keys a query sees, on average
        cache = self.batch * (self.past + self.tokens) * 2 * kv
        flops = 4 * self.rows * q * context
        return Operator("attention", Work(1, flops, 0, 0, (2 * self.rows * q + cache) * self.element_size), self.rows)
