"""From rank to rank: what is sent is what is expected."""

from __future__ import annotations

import pytest

from whalepy.errors import VerificationError
from whalepy.planner.schedule import findings
from whalepy.planner.schedule.actions import parse
from whalepy.planner.schedule.verify import Message, verify_messages


def messages(*rows: str) -> list[Message]:
    """`0SEND_F0>1 2 6 f32`: action, other rank, elements, dtype."""
    split = [row.split() for row in rows]
    return [Message(parse(action), int(rank), int(elements), dtype) for action, rank, elements, dtype in split]


SENDER = ("0SEND_F0>1 1 6 f32", "0SEND_F0>1 2 2 f32", "0SEND_F1>1 1 6 f32", "0SEND_F1>1 2 2 f32", "0RECV_B0<1 1 6 f32")
FIRST = ("1RECV_F0<0 0 6 f32", "1RECV_F1<0 0 6 f32", "1SEND_B0>0 0 6 f32")
SECOND = ("1RECV_F0<0 0 2 f32", "1RECV_F1<0 0 2 f32")


def test_one_rank_feeds_two_unevenly() -> None:
    verify_messages({0: messages(*SENDER), 1: messages(*FIRST), 2: messages(*SECOND)})


WRONG = [
    (
        SENDER[:3],
        FIRST[:2],
        SECOND,
        findings.ReceiveWithoutSend,
        "rank 2 expects 1RECV_F1<0 from rank 0, which sends 0SEND_F1>1 0 times",
    ),
    (
        SENDER,
        FIRST,
        SECOND[:1],
        findings.SendWithoutReceive,
        "rank 0 sends 0SEND_F1>1 to rank 2, which expects 1RECV_F1<0 0 times",
    ),
    (
        SENDER,
        FIRST,
        SECOND[::-1],
        findings.MessagesOutOfOrder,
        "rank 2 expects 1RECV_F1<0 from rank 0 where that sends 0SEND_F0>1",
    ),
    (
        SENDER,
        FIRST,
        ("1RECV_F0<0 0 3 f32", SECOND[1]),
        findings.SizeMismatch,
        "in 0SEND_F0>1 rank 0 sends 2 elements to rank 2, which expects 3 elements in 1RECV_F0<0",
    ),
    (
        SENDER,
        (*FIRST[:2], "1SEND_B0>0 0 6 bf16"),
        SECOND,
        findings.DtypeMismatch,
        "in 1SEND_B0>0 rank 1 sends bf16 to rank 0, which expects f32 in 0RECV_B0<1",
    ),
]


@pytest.mark.parametrize(("sender", "first", "second", "finding", "what"), WRONG)
def test_what_does_not_fit(
    sender: tuple[str, ...],
    first: tuple[str, ...],
    second: tuple[str, ...],
    finding: type[VerificationError],
    what: str,
) -> None:
    with pytest.raises(VerificationError) as error:
        verify_messages({0: messages(*sender), 1: messages(*first), 2: messages(*second)})
    assert str(error.value) == f"{what}\n  fix: {findings.FIX}"
    assert type(error.value) is finding
