"""How values that cross between stages lie on their way.

What a split level has whole goes in parts, one with each of its positions, so that every element is sent once however
often the stage is split. Bridges make it whole where it is read, and backward its gradient where it was given: both
inside the level, whose links are the faster ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from whalepy.planner.decide import Decisions
from whalepy.planner.levels import wanted_of
from whalepy.program.analysis import Program, Value
from whalepy.program.costs import hint
from whalepy.program.layout import Layout, Sharded, Type, result_type
from whalepy.program.options import Place


def input_layout(program: Program, decisions: Decisions, i: int) -> Layout:
    """Rows cut by the levels that cut them; everything else whole."""
    place = row_place(program, i)
    received = program.operators[i].kind == "received"
    cuts = decisions.received_cuts if received else decisions.row_cuts
    return tuple("R" if cut is None or place is None else Sharded(place, cut) for cut in cuts)


def row_place(program: Program, i: int) -> Place | None:
    """Where the rows stand in an input, which has a dim of them, or in what another stage gives; None: it has none."""
    received = program.operators[i].kind == "received"
    for d, dim in enumerate(program.dims[i][0]):
        leaves = program.axes.leaves(dim)
        if program.batch is not None and (leaves == (program.batch,) or (received and program.batch in leaves)):
            return Place(d, leaves.index(program.batch), program.batch)
    return None


def received_layout(program: Program, decisions: Decisions, i: int) -> Layout:
    """What another stage gives, as it arrives: rows as its stage cuts them, else parts."""
    return _in_parts(program, decisions, (i, 0), read_layout(program, decisions, i))


def read_layout(program: Program, decisions: Decisions, i: int) -> Layout:
    """What another stage gives, as operators read it: where they agree, as they want it."""
    wanted = wanted_of(program.operators, decisions.modes, (i, 0))
    layout = input_layout(program, decisions, i)
    if not any(cut is not None for cut in decisions.crossing_cuts):
        return layout
    return tuple(
        own if cut is None else _agreed({want[level] for want in wanted})
        for level, (own, cut) in enumerate(zip(layout, decisions.crossing_cuts, strict=True))
    )


def _agreed(wanted: set[Type]) -> Type:
    only = next(iter(wanted)) if len(wanted) == 1 else "R"
    return "R" if only == "P" else only


def given_layout(program: Program, decisions: Decisions, key: Value) -> Layout:
    """What other stages read, as it leaves: each element with one position of a level that is split."""
    op = program.operators[key[0]]
    made: Layout = ("R",) * len(decisions.mesh)
    if op.kind == "call":
        made = tuple(result_type(op, mode, key[1]) for mode in decisions.modes[key[0]])
    elif op.kind in ("input", "received"):
        made = input_layout(program, decisions, key[0])
    return _in_parts(program, decisions, key, made)


def _in_parts(program: Program, decisions: Decisions, key: Value, layout: Layout) -> Layout:
    """With one owner per element on all levels that have a cut for what crosses, as far as an axis is long enough."""
    owned: Layout = tuple(kind if isinstance(kind, Sharded) else "R" for kind in layout)
    whole = {
        level: cut
        for level, (kind, cut) in enumerate(zip(owned, decisions.crossing_cuts, strict=False))
        if kind == "R" and cut is not None and decisions.mesh[level] > 1
    }
    parts = prod(decisions.mesh[level] for level in whole)
    place = _place_of_parts(program, key, owned, parts) if parts > 1 else None
    if place is None:
        return owned
    return tuple(Sharded(place, whole[level]) if level in whole else kind for level, kind in enumerate(owned))


def _place_of_parts(program: Program, key: Value, layout: Layout, parts: int) -> Place | None:
    """The axis that is cut on the way: one that divides evenly, that no input sets free, the longest."""
    taken = {(kind.place.dim, kind.place.term) for kind in layout if isinstance(kind, Sharded)}
    free = [place for place in _places(program, key) if (place.dim, place.term) not in taken]

    def worth(place: Place) -> tuple[bool, bool, int]:
        size = program.axes.size(place.axis)
        length = hint(size, program.hints)
        return length % parts == 0, isinstance(size, int), length

    long_enough = [place for place in free if worth(place)[-1] >= parts]
    return max(long_enough, key=worth, default=None)


def _places(program: Program, key: Value) -> Iterator[Place]:
    for d, dim in enumerate(program.dims[key[0]][key[1]]):
        for t, leaf in enumerate(program.axes.leaves(dim)):
            if leaf != program.batch and program.axes.parts(leaf) is None:
                yield Place(d, t, leaf)
