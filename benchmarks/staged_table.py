"""The section "As pipelines" of docs/models.md: a row for each model that was tried in stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

HEADING = "## As pipelines"
_AGAIN = "likewise"
_BAR = re.compile(r"(?<!\\)\|")
_KINDS = ("exact", "refused", "not cut", "WRONG", "FAILED")
_TEXT = """{heading}

Made by `python -m benchmarks.staged_models` on {date}, with {versions}: the same models and
batches, cut into two halves of about as many parameters. *Two stages*: one rank each. *1 feeds 2*: one rank feeds two
that are split 3:1. whalepy chooses the microbatches: 8 of one row each, or one where the loss is no sum over rows, and
why. *Exact* is what it is above; *not cut*: two stages make no sense. Not run: {missing}.

{summary}

| model | {columns} |
|---|{lines}
"""


def section(text: str) -> str:
    """What a document says of pipelines, from its heading on; nothing where it says nothing."""
    at = text.find(HEADING)
    return "" if at < 0 else "\n" + text[at:]


def rows_in(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of a document's section: by model, how each way to cut it ended."""
    lines = [
        line
        for line in section(text).splitlines()
        if re.match(r"\| \w+ \| (exact|refused|not cut|WRONG|FAILED)\b", line)
    ]
    cells = [[cell.strip() for cell in _BAR.split(line.strip())[1:-1]] for line in lines]
    return {name: (first, *(first if other == _AGAIN else other for other in rest)) for name, first, *rest in cells}


def with_section(
    text: str,
    rows: Mapping[str, Sequence[str]],
    columns: Sequence[str],
    versions: str,
    date: str,
    missing: Iterable[str],
) -> str:
    """The document with these rows in its section; `date` as 2026-01-31."""
    at = text.find(HEADING)
    head = _TEXT.format(
        heading=HEADING,
        date=date,
        versions=versions,
        missing=", ".join(missing) or "none",
        summary=summary(rows),
        columns=" | ".join(columns),
        lines="---|" * len(columns),
    )
    lines = "".join(f"| {name} | {' | '.join(_shown(results))} |\n" for name, results in rows.items())
    return (text[:at] if at >= 0 else text + "\n") + head + lines


def _shown(results: Sequence[str]) -> list[str]:
    first, *rest = results
    return [
        first,
        *(_AGAIN if other == first and len(first) > len("exact: 8 microbatches") else other for other in rest),
    ]


def summary(rows: Mapping[str, Sequence[str]]) -> str:
    """How many models trained exactly in both ways, and how all runs ended."""
    models = sum(all(result.startswith("exact") for result in results) for results in rows.values())
    runs = [result for results in rows.values() for result in results]
    counts = (f"{sum(run.startswith(kind) for run in runs)} {kind.lower()}" for kind in _KINDS)
    return f"{len(rows)} models, {models} of them exact both ways. {len(runs)} runs: {', '.join(counts)}."
