"""Random plans: any stages, microbatches, hosts, crossings, lendings and kinds are verified and come to their end."""

from __future__ import annotations

import random

import pytest

from tests.planner.schedule.plans import Case, random_case, seconds
from whalepy.planner.schedule.actions import RECEIVES, Action
from whalepy.planner.schedule.simulate import simulate
from whalepy.planner.schedule.verify import verify


def check(case: Case) -> tuple[tuple[Action, ...], ...]:
    schedule = case.schedule()
    verify(schedule, case.hosts, case.crossings, case.lendings, case.microbatches, case.trained)
    return schedule


def test_2_000_random_plans() -> None:
    draw = random.Random(1)
    for index in range(2_000):
        case = random_case(draw)
        schedule = check(case)
        if index % 20 == 0:
            assert simulate(schedule, seconds).step_s > 0


@pytest.mark.slow
def test_10_000_random_plans() -> None:
    """In less than a minute; the time is not asserted."""
    draw = random.Random(2)
    for _ in range(10_000):
        check(random_case(draw))


def test_a_random_message_lost_is_missed() -> None:
    """Take any one communication out of any random plan: something is wrong."""
    draw = random.Random(3)
    for _ in range(200):
        case = random_case(draw)
        schedule = [list(own) for own in check(case)]
        received = [(own, action) for own in schedule for action in own if action.op in RECEIVES]
        if received:
            own, action = draw.choice(received)
            own.remove(action)
            with pytest.raises(Exception, match="no group has"):
                verify(schedule, case.hosts, case.crossings, case.lendings, case.microbatches, case.trained)
