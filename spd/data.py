"""Token windows for calibration and evaluation."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spd.errors import SPDError
from spd.tiny import corpus

BUILTIN = {"builtin": True, "builtin-train": False}  # name -> held out?
# name -> data set, configuration and split on the hub; rows joined by empty lines, as GPTQ's protocol has it
HUB_TEXTS = {f"wikitext2-{split}": ("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")}
CHARACTERS_PER_TOKEN = 8  # generous: how much of a long text to read for a number of tokens, at first
SPARE = 64  # tokens at the end of a text read in part, which may be others than the whole text's
WHOLE = 2**25  # characters up to which a text is read whole: tokenising takes about 200 bytes of memory for each


@dataclass(frozen=True)
class Windows:
    """Consecutive windows (W, T) of a text's tokens, and where they come from."""

    tokens: torch.Tensor
    text: str
    skip: int
    available: int | None  # windows in the whole text; None where the text was read in part
    note: str | None = None  # what the user should know of the text

    def describe(self) -> dict:
        return {
            "text": self.text,
            "fingerprint": digest_of(self.tokens),
            "seq_len": self.tokens.shape[1],
            "windows": self.tokens.shape[0],
            "skip": self.skip,
            "available": self.available,
        }


def digest_of(tokens: torch.Tensor) -> str:
    """A short name for the content of windows."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def read_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    windows: int | None = None,
    skip: int = 0,
    max_positions: int | None = None,
) -> Windows:
    """The first `windows` (or all) windows of `seq_len` tokens after `skip`, the tail discarded.

    The whole `text` (a file, `builtin`, which is spd-tiny's held-out text, `builtin-train`, or a name of `HUB_TEXTS`)
    is tokenised without special tokens; this is GPTQ's protocol but for its one leading BOS. Of a text too long for
    that, and of `builtin-train`, only as much is as the windows take.
    """
    if seq_len < 2:
        raise SPDError(f"A window of {seq_len} tokens has nothing to predict; at least 2 are needed.")
    if max_positions is not None and seq_len > max_positions:
        raise SPDError(f"Windows of {seq_len} tokens exceed the model's {max_positions} positions.")
    if (windows is not None and windows < 1) or skip < 0:
        raise SPDError(f"windows must be at least 1 and skip at least 0, and are {windows} and {skip}.")
    ids, whole, note = _tokens(text, tokenizer, None if windows is None else (skip + windows) * seq_len)
    count = len(ids) // seq_len
    if count <= skip:
        after = f", of which {skip} are skipped" if skip else ""
        raise SPDError(
            f"The text {text} has {len(ids)} tokens: {count} windows of {seq_len}{after}; at least 1 is needed."
        )
    stop = count if windows is None else min(count, skip + windows)
    tokens = torch.tensor(ids[skip * seq_len : stop * seq_len]).view(-1, seq_len)
    return Windows(tokens, Path(text).name, skip, count if whole else None, note)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> tuple[list[int], bool, str | None]:
    """(token ids, of which `wanted` are enough, whether they are all of the text's, note)."""
    wish = math.inf if wanted is None else wanted * CHARACTERS_PER_TOKEN
    while True:
        most = min(wish, WHOLE) if text == "builtin-train" else WHOLE  # parsing all of that takes a minute
        content = read_text(text, most + 1)
        whole = len(content) <= most
        if not whole and wish > WHOLE:
            raise SPDError(
                f"The text {text} has more than {WHOLE:,} characters, too many to be tokenised at once; say how many "
                f"windows are wanted (--windows), of {WHOLE // CHARACTERS_PER_TOKEN:,} tokens at most."
            )
        ids = tokenizer(content if whole else content[:wish], add_special_tokens=False)["input_ids"]
        if whole or len(ids) >= wanted + SPARE:
            note = corpus.difference_from_committed(content, BUILTIN[text]) if whole and text in BUILTIN else None
            return ids, whole, note
        wish *= 2


def read_text(text: str, characters: int | None = None) -> str:
    """The content of a file (UTF-8, not empty), a built-in text or a hub's; or its first `characters` characters."""
    if text in BUILTIN:
        return corpus.read(BUILTIN[text], characters)
    if text in HUB_TEXTS:
        return _read_hub_text(text)[:characters]
    try:
        with Path(text).open(encoding="utf-8") as file:
            content = file.read(characters)
    except FileNotFoundError:
        raise SPDError(f"There is no text {text}; give a file or one of {', '.join((*BUILTIN, *HUB_TEXTS))}.") from None
    except UnicodeDecodeError:
        raise SPDError(f"The text {text} is not UTF-8.") from None
    except OSError as error:
        raise SPDError(f"The text {text} cannot be read ({error.strerror}).") from error
    if not content.strip():
        raise SPDError(f"The text {text} is empty.")
    return content


def _read_hub_text(name: str) -> str:
    """One of `HUB_TEXTS`, downloaded or from the data sets' cache."""
    from datasets import load_dataset

    repository, configuration, split = HUB_TEXTS[name]
    try:
        rows = load_dataset(repository, configuration, split=split)
    except Exception as error:  # the hub's, the file system's and datasets' own
        raise SPDError(
            f"The text {name} ({repository}, {configuration}) is not in the local cache and the hub cannot be reached; "
            "give a file (make: TEXT=FILE)."
        ) from error
    return "\n\n".join(rows["text"])
