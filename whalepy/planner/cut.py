"""Blocks in neighbouring parts, so that the part that takes longest takes least and each fits where it runs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import sub


@dataclass(frozen=True)
class Part:
    """One part of the cut, as each kind of device that runs it sees the blocks; sums start at 0."""

    seconds: Sequence[Sequence[float]]
    """Per kind: seconds of the blocks before each place."""
    held: Sequence[tuple[Sequence[float], float]] = field(default=())
    """Per kind: bytes of the blocks before each place, and how many one part may hold."""


def cut_blocks(parts: Sequence[Part], limit: float = math.inf) -> tuple[int, ...] | None:
    """How many blocks each part takes, one at least; None where they do not fit, or some part takes over the limit.

    Exact: no other cut that fits has a faster slowest part. Of those as fast, one in which later parts take more.
    """
    best = _filled(parts, limit)
    if best is None:
        return None
    slowest = _slowest(parts, best)
    known = {id(seconds): seconds for part in parts for seconds in part.seconds}.values()
    low = min(max(seconds[-1] / len(parts), max(map(sub, seconds[1:], seconds))) for seconds in known) * (1 - 1e-9)
    while slowest - low > 1e-3 * slowest:
        middle = (low + slowest) / 2
        found = _filled(parts, middle)
        if found is None:
            low = middle
        else:
            best, slowest = found, _slowest(parts, found)
    while slowest > 0 and (found := _filled(parts, slowest * (1 - 1e-9))) is not None:
        best, slowest = found, _slowest(parts, found)
    return best


def _filled(parts: Sequence[Part], limit: float) -> tuple[int, ...] | None:
    """Each part from the last on as full as the limit of seconds, its memory and the parts before it allow."""
    stop = len(parts[0].seconds[0]) - 1
    sizes: list[int] = []
    for k in range(len(parts) - 1, -1, -1):
        start = _start(parts[k], k, stop, limit)
        if start >= stop:  # the block does not fit here alone, but another one may
            return _any_way(parts, limit)
        sizes.append(stop - start)
        stop = start
    return tuple(sizes[::-1]) if stop == 0 else None


def _start(part: Part, k: int, stop: int, limit: float) -> int:
    """Where a part that ends at a block may begin at the earliest: with a block for each of the `k` parts before."""
    start = k
    for before in part.seconds:
        start = max(start, bisect_left(before, before[stop] - limit))
    for before, room in part.held:
        start = max(start, bisect_left(before, before[stop] - room))
    return start


def _any_way(parts: Sequence[Part], limit: float) -> tuple[int, ...] | None:
    """Some cut within the limit, found by all the places where each part may begin."""
    stops = {len(parts[0].seconds[0]) - 1}
    ends: list[dict[int, int]] = []
    """By part, from the last on: where it begins -> where it ends."""
    for k in range(len(parts) - 1, -1, -1):
        own: dict[int, int] = {}
        low = max(stops)
        for stop in sorted(stops, reverse=True):
            start = _start(parts[k], k, stop, limit)
            for place in range(start, min(low, stop)):
                own[place] = stop
            low = min(low, start)
        ends.append(own)
        stops = set(own)
        if not stops:
            return None
    if 0 not in stops:
        return None
    sizes, at = [], 0
    for own in reversed(ends):
        sizes.append(own[at] - at)
        at = own[at]
    return tuple(sizes)


def _slowest(parts: Sequence[Part], sizes: Sequence[int]) -> float:
    slowest, start = 0.0, 0
    for part, size in zip(parts, sizes, strict=True):
        slowest = max(slowest, *(before[start + size] - before[start] for before in part.seconds))
        start += size
    return slowest
