"""Whole rows for each replica so that the slowest ends as early as can be, within what each can hold."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def balance(total: int, seconds: Sequence[Callable[[int], float]], most: Sequence[int]) -> tuple[int, ...] | None:
    """Rows per replica, `total` in all, at most `most[i]` each, with the least largest `seconds[i](rows)`.

    Exact for times that never fall with more rows: each row goes where the time after it is least, ties to the lower
    replica. None where the rows do not fit.
    """
    if sum(most) < total:
        return None
    rows = [0] * len(seconds)
    next_times = [(time(1), i) for i, time in enumerate(seconds) if most[i] > 0]
    heapq.heapify(next_times)
    for _ in range(total):
        _, i = heapq.heappop(next_times)
        rows[i] += 1
        if rows[i] < most[i]:
            heapq.heappush(next_times, (seconds[i](rows[i] + 1), i))
    return tuple(rows)


@dataclass(frozen=True)
class Curve:
    """A quantity known at a few numbers of rows; straight lines between and beyond."""

    rows: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, rows: int) -> float:
        """The quantity at this number of rows; 0 at no rows."""
        if rows == 0:
            return 0.0
        if len(self.rows) == 1:
            return self.values[0] * rows / self.rows[0]
        k = min(max(bisect_right(self.rows, rows), 1), len(self.rows) - 1)
        (a, b), (x, y) = self.rows[k - 1 : k + 1], self.values[k - 1 : k + 1]
        return x + (y - x) * (rows - a) / (b - a)

    def most_rows(self, limit: float, at_most: int) -> int:
        """The largest number of rows, up to `at_most`, whose quantity is within the limit; 0 where one row is not."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self(middle) <= limit else (low, middle - 1)
        return low
