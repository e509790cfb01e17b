"""Seconds that no cut of a form beats, from numbers of units alone: so that few forms are cut at all.

A unit is busy at most all the time, and a stage holds no more blocks than its memory has room for: faster units take
more of the model up to what they hold, and the rest goes to slower ones. Beside that, one microbatch goes through all
stages, and back, over the network where a copy lies in several nodes; gradients go over the copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whalepy.planner.cost import reached
from whalepy.planner.form import Limits, Shape, adding
from whalepy.planner.loads import Loads, LoadTable, Numbers, Whole
from whalepy.planner.stage_cost import StageCosts


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
        self.loads = LoadTable(costs, limits)

    def of_kinds(self, shape: Shape) -> float:
        """Seconds of a step at least, whatever the order of the kinds; infinite where nothing fits."""
        if not self.limits.counts(self.table.rows, shape.copies) or not self._have_room(shape):
            return math.inf
        loads = self.loads.of(shape.way, shape.copies, even=len(shape.kinds) == 1 or self.limits.equal)
        kinds = list(shape.kinds)
        turn = loads.rows / loads.counts / self._used(shape, 1 / loads.row_s[kinds])
        return float(self._steps(shape, loads, turn, loads.once_s[kinds].min(axis=0))[0].min())

    def leads(self, shape: Shape) -> Iterator[Lead]:
        """A shape with each number of microbatches that may fit."""
        units = self.costs.units(shape.way.split)
        numbers = shape.numbers([len(units[kind]) for kind in shape.kinds])
        alike = bool((np.count_nonzero(numbers, axis=0) == 1).all())
        loads = self.loads.of(shape.way, shape.copies, even=alike or self.limits.equal)
        blocks = self._blocks(shape, loads, numbers)
        fits = np.flatnonzero((blocks > 0).all(axis=1) & (blocks.sum(axis=1) >= len(self.table.order)))
        if not len(fits):
            return
        loads, kinds = loads.some(fits), list(shape.kinds)
        held = self.loads.largest(shape.way)[blocks[fits]].reshape(len(fits), -1, shape.groups).sum(axis=1)
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

    def _steps(self, shape: Shape, loads: Loads, turn: Numbers, once: Numbers) -> tuple[Numbers, Numbers]:
        """Seconds of a step, and those beside microbatches in turn: one way through, gradients and update."""
        borders = self._borders(shape)
        once = once + 2 * borders * loads.border_s
        turn = np.maximum(turn, once / np.minimum(shape.stages, loads.counts))
        if borders:
            turn = np.maximum(turn, loads.border_s)
        rest = (once / self.limits.chunks + self._closing_s(shape)) * _SURE
        return rest + (loads.counts - 1 / self.limits.chunks) * turn * _SURE, rest

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

    def _have_room(self, shape: Shape) -> bool:
        """Whether the units with most memory hold all copies, with one row at a time and nothing else in flight."""
        ways = {adding(shape.way, count) for count in self.limits.counts(self.table.rows, shape.copies)}
        of = (shape.zero, shape.copies)
        room = np.array([[max(self.loads.room(*of, way, kind, 1)[1] for way in ways)] for kind in shape.kinds])
        return self._used(shape, room)[0] * self.limits.chunks >= shape.copies * len(self.table.order)

    def _blocks(self, shape: Shape, loads: Loads, numbers: Whole) -> Whole:
        """Per number of microbatches and stage, the blocks that all of its units have room for at most."""
        chunks, left = self.limits.chunks, shape.stages - np.arange(shape.stages)
        flying = np.minimum(loads.counts[:, None], left if chunks == 1 else np.full(1, 2 * shape.stages // chunks))
        blocks = np.full(flying.shape, len(self.table.order) + 1 - shape.stages)
        for kind, own in zip(shape.kinds, numbers, strict=True):
            if own.any():
                room = self.loads.rooms(shape, loads, kind)[np.arange(len(flying))[:, None], flying]
                blocks = np.where(np.tile(own > 0, chunks), np.minimum(blocks, room), blocks)
        return blocks


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
