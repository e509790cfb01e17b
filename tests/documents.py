"""Markdown whose Python runs: each block in turn, its print against the block after `prints:`."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A Python block, and where in the document the text stands that it prints (None: it may print anything)."""

    source: str
    line: int
    printed: tuple[int, int] | None


def examples(document: str) -> list[Example]:
    """The Python blocks of a document in order."""
    blocks = list(_BLOCK.finditer(document))
    found: list[Example] = []
    for at, block in enumerate(blocks):
        if block[1] == "python":
            after = blocks[at + 1] if at + 1 < len(blocks) else None
            told = after is not None and document[block.end() : after.start()].rstrip().endswith("prints:")
            line = document[: block.start(2)].count("\n")
            found.append(Example(block[2], line, after.span(2) if after is not None and told else None))
    return found


def run(sources: Sequence[tuple[str, int]], name: str) -> list[str]:
    """What each block prints, run one after the other in one namespace under a file name and first line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: list[str] = []
    for source, line in sources:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + source, name, "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def compare(path: Path, printed: Sequence[str], *, update: bool) -> None:
    """Each block printed what the document says; `update` writes it there instead."""
    document = path.read_text()
    pairs = [(e.printed, text) for e, text in zip(examples(document), printed, strict=True) if e.printed]
    if update:
        for (start, end), text in reversed(pairs):
            document = document[:start] + text + document[end:]
        path.write_text(document)
        return
    for (start, end), text in pairs:
        assert text.splitlines() == document[start:end].splitlines()
