"""Random plans: every operator in a random legal mode, unequal sizes, random parameter storage."""

from __future__ import annotations

import random
from collections.abc import Sequence

from whalepy.planner.decide import Cut, Decisions, Orders, Subject
from whalepy.planner.levels import Level, Operators, is_legal
from whalepy.program.layout import Layout, Mode, Operator, Sharded, Type
from whalepy.program.options import Place

WEIGHTS = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (5.0, 2.0, 1.0), (1.0, 4.0, 2.0), (0.0, 1.0, 1.0)]


def random_decisions(mesh: tuple[int, ...], seed: int, density: float = 0.7):
    """A stand-in for `decide` that ignores scopes and speeds: the same on every rank for one seed."""

    def decide(subject: Subject, speeds: Sequence[float], orders: Orders | None = None) -> tuple[Decisions, Orders]:
        rng = random.Random(seed)
        cuts = tuple(
            Cut(level, rng.choice(WEIGHTS)[:size] if size > 1 else (1.0,), at_least_one=False)
            for level, size in enumerate(mesh)
            for _ in range(2)
        )
        cuts = tuple(c if sum(c.weights) else Cut(c.level, (1.0,) * len(c.weights)) for c in cuts)
        outer: list[tuple[Mode, ...]] = []
        for level in range(len(mesh)):
            outer.append(_random_level(subject.operators, level, mesh, tuple(outer), rng, density))
        read = {name: _random_layout(subject, i, mesh, rng, trainable=True) for i, name in subject.names.items()}
        stored = {name: _random_layout(subject, i, mesh, rng, trainable=False) for i, name in subject.names.items()}
        rows = tuple(rng.choice((None, 2 * level, 2 * level + 1)) for level in range(len(mesh)))
        return Decisions(mesh, cuts, tuple(zip(*outer, strict=True)), read, rows, stored), {}

    return decide


def _random_level(
    ops: Operators,
    index: int,
    mesh: tuple[int, ...],
    outer: tuple[tuple[Mode, ...], ...],
    rng: random.Random,
    density: float,
) -> tuple[Mode, ...]:
    count = len(ops.items)
    level = Level(index, mesh[index], (None,) * count, (0,) * count, None, {}, outer, 1)
    return tuple(_random_mode(ops, level, i, rng, density) for i in range(count))


def _random_mode(ops: Operators, level: Level, i: int, rng: random.Random, density: float) -> Mode:
    op = ops.items[i]
    if op.kind != "call":
        return Mode()
    ways = [way for way in op.options if is_legal(ops, level, i, way)]
    if ways and rng.random() < density:
        return Mode("S", rng.choice(ways), 2 * level.index + rng.randrange(2))
    if op.linear and not op.random and rng.random() < 0.4:
        return Mode("P", partial=rng.choice(op.linear))
    return Mode(rng.choice(("R", "B")))


def _random_layout(subject: Subject, i: int, mesh: tuple[int, ...], rng: random.Random, *, trainable: bool) -> Layout:
    ops = subject.operators
    places = sorted({place for op in _users(ops, i) for place in op})
    layout: list[Type] = []
    for level in range(len(mesh)):
        choices: list[Type] = ["R"]
        if trainable and ops.items[i].result_grad[0]:
            choices.append("B")
        choices.extend(Sharded(place, 2 * level + rng.randrange(2)) for place in places if _fits(place, layout))
        layout.append(rng.choice(choices))
    return tuple(layout)


def _users(ops: Operators, i: int) -> list[list[Place]]:
    found: list[list[Place]] = []
    for op in ops.items:
        found.extend([_places(op, k) for k, key in enumerate(op.operands) if key == (i, 0)])
    return found


def _places(op: Operator, k: int) -> list[Place]:
    return [place for way in op.options if (place := way.inputs[k]) is not None]


def _fits(place: Place, layout: list[Type]) -> bool:
    """A sum is cut along one axis on all levels."""
    return all(
        not isinstance(t, Sharded)
        or (t.place.dim, t.place.term) != (place.dim, place.term)
        or t.place.axis == place.axis
        for t in layout
    )
