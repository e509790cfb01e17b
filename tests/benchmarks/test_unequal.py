"""What the benchmarks on ranks of unequal speed compare."""

from __future__ import annotations

import pytest

from benchmarks import unequal_devices, unequal_stages
from benchmarks.data_parallel import ddp
from benchmarks.ways import differences, expected, gain
from tests.pool import Pool


def test_a_gain_is_how_many_times_as_fast() -> None:
    found = gain([3.0, 4.0, 6.0], [2.0, 2.0, 2.0])
    assert found["gain"] == 2.0 and found["interval"] == [1.5, 3.0] and found["pairs"] == 3


def _ways() -> list[list[str]]:
    rows = 12
    ways = unequal_devices.own("1xcpu + 2xcpu*0.5", rows), ddp(rows)
    return [differences(way, *expected(rows)) for way in ways]


@pytest.mark.slow
def test_all_ways_give_the_local_gradients(workers: Pool) -> None:
    assert workers.run(3, _ways) == [[[], []]] * 3


CUTS = [
    ((1.0, 0.5), [6, 2]),  # the head weighs as much as two blocks
    ((0.5, 1.0), [3, 5]),
    ((1.0, 0.5, 0.5), [5, 2, 1]),
]


@pytest.mark.parametrize(("speeds", "sizes"), CUTS)
def test_cuts_follow_speeds(speeds: tuple[float, ...], sizes: list[int]) -> None:
    assert unequal_stages.planned_cut(speeds) == sizes


def _stages(sizes: list[int]) -> list[str]:
    way = unequal_stages.in_stages(sizes)
    return differences(way, *expected(unequal_stages.ROWS, unequal_stages.BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[6, 2], [4, 2, 2]])
def test_stages_give_the_local_gradients(workers: Pool, sizes: list[int]) -> None:
    assert workers.run(len(sizes), _stages, sizes) == [[]] * len(sizes)


def test_a_simulated_step_has_its_bubble() -> None:
    """Of two stages of four blocks the second is twice as slow, head and all: it waits for the first forward only."""
    first, last = sum(unequal_stages.weights()[:4]), 2 * sum(unequal_stages.weights()[4:])
    step = unequal_stages.simulated([4, 4], (1.0, 0.5))
    assert step == pytest.approx(last + first / unequal_stages.MICROBATCHES)
