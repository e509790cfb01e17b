"""When the memory of what was sent may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from whalepy.planner.schedule.actions import SENDS, SENT, Action, Op, Schedule

_TAKEN_BY: Mapping[Op, tuple[Op, ...]] = {"SEND_F": ("F",), "SEND_B": ("B", "I")}
"""The compute actions of the other side, one of which takes a message."""
_SENT: Mapping[Op, Op] = {send: sent for sent, send in SENT.items()}


def releasing(schedule: Schedule) -> Schedule:
    """The actions of each group, with a SENT for each message: where its memory may go.

    Before: 1B0 1SEND_B0>0 1F2 1SEND_F2>2 1B1 ...
    After:  1B0 1SEND_B0>0 1F2 1SEND_F2>2 1SENT_B0>0 1B1 ...

    A group knows that another one has computed with what it sent when it takes what the other sent after that. So SENT
    stands before the first compute action that takes such a thing, and waits for nothing that this does not wait for;
    at the end of the list where nothing shows that the message has arrived.
    """
    places = {action: (group, at) for group, own in enumerate(schedule) for at, action in enumerate(own)}
    return tuple(tuple(_released(own, group, places, schedule)) for group, own in enumerate(schedule))


_Places = Mapping[Action, tuple[int, int]]


def _released(own: Sequence[Action], group: int, places: _Places, schedule: Schedule) -> Iterator[Action]:
    shown: dict[int, list[int | None]] = {}
    before: dict[int | None, list[Action]] = {}
    for action in own:
        taken = _place_of_taking(action, places)
        if taken is None:
            continue
        other, behind = taken
        if other not in shown:
            shown[other] = _shown(schedule[other], group, places)
        before.setdefault(shown[other][behind], []).append(action._replace(op=_SENT[action.op]))
    for at, action in enumerate(own):
        yield from before.get(at, ())
        yield action
    yield from before.get(None, ())


def _shown(other: Sequence[Action], group: int, places: _Places) -> list[int | None]:
    """For each place of another group: where this one computes first with anything that is sent behind it."""
    found: list[int | None] = [None] * len(other)
    first: int | None = None
    for at in range(len(other) - 1, -1, -1):
        found[at] = first
        taken = _place_of_taking(other[at], places)
        if taken is not None and taken[0] == group:
            first = taken[1] if first is None else min(first, taken[1])
    return found


def _place_of_taking(send: Action, places: _Places) -> tuple[int, int] | None:
    """The group and the place of the compute action that takes a message; None for what is no such message."""
    if send.op not in SENDS or send.peer is None:
        return None
    takers = (Action(send.peer, op, send.microbatch) for op in _TAKEN_BY.get(send.op, ()))
    return next((places[taker] for taker in takers if taker in places), None)
