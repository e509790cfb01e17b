"""Seconds of operators and collectives: rooflines for the one, latency and bandwidth for the other."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from whalepy.hardware.cluster import ClusterSpec, Device, Node
from whalepy.hardware.links import Link
from whalepy.planner.work import Event, Rehearsal

LINK_EFFICIENCY = 0.8
"""Part of the bandwidth of a link that collectives reach on long messages."""


@dataclass(frozen=True)
class DeviceCost:
    """How long operators take on one device."""

    device: Device
    known: dict[tuple[int, int, str, str, int], float] = field(
        default_factory=dict[tuple[int, int, str, str, int], float], compare=False
    )

    def seconds(self, event: Event) -> float:
        """Seconds of one operator: its products, its bytes or the host that issues it, whichever take longest.

        The figures are those of the device's profile: measured, else what is taken for its vendor. An operator whose
        seconds were measured takes these.
        """
        if event.seconds is not None:
            return event.seconds / self.device.speed
        key = event.flops, event.bytes, event.dtype, event.kind, event.outputs
        if key not in self.known:
            profile, speed = self.device.profile, self.device.speed
            products = profile.product_seconds(event.flops, event.dtype, event.kind, event.outputs)
            memory = profile.memory_seconds(event.bytes, event.kind)
            self.known[key] = max(products / speed, memory / speed, profile.launch_seconds)
        return self.known[key]

    @property
    def runtime_bytes(self) -> int:
        """What a process keeps on the device beside tensors: context, libraries, communication buffers."""
        return self.device.profile.runtime_memory

    def busy_s(self, work: Rehearsal) -> float:
        """Seconds in which the device computes within a step."""
        return sum(self.seconds(event) * times for event, times in work.weighted if not event.collective)


@dataclass(frozen=True)
class Route:
    """What a collective among the members of one group crosses."""

    members: int
    nodes: int
    inside: float
    """Bytes/s of one member inside its node."""
    inside_latency_s: float
    between: float = math.inf
    """Bytes/s of this group out of one node; of the links of a node only its part."""
    between_latency_s: float = 0.0

    def seconds(self, kind: str, sent: int) -> float:
        """Seconds of a collective in which each member sends so many bytes.

        The members form one ring through all nodes, so each byte that a member sends crosses each tier at most once; a
        tree is taken for an all-reduce where its latency is less. Source: NCCL, src/graph/tuning.cc (commit 01afd20).
        """
        if self.members < 2:
            return 0.0
        ring = (self.members - self.nodes) * self.inside_latency_s + (self.nodes - 1) * self.between_latency_s
        if kind == "all-reduce":
            depth = math.ceil(math.log2(self.members))
            ring = 2 * min(ring, depth * max(self.inside_latency_s, self.between_latency_s))
        return ring + sent / min(self.inside, self.between)

    @property
    def delay_bytes(self) -> int:
        """The bandwidth-delay product: bytes that are summed in the time that an all-reduce of nothing takes."""
        if self.members < 2:
            return 0
        sent = 2 * (self.members - 1) / self.members
        return round(self.seconds("all-reduce", 0) * min(self.inside, self.between) / sent)


@dataclass(frozen=True)
class Network:
    """How long collectives take between ranks on the devices of a cluster."""

    cluster: ClusterSpec
    device_of: Mapping[int, int] | Sequence[int]
    """Rank -> index of its device."""

    def route(self, ranks: Sequence[int], beside: int = 1) -> Route:
        """What a collective among these ranks crosses.

        `beside`: groups of one level whose members share the links of a node and communicate at the same time.
        """
        members = Counter(self.node_of(rank) for rank in ranks)
        inside = [self.cluster.nodes[node] for node in members]
        bandwidth = min(self._inside(node, members[node.index]) for node in inside)
        latency = max(node.link.latency_s for node in inside)
        inter = self.cluster.inter
        if len(members) == 1 or inter is None:
            return Route(len(ranks), 1, bandwidth, latency)
        alone = all(count == 1 for count in members.values())
        within = math.inf if alone else bandwidth
        return Route(len(ranks), len(members), within, latency, reached(inter) / beside, inter.latency_s)

    def delays(self, mesh: Sequence[int], ranks: Sequence[int]) -> tuple[int | None, ...]:
        """Per level of a mesh, the bandwidth-delay product of the group of the first of its ranks, row-major.

        None where a device does not compute while collectives are under way.
        """
        devices = (self.cluster.devices[self.device_of[rank]] for rank in ranks)
        if not all(profile.computes_beside for profile in {id(d.profile): d.profile for d in devices}.values()):
            return (None,) * len(mesh)
        here = sum(self.node_of(rank) == self.node_of(ranks[0]) for rank in ranks)
        found: list[int] = []
        for level, size in enumerate(mesh):
            stride = math.prod(mesh[level + 1 :])
            members = [ranks[k * stride] for k in range(size)]
            inside = sum(self.node_of(rank) == self.node_of(ranks[0]) for rank in members)
            found.append(self.route(members, here // inside).delay_bytes)
        return tuple(found)

    def crossing_s(self, messages: Mapping[tuple[int, int], int]) -> float:
        """Seconds until bytes have gone from ranks to ranks, all at once: those of the link that takes longest.

        A device has a link inside its node of its own; what leaves a node, or comes into one, shares its link.
        """
        busy: defaultdict[tuple[str, int], float] = defaultdict(float)
        latency = 0.0
        for (source, target), size in messages.items():
            one, other = self.node_of(source), self.node_of(target)
            inter = self.cluster.inter
            if one == other or inter is None:
                busy["from device", source] += size / reached(self.cluster.nodes[one].link)
                busy["to device", target] += size / reached(self.cluster.nodes[one].link)
                latency = max(latency, self.cluster.nodes[one].link.latency_s)
            else:
                busy["out of node", one] += size / reached(inter)
                busy["into node", other] += size / reached(inter)
                latency = max(latency, inter.latency_s)
        return latency + max(busy.values(), default=0.0)

    def _inside(self, node: Node, members: int) -> float:
        """Bytes/s of each of so many devices of a node among themselves."""
        if node.link.origin != "profile" or members < 2:
            return reached(node.link)
        profiles = {id(device.profile): device.profile for device in node.devices}.values()
        pair = min((profile.pair_bandwidth or math.inf) for profile in profiles)
        if node.link.bandwidth_bytes_per_s <= pair:
            return reached(node.link)
        return reached(
            replace(node.link, bandwidth_bytes_per_s=min(node.link.bandwidth_bytes_per_s, pair * (members - 1)))
        )

    def seconds(self, event: Event, ranks: Sequence[int], beside: int = 1) -> float:
        """Seconds of one collective among ranks of which each sends `event.bytes`."""
        return self.route(ranks, beside).seconds(event.collective, event.bytes)

    def node_of(self, rank: int) -> int:
        """The node of a rank's device."""
        return self.cluster.devices[self.device_of[rank]].node


def reached(link: Link) -> float:
    """Bytes/s on long messages; what was measured was measured with collectives."""
    return link.bandwidth_bytes_per_s * (1.0 if link.origin == "measured" else LINK_EFFICIENCY)
