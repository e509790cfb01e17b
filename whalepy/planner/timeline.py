"""All ranks of one step played together: who computes, who waits for whom, and when the step ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product

from whalepy.errors import VerificationError
from whalepy.planner.alike import Classes, classes
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.forecast import REPORT, Span, SpanKind
from whalepy.planner.work import Event, Part, Rehearsal, Stretch, Wait

WAITING = "waiting for parameters or gradients"
STEADY = 4
"""Repeats of a stretch that are played; the others take as long as the last of these."""


@dataclass
class RankTrack:
    """What one rank did in the step, and when."""

    clock: float = 0.0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    """For other ranks to arrive at a collective."""
    bridge_s: float = 0.0
    """Bridges that no operator hides."""
    gradient_s: float = 0.0
    """Collectives of parameters and gradients that no operator hides."""
    gradient_total_s: float = 0.0
    """The same, hidden or not."""
    spans: list[Span] = field(default_factory=list[Span])
    memory: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    beside: list[Span] = field(default_factory=list[Span])
    """Collectives that run beside the operators."""


@dataclass(frozen=True)
class Played:
    """A step of all ranks."""

    step_s: float
    tracks: tuple[RankTrack, ...]
    """By rank; ranks that do the same share one."""


def play(
    mesh: Sequence[int],
    rank_of: Sequence[int],
    works: Mapping[int, Rehearsal],
    costs: Mapping[int, DeviceCost],
    network: Network,
) -> Played:
    """Play the parts of every rank; a collective starts when its last member arrives."""
    places = dict(zip(rank_of, product(*map(range, mesh)), strict=True))
    kinds = {rank: (id(works[rank]), costs[rank].device.profile, costs[rank].device.speed) for rank in rank_of}
    found = classes(places, kinds, network)
    heads = sorted(set(found.of.values()))
    players = {head: _Player(head, costs[head], found) for head in heads}
    _play({head: works[head].parts for head in heads}, players)
    end = max(player.track.clock for player in players.values())
    return Played(end, tuple(players[found.of[rank]].track for rank in sorted(rank_of)))


@dataclass
class _Side:
    """A collective beside the operators: when it was asked for and, once its last member has asked, when it ends."""

    event: Event
    asked_s: float
    start_s: float = 0.0
    end_s: float | None = None


@dataclass
class _Player:
    """One class of ranks as it goes through a step."""

    head: int
    cost: DeviceCost
    classes: Classes
    track: RankTrack = field(default_factory=RankTrack)
    side: list[_Side] = field(default_factory=list[_Side])
    side_clock: float = 0.0
    counts: dict[int, int] = field(default_factory=dict[int, int])
    """Collectives asked for, by level."""


_Group = tuple[int, tuple[int, ...]]
_Rows = Sequence[Event | Wait]


def _play(parts: Mapping[int, Sequence[Part]], players: Mapping[int, _Player]) -> None:
    """Rows run together; a stretch is played a few times, and the rest of its time is added."""
    each = {head: [list(rows) for _, rows in groupby(own, lambda part: isinstance(part, Stretch))]
            for head, own in parts.items()}  # fmt: skip
    forms = {tuple(map(_repeats, own)) for own in each.values()}
    if len(forms) > 1:
        raise VerificationError("ranks repeat different parts of the step", fix=REPORT)
    for k, repeated in enumerate(forms.pop()):
        if not repeated:
            _run({head: own[k] for head, own in each.items()}, players)  # type: ignore[arg-type]
            continue
        for stretches in zip(*(own[k] for own in each.values()), strict=True):
            _repeat(dict(zip(each, stretches, strict=True)), players)  # type: ignore[arg-type]


def _repeats(parts: Sequence[Part]) -> tuple[int, ...]:
    return tuple(part.repeats for part in parts if isinstance(part, Stretch))


def _repeat(stretches: Mapping[int, Stretch], players: Mapping[int, _Player]) -> None:
    repeats = next(iter(stretches.values())).repeats
    parts = {head: stretch.parts for head, stretch in stretches.items()}
    for _ in range(min(repeats, STEADY) - 1):
        _play(parts, players)
    before = {head: _state(player) for head, player in players.items()}
    _play(parts, players)
    if repeats > STEADY:
        for head, player in players.items():
            _extend(player, before[head], repeats - STEADY, stretches[head].grows)


_FIGURES = ("busy_s", "waiting_s", "bridge_s", "gradient_s", "gradient_total_s")


_State = tuple[float, float, int, int, int, list[float]]
_SPANS = 400
"""Spans that the repeats of a stretch are drawn with at most."""


def _state(player: _Player) -> _State:
    track = player.track
    figures = [getattr(track, name) for name in _FIGURES]
    return track.clock, player.side_clock, len(track.spans), len(track.beside), len(track.memory), figures


def _extend(player: _Player, before: _State, times: int, grows: int) -> None:
    """As if the last repeat had come so many times more."""
    clock, side_clock, spans, beside, points, figures = before
    track = player.track
    longer = times * (track.clock - clock)
    _draw(track.spans, spans, track.clock - clock, times)
    _draw(track.beside, beside, track.clock - clock, times)
    _remember(track.memory, points, track.clock - clock, times, grows)
    later = times * (player.side_clock - side_clock)
    for side in player.side:
        if side.end_s is not None and side.end_s > track.clock:
            taken = side.end_s - max(side.start_s, side.asked_s)
            side.asked_s, side.end_s = side.asked_s + longer, max(side.end_s + later, side.asked_s + longer + taken)
    track.clock += longer
    player.side_clock = max([player.side_clock + later, *(side.end_s or 0.0 for side in player.side)])
    for name, was in zip(_FIGURES, figures, strict=True):
        setattr(track, name, getattr(track, name) + times * (getattr(track, name) - was))


def _draw(spans: list[Span], since: int, seconds: float, times: int) -> None:
    """The spans of the last repeat again, or one that stands for all where they would be too many."""
    last = spans[since:]
    if last and len(last) * times <= _SPANS:
        for k in range(1, times + 1):
            spans += [replace(s, start_s=s.start_s + k * seconds, end_s=s.end_s + k * seconds) for s in last]
    elif spans:
        spans[-1] = replace(spans[-1], end_s=spans[-1].end_s + times * seconds)


def _remember(memory: list[tuple[float, int]], since: int, seconds: float, times: int, grows: int) -> None:
    """The largest of the memory of the last repeat, once for each further one."""
    last = memory[since:]
    if last:
        at, most = max(last, key=lambda point: point[1])
        memory += [(at + k * seconds, most + k * grows) for k in range(1, times + 1)]


# -- rows without repeats


def _run(rows: Mapping[int, _Rows], players: Mapping[int, _Player]) -> None:
    position = dict.fromkeys(rows, 0)
    waiting: dict[_Group, dict[int, Event]] = {}
    sides: dict[tuple[_Group, int], dict[int, _Side]] = {}
    ready = sorted(rows, reverse=True)
    asleep: dict[int, _Side] = {}
    while ready:
        head = ready.pop()
        player = players[head]
        stop = _advance(rows[head], position, player, sides, players)
        if isinstance(stop, _Side):
            asleep[head] = stop
        elif stop is not None:
            group = _group(player, stop.level)
            waiting.setdefault(group, {})[head] = stop
            if len(waiting[group]) == len(group[1]):
                arrived = waiting.pop(group)
                _communicate(arrived, players)
                ready.extend(sorted(arrived, reverse=True))
        awake = sorted(head for head, side in asleep.items() if side.end_s is not None)
        for head in awake:
            del asleep[head]
        ready.extend(reversed(awake))


def _group(player: _Player, level: int) -> _Group:
    return level, player.classes.groups[player.head, level]


def _advance(
    rows: _Rows,
    position: dict[int, int],
    player: _Player,
    sides: dict[tuple[_Group, int], dict[int, _Side]],
    players: Mapping[int, _Player],
) -> Event | _Side | None:
    """Run the rows up to a collective that all must reach, or one beside that has not begun; None at the end."""
    for k in range(position[player.head], len(rows)):
        row = rows[k]
        if isinstance(row, Wait):
            if (late := _wait(row, player)) is not None:
                position[player.head] = k
                return late
        elif not row.collective:
            _compute(row, player)
        elif row.beside:
            _ask(row, player, sides, players)
        else:
            position[player.head] = k + 1
            return row
    position[player.head] = len(rows)
    return None


def _compute(event: Event, player: _Player) -> None:
    seconds, track = player.cost.seconds(event), player.track
    _add_span(track, event.phase, event.name, seconds)
    track.busy_s += seconds
    track.memory.append((track.clock, event.peak))
    track.clock += seconds


def _ask(
    event: Event,
    player: _Player,
    sides: dict[tuple[_Group, int], dict[int, _Side]],
    players: Mapping[int, _Player],
) -> None:
    """Ask for a collective beside the operators; the last member to ask starts it."""
    side = _Side(event, player.track.clock)
    player.side.append(side)
    group = _group(player, event.level)
    number = player.counts[event.level] = player.counts.get(event.level, 0) + 1
    sides.setdefault((group, number), {})[player.head] = side
    while started := [key for key, asked in sides.items() if _may_start(key[0], asked, players)]:
        for key in started:
            _start(sides.pop(key), players)


def _may_start(group: _Group, asked: Mapping[int, _Side], players: Mapping[int, _Player]) -> bool:
    """Whether all members have asked, and what each asked for before has begun: a device runs them in order."""
    if len(asked) < len(group[1]):
        return False
    return all(next(s for s in players[head].side if s.end_s is None) is side for head, side in asked.items())


def _start(asked: Mapping[int, _Side], players: Mapping[int, _Player]) -> None:
    head, first = next(iter(asked.items()))
    start = max(max(one.asked_s for one in asked.values()), max(players[head].side_clock for head in asked))
    route = players[head].classes.routes[head, first.event.level]
    seconds = route.seconds(first.event.collective, max(one.event.bytes for one in asked.values()))
    for head, one in asked.items():
        one.start_s, one.end_s = start, start + seconds
        players[head].side_clock = one.end_s
        players[head].track.gradient_total_s += seconds
        if seconds:
            players[head].track.beside.append(Span(start, one.end_s, "gradient", one.event.name))


def _wait(wait: Wait, player: _Player) -> _Side | None:
    """Wait for collectives beside the operators; the one that has no end yet, if there is one."""
    pending = player.side[: max(len(player.side) - wait.outstanding, 0)]
    for side in pending:
        if side.end_s is None:
            return side
    end = max((side.end_s or 0.0 for side in pending), default=0.0)
    late = end - player.track.clock
    if late > 0:
        _add_span(player.track, "gradient", WAITING, late)
        player.track.gradient_s += late
        player.track.clock = end
    del player.side[: len(pending)]
    return None


def _communicate(arrived: Mapping[int, Event], players: Mapping[int, _Player]) -> None:
    """A collective that all members stop for."""
    start = max(players[head].track.clock for head in arrived)
    longest = max(arrived.values(), key=lambda event: event.bytes)
    for head, event in arrived.items():
        player = players[head]
        track, route = player.track, player.classes.routes[head, event.level]
        seconds = route.seconds(longest.collective, longest.bytes)
        track.waiting_s += start - track.clock
        track.clock = start
        gradient = event.phase in ("gradient", "optimizer")
        _add_span(track, "gradient" if gradient else "bridge", event.collective, seconds)
        track.memory.append((track.clock, event.peak))
        track.clock += seconds
        if gradient:
            track.gradient_s += seconds
            track.gradient_total_s += seconds
        else:
            track.bridge_s += seconds


def _add_span(track: RankTrack, kind: SpanKind, name: str, seconds: float) -> None:
    """Neighbours of one kind are one span: a lane shows phases, not thousands of operators."""
    start, end = track.clock, track.clock + seconds
    last = track.spans[-1] if track.spans else None
    if last is not None and last.kind == kind and start - last.end_s <= 1e-12:
        track.spans[-1] = Span(last.start_s, end, kind, last.name)
    else:
        track.spans.append(Span(start, end, kind, name))
