"""Which devices run which stage."""

from __future__ import annotations

from typing import Any

import pytest

import whalepy
from whalepy.planner.placing import Arrangement, Need, Place, arrange_stages
from whalepy.primitives import Primitive


def places(count: int, per_node: int = 8) -> list[Place]:
    return [Place("cpu", k // per_node) for k in range(count)]


def arrangement(
    stages: list[Primitive],
    inside: list[Any],
    count: int,
    *,
    around: tuple[Primitive, ...] = (),
    loads: list[float] | None = None,
    speeds: list[float] | None = None,
    chunks: int = 1,
) -> Arrangement:
    """Stages with one chain each: what is around all, the stage, what is inside."""
    loads = loads or [1.0] * len(stages)
    chains = [(*around, stage, *own) for stage, own in zip(stages, inside, strict=True)]
    needs = [Need((chain,), load) for chain, load in zip(chains, loads, strict=True)]
    return arrange_stages(needs, stages, speeds or [1.0] * count, places(count), chunks)


def plain(count: int) -> list[Primitive]:
    return [whalepy.stage() for _ in range(count)]


@pytest.mark.parametrize(
    ("inside", "count", "expected"),
    [
        ([(), ()], 2, [(0,), (1,)]),
        ([(), ()], 4, [(0, 1), (2, 3)]),  # all stages twice
        ([(), ()], 5, [(0, 1, 2), (3, 4)]),  # the first of equal ones takes what is over
        ([(), (whalepy.split(2),)], 3, [(0,), (1, 2)]),
        ([(), (whalepy.split(2),)], 4, [(0, 1), (2, 3)]),  # one more for the slower of those that fit
        ([(), (whalepy.replicate(2), whalepy.split(2))], 5, [(0,), (1, 2, 3, 4)]),
    ],
)
def test_stages_left_open(inside: list[Any], count: int, expected: list[tuple[int, ...]]) -> None:
    assert list(arrangement(plain(len(inside)), inside, count).devices) == expected


def test_what_is_over_goes_to_the_heavier_stage() -> None:
    found = arrangement(plain(2), [(), ()], 3, loads=[1.0, 5.0])
    assert found.devices == ((0,), (1, 2))


def test_stages_of_a_stated_size_leave_devices_idle() -> None:
    found = arrangement([whalepy.stage(1), whalepy.stage(2)], [(), ()], 5)
    assert found.devices == ((0,), (1, 2))


def test_stages_take_turns_on_groups() -> None:
    found = arrangement(plain(4), [()] * 4, 2, chunks=2)
    assert found.devices == ((0,), (1,), (0,), (1,))


def test_one_device_runs_all_stages() -> None:
    assert arrangement(plain(3), [()] * 3, 1).devices == ((0,), (0,), (0,))


def test_a_replicate_around_all_shares_by_the_slowest_stage_of_each_copy() -> None:
    around = whalepy.replicate()
    found = arrangement(plain(2), [(), ()], 4, around=(around,), speeds=[1.0, 1.0, 1.0, 0.25])
    stand_in = found.scopes[around]
    assert stand_in is not None
    assert (found.devices, found.copies, stand_in.degree) == (((0, 1), (2, 3)), 2, 2)
    assert stand_in.shares == (1.0, 0.25)  # the second copy waits for device 3
    assert found.chain((around, whalepy.stage(), whalepy.split(2)))[0] is stand_in


def test_shares_of_the_user_stay() -> None:
    around = whalepy.replicate(shares=(3, 1))
    found = arrangement(plain(2), [(), ()], 4, around=(around,))
    stand_in = found.scopes[around]
    assert stand_in is not None and stand_in.shares == (3.0, 1.0)
