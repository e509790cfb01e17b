"""Seconds of operators and collectives: rooflines for the one, latency and bandwidth for the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.hardware.links import Link
from whalepy.planner.work import Event, Rehearsal

LINK_EFFICIENCY = 0.8
"""Part of the bandwidth of a link that collectives reach on long messages."""


@dataclass(frozen=True)
class DeviceCost:
    """How long operators take on one device."""

    device: Device

    def seconds(self, event: Event) -> float:
        """Seconds of one operator: its products, its bytes or the host that issues it, whichever take longest.

        The figures are those of the device's profile: measured, else what is taken for its vendor.
        """
        profile, speed = self.device.profile, self.device.speed
        products = profile.product_seconds(event.flops, event.dtype) if event.flops else 0.0
        return max(products / speed, profile.memory_seconds(event.bytes) / speed, profile.launch_seconds)

    @property
    def runtime_bytes(self) -> int:
        """What a process keeps on the device beside tensors: context, libraries, communication buffers."""
        return self.device.profile.runtime_memory

    def busy_s(self, work: Rehearsal) -> float:
        """Seconds in which the device computes within a step."""
        return sum(self.seconds(event) for event in work.events if not event.collective)


@dataclass(frozen=True)
class Network:
    """How long collectives take between ranks on the devices of a cluster."""

    cluster: ClusterSpec
    device_of: Mapping[int, int]
    """Rank -> index of its device."""

    def seconds(self, event: Event, ranks: Sequence[int], beside: int = 1) -> float:
        """Seconds of one collective among ranks of which each sends `event.bytes`.

        `beside`: groups of one level whose members share the links of a node and communicate at the same time.
        """
        if len(ranks) < 2:
            return 0.0
        nodes = {self.cluster.devices[self.device_of[rank]].node for rank in ranks}
        steps = (2 if event.collective == "all-reduce" else 1) * (len(ranks) - 1)
        inside = [self.cluster.nodes[node].link for node in nodes]
        bandwidth = min(map(_reached, inside))
        latency = max(link.latency_s for link in inside)
        if len(nodes) > 1 and self.cluster.inter is not None:
            bandwidth = min(bandwidth, _reached(self.cluster.inter) / beside)
            latency = max(latency, self.cluster.inter.latency_s)
        return steps * latency + event.bytes / bandwidth


def _reached(link: Link) -> float:
    """Bytes/s on long messages; what was measured was measured with collectives."""
    return link.bandwidth_bytes_per_s * (1.0 if link.origin == "measured" else LINK_EFFICIENCY)
