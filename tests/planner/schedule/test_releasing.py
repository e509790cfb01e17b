"""What was sent is let go of as soon as it is known to have arrived, and nobody waits longer for that."""

from __future__ import annotations

import random

import pytest

from tests.planner.schedule.plans import Case, chain, in_a_chain, looped, random_case, seconds
from whalepy.planner.schedule.actions import SENDS, SENT, Action, Schedule
from whalepy.planner.schedule.findings import SentBeforeComputed, UnexpectedAction, WaitCycle
from whalepy.planner.schedule.generators import forward_only
from whalepy.planner.schedule.lowering import lowered
from whalepy.planner.schedule.releasing import releasing
from whalepy.planner.schedule.simulate import simulate
from whalepy.planner.schedule.verify import verify
from whalepy.planner.schedule.waits import stuck


def texts(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, own)) for own in schedule]


def verified(schedule: Schedule, case: Case) -> Schedule:
    verify(schedule, case.hosts, case.crossings, case.lendings, case.microbatches, case.trained)
    return schedule


def test_two_stages() -> None:
    assert texts(releasing(in_a_chain("1f1b", 2, 3).schedule())) == [
        "0F0 0SEND_F0>1 0RECV_B0<1 0F1 0SEND_F1>1 0SENT_F0>1 0B0 0RECV_B1<1 0F2 0SEND_F2>1 0RECV_B2<1 "
        "0SENT_F1>1 0B1 0SENT_F2>1 0B2 0REDUCE",
        "1RECV_F0<0 1F0 1RECV_F1<0 1B0 1SEND_B0>0 1F1 1RECV_F2<0 1B1 1SEND_B1>0 1SENT_B0>0 1F2 1B2 1SEND_B2>0 1REDUCE "
        "1SENT_B1>0 1SENT_B2>0",
    ]


def held(own: tuple[Action, ...]) -> int:
    """The most messages that a group keeps the memory of."""
    most, now = 0, set[Action]()
    for action in own:
        if action.op in SENDS:
            now.add(action)
        if action.op in SENT:
            now.remove(action._replace(op=SENT[action.op]))
        most = max(most, len(now))
    return most


@pytest.mark.parametrize("kind", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize("stages", [2, 3, 5, 8])
def test_what_is_kept_does_not_grow_with_the_microbatches(kind: str, stages: int) -> None:
    few, many = (releasing(in_a_chain(kind, stages, count).schedule()) for count in (32, 128))
    assert [held(own) for own in many] == [held(own) for own in few]
    assert max(map(held, few)) <= 2 * stages + 2


def test_interleaved_keeps_no_more_for_more_microbatches() -> None:
    few, many = (releasing(Case("interleaved", looped(4, 2), count, chain(8)).schedule()) for count in (32, 128))
    assert [held(own) for own in many] == [held(own) for own in few]


def test_random_plans_end_as_soon_with_it() -> None:
    """Whatever an action takes: nobody waits for a message to be through who would not have to wait anyway."""
    draw = random.Random(4)
    released = 0
    for _ in range(500):
        case = random_case(draw)
        plain = case.schedule()
        schedule = verified(releasing(plain), case)
        for own in schedule:
            sent = {action._replace(op=SENT[action.op]) for action in own if action.op in SENT}
            assert sent == {action for action in own if action.op in ("SEND_F", "SEND_B")}
            released += len(sent)
        assert tuple(tuple(a for a in own if a.op not in SENT) for own in schedule) == plain
        took = {action: draw.random() for own in plain for action in own}
        for durations in (seconds, took.__getitem__):
            assert simulate(schedule, durations).step_s == simulate(plain, durations).step_s
    assert released > 10_000


def test_all_earlier_microbatches_too() -> None:
    """The dry run takes one microbatch for others of the same sizes: an earlier one has a SENT where it has one."""
    draw = random.Random(5)
    for _ in range(500):
        for own in releasing(random_case(draw).schedule()):
            sent: dict[Action, list[int]] = {}
            for action in own:
                if action.op in SENT:
                    sent.setdefault(action._replace(microbatch=None), []).append(action.microbatch or 0)
            assert all(sorted(each) == list(range(len(each))) for each in sent.values())


def test_evaluation() -> None:
    """Nothing comes back in a chain, so nothing shows that anything has arrived before the end."""
    hosts = tuple((k,) for k in range(3))
    schedule = releasing(lowered(forward_only(hosts, 2), chain(3), trained=()))
    assert texts(schedule) == [
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0SENT_F0>1 0SENT_F1>1",
        "1RECV_F0<0 1RECV_F1<0 1F0 1SEND_F0>2 1F1 1SEND_F1>2 1SENT_F0>2 1SENT_F1>2",
        "2RECV_F0<1 2RECV_F1<1 2F0 2F1",
    ]


def test_planted_faults_are_found() -> None:
    case = in_a_chain("1f1b", 2, 3)
    own, other = (list(actions) for actions in releasing(case.schedule()))
    sent = Action(0, "SENT_F", 1, 1)
    own.remove(sent)
    with pytest.raises(SentBeforeComputed, match="it has not been sent yet"):
        verified(((sent, *own), tuple(other)), case)
    with pytest.raises(UnexpectedAction, match="nothing asks for 1SEND_F0>0"):
        verified((tuple(own), (*other, Action(1, "SENT_F", 0, 0))), case)


def test_two_groups_that_wait_for_each_other_to_receive() -> None:
    one = (Action(0, "F", 0), Action(0, "SEND_F", 0, 1), Action(0, "SENT_F", 0, 1), Action(0, "RECV_B", 0, 1))
    two = (Action(1, "F", 0), Action(1, "SEND_B", 0, 0), Action(1, "SENT_B", 0, 0), Action(1, "RECV_F", 0, 0))
    with pytest.raises(WaitCycle):
        simulate((one, two), seconds)
    assert [(group, str(action)) for group, action, _ in stuck((one, two))] == [(0, "0SENT_F0>1"), (1, "1SENT_B0>0")]
