"""Which rank stands on which device of a spec, and the spec that ranks describe by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec, Device, Node
from whalepy.hardware.devices import DeviceProfile, profile_table
from whalepy.hardware.links import UNKNOWN_NETWORK_BANDWIDTH
from whalepy.hardware.measured import BY_RANKS, Measured, refined, unknown_profile
from whalepy.hardware.own_profiles import profile_dict
from whalepy.hardware.profiles import profile, unknown_device_fix

# Measured speeds of one type within this fraction of the fastest are the same speed: two runs differ by about as much.
SPEED_NOISE = 0.1

# Free memory is rounded down to this many bytes, so that a few MiB more or less do not make another plan.
MEMORY_STEP_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RankReport:
    """What one rank says of itself; plain data, to be gathered over all ranks."""

    host: str
    type: str  # the name of a known profile, else what torch calls the device
    memory_bytes: int  # free at start
    local_rank: int
    speed: float | None = None  # measured float32 FLOP/s
    measured: Measured | None = None


def match_ranks(spec: ClusterSpec, reports: Sequence[RankReport]) -> tuple[int, ...]:
    """The device index for each rank, every device once; `reports[i]` is that of rank i.

    Devices are matched by type and node, never by rank number. A host stands for a node with the same types; among
    nodes alike the first host meets the first node. Among equal type and node, spec order meets local-rank order;
    where all of them measured their speed, faster meets faster first. CPU ranks on one host may stand for a CPU spec
    of several nodes. Raises ClusterError listing both sides when nothing fits.
    """
    found: dict[int, int] = {}
    for devices, ranks in _pair_hosts(spec, reports):
        for kind in dict.fromkeys(map(_reported_type, devices)):
            slots = [device for device in devices if _reported_type(device) == kind]
            group = [rank for rank in ranks if reports[rank].type == kind]
            group.sort(key=lambda rank: (reports[rank].local_rank, rank))
            pairs = _pair_by_speed(slots, [d.rate() for d in slots], group, [reports[rank].speed for rank in group])
            found |= {rank: device.index for device, rank in pairs}
    return tuple(found[rank] for rank in range(len(reports)))


def spec_from_reports(reports: Sequence[RankReport]) -> ClusterSpec:
    """The cluster that the ranks describe: a node per host in order of its first rank, devices by local rank.

    Memory is what they have free; figures are what the fastest rank of a type measured, else those of its data sheet.
    With speeds from all ranks, speed factors follow them (differences within one type
    below SPEED_NOISE are none), scaled so that the rank fastest for its type has 1.0. An unknown type needs a measured
    speed. Several hosts are taken to be joined by 10 Gbit/s. Raises ClusterError for an unknown type without speed.
    """
    figures = {name: _profile_of(name, reports) for name in dict.fromkeys(report.type for report in reports)}
    factors = _speed_factors(reports, figures)
    nodes = [_node_entry(ranks, reports, factors) for ranks in _by_host(reports).values()]
    own = {name: found for name, found in figures.items() if found.source == BY_RANKS}
    data: dict[str, Any] = {"nodes": nodes}
    data["profiles"] = {name: profile_dict(found) for name, found in own.items()}
    if len(nodes) > 1:
        data["link"] = {"bandwidth": UNKNOWN_NETWORK_BANDWIDTH, "origin": "assumed"}
    return ClusterSpec.load(data)


_Slot = TypeVar("_Slot")
_Actor = TypeVar("_Actor")
_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)

# --- hosts to nodes -----------------------------------------------------------------------------------------------

_Kinds = tuple[tuple[str, int], ...]


def _pair_hosts(spec: ClusterSpec, reports: Sequence[RankReport]) -> list[tuple[Sequence[Device], Sequence[int]]]:
    """Nodes with the ranks of the host that stands for each."""
    hosts = _by_host(reports)
    if _is_emulated(spec, reports, len(hosts)):
        return [(spec.devices, range(len(reports)))]
    nodes_of = _group(spec.nodes, lambda node: _kinds(map(_reported_type, node.devices)))
    hosts_of = _group(hosts.values(), lambda ranks: _kinds(reports[rank].type for rank in ranks))
    if {kinds: len(nodes) for kinds, nodes in nodes_of.items()} != {kinds: len(own) for kinds, own in hosts_of.items()}:
        raise _mismatch(spec, reports)
    pairs: list[tuple[Node, list[int]]] = []
    for kinds, nodes in nodes_of.items():
        node_speeds = [sum(device.rate() for device in node.devices) for node in nodes]
        host_speeds = [_total_speed(ranks, reports) for ranks in hosts_of[kinds]]
        pairs.extend(_pair_by_speed(nodes, node_speeds, hosts_of[kinds], host_speeds))
    return [(node.devices, ranks) for node, ranks in pairs]


def _is_emulated(spec: ClusterSpec, reports: Sequence[RankReport], hosts: int) -> bool:
    """Whether CPU ranks on one host play a CPU cluster of several nodes."""
    only_cpu = all(device.profile.vendor == "CPU" for device in spec.devices)
    return only_cpu and hosts == 1 and _kinds(map(_reported_type, spec.devices)) == _kinds(r.type for r in reports)


def _by_host(reports: Sequence[RankReport]) -> dict[str, list[int]]:
    """The ranks of each host; hosts in order of their first rank, ranks by local rank."""
    hosts = _group(range(len(reports)), lambda rank: reports[rank].host)
    return {host: sorted(ranks, key=lambda rank: (reports[rank].local_rank, rank)) for host, ranks in hosts.items()}


def _reported_type(device: Device) -> str:
    """What a rank on this device says its type is: a profile of the user's own may stand for a known card."""
    return type_name(device.profile.torch_name) if device.profile.torch_name else device.type


def type_name(torch_name: str) -> str:
    """The name of the profile that torch's name for a device means, or that name itself where none is known."""
    try:
        return profile(torch_name).name
    except ClusterError:
        return torch_name


def _kinds(types: Iterable[str]) -> _Kinds:
    return tuple(sorted(Counter(types).items()))


def _mismatch(spec: ClusterSpec, reports: Sequence[RankReport]) -> ClusterError:
    wanted = [(f"node {node.index}", _kinds(map(_reported_type, node.devices))) for node in spec.nodes]
    started = [(host, _kinds(reports[rank].type for rank in ranks)) for host, ranks in _by_host(reports).items()]
    what = f"the ranks do not match the cluster\n  spec:  {_side(wanted)}\n  ranks: {_side(started)}"
    fix = "start one rank per device of the spec, on hosts with the same types as its nodes, or change the spec"
    return ClusterError(what, fix=fix)


def _side(places: Sequence[tuple[str, _Kinds]]) -> str:
    return "; ".join(f"{place}: {' + '.join(f'{count}x{kind}' for kind, count in kinds)}" for place, kinds in places)


# --- speeds -------------------------------------------------------------------------------------------------------


def _pair_by_speed(
    slots: Sequence[_Slot], slot_speeds: Sequence[float], actors: Sequence[_Actor], speeds: Sequence[float | None]
) -> list[tuple[_Slot, _Actor]]:
    """Slots with actors: faster with faster where the measured speeds tell actors apart, else in order."""
    measured = [speed for speed in speeds if speed is not None]
    steady = _steady(measured)
    if len(measured) == len(actors) and len(set(steady)) > 1:
        slots = [slots[i] for i in sorted(range(len(slots)), key=lambda i: -slot_speeds[i])]
        actors = [actors[i] for i in sorted(range(len(actors)), key=lambda i: -steady[i])]
    return list(zip(slots, actors, strict=True))


def _total_speed(ranks: Sequence[int], reports: Sequence[RankReport]) -> float | None:
    speeds = [reports[rank].speed for rank in ranks]
    return None if None in speeds else sum(speed for speed in speeds if speed is not None)


def _steady(speeds: Sequence[float]) -> list[float]:
    """The speeds with noise taken out: from the fastest down, those within SPEED_NOISE of a first get its speed."""
    steady = [0.0] * len(speeds)
    first = 0.0
    for i in sorted(range(len(speeds)), key=lambda i: -speeds[i]):
        if speeds[i] < first * (1 - SPEED_NOISE) or not first:
            first = speeds[i]
        steady[i] = first
    return steady


def _speed_factors(reports: Sequence[RankReport], figures: dict[str, DeviceProfile]) -> list[float]:
    """Speed of each rank relative to its type's figures, the largest 1.0; all 1.0 unless every rank measured."""
    factors = [1.0] * len(reports)
    if any(report.speed is None for report in reports):
        return factors
    for kind, figure in figures.items():
        ranks = [rank for rank, report in enumerate(reports) if report.type == kind]
        steady = _steady([reports[rank].speed or 0.0 for rank in ranks])
        for rank, speed in zip(ranks, steady, strict=True):
            factors[rank] = speed / figure.fp32
    return [float(f"{factor / max(factors):.3g}") for factor in factors]


# --- from reports to a spec ---------------------------------------------------------------------------------------


def _profile_of(kind: str, reports: Sequence[RankReport]) -> DeviceProfile:
    """The known profile of a type, refined by the fastest of its ranks that measured; else one made of that alone."""
    own = [report for report in reports if report.type == kind]
    measured = max((report.measured for report in own if report.measured), key=Measured.rate, default=None)
    known = profile_table().get(kind)
    if known is None:
        fp32 = max((report.speed for report in own if report.speed), default=None)
        if fp32 is None:
            raise ClusterError(f"unknown device {kind!r}, and no rank measured its speed", fix=unknown_device_fix(kind))
        known = unknown_profile(kind, _stepped(max(report.memory_bytes for report in own)), fp32)
    return known if measured is None else refined(known, measured)


def _node_entry(ranks: Sequence[int], reports: Sequence[RankReport], factors: Sequence[float]) -> dict[str, Any]:
    devices = [
        {"type": reports[rank].type, "speed": factors[rank], "memory_bytes": _stepped(reports[rank].memory_bytes)}
        for rank in ranks
    ]
    return {"devices": devices}


def _stepped(free_bytes: int) -> int:
    return free_bytes // MEMORY_STEP_BYTES * MEMORY_STEP_BYTES or free_bytes


def _group(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items by key, keys in order of first appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
