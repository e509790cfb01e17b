"""Seconds that no cut of a form beats, from numbers of units alone: so that few forms are cut at all.

A unit is busy at most all the time, and a stage holds no more blocks than its memory has room for: faster units take
more of the model up to what they hold, and the rest goes to slower ones. Beside that, one microbatch goes through all
stages, and back, over the network where a copy lies in several nodes; gradients go over the copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from whalepy.planner.block_table import Way
from whalepy.planner.cost import reached
from whalepy.planner.form import Limits, Shape, adding
from whalepy.planner.stage_cost import StageCosts

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class _Loads:
    """What the model takes at least, per number of microbatches; seconds per kind of device as well."""

    counts: Whole
    rows: Numbers
    """Of all copies in all microbatches."""
    each: tuple[int, ...]
    """Rows in a microbatch of any copy."""
    row_s: Numbers
    """Seconds per row of the whole model."""
    once_s: Numbers
    """Seconds of one microbatch through the whole model."""
    part_row_s: Numbers
    """As `row_s`, by which a part of the model takes that part."""
    part_once_s: Numbers
    block_s: Numbers
    """Seconds of the smallest block with a microbatch of any copy."""
    border_s: Numbers
    """Seconds of what goes from a stage to the next, where that is in another node."""

    def some(self, chosen: Whole) -> _Loads:
        """Of some numbers of microbatches."""
        return _Loads(
            self.counts[chosen], self.rows[chosen], tuple(self.each[k] for k in chosen),
            self.row_s[:, chosen], self.once_s[:, chosen], self.part_row_s[:, chosen], self.part_once_s[:, chosen],
            self.block_s[:, chosen], self.border_s[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class Lead:
    """A shape with a number of microbatches, not cut yet."""

    bound_s: float
    rest_s: float
    """Of these, seconds beside those of microbatches in turn."""
    shape: Shape
    microbatches: int


class Bounds:
    """Bounds for the forms of one model on one cluster."""

    def __init__(self, costs: StageCosts, limits: Limits) -> None:
        self.costs, self.limits, self.table = costs, limits, costs.table
        self._known: dict[tuple[Way, int, bool], _Loads] = {}
        self._room_of: dict[tuple[Way, int, int, int, int], Whole] = {}
        self._known_rooms: dict[tuple[Way, int, int, int, tuple[int, ...]], Whole] = {}
        self._wholes: dict[tuple[Way, int, int], tuple[float, ...]] = {}
        self._known_parts: dict[Way, Numbers] = {}
        self._tops: dict[Way, Numbers] = {}

    def of_kinds(self, shape: Shape) -> float:
        """Seconds of a step at least, whatever the order of the kinds; infinite where nothing fits."""
        if not self.limits.counts(self.table.rows, shape.copies) or not self._have_room(shape):
            return math.inf
        loads = self._loads(shape.way, shape.copies, even=len(shape.kinds) == 1 or self.limits.equal)
        kinds = list(shape.kinds)
        turn = loads.rows / loads.counts / self._used(shape, 1 / loads.row_s[kinds])
        return float(self._steps(shape, loads, turn, loads.once_s[kinds].min(axis=0))[0].min())

    def leads(self, shape: Shape) -> Iterator[Lead]:
        """A shape with each number of microbatches that may fit."""
        units = self.costs.units(shape.way.split)
        numbers = shape.numbers([len(units[kind]) for kind in shape.kinds])
        alike = bool((np.count_nonzero(numbers, axis=0) == 1).all())
        loads = self._loads(shape.way, shape.copies, even=alike or self.limits.equal)
        blocks = self._blocks(shape, loads, numbers)
        fits = np.flatnonzero((blocks > 0).all(axis=1) & (blocks.sum(axis=1) >= len(self.table.order)))
        if not len(fits):
            return
        loads, kinds = loads.some(fits), list(shape.kinds)
        held = self._largest(shape.way)[blocks[fits]].reshape(len(fits), -1, shape.groups).sum(axis=1)
        pace = np.einsum("km,kg->mg", loads.counts / loads.rows / loads.part_row_s[kinds], numbers)
        once = np.where((numbers > 0)[:, None], loads.part_once_s[kinds][:, :, None], math.inf).min(axis=0)
        # Where turns are longer, more of the model goes to faster units: a step takes at least the shortest turn of
        # some range and the way through with the longest one.
        block = np.where(numbers.sum(axis=1)[:, None] > 0, loads.block_s[kinds], 0.0).max(axis=0)
        turn = np.maximum(_shared(pace, held), block)[:, None] * _LONGER
        through = _through(once, np.minimum(turn[:, 1:, None] * pace[:, None], held[:, None]))
        steps = self._steps(shape, loads, turn[:, :-1].T, through.T)[0].min(axis=0)
        rest = self._steps(shape, loads, turn[:, 0], through[:, -1])[1]
        for k, count in enumerate(loads.counts):
            yield Lead(float(steps[k]), float(rest[k]), shape, int(count))

    def _steps(self, shape: Shape, loads: _Loads, turn: Numbers, once: Numbers) -> tuple[Numbers, Numbers]:
        """Seconds of a step, and those beside microbatches in turn: one way through, gradients and update."""
        borders = self._borders(shape)
        once = once + 2 * borders * loads.border_s
        turn = np.maximum(turn, once / np.minimum(shape.stages, loads.counts))
        if borders:
            turn = np.maximum(turn, loads.border_s)
        rest = (once + self._closing_s(shape)) * _SURE
        return rest + (loads.counts - 1) * turn * _SURE, rest

    def _borders(self, shape: Shape) -> int:
        """Of the borders between stages, how many lie between nodes at least."""
        return self.limits.chunks * (-(-shape.groups // max(self._largest_node // shape.way.split, 1)) - 1)

    def _closing_s(self, shape: Shape) -> float:
        """Seconds after the last microbatch at least, of the stage with the largest gradients."""
        own = float(self.costs.gradients(shape.way)[-1]) / shape.stages
        updated = own * min(self.costs.update_s(shape.way, kind) for kind in shape.kinds)
        inter, apart = self.costs.cluster.inter, shape.copies * shape.way.split > self._largest_node
        sent = 2 * own * (1 - 1 / shape.copies) * shape.way.split if apart and shape.stages > 1 else 0.0
        return updated / (shape.copies if shape.zero else 1) + (sent / reached(inter) if inter else 0.0)

    @cached_property
    def _largest_node(self) -> int:
        """Its devices."""
        return max(len(node.devices) for node in self.costs.cluster.nodes)

    def _used(self, shape: Shape, each: Numbers) -> Numbers:
        """What the units that are used have together at most, from what one of each kind has."""
        units = self.costs.units(shape.way.split)
        best = np.argsort(-each, axis=0)
        own = np.array([len(units[kind]) for kind in shape.kinds])[best]
        taken = np.minimum(own, (shape.groups * shape.copies + own - np.cumsum(own, axis=0)).clip(min=0))
        return (taken * np.take_along_axis(each, best, axis=0)).sum(axis=0)

    # -- memory

    def _have_room(self, shape: Shape) -> bool:
        """Whether the units with most memory hold all copies, with one row at a time and nothing else in flight."""
        ways = {adding(shape.way, count) for count in self.limits.counts(self.table.rows, shape.copies)}
        room = np.array([[max(self._room(shape, way, kind, 1)[1] for way in ways)] for kind in shape.kinds])
        return self._used(shape, room)[0] * self.limits.chunks >= shape.copies * len(self.table.order)

    def _blocks(self, shape: Shape, loads: _Loads, numbers: Whole) -> Whole:
        """Per number of microbatches and stage, the blocks that all of its units have room for at most."""
        chunks, left = self.limits.chunks, shape.stages - np.arange(shape.stages)
        flying = np.minimum(loads.counts[:, None], left if chunks == 1 else np.full(1, 2 * shape.stages // chunks))
        blocks = np.full(flying.shape, len(self.table.order) + 1 - shape.stages)
        for kind, own in zip(shape.kinds, numbers, strict=True):
            if own.any():
                room = self._rooms(shape, loads, kind)[np.arange(len(flying))[:, None], flying]
                blocks = np.where(np.tile(own > 0, chunks), np.minimum(blocks, room), blocks)
        return blocks

    def _rooms(self, shape: Shape, loads: _Loads, kind: int) -> Whole:
        """Per number of microbatches, and by how many are in flight, the blocks that one stage has room for."""
        key = shape.way, shape.zero, shape.copies, kind, loads.each
        if key not in self._known_rooms:
            pairs = zip(loads.counts, loads.each, strict=True)
            rooms = [self._room(shape, adding(shape.way, int(count)), kind, each) for count, each in pairs]
            self._known_rooms[key] = np.array(rooms)
        return self._known_rooms[key]

    def _room(self, shape: Shape, way: Way, kind: int, rows: int) -> Whole:
        """By the number of microbatches in flight, the blocks that one stage has room for at most."""
        copies = shape.copies if shape.zero else 1
        key = way, shape.zero, copies, kind, rows
        if key not in self._room_of:
            sums, cost = self.costs.sums(way, rows, kind), self.costs.costs[kind]
            room = (self.limits.filled * cost.device.memory_bytes - cost.runtime_bytes - sums.peak) / self.limits.chunks
            static, saved = self._each(self.costs.static(way, shape.zero, copies)), self._each(sums.saved)
            flying = np.arange(2 * len(self.table.order) + 1)[:, None]
            least = np.maximum((static + flying * saved).min(axis=1), 1)
            self._room_of[key] = (room / least * (1 + 1e-9)).clip(0, len(self.table.order)).astype(np.int64)
        return self._room_of[key]

    def _parts(self, way: Way) -> Numbers:
        """What stages are measured in: the parts of blocks in the model, large ones taken as the middle one."""
        way = adding(way, 1)
        if way not in self._known_parts:
            own = np.diff(self.costs.sums(way, 1, 0).both)
            own = np.minimum(own, np.median(own) or own.max())
            self._known_parts[way] = own / own.sum()
        return self._known_parts[way]

    def _largest(self, way: Way) -> Numbers:
        """By the number of blocks, the part of the model that they are at most."""
        if way not in self._tops:
            self._tops[way] = np.concatenate([[0.0], np.cumsum(np.sort(self._parts(way))[::-1])])
        return self._tops[way]

    def _each(self, places: Numbers) -> Numbers:
        """Of the blocks that stand for all, from sums over all."""
        return places[self._firsts + 1] - places[self._firsts]

    @cached_property
    def _firsts(self) -> Whole:
        return np.unique(np.array(self.table.order), return_index=True)[1]

    # -- seconds

    def _loads(self, way: Way, copies: int, *, even: bool) -> _Loads:
        key = way, copies, even and self.limits.shares is None
        if key not in self._known:
            self._known[key] = self._loaded(*key)
        return self._known[key]

    def _loaded(self, way: Way, copies: int, even: bool) -> _Loads:
        counts = self.limits.counts(self.table.rows, copies)
        ways = [adding(way, count) for count in counts]
        each = [math.ceil(math.ceil(self.table.rows / copies) / count) for count in counts]
        most = each if even else [math.ceil(self.table.rows / count) for count in counts]
        least = each if even else [1] * len(each)
        most_s, once_s = self._seconds(ways, most) / np.array(most), self._seconds(ways, each)
        return _Loads(
            np.array(counts),
            np.array(each) * counts * copies * 1.0 if even else np.full(len(counts), float(self.table.rows)),
            tuple(least),
            most_s[0], once_s[0], most_s[1], once_s[1], self._seconds(ways, least)[2],
            np.array([self._border_s(*one) for one in zip(ways, each, strict=True)]),
        )  # fmt: skip

    def _border_s(self, way: Way, rows: int) -> float:
        inter, sends = self.costs.cluster.inter, self.costs.sums(way, rows, 0).sends[1:-1]
        return inter.latency_s + float(sends.min()) / reached(inter) if inter and len(sends) else 0.0

    def _seconds(self, ways: Sequence[Way], rows: Sequence[int]) -> Numbers:
        """Of the whole model; by which a part takes that part at least; of the smallest block. Per kind and rows."""
        kinds, pairs = range(len(self.costs.kinds)), list(zip(ways, rows, strict=True))
        return np.moveaxis(np.array([[self._whole_s(way, own, kind) for way, own in pairs] for kind in kinds]), -1, 0)

    def _whole_s(self, way: Way, rows: int, kind: int) -> tuple[float, ...]:
        key = way, rows, kind
        if key not in self._wholes:
            both, parts = self.costs.sums(way, rows, kind).both, self._parts(way)[self._firsts]
            own = self._each(both)
            self._wholes[key] = float(both[-1]), float((own[parts > 0] / parts[parts > 0]).min()), float(own.min())
        return self._wholes[key]


_LONGER = np.array([1, 1.03, 1.07, 1.15, 1.3, 1.6, 2.5, 5, 1e9])
"""The ranges of turns that are looked at, as multiples of the shortest one."""
_SURE = 1 - 1e-9
"""Sums come out a little less or more by their order."""


def _shared(pace: Numbers, most: Numbers) -> Numbers:
    """Per row: the least x at which the sum of min(x * pace, most) is 1."""
    full = most / pace
    order = np.argsort(full, axis=1)
    full, most, pace = (np.take_along_axis(one, order, axis=1) for one in (full, most, pace))
    taken = np.cumsum(most, axis=1) - most
    left = np.cumsum(pace[:, ::-1], axis=1)[:, ::-1]
    at = np.argmax(taken + full * left >= 1 - 1e-9, axis=1)[:, None]
    return ((1 - np.take_along_axis(taken, at, axis=1)) / np.take_along_axis(left, at, axis=1))[:, 0]


def _through(seconds: Numbers, most: Numbers) -> Numbers:
    """Per row: seconds of 1 in parts, each in the least seconds that are left, up to its most."""
    order = np.argsort(seconds, axis=-1)
    seconds, most = np.take_along_axis(seconds, order, axis=-1), np.take_along_axis(most, order[:, None], axis=-1)
    upto = np.minimum(np.cumsum(most, axis=-1), 1)
    return (np.diff(upto, axis=-1, prepend=0.0) * seconds[:, None]).sum(axis=-1)
