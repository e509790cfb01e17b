"""Ranks that do the same at the same moments, so that a step of thousands of ranks is played with a few of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from whalepy.planner.cost import Network, Route

Coordinates = tuple[int, ...]
Key = TypeVar("Key", int, tuple[int, Coordinates])


@dataclass(frozen=True)
class Classes:
    """Ranks in classes; the group of a level is the same mixture of classes for every rank of a class."""

    of: Mapping[int, int]
    """Rank -> its class, by its lowest rank."""
    groups: Mapping[tuple[int, int], tuple[int, ...]]
    """(class, level) -> the classes in the group of a member, in order."""
    routes: Mapping[tuple[int, int], Route]
    """(class, level) -> what the collectives of that group cross."""


def classes(places: Mapping[int, Coordinates], kind: Mapping[int, Hashable], network: Network) -> Classes:
    """The coarsest classes in which ranks have the same kind and alike groups on every level.

    Found by refinement: classes are cut until the groups of their members hold the same classes.
    """
    levels = len(next(iter(places.values())))
    groups = _groups(places, levels)
    beside = [_beside(level, groups, network) for level in range(levels)]
    routes = {at: network.route(ranks, beside[at[0]]) for at, ranks in groups.items()}
    of = _numbered(kind)
    while True:
        signatures = _numbered(
            {at: (routes[at], frozenset(of[rank] for rank in ranks)) for at, ranks in groups.items()}
        )
        seen = {
            rank: (of[rank], *(signatures[k, _without(at, k)] for k in range(levels))) for rank, at in places.items()
        }
        finer = _numbered(seen)
        if len(set(finer.values())) == len(set(of.values())):
            break
        of = finer
    heads = sorted(set(of.values()))
    keys = {(head, k): (k, _without(places[head], k)) for head in heads for k in range(levels)}
    return Classes(
        of,
        {at: tuple(sorted({of[rank] for rank in groups[key]})) for at, key in keys.items()},
        {at: routes[key] for at, key in keys.items()},
    )


def _numbered(kind: Mapping[Key, Hashable]) -> dict[Key, Key]:
    """Each with the lowest one of its kind."""
    first: dict[Hashable, Key] = {}
    return {one: first.setdefault(kind[one], one) for one in sorted(kind)}


def _groups(places: Mapping[int, Coordinates], levels: int) -> dict[tuple[int, Coordinates], list[int]]:
    found: dict[tuple[int, Coordinates], list[int]] = defaultdict(list)
    for rank, at in sorted(places.items()):
        for level in range(levels):
            found[level, _without(at, level)].append(rank)
    return found


def _without(at: Coordinates, level: int) -> Coordinates:
    return (*at[:level], -1, *at[level + 1 :])


def _beside(level: int, groups: Mapping[tuple[int, Coordinates], Sequence[int]], network: Network) -> int:
    """How many groups of a level cross out of the same node at once, at most."""
    crossing: dict[int, int] = defaultdict(int)
    for (of, _), ranks in groups.items():
        nodes = {network.node_of(rank) for rank in ranks}
        if of == level and len(nodes) > 1:
            for node in nodes:
                crossing[node] += 1
    return max(crossing.values(), default=1)
