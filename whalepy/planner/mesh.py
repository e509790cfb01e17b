"""Levels: how the devices of one taskgraph are arranged by the primitives that share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from whalepy.errors import AnnotationError, PlanError
from whalepy.primitives import Primitive

Chain = tuple[Primitive, ...]
Part = tuple[Primitive | None, int]
"""A primitive (None: implicit) and its degree."""


@dataclass(frozen=True)
class Mesh:
    """Devices as a grid: one level per dim, outermost first; devices stand in row-major order."""

    sizes: tuple[int, ...]
    owners: dict[Chain, tuple[Primitive | None, ...]]
    """Per chain of scopes, the primitive that owns each level; None: an implicit replicate."""

    @property
    def coordinates(self) -> tuple[tuple[int, ...], ...]:
        """Coordinates of every device."""
        return tuple(product(*(range(size) for size in self.sizes)))

    def weights(self, level: int, speeds: Sequence[float]) -> tuple[float, ...]:
        """Speed of each position of a level: the sum over the devices there."""
        totals = [0.0] * self.sizes[level]
        for coordinates, speed in zip(self.coordinates, speeds, strict=True):
            totals[coordinates[level]] += speed
        return tuple(totals)


def arrange(chains: Iterable[Chain], devices: int) -> Mesh:
    """The coarsest grid in which every chain's primitives take whole levels.

    Raises AnnotationError where degrees do not fit the number of devices, naming the primitive.
    """
    distinct = sorted({(), *chains}, key=lambda chain: [p.id for p in chain])
    parts = {chain: _parts(chain, distinct, devices) for chain in distinct}
    edges = sorted({edge for ordered in parts.values() for edge in _edges(ordered)} | {1, devices})
    for inner, outer in pairwise(edges):
        if outer % inner:
            raise PlanError(
                f"scopes that share {devices} devices cut them into {inner} and into {outer} groups",
                fix="choose degrees of which one divides the other",
            )
    sizes = tuple(outer // inner for inner, outer in pairwise(edges)) or (1,)
    return Mesh(sizes, {chain: _owners(ordered, sizes) for chain, ordered in parts.items()})


def _parts(chain: Chain, chains: Sequence[Chain], devices: int) -> list[Part]:
    """The chain's primitives and the implicit replicates between them; degrees multiply to `devices`."""
    ordered: list[Part] = []
    left = devices
    for depth in range(len(chain)):
        degree = _degree(chain, depth, chains, left)
        needed = degree * _needed(chain[: depth + 1], chains, left // degree)
        if needed > left or left % needed:
            raise _misfit(chain[depth], needed, left, devices)
        if left != needed:
            ordered.append((None, left // needed))
        ordered.append((chain[depth], degree))
        left = needed // degree
    return [*ordered, (None, left)]


def _needed(prefix: Chain, chains: Sequence[Chain], devices: int) -> int:
    """Devices that the scopes directly inside a prefix ask for."""
    needs = [1]
    for chain in chains:
        if len(chain) > len(prefix) and chain[: len(prefix)] == prefix:
            inner = chain[: len(prefix) + 1]
            degree = _degree(inner, len(prefix), chains, devices)
            needs.append(degree * _needed(inner, chains, max(devices // degree, 1)))
    return max(needs)


def _degree(chain: Chain, depth: int, chains: Sequence[Chain], devices: int) -> int:
    """The degree asked for; where it is left open, all devices that the scopes inside leave."""
    primitive = chain[depth]
    if primitive.degree is not None:
        return primitive.degree
    inside = _asked(chain[: depth + 1], chains)
    if inside == 1 and any(len(c) > depth + 1 and c[: depth + 1] == chain[: depth + 1] for c in chains):
        inside = next((d for d in range(2, devices + 1) if devices % d == 0), 1) if devices > 2 else 1
    return max(devices // inside, 1) if devices % inside == 0 else 1


def _asked(prefix: Chain, chains: Sequence[Chain]) -> int:
    """Devices that explicit degrees inside a prefix ask for."""
    products = [1]
    for chain in chains:
        if len(chain) > len(prefix) and chain[: len(prefix)] == prefix:
            products.append(prod(p.degree or 1 for p in chain[len(prefix) :]))
    return max(products)


def _misfit(primitive: Primitive, needed: int, left: int, devices: int) -> AnnotationError:
    return AnnotationError(
        f"{primitive} and what is inside it need {needed} devices; {left} of {devices} are there for it",
        at=primitive.at,
        fix=f"choose degrees whose product divides {left}, or give a cluster of another size",
    )


def _edges(ordered: Sequence[Part]) -> list[int]:
    edges, total = [1], 1
    for _, degree in ordered:
        total *= degree
        edges.append(total)
    return edges


def _owners(ordered: Sequence[Part], sizes: tuple[int, ...]) -> tuple[Primitive | None, ...]:
    owners: list[Primitive | None] = []
    level = 0
    for primitive, degree in ordered:
        total = 1
        while total < degree:
            total *= sizes[level]
            level += 1
            owners.append(primitive)
    owners.extend([None] * (len(sizes) - len(owners)))
    return tuple(owners)
