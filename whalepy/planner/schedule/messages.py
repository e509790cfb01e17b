"""The messages of all ranks together: whatever one sends, the other expects, with the same size and type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.errors import VerificationError
from whalepy.planner.schedule.actions import SENDS, Action, partner
from whalepy.planner.schedule.findings import (
    FIX,
    DtypeMismatch,
    MessagesOutOfOrder,
    ReceiveWithoutSend,
    SendWithoutReceive,
    SizeMismatch,
)


@dataclass(frozen=True)
class Message:
    """What one rank sends to another one in a send, or expects from it in a receive."""

    action: Action
    peer_rank: int
    elements: int
    dtype: str


_Pair = tuple[int, int]
"""(sending rank, receiving rank)."""


def verify_messages(programs: Mapping[int, Sequence[Message]]) -> None:
    """Check what each rank sends and expects, in its order: from rank to rank it is the same list on both sides.

    Raises SendWithoutReceive, ReceiveWithoutSend, MessagesOutOfOrder, SizeMismatch or DtypeMismatch: the first
    finding, rank pair by rank pair, in this order.
    """
    sent, expected = _by_pair(programs, sends=True), _by_pair(programs, sends=False)
    for pair in sorted(sent.keys() | expected.keys()):
        sends, receives = sent.get(pair, []), expected.get(pair, [])
        _check_present(pair, sends, receives)
        for send, receive in zip(sends, receives, strict=True):
            _check_order(pair, send, receive)
        for send, receive in zip(sends, receives, strict=True):
            _check_alike(pair, send, receive)


def _by_pair(programs: Mapping[int, Sequence[Message]], *, sends: bool) -> dict[_Pair, list[Message]]:
    found: dict[_Pair, list[Message]] = {}
    for rank, messages in programs.items():
        for message in messages:
            if (message.action.op in SENDS) == sends:
                pair = (rank, message.peer_rank) if sends else (message.peer_rank, rank)
                found.setdefault(pair, []).append(message)
    return found


def _check_present(pair: _Pair, sends: Sequence[Message], receives: Sequence[Message]) -> None:
    out = Counter(message.action for message in sends)
    into = Counter(partner(message.action) for message in receives)
    for action, count in out.items():
        if into[action] < count:
            what = f"{_times(action, count)} to rank {pair[1]}, which expects {_times(partner(action), into[action])}"
            raise _error(SendWithoutReceive, f"rank {pair[0]} sends {what}")
    for action, count in into.items():
        if out[action] < count:
            what = f"{_times(partner(action), count)} from rank {pair[0]}, which sends {_times(action, out[action])}"
            raise _error(ReceiveWithoutSend, f"rank {pair[1]} expects {what}")


def _check_order(pair: _Pair, send: Message, receive: Message) -> None:
    if partner(send.action) != receive.action:
        raise _error(
            MessagesOutOfOrder,
            f"rank {pair[1]} expects {receive.action} from rank {pair[0]} where that sends {send.action}",
        )


def _check_alike(pair: _Pair, send: Message, receive: Message) -> None:
    for kind, unit, mine, theirs in (
        (SizeMismatch, " elements", send.elements, receive.elements),
        (DtypeMismatch, "", send.dtype, receive.dtype),
    ):
        if mine != theirs:
            what = f"in {send.action} rank {pair[0]} sends {mine}{unit} to rank {pair[1]}"
            raise _error(kind, f"{what}, which expects {theirs}{unit} in {receive.action}")


def _times(action: Action, count: int) -> str:
    return str(action) if count == 1 else f"{action} {count} times"


def _error(kind: type[VerificationError], what: str) -> VerificationError:
    return kind(what, fix=FIX)
