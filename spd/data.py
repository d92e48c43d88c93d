"""Token windows for calibration and evaluation."""

import hashlib
from collections.abc import Callable
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
    is tokenised without special tokens; this is GPTQ's protocol but for its one leading BOS.
    """
    if seq_len < 2:
        raise SPDError(f"A window of {seq_len} tokens has nothing to predict; at least 2 are needed.")
    if max_positions is not None and seq_len > max_positions:
        raise SPDError(f"Windows of {seq_len} tokens exceed the model's {max_positions} positions.")
    if (windows is not None and windows < 1) or skip < 0:
        raise SPDError(f"windows must be at least 1 and skip at least 0, and are {windows} and {skip}.")
    wanted = None if windows is None else (skip + windows) * seq_len
    ids, whole, note = _tokens(text, tokenizer, wanted)
    count = len(ids) // seq_len
    if count <= skip:
        after = f", of which {skip} are skipped" if skip else ""
        raise SPDError(
            f"The text {text} has {len(ids)} tokens: {count} windows of {seq_len}{after}; at least 1 is needed."
        )
    stop = count if windows is None else min(count, skip + windows)
    tokens = torch.tensor(ids[skip * seq_len : stop * seq_len]).view(-1, seq_len)
    return Windows(tokens, Path(text).name, skip, count if whole else None, note)


def _tokens(text: str, tokenizer, wanted: int | None) -> tuple[list[int], bool, str | None]:
    """(token ids, whether of the whole text, note)."""
    if text == "builtin-train" and wanted is not None:  # 24 million characters: read no more than needed
        ids = _enough(lambda n: corpus.read(held_out=False, characters=n), tokenizer, wanted)
        return ids, False, None
    if text in BUILTIN:
        content = corpus.read(BUILTIN[text])
        note = corpus.difference_from_committed(content, BUILTIN[text])
    else:
        content, note = read_hub_text(text) if text in HUB_TEXTS else read_text(Path(text)), None
    return tokenizer(content, add_special_tokens=False)["input_ids"], True, note


def _enough(read: Callable[[int], str], tokenizer, wanted: int) -> list[int]:
    characters, length = wanted * CHARACTERS_PER_TOKEN, -1
    while True:
        content = read(characters)
        ids = tokenizer(content, add_special_tokens=False)["input_ids"]
        if len(ids) > wanted or len(content) == length:  # one more: the last may be cut
            return ids
        characters, length = 2 * characters, len(content)


def read_hub_text(name: str) -> str:
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


def read_text(path: Path) -> str:
    """The content of a non-empty UTF-8 text."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SPDError(f"There is no text {path}; give a file or one of {', '.join((*BUILTIN, *HUB_TEXTS))}.") from None
    except UnicodeDecodeError:
        raise SPDError(f"The text {path} is not UTF-8.") from None
    except OSError as error:
        raise SPDError(f"The text {path} cannot be read ({error.strerror}).") from error
    if not content.strip():
        raise SPDError(f"The text {path} is empty.")
    return content
