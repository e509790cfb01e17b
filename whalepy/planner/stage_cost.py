"""What stages made of a model's blocks take on the kinds of device of a cluster: seconds, bytes held, bytes sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import BlockTable, BlockWork, Way
from whalepy.planner.cost import DeviceCost, Network, Route, reached
from whalepy.planner.unfold import Sharding
from whalepy.planner.units import Kind, Unit, kinds_of, units_of
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
        return Sums(
            self.backward + (other.backward - self.backward) * part,
            self.both + (other.both - self.both) * part,
            self.saved + (other.saved - self.saved) * part,
            self.sends + (other.sends - self.sends) * part,
            self.peak + (other.peak - self.peak) * part,
        )


@dataclass
class StageCosts:
    """The blocks of a table on the devices of a cluster."""

    table: BlockTable
    cluster: ClusterSpec
    kinds: tuple[Kind, ...] = ()
    network: Network = field(init=False)
    _sums: dict[tuple[Way, int, int], Sums] = field(default_factory=dict[tuple[Way, int, int], Sums])
    _static: dict[tuple[Way, int, int], Places] = field(default_factory=dict[tuple[Way, int, int], Places])
    _units: dict[int, list[list[Unit]]] = field(default_factory=dict[int, list[list[Unit]]])
    _inside: dict[tuple[int, int], Route] = field(default_factory=dict[tuple[int, int], Route])
    _update: dict[tuple[Way, int], float] = field(default_factory=dict[tuple[Way, int], float])

    def __post_init__(self) -> None:
        kinds = kinds_of(self.cluster)
        self.kinds = tuple(kinds)
        self.network = Network(self.cluster, range(len(self.cluster.devices)))
        self.costs = [DeviceCost(self.cluster.devices[first]) for first, *_ in kinds.values()]

    def units(self, split: int) -> list[list[Unit]]:
        """By kind, the units that split a stage so often."""
        if split not in self._units:
            self._units[split] = units_of(self.cluster, split)
        return self._units[split]

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
        cost, route = self.costs[kind], self.inside(way.split, kind)

        def seconds(event: Event) -> float:
            return route.seconds(event.collective, event.bytes) if event.collective else cost.seconds(event)

        return seconds

    def inside(self, split: int, kind: int) -> Route:
        """What collectives of a unit of one kind cross; where there is none, those of a single device."""
        if (split, kind) not in self._inside:
            units = self.units(split)[kind]
            self._inside[split, kind] = self.network.route(units[0].devices if units else [0])
        return self._inside[split, kind]

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

    def reducing(self, units: Sequence[Unit]) -> Route:
        """What the gradients of one stage cross between those of its units."""
        ranks = [unit.devices[0] for unit in units]
        per_node = len(self.cluster.nodes[units[0].node].devices)
        here = sum(unit.node == units[0].node for unit in units)
        return self.network.route(ranks, max(per_node // max(here, 1), 1))

    def crossing(self, source: Sequence[Unit], target: Sequence[Unit], copies: int) -> tuple[float, float]:
        """Between two stages, all copies at once: seconds of latency, and seconds per byte of one copy."""
        nodes, inter = self.cluster.nodes, self.cluster.inter
        out, into, latency, inside = defaultdict[int, float](float), defaultdict[int, float](float), 0.0, 0.0
        for i, j, part in _overlaps(len(source), len(target), copies):
            one, other = source[i], target[j]
            if one.node == other.node or inter is None:  # each device has a link of its own
                link = nodes[one.node].link
                own = max(1 / len(source) / len(one.devices), 1 / len(target) / len(other.devices))
                inside = max(inside, own * copies / reached(link))
                latency = max(latency, link.latency_s)
            else:
                out[one.node] += part
                into[other.node] += part
                latency = max(latency, inter.latency_s)
        most = max(*out.values(), *into.values(), 0, 0)
        return latency, max(inside, most / reached(inter) if inter else 0.0)


def _overlaps(source: int, target: int, length: int) -> Iterator[tuple[int, int, float]]:
    """A line cut into so many parts, and into so many others: which parts of the two overlap, and by what length."""
    whole, at = source * target, 0
    while at < whole:
        i, j = at // target, at // source
        end = min((i + 1) * target, (j + 1) * source)
        yield i, j, (end - at) * length / whole
        at = end


def _sums(values: Sequence[float], order: Iterable[int]) -> Places:
    return np.array(list(accumulate((values[k] for k in order), initial=0.0)))


def _held(work: BlockWork, sharding: Sharding) -> float:
    kept = sharding.kept(work.holdings)
    return kept.parameters + kept.copies + max(kept.first_gradients, kept.gradients) + kept.optimizer
