"""Text that every installation of the pinned environment already holds: the docstrings of its packages.

Modules are ordered by a hash of their name, so any prefix of either text mixes all packages; the first
1/64 of the hash range is held out. A docstring that occurs twice counts once, and one that occurs in the
held-out text never occurs in the training text.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

from spd.tiny import MODEL_DIR

PACKAGES = ("torch", "numpy", "scipy", "pandas", "transformers", "mlflow", "accelerate")
HELD_OUT_ONE_IN = 64
SHORTEST = 40  # characters; below that a docstring is a label, not prose
SEPARATOR = "\n\n\n"
FINGERPRINT_FILE = MODEL_DIR / "corpus.json"


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _modules() -> list[tuple[int, Path]]:
    """(hash, path) of every Python source file of `PACKAGES`, in the order of the hash."""
    files = chain.from_iterable(metadata.distribution(p).files or () for p in PACKAGES)
    names = {f.as_posix(): f for f in files if f.suffix == ".py" and ".." not in f.parts}
    return sorted((_name_hash(name), Path(str(f.locate()))) for name, f in names.items())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, FileNotFoundError):
        return  # templates and deliberately broken test files that some packages ship
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= SHORTEST:
            yield text


def documents(held_out: bool) -> Iterator[str]:
    """Docstrings of the held-out or of the training modules, lazily, each once."""
    boundary = 2**64 // HELD_OUT_ONE_IN
    seen = set() if held_out else set(documents(held_out=True))
    for name_hash, path in _modules():
        if (name_hash < boundary) != held_out:
            continue
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                yield text


def read(held_out: bool, characters: int | None = None) -> str:
    """The text, or its first `characters` characters (a prefix is read without parsing the rest)."""
    parts, length = [], 0
    for text in documents(held_out):
        parts.append(text)
        length += len(text) + len(SEPARATOR)
        if characters is not None and length >= characters:
            break
    return SEPARATOR.join(parts)[:characters]


def fingerprint(text: str) -> dict:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}


def difference_from_committed(text: str, held_out: bool) -> str | None:
    """A sentence if `text` is not the text spd-tiny was trained or evaluated on, else None."""
    committed = json.loads(FINGERPRINT_FILE.read_text())
    expected = committed["held_out" if held_out else "train"]
    if fingerprint(text) == expected:
        return None
    theirs = ", ".join(f"{name} {version}" for name, version in committed["packages"].items())
    return (
        f"The built-in text differs from the one spd-tiny was made with ({len(text):,} characters instead of "
        f"{expected['characters']:,}): figures will not match the committed ones. It was made with {theirs}."
    )
