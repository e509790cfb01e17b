"""What is sent, received and reduced around what is computed."""

from __future__ import annotations

import random

import pytest

from tests.planner.schedule.plans import Case, chain, looped, plain, random_case
from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import COMPUTES, Action, Crossing, Lending, partner
from whalepy.planner.schedule.hosting import group_of
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered

LOWERED = [
    (
        Case("1f1b", plain(2), 2, chain(2)),
        "0F0 0SEND_F0>1 0RECV_B0<1 0F1 0SEND_F1>1 0RECV_B1<1 0B0 0B1 0REDUCE",
        "1RECV_F0<0 1F0 1RECV_F1<0 1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0 1REDUCE",
    ),
    (
        Case("zero-bubble", plain(2), 1, chain(2)),  # the gradient leaves before the weights
        "0RECV_B0<1 0F0 0SEND_F0>1 0I0 0W0 0REDUCE",
        "1RECV_F0<0 1F0 1I0 1SEND_B0>0 1W0 1REDUCE",
    ),
    (
        Case("1f1b", plain(2), 1, chain(2), (Lending(0, 1, True),)),
        "0SEND_P>1 0RECV_B0<1 0F0 0SEND_F0>1 0B0 0REDUCE 0RECV_G<1",
        "1RECV_P<0 1RECV_F0<0 1F0 1B0 1SEND_B0>0 1REDUCE 1SEND_G>0",
    ),
    (
        Case("1f1b", plain(2), 1, chain(2), (Lending(0, 1, False),)),  # lent, not trained
        "0SEND_P>1 0RECV_B0<1 0F0 0SEND_F0>1 0B0 0REDUCE",
        "1RECV_P<0 1RECV_F0<0 1F0 1B0 1SEND_B0>0 1REDUCE",
    ),
    (
        Case("1f1b", plain(2), 1, (Crossing(0, 1, False),), (), (1,)),  # a frozen first stage has no backward
        "0F0 0SEND_F0>1",
        "1RECV_F0<0 1F0 1B0 1REDUCE",
    ),
    (
        Case("1f1b", ((0, 2), (1,)), 1, (*chain(3), Crossing(0, 2, True))),  # 0 and 2 share a group: after the send
        "2RECV_F0<1 0F0 0SEND_F0>1 0SEND_F0>2 2RECV_F0<0 2F0 0RECV_B0<1 2B0 2SEND_B0>0 2SEND_B0>1 "
        "0RECV_B0<2 0B0 2REDUCE 0REDUCE",
        "1RECV_F0<0 1RECV_B0<2 1F0 1SEND_F0>2 1B0 1SEND_B0>0 1REDUCE",
    ),
]


@pytest.mark.parametrize(("case", "first", "second"), LOWERED)
def test_lowered(case: Case, first: str, second: str) -> None:
    assert [" ".join(map(str, own)) for own in case.schedule()] == [first, second]


def test_crossings_of_the_same_stages_share_a_message() -> None:
    computes = compute_actions("1f1b", plain(2), 2)
    twice = lowered(computes, [Crossing(0, 1, False), Crossing(0, 1, True)], [Lending(0, 1, False)] * 2)
    assert twice == lowered(computes, [Crossing(0, 1, True)], [Lending(0, 1, False)])


def test_computes_stay_as_they_are() -> None:
    draw = random.Random(5)
    for _ in range(100):
        case = random_case(draw)
        trained = range(8) if case.trained is None else case.trained
        computes = compute_actions(case.kind, case.hosts, case.microbatches)
        for own, given in zip(case.schedule(), computes, strict=True):
            kept = [action for action in given if action.op == "F" or action.stage in trained]
            assert [action for action in own if action.op in COMPUTES] == kept


def ahead(own: tuple[Action, ...], receive: Action) -> int:
    """How many compute actions stand between a receive and the one that needs it."""
    needed = ("F",) if receive.op == "RECV_F" else ("B", "I")
    rest = [action for action in own[own.index(receive) :] if action.op in COMPUTES]
    return next(
        index
        for index, action in enumerate(rest)
        if (action.stage, action.microbatch) == (receive.stage, receive.microbatch) and action.op in needed
    )


@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "zero-bubble"])
def test_a_chain_receives_one_action_ahead(kind: str) -> None:
    for own in Case(kind, plain(4), 8, chain(4)).schedule():
        received = [action for action in own if action.op in ("RECV_F", "RECV_B")]
        first = next(action for action in own if action.op in COMPUTES)
        for receive in received:
            needs_first = first.stage > 0 and receive == Action(first.stage, "RECV_F", 0, first.stage - 1)
            assert ahead(own, receive) == (0 if needs_first else 1)


def test_receives_are_never_later_than_one_ahead_and_local_ones_directly_before() -> None:
    draw = random.Random(6)
    for _ in range(200):
        case = random_case(draw)
        groups = group_of(case.hosts)
        for own in case.schedule():
            sends = {action: index for index, action in enumerate(own) if action.op.startswith("SEND")}
            for receive in [action for action in own if action.op in ("RECV_F", "RECV_B")]:
                if groups[receive.stage] == groups[receive.peer or 0]:
                    assert ahead(own, receive) == 0
                    assert sends[partner(receive)] < own.index(receive)
                elif ahead(own, receive) == 0:  # nothing is computed before
                    assert not any(action.op in COMPUTES for action in own[: own.index(receive)])


def test_how_far_ahead_interleaved_receives() -> None:
    """Measured: keeping the order between groups posts a receive at most this many computes before its own."""
    most = 0
    for groups, chunks in ((2, 2), (3, 2), (4, 2), (4, 3)):
        for microbatches in range(1, 17):
            case = Case("interleaved", looped(groups, chunks), microbatches, chain(groups * chunks))
            for own in case.schedule():
                received = [action for action in own if action.op in ("RECV_F", "RECV_B")]
                most = max([most, *(ahead(own, receive) for receive in received)])
    assert most == 2


WRONG = [
    (
        [Crossing(1, 0, True)],
        [],
        None,
        "values cross from stage 1 back to stage 0\n  fix: order the stages so that values only go to later ones",
    ),
    ([Crossing(0, 2, True)], [], None, "values cross from stage 0 to stage 2, but the stages are [0, 1]"),
    (
        [Crossing(0, 1, True)],
        [],
        [1],
        "gradients cross from stage 1 to stage 0, but stage 0 runs no backward\n"
        "  fix: name stage 0 as trained, or cross without gradients",
    ),
    (
        [Crossing(0, 1, True)],
        [],
        [0],
        "gradients cross from stage 1 to stage 0, but stage 1 runs no backward\n"
        "  fix: name stage 1 as trained, or cross without gradients",
    ),
    ([], [Lending(0, 0, True)], None, "stage 0 lends to stage 0, but the stages are [0, 1]"),
    (
        [],
        [Lending(0, 1, True)],
        [0],
        "stage 1 owes stage 0 a gradient, but runs no backward\n"
        "  fix: name stage 1 as trained, or lend without gradients",
    ),
]


@pytest.mark.parametrize(("crossings", "lendings", "trained", "message"), WRONG)
def test_what_cannot_be_lowered(
    crossings: list[Crossing], lendings: list[Lending], trained: list[int] | None, message: str
) -> None:
    with pytest.raises(PlanError) as error:
        lowered(compute_actions("1f1b", plain(2), 2), crossings, lendings, trained)
    assert str(error.value) == message
