"""What stages made of a model's blocks take on the kinds of device of a cluster: seconds, bytes held, bytes sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import BlockTable, BlockWork, Way
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.unfold import Sharding
from whalepy.planner.units import Kind, Unit, kind_of, kinds_of, units_of
from whalepy.planner.work import Event

Places = NDArray[np.float64]
"""A quantity of the blocks before each place, so that a stage is a difference."""


@dataclass(frozen=True)
class Sums:
    """What the blocks take on devices of one kind."""

    backward: Places
    """Seconds, as in `both`."""
    both: Places
    saved: Places
    """Bytes kept from the forward to the backward of a microbatch."""
    sends: Places
    """Bytes of a microbatch that cross each place."""
    peak: float
    """Bytes held at most within any block beyond what is held before it."""

    def towards(self, other: Sums, part: float) -> Sums:
        """What lies on the line to other ones."""
        mine, its = astuple(self), astuple(other)
        return Sums(*(a + (b - a) * part for a, b in zip(mine, its, strict=True)))


@dataclass
class StageCosts:
    """The blocks of a table on the devices of a cluster."""

    table: BlockTable
    cluster: ClusterSpec
    kinds: tuple[Kind, ...] = ()
    network: Network = field(init=False)
    _sums: dict[tuple[Way, int, int], Sums] = field(default_factory=dict[tuple[Way, int, int], Sums])
    _static: dict[tuple[Way, int, int], Places] = field(default_factory=dict[tuple[Way, int, int], Places])
    _lists: dict[int, tuple[Places, list[float]]] = field(default_factory=dict[int, tuple[Places, list[float]]])
    _update: dict[tuple[Way, int], float] = field(default_factory=dict[tuple[Way, int], float])

    def __post_init__(self) -> None:
        self.kinds = kinds_of(self.cluster)
        self.network = Network(self.cluster, {device.index: device.index for device in self.cluster.devices})
        heads = {kind_of(device): device for device in reversed(self.cluster.devices)}
        self.costs = [DeviceCost(heads[kind]) for kind in self.kinds]

    def sums(self, way: Way, rows: int, kind: int) -> Sums:
        """The blocks with so many rows in a microbatch, on devices of one kind."""
        key = way, rows, kind
        if key not in self._sums:
            self._sums[key] = self._summed(*key)
        return self._sums[key]

    def _summed(self, way: Way, rows: int, kind: int) -> Sums:
        small = 1 << max(rows.bit_length() - 1, 0)
        if rows != small:  # lines between powers of two
            return self.sums(way, small, kind).towards(self.sums(way, 2 * small, kind), rows / small - 1)
        works = self.table.works(way, rows)
        seconds = self._seconds(way, kind)
        forward = [sum(map(seconds, work.forward)) for work in works]
        backward = [sum(map(seconds, work.backward)) for work in works]
        order = self.table.order
        both = [a + b for a, b in zip(forward, backward, strict=True)]
        return Sums(
            _sums(backward, order),
            _sums(both, order),
            _sums([work.saved for work in works], order),
            np.array([0.0, *(works[k].sends for k in order)]),
            max(work.peak for work in works),
        )

    def _seconds(self, way: Way, kind: int) -> Callable[[Event], float]:
        """Seconds of an event on one rank of a unit of one kind."""
        cost, units = self.costs[kind], units_of(self.cluster, way.split)[kind]
        route = self.network.route(units[0].devices) if way.split > 1 and units else None

        def seconds(event: Event) -> float:
            if not event.collective:
                return cost.seconds(event)
            return 0.0 if route is None else route.seconds(event.collective, event.bytes)

        return seconds

    def listed(self, places: Places) -> list[float]:
        """The same as a list, which is searched faster."""
        if id(places) not in self._lists:
            self._lists[id(places)] = places, places.tolist()
        return self._lists[id(places)][1]

    def static(self, way: Way, zero: int, copies: int) -> Places:
        """Bytes that the blocks before each place hold all the time, in one of so many copies."""
        key = way, zero, copies if zero else 1
        if key not in self._static:
            sharding = Sharding(zero, key[2])
            works = self.table.works(way, 1)
            self._static[key] = _sums([_held(work, sharding) for work in works], self.table.order)
        return self._static[key]

    def gradients(self, way: Way) -> Places:
        """Bytes of the gradients of the blocks before each place."""
        key = way, -1, 1
        if key not in self._static:
            works = self.table.works(way, 1)
            self._static[key] = _sums([work.holdings.first_gradients for work in works], self.table.order)
        return self._static[key]

    def update_s(self, way: Way, kind: int) -> float:
        """Seconds in which devices of one kind update the parameters of all blocks that stand for all, per byte."""
        key = way, kind
        if key not in self._update:
            cost = self.costs[kind]
            size = sum(work.holdings.gradients for work in self.table.works(way, 1))
            self._update[key] = sum(cost.seconds(event) for event in self.table.update(way)) / max(size, 1)
        return self._update[key]

    def reduce_s(self, copies: Sequence[Unit], sent: float) -> float:
        """Seconds of the gradients of one stage, of which each rank holds `sent` bytes, over its copies."""
        if len(copies) < 2:
            return 0.0
        ranks = [unit.devices[0] for unit in copies]
        per_node = len(self.cluster.nodes[copies[0].node].devices)
        here = sum(unit.node == copies[0].node for unit in copies)
        route = self.network.route(ranks, max(per_node // max(here, 1), 1))
        return route.seconds("all-reduce", round(2 * sent * (1 - 1 / len(ranks))))

    def crossing(self, source: Sequence[Unit], target: Sequence[Unit]) -> tuple[float, float]:
        """Between two stages, all copies at once: seconds of latency, and seconds per byte of one copy."""
        pairs = zip(source, target, strict=True)
        many = 10**9
        messages = {
            (a, b): many // len(one.devices)
            for one, other in pairs
            for a, b in zip(one.devices, other.devices, strict=True)
        }
        latency = self.network.crossing_s(dict.fromkeys(messages, 0))
        return latency, (self.network.crossing_s(messages) - latency) / many


def _sums(values: Sequence[float], order: Iterable[int]) -> Places:
    return np.array(list(accumulate((values[k] for k in order), initial=0.0)))


def _held(work: BlockWork, sharding: Sharding) -> float:
    kept = sharding.kept(work.holdings)
    return kept.parameters + kept.copies + max(kept.first_gradients, kept.gradients) + kept.optimizer
