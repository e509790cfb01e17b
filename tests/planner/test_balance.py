"""Rows are shared so that no other whole shares end earlier."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalepy.planner.balance import Curve, balance

seconds = st.floats(0.01, 100).map(lambda s: round(s, 2))


def line(fixed: float, each: float) -> Callable[[int], float]:
    return lambda rows: fixed + each * rows if rows else 0.0


@given(st.lists(st.tuples(seconds, seconds, st.integers(0, 5)), min_size=1, max_size=3), st.integers(0, 8))
def test_nothing_ends_earlier(replicas: list[tuple[float, float, int]], total: int) -> None:
    times = [line(fixed, each) for fixed, each, _ in replicas]
    most = [m for *_, m in replicas]
    possible = [rows for rows in product(*(range(m + 1) for m in most)) if sum(rows) == total]
    found = balance(total, times, most)
    if not possible:
        assert found is None
        return
    assert found in possible

    def end(rows: tuple[int, ...]) -> float:
        return max(time(n) for time, n in zip(times, rows, strict=True))

    assert end(found) == min(map(end, possible))


def test_ties_go_to_the_lower_replica() -> None:
    assert balance(5, [line(0, 1)] * 3, [9, 9, 9]) == (2, 2, 1)


CURVES = [
    ((4,), (2.0,), 6, 3.0),  # one point: proportional
    ((2, 4), (3.0, 5.0), 3, 4.0),  # between
    ((2, 4), (3.0, 5.0), 6, 7.0),  # beyond
    ((2, 4), (3.0, 5.0), 1, 2.0),  # before
    ((2, 4), (3.0, 5.0), 0, 0.0),  # no rows cost nothing
]


@pytest.mark.parametrize(("rows", "values", "at", "expected"), CURVES)
def test_a_curve_is_straight(rows: tuple[int, ...], values: tuple[float, ...], at: int, expected: float) -> None:
    assert Curve(rows, values)(at) == expected


def test_most_rows_within_a_limit() -> None:
    curve = Curve((2, 4), (3.0, 5.0))
    assert [curve.most_rows(limit, 10) for limit in (1.9, 2.0, 4.5, 100.0)] == [0, 1, 3, 10]
