"""The lists of all groups together: everything is computed once and in order, and no group waits for ever."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from whalepy.errors import VerificationError
from whalepy.planner.schedule.actions import MESSAGES, ONCE, RECEIVES, SENDS, SENT, Action, Crossing, Lending, partner
from whalepy.planner.schedule.findings import (
    FIX,
    MessagesOutOfOrder,
    MissingAction,
    ReceiveWithoutSend,
    RepeatedAction,
    SendWithoutReceive,
    UnexpectedAction,
    UsedBeforeReceived,
    WaitCycle,
)
from whalepy.planner.schedule.hosting import Link, checked_hosts, link
from whalepy.planner.schedule.messages import Message as Message
from whalepy.planner.schedule.messages import verify_messages as verify_messages
from whalepy.planner.schedule.owed import Owed, owed, rules
from whalepy.planner.schedule.waits import send_of, stuck

Groups = Sequence[Sequence[Action]]


def verify(
    actions: Groups,
    hosts: Sequence[Sequence[int]],
    crossings: Sequence[Crossing],
    lendings: Sequence[Lending],
    microbatches: int,
    trained: Collection[int] | None = None,
) -> None:
    """Check the schedule of all groups before any of them runs.

    Every stage computes every microbatch once, with a backward if it is `trained` (None: all are), on the group that
    hosts it; sends and receives are those of the crossings and lendings, each with its other side; what must stand
    behind something does; between two groups receives come in the order of the sends; and no groups wait in a circle.
    Raises a subclass of VerificationError, see `findings`: the first finding, in the order above.
    """
    checked = checked_hosts(hosts)
    due = owed(checked, crossings, lendings, microbatches, trained)
    _check_groups(actions, checked)
    for group, own in enumerate(actions):
        _check_own(own, due, checked[group], group)
    everything = {action for own in actions for action in own}
    _check_computes(everything, due, checked)
    _check_pairs(actions, everything)
    _check_messages(actions, everything, due)
    for group, own in enumerate(actions):
        _check_order(own, due, f"group {group}")
    _check_links(actions)
    _check_waits(actions)


def _check_groups(actions: Groups, hosts: Sequence[Sequence[int]]) -> None:
    if len(actions) != len(hosts):
        raise _error(MissingAction, f"{len(actions)} lists of actions for {len(hosts)} groups")


def _check_own(own: Sequence[Action], due: Owed, stages: Sequence[int], group: int) -> None:
    """Each action once, on the group of its stage, in a form that its kind has."""
    seen: set[Action] = set()
    for action in own:
        if action in seen:
            raise _error(RepeatedAction, f"group {group} has {action} twice")
        seen.add(action)
        if action.stage not in stages:
            hosted = ", ".join(map(str, stages))
            raise _error(UnexpectedAction, f"group {group} has {action}, but hosts only stage {hosted}")
        if action.op in MESSAGES:
            continue
        if action.op != "REDUCE" and action.microbatch not in range(due.microbatches):
            raise _error(UnexpectedAction, f"group {group} has {action}, but there are {due.microbatches} microbatches")
        if action.op not in ("F", "SENT_F") and action.stage not in due.trained:
            raise _error(UnexpectedAction, f"group {group} has {action}, but stage {action.stage} runs no backward")


def _check_computes(everything: Collection[Action], due: Owed, hosts: Sequence[Sequence[int]]) -> None:
    for group, stages in enumerate(hosts):
        for stage in stages:
            for microbatch in range(due.microbatches):
                _check_compute(everything, due, group, stage, microbatch)
            if stage in due.trained and Action(stage, "REDUCE") not in everything:
                raise _error(MissingAction, f"group {group} lacks {Action(stage, 'REDUCE')}")


def _check_compute(everything: Collection[Action], due: Owed, group: int, stage: int, microbatch: int) -> None:
    forward, whole, inputs, weights = (
        Action(stage, "F", microbatch), Action(stage, "B", microbatch),
        Action(stage, "I", microbatch), Action(stage, "W", microbatch),
    )  # fmt: skip
    if forward not in everything:
        raise _error(MissingAction, f"group {group} lacks {forward}")
    if stage not in due.trained:
        return
    parts = [part for part in (inputs, weights) if part in everything]
    if whole in everything and parts:
        raise _error(RepeatedAction, f"group {group} has both {whole} and {parts[0]}")
    if whole not in everything and len(parts) < 2:
        missing = whole if not parts else weights if parts == [inputs] else inputs
        raise _error(MissingAction, f"group {group} lacks {missing}")


def _check_pairs(actions: Groups, everything: Collection[Action]) -> None:
    for group, own in enumerate(actions):
        for action in own:
            if action.op not in MESSAGES:
                continue
            other = _other_side(action, group)
            if other not in everything:
                kind = SendWithoutReceive if action.op in SENDS else ReceiveWithoutSend
                raise _error(kind, f"group {group} has {action}, but no group has {other}")


def _other_side(action: Action, group: int) -> Action:
    if action.peer is None or (action.microbatch is None) != (action.op in ONCE):
        raise _error(UnexpectedAction, f"group {group} has {action}, which is no message between two stages")
    return partner(action)


def _check_messages(actions: Groups, everything: Collection[Action], due: Owed) -> None:
    for action in _messages(actions, sends=True):
        if action not in due.sends:
            raise _error(UnexpectedAction, f"{action} is sent, but nothing asks for it")
    for action in (action for own in actions for action in own if action.op in SENT):
        if send_of(action) not in due.sends:
            raise _error(UnexpectedAction, f"there is {action}, but nothing asks for {send_of(action)}")
    for send in due.sends:
        if send not in everything:
            raise _error(UsedBeforeReceived, f"{send} is never sent, and {partner(send)} never received")


def _check_order(own: Sequence[Action], due: Owed, where: str) -> None:
    positions = {action: position for position, action in enumerate(own)}
    for position, action in enumerate(own):
        for first, finding, why in rules(action, due):
            if positions.get(first, -1) > position:
                raise _error(finding, f"{where} has {action} before {first}: {why}")


def _check_links(actions: Groups) -> None:
    """Between two groups, and between two stages of one group, receives come in the order of the sends."""
    group_of = {action.stage: group for group, own in enumerate(actions) for action in own}
    sent = _by_link(_messages(actions, sends=True), group_of)
    received = _by_link(_messages(actions, sends=False), group_of)
    for way, sends in sent.items():
        for send, receive in zip(sends, received[way], strict=True):
            if partner(send) != receive:
                raise _error(
                    MessagesOutOfOrder,
                    f"group {group_of[receive.stage]} receives {receive} where group {group_of[send.stage]} "
                    f"sends {send} first",
                )


def _by_link(messages: Iterable[Action], group_of: Mapping[int, int]) -> dict[Link, list[Action]]:
    found: dict[Link, list[Action]] = {}
    for message in messages:
        found.setdefault(link(message, group_of), []).append(message)
    return found


def _messages(actions: Groups, *, sends: bool) -> Iterator[Action]:
    kinds = SENDS if sends else RECEIVES
    return (action for own in actions for action in own if action.op in kinds)


def _check_waits(actions: Groups) -> None:
    heads = stuck(actions)
    if heads:
        texts = [f"group {group} stands at {action} and waits for {send}" for group, action, send in heads]
        raise _error(WaitCycle, "the groups would wait for each other: " + "; ".join(texts))


def _error(kind: type[VerificationError], what: str) -> VerificationError:
    return kind(what, fix=FIX)
