"""Numbers of one step for one rank: sizes, offsets, moves and streams, from shares and the sizes of the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import sympy
import torch

from whalepy.planner.decide import Cut
from whalepy.planner.plan import Plan, StagePlan
from whalepy.planner.shares import round_shares
from whalepy.program.axes import Size, evaluate, substituted
from whalepy.program.layout import Sharded, Type
from whalepy.rewrite.bindings import (
    Binding,
    DimTerms,
    First,
    GlobalSize,
    LocalSize,
    MoveBinding,
    Reducer,
    Start,
    Stream,
    Term,
)
from whalepy.runtime.bridge import Move, move_between
from whalepy.runtime.bridge import Type as LocalType
from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import Segment, Shard, all_reduce_max, convert

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """The levels of a plan as numbers: sizes, cuts, and the cut of the rows on each level."""

    sizes: tuple[int, ...]
    cuts: tuple[Cut, ...]
    row_cuts: tuple[int | None, ...]
    outer: int | None = None
    """Levels that cut the rows before microbatches do; None: all of them."""
    microbatches: int = 1
    """Microbatches that the rows of a step are cut into."""

    @property
    def row_levels(self) -> tuple[int, ...]:
        """Levels that cut the rows of the inputs, outermost first."""
        return tuple(level for level, cut in enumerate(self.row_cuts) if cut is not None)

    def rows(self, total: int) -> dict[Coordinates, int]:
        """Rows of the global batch per coordinates on the row levels."""
        pieces = self.pieces(total)
        return {at: sum(piece[at][1] for piece in pieces) for at in pieces[0]}

    def without_rows(self, total: int) -> list[Coordinates]:
        """Coordinates on the row levels that have a share and get none of so many rows."""
        return [at for at, rows in self.rows(total).items() if rows == 0 and self.has_share(at)]

    def has_share(self, at: Coordinates) -> bool:
        """Whether these coordinates on the row levels ever get rows."""
        cuts = [self.cuts[self.row_cuts[level] or 0] for level in self.row_levels]
        return all(cut.weights[position] > 0 for cut, position in zip(cuts, at, strict=True))

    def microbatch(self, total: int, index: int) -> dict[Coordinates, int]:
        """Rows of one microbatch per coordinates on the row levels."""
        return {at: length for at, (_, length) in self.pieces(total)[index].items()}

    def pieces(self, total: int) -> list[dict[Coordinates, tuple[int, int]]]:
        """Per microbatch and coordinates on the row levels: first row of the global batch, and how many.

        Outer levels cut first, then microbatches (as equal as possible, the larger ones first), then inner levels.
        """
        return _pieces(self, total)

    def cut_further(
        self, table: dict[Coordinates, tuple[int, int]], levels: Sequence[int]
    ) -> dict[Coordinates, tuple[int, int]]:
        """Intervals of rows cut by more levels, the first of them first."""
        for level in levels:
            weights = self.cuts[self.row_cuts[level] or 0].weights
            table = {
                (*at, position): part
                for at, (start, length) in table.items()
                for position, part in enumerate(_intervals(start, round_shares(length, weights)))
            }
        return table

    def row_coordinates(self, coordinates: Coordinates) -> Coordinates:
        """The coordinates on the row levels alone."""
        return tuple(coordinates[level] for level in self.row_levels)

    def row_pieces(self, total: int, coordinates: Coordinates) -> list[tuple[int, int]]:
        """The rows of the global batch at these coordinates: (first, how many) per microbatch."""
        mine = self.row_coordinates(coordinates)
        return [piece[mine] for piece in self.pieces(total)]


def grid_of(plan: Plan, stage: StagePlan) -> Grid:
    """The levels of one stage of a plan."""
    return Grid(stage.mesh, stage.cuts, stage.row_cuts, stage.outer, plan.microbatches)


@lru_cache(maxsize=256)
def _pieces(grid: Grid, total: int) -> list[dict[Coordinates, tuple[int, int]]]:
    levels = grid.row_levels
    outside = [level for level in levels if grid.outer is None or level < grid.outer]
    whole = grid.cut_further({(): (0, total)}, outside)
    found: list[dict[Coordinates, tuple[int, int]]] = []
    for m in range(grid.microbatches):
        parts = {at: (start, *chunk(length, grid.microbatches, m)) for at, (start, length) in whole.items()}
        table = {at: (start + first, length) for at, (start, first, length) in parts.items()}
        found.append(grid.cut_further(table, levels[len(outside) :]))
    return found


def _intervals(start: int, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    for length in lengths:
        yield start, length
        start += length


def chunk(rows: int, microbatches: int, index: int) -> tuple[int, int]:
    """First row and number of rows of one microbatch: as equal as possible, the larger ones first."""
    each, more = divmod(rows, microbatches)
    return index * each + min(index, more), each + (index < more)


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one microbatch of one step."""

    step: Mapping[sympy.Symbol, int]
    """Values of the free sizes for the whole step, as the local model would see them."""
    micro: Mapping[sympy.Symbol, int]
    """The same with the rows of this microbatch."""
    rows: Mapping[Coordinates, int]
    """Rows of this microbatch per coordinates on the row levels."""
    first: bool = True
    microbatch: int | None = None
    """Which microbatch this is; None: the whole step at once."""


@dataclass
class Extents:
    """Evaluates terms for the rank at `coordinates`."""

    grid: Grid
    coordinates: Coordinates
    sizes: StepSizes
    whole_sizes: dict[Size, int] = field(default_factory=dict[Size, int])

    def value(self, size: Size) -> int:
        """A size of this microbatch."""
        if isinstance(size, int):
            return size
        if size not in self.whole_sizes:
            self.whole_sizes[size] = evaluate(size, self.sizes.micro)
        return self.whole_sizes[size]

    def interval(self, term: Term) -> tuple[int, int]:
        """Start and length of what this rank holds of the axis that a term's chain cuts."""
        start, length = 0, self._whole(term)
        for k, (level, _) in enumerate(term.chain):
            lengths = self._lengths(term, k, length)
            at = self.coordinates[level]
            start, length = start + sum(lengths[:at]), lengths[at]
        return start, length

    def lengths(self, term: Term) -> tuple[int, ...]:
        """Lengths by position on the last level of the chain, this rank's coordinates on the outer ones."""
        length = self._whole(term)
        for k, (level, _) in enumerate(term.chain[:-1]):
            length = self._lengths(term, k, length)[self.coordinates[level]]
        return self._lengths(term, len(term.chain) - 1, length)

    def _whole(self, term: Term) -> int:
        return sum(self.sizes.rows.values()) if term.batch else self.value(term.axis_size if term.chain else term.size)

    def _lengths(self, term: Term, k: int, length: int) -> tuple[int, ...]:
        _, index = term.chain[k]
        if term.batch and self._cuts_rows(term, k):
            return self._row_lengths(term, k)
        cut = self.grid.cuts[index]
        enough = length >= sum(weight > 0 for weight in cut.weights)
        return round_shares(length, cut.weights, at_least_one=cut.at_least_one and enough)

    def _cuts_rows(self, term: Term, k: int) -> bool:
        """Whether the chain up to `k` is the way the inputs were cut."""
        levels = self.grid.row_levels
        return [(level, self.grid.row_cuts[level]) for level in levels[: k + 1]] == list(term.chain[: k + 1])

    def _row_lengths(self, term: Term, k: int) -> tuple[int, ...]:
        prefix = tuple(self.coordinates[level] for level, _ in term.chain[:k])
        found = [0] * self.grid.sizes[term.chain[k][0]]
        for at, rows in self.sizes.rows.items():
            if at[:k] == prefix:
                found[at[k]] += rows
        return tuple(found)

    def term_size(self, term: Term) -> int:
        """Local size of a term."""
        if not term.chain:
            return self._whole(term)
        _, length = self.interval(term)
        return sum(self.value(pre) * length * self.value(post) for pre, post in term.parts)

    def dim_size(self, dim: DimTerms) -> int:
        """Local size of a dim."""
        return prod(self.term_size(term) for term in dim)

    def start(self, dim: DimTerms) -> int:
        """First index held along a dim whose leading term is cut."""
        return self.interval(dim[0])[0] * prod(self.term_size(term) for term in dim[1:])


class Reduction:
    """All-reduces over one level, for kernels that communicate inside."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the level."""
        return convert(x, "P", "R", self.group)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The maximum over the level."""
        return all_reduce_max(x, self.group)


@dataclass
class Binder:
    """Evaluates the bindings of a program for one rank."""

    grid: Grid
    coordinates: Coordinates
    groups: Sequence[Group]
    seed: Any
    """Of the plan; of a pipeline, with the stage."""

    def values(self, bindings: Sequence[Binding], sizes: StepSizes) -> list[Any]:
        """One value per binding; streams, which change with every step, are left as bindings."""
        extents = Extents(self.grid, self.coordinates, sizes)
        return [self._value(binding, extents) for binding in bindings]

    def _value(self, binding: Binding, extents: Extents) -> Any:
        match binding:
            case LocalSize(dim):
                return extents.dim_size(dim)
            case GlobalSize(size, step):
                return _number(size, extents.sizes.step if step else extents.sizes.micro)
            case Start(dim):
                return extents.start(dim)
            case Reducer(level):
                return Reduction(self.groups[level])
            case First():
                return float(extents.sizes.first)
            case Stream():
                return binding
            case MoveBinding():
                return self.move(binding, extents)

    def move(self, binding: MoveBinding, extents: Extents) -> Move:
        """The move of one level, with the shapes of this step."""
        return move_between(
            _local_type(binding, binding.source, binding.source_term, extents),
            _local_type(binding, binding.target, binding.target_term, extents),
            self.groups[binding.level],
            learns=binding.learns,
        )

    def leaves_empty(self, bindings: Sequence[Binding], sizes: StepSizes) -> bool:
        """Whether any rank may hold a part without elements, of anything."""
        if 0 in sizes.rows.values() or any(0 in cut.weights for cut in self.grid.cuts):
            return True
        return any(
            0 in Extents(self.grid, at, sizes).lengths(term)
            for term in {term for binding in bindings for term in _terms(binding) if term.chain}
            for at in product(*map(range, self.grid.sizes[: term.chain[-1][0]]))
        )

    def stream(self, binding: Stream, step: int, microbatch: int) -> int:
        """Seed of one random operator at one step."""
        at = tuple(self.coordinates[level] for level in binding.levels)
        text = repr((self.seed, step, microbatch, binding.node, binding.levels, at))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _terms(binding: Binding) -> Iterator[Term]:
    match binding:
        case LocalSize(dim) | Start(dim):
            yield from dim
        case MoveBinding():
            yield from (term for dim in binding.terms for term in dim)
            yield from (term for term in (binding.source_term, binding.target_term) if term is not None)
        case _:
            pass


def _number(size: sympy.Expr, values: Mapping[sympy.Symbol, int]) -> int | float:
    number = substituted(size, values)
    return int(number) if number.is_integer else float(number)  # type: ignore[call-overload,arg-type]


def _local_type(binding: MoveBinding, kind: Type, term: Term | None, extents: Extents) -> LocalType:
    if not isinstance(kind, Sharded):
        return kind
    assert term is not None
    dims = [extents.dim_size(dim) for dim in binding.terms]
    place = kind.place
    whole = binding.terms[place.dim]
    lead = prod(extents.term_size(t) for t in whole[: place.term])
    trail = prod(extents.term_size(t) for t in whole[place.term + 1 :])
    lengths = extents.lengths(term)
    segments = tuple(Segment(extents.value(pre), lengths, extents.value(post)) for pre, post in term.parts)
    return Shard(tuple(dims), place.dim, lead, segments, trail)
