"""A model of lm-evaluation-harness: log-likelihoods and generation by the engine, under any plan.

The harness finds it as `spd` once this module is imported. Every process that shares the model is the same worker,
rank 0 of 1, with the same requests; where several copies of the model run, they share the batches out in here.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from spd.errors import SPDError
from spd.generate import Sampling, generate, pad_left
from spd.launch import Replicas, bar, runtime
from spd.model import KVCache, Transformer
from spd.pretrained import SPDModel

Tokens = tuple[int, ...]
Score = tuple[float, bool]  # log-probability in nats, and whether greedy decoding would have given the same


@dataclass
class Question:
    """A context and the different continuations asked for after it."""

    context: Tokens
    continuations: list[Tokens]


def questions(asked: Iterable[tuple[Tokens, Tokens]]) -> list[Question]:
    """The different (context, continuation) pairs by context, the longest context first: neighbours pad little."""
    by_context: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in asked:
        by_context.setdefault(context, {})[continuation] = None
    found = [Question(context, list(continuations)) for context, continuations in by_context.items()]
    return sorted(found, key=lambda q: (-len(q.context), q.context))


def chunks(items: list, size: int) -> list[list]:
    """Consecutive parts of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def score(model: Transformer, batch: list[Question], rows_at_once: int) -> dict[tuple[Tokens, Tokens], Score]:
    """Scores of every (context, continuation) of a batch of questions.

    One forward pass over the contexts, which decides the first tokens; then, where a continuation has more, passes
    over at most `rows_at_once` of them. Nothing but the logits that are asked for is computed.
    """
    device = model.embedding.weight.device
    contexts, valid = pad_left([list(q.context) for q in batch], device)
    rows = [(owner, c) for owner, q in enumerate(batch) for c in q.continuations]
    longer = sorted((i for i, (_, c) in enumerate(rows) if len(c) > 1), key=lambda i: -len(rows[i][1]))
    cache = model.new_cache(*contexts.shape) if longer else None
    last = model(contexts, cache, valid, last_only=True)[:, 0]  # (questions, vocabulary)
    owners = torch.tensor([owner for owner, _ in rows], device=device)
    total, greedy = grade(last[owners, None], torch.tensor([[c[0]] for _, c in rows], device=device))
    for part in chunks(longer, rows_at_once):
        more, also = _rest(model, cache, valid, owners[part], [rows[i][1] for i in part])
        total[part] += more
        greedy[part] &= also
    keys = [(batch[owner].context, c) for owner, c in rows]
    return dict(zip(keys, zip(total.tolist(), greedy.tolist(), strict=True), strict=True))


def _rest(model: Transformer, cache: KVCache, valid: Tensor | None, owners: Tensor, rows: list[Tokens]):
    """Log-probabilities (R,) of all tokens but the first of each row, and whether they are the greedy ones (R,).

    `owners` (R,) says whose context in `cache` each row goes on from. Padding on the right is never looked at.
    """
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=owners.device)
    inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
    if valid is not None:
        valid = torch.cat((valid[owners], torch.ones_like(inputs, dtype=torch.bool)), dim=1)
    return grade(model(inputs, cache.repeat(owners, inputs.shape[1]), valid), targets)


def grade(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (R,) of targets (R, T) under logits (R, T, vocabulary), and whether all are the most probable.

    A target of -1 is padding and does not count.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="none")
    greedy = (logits.argmax(-1) == targets) | (targets < 0)
    return -losses.view_as(targets).double().sum(-1), greedy.all(-1)


BATCH = 16  # contexts in a forward pass, and continuations in the passes after it
NEW_TOKENS = 256  # where a task does not say how many; the harness's own


@register_model("spd")
class SpdLM(TemplateLM):
    """`spd` among the models of lm-evaluation-harness; the arguments are its `--model_args`."""

    def __init__(
        self,
        pretrained: str | Path | SPDModel,
        batch_size: int | str = BATCH,
        replicas: Replicas | None = None,
        is_main: bool = True,
        **reading,
    ):
        """`pretrained` is a loaded model, of which `replicas` may run at once, or what `read` is to read.

        `batch_size` contexts go into a forward pass; only the main process shows progress.
        """
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        self.replicas, self.is_main = replicas or Replicas(), is_main
        if not isinstance(pretrained, SPDModel):
            pretrained, self.is_main = read(pretrained, **reading)
        self.model, self.tokenizer = pretrained, pretrained.tokenizer
        self.max_length = pretrained.config.max_positions
        self.truncated = 0  # requests so far whose context was cut from the left

    @property
    def device(self) -> torch.device:
        return self.model.transformer.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is taken to follow."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids; BOS is the tokenizer's affair, but a text that begins with one gets no second."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self.tokenizer.encode(
            string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def _share(self, batches: list[list], work: Callable[[list], dict]) -> dict:
        """What `work` says of each batch, all in one; the batches are divided over the copies of the model."""
        with bar(-(-len(batches) // self.replicas.count), "batches", self.is_main) as progress:

            def one(batch: list) -> dict:
                found = work(batch)
                progress(1)
                return found

            return {key: value for found in self.replicas.share(batches, one) for key, value in found.items()}

    # ---------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """One score a request (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text in nats, in windows of all positions that predict every token once."""
        texts = [request.args[0] for request in requests]
        windows = [[(None, *make_disjoint_window(window)) for window in self._windows(text)] for text in texts]
        scores = iter(self._loglikelihood_tokens([window for group in windows for window in group]))
        totals = [sum(next(scores)[0] for _ in group) for group in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        return get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)

    def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[Score]:
        """One score a request (its name in the cache, context, continuation); equal ones are run once."""
        asked = [self._fit(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        known = self._share(
            chunks(questions(asked), self.batch_size),
            lambda batch: score(self.model.transformer, batch, self.batch_size),
        )
        answers = [known[key] for key in asked]
        for (name, *_), answer in zip(requests, answers, strict=True):
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    def _fit(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The context cut from the left to the model's positions; the last token is predicted, never read."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise SPDError(
                f"A context of {len(context)} and a continuation of {len(continuation)} tokens cannot be scored: both "
                f"need a token, and the model has {self.max_length} positions."
            )
        room = self.max_length + 1 - len(continuation)
        self.truncated += len(context) > room
        return context[-room:], continuation

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Each request's continuation, up to the first of its stop sequences."""
        asked = [(str(request.args[1]), tuple(self.tok_encode(request.args[0]))) for request in requests]
        options = {name: request.args[1] for (name, _), request in zip(asked, requests, strict=True)}
        order = sorted(set(asked), key=lambda key: (key[0], -len(key[1]), key[1]))
        batches = [part for _, same in groupby(order, lambda key: key[0]) for part in chunks([*same], self.batch_size)]
        texts = self._share(batches, lambda batch: self._continue(batch, options[batch[0][0]]))
        answers = [texts[key] for key in asked]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _continue(self, batch: list[tuple[str, Tokens]], options: dict) -> dict[tuple[str, Tokens], str]:
        """The texts that follow contexts with the same options, by context."""
        options = normalize_gen_kwargs(options, NEW_TOKENS)
        new, room = options["max_gen_toks"], self.max_length - options["max_gen_toks"]
        if room < 1:
            raise SPDError(f"{new} new tokens leave no room for a prompt in the model's {self.max_length} positions.")
        stops = handle_stop_sequences(options["until"], self.tokenizer.decode(self.eot_token_id))
        prompts = [list(context[-room:]) for _, context in batch]
        sampling = Sampling(
            options["temperature"] if options["do_sample"] else 0.0, options.get("top_k"), options.get("top_p")
        )
        rows = generate(self.model.transformer, prompts, new, sampling, lambda row: self._stopped(row, stops))
        texts = [self._text(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
        return {key: postprocess_generated_text(text, stops, None) for key, text in zip(batch, texts, strict=True)}

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _stopped(self, tokens: list[int], stops: list[str]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in stops)


def _batch_size(given: int | str) -> int:
    if not str(given).isdigit() or int(given) < 1:
        raise SPDError(
            f"batch_size={given} is not supported: the processes that share a model must agree on every batch, so "
            "give a number of contexts."
        )
    return int(given)


def read(
    name: str | Path,
    tp: int = 1,
    plan: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_batch_size: int | None = None,
) -> tuple[SPDModel, bool]:
    """The model, on the processes that a launcher started if it did, and whether this one is the main one.

    The harness always gives `max_batch_size`, which goes with batches of its own choice: not with these.
    """
    stack = ExitStack()
    atexit.register(stack.close)  # the harness never says when it is done with a model
    here = stack.enter_context(runtime(str(device).partition(":")[0]))
    model = SPDModel.from_pretrained(name, shards=here.shards(tp), dtype=dtype, device=here.device)
    if plan is not None:
        model.load_plan(Path(plan))
    return model, here.is_main
