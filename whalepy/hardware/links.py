"""Links between devices: bandwidth and latency, how they are written, and what is taken where nothing is said."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from whalepy.errors import ClusterError
from whalepy.hardware.devices import DeviceProfile

# Seconds per step of a ring.
# Source: NCCL, src/graph/tuning.cc (commit 01afd20), hwLat, ring, simple protocol: NVLINK 3.4, PCI 5.7, NET 9.6 us.
NVLINK_LATENCY_S = 3.4e-6
PCIE_LATENCY_S = 5.7e-6
NETWORK_LATENCY_S = 9.6e-6
# Assumed for gloo between processes of one host, the order of a two-rank all-reduce of one number there.
CPU_LATENCY_S = 1e-4

# Assumed between nodes where ranks report only themselves: 10 Gbit/s Ethernet, the least to expect today.
UNKNOWN_NETWORK_BANDWIDTH = 1.25e9

_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
_BANDWIDTH = re.compile(r"\s*(?P<figure>[0-9.eE+-]+)\s*(?P<prefix>[TGMk]?)(?P<unit>bit|B)/s\s*")
_BANDWIDTH_FIX = "write a positive figure with its unit: 100Gbit/s (bits) or 12.5GB/s (bytes)"


@dataclass(frozen=True)
class Link:
    """One tier of the network: per direction, seen from one device inside a node, from one whole node between nodes."""

    bandwidth_bytes_per_s: float
    latency_s: float
    origin: str = "given"  # given (by the user), profile (of the devices), measured or assumed

    def __str__(self) -> str:
        return format_bandwidth(self.bandwidth_bytes_per_s)


def parse_bandwidth(text: str) -> float:
    """Bytes/s of "50Gbit/s" or "6.25 GB/s" (SI prefixes). Raises ClusterError for anything else."""
    match = _BANDWIDTH.fullmatch(text)
    figure = _number(match["figure"]) * _PREFIXES[match["prefix"]] if match else math.nan
    if not match or not (0 < figure < 1e30):
        raise ClusterError(f"{text.strip()[:60]!r} is not a bandwidth", fix=_BANDWIDTH_FIX)
    return figure / 8 if match["unit"] == "bit" else figure


def format_bandwidth(bytes_per_s: float) -> str:
    """`50Gbit/s`: bits with the largest prefix that leaves at least 1; parse_bandwidth reads it back."""
    bits = bytes_per_s * 8
    prefix = next((prefix for prefix, scale in _PREFIXES.items() if bits >= scale), "")
    return f"{bits / _PREFIXES[prefix]:.15g}{prefix}bit/s"


def link_inside(profiles: Sequence[DeviceProfile]) -> Link:
    """The link inside a node of these devices: their own where all are one type, PCIe between different types.

    A bridge that joins pairs at most is usually absent, so such types are taken to talk over PCIe. The slowest counts.
    """
    own = len({profile.name for profile in profiles}) == 1
    bandwidth = min(profile.peer_bandwidth if own else _across_types(profile) for profile in profiles)
    latency = max(_latency(profile, own) for profile in profiles)
    return Link(bandwidth, latency, "profile")


def default_network_latency(profiles: Sequence[DeviceProfile]) -> float:
    """Seconds between two nodes where the spec gives only a bandwidth."""
    return CPU_LATENCY_S if any(profile.vendor == "CPU" for profile in profiles) else NETWORK_LATENCY_S


def _across_types(profile: DeviceProfile) -> float:
    return profile.pcie_bandwidth or profile.link_bandwidth


def _latency(profile: DeviceProfile, own: bool) -> float:
    if profile.vendor == "CPU":
        return CPU_LATENCY_S
    fast = own and not profile.bridge_is_optional and not profile.link.startswith("PCIe")
    return NVLINK_LATENCY_S if fast else PCIE_LATENCY_S


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
