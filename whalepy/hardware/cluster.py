"""The hardware to plan for: nodes, the devices in them, and the links between."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from whalepy.errors import ClusterError
from whalepy.hardware import assumptions
from whalepy.hardware.devices import GIB, DeviceProfile
from whalepy.hardware.entries import LinkEntry, NodeEntry, SpecFile
from whalepy.hardware.links import Link, default_network_latency, link_inside
from whalepy.hardware.measured import MEASURED
from whalepy.hardware.own_profiles import is_known, memory_of, own_profiles, profile_dict, type_of
from whalepy.hardware.specfile import located, read_spec

MOST_DEVICES = 2**16
"""More than the largest machines have; a plan lists every device."""


@dataclass(frozen=True)
class Device:
    """One slot for a rank. `speed` is relative to the profile: the effective rate is profile rate x speed."""

    index: int  # position in ClusterSpec.devices
    node: int
    type: str  # the name of its profile
    speed: float
    memory_bytes: int
    profile: DeviceProfile

    def rate(self, dtype: str = "float32") -> float:
        """Effective peak FLOP/s in `dtype`. Raises ClusterError as DeviceProfile.rate does."""
        return self.profile.rate(dtype) * self.speed


@dataclass(frozen=True)
class Node:
    """The devices of one machine and the link between any two of them."""

    index: int
    devices: tuple[Device, ...]
    link: Link


@dataclass(frozen=True)
class Links:
    """Per node the link inside it; `inter` is per node and direction, shared by its devices; None with one node."""

    intra: tuple[Link, ...]
    inter: Link | None


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes in the order of the spec; devices are numbered through them in that order."""

    nodes: tuple[Node, ...]
    inter: Link | None = None

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | ClusterSpec) -> ClusterSpec:
        """The cluster that a YAML or JSON path, a dict (as to_dict gives), one line of text or a spec describes.

        One line: terms `[NODES x] DEVICES x TYPE [* SPEED]` joined by `+`, `@ BANDWIDTH` between nodes. Without `@`,
        terms without NODES share one node; with `@`, every term is NODES (default 1) nodes of its own.
        Raises ClusterError naming the field, the value given and the fix.
        """
        if isinstance(source, ClusterSpec):
            return source
        content, file = read_spec(source)
        with located(file):
            return _build(content, file)

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Every device, in spec order; `devices[i].index == i`."""
        return tuple(device for node in self.nodes for device in node.devices)

    @cached_property
    def links(self) -> Links:
        """The link inside each node, and between nodes."""
        return Links(tuple(node.link for node in self.nodes), self.inter)

    @property
    def on_gpus(self) -> bool:
        """Whether every device is a GPU."""
        return all(device.profile.vendor != "CPU" for device in self.devices)

    @property
    def figures(self) -> Literal["data sheet", "measured", "mixed"]:
        """Where the speeds of the devices come from."""
        measured = {("fp32", MEASURED) in device.profile.marks for device in self.devices}
        return "mixed" if len(measured) > 1 else "measured" if True in measured else "data sheet"

    def link(self, first: int, second: int) -> Link:
        """The link between two devices, by index."""
        home = self.devices[first].node
        if home == self.devices[second].node or self.inter is None:
            return self.nodes[home].link
        return self.inter

    def speeds(self, dtype: str = "float32") -> tuple[float, ...]:
        """Effective speed of each device relative to the fastest (1.0), in spec order."""
        rates = [device.rate(dtype) for device in self.devices]
        most = max(rates)
        return tuple(rate / most for rate in rates)

    @cached_property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on that neither the user nor a data sheet said, one sentence each, sorted."""
        inside = {(tuple(device.profile for device in node.devices), node.link) for node in self.nodes}
        sentences = itertools.chain(
            *(assumptions.about_profile(figures) for figures in {device.profile for device in self.devices}),
            assumptions.about_practice(device.profile for device in self.devices),
            assumptions.about_wheels(device.profile for device in self.devices),
            *(assumptions.about_inside(profiles, link) for profiles, link in inside),
            assumptions.about_between(self.inter),
        )
        return tuple(sorted(set(sentences)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `ClusterSpec.load(spec.to_dict()) == spec`."""
        groups = itertools.groupby(self.nodes, key=_content)
        data: dict[str, Any] = {"nodes": [_node_dict(next(nodes), 1 + len(list(nodes))) for _, nodes in groups]}
        if self.inter:
            data["link"] = _link_dict(self.inter)
        own = {device.type: device.profile for device in self.devices if not is_known(device.profile)}
        if own:
            data["profiles"] = {name: profile_dict(figures) for name, figures in own.items()}
        return data

    def __str__(self) -> str:
        """The one-line form; nodes with several terms stand in brackets, changed memory in square ones."""
        groups = [(len(list(nodes)), content) for content, nodes in itertools.groupby(self.nodes, key=_node_text)]
        text = " + ".join(_group_text(count, content, len(self.nodes)) for count, content in groups)
        return f"{text} @ {self.inter}" if self.inter else text


# --- from a checked file ------------------------------------------------------------------------------------------


def _build(spec: SpecFile, file: str | None) -> ClusterSpec:
    count = sum(entry.count * sum(item.count for item in entry.devices) for entry in spec.nodes)
    if count > MOST_DEVICES:
        fix = "check the counts of nodes and devices"
        raise ClusterError(f"the cluster has {count:,} devices, more than {MOST_DEVICES:,}", fix=fix)
    own = own_profiles(spec, file)
    entries = [entry for entry in spec.nodes for _ in range(entry.count)]
    nodes: list[Node] = []
    start = 0
    for index, entry in enumerate(entries):
        nodes.append(_node(entry, index, start, own))
        start += len(nodes[-1].devices)
    profiles = [device.profile for node in nodes for device in node.devices]
    _check_vendors(profiles)
    return ClusterSpec(tuple(nodes), _inter(spec.link, profiles) if len(nodes) > 1 else None)


def _node(entry: NodeEntry, index: int, start: int, own: Mapping[str, DeviceProfile]) -> Node:
    alike = [(item, type_of(item.type, own)) for item in entry.devices for _ in range(item.count)]
    devices = tuple(
        Device(start + place, index, found.name, item.speed, memory_of(item, found), found)
        for place, (item, found) in enumerate(alike)
    )
    default = link_inside([device.profile for device in devices])
    return Node(index, devices, _link(entry.link, default.latency_s) if entry.link else default)


def _link(entry: LinkEntry, default_latency_s: float) -> Link:
    latency = default_latency_s if entry.latency_s is None else entry.latency_s
    return Link(entry.bandwidth, latency, entry.origin)


def _inter(entry: LinkEntry | None, profiles: Sequence[DeviceProfile]) -> Link:
    if entry is None:
        fix = "add `@ 100Gbit/s` to the line, or `link: 100Gbit/s` to the file"
        raise ClusterError("several nodes, but no bandwidth between them", fix=fix)
    return _link(entry, default_network_latency(profiles))


_WHY_NOT = {
    False: "no collective library joins them",
    True: "a process group serves cards or CPUs, not both",
}


def _check_vendors(profiles: Sequence[DeviceProfile]) -> None:
    vendors = sorted({figures.vendor for figures in profiles})
    if len(vendors) > 1:
        what = f"{' and '.join(vendors)} devices cannot work in one cluster: {_WHY_NOT['CPU' in vendors]}"
        raise ClusterError(what, fix="describe one cluster per vendor")


# --- to text and data ---------------------------------------------------------------------------------------------


def _content(node: Node) -> tuple[object, ...]:
    """What makes two nodes alike."""
    return (tuple((device.type, device.speed, device.memory_bytes) for device in node.devices), node.link)


def _node_dict(node: Node, count: int) -> dict[str, Any]:
    data: dict[str, Any] = {"count": count, "devices": [_devices_dict(*group) for group in _alike(node)]}
    return data | ({"link": _link_dict(node.link)} if node.link.origin != "profile" else {})


def _alike(node: Node) -> list[tuple[Device, int]]:
    """Runs of devices that differ only in index: the first and how many."""
    groups = itertools.groupby(node.devices, key=lambda device: (device.type, device.speed, device.memory_bytes))
    return [(next(devices), 1 + len(list(devices))) for _, devices in groups]


def _devices_dict(device: Device, count: int) -> dict[str, Any]:
    data = {"type": device.type, "count": count, "speed": device.speed}
    return data if device.memory_bytes == device.profile.memory_bytes else data | {"memory_bytes": device.memory_bytes}


def _link_dict(link: Link) -> dict[str, Any]:
    return {"bandwidth": link.bandwidth_bytes_per_s, "latency_s": link.latency_s, "origin": link.origin}


def _node_text(node: Node) -> str:
    return " + ".join(_devices_text(*group) for group in _alike(node))


def _devices_text(device: Device, count: int) -> str:
    speed = "" if device.speed == 1.0 else f"*{device.speed:.15g}"
    changed = device.memory_bytes != device.profile.memory_bytes
    memory = f"[{device.memory_bytes / GIB:.4g}GiB]" if changed else ""
    return f"{count}x{device.type}{memory}{speed}"


def _group_text(count: int, content: str, nodes: int) -> str:
    bracketed = f"({content})" if nodes > 1 and " + " in content else content
    return f"{count}x{bracketed}" if count > 1 else bracketed
