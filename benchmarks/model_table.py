"""docs/models.md: a row for each model that was tried, written and read back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
_LENGTH = 300  # characters of a sentence that a cell shows
_AGAIN = "likewise"
_BAR = re.compile(r"(?<!\\)\|")
_KINDS = ("exact", "refused", "wrong", "failed")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    operators: int
    without_rule: tuple[str, ...]
    """Names of the operators that no rule fits."""
    results: tuple[str, ...]
    """Per annotation: exact, refused and why, or what is wrong."""

    def __str__(self) -> str:
        without = ", ".join(f"`{target}`" for target in self.without_rule) or "-"
        pairs = itertools.pairwise(("", *self.results))
        shown = [_AGAIN if now == before and now != "exact" else now for before, now in pairs]
        return f"| {self.name} | {self.operators} | {without} | {' | '.join(shown)} |"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each result the one word: exact, refused, wrong or failed."""
        return tuple(next(kind for kind in _KINDS if result.strip("*").startswith(kind)) for result in self.results)


def read_row(line: str) -> Row:
    """The row that was printed as this line."""
    name, operators, without, *results = (cell.strip() for cell in _BAR.split(line.strip())[1:-1])
    for k, result in enumerate(results):
        results[k] = results[k - 1] if result == _AGAIN else result
    return Row(name, int(operators), tuple(re.findall(r"`([^`]+)`", without)), tuple(results))


def cell(text: str) -> str:
    """A sentence of one line and bounded length that ends no cell of the table."""
    return " ".join(text.replace("|", "\\|").split())[:_LENGTH]


@dataclass(frozen=True)
class Head:
    """What the rows of a document have in common."""

    torch: str
    transformers: str
    steps: int
    annotations: tuple[str, ...]
    float32: tuple[str, ...]
    """Models compared in float32."""
    momentum: tuple[str, ...]
    """Models trained with SGD in float64."""

    @property
    def versions(self) -> str:
        return f"torch {self.torch} and transformers {self.transformers}"


def read_rows(text: str, head: Head) -> list[Row]:
    """The rows of a document made with the same versions; else none."""
    if head.versions not in text:
        return []
    return [read_row(line) for line in text.splitlines() if re.match(r"\| \w+ \| \d+ \|", line)]


def summary(rows: Iterable[Row]) -> str:
    """How many models trained exactly under every annotation, and how all runs ended."""
    kinds = [row.kinds for row in rows]
    models = sum(set(of_row) == {"exact"} for of_row in kinds)
    runs = [kind for of_row in kinds for kind in of_row]
    counts = ", ".join(f"{runs.count(kind)} {kind}" for kind in _KINDS)
    return f"{len(kinds)} models, {models} of them exact under every annotation. {len(runs)} runs: {counts}."


_TEXT = """# Models that were tried

Made by `python -m benchmarks.models` on {date}, with {versions}, on gloo
processes of one machine. Small models with random weights, a batch of 8 rows, {steps} steps of AdamW, `shares=[3, 1]`
on every level, `sync_batchnorm=True`. {momentum}: SGD with momentum; batch norm over few values is so ill-conditioned
that with AdamW one process differs from itself when its rows are flipped.

*exact*: loss, gradients, parameters and buffers are those of one process in float64, within 1e-9 of the largest
({float32}: in float32 with SGD and momentum, within 1e-5, for want of float64 operators or for tables in float32).
*refused*: `compile` raises this error. *wrong*, *failed*: a difference, or an error that is no sentence of ours.
*Without rule*: operators that run replicated, and that `explain()` reports.

{summary}

| model | operators | without rule | {columns} |
|---|---|---|{lines}
"""


def document(head: Head, date: str, rows: Sequence[Row]) -> str:
    """The whole text; `date` as 2026-01-31."""
    text = _TEXT.format(
        date=date,
        versions=head.versions,
        steps=head.steps,
        float32=", ".join(sorted(head.float32)),
        momentum=", ".join(sorted(head.momentum)),
        summary=summary(rows),
        columns=" | ".join(head.annotations),
        lines="---|" * len(head.annotations),
    )
    return text + "".join(f"{row}\n" for row in rows)
