"""The levels that are tried for a model and a cluster, with their names and the flags that force them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace

from torch import nn

from whalepy.dryrun.ladder import AS_ANNOTATED
from whalepy.dryrun.tried import Options
from whalepy.errors import ClusterError, PlanError
from whalepy.hardware.cluster import ClusterSpec, Device, Node
from whalepy.hardware.devices import GIB
from whalepy.planner.annotation import scopes_of
from whalepy.planner.plan import Plan
from whalepy.primitives import Primitive, replicate, scopes_on, split


def strategies(
    model: nn.Module, cluster: ClusterSpec, options: Options, rows: int
) -> list[tuple[tuple[Primitive, ...] | None, str, str]]:
    """Levels to try with their names and the flags that force them; the model's own annotations, where it has any."""
    if scopes_on(model):
        if options.replicate or options.split:
            raise PlanError(
                "the model is annotated, so degrees cannot be forced",
                fix="leave out --replicate and --split, or return a model without annotations",
            )
        return [AS_ANNOTATED]
    devices = len(cluster.devices)
    pairs = [(devices // s, s) for s in range(1, devices + 1) if devices % s == 0]
    wanted = [(r, s) for r, s in pairs if options.replicate in (None, r) and options.split in (None, s)]
    if options.replicate is None:  # every replica needs a row
        wanted = [(r, s) for r, s in wanted if r <= rows] or wanted
    if isinstance(options.shares, tuple):  # one per replica
        wanted = [(r, s) for r, s in wanted if r == len(options.shares)] or wanted
    if not wanted:
        asked = " x ".join(str(d) for d in (options.replicate, options.split) if d)
        raise PlanError(
            f"degrees {asked} cannot be met on {devices} devices",
            fix=f"their product must be the number of devices: {', '.join(f'{r} x {s}' for r, s in pairs)}",
        )
    return [(levels_of(r, s), _name(r, s), _flags(r, s)) for r, s in wanted]


def levels_of(r: int, s: int) -> tuple[Primitive, ...]:
    return tuple(level for level in (replicate(r), split(s)) if level.degree != 1)


def levels_of_plan(plan: Plan) -> tuple[Primitive, ...]:
    """The scopes over the whole model that a plan was made with."""
    return tuple(scopes_of(plan.annotation).get("", ()))


def _name(r: int, s: int) -> str:
    return f"replicate {r}" if s == 1 else f"split {s}" if r == 1 else f"replicate {r} > split {s}"


def _flags(r: int, s: int) -> str:
    return f"--replicate {r} --split {s}"


def is_free(model: nn.Module, options: Options) -> bool:
    forced = options.replicate or options.split or options.shares or options.balance != "exact"
    return not (scopes_on(model) or forced)


_MOST_KINDS = 4


def parts_of(cluster: ClusterSpec) -> list[tuple[ClusterSpec, str]]:
    """Every choice of some of the kinds of device, without the others; of many kinds, each one alone."""
    kinds = list(dict.fromkeys(kind_named(device) for device in cluster.devices))
    most = len(kinds) if len(kinds) <= _MOST_KINDS else 2
    found: list[tuple[ClusterSpec, str]] = []
    for size in range(1, most):
        for some in itertools.combinations(kinds, size):
            chosen = [device for device in cluster.devices if kind_named(device) in some]
            found.append((only(cluster, {device.index for device in chosen}), types_of(chosen)))
    return found


def kind_named(device: Device) -> str:
    """The type of a device, with its memory where that is not what the type has."""
    changed = device.memory_bytes != device.profile.memory_bytes
    return f"{device.type}[{device.memory_bytes / GIB:.4g}GiB]" if changed else device.type


def fastest_of(cluster: ClusterSpec, count: int) -> list[Device]:
    """So many of the fastest devices, ties to the first."""
    speeds = cluster.speeds()
    return sorted(cluster.devices, key=lambda device: (-speeds[device.index], device.index))[:count]


def types_of(devices: Sequence[Device]) -> str:
    """`2 x V100-SXM2-16GB + 1 x T4`."""
    kinds = Counter(kind_named(device) for device in devices)
    return " + ".join(f"{number} x {kind}" for kind, number in kinds.items())


def only(cluster: ClusterSpec, chosen: Set[int]) -> ClusterSpec:
    """Some devices, by index, on the nodes where they are."""
    nodes: list[Node] = []
    start = 0
    for node in cluster.nodes:
        devices = [device for device in node.devices if device.index in chosen]
        if devices:
            placed = tuple(replace(d, index=start + k, node=len(nodes)) for k, d in enumerate(devices))
            nodes.append(replace(node, index=len(nodes), devices=placed))
            start += len(placed)
    return replace(cluster, nodes=tuple(nodes), inter=cluster.inter if len(nodes) > 1 else None)


def times_as_many(cluster: ClusterSpec, times: int) -> ClusterSpec:
    """So many times the nodes of a cluster; of a single one the devices in it, while that makes a node as there are.

    Nodes whose link is not told have one of 100 Gbit/s.
    """
    data = cluster.to_dict()
    inside = cluster.inter is None and times * len(cluster.devices) <= _INSIDE
    for counted in data["nodes"][0]["devices"] if inside else data["nodes"]:
        counted["count"] *= times
    return ClusterSpec.load(data if inside else {"link": "100Gbit/s", **data})


def line_of(cluster: ClusterSpec) -> str | None:
    """The line that `--cluster` takes for it; None where a line does not say all of it."""
    try:
        return str(cluster) if ClusterSpec.load(str(cluster)) == cluster else None
    except ClusterError:  # memory or figures that its types do not have
        return None


_INSIDE = 8
"""Devices that a node has at most, unless it is told otherwise."""


def annotation_text(levels: Sequence[Primitive]) -> str:
    """Python that forces these levels."""
    named = [f"whalepy.{level.kind}({level.degree})" for level in levels]
    inside = named[0] if len(named) == 1 else f"[{', '.join(named)}]"
    return f'whalepy.annotate(model, {{"": {inside}}})' if named else ""
