"""Measuring collectives among the ranks that started, over message sizes, and the links they cross.

The branches for CUDA (NCCL) are written after its documentation and have not run yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from whalepy.hardware.links import Link
from whalepy.hardware.measured import Point, fit_link
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import Group, make_groups

_MIB = 2**20
# Bytes of the tensor on each rank.
MESSAGES = {
    ("cpu", True): (2**12, 2**18, 2**22),
    ("cpu", False): tuple(2**exponent for exponent in range(10, 25, 2)),
    ("cuda", True): (2**14, 2**20, 2**26),
    ("cuda", False): tuple(2**exponent for exponent in range(12, 29, 2)),
}
_SECONDS_PER_POINT = {True: 0.05, False: 0.3}

Call = Callable[[], object]


@dataclass(frozen=True)
class MeasuredLinks:
    """The link inside each host that has several ranks, by host, and between hosts; points by collective."""

    inside: dict[str, Link]
    between: Link | None
    collectives: dict[str, tuple[Point, ...]]  # among all ranks; bytes of one rank's tensor


def measure_links(host: Group, hosts: Sequence[str], device: torch.device, *, quick: bool = False) -> MeasuredLinks:
    """What collectives take among all ranks and inside each host; `hosts` names that of every rank.

    Collective over all ranks, which call it alike. Hosts are measured one after the other.
    """
    ranks = tuple(range(host.size))
    if host.size == 1:
        return MeasuredLinks({}, None, {})
    (everyone,) = make_groups((host.size,), ranks, host.position, device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    sizes = MESSAGES[kind, quick]
    collectives = {
        name: tuple(_measured(make(everyone, size, device), size, host, device, quick) for size in sizes)
        for name, make in COLLECTIVES.items()
    }
    whole = _link(collectives["all_reduce"], host.size)
    several = list(dict.fromkeys(hosts))
    if len(several) == 1:
        return MeasuredLinks({several[0]: whole}, None, collectives)
    inside = {name: link for name in several if (link := _inside(name, hosts, host, device, quick))}
    return MeasuredLinks(inside, whole, collectives)


def _inside(name: str, hosts: Sequence[str], host: Group, device: torch.device, quick: bool) -> Link | None:
    """The link inside one host: its ranks run all-reduces, the others wait; None where it has one rank."""
    members = [rank for rank, own in enumerate(hosts) if own == name]
    if len(members) == 1:
        return None
    groups = make_groups((len(members),), members, host.position, device)
    points: list[Point] = []
    for size in MESSAGES["cuda" if device.type == "cuda" else "cpu", quick]:
        call: Call = _all_reduce(groups[0], size, device) if groups else _nothing
        points.append(_measured(call, size, host, device, quick))
    return _link(points, len(members))


def _link(points: Sequence[Point], ranks: int) -> Link:
    bandwidth, latency = fit_link(points, ranks)
    return Link(bandwidth, latency, "measured")


def _measured(call: Call, size: int, host: Group, device: torch.device, quick: bool) -> Point:
    """The mean of as many calls as fit; all ranks make equally many, and the slowest rank counts."""
    call()
    once = max(gather_objects(host, _timed(call, 1, device)))
    calls = max(2, min(1000, int(_SECONDS_PER_POINT[quick] / max(once, 1e-6))))
    return Point(size, max(gather_objects(host, _timed(call, calls, device))))


def _timed(call: Call, calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


# --- the collectives ----------------------------------------------------------------------------------------------


def _all_reduce(group: Group, size: int, device: torch.device) -> Call:
    x = torch.zeros(max(1, size // 4), device=device)
    return lambda: group.all_reduce(x)


def _all_gather(group: Group, size: int, device: torch.device) -> Call:
    part = max(1, size // 4 // group.size)
    x = torch.zeros(part, device=device)
    return lambda: group.all_gather(x, [part] * group.size)


def _reduce_scatter(group: Group, size: int, device: torch.device) -> Call:
    blocks = group.scatter_blocks([max(1, size // 4 // group.size)] * group.size)
    x = torch.zeros(blocks.total, device=device)
    return lambda: group.reduce_scatter(x, blocks, torch.float32)


def _all_to_all(group: Group, size: int, device: torch.device) -> Call:
    blocks = group.blocks([max(1, size // 4 // group.size)] * group.size)
    x = torch.zeros(blocks.total, device=device)
    return lambda: group.exchange(x, blocks, blocks)


def _nothing() -> None:
    pass


COLLECTIVES: dict[str, Callable[[Group, int, torch.device], Call]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}
