"""The best way to put a model on a cluster: stages, devices of each, split, copies, rows and microbatches together.

Every form is one: copies of a chain of stages, each stage on a unit of like devices that split it. One stage is data
parallelism, one copy a plain pipeline. Forms are taken in the order of a bound that no cut of theirs can beat, and none
is looked at once the best ones found are faster than its bound.

Source: the searches of PipeDream (Narayanan et al., SOSP 2019, section 3.1) and of Megatron-LM (Narayanan et al.,
SC 2021, section 3) take like devices; Whale's (section 3.5) balances afterwards.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, combinations

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import BlockTable, Way
from whalepy.planner.cut import Part, can_be_cut, cut_blocks
from whalepy.planner.shares import round_shares
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.units import Unit, orders_of, units_of


@dataclass(frozen=True)
class Limits:
    """What a search may choose from; None: anything."""

    stages: int | None = None
    chunks: int = 1
    """Stages on each group of devices."""
    replicate: int | None = None
    split: int | None = None
    microbatches: int | None = None
    equal: bool = False
    """Whether every copy gets the same rows."""
    shares: tuple[float, ...] | None = None
    """Weights of the rows of each copy."""
    savings: Sequence[tuple[int, str]] = ((0, "none"),)
    """Degrees of ZeRO with ways to recompute."""
    filled: float = 1.0
    """The part of a memory that may be in use."""
    in_time: bool = True
    """Whether the model can be cut into microbatches."""


@dataclass(frozen=True)
class Choice:
    """One way to put the model on the devices."""

    way: Way
    zero: int
    groups: tuple[tuple[Unit, ...], ...]
    """Per group of devices, one for each copy; of more stages than groups, each group has every so many."""
    sizes: tuple[int, ...]
    """Blocks of each stage."""
    rows: tuple[int, ...]
    """Of the global batch, per copy."""
    microbatches: int
    step_s: float
    """Seconds of a step, as the bottleneck has it."""
    filled: float
    """The largest part of a memory in use."""
    tightest: int
    """A device with that."""
    shares: tuple[float, ...] = ()
    """The weights of the copies, of which `rows` are whole parts."""

    @property
    def copies(self) -> int:
        return len(self.rows)

    @property
    def devices(self) -> int:
        """How many are used."""
        return sum(len(unit.devices) for group in self.groups for unit in group)

    @property
    def order(self) -> tuple[float, int, int, int]:
        """Sorts choices from best to worst: by time, ties to fewer stages, splits and microbatches."""
        return self.step_s, len(self.sizes), self.way.split, self.microbatches


def best_choices(table: BlockTable, cluster: ClusterSpec, limits: Limits = Limits(), count: int = 8) -> list[Choice]:
    """The best choices found, best first, no two with the same stages, split and copies; none where nothing fits."""
    return Search(table, cluster, limits, count).found()


@dataclass
class Form:
    """Where the stages go: all that is chosen before their blocks, rows and microbatches."""

    way: Way
    zero: int
    stages: int
    groups: tuple[tuple[Unit, ...], ...]
    """As in `Choice`."""
    costs: StageCosts
    known: dict[tuple[int, int], tuple[float, float]] = field(
        default_factory=dict[tuple[int, int], tuple[float, float]]
    )

    @property
    def copies(self) -> int:
        return len(self.groups[0])

    @cached_property
    def columns(self) -> list[tuple[int, ...]]:
        """Per copy, the kind of each of its stages."""
        per_stage = [self.groups[k % len(self.groups)] for k in range(self.stages)]
        return list(zip(*(tuple(unit.kind for unit in units) for units in per_stage), strict=True))

    def crossing(self, source: int, target: int) -> tuple[float, float]:
        """Between two stages: seconds of latency, and per byte of one copy."""
        key = source % len(self.groups), target % len(self.groups)
        if key not in self.known:
            same = key[0] == key[1]
            self.known[key] = (0.0, 0.0) if same else self.costs.crossing(*(self.groups[g] for g in key))
        return self.known[key]


@dataclass(frozen=True)
class _Lead:
    """A form with a number of microbatches, not looked at yet."""

    bound_s: float
    microbatches: int
    place: tuple[Way, int, int, int, tuple[int, ...], bool]
    """Way, ZeRO, stages, copies, the order of kinds, and whether the copies of a stage are neighbours."""


class Search:
    """One search."""

    def __init__(self, table: BlockTable, cluster: ClusterSpec, limits: Limits, count: int) -> None:
        self.costs = StageCosts(table, cluster)
        self.table, self.cluster, self.limits, self.count = table, cluster, limits, count
        self._units = {split: units_of(cluster, split) for split in table.splits if limits.split in (None, split)}
        self._forms: dict[object, Form] = {}
        self._fits: dict[object, bool] = {}
        self._views: dict[object, tuple[list[float], tuple[list[float], float]]] = {}

    def found(self) -> list[Choice]:
        """The best choices, best first."""
        best: dict[object, Choice] = {}
        limit = math.inf
        for lead in sorted(self._leads(), key=lambda lead: lead.bound_s):
            if lead.bound_s >= limit:
                break
            if not self._may_fit(lead):
                continue
            choice = self._cut(self._form(lead), lead.microbatches)
            if choice is None:
                continue
            key = len(choice.sizes), choice.copies, choice.way, choice.zero, len(lead.place[4])
            if key not in best or choice.order < best[key].order:
                best[key] = choice
                ranked = sorted(own.step_s for own in best.values())
                limit = ranked[self.count - 1] if len(ranked) >= self.count else math.inf
        return heapq.nsmallest(self.count, best.values(), key=lambda choice: choice.order)

    # -- what there is to look at

    def _leads(self) -> Iterator[_Lead]:
        for zero, recompute in self.limits.savings:
            for split, units in self._units.items():
                present = [kind for kind, own in enumerate(units) if own]
                sizes = range(len(present), 0, -1) if len(present) <= _MOST_LEFT_OUT else (len(present),)
                for size in sizes:
                    for chosen in combinations(present, size):
                        yield from self._of_kinds(Way(split, recompute), zero, chosen)

    def _of_kinds(self, way: Way, zero: int, chosen: tuple[int, ...]) -> Iterator[_Lead]:
        there = sum(len(self._units[way.split][kind]) for kind in chosen)
        orders = list(orders_of(self.costs.kinds, chosen))
        for stages, copies in self._degrees(there):
            for microbatches in self._microbatches(copies):
                bound = self._bound(way, chosen, stages, copies, microbatches)
                for order in orders if stages > 1 else orders[:1]:
                    for across in (True, False) if stages > 1 and copies > 1 else (True,):
                        yield _Lead(bound, microbatches, (way, zero, stages, copies, order, across))

    def _degrees(self, units: int) -> Iterator[tuple[int, int]]:
        """Stages and copies of them that so many units can be used by."""
        limits, blocks = self.limits, len(self.table.order)
        for stages in (limits.stages,) if limits.stages else range(1, min(units * limits.chunks, blocks) + 1):
            groups, left = divmod(stages, limits.chunks)
            if left or (groups == 1 < stages and limits.stages is None):  # in turns on one unit there is no gain
                continue
            most = min(units // groups, self.table.rows)
            wasted = units - most * groups
            if most < 1 or stages > blocks or (limits.replicate or most) > most:
                continue
            if limits.stages is None and stages > 1 and wasted > units * _WASTED:
                continue
            yield stages, limits.replicate or most

    def _microbatches(self, copies: int) -> list[int]:
        """Numbers of microbatches worth a try, by the rows in each."""
        rows, limits = self.table.rows // copies, self.limits
        if limits.microbatches is not None or not limits.in_time:
            count = limits.microbatches or 1
            return [count] if count <= max(rows, 1) else []
        each = (1 << k for k in range(rows.bit_length()))
        return sorted({1, *(math.ceil(rows / one) for one in each)})

    def _bound(self, way: Way, chosen: Sequence[int], stages: int, copies: int, microbatches: int) -> float:
        """Seconds that no cut beats: every unit busy all the time, and one microbatch through the fastest of them."""
        rows = max(self.table.rows // copies // microbatches, 1)
        even = len(chosen) == 1 and self.limits.shares is None
        most = math.ceil(math.ceil(self.table.rows / (copies if even else 1)) / microbatches)
        units = self._units[way.split]
        way = _adding(way, microbatches)
        whole = {kind: float(self.costs.sums(way, most, kind).both[-1]) / most for kind in chosen}
        used, pace = stages // self.limits.chunks * copies, 0.0
        for kind in sorted(chosen, key=whole.__getitem__):
            taken = min(used, len(units[kind]))
            pace, used = pace + taken / whole[kind], used - taken
        once = min(whole.values()) * rows
        steady = self.table.rows / pace
        return steady if stages == 1 else steady * (microbatches - 1) / microbatches + once

    # -- one form

    def _form(self, lead: _Lead) -> Form:
        """The units of each group, one per copy."""
        if lead.place not in self._forms:
            way, zero, stages, copies, order, across = lead.place
            row = [unit for kind in order for unit in self._units[way.split][kind]]
            count = stages // self.limits.chunks
            if across:
                groups = tuple(tuple(row[g * copies : (g + 1) * copies]) for g in range(count))
            else:
                groups = tuple(tuple(row[c * count + g] for c in range(copies)) for g in range(count))
            self._forms[lead.place] = self.form_of(way, zero, stages, groups)
        return self._forms[lead.place]

    def form_of(self, way: Way, zero: int, stages: int, groups: tuple[tuple[Unit, ...], ...]) -> Form:
        """Stages on these groups of units, one of each group per copy."""
        return Form(way, zero, stages, groups, self.costs)

    def _may_fit(self, lead: _Lead) -> bool:
        """Whether the stages fit with one row at a time, which takes least memory."""
        if lead.place not in self._fits:
            form = self._form(lead)
            rows = self.table.rows // form.copies
            count = max(rows, 1) if self.limits.in_time else 1
            each = math.ceil(rows / count)
            classes = sorted({(column, each) for column in form.columns})
            parts = self._parts(form, count, classes)
            self._fits[lead.place] = parts is not None and can_be_cut(parts)
        return self._fits[lead.place]

    def _cut(self, form: Form, microbatches: int) -> Choice | None:
        columns, limits = form.columns, self.limits
        if limits.shares is not None and len(limits.shares) != len(columns):
            return None
        alike = limits.shares is None and (limits.equal or len(set(columns)) == 1)
        weights: Sequence[float] = limits.shares or (
            [1.0] * len(columns) if alike else [self._pace(form, microbatches, column) for column in columns]
        )
        best: Choice | None = None
        for _ in range(1 if alike or limits.shares else _ROUNDS):
            rows = round_shares(self.table.rows, weights, at_least_one=True)
            if min(rows) < microbatches and form.stages > 1:
                break
            made = self.with_rows(form, microbatches, rows)
            if made is None or (best is not None and made[0].order >= best.order):
                break
            most = max(weights)
            best, taken = replace(made[0], shares=tuple(weight / most for weight in weights)), made[1]
            weights = [own / max(seconds, 1e-12) for own, seconds in zip(rows, taken, strict=True)]
        return best

    def _pace(self, form: Form, microbatches: int, column: Sequence[int]) -> float:
        """Rows per second of one copy, if its stages were even."""
        rows = max(self.table.rows // form.copies // microbatches, 1)
        way = _adding(form.way, microbatches)
        return sum(1 / float(self.costs.sums(way, rows, kind).both[-1]) for kind in column)

    def with_rows(self, form: Form, microbatches: int, rows: Sequence[int]) -> tuple[Choice, list[float]] | None:
        """The best cut with these rows per copy, and the seconds of each copy."""
        kinds = [(column, math.ceil(own / microbatches)) for column, own in zip(form.columns, rows, strict=True)]
        classes = sorted(set(kinds))
        parts = self._parts(form, microbatches, classes)
        sizes = None if parts is None else cut_blocks(parts)
        if parts is None or sizes is None:
            return None
        taken = {key: self._copy_s(form, microbatches, *key, sizes) for key in classes}
        each = [taken[kind] for kind in kinds]
        step = max(each) + self._closing_s(form, microbatches, sizes)
        filled, tightest = self._filled(form, parts, classes, sizes)
        choice = Choice(form.way, form.zero, form.groups, sizes, tuple(rows), microbatches, step, filled, tightest)
        return choice, each

    def _parts(
        self, form: Form, microbatches: int, classes: Sequence[tuple[tuple[int, ...], int]]
    ) -> list[Part] | None:
        """The stages as each kind of device and number of rows sees them; None where one has no room at all."""
        parts: list[Part] = []
        for k in range(form.stages):
            part = self._part(form, k, microbatches, {(column[k], each) for column, each in classes})
            if any(room <= 0 for _, room in part.held):
                return None
            parts.append(part)
        return parts

    def _part(self, form: Form, k: int, microbatches: int, classes: set[tuple[int, int]]) -> Part:
        # Under 1F1B a stage that is S - k from the end holds as many microbatches, of interleaved ones up to a round
        # more.
        chunks = self.limits.chunks
        flying = min(microbatches, form.stages - k if chunks == 1 else 2 * form.stages // chunks)
        way = _adding(form.way, microbatches)
        ways = [self._seen(way, form.zero, form.copies, kind, each, flying) for kind, each in sorted(classes)]
        return Part([seconds for seconds, _ in ways], [held for _, held in ways])

    def _seen(
        self, way: Way, zero: int, copies: int, kind: int, rows: int, flying: int
    ) -> tuple[list[float], tuple[list[float], float]]:
        """What a kind of device sees of the blocks: seconds, and bytes with so many microbatches in flight."""
        key = way, zero, copies if zero else 1, kind, rows, flying
        if key not in self._views:
            sums, cost = self.costs.sums(way, rows, kind), self.costs.costs[kind]
            room = self.limits.filled * cost.device.memory_bytes - cost.runtime_bytes - sums.peak
            held = (self.costs.static(way, zero, copies) + flying * sums.saved).tolist()
            # Each of the stages on one group may use its part of the memory.
            self._views[key] = self.costs.listed(sums.both), (held, room / self.limits.chunks)
        return self._views[key]

    def _copy_s(self, form: Form, microbatches: int, column: tuple[int, ...], rows: int, sizes: Sequence[int]) -> float:
        """Seconds of one copy without its gradients: its slowest stage over and over, and one way there and back."""
        own: list[float] = []
        between: list[float] = []
        start = 0
        way = _adding(form.way, microbatches)
        for k, size in enumerate(sizes):
            sums = self.costs.sums(way, rows, column[k])
            own.append(float(sums.both[start + size] - sums.both[start]))
            start += size
            if k + 1 < form.stages:
                latency, per_byte = form.crossing(k, k + 1)
                between.append(latency + per_byte * float(sums.sends[start]))
        groups = len(form.groups)
        busy = [sum(own[g::groups]) for g in range(groups)]
        once = sum(own) + 2 * sum(between)
        turn = max(*busy, 0.0, *between, once / min(len(own), microbatches))
        return once + (microbatches - 1) * (turn if len(own) > 1 else own[0])

    def _closing_s(self, form: Form, microbatches: int, sizes: Sequence[int]) -> float:
        """Seconds after the last microbatch: gradients over the copies, and the update."""
        gradients = self.costs.gradients(form.way)
        most, start = 0.0, 0
        for k, size in enumerate(sizes):
            group = form.groups[k % len(form.groups)]
            own = float(gradients[start + size] - gradients[start])
            reduced = self.costs.reduce_s(group, own)
            if form.stages == 1 and self._overlaps:
                rows = max(self.table.rows // form.copies // microbatches, 1)
                hidden = float(self.costs.sums(_adding(form.way, microbatches), rows, group[0].kind).backward[-1])
                reduced = max(reduced - hidden, reduced / len(self.table.order))
            updated = own * max(self.costs.update_s(form.way, kind) for kind in {unit.kind for unit in group})
            most = max(most, reduced + updated / (form.copies if form.zero else 1))
            start += size
        return most + self._lending_s(form, sizes)

    def _lending_s(self, form: Form, sizes: Sequence[int]) -> float:
        """Seconds in which parameters of one stage go to another at the start of the step, and gradients back."""
        ends = list(accumulate(sizes))
        found = 0.0
        for lent in self.table.lent:
            owner, reader = (bisect_right(ends, place) for place in (lent.owner, lent.reader))
            latency, per_byte = form.crossing(owner, reader)
            found += 2 * (latency + per_byte * lent.size)
        return found

    @cached_property
    def _overlaps(self) -> bool:
        """Whether gradients are reduced during the backward pass: where collectives do not need the cores."""
        return all(kind.profile.vendor != "CPU" for kind in self.costs.kinds)

    def _filled(
        self, form: Form, parts: Sequence[Part], classes: Sequence[tuple[tuple[int, ...], int]], sizes: Sequence[int]
    ) -> tuple[float, int]:
        """The largest part of a memory in use, and a device with that."""
        most, start = (0.0, 0), 0
        for k, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            kinds = sorted({(column[k], each) for column, each in classes})
            group = form.groups[k % len(form.groups)]
            for (kind, _), (before, room) in zip(kinds, part.held, strict=True):
                whole = self.costs.costs[kind].device.memory_bytes
                more = self.limits.chunks * (before[start + size] - before[start] - room)
                first = next(unit.devices[0] for unit in group if unit.kind == kind)
                most = max(most, (self.limits.filled + more / whole, first))
            start += size
        return most


def _adding(way: Way, microbatches: int) -> Way:
    return replace(way, adds=microbatches > 1)


_ROUNDS = 4
"""Rows are shared out anew by what the copies took, so often."""
_WASTED = 0.1
"""Forms that leave more of the units idle are not looked at."""
_MOST_LEFT_OUT = 4
"""Of up to so many kinds of device, each choice of some is tried without the others."""
