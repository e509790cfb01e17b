"""Schedules that are right pass; each of many planted bugs is found, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.planner.schedule.plans import Case, chain, looped, plain
from whalepy.errors import VerificationError
from whalepy.planner.schedule import findings
from whalepy.planner.schedule.actions import Action, Crossing, Lending, parse
from whalepy.planner.schedule.verify import verify

Lists = list[list[Action]]
Mutation = Callable[[Lists], None]

SKIP = (*chain(3), Crossing(0, 2, True))
TIED = (Lending(0, 2, True),)
GOOD = {
    "1f1b": Case("1f1b", plain(3), 4, SKIP, TIED),
    "gpipe": Case("gpipe", plain(3), 4, SKIP, TIED),
    "zero": Case("zero-bubble", plain(3), 4, SKIP, TIED),
    "looped": Case("interleaved", looped(2, 2), 4, chain(4)),
    "local": Case("1f1b", ((0, 1), (2,)), 2, chain(3)),
    "frozen": Case("1f1b", plain(3), 2, (Crossing(0, 1, False), Crossing(1, 2, True)), (), (1, 2)),
}


def lists(name: str) -> Lists:
    return [list(own) for own in GOOD[name].schedule()]


def check(name: str, schedule: Lists) -> None:
    case = GOOD[name]
    verify(schedule, case.hosts, case.crossings, case.lendings, case.microbatches, case.trained)


@pytest.mark.parametrize("name", GOOD)
def test_good_schedules_pass(name: str) -> None:
    check(name, lists(name))


def _found(schedule: Lists, text: str) -> tuple[list[Action], int]:
    action = parse(text)
    own = next(own for own in schedule if action in own)
    return own, own.index(action)


def without(*texts: str) -> Mutation:
    def mutate(schedule: Lists) -> None:
        for text in texts:
            own, at = _found(schedule, text)
            del own[at]

    return mutate


def before(text: str, other: str) -> Mutation:
    def mutate(schedule: Lists) -> None:
        own, at = _found(schedule, text)
        action = own.pop(at)
        own.insert(own.index(parse(other)), action)

    return mutate


def swapped(text: str, other: str) -> Mutation:
    def mutate(schedule: Lists) -> None:
        own, a = _found(schedule, text)
        b = own.index(parse(other))
        own[a], own[b] = own[b], own[a]

    return mutate


def instead(text: str, other: str) -> Mutation:
    def mutate(schedule: Lists) -> None:
        own, at = _found(schedule, text)
        own[at] = parse(other)

    return mutate


def added(group: int, text: str) -> Mutation:
    return lambda schedule: schedule[group].append(parse(text))


def both(first: Mutation, second: Mutation) -> Mutation:
    def mutate(schedule: Lists) -> None:
        first(schedule)
        second(schedule)

    return mutate


def no_group(schedule: Lists) -> None:
    schedule.pop()


PLANTED: list[tuple[str, Mutation, type[VerificationError], str]] = [
    # computes
    ("1f1b", without("1F2"), findings.MissingAction, "group 1 lacks 1F2"),
    ("1f1b", without("1B2"), findings.MissingAction, "group 1 lacks 1B2"),
    ("zero", without("1W2"), findings.MissingAction, "group 1 lacks 1W2"),  # the weights never get their gradient
    ("zero", without("1I2"), findings.MissingAction, "group 1 lacks 1I2"),
    ("1f1b", without("1REDUCE"), findings.MissingAction, "group 1 lacks 1REDUCE"),
    ("1f1b", no_group, findings.MissingAction, "2 lists of actions for 3 groups"),
    ("1f1b", added(1, "1B2"), findings.RepeatedAction, "group 1 has 1B2 twice"),  # a gradient counts twice
    ("zero", added(1, "1B2"), findings.RepeatedAction, "group 1 has both 1B2 and 1I2"),
    ("1f1b", added(1, "1F4"), findings.UnexpectedAction, "group 1 has 1F4, but there are 4 microbatches"),
    ("1f1b", added(1, "2F0"), findings.UnexpectedAction, "group 1 has 2F0, but hosts only stage 1"),
    ("frozen", added(0, "0B0"), findings.UnexpectedAction, "group 0 has 0B0, but stage 0 runs no backward"),
    ("frozen", added(0, "0REDUCE"), findings.UnexpectedAction, "group 0 has 0REDUCE, but stage 0 runs no backward"),
    # order in one group
    (
        "1f1b",
        before("2B1", "2F1"),
        findings.BackwardBeforeForward,
        "group 2 has 2B1 before 2F1: there is nothing to go back through yet",
    ),
    (
        "zero",
        before("1W0", "1I0"),
        findings.WeightsBeforeInputs,
        "group 1 has 1W0 before 1I0: nothing has been left for it yet",
    ),
    (
        "1f1b",
        swapped("2RECV_F3<0", "2F3"),
        findings.UsedBeforeReceived,
        "group 2 has 2F3 before 2RECV_F3<0: what it needs is not there yet",
    ),
    (
        "1f1b",
        swapped("0RECV_B0<2", "0B0"),  # one of two gradients is summed too late
        findings.UsedBeforeReceived,
        "group 0 has 0B0 before 0RECV_B0<2: what it needs is not there yet",
    ),
    (
        "1f1b",
        before("1SEND_F3>2", "1F3"),
        findings.SentBeforeComputed,
        "group 1 has 1SEND_F3>2 before 1F3: there is nothing to send yet",
    ),
    (
        "zero",
        before("1SEND_B3>0", "1I3"),
        findings.SentBeforeComputed,
        "group 1 has 1SEND_B3>0 before 1I3: there is nothing to send yet",
    ),
    (
        "1f1b",
        swapped("2RECV_P<0", "2RECV_F3<1"),
        findings.ParameterBeforeReceived,
        "group 2 has 2F0 before 2RECV_P<0: the parameter is not there yet",
    ),
    (
        "1f1b",
        before("1REDUCE", "1B3"),
        findings.ReduceTooEarly,
        "group 1 has 1REDUCE before 1B3: its gradients are not whole yet",
    ),
    (
        "zero",
        before("1REDUCE", "1W3"),
        findings.ReduceTooEarly,
        "group 1 has 1REDUCE before 1W3: its gradients are not whole yet",
    ),
    (
        "1f1b",
        before("2SEND_G>0", "2B3"),
        findings.GradientTooEarly,
        "group 2 has 2SEND_G>0 before 2REDUCE: the gradient of the stage itself is not whole yet",
    ),
    (
        "1f1b",
        before("0RECV_G<2", "0REDUCE"),
        findings.GradientTooEarly,
        "group 0 has 0RECV_G<2 before 0REDUCE: the gradient of the stage itself is not whole yet",
    ),
    # both sides
    (
        "1f1b",
        without("2RECV_F3<0"),
        findings.SendWithoutReceive,
        "group 0 has 0SEND_F3>2, but no group has 2RECV_F3<0",
    ),
    (
        "1f1b",
        without("2SEND_B1>0"),
        findings.ReceiveWithoutSend,
        "group 0 has 0RECV_B1<2, but no group has 2SEND_B1>0",
    ),
    (
        "1f1b",
        without("2SEND_B1>0", "0RECV_B1<2"),  # the backward would miss the gradient of the skip
        findings.UsedBeforeReceived,
        "2SEND_B1>0 is never sent, and 0RECV_B1<2 never received",
    ),
    (
        "1f1b",
        without("0SEND_P>2", "2RECV_P<0"),
        findings.UsedBeforeReceived,
        "0SEND_P>2 is never sent, and 2RECV_P<0 never received",
    ),
    (
        "looped",
        both(added(0, "0SEND_F1>3"), added(1, "3RECV_F1<0")),
        findings.UnexpectedAction,
        "0SEND_F1>3 is sent, but nothing asks for it",
    ),
    (
        "1f1b",
        instead("0SEND_F3>1", "0SEND_F3>2"),  # to the wrong stage
        findings.RepeatedAction,
        "group 0 has 0SEND_F3>2 twice",
    ),
    (
        "1f1b",
        swapped("1RECV_F0<0", "1RECV_F1<0"),  # microbatch 1 would be taken for 0
        findings.MessagesOutOfOrder,
        "group 1 receives 1RECV_F1<0 where group 0 sends 0SEND_F0>1 first",
    ),
    (
        "looped",
        both(before("3RECV_F1<2", "3F1"), before("1RECV_F2<0", "3RECV_F1<2")),  # of two pairs of stages, two groups
        findings.MessagesOutOfOrder,
        "group 1 receives 1RECV_F2<0 where group 0 sends 2SEND_F1>3 first",
    ),
    # waits
    (
        "gpipe",
        both(before("1B0", "1F3"), before("1RECV_B0<2", "1B0")),  # the last stage still needs 1F3
        findings.WaitCycle,
        "the groups would wait for each other: group 1 stands at 1B0 and waits for 2SEND_B0>1; "
        "group 2 stands at 2F3 and waits for 1SEND_F3>2",
    ),
    (
        "local",
        before("1RECV_F1<0", "0SEND_F1>1"),
        findings.WaitCycle,
        "group 0 has 1RECV_F1<0 before 0SEND_F1>1: a group cannot wait for itself",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutation", "finding", "what"), PLANTED, ids=[row[3] for row in PLANTED])
def test_planted_bugs(name: str, mutation: Mutation, finding: type[VerificationError], what: str) -> None:
    schedule = lists(name)
    mutation(schedule)
    with pytest.raises(VerificationError) as error:
        check(name, schedule)
    assert str(error.value) == f"{what}\n  fix: {findings.FIX}"
    assert type(error.value) is finding


def test_every_finding_is_planted_here_or_between_ranks() -> None:
    kinds = {kind for kind in vars(findings).values() if isinstance(kind, type)} - {VerificationError}
    assert kinds - {row[2] for row in PLANTED} == {findings.SizeMismatch, findings.DtypeMismatch}
