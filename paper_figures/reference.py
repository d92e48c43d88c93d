"""What the paper reports."""

import json
from functools import cache
from pathlib import Path


@cache
def reference() -> dict:
    """Its settings, values and claims, with their source, from `paper.json`: the one place where they stand.

    `claims` are about time, `accuracy_claims` about the rest. A claim has `where`, `words`, `relation` and `value`,
    and, for the ledger, the `measure` that finds our value, the `model` and `tp` it is about, and `in_kind`:
    what would show the same on a small model, with a threshold of its own.
    """
    return json.loads((Path(__file__).parent / "paper.json").read_text())
