"""What each action of a schedule waits for, and which groups would wait for each other for ever."""

from __future__ import annotations

from collections.abc import Sequence

from whalepy.planner.schedule.actions import MESSAGES, SENT, Action, Op, partner

_RECEIVED: dict[Op, Op] = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B"}


def waits(own: Sequence[Action]) -> list[tuple[Action, ...]]:
    """For each action of a group the messages that it waits for: sends, by the receives in the list.

    A compute action waits for what it needs; a forward also for parameters lent to its stage; RECV_G where it stands;
    SENT for the receive of the other side to be posted; nothing else waits.
    """
    by_need: dict[tuple[int, Op, int | None], list[Action]] = {}
    for action in own:
        if action.op in ("RECV_F", "RECV_B", "RECV_P"):
            by_need.setdefault((action.stage, action.op, action.microbatch), []).append(partner(action))
    return [tuple(_waits(action, by_need)) for action in own]


def send_of(sent: Action) -> Action:
    """The send that a SENT is about."""
    return sent._replace(op=SENT[sent.op])


def _waits(action: Action, by_need: dict[tuple[int, Op, int | None], list[Action]]) -> list[Action]:
    if action.op == "RECV_G":
        return [partner(action)]
    if action.op in SENT:
        return [partner(send_of(action))]
    if action.op not in _RECEIVED:
        return []
    received = by_need.get((action.stage, _RECEIVED[action.op], action.microbatch), [])
    lent = by_need.get((action.stage, "RECV_P", None), []) if action.op == "F" else []
    return [*received, *lent]


Head = tuple[int, Action, Action]
"""A group, the action that it stands at, and the message of another one that this waits for."""


def stuck(schedule: Sequence[Sequence[Action]]) -> tuple[Head, ...]:
    """Groups each of which waits for a message of the next, the last for the first; none if all come to their end.

    A message that is in no list holds up its group alone.
    """
    at, pending = _played(schedule)
    group_of = {action: group for group, own in enumerate(schedule) for action in own if action.op in MESSAGES}
    group = next((group for group, message in enumerate(pending) if message is not None), None)
    path: list[Head] = []
    while group is not None and group not in [head[0] for head in path]:
        message = pending[group]
        if message is None:
            return tuple(path[-1:])
        path.append((group, schedule[group][at[group]], message))
        group = group_of.get(message)
    if group is None:
        return tuple(path[-1:])
    first = [head[0] for head in path].index(group)
    return tuple(path[first:])


def _played(schedule: Sequence[Sequence[Action]]) -> tuple[list[int], list[Action | None]]:
    """How far each group comes, and the message that it waits for there."""
    needs = [waits(own) for own in schedule]
    at, come = [0] * len(schedule), set[Action]()
    pending: list[Action | None] = [None] * len(schedule)
    waiting: dict[Action, list[int]] = {}
    ready = list(range(len(schedule)))
    while ready:
        group = ready.pop()
        own, pending[group] = schedule[group], None
        while at[group] < len(own):
            action, needed = own[at[group]], needs[group][at[group]]
            if needed and (missing := next((message for message in needed if message not in come), None)) is not None:
                pending[group] = missing
                waiting.setdefault(missing, []).append(group)
                break
            if action.op in MESSAGES:
                come.add(action)
                ready.extend(waiting.pop(action, ()))
            at[group] += 1
    return at, pending
