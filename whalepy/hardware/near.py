"""What a misspelled word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near_words(word: str, known: Iterable[str]) -> tuple[str, ...]:
    """At most three of `known` close to `word`, closest first; case does not matter."""
    spelled = {name.lower(): name for name in known}
    return tuple(spelled[key] for key in difflib.get_close_matches(word.lower(), list(spelled), n=3, cutoff=0.6))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The fix for a misspelled word: the near ones, else all known ones."""
    near = near_words(word, known)
    return f"did you mean {either(near)}?" if near else f"known: {', '.join(known)}"


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
