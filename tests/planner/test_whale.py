"""Whale's shares: what its algorithm says of them, and never better than the exact ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.test_balance import line
from whalepy.planner.balance import balance
from whalepy.planner.shares import round_shares
from whalepy.planner.whale import whale_cut, whale_rows

RATES = st.integers(1, 20).map(float)
# Rate, fixed seconds, part of a memory that is filled by nothing and by each row.
REPLICA = st.tuples(RATES, st.floats(0, 5), st.sampled_from([0.0, 0.3, 1.2]), st.sampled_from([0.05, 0.2, 0.4]))


def most(filled: Callable[[int], float], total: int) -> int:
    return max(n for n in range(total + 1) if n == 0 or filled(n) <= 1)


@given(st.lists(REPLICA, min_size=1, max_size=5), st.integers(0, 30))
def test_shares_add_up_fit_where_they_can_and_are_never_better_than_exact(
    replicas: list[tuple[float, float, float, float]], total: int
) -> None:
    rates = [rate for rate, *_ in replicas]
    filled = [line(nothing, each) for *_, nothing, each in replicas]
    room = [most(one, total) for one in filled]
    found = whale_rows(total, rates, filled)
    if sum(room) < total:
        assert found is None
        return
    assert found is not None and sum(found) == total
    assert all(rows <= each for rows, each in zip(found, room, strict=True))
    seconds = [line(fixed, 1 / rate) for rate, fixed, *_ in replicas]
    exact = balance(total, seconds, room)
    assert exact is not None

    def end(rows: Sequence[int]) -> float:
        return max(time(n) for time, n in zip(seconds, rows, strict=True))

    assert end(exact) <= end(found)


@given(st.integers(0, 40), st.integers(1, 6), RATES, st.floats(0.01, 0.5))
def test_equal_devices_get_equal_rows(total: int, replicas: int, rate: float, each: float) -> None:
    found = whale_rows(total, [rate] * replicas, [line(0.1, each)] * replicas)
    assert found is None or max(found) - min(found) <= 1


@given(st.integers(0, 40), st.lists(RATES, min_size=1, max_size=6))
def test_with_room_everywhere_rows_follow_the_rates(total: int, rates: list[float]) -> None:
    assert whale_rows(total, rates, [line(0, 1e-6)] * len(rates)) == round_shares(total, rates)


def test_what_does_not_fit_goes_to_the_least_load_with_room() -> None:
    """12 rows at 3:2:1 are 6:4:2; the first holds three, the last two and no more: all three go to the second."""
    filled = [line(0, 0.3), line(0, 0.01), line(0, 0.5)]
    assert whale_rows(12, [3, 2, 1], filled) == (3, 7, 2)
    assert whale_rows(12, [3, 2, 1], [line(0, 0.3), *[line(0, 0.01)] * 2]) == (3, 6, 3)


def test_launches_are_not_seen() -> None:
    """The second device takes two seconds before its first row; the rates alone do not say so."""
    seconds = [line(0, 1), line(2, 1)]
    assert whale_rows(8, [1, 1], [line(0, 0.01)] * 2) == (4, 4)
    assert balance(8, seconds, [8, 8]) == (5, 3)


@given(st.lists(RATES, min_size=1, max_size=8), st.lists(RATES, min_size=1, max_size=4))
def test_every_stage_takes_a_block(flops: list[float], rates: list[float]) -> None:
    rates = rates[: len(flops)]
    sizes = whale_cut(flops, rates)
    assert sum(sizes) == len(flops) and min(sizes) >= 1 and len(sizes) == len(rates)


CUTS = [
    ([1.0] * 8, [1, 1], [4, 4]),
    ([1.0] * 8, [3, 1], [6, 2]),
    ([1.0] * 12, [2, 1, 1], [6, 3, 3]),
    ([1, 1, 1, 1, 4], [1, 1], [4, 1]),  # a head that weighs as much as four blocks
    ([5, 1, 1], [1, 9, 1], [1, 1, 1]),  # one block each, whatever the rates say
    ([1, 1, 1], [1, 1], [1, 2]),  # as near on both sides: the earlier place
]


@pytest.mark.parametrize(("flops", "rates", "expected"), CUTS)
def test_cuts_follow_the_rates(flops: list[float], rates: list[float], expected: list[int]) -> None:
    assert whale_cut(flops, rates) == expected
    assert list(itertools.accumulate(expected))[-1] == len(flops)
