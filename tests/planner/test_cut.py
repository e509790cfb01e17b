"""Blocks cut into parts: no other cut that fits is faster, and one is found wherever there is one."""

from __future__ import annotations

import itertools
import random
from itertools import accumulate

import pytest

from whalepy.planner.cut import Part, cut_blocks


def sums(values: list[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def slowest(parts: list[Part], sizes: tuple[int, ...]) -> float | None:
    """Seconds of the slowest part; None where one does not fit."""
    worst, start = 0.0, 0
    for part, size in zip(parts, sizes, strict=True):
        if any(held[start + size] - held[start] > room for held, room in part.held):
            return None
        worst = max(worst, *(own[start + size] - own[start] for own in part.seconds))
        start += size
    return worst


def every_cut(parts: int, blocks: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, blocks), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, blocks))) for cut in cuts]


@pytest.mark.parametrize("seed", range(400))
def test_no_other_cut_is_faster(seed: int) -> None:
    draw = random.Random(seed)
    blocks = draw.randint(1, 9)
    parts = [
        Part(
            [sums([draw.uniform(0.01, 1) for _ in range(blocks)]) for _ in range(draw.randint(1, 2))],
            [(sums([draw.random() for _ in range(blocks)]), draw.uniform(0.5, 6))],
        )
        for _ in range(draw.randint(1, min(4, blocks)))
    ]
    ways = [taken for sizes in every_cut(len(parts), blocks) if (taken := slowest(parts, sizes)) is not None]
    found = cut_blocks(parts)
    assert bool(ways) == (found is not None)
    if found is not None:
        assert slowest(parts, found) == pytest.approx(min(ways), rel=1e-8)
        assert cut_blocks(parts, min(ways) * (1 + 1e-6)) == found
        assert cut_blocks(parts, min(ways) * (1 - 1e-6)) is None


def test_the_first_parts_take_less_where_it_is_all_the_same() -> None:
    """They hold more microbatches at once."""
    assert cut_blocks([Part([sums([1.0] * 5)])] * 2) == (2, 3)


def test_blocks_that_take_no_time() -> None:
    assert sum(cut_blocks([Part([[0.0, 0.0, 0.0]])] * 2) or ()) == 2
