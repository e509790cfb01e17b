"""How far the batch and the sequence of a plan may grow on its devices, each as it would be if asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from whalepy.dryrun.pipeline import PipelineCandidate
from whalepy.dryrun.tried import TIGHT, Tried

_MOST_ROWS = 1_000_000
_MOST_TIMES = 64
_TRIES = 8


def largest_batch(best: Tried, limit: float = TIGHT, *, equal: bool = False) -> int:
    """The largest global batch found with which this plan fills at most this part of any memory; 0 where none is.

    Replicas are filled one by one; all with as many rows where shares are `equal`.
    """
    candidate = best.candidate
    if isinstance(candidate, PipelineCandidate):  # all its ranks work on all rows, in shares that the plan has
        least = candidate.microbatches * candidate.replicas
        return most_within(lambda rows: _filled_by_rows(best, rows), limit, candidate.study.rows, _MOST_ROWS, least)
    most: dict[object, int] = {}
    found: list[int] = []
    for replica in range(candidate.replicas):
        kind = candidate.kind_of(replica)
        if kind not in most:
            ranks = candidate.ranks_of(replica)
            start = max(best.rows[replica], 1)

            def filled(rows: int, ranks: list[int] = ranks) -> float:
                return max(candidate.filled(rank, rows) for rank in ranks)

            most[kind] = most_within(filled, limit, start, _MOST_ROWS)
            if not most[kind] and filled(0) > limit:  # without any row, too
                return 0
        found.append(most[kind])
    return min(len(found) * min(found) if equal else sum(found), _MOST_ROWS)


def _filled_by_rows(best: Tried, rows: int) -> float:
    """The largest part of a memory in use of a pipeline with so many rows."""
    found = best.candidate
    assert isinstance(found, PipelineCandidate)
    if rows == found.study.rows:
        return best.filled
    again = found.with_rows(rows)
    return max(again.filled(rank, again.rows_of(rank)) for rank in best.ranks)


def longest_sequence(best: Tried, tokens: int | None) -> int | None:
    """The longest sequence found with which this plan leaves room in every memory; None where lengths are not free."""
    if tokens is None or best.verdict == "no" or best.candidate.study.batch_of_length(tokens, 2 * tokens) is None:
        return None
    model = _positions(best.candidate.study.recipe.model)
    at_most = min(model or _MOST_TIMES * tokens, _MOST_TIMES * tokens)
    return max(most_within(lambda length: _filled(best, tokens, length), TIGHT, tokens, at_most), tokens)


def _filled(best: Tried, tokens: int, length: int) -> float:
    """The largest part of a memory in use with rows of another length; infinite where the model does not take it."""
    if length == tokens:
        return best.filled
    again = best.candidate.with_length(tokens, length)
    if again is None:
        return math.inf
    return max(again.filled(rank, best.rows_of(rank)) for rank in best.ranks)


def _positions(model: nn.Module) -> int | None:
    """The longest sequence that the model itself takes, where its configuration says so."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def most_within(filled: Callable[[int], float], limit: float, start: int, at_most: int, at_least: int = 1) -> int:
    """The largest number found whose `filled` was seen to be within the limit; 0 where `start` and the least are not.

    Few numbers are tried: along a line through the last two while there is room; then, in turn, along one between a
    number that is within and one that is not, which does not lead too far where `filled` bends upwards as memory does,
    and halfway between the two in ratio. Near enough is 95 % of the limit, or of a number that is not within.
    """
    good, bad = _bracket(filled, limit, min(start, at_most), at_least)
    before: _Seen | None = None
    for turn in range(_TRIES if good[0] else 0):
        if bad is None:
            number = min(_beyond(good, before, limit), at_most)
        else:
            by_line = turn % 2 == 0 and math.isfinite(bad[1])
            number = max(_on_line(good, bad, limit), good[0] + 1) if by_line else math.isqrt(good[0] * bad[0])
        if number <= good[0] or good[1] >= _NEAR * limit or (bad and good[0] >= _NEAR * bad[0]):
            break
        value = filled(number)
        if value <= limit:
            before, good = good, (number, value)
        else:
            bad = number, value
    return good[0]


_Seen = tuple[int, float]
_NEAR = 0.95


def _bracket(filled: Callable[[int], float], limit: float, start: int, at_least: int) -> tuple[_Seen, _Seen | None]:
    """A number that is within the limit, 0 where there is none, and one that is not."""
    first = start, filled(start)
    if first[1] <= limit:
        return first, None
    least = (at_least, filled(at_least)) if start > at_least else first
    return (least if least[1] <= limit else (0, 0.0)), first


def _beyond(good: _Seen, before: _Seen | None, limit: float) -> int:
    if before is None or good[1] <= before[1]:
        return 4 * good[0]
    return _on_line(before, good, limit)


def _on_line(one: _Seen, other: _Seen, limit: float) -> int:
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return math.floor(one[0] + (limit - one[1]) / slope) if slope > 0 else one[0]
