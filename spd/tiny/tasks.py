"""Questions made of spd-tiny's held-out text, so that accuracy means something without a download.

They come from the later half of the documents: what `--text builtin` gives first, and repairs learn from, is apart.
"""

import random
import re
from collections.abc import Iterator

from spd.tiny import corpus

QUESTIONS = 300  # of each task
CHOICES = 4
PASSAGE, CONTEXT, CONTINUATION = 24, 16, 6  # words: before a last word, before a continuation, of a continuation


def last_word(seed: int = 0) -> list[dict]:
    """Passages (`context`) and their last word (`word`), which has occurred in them before, as most of LAMBADA's do."""
    found = []
    for words in _documents():
        start = 0
        for end, word in enumerate(words):
            before = words[end - PASSAGE : end]
            seen = {other.strip() for other in before}
            if end - start >= PASSAGE and re.fullmatch(r" [A-Za-z_]{4,}", word) and word.strip() in seen:
                found.append({"context": "".join(before), "word": word})
                start = end
    return _some(found, seed)


def continuation(seed: int = 0) -> list[dict]:
    """Passages (`context`) with four continuations (`choices`), of which that with the number `answer` is true."""
    size = CONTEXT + CONTINUATION
    pieces = [words[i : i + size] for words in _documents() for i in range(0, len(words) - size + 1, size)]
    found = [("".join(piece[:CONTEXT]), "".join(piece[CONTEXT:])) for piece in pieces]
    others, draw = sorted({true for _, true in found}), random.Random(seed)
    rows = []
    for context, true in found:
        choices = [other for other in draw.sample(others, CHOICES) if other != true][: CHOICES - 1]
        answer = draw.randrange(CHOICES)
        rows.append({"context": context, "choices": [*choices[:answer], true, *choices[answer:]], "answer": answer})
    return _some(rows, seed)


def _documents() -> Iterator[list[str]]:
    """The later half of the held-out documents, as words with the space before them."""
    documents = list(corpus.documents(held_out=True))
    return (re.findall(r"\s*\S+", text) for text in documents[len(documents) // 2 :])


def _some(rows: list[dict], seed: int) -> list[dict]:
    return random.Random(seed).sample(rows, min(QUESTIONS, len(rows)))


def _config(*metrics: str, **definition: str) -> dict:
    means = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
    return {"target_delimiter": "", "metric_list": means, **definition}


TASKS = {  # name -> what makes its rows, and lm-evaluation-harness's definition of what is asked of them
    "tiny_last_word": (
        last_word,
        _config("acc", output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{word}}"),
    ),
    "tiny_continuation": (
        continuation,
        _config(
            "acc",
            "acc_norm",
            output_type="multiple_choice",
            doc_to_text="{{context}}",
            doc_to_choice="choices",
            doc_to_target="answer",
        ),
    ),
}
