"""A schedule played with given durations: when each action starts and ends, who is idle, what is in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from whalepy.planner.schedule.actions import MESSAGES, RECEIVES, SENDS, SENT, Action, Op, partner
from whalepy.planner.schedule.findings import FIX, WaitCycle
from whalepy.planner.schedule.hosting import Link, link
from whalepy.planner.schedule.waits import waits

Durations = Callable[[Action], float]
"""Seconds of a compute action or a REDUCE on its group, of a send on the wire. Nothing else takes any of its own."""


@dataclass(frozen=True)
class Timed:
    """An action in time: a send while it is on the wire, a receive from its post until the value has arrived."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulated:
    """One step of all groups."""

    timed: tuple[tuple[Timed, ...], ...]
    """Per group, in the order of its list."""
    step_s: float
    busy_s: tuple[float, ...]
    """Per group, in compute actions and REDUCE."""
    in_flight: Mapping[int, int]
    """Per stage, the most microbatches whose forward is done and whose backward (B, or W where it is apart) is not."""

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Per group, the seconds of the step in which it does nothing."""
        return tuple(self.step_s - busy for busy in self.busy_s)

    @property
    def bubble(self) -> float:
        """The share of the step in which a group does nothing, over all groups."""
        return sum(self.bubble_s) / (len(self.busy_s) * self.step_s) if self.step_s else 0.0


def simulate(actions: Sequence[Sequence[Action]], durations: Durations) -> Simulated:
    """Play the lists of all groups.

    A group does its compute actions and REDUCE one after the other; each starts when what it needs has arrived. A
    message is on the wire as soon as it is sent, its receive is posted (both sides have to be there: gloo and NCCL
    send no earlier), and the message before it from that group to the other one has arrived. Within a group it takes
    no time. Raises WaitCycle if the groups do not come to their end.
    """
    played = _Played(actions, durations)
    played.run()
    timed = tuple(tuple(own) for own in played.timed())
    step = max((each.end_s for own in timed for each in own), default=0.0)
    busy = tuple(sum(each.end_s - each.start_s for each in own if _occupies(each.action)) for own in timed)
    return Simulated(timed, step, busy, in_flight(actions))


def in_flight(actions: Sequence[Sequence[Action]]) -> dict[int, int]:
    """Per stage, the most microbatches whose forward is done and whose backward is not; 0 where none is to come."""
    most = {action.stage: 0 for own in actions for action in own}
    for own in actions:
        releases = _releases(own)
        held = dict.fromkeys(most, 0)
        for action in own:
            if action.op == "F" and action.stage in releases:
                held[action.stage] += 1
                most[action.stage] = max(most[action.stage], held[action.stage])
            elif action.op == releases.get(action.stage):
                held[action.stage] -= 1
    return dict(sorted(most.items()))


def _releases(own: Sequence[Action]) -> dict[int, Op]:
    """After which action a stage needs nothing more of a microbatch."""
    found: dict[int, Op] = {action.stage: "B" for action in own if action.op == "B"}
    found.update({action.stage: "W" for action in own if action.op == "W"})
    return found


def _occupies(action: Action) -> bool:
    return action.op not in MESSAGES and action.op not in SENT


@dataclass
class _Wire:
    """The messages of one link, in order."""

    free_s: float = 0.0
    """When the last message has arrived."""
    queue: deque[Action] = field(default_factory=deque[Action])
    """Sent, not yet on the wire."""


def _sends(messages: Sequence[Action]) -> tuple[Action, ...]:
    return tuple(message if message.op in SENDS else partner(message) for message in messages)


class _Played:
    """All groups as they go through their lists."""

    def __init__(self, actions: Sequence[Sequence[Action]], durations: Durations) -> None:
        self.actions = actions
        self.durations = durations
        self.needs = [[_sends(needs) for needs in waits(own)] for own in actions]
        """What an action waits for, as sends: one has its span once both sides are there."""
        self.group_of = {action.stage: group for group, own in enumerate(actions) for action in own}
        self.at = [0] * len(actions)
        self.clock = [0.0] * len(actions)
        self.spans: dict[Action, tuple[float, float]] = {}
        """All actions but receives, once their end is known."""
        self.came: dict[Action, float] = {}
        """When a group came to a send or a receive."""
        self.wires: dict[Link, _Wire] = {}
        self.asleep: dict[Action, int] = {}
        """Groups by the send that they wait for."""

    def run(self) -> None:
        ready = list(reversed(range(len(self.actions))))
        while ready:
            ready.extend(self._advance(ready.pop()))
        for group, own in enumerate(self.actions):
            if self.at[group] < len(own):
                raise WaitCycle(f"group {group} never gets beyond {own[self.at[group]]}", fix=FIX)

    def timed(self) -> list[list[Timed]]:
        return [[self._timed(action) for action in own] for own in self.actions]

    def _timed(self, action: Action) -> Timed:
        if action.op in RECEIVES:
            posted = self.came[action]
            return Timed(action, posted, max(posted, self.spans[partner(action)][1]))
        return Timed(action, *self.spans[action])

    def _advance(self, group: int) -> list[int]:
        """Go on as far as it goes; the groups that can go on because of it."""
        own, awake = self.actions[group], list[int]()
        while self.at[group] < len(own):
            action, needs = own[self.at[group]], self.needs[group][self.at[group]]
            if action.op in MESSAGES and action not in self.came:
                self.came[action] = self.clock[group]
                awake += self._transmit(action)
            late = next((send for send in needs if send not in self.spans), None)
            if late is not None:
                self.asleep[late] = group
                break
            self._finish(group, action, needs)
        return awake

    def _finish(self, group: int, action: Action, needs: Sequence[Action]) -> None:
        start = max([self.clock[group], *(self.spans[send][1] for send in needs)])
        self.clock[group] = start
        if action.op not in MESSAGES:
            self.clock[group] = start + (self.durations(action) if _occupies(action) else 0.0)
            self.spans[action] = start, self.clock[group]
        self.at[group] += 1

    def _transmit(self, action: Action) -> list[int]:
        """Put on the wire what both sides have come to, in the order of the sends; the groups that it wakes."""
        send = action if action.op in SENDS else partner(action)
        way = link(send, self.group_of)
        wire = self.wires.setdefault(way, _Wire())
        if action.op in SENDS:
            wire.queue.append(send)
        woken: list[int] = []
        while wire.queue and (head := wire.queue[0]) and partner(head) in self.came:
            wire.queue.popleft()
            self._carry(head, wire, local=way[0] == way[1])
            if head in self.asleep:
                woken.append(self.asleep.pop(head))
        return woken

    def _carry(self, send: Action, wire: _Wire, *, local: bool) -> None:
        start = max(self.came[send], self.came[partner(send)], 0.0 if local else wire.free_s)
        end = start if local else start + self.durations(send)
        wire.free_s = end
        self.spans[send] = start, end
