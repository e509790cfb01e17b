"""How far a batch may grow: the largest number that is found fits, and no much larger one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from whalepy.dryrun.room import most_within

MOST = 100_000
CURVES: dict[str, Callable[[int], float]] = {
    "a line": lambda n: 0.2 + n / 1000,
    "a parabola": lambda n: 0.1 + n / 5000 + (n / 1000) ** 2,
    "flat, then steep": lambda n: max(0.5, n / 1000),  # parameters at first, activations later
    "in steps": lambda n: 0.2 + (n // 8) / 125,
    "full from the start": lambda n: 0.9 + n / 1000,
    "a cliff": lambda n: 0.5 if n < 300 else float("inf"),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("start", [1, 16, 250, 3000])
def test_what_is_found_is_within_and_not_far_below(curve: str, start: int) -> None:
    seen: list[int] = []

    def filled(number: int) -> float:
        seen.append(number)
        return CURVES[curve](number)

    found = most_within(filled, 0.84, start, MOST)
    most = max((n for n in range(1, MOST) if CURVES[curve](n) <= 0.84), default=0)
    assert found == 0 == most or (found in seen and CURVES[curve](found) <= 0.84)
    assert found <= most and len(seen) <= 10
    assert found >= 0.8 * most


def test_nothing_grows_beyond_what_is_allowed() -> None:
    assert most_within(lambda n: 0.1, 0.84, 16, 1000) == 1000
