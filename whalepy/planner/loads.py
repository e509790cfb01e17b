"""What a model takes at least on each kind of device, by numbers of microbatches: seconds, and room for its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
class Loads:
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

    def some(self, chosen: Whole) -> Loads:
        """Of some numbers of microbatches."""
        return Loads(
            self.counts[chosen], self.rows[chosen], tuple(self.each[k] for k in chosen),
            self.row_s[:, chosen], self.once_s[:, chosen], self.part_row_s[:, chosen], self.part_once_s[:, chosen],
            self.block_s[:, chosen], self.border_s[chosen],
        )  # fmt: skip


class LoadTable:
    """What one model takes on one cluster."""

    def __init__(self, costs: StageCosts, limits: Limits) -> None:
        self.costs, self.limits, self.table = costs, limits, costs.table
        self._known: dict[tuple[Way, int, bool], Loads] = {}
        self._room_of: dict[tuple[Way, int, int, int, int], Whole] = {}
        self._known_rooms: dict[tuple[Way, int, int, int, tuple[int, ...]], Whole] = {}
        self._wholes: dict[tuple[Way, int, int], tuple[float, ...]] = {}
        self._known_parts: dict[Way, Numbers] = {}
        self._tops: dict[Way, Numbers] = {}

    def of(self, way: Way, copies: int, *, even: bool) -> Loads:
        """Of a model in so many copies; `even`: all of them have the same rows."""
        key = way, copies, even and self.limits.shares is None
        if key not in self._known:
            self._known[key] = self._loaded(*key)
        return self._known[key]

    def _loaded(self, way: Way, copies: int, even: bool) -> Loads:
        counts = self.limits.counts(self.table.rows, copies)
        ways = [adding(way, count) for count in counts]
        each = [math.ceil(math.ceil(self.table.rows / copies) / count) for count in counts]
        most = each if even else [math.ceil(self.table.rows / count) for count in counts]
        least = each if even else [1] * len(each)
        most_s, once_s = self._seconds(ways, most) / np.array(most), self._seconds(ways, each)
        return Loads(
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
        return np.moveaxis(np.array([[self.whole_s(way, own, kind) for way, own in pairs] for kind in kinds]), -1, 0)

    def whole_s(self, way: Way, rows: int, kind: int) -> tuple[float, ...]:
        """Seconds of the whole model; those by which a part of it takes that part at least; of the smallest block."""
        key = way, rows, kind
        if key not in self._wholes:
            both, parts = self.costs.sums(way, rows, kind).both, self._parts(way)[self._firsts]
            own = self._each(both)
            self._wholes[key] = float(both[-1]), float((own[parts > 0] / parts[parts > 0]).min()), float(own.min())
        return self._wholes[key]

    def rooms(self, shape: Shape, loads: Loads, kind: int) -> Whole:
        """Per number of microbatches, and by how many are in flight, the blocks that one stage has room for."""
        key = shape.way, shape.zero, shape.copies, kind, loads.each
        if key not in self._known_rooms:
            pairs = zip(loads.counts, loads.each, strict=True)
            zero, copies, way = shape.zero, shape.copies, shape.way
            rooms = [self.room(zero, copies, adding(way, int(count)), kind, each) for count, each in pairs]
            self._known_rooms[key] = np.array(rooms)
        return self._known_rooms[key]

    def room(self, zero: int, replicas: int, way: Way, kind: int, rows: int) -> Whole:
        """By the number of microbatches in flight, the blocks that one stage has room for at most."""
        replicas = replicas if zero else 1
        key = way, zero, replicas, kind, rows
        if key not in self._room_of:
            sums, cost = self.costs.sums(way, rows, kind), self.costs.costs[kind]
            room = (self.limits.filled * cost.device.memory_bytes - cost.runtime_bytes - sums.peak) / self.limits.chunks
            static, saved = self._each(self.costs.static(way, zero, replicas)), self._each(sums.saved)
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

    def largest(self, way: Way) -> Numbers:
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
