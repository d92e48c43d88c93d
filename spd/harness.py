"""A model of lm-evaluation-harness: log-likelihoods and generation by the engine, under any plan.

The harness finds it as `spd` once this module is imported. Every process that shares the model is the same worker,
rank 0 of 1, with the same requests; where several copies of the model run, they share the batches out in here.
"""

import atexit
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from spd.errors import SPDError
from spd.evaluate import not_finite
from spd.generate import Sampling, generate, pad_left
from spd.launch import Replicas, bar, runtime
from spd.model import KVCache, Transformer
from spd.pretrained import SPDModel

BATCH = 16  # contexts in a forward pass, and continuations in the passes after it
NEW_TOKENS = 256  # where a task does not say how many; the harness's own

Tokens = tuple[int, ...]
Question = tuple[Tokens, list[Tokens]]  # a context, and the different continuations asked for after it
Score = tuple[float, bool]  # log-probability in nats, and whether greedy decoding would have given the same


def questions(asked: Iterable[tuple[Tokens, Tokens]]) -> list[Question]:
    """The different (context, continuation) pairs by context, the longest context first: neighbours pad little."""
    by_context: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in asked:
        by_context.setdefault(context, {})[continuation] = None
    found = [(context, list(continuations)) for context, continuations in by_context.items()]
    return sorted(found, key=lambda question: (-len(question[0]), question[0]))


@torch.no_grad()
def score(model: Transformer, batch: list[Question], rows_at_once: int) -> dict[tuple[Tokens, Tokens], Score]:
    """Scores of every (context, continuation) of a batch of questions.

    One forward pass over the contexts, which decides the first tokens; then, where a continuation has more, passes
    over at most `rows_at_once` of them. Nothing but the logits that are asked for is computed.
    """
    device = model.embedding.weight.device
    contexts, valid = pad_left([list(context) for context, _ in batch], device)
    rows = [(owner, c) for owner, (_, continuations) in enumerate(batch) for c in continuations]
    longer = sorted((i for i, (_, c) in enumerate(rows) if len(c) > 1), key=lambda i: -len(rows[i][1]))
    cache = model.new_cache(*contexts.shape) if longer else None
    last = model(contexts, cache, valid, last_only=True)[:, 0]  # (questions, vocabulary)
    owners = torch.tensor([owner for owner, _ in rows], device=device)
    total, greedy = grade(last[owners, None], torch.tensor([[c[0]] for _, c in rows], device=device))
    for part in Collator.get_chunks(longer, rows_at_once):
        more, also = _rest(model, cache, valid, owners[part], [rows[i][1] for i in part])
        total[part] += more
        greedy[part] &= also
    found = total.tolist()
    if not all(map(math.isfinite, found)):
        raise not_finite(model, contexts, valid)
    scores = zip(found, greedy.tolist(), strict=True)
    return {(batch[owner][0], c): score for (owner, c), score in zip(rows, scores, strict=True)}


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
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise SPDError(
                f"batch_size={batch_size} is not supported: the processes that share a model must agree on every "
                "batch, so give a number of contexts."
            )
        self.batch_size, self.replicas, self.is_main = int(batch_size), replicas or Replicas(), is_main
        if not isinstance(pretrained, SPDModel):
            pretrained, self.is_main = read(pretrained, **reading)
        self.model, self.tokenizer = pretrained, pretrained.tokenizer
        self.max_length = pretrained.config.max_positions
        self.tokenizer_name = pretrained.name.replace("/", "__")
        self.eot_token_id = self.tokenizer.eos_token_id
        bos = self.tokenizer.bos_token_id
        self.prefix_token_id = self.eot_token_id if bos is None else bos  # what a text without context follows
        self.truncated = 0  # requests so far whose context was cut from the left

    # Set in the constructor; the harness's own are properties.
    eot_token_id = prefix_token_id = tokenizer_name = None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids; BOS is the tokenizer's affair, but a text that begins with one gets no second."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.model.known(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def _share(self, batches: list[list], work: Callable[[list], Iterable]) -> list:
        """What `work` gives for each batch, one after the other; copies of the model divide the batches."""
        with bar(-(-len(batches) // self.replicas.count), "batches", self.is_main) as progress:

            def one(batch: list) -> list:
                found = list(work(batch))
                progress(1)
                return found

            return [each for found in self.replicas.share(batches, one) for each in found]

    # ---------------------------------------------------------------- log-likelihoods

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text in nats, in windows of all positions that predict every token once."""
        totals = []
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([window for group in windows for window in group]))
        for request, group in zip(requests, windows, strict=True):
            totals.append(sum(next(scores)[0] for _ in group))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        tokens, prefix = self.tok_encode(text), self.prefix_token_id
        windows = get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[Score]:
        """One score a request (its name in the cache, context, continuation); equal ones are run once."""
        asked = [self._fit(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        batches, model = list(Collator.get_chunks(questions(asked), self.batch_size)), self.model.transformer
        known = dict(self._share(batches, lambda batch: score(model, batch, self.batch_size).items()))
        for (name, *_), key in zip(requests, asked, strict=True):
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, known[key])
        return [known[key] for key in asked]

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
        asked = [(self.tok_encode(request.args[0]), request.args[1]) for request in requests]
        order = Collator(asked, lambda one: -len(one[0]), lambda one: str(one[1]), group_by="gen_kwargs")
        texts = order.get_original(self._share(list(order.get_batched(self.batch_size)), self._continue))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _continue(self, batch: list[tuple[list[int], dict]]) -> list[str]:
        """The texts that follow contexts with the same options."""
        options = normalize_gen_kwargs(batch[0][1], NEW_TOKENS)
        new, room = options["max_gen_toks"], self.max_length - options["max_gen_toks"]
        if room < 1:
            raise SPDError(f"{new} new tokens leave no room for a prompt in the model's {self.max_length} positions.")
        stops = handle_stop_sequences(options["until"], self.tokenizer.decode(self.eot_token_id))
        temperature = options["temperature"] if options["do_sample"] else 0.0
        sampling = Sampling(temperature, options.get("top_k"), options.get("top_p"))

        def text_of(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        def stopped(tokens: list[int]) -> bool:
            text = text_of(tokens)
            return any(stop in text for stop in stops)

        prompts = [context[-room:] for context, _ in batch]
        rows = generate(self.model.transformer, prompts, new, sampling, stopped)
        texts = [text_of(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
        return [postprocess_generated_text(text, stops, None) for text in texts]


def read(
    name: str | Path, tp: int = 1, plan: str | Path | None = None, device: str = "cpu", dtype: str = "float32"
) -> tuple[SPDModel, bool]:
    """The model, on the processes that a launcher started if it did, and whether this one is the main one."""
    stack = ExitStack()
    atexit.register(stack.close)  # the harness never says when it is done with a model
    here = stack.enter_context(runtime(str(device).partition(":")[0]))
    model = SPDModel.from_pretrained(name, shards=here.shards(tp), dtype=dtype, device=here.device)
    if plan is not None:
        model.load_plan(Path(plan))
    return model, here.is_main
