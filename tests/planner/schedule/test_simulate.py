"""A schedule in time."""

from __future__ import annotations

import random

import pytest

from tests.planner.schedule.plans import Case, chain, plain, random_case, seconds
from whalepy.planner.schedule.actions import COMPUTES, MESSAGES, Action, parse, partner
from whalepy.planner.schedule.findings import WaitCycle
from whalepy.planner.schedule.simulate import Durations, Simulated, simulate


def taking(**each: float) -> Durations:
    """Seconds by the text of an action, or by its op."""
    return lambda action: each.get(str(action), each.get(action.op, 0.0))


def actions(texts: str) -> list[Action]:
    return [parse(text) for text in texts.split()]


def times(found: Simulated) -> dict[str, tuple[float, float]]:
    return {str(each.action): (each.start_s, each.end_s) for own in found.timed for each in own}


def test_by_hand() -> None:
    """Two stages, two microbatches, 1 s for F, 2 s for B, half a second for each message."""
    schedule = Case("1f1b", plain(2), 2, chain(2)).schedule()
    found = simulate(schedule, taking(F=1, B=2, SEND_F=0.5, SEND_B=0.5, REDUCE=0.25))
    assert times(found) == {
        "0F0": (0, 1),
        "0SEND_F0>1": (1, 1.5),
        "0RECV_B0<1": (1, 5),
        "0F1": (1, 2),
        "0SEND_F1>1": (2.5, 3),  # 1RECV_F1<0 is posted when 1F0 is done
        "0RECV_B1<1": (2, 8),
        "0B0": (5, 7),
        "0B1": (8, 10),
        "0REDUCE": (10, 10.25),
        "1RECV_F0<0": (0, 1.5),
        "1F0": (1.5, 2.5),
        "1RECV_F1<0": (2.5, 3),
        "1B0": (2.5, 4.5),
        "1SEND_B0>0": (4.5, 5),
        "1F1": (4.5, 5.5),
        "1B1": (5.5, 7.5),
        "1SEND_B1>0": (7.5, 8),
        "1REDUCE": (7.5, 7.75),
    }
    assert (found.step_s, found.busy_s, found.bubble_s) == (10.25, (6.25, 6.25), (4, 4))
    assert found.bubble == pytest.approx(8 / 20.5)
    assert found.in_flight == {0: 2, 1: 1}


def test_a_link_carries_one_message_at_a_time() -> None:
    """Three values at once, to one stage: they arrive one after the other."""
    schedule = Case("gpipe", plain(2), 3, chain(2)).schedule()
    found = times(simulate(schedule, taking(F=0.125, B=0.125, SEND_F=1)))
    assert [found[f"0SEND_F{m}>1"] for m in range(3)] == [(0.125, 1.125), (1.125, 2.125), (2.125, 3.125)]


def test_a_message_waits_for_its_receive() -> None:
    """1RECV_F1<0 is posted before 1B0 starts, not before 1F0 has ended: gloo and NCCL send no earlier."""
    schedule = Case("1f1b", plain(2), 2, chain(2)).schedule()
    found = times(simulate(schedule, taking(**{"F": 1, "1F0": 10, "B": 2, "SEND_F": 0.5})))
    assert found["0SEND_F1>1"] == (11.5, 12)


def test_within_a_group_nothing_travels() -> None:
    case = Case("1f1b", ((0, 1),), 2, chain(2))
    assert simulate(case.schedule(), taking(F=1, B=2, SEND_F=100, SEND_B=100)).step_s == 12


def test_lent_parameters_hold_up_the_borrower() -> None:
    schedule = [
        actions("0SEND_P>1 0F0 0B0 0REDUCE 0RECV_G<1"),
        actions("1RECV_P<0 1F0 1B0 1REDUCE 1SEND_G>0"),
    ]
    found = times(simulate(schedule, taking(SEND_P=4, F=1, B=2, REDUCE=1, SEND_G=4)))
    assert found["1F0"] == (4, 5)
    assert found["0RECV_G<1"] == (4, 12)


def test_groups_that_wait_for_each_other() -> None:
    schedule = [
        actions("0F0 0RECV_B0<1 0B0 0SEND_F0>1"),
        actions("1RECV_F0<0 1F0 1B0 1SEND_B0>0"),
    ]
    with pytest.raises(WaitCycle, match="group 0 never gets beyond 0B0"):
        simulate(schedule, seconds)


def test_any_durations_keep_every_promise() -> None:
    """On random plans with random durations: nothing overlaps on a group or a link, nothing is used before it comes."""
    draw = random.Random(7)
    for _ in range(100):
        case = random_case(draw)
        schedule = case.schedule()
        taken = {action: draw.choice((0.0, 0.5, 1.0, 3.0)) for own in schedule for action in own}
        found = simulate(schedule, taken.__getitem__)
        spans = {each.action: (each.start_s, each.end_s) for own in found.timed for each in own}
        for own in schedule:
            clock = 0.0
            for action in own:
                start, end = spans[action]
                if action.op in MESSAGES:
                    continue
                assert start >= clock and end == start + taken[action]
                clock = end
                if action.op in COMPUTES:
                    assert all(spans[partner(need)][1] <= start for need in needs(own, action))
        assert found.step_s == max(end for _, end in spans.values())
        assert sum(found.busy_s) == sum(
            taken[action] for own in schedule for action in own if action.op not in MESSAGES
        )


def needs(own: tuple[Action, ...], compute: Action) -> list[Action]:
    wanted = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B", "W": ""}[compute.op]
    return [
        action
        for action in own
        if action.op == wanted and (action.stage, action.microbatch) == (compute.stage, compute.microbatch)
    ]


def test_zero_bubble_waits_less_than_one_by_one() -> None:
    """Weights 0.8 s: where theory's premise of equal parts does not hold it is still shorter, and never longer."""
    each = {"F": 1.0, "I": 1.1, "W": 0.8, "B": 1.9}
    for stages in range(1, 9):
        for microbatches in range(1, 17):
            one, zero = (
                simulate(Case(kind, plain(stages), microbatches, chain(stages)).schedule(), taking(**each)).step_s
                for kind in ("1f1b", "zero-bubble")
            )
            assert zero <= one + 1e-9
            assert zero < one - 1e-9 or stages == 1
