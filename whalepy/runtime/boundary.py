"""What crosses between two stages: boxes of values, each element from one owner to every rank that wants it.

Both ends say which part of a value each of their places holds (its indices along every dim). A place gets what it holds
from those that hold it at the other end; of several holders, which hold the same, places take turns. Parts of several
values for one rank go as one message of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from whalepy.planner.plan import Plan, StagePlan
from whalepy.program.call import results
from whalepy.rewrite.bindings import DimTerms, Term
from whalepy.rewrite.terms import terms_of
from whalepy.runtime.extents import Coordinates, Extents, Grid, StepSizes
from whalepy.runtime.groups import as_bytes
from whalepy.runtime.pipeline import Crossed, End

Indices = range | np.ndarray
"""A range where they follow one another, as they mostly do: what two ranges share takes no looking at each index."""
Holding = tuple[Indices, ...]
"""Per dim, the indices of the whole value that a place holds, in the order in which it holds them."""
Index = slice | Tensor


_KEPT_SIZES = 64
"""Sizes for which it is kept what crosses: lengths repeat from step to step."""


def held_indices(end: End, grid: Grid, at: Coordinates, sizes: StepSizes, total: int) -> Holding:
    """What the place at these coordinates holds of a value; `total` rows make up the step or the microbatch."""
    extents = Extents(grid, at, sizes)
    return tuple(_dim_indices(dim, extents, total) for dim in terms_of(end.program, end.key, end.layout))


def _dim_indices(dim: DimTerms, extents: Extents, total: int) -> Indices:
    found: Indices = range(1)
    for term in dim:
        own, size = _term_indices(term, extents, total)
        if isinstance(found, range) and isinstance(own, range) and (found == range(1) or own == range(size)):
            found = own if found == range(1) else range(found.start * size, found.stop * size)
        else:
            found = _in_a_row((np.asarray(found)[:, None] * size + np.asarray(own)[None, :]).reshape(-1))
    return found


def _in_a_row(indices: np.ndarray) -> Indices:
    if len(indices) and (np.diff(indices) == 1).all():
        return range(int(indices[0]), int(indices[-1]) + 1)
    return indices


def _term_indices(term: Term, extents: Extents, total: int) -> tuple[Indices, int]:
    """Indices held along one factor of a dim, and the size of the whole factor."""
    if term.batch:
        return _row_indices(term, extents, total), total
    if not term.chain:
        size = extents.value(term.size)
        return range(size), size
    start, length = extents.interval(term)
    whole = extents.value(term.axis_size)
    own = np.arange(start, start + length)
    parts: list[np.ndarray] = []
    offset = 0
    for pre, post in term.parts:
        before, after = extents.value(pre), extents.value(post)
        part = (np.arange(before)[:, None] * whole + own[None, :]).reshape(-1)
        parts.append(offset + (part[:, None] * after + np.arange(after)[None, :]).reshape(-1))
        offset += before * whole * after
    return _in_a_row(np.concatenate(parts)), offset


def _row_indices(term: Term, extents: Extents, total: int) -> Indices:
    """The rows held, numbered as in the whole batch: what the inputs of a place are, in the order of its pieces."""
    grid, sizes = extents.grid, extents.sizes
    pieces = grid.pieces(total) if sizes.microbatch is None else _relative(grid, sizes, total)
    levels = grid.row_levels
    matched = 0
    while matched < len(term.chain) and extents._cuts_rows(term, matched):
        matched += 1
    mine = tuple(extents.coordinates[level] for level, _ in term.chain[:matched])
    rows = [
        np.arange(start, start + length)
        for at in product(*(range(grid.sizes[level]) for level in levels))
        if at[:matched] == mine
        for start, length in (piece[at] for piece in pieces)
    ]
    found = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    rest = Term(len(found), term.chain[matched:], False, len(found))
    start, length = extents.interval(rest)
    return _in_a_row(found[start : start + length])


def _relative(grid: Grid, sizes: StepSizes, total: int) -> list[dict[Coordinates, tuple[int, int]]]:
    """The rows of one microbatch, numbered from its first: places stand side by side."""
    table: dict[Coordinates, tuple[int, int]] = {}
    start = 0
    for at, length in sizes.rows.items():
        table[at] = (start, length)
        start += length
    return [table]


@dataclass(frozen=True)
class Part:
    """A part of one value that goes to, or comes from, one rank."""

    value: int
    index: tuple[Index, ...]
    """Per dim: where it lies in what this rank holds."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements of the part."""
        return prod(self.shape)


Route = dict[int, list[Part]]
"""Per other rank, the parts of all values in their order."""


@dataclass(frozen=True)
class Where:
    """Where a part lies, per dim, in what its giver and its taker hold."""

    giver: tuple[Index, ...]
    taker: tuple[Index, ...]
    shape: tuple[int, ...]


@dataclass
class Exchange:
    """What all ranks send and receive when values cross, in one direction."""

    parts: dict[int, list[tuple[int, int, int, Where]]] = field(
        default_factory=dict[int, list[tuple[int, int, int, Where]]]
    )
    """Per rank that gives or takes it: value, giver, taker, and where it lies."""
    shapes: list[dict[int, tuple[int, ...]]] = field(default_factory=list[dict[int, tuple[int, ...]]])
    """Of each value, by the ranks that hold it at the receiving end."""

    def add(
        self, givers: Sequence[tuple[int, Holding]], takers: Sequence[tuple[int, Holding]], *, crosses: bool = True
    ) -> None:
        """The next value, from those that hold it to those that want it."""
        for giver, taker, where in routes(givers, takers) if crosses else ():
            for rank in {giver, taker}:
                self.parts.setdefault(rank, []).append((len(self.shapes), giver, taker, where))
        self.shapes.append({rank: tuple(len(index) for index in holding) for rank, holding in takers})

    def traffic(self, rank: int) -> Traffic:
        """What one rank sends and receives."""
        sends, receives = Route(), Route()
        for value, giver, taker, where in self.parts.get(rank, ()):
            if giver == rank:
                sends.setdefault(taker, []).append(Part(value, where.giver, where.shape))
            if taker == rank:
                receives.setdefault(giver, []).append(Part(value, where.taker, where.shape))
        return Traffic(sends, receives, tuple(shapes.get(rank, ()) for shapes in self.shapes))


@dataclass(frozen=True)
class Traffic:
    """What one rank sends and receives when values cross, in one direction."""

    sends: Route
    receives: Route
    shapes: tuple[tuple[int, ...], ...]
    """Of each value, as the receiving end holds it here."""


Exchanges = tuple[Exchange, Exchange]
"""Forward and backward."""


def routes(
    givers: Sequence[tuple[int, Holding]], takers: Sequence[tuple[int, Holding]]
) -> Iterator[tuple[int, int, Where]]:
    """(from rank, to rank, where the part lies at either end) of every part.

    Every element of what a taker holds comes from one giver. Of givers that hold the same, taker number k takes from
    the k-th, and from itself where it can.
    """
    boxes: dict[_Key, list[tuple[int, Holding]]] = {}
    for giver, holding in givers:
        boxes.setdefault(_key(holding), []).append((giver, holding))
    ranks = {box: {giver for giver, _ in holders} for box, holders in boxes.items()}
    shared: dict[tuple[_Key, _Key], Where | None] = {}
    for k, (taker, wanted) in enumerate(takers):
        want = _key(wanted)
        for box, holders in boxes.items():
            if (box, want) not in shared:
                shared[box, want] = _shared(holders[0][1], wanted)
            where = shared[box, want]
            if where is not None:
                yield taker if taker in ranks[box] else holders[k % len(holders)][0], taker, where


_Key = tuple[range | bytes, ...]


def _key(holding: Holding) -> _Key:
    """Equal for those that hold the same, ranges or not."""
    rows = (index if isinstance(index, range) else _in_a_row(index) for index in holding)
    return tuple(index if isinstance(index, range) else index.tobytes() for index in rows)


def _shared(have: Holding, want: Holding) -> Where | None:
    """What two places both hold; None for nothing."""
    dims: list[tuple[Index, Index]] = []
    shape: list[int] = []
    for one, other in zip(have, want, strict=True):
        mine, theirs = _both(one, other)
        if not len(mine):
            return None
        dims.append((_as_index(mine), _as_index(theirs)))
        shape.append(len(mine))
    return Where(tuple(mine for mine, _ in dims), tuple(theirs for _, theirs in dims), tuple(shape))


def _both(one: Indices, other: Indices) -> tuple[Indices, Indices]:
    """Where what two have in common lies in each."""
    if isinstance(one, range) and isinstance(other, range):
        start, stop = max(one.start, other.start), min(one.stop, other.stop)
        return range(start - one.start, stop - one.start), range(start - other.start, stop - other.start)
    _, mine, theirs = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    return _in_a_row(mine), _in_a_row(theirs)


def _as_index(index: Indices) -> Index:
    if isinstance(index, range):
        return slice(index.start, index.stop)
    return torch.from_numpy(np.ascontiguousarray(index))


@dataclass
class Boundary:
    """The values that cross from one stage to another, as one rank of either sees them."""

    crossed: tuple[Crossed, ...]
    source: StagePlan
    target: StagePlan
    grids: tuple[Grid, Grid]
    rank: int
    group: dist.ProcessGroup | None
    backward_group: dist.ProcessGroup | None
    device: torch.device
    kept: dict[Any, tuple[Traffic, Traffic]] = field(default_factory=dict[Any, tuple[Traffic, Traffic]])
    sent_bytes: int = 0
    shared: dict[Any, Exchanges] | None = None
    """Where several ranks of the boundary are looked at in one process: what all of them move, by the same keys."""

    @classmethod
    def between(
        cls,
        plan: Plan,
        pair: tuple[int, int],
        crossed: tuple[Crossed, ...],
        grids: Sequence[Grid],
        rank: int,
        shared: dict[Any, Exchanges],
    ) -> Self:
        """What crosses between two stages of a plan, as a rank sees it that sends nothing."""
        source, target = pair
        ends = plan.stages[source], plan.stages[target]
        meta = torch.device("meta")
        return cls(crossed, *ends, (grids[source], grids[target]), rank, None, None, meta, shared=shared)

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the values."""
        return tuple(results(c.source.program.nodes[c.source.key[0]])[c.source.key[1]].dtype for c in self.crossed)

    @cached_property
    def learning(self) -> tuple[int, ...]:
        """The values whose gradients come back."""
        return tuple(k for k, crossed in enumerate(self.crossed) if crossed.learns)

    def traffic(
        self, key: Any, sizes: Callable[[], tuple[StepSizes, StepSizes]], total: int
    ) -> tuple[Traffic, Traffic]:
        """What this rank moves forward and backward at some sizes; kept by `key`."""
        if key not in self.kept:
            if len(self.kept) >= _KEPT_SIZES:
                self.kept.pop(next(iter(self.kept)))
            forward, backward = self._exchanges(key, sizes, total)
            self.kept[key] = forward.traffic(self.rank), backward.traffic(self.rank)
        return self.kept[key]

    def _exchanges(self, key: Any, sizes: Callable[[], tuple[StepSizes, StepSizes]], total: int) -> Exchanges:
        if self.shared is None:
            return self._exchanged(*sizes(), total)
        if key not in self.shared:
            self.shared[key] = self._exchanged(*sizes(), total)
        return self.shared[key]

    def _exchanged(self, here: StepSizes, there: StepSizes, total: int) -> Exchanges:
        forward, backward = Exchange(), Exchange()
        for crossed in self.crossed:
            source = self._holdings(crossed.source, self.source, self.grids[0], here, total)
            target = self._holdings(crossed.target, self.target, self.grids[1], there, total)
            forward.add(source, target)
            backward.add(target, source, crosses=crossed.learns)
        return forward, backward

    def _holdings(
        self, end: End, stage: StagePlan, grid: Grid, sizes: StepSizes, total: int
    ) -> list[tuple[int, Holding]]:
        places = product(*map(range, stage.mesh))
        return [
            (rank, held_indices(end, grid, at, sizes, total)) for rank, at in zip(stage.rank_of, places, strict=True)
        ]

    # -- moving

    def send(self, traffic: Traffic, values: Sequence[Tensor], *, backward: bool) -> Sending:
        """Start to send this rank's parts; what it keeps for itself lies in the result."""
        own: Tensor | None = None
        works: list[Any] = []
        buffers: list[Tensor] = []
        group = self.backward_group if backward else self.group
        for other, parts in traffic.sends.items():
            buffer = packed(values, parts)
            if other == self.rank:
                own = buffer
                continue
            buffers.append(buffer)
            works.append(dist.isend(buffer, other, group=group))
            self.sent_bytes += buffer.nbytes
        return Sending(works, buffers, own)

    def receive(self, traffic: Traffic, *, backward: bool) -> Receiving:
        """Start to receive this rank's parts."""
        group = self.backward_group if backward else self.group
        works: list[Any] = []
        buffers: dict[int, Tensor] = {}
        for other, parts in traffic.receives.items():
            if other == self.rank:
                continue
            buffers[other] = torch.empty(self.size_of(parts), dtype=torch.uint8, device=self.device)
            works.append(dist.irecv(buffers[other], other, group=group))
        return Receiving(works, buffers)

    def size_of(self, parts: Sequence[Part]) -> int:
        """Bytes of the parts of a message."""
        return sum(part.elements * self.dtypes[part.value].itemsize for part in parts)

    def unpacked(
        self, traffic: Traffic, receiving: Receiving, own: Tensor | None, *, backward: bool
    ) -> dict[int, Tensor]:
        """The values this rank holds, by their number, once all parts are there."""
        receiving.wait()
        buffers = receiving.buffers if own is None else {**receiving.buffers, self.rank: own}
        wanted = self.learning if backward else range(len(self.crossed))
        return {k: self._joined(k, traffic, buffers) for k in wanted}

    def _joined(self, k: int, traffic: Traffic, buffers: Mapping[int, Tensor]) -> Tensor:
        shape, dtype = traffic.shapes[k], self.dtypes[k]
        parts = [(other, part) for other, own in traffic.receives.items() for part in own if part.value == k]
        if len(parts) == 1 and parts[0][1].shape == shape and all(isinstance(i, slice) for i in parts[0][1].index):
            return self._read(traffic, buffers, *parts[0])
        value = torch.zeros(shape, dtype=dtype, device=self.device)
        for other, part in parts:
            _put(value, part.index, self._read(traffic, buffers, other, part))
        return value

    def _read(self, traffic: Traffic, buffers: Mapping[int, Tensor], other: int, part: Part) -> Tensor:
        start = 0
        for before in traffic.receives[other]:
            if before is part:
                break
            start += before.elements * self.dtypes[before.value].itemsize
        dtype = self.dtypes[part.value]
        size = part.elements * dtype.itemsize
        raw = buffers[other].narrow(0, start, size)
        aligned = raw if start % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(part.shape)


@dataclass
class Sending:
    """Messages on their way; the memory must stay until they are through."""

    works: list[Any]
    buffers: list[Tensor]
    own: Tensor | None
    """What this rank sends to itself."""

    def done(self) -> None:
        """Wait until all are through."""
        for work in self.works:
            work.wait()


@dataclass
class Receiving:
    """Messages that are awaited."""

    works: list[Any]
    buffers: dict[int, Tensor]

    def wait(self) -> None:
        """Until all are there."""
        for work in self.works:
            work.wait()


def packed(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The parts of all values as bytes, end to end."""
    flat = [as_bytes(_take(values[part.value], part.index).contiguous().view(-1)) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _take(value: Tensor, index: Sequence[Index]) -> Tensor:
    for dim, own in enumerate(index):
        if isinstance(own, slice):
            size = own.stop - own.start
            value = value if size == value.shape[dim] else value.narrow(dim, own.start, size)
        else:
            value = value.index_select(dim, own.to(value.device))
    return value


def _put(value: Tensor, index: Sequence[Index], part: Tensor) -> None:
    listed: list[Tensor] = []
    for dim, own in enumerate(index):
        if isinstance(own, slice):
            value = value.narrow(dim, own.start, own.stop - own.start)
            own = torch.arange(own.stop - own.start)
        shape = [-1 if d == dim else 1 for d in range(len(index))]
        listed.append(own.to(value.device).view(shape))
    if all(isinstance(own, slice) for own in index):
        value.copy_(part)
    else:
        value[tuple(listed)] = part
