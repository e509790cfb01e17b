"""From scopes, devices and a program to decisions: levels, cuts, modes, and where parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from whalepy.errors import AnnotationError
from whalepy.planner.levels import (
    Assignment,
    Level,
    Operators,
    assign,
    candidate_classes,
    choose_order,
    is_legal,
)
from whalepy.planner.mesh import Chain, Mesh, arrange
from whalepy.primitives import Primitive
from whalepy.program.layout import Layout, Mode, Sharded, Type
from whalepy.program.options import Place


@dataclass(frozen=True)
class Cut:
    """How one level cuts an axis: weights by position, and whether every positive weight gets a unit."""

    level: int
    weights: tuple[float, ...]
    at_least_one: bool = False

    @property
    def shares(self) -> str:
        """The weights as shares of the smallest, `2:1`."""
        least = min((weight for weight in self.weights if weight > 0), default=1.0)
        return ":".join(f"{weight / least:.4g}" for weight in self.weights)


@dataclass(frozen=True)
class Decisions:
    """Levels, cuts, the mode of every operator on every level, and where parameters and rows lie."""

    mesh: tuple[int, ...]
    """Number of positions of each level, outermost first."""
    cuts: tuple[Cut, ...]
    modes: tuple[tuple[Mode, ...], ...]
    """Per operator, per level."""
    read: Mapping[str, Layout]
    """Per parameter: the layout in which the program reads it."""
    row_cuts: tuple[int | None, ...]
    """Per level: the cut by which it cuts the rows of the inputs, or None: every position gets the same rows."""

    stored: Mapping[str, Layout]
    """Per parameter: the layout of the boxes that ranks keep (types R and S)."""
    received_cuts: tuple[int | None, ...] = ()
    """Per level: the cut by which it cuts the rows of what other stages give, or None."""
    crossing_cuts: tuple[int | None, ...] = ()
    """Per level that cuts no rows: the cut by which what crosses between stages goes in parts, or None."""


Orders = Mapping[tuple[int, int], tuple[str, ...]]
"""(level, scope by order of appearance) -> classes, first choice first."""


@dataclass(frozen=True)
class Subject:
    """What is planned: the operators, the chain of scopes of each, parameter names, and input rows."""

    operators: Operators
    chains: tuple[Chain, ...]
    """Per operator."""
    names: Mapping[int, str]
    """Names of parameter operators."""
    rows: Mapping[int, Place]
    """Inputs and values from other stages that have rows, and where."""
    parameter_dims: Mapping[str, tuple[tuple[str, ...], ...]]
    """Per parameter name and dim: the classes of its axes."""

    base: tuple[Chain, ...] = ()
    """Chains of the training program, whose levels another program of the same model keeps."""

    @property
    def all_chains(self) -> tuple[Chain, ...]:
        """Every distinct chain, those of the training program first."""
        return tuple(dict.fromkeys((*self.base, *self.chains)))

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        """Primitives by order of appearance."""
        return tuple(dict.fromkeys(p for chain in self.chains for p in chain))


def decide(subject: Subject, speeds: Sequence[float], orders: Orders | None = None) -> tuple[Decisions, Orders]:
    """Decisions for devices of these speeds, and the orders of classes they come from (searched where not given).

    Raises AnnotationError for degrees, shares or `on=` that cannot be met.
    """
    mesh = arrange(subject.all_chains, len(speeds))
    cuts = _Cuts(mesh, speeds)
    row_cuts = tuple(_row_cut(subject, mesh, cuts, level) for level in range(len(mesh.sizes)))
    outer: list[tuple[Mode, ...]] = []
    received_cuts: list[int | None] = []
    crossing_cuts: list[int | None] = []
    assignments: list[Assignment] = []
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for index in range(len(mesh.sizes)):
        level = _level(subject, mesh, cuts, index, row_cuts[index], tuple(outer))
        received_cuts.append(level.received_cut)
        crossing_cuts.append(_crossing_cut(level))
        chosen = _orders(subject, level, orders)
        found.update({(index, k): order for k, order in chosen.items()})
        by_id = {subject.primitives[k].id: order for k, order in chosen.items()}
        assignments.append(assign(subject.operators, level, by_id))
        outer.append(tuple(assignments[-1].modes))
    read: dict[str, Layout] = {
        name: tuple(made.parameters[i] for made in assignments) for i, name in subject.names.items()
    }
    modes = tuple(zip(*outer, strict=True)) if outer else ((),) * len(subject.operators.items)
    stored: dict[str, Layout] = {name: tuple(stored_type(t) for t in layout) for name, layout in read.items()}
    made = Decisions(mesh.sizes, tuple(cuts.table), modes, read, row_cuts, stored, tuple(received_cuts))
    return replace(made, crossing_cuts=tuple(crossing_cuts)), found


def stored_type(read: Type) -> Type:
    """How a parameter that is read as `read` is kept."""
    return "R" if read == "B" else read


class _Cuts:
    """The table of cuts, equal ones once."""

    def __init__(self, mesh: Mesh, speeds: Sequence[float]) -> None:
        self.mesh = mesh
        self.speeds = speeds
        self.table: list[Cut] = []

    def of(self, level: int, primitive: Primitive | None) -> int:
        """The cut that an owner uses on a level: its shares, else the speed of the positions."""
        weights = self.mesh.weights(level, self.speeds)
        if primitive is not None and primitive.shares is not None:
            weights = _shares_of_level(self.mesh, level, primitive)
        cut = Cut(level, weights, primitive is not None and primitive.kind == "split")
        if cut not in self.table:
            self.table.append(cut)
        return self.table.index(cut)


def _shares_of_level(mesh: Mesh, level: int, primitive: Primitive) -> tuple[float, ...]:
    """The shares of one of the levels that a primitive owns; several where scopes beside it have other degrees.

    Raises AnnotationError for shares that are no product of shares per level.
    """
    levels = next(
        [k for k, p in enumerate(owners) if p is primitive] for owners in mesh.owners.values() if primitive in owners
    )
    shares = np.asarray(primitive.shares, dtype=float).reshape([mesh.sizes[k] for k in levels])
    sums = [shares.sum(axis=tuple(j for j in range(len(levels)) if j != k)) for k in range(len(levels))]
    if len(levels) > 1 and not np.allclose(reduce(np.multiply.outer, sums) / shares.sum() ** (len(levels) - 1), shares):
        grid = " x ".join(str(mesh.sizes[k]) for k in levels)
        raise AnnotationError(
            f"the shares of {primitive} cannot be met on {grid} devices, the grid of the scopes beside it",
            at=primitive.at,
            fix="give the scopes that share devices the same degrees, or shares that are equal within each group",
        )
    return tuple(float(weight) for weight in sums[levels.index(level)])


def _row_cut(subject: Subject, mesh: Mesh, cuts: _Cuts, level: int) -> int | None:
    """Rows are cut on the levels that a replicate scope owns."""
    for chain in subject.all_chains:
        owner = mesh.owners[chain][level]
        if owner is not None and owner.kind == "replicate":
            return cuts.of(level, owner)
    return None


def _level(
    subject: Subject, mesh: Mesh, cuts: _Cuts, index: int, row_cut: int | None, outer: tuple[tuple[Mode, ...], ...]
) -> Level:
    owners = tuple(mesh.owners[chain][index] for chain in subject.chains)
    own = {owner: cuts.of(index, owner) for owner in dict.fromkeys(owners)}
    if None in own and row_cut is not None:
        own[None] = row_cut
    positive = max(sum(w > 0 for w in cuts.table[c].weights) for c in own.values())
    return Level(
        index=index,
        size=mesh.sizes[index],
        owners=owners,
        cuts=tuple(own[owner] for owner in owners),
        row_cut=row_cut,
        input_places=subject.rows,
        outer=outer,
        minimum=positive,
        received_cut=_received_cut(subject, owners, own, row_cut),
    )


def _received_cut(
    subject: Subject, owners: Sequence[Primitive | None], own: Mapping[Primitive | None, int], row_cut: int | None
) -> int | None:
    """What another stage gives comes by rows where all operators of a level work by rows."""
    if row_cut is not None:
        return row_cut
    working = {owner for op, owner in zip(subject.operators.items, owners, strict=True) if op.kind == "call"}
    return own[None] if working == {None} else None


def _crossing_cut(level: Level) -> int | None:
    """What a level has whole crosses by the shares of the first split scope that owns it."""
    if level.received_cut is not None:
        return None
    return next((cut for owner, cut in zip(level.owners, level.cuts, strict=True) if owner is not None), None)


def _orders(subject: Subject, level: Level, given: Orders | None) -> dict[int, tuple[str, ...]]:
    """The order of classes of each split scope that owns this level, by order of appearance.

    Scopes that one line made, as of the blocks of a model, and that may cut the same classes, have one order.
    """
    chosen: dict[int, tuple[str, ...]] = {}
    alike: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for k, primitive in enumerate(subject.primitives):
        if primitive.kind != "split" or primitive not in level.owners:
            continue
        if given is not None:
            chosen[k] = tuple(given.get((level.index, k), ()))
            continue
        allowed = tuple(_allowed(subject, level, primitive))
        alike.setdefault((primitive.at, repr(primitive), allowed), []).append(k)
    cutting = {name for dims in subject.parameter_dims.values() for names in dims for name in names}
    for (_, _, allowed), own in alike.items():
        others = {subject.primitives[j].id: order for j, order in chosen.items()}
        first = [name for name in allowed if name in cutting]
        last = [name for name in allowed if name not in cutting]
        together = [subject.primitives[k] for k in own]
        chosen.update(dict.fromkeys(own, choose_order(subject.operators, level, together, others, first, last)))
    return dict(sorted(chosen.items()))


def _allowed(subject: Subject, level: Level, primitive: Primitive) -> list[str]:
    legal = candidate_classes(subject.operators, level, primitive)
    if level.size == 1:
        return legal
    if primitive.on is not None:
        named = _named_classes(subject, primitive)
        legal_all = _legal_classes(subject, level, primitive)
        legal = [name for name in named if name in legal_all]
        if not legal:
            raise AnnotationError(
                f"split cannot cut {primitive.on} into {level.minimum} parts",
                at=primitive.at,
                fix="name a dim of a parameter in this scope that operators can be cut along and that is long enough",
            )
    if not legal:
        raise AnnotationError(
            f"no axis of this split can be cut into {level.minimum} parts",
            at=primitive.at,
            fix="choose a smaller degree, or put operators with a longer axis inside the scope",
        )
    return legal


def _legal_classes(subject: Subject, level: Level, primitive: Primitive) -> set[str]:
    ops = subject.operators
    return {
        ops.classes[way.axis]
        for i, op in enumerate(ops.items)
        if op.kind == "call" and level.owners[i] is primitive
        for way in op.options
        if is_legal(ops, level, i, way)
    }


def _named_classes(subject: Subject, primitive: Primitive) -> tuple[str, ...]:
    assert primitive.on is not None
    name, _, dim = primitive.on.rpartition(":")
    matches = [n for n in subject.parameter_dims if n == name or n.endswith("." + name)]
    if not matches or int(dim) >= len(subject.parameter_dims[matches[0]]):
        raise AnnotationError(
            f"on={primitive.on!r} names no dim of a parameter of the model",
            at=primitive.at,
            fix="write on='path.of.parameter:dim', as in named_parameters()",
        )
    return subject.parameter_dims[matches[0]][int(dim)]


def shard_levels(layout: Sequence[Type]) -> tuple[int, ...]:
    """Levels on which a layout is sharded."""
    return tuple(level for level, kind in enumerate(layout) if isinstance(kind, Sharded))
