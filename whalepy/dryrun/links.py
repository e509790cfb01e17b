"""The links of a cluster: what they are called, and what crosses them in a step, inside nodes and out of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from whalepy.dryrun.pipeline import PipelineCandidate
from whalepy.dryrun.tried import Tried
from whalepy.hardware.cluster import ClusterSpec, Node
from whalepy.planner.forecast import LinkForecast
from whalepy.planner.work import Rehearsal

_Group = tuple[int, tuple[int, ...]]


def links_of(best: Tried) -> tuple[LinkForecast, ...]:
    """Per node the traffic among its devices; then, of several nodes, per node what leaves it."""
    cluster = best.candidate.cluster
    candidate = best.candidate
    inside, out = candidate.traffic() if isinstance(candidate, PipelineCandidate) else _traffic(best)
    found = [
        LinkForecast(
            f"inside node {node.index}",
            node.link.bandwidth_bytes_per_s,
            round(inside[node.index]),
            inside[node.index] / len(node.devices) / node.link.bandwidth_bytes_per_s,
        )
        for node in cluster.nodes
        if len(node.devices) > 1
    ]
    if cluster.inter is not None:
        rate = cluster.inter.bandwidth_bytes_per_s
        found += [
            LinkForecast(f"out of node {node.index}", rate, round(out[node.index]), out[node.index] / rate)
            for node in cluster.nodes
        ]
    return tuple(found)


def _traffic(best: Tried) -> tuple[Mapping[int, float], Mapping[int, float]]:
    """Bytes inside, and out of, each node.

    The members of a group form one ring through their nodes, as in Route: of those in one node the last sends out of
    it, the others to their neighbours. In an all-to-all each member sends as much to every other one.
    """
    candidate = best.candidate
    node_of = {rank: candidate.device(rank).node for rank in best.ranks}
    members: dict[_Group, Counter[int]] = defaultdict(Counter)
    for rank in best.ranks:
        for level in range(len(candidate.plan.mesh)):
            members[_group(candidate.coordinates[rank], level)][node_of[rank]] += 1
    inside: dict[int, float] = defaultdict(float)
    out: dict[int, float] = defaultdict(float)
    sent_of: dict[int, Mapping[tuple[int, bool], int]] = {}
    for rank in best.ranks:
        work = candidate.work(rank, best.rows_of(rank))
        node = node_of[rank]
        if id(work) not in sent_of:
            sent_of[id(work)] = _sent(work)
        for (level, to_all), sent in sent_of[id(work)].items():
            counts = members[_group(candidate.coordinates[rank], level)]
            own, every = counts[node], counts.total()
            leaves = 0.0 if own == every else (every - own) / (every - 1) if to_all else 1 / own
            inside[node] += sent * (1 - leaves)
            out[node] += sent * leaves
    return inside, out


def _group(at: tuple[int, ...], level: int) -> _Group:
    return level, (*at[:level], *at[level + 1 :])


def _sent(work: Rehearsal) -> Mapping[tuple[int, bool], int]:
    """Bytes that a rank sends, by level and by whether in an all-to-all."""
    found: Counter[tuple[int, bool]] = Counter()
    for event, times in work.weighted:
        if event.collective:
            found[event.level, event.collective == "all-to-all"] += event.bytes * times
    return found


# -- names


def link_text(cluster: ClusterSpec) -> str:
    """`PCIe 3.0 x16`; `NVLink 4 inside, 400Gbit/s between nodes`."""
    inside = list(dict.fromkeys(_link_name(node) for node in cluster.nodes if len(node.devices) > 1))
    if cluster.inter is None:
        return inside[0] if inside else ""
    between = f"{cluster.inter} between nodes"
    return f"{' or '.join(inside)} inside, {between}" if inside else between


_PCIE = {15.75e9: "PCIe 3.0 x16", 31.5e9: "PCIe 4.0 x16", 63e9: "PCIe 5.0 x16"}
"""Bytes/s per direction. Source: the column of links of hardware/devices.csv."""


def _link_name(node: Node) -> str:
    """What joins the devices of a node, in words where it is that of their data sheets; else its bandwidth."""
    link = node.link
    if link.origin != "profile":
        return str(link)
    own = {
        device.profile.link for device in node.devices if device.profile.link_bandwidth == link.bandwidth_bytes_per_s
    }
    if len(own) == 1 and not any(device.profile.bridge_is_optional for device in node.devices):
        return own.pop().partition(" (")[0]
    return _PCIE.get(link.bandwidth_bytes_per_s, str(link))
