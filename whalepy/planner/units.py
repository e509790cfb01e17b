"""Like devices in groups that hold one copy of a stage, and the orders in which stages may take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.hardware.devices import DeviceProfile


class Kind(NamedTuple):
    """What a planner tells devices apart by."""

    profile: DeviceProfile
    speed: float
    memory_bytes: int


@dataclass(frozen=True)
class Unit:
    """Devices of one kind in one node that share the work of one copy of a stage."""

    kind: int
    """Its number among the kinds of the cluster."""
    node: int
    devices: tuple[int, ...]
    """Indices into the cluster."""


def kind_of(device: Device) -> Kind:
    return Kind(device.profile, device.speed, device.memory_bytes)


def kinds_of(cluster: ClusterSpec) -> tuple[Kind, ...]:
    """The kinds of device, in the order of their first ones."""
    return tuple(dict.fromkeys(kind_of(device) for device in cluster.devices))


def units_of(cluster: ClusterSpec, size: int) -> list[list[Unit]]:
    """By kind: groups of so many devices of one node; devices that make up no group are left out."""
    kinds = {kind: number for number, kind in enumerate(kinds_of(cluster))}
    found: list[list[Unit]] = [[] for _ in kinds]
    for node in cluster.nodes:
        alike: dict[int, list[int]] = {}
        for device in node.devices:
            alike.setdefault(kinds[kind_of(device)], []).append(device.index)
        for kind, own in alike.items():
            for start in range(0, len(own) - size + 1, size):
                found[kind].append(Unit(kind, node.index, tuple(own[start : start + size])))
    return found


_MOST_KINDS = 3
"""Of these every order is tried; of more, those by memory, by speed, and as they come."""


def orders_of(kinds: Sequence[Kind], present: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The orders of kinds in which stages may take the units: all of few kinds, in a stated order."""
    if len(present) <= _MOST_KINDS:
        yield from permutations(present)
        return
    ways = (
        tuple(present),
        tuple(sorted(present, key=lambda kind: -kinds[kind].memory_bytes)),
        tuple(sorted(present, key=lambda kind: -_rate(kinds[kind]))),
        tuple(sorted(present, key=lambda kind: _rate(kinds[kind]))),
    )
    yield from dict.fromkeys(ways)


def _rate(kind: Kind) -> float:
    return kind.profile.rate("float32") * kind.speed
