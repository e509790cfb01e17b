"""Like devices in groups that hold one copy of a stage, and the orders in which stages may take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
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


def kinds_of(cluster: ClusterSpec) -> dict[Kind, list[int]]:
    """The kinds of device in the order of their first ones, and the indices of those of each."""
    kinds: dict[Kind, list[int]] = {}
    known: dict[tuple[int, float, int], list[int]] = {}
    for device in cluster.devices:
        key = id(device.profile), device.speed, device.memory_bytes  # the hash of a profile takes its time
        if key not in known:
            known[key] = kinds.setdefault(kind_of(device), [])
        known[key].append(device.index)
    return kinds


def units_of(cluster: ClusterSpec, size: int) -> list[list[Unit]]:
    """By kind: groups of so many devices of one node; devices that make up no group are left out."""
    found: list[list[Unit]] = []
    for kind, devices in enumerate(kinds_of(cluster).values()):
        found.append([])
        for node, alike in groupby(devices, key=lambda index: cluster.devices[index].node):
            own = tuple(alike)
            starts = range(0, len(own) - size + 1, size)
            found[kind] += [Unit(kind, node, own[start : start + size]) for start in starts]
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
