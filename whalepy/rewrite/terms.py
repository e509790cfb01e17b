"""Local sizes of a value under a layout, and the moves between two layouts, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from whalepy.program.analysis import Program
from whalepy.program.axes import Size
from whalepy.program.layout import Layout, Sharded, Type, path
from whalepy.rewrite.bindings import MoveBinding, Term, ValueTerms

Key = tuple[int, int]
"""(operator index, result index)."""


def terms_of(program: Program, key: Key, layout: Layout) -> ValueTerms:
    """The terms of every dim of a value under a layout."""
    dims = program.dims[key[0]][key[1]]
    return tuple(
        tuple(_term(program, leaf, _cuts_at(layout, d, t)) for t, leaf in enumerate(program.axes.leaves(dim)))
        for d, dim in enumerate(dims)
    )


def moves(program: Program, key: Key, source: Layout, target: Layout) -> Iterator[tuple[Layout, MoveBinding]]:
    """The moves from one layout to another, one level at a time, each with the layout it arrives at."""
    now = source
    for level, before, after in path(source, target):
        whole = (*now[:level], "R", *now[level + 1 :])
        binding = MoveBinding(
            level,
            before,
            after,
            terms_of(program, key, whole),
            _cut_term(program, key, now, level, before),
            _cut_term(program, key, now, level, after),
            program.operators[key[0]].result_grad[key[1]],
        )
        now = (*now[:level], after, *now[level + 1 :])
        yield now, binding


def _cuts_at(layout: Sequence[Type], dim: int, term: int) -> list[tuple[int, Sharded]]:
    return [
        (level, kind)
        for level, kind in enumerate(layout)
        if isinstance(kind, Sharded) and (kind.place.dim, kind.place.term) == (dim, term)
    ]


def _cut_term(program: Program, key: Key, now: Layout, level: int, kind: Type) -> Term | None:
    """The term a shard cuts, with the cuts of outer levels and of this one; None for what is no shard."""
    if not isinstance(kind, Sharded):
        return None
    place = kind.place
    leaf = program.axes.leaves(program.dims[key[0]][key[1]][place.dim])[place.term]
    return _term(program, leaf, [*_cuts_at(now[:level], place.dim, place.term), (level, kind)])


def _term(program: Program, leaf: int, cuts: list[tuple[int, Sharded]]) -> Term:
    axes = program.axes
    batch = leaf == program.batch
    size = axes.size(leaf)
    chain = tuple((level, kind.cut) for level, kind in cuts)
    axis = cuts[0][1].place.axis if cuts else leaf
    if axes.parts(leaf) is None or axis == leaf:
        return Term(size, chain, batch, size)
    return Term(size, chain, batch, axes.size(axis), _parts(program, leaf, axis))


def _parts(program: Program, leaf: int, axis: int) -> tuple[tuple[Size, Size], ...]:
    """Per part of a sum: the product of sizes before and after `axis`."""
    found: list[tuple[Size, Size]] = []
    for part in program.axes.parts(leaf) or ():
        at = part.index(axis)
        found.append((_product(program, part[:at]), _product(program, part[at + 1 :])))
    return tuple(found)


def _product(program: Program, dim: Sequence[int]) -> Size:
    total: Size = 1
    for axis in dim:
        total = total * program.axes.size(axis)
    return total
