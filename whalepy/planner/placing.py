"""Which devices run which stage, and how scopes around all stages are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from whalepy.errors import AnnotationError, PlanError
from whalepy.planner.mesh import Chain
from whalepy.primitives import Placement, Primitive
from whalepy.primitives.scope import resized


@dataclass(frozen=True)
class Place:
    """What a placement may select devices by, in the order of the cluster."""

    type: str
    node: int


@dataclass(frozen=True)
class Arrangement:
    """The devices of every stage, and the scopes that stand for the user's inside one stage."""

    stages: tuple[Primitive, ...]
    """Stage scopes in the order of the program; none where it is not cut."""
    devices: tuple[tuple[int, ...], ...]
    """Per stage: indices into the cluster, in the order of its mesh."""
    scopes: Mapping[Primitive, Primitive | None]
    """A scope of the user's -> the one that a stage's levels are made of; None: it makes no level."""
    copies: int
    """Parts that scopes around all stages cut the rows into."""
    settled: Mapping[Primitive, Primitive] = field(default_factory=dict[Primitive, Primitive])
    """A scope of the user's whose degree is open -> the one with its degree, which stands in `scopes`."""

    def chain(self, chain: Chain) -> Chain:
        """What is left of a chain of scopes inside a stage."""
        known = (self.settled.get(p, p) for p in chain)
        return tuple(own for p in known if (own := self.scopes.get(p, p)) is not None)


@dataclass(frozen=True)
class Need:
    """One stage as placing sees it."""

    chains: tuple[Chain, ...]
    """The chains of its operators."""
    load: float
    """FLOPs of one forward pass."""


def arrange_stages(
    needs: Sequence[Need],
    stages: Sequence[Primitive],
    speeds: Sequence[float],
    places: Sequence[Place],
    chunks: int = 1,
) -> Arrangement:
    """Devices for every stage: neighbours in the cluster together, as many copies of the whole as devices allow.

    Stages take the devices in order; of `chunks` stages that share devices the second is as many stages on as there are
    groups. What is left over goes to stages whose number of devices is open, the slowest first, else stays idle.
    Raises AnnotationError for a placement or degrees that the cluster cannot meet.
    """
    usable, lists = _placement(needs, places, len(stages))
    if len(usable) == 1:  # on the one device of a local run stages follow each other
        lists = [usable]
    outer = _outer(needs, stages)
    asked = [_asked(need, stage, outer) for need, stage in zip(needs, stages, strict=True)]
    groups = len(lists) if lists else max(len(stages) // chunks, 1)
    if len(stages) % groups:
        raise PlanError(
            f"{len(stages)} stages cannot be spread evenly over {groups} groups of devices",
            at=stages[0].at,
            fix="use a number of stages that the groups divide",
        )
    wants = [max(asked[k] for k in range(g, len(stages), groups)) for g in range(groups)]
    if lists:
        copies = min(len(own) // want for own, want in zip(lists, wants, strict=True))
    else:
        copies = len(usable) // sum(wants)
    if copies == 0:
        _too_few(stages, wants, usable, lists)
    open_outer = [p for p in outer if p.degree is None]
    if not lists:
        lists = _shared_out(usable, wants, copies, _open(needs, stages, groups), needs, speeds)
    else:
        lists = [own[: len(own) // want * want] for own, want in zip(lists, wants, strict=True)]
    devices = tuple(tuple(lists[k % groups]) for k in range(len(stages)))
    degrees = {p: p.degree or (copies if p is open_outer[0] else 1) for p in outer}
    return Arrangement(tuple(stages), devices, _scopes(needs, outer, degrees, devices, speeds), prod(degrees.values()))


def selection(needs: Sequence[Need], places: Sequence[Place]) -> tuple[int, ...]:
    """The devices that a program without stages may use, in the order of its placement."""
    usable, lists = _placement(needs, places, 1)
    return tuple(lists[0] if lists else usable)


def _placement(needs: Sequence[Need], places: Sequence[Place], stages: int) -> tuple[list[int], list[list[int]]]:
    """The devices that may be used, and the groups that the user lists (none: to be chosen)."""
    clusters = dict.fromkeys(p for need in needs for chain in need.chains for p in chain if p.kind == "cluster")
    everything = list(range(len(places)))
    if len(clusters) > 1:
        first, second, *_ = clusters
        raise AnnotationError(
            f"{second!r} stands beside {first!r} ({first.at})",
            at=second.at,
            fix="use one cluster scope around the model",
        )
    if not clusters:
        return everything, []
    cluster = next(iter(clusters))
    assert cluster.placement is not None
    return _selected(cluster, cluster.placement, places, stages)


def _selected(
    cluster: Primitive, placement: Placement, places: Sequence[Place], stages: int
) -> tuple[list[int], list[list[int]]]:
    everything = list(range(len(places)))
    match placement.how:
        case "auto":
            return everything, []
        case "all":
            return everything, [everything]
        case "type" | "node":
            found = [k for k, place in enumerate(places) if getattr(place, placement.how) == placement.value]
            if not found:
                there = ", ".join(dict.fromkeys(str(getattr(place, placement.how)) for place in places))
                raise AnnotationError(
                    f"{cluster!r} selects no device", at=cluster.at, fix=f"the cluster has {placement.how} {there}"
                )
            return found, []
        case "average" | "row":
            count = int(placement.value) if placement.how == "average" else len(places) // int(placement.value)  # type: ignore[arg-type]
            size = len(places) // count if count else 0
            if not size or (placement.how == "average" and count > stages):
                raise AnnotationError(
                    f"{cluster!r} cannot group {len(places)} devices for {stages} stages",
                    at=cluster.at,
                    fix=f"choose a number from 1 to {min(len(places), stages)}",
                )
            groups = [everything[k * size : (k + 1) * size] for k in range(min(count, stages))]
            return everything, groups
        case _:
            return _listed(cluster, placement, places, stages)


def _listed(
    cluster: Primitive, placement: Placement, places: Sequence[Place], stages: int
) -> tuple[list[int], list[list[int]]]:
    lists = [list(ranks) for ranks in placement.value]  # type: ignore[union-attr]
    absent = [rank for ranks in lists for rank in ranks if rank >= len(places)]
    if absent:
        raise AnnotationError(
            f"{cluster!r} names rank {absent[0]}, which the cluster does not have",
            at=cluster.at,
            fix=f"ranks are 0 to {len(places) - 1}",
        )
    if stages % len(lists):
        raise AnnotationError(
            f"{cluster!r} lists {len(lists)} virtual devices for {stages} stages",
            at=cluster.at,
            fix="give one list of ranks per stage",
        )
    return sorted(rank for ranks in lists for rank in ranks), lists


def _outer(needs: Sequence[Need], stages: Sequence[Primitive]) -> tuple[Primitive, ...]:
    """The replicate scopes that stand around every stage, outermost first."""
    around = [
        tuple(p for p in chain[: chain.index(stage)] if p.kind == "replicate")
        for need, stage in zip(needs, stages, strict=True)
        for chain in need.chains
        if stage in chain
    ]
    common: list[Primitive] = []
    for level in zip(*around, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return tuple(common)


def _asked(need: Need, stage: Primitive, outer: Sequence[Primitive]) -> int:
    """Devices that a stage asks for, all copies that scopes around it ask for together."""
    around = prod(p.degree or 1 for p in outer)
    inside = max([_product(chain, outer) for chain in need.chains], default=1)
    if stage.degree is not None and (inside > stage.degree or stage.degree % inside):
        raise AnnotationError(
            f"{stage!r} has {stage.degree} devices, the scopes inside it need {inside}",
            at=stage.at,
            fix=f"write stage({inside}), or degrees inside whose product divides {stage.degree}",
        )
    return around * (stage.degree or inside)


def _product(chain: Chain, outer: Sequence[Primitive]) -> int:
    return prod(p.degree or 1 for p in chain if p.kind in ("replicate", "split") and p not in outer)


def _open(needs: Sequence[Need], stages: Sequence[Primitive], groups: int) -> list[bool]:
    """Per group: whether every stage on it leaves the number of its devices open."""
    free = [stage.degree is None for stage in stages]
    return [all(free[k] for k in range(g, len(stages), groups)) for g in range(groups)]


def _shared_out(
    usable: Sequence[int],
    wants: Sequence[int],
    copies: int,
    free: Sequence[bool],
    needs: Sequence[Need],
    speeds: Sequence[float],
) -> list[list[int]]:
    counts = [copies * want for want in wants]
    groups = len(wants)
    loads = [sum(needs[k].load for k in range(g, len(needs), groups)) for g in range(groups)]
    while True:
        left = len(usable) - sum(counts)
        able = [g for g in range(groups) if free[g] and wants[g] <= left]
        if not able:
            break
        slowest = max(able, key=lambda g: (loads[g] / counts[g], -g))
        counts[slowest] += wants[slowest]
    found: list[list[int]] = []
    at = 0
    for count in counts:
        found.append(list(usable[at : at + count]))
        at += count
    return found


def _too_few(
    stages: Sequence[Primitive], wants: Sequence[int], usable: Sequence[int], lists: Sequence[Sequence[int]]
) -> None:
    if lists:
        short = next(g for g, own in enumerate(lists) if len(own) < wants[g])
        raise AnnotationError(
            f"{stages[short]!r} and what is inside it need {wants[short]} devices, its group has {len(lists[short])}",
            at=stages[short].at,
            fix="list more ranks for it, or choose smaller degrees",
        )
    raise AnnotationError(
        f"{len(stages)} stages and what is inside them need {sum(wants)} devices, {len(usable)} are there",
        at=stages[0].at,
        fix="use fewer stages or smaller degrees, let stages share devices with schedule='interleaved:2', "
        "or give a larger cluster",
    )


def _scopes(
    needs: Sequence[Need],
    outer: Sequence[Primitive],
    degrees: Mapping[Primitive, int],
    devices: Sequence[Sequence[int]],
    speeds: Sequence[float],
) -> dict[Primitive, Primitive | None]:
    """Scopes around all stages get one set of shares, so that every stage cuts the rows alike."""
    found: dict[Primitive, Primitive | None] = {
        p: None for need in needs for chain in need.chains for p in chain if p.kind in ("stage", "cluster")
    }
    inside = 1
    total = prod(degrees.values())
    for p in outer:
        degree = degrees[p]
        inside *= degree
        block = total // inside
        """Copies per position of this scope, side by side."""
        weights = p.shares or tuple(
            sum(
                _speed_of_copy(copy, total, needs, devices, speeds)
                for copy in range(total)
                if copy // block % degree == position
            )
            for position in range(degree)
        )
        found[p] = resized(p, degree, weights)
    return found


def _speed_of_copy(
    copy: int, copies: int, needs: Sequence[Need], devices: Sequence[Sequence[int]], speeds: Sequence[float]
) -> float:
    """Passes per unit of time through one copy of all stages: that of its slowest stage."""
    found: list[float] = []
    for need, own in zip(needs, devices, strict=True):
        size = len(own) // copies
        speed = sum(speeds[d] for d in own[copy * size : (copy + 1) * size])
        found.append(speed / max(need.load, 1.0))
    return min(found)
