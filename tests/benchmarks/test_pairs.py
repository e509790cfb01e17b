"""The median of pairs and its interval."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.pairs import figures, interval


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (5, (1, 5)),  # too few for 95 %: all there is
        (6, (1, 6)),  # 1 - 2 / 2^6 = 0.969
        (15, (4, 12)),  # outside: 2 (1 + 15 + 105 + 455) / 2^15 = 0.035; with the next ones 0.118
        (25, (8, 18)),  # tables of the sign test
    ],
)
def test_interval(count: int, expected: tuple[int, int]) -> None:
    assert interval(range(count, 0, -1)) == expected


def test_figures_are_of_pairs() -> None:
    own: Sequence[float] = [0.1, 0.4, 0.3]
    found = figures(own, [0.1, 0.2, 0.6])
    assert found == {"own_ms": 300.0, "other_ms": 200.0, "ratio": 1.0, "interval": [0.5, 2.0], "pairs": 3}
