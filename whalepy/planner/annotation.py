"""The scopes that a planner put on a model without annotations, as data: a plan carries them, ranks exchange them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from whalepy.planner.degrees import Degrees
from whalepy.primitives import Primitive, cluster, replicate, split, stage


class Written(NamedTuple):
    """One primitive. The same number stands for the same scope."""

    number: int
    kind: str
    degree: int | None
    shares: tuple[float, ...] | None
    ranks: tuple[tuple[int, ...], ...] | None
    """Of a cluster: the ranks of each group of devices."""


Annotation = tuple[tuple[str, tuple[Written, ...]], ...]
"""Module path -> primitives, outermost first."""


@dataclass(frozen=True)
class Chosen:
    """What a planner chose for a model without annotations, or where these leave something open."""

    note: str
    """What it is, and why."""
    annotation: Annotation = ()
    """For a model without any."""
    microbatches: int | None = None
    """None: by rule."""
    schedule: str | None = None
    degrees: Degrees = ()
    """Of the scopes of a model with annotations that leave them open."""


def written(scopes: Mapping[str, Sequence[Primitive]]) -> Annotation:
    """The scopes as data."""
    numbers: dict[Primitive, int] = {}
    return tuple((path, tuple(_one(p, numbers) for p in chain)) for path, chain in scopes.items())


def _one(primitive: Primitive, numbers: dict[Primitive, int]) -> Written:
    number = numbers.setdefault(primitive, len(numbers))
    value = None if primitive.placement is None else primitive.placement.value
    ranks = value if isinstance(value, tuple) else None
    return Written(number, primitive.kind, primitive.degree, primitive.shares, ranks)


def scopes_of(annotation: Annotation) -> dict[str, list[Primitive]]:
    """The primitives again, new ones."""
    known: dict[int, Primitive] = {}
    return {path: [_made(own, known) for own in chain] for path, chain in annotation}


def _made(own: Written, known: dict[int, Primitive]) -> Primitive:
    if own.number not in known:
        if own.kind == "cluster":
            known[own.number] = cluster(placement=[list(ranks) for ranks in own.ranks or ()])
        elif own.kind == "stage":
            known[own.number] = stage(own.degree)
        elif own.kind == "replicate":
            known[own.number] = replicate(own.degree, shares=own.shares)
        else:
            known[own.number] = split(own.degree, shares=own.shares)
    return known[own.number]


def from_data(data: Iterable[Any]) -> Annotation:
    """An annotation read back from JSON."""
    return tuple((str(path), tuple(_read(*own) for own in chain)) for path, chain in data)


def _read(number: int, kind: str, degree: int | None, shares: Any, ranks: Any) -> Written:
    return Written(
        number,
        kind,
        degree,
        None if shares is None else tuple(map(float, shares)),
        None if ranks is None else tuple(tuple(own) for own in ranks),
    )
