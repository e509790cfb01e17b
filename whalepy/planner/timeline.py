"""All ranks of one step played together: who computes, who waits for whom, and when the step ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.forecast import Span, SpanKind
from whalepy.planner.work import Event, Rehearsal

Coordinates = tuple[int, ...]


@dataclass
class RankTrack:
    """What one rank did in the step, and when."""

    clock: float = 0.0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    """For other ranks to arrive at a collective."""
    bridge_s: float = 0.0
    gradient_s: float = 0.0
    spans: list[Span] = field(default_factory=list[Span])
    memory: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])


@dataclass(frozen=True)
class Played:
    """A step of all ranks."""

    step_s: float
    tracks: tuple[RankTrack, ...]
    """By rank."""


def play(
    mesh: Sequence[int],
    rank_of: Sequence[int],
    works: Mapping[int, Rehearsal],
    costs: Mapping[int, DeviceCost],
    network: Network,
) -> Played:
    """Play the events of every rank; a collective starts when its last member arrives."""
    places = dict(zip(rank_of, product(*map(range, mesh)), strict=True))
    members = _members(places)
    tracks = {rank: RankTrack() for rank in rank_of}
    position = dict.fromkeys(rank_of, 0)
    waiting: dict[tuple[int, Coordinates], dict[int, Event]] = defaultdict(dict)
    ready = list(rank_of)
    beside = {level: _beside(level, members, network) for level in range(len(mesh))}
    while ready:
        rank = ready.pop()
        event = _compute(works[rank].events, position, rank, tracks[rank], costs[rank])
        if event is None:
            continue
        group = event.level, _without(places[rank], event.level)
        waiting[group][rank] = event
        if len(waiting[group]) == len(members[group]):
            arrived = waiting.pop(group)
            _communicate(arrived, tracks, network, beside[event.level])
            ready.extend(sorted(arrived, reverse=True))
    end = max(track.clock for track in tracks.values())
    return Played(end, tuple(tracks[rank] for rank in sorted(tracks)))


def _members(places: Mapping[int, Coordinates]) -> dict[tuple[int, Coordinates], list[int]]:
    found: dict[tuple[int, Coordinates], list[int]] = defaultdict(list)
    for rank, at in sorted(places.items()):
        for level in range(len(at)):
            found[level, _without(at, level)].append(rank)
    return found


def _without(at: Coordinates, level: int) -> Coordinates:
    return (*at[:level], -1, *at[level + 1 :])


def _beside(level: int, members: Mapping[tuple[int, Coordinates], Sequence[int]], network: Network) -> int:
    """How many groups of a level cross out of the same node at once, at most."""
    crossing: dict[int, int] = defaultdict(int)
    for (of, _), ranks in members.items():
        nodes = {network.cluster.devices[network.device_of[rank]].node for rank in ranks}
        if of == level and len(nodes) > 1:
            for node in nodes:
                crossing[node] += 1
    return max(crossing.values(), default=1)


def _compute(
    events: Sequence[Event], position: dict[int, int], rank: int, track: RankTrack, cost: DeviceCost
) -> Event | None:
    """Run the operators of a rank up to its next collective, which is returned; None at the end of the step."""
    for k in range(position[rank], len(events)):
        event = events[k]
        if event.collective:
            position[rank] = k + 1
            return event
        seconds = cost.seconds(event)
        _add_span(track, _KINDS[event.phase], event.name, seconds)
        track.busy_s += seconds
        track.memory.append((track.clock, event.peak))
        track.clock += seconds
    position[rank] = len(events)
    return None


_KINDS: Mapping[str, SpanKind] = {
    "forward": "forward",
    "backward": "backward",
    "gradient": "gradient",
    "optimizer": "optimizer",
}


def _communicate(arrived: Mapping[int, Event], tracks: Mapping[int, RankTrack], network: Network, beside: int) -> None:
    start = max(tracks[rank].clock for rank in arrived)
    longest = max(arrived.values(), key=lambda event: event.bytes)
    seconds = network.seconds(longest, sorted(arrived), beside)
    for rank, event in arrived.items():
        track = tracks[rank]
        track.waiting_s += start - track.clock
        track.clock = start
        gradient = event.phase == "gradient"
        _add_span(track, "gradient" if gradient else "bridge", event.collective, seconds)
        track.memory.append((track.clock, event.peak))
        track.clock += seconds
        if gradient:
            track.gradient_s += seconds
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
