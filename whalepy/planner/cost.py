"""Seconds of operators and collectives: rooflines for the one, latency and bandwidth for the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.planner.work import Event, Rehearsal

MEMORY_EFFICIENCY = 0.8
"""Part of the memory bandwidth of the data sheet that operators reach on long vectors."""
LINK_EFFICIENCY = 0.8
"""Part of the bandwidth of a link that collectives reach on long messages."""
MATRIX_UNITS_EFFICIENCY, VECTOR_UNITS_EFFICIENCY = 0.65, 0.8
"""Part of the peak rate that large products reach, with matrix units and without."""
LAUNCH_S = {"CPU": 6e-6}
DEFAULT_LAUNCH_S = 5e-6
"""Seconds of the shortest operator: the host needs as long to issue it."""

RUNTIME_BYTES = {"CPU": 300 * 2**20}
DEFAULT_RUNTIME_BYTES = 1 * 2**30
"""Assumed: a CUDA context with cuBLAS workspaces and NCCL buffers takes 0.6 to 1.3 GiB."""


@dataclass(frozen=True)
class DeviceCost:
    """How long operators take on one device."""

    device: Device

    def seconds(self, event: Event) -> float:
        """Seconds of one operator: its products or its bytes, whichever take longer, and no less than its launch."""
        profile = self.device.profile
        memory = event.bytes / (profile.memory_bandwidth * MEMORY_EFFICIENCY)
        products = event.flops / (self.device.rate(event.dtype) * self._efficiency(event.dtype)) if event.flops else 0.0
        launch = LAUNCH_S.get(profile.vendor, DEFAULT_LAUNCH_S)
        return max(memory / self.device.speed, products) + launch

    @property
    def runtime_bytes(self) -> int:
        """What a process keeps on the device beside tensors: context, libraries, communication buffers."""
        return RUNTIME_BYTES.get(self.device.profile.vendor, DEFAULT_RUNTIME_BYTES)

    def busy_s(self, work: Rehearsal) -> float:
        """Seconds in which the device computes within a step."""
        return sum(self.seconds(event) for event in work.events if not event.collective)

    def _efficiency(self, dtype: str) -> float:
        rate = self.device.profile.rate(dtype)
        return MATRIX_UNITS_EFFICIENCY if rate > 1.5 * self.device.profile.fp32 else VECTOR_UNITS_EFFICIENCY


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
        bandwidth = min(link.bandwidth_bytes_per_s for link in inside)
        latency = max(link.latency_s for link in inside)
        if len(nodes) > 1 and self.cluster.inter is not None:
            bandwidth = min(bandwidth, self.cluster.inter.bandwidth_bytes_per_s / beside)
            latency = max(latency, self.cluster.inter.latency_s)
        return steps * latency + event.bytes / (bandwidth * LINK_EFFICIENCY)
