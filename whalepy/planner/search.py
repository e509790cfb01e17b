"""The best way to put a model on a cluster: stages, devices of each, split, copies, rows and microbatches together.

Every form is one: copies of a chain of stages, each stage on a unit of like devices that split it. One stage is data
parallelism, one copy a plain pipeline. Forms are taken in the order of a bound that no cut of theirs can beat, and none
is looked at once the best ones found are faster than its bound.

Source: the searches of PipeDream (Narayanan et al., SOSP 2019, section 3.1) and of Megatron-LM (Narayanan et al.,
SC 2021, section 3) take like devices; Whale's (section 3.5) balances afterwards.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, islice

from whalepy.planner.block_table import Way
from whalepy.planner.bounds import Bounds, Lead
from whalepy.planner.cut import Part, cut_blocks
from whalepy.planner.form import Form, Groups, Limits, Shape, Width, widths_of
from whalepy.planner.shares import round_shares
from whalepy.planner.stage_cost import Places, StageCosts
from whalepy.planner.units import orders_of
from whalepy.planner.unlike_widths import UnlikeWidths


@dataclass(frozen=True)
class Choice:
    """One way to put the model on the devices."""

    recompute: str
    zero: int
    groups: Groups
    """Per group of devices, as many for each copy; of more stages than groups, each group has every so many."""
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
    def widths(self) -> tuple[Width, ...]:
        """Of the stages of each group."""
        return widths_of(self.groups, self.copies)

    @property
    def split(self) -> int:
        """The degree inside the stages, of unlike ones the largest."""
        return max(width.split for width in self.widths)

    @property
    def unlike(self) -> bool:
        """Whether stages have unlike widths."""
        return len(set(self.widths)) > 1

    @property
    def order(self) -> tuple[float, int, int, int]:
        """Sorts choices from best to worst: by time, ties to fewer stages, splits and microbatches."""
        return self.step_s, len(self.sizes), self.split, self.microbatches


@dataclass
class _View:
    """The blocks as one kind of device sees them."""

    seconds: list[float]
    static: Places
    saved: Places
    room: float
    """Bytes that one stage may hold."""
    known: dict[int, list[float]] = field(default_factory=dict[int, list[float]])

    def held(self, flying: int) -> list[float]:
        """Bytes of the blocks before each place with so many microbatches in flight."""
        if flying not in self.known:
            self.known[flying] = (self.static + flying * self.saved).tolist()
        return self.known[flying]


class Search:
    """A search for the best ways to put a model on a cluster, no two with the same stages, split and copies."""

    def __init__(self, costs: StageCosts, limits: Limits, count: int = 8) -> None:
        self.costs, self.table, self.limits, self.count = costs, costs.table, limits, count
        self._bounds = Bounds(costs, limits)
        self._forms: dict[Shape, Form] = {}
        self._views: dict[tuple[Way, int, int, int, int], _View] = {}

    def found(self) -> list[Choice]:
        """The best ways found, best first; none where nothing fits."""
        best: dict[object, Choice] = {}
        limit = math.inf
        for lead in () if self.limits.widths is not None else self.leads():
            if lead.bound_s >= limit:
                break
            limit = self._noted(best, self.cut(lead, limit), len(lead.shape.kinds), limit)
        for choice in self._unlike(min((choice.step_s for choice in best.values()), default=math.inf)):
            self._noted(best, choice, len({unit.kind for group in choice.groups for unit in group}), limit)
        return heapq.nsmallest(self.count, best.values(), key=lambda choice: choice.order)

    def _noted(self, best: dict[object, Choice], choice: Choice | None, kinds: int, limit: float) -> float:
        """Take a choice on if it is the best of its form; seconds that others have to beat."""
        if choice is None:
            return limit
        key = len(choice.sizes), choice.copies, choice.widths, choice.recompute, choice.zero, kinds
        if key in best and best[key].order <= choice.order:
            return limit
        best[key] = choice
        ranked = sorted(own.step_s for own in best.values())
        return ranked[self.count - 1] if len(ranked) >= self.count else math.inf

    def _unlike(self, limit: float) -> Iterator[Choice]:
        """Stages of unlike widths, each faster than those before it, and by a little than those of like ones."""
        found, limit = UnlikeWidths(self.costs, self.limits, self._bounds.loads), limit * _WORTH_IT
        for zero, recompute in self.limits.savings:
            for unlike in islice(found.leads(zero, recompute, limit), _MOST_CUT):
                if unlike.bound_s >= limit:
                    break
                form = found.form_of(unlike, zero, recompute)
                if form is None:
                    continue
                choice = self._cut(form, unlike.microbatches, limit / max(unlike.microbatches - 1, 1))
                if choice is not None and choice.step_s < limit:
                    limit = choice.step_s
                    yield choice

    # -- what there is to look at

    def leads(self) -> Iterator[Lead]:
        """Forms with numbers of microbatches, in the order of seconds that no cut of them beats."""
        number = itertools.count()
        heap: list[tuple[float, int, Shape | Lead]] = []
        for shape in self._shapes():
            if (bound := self._bounds.of_kinds(shape)) < math.inf:
                heapq.heappush(heap, (bound, next(number), shape))
        while heap:
            bound, _, first = heapq.heappop(heap)
            if isinstance(first, Lead):
                yield first
                continue
            for lead in itertools.chain.from_iterable(map(self._bounds.leads, self._ordered(first))):
                heapq.heappush(heap, (max(bound, lead.bound_s), next(number), lead))

    def _shapes(self) -> Iterator[Shape]:
        """Kinds of device with the numbers of stages and copies that there are units for."""
        for zero, recompute in self.limits.savings:
            for split in self.table.splits:
                if self.limits.split not in (None, split):
                    continue
                there = [len(units) for units in self.costs.units(split)]
                present = [kind for kind, number in enumerate(there) if number]
                sizes = range(len(present), 0, -1) if len(present) <= _MOST_LEFT_OUT else (len(present),)
                for kinds in itertools.chain.from_iterable(itertools.combinations(present, size) for size in sizes):
                    for stages, copies in self._degrees(sum(there[kind] for kind in kinds)):
                        groups = stages // self.limits.chunks
                        yield Shape(Way(split, recompute), zero, stages, groups, copies, kinds)

    def _ordered(self, shape: Shape) -> Iterator[Shape]:
        """The orders in which stages and copies may take the units."""
        if shape.stages == 1:
            yield shape
            return
        for kinds in orders_of(self.costs.kinds, shape.kinds):
            for across in (True, False) if shape.copies > 1 else (True,):
                yield replace(shape, kinds=kinds, across=across)

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

    # -- one form

    def cut(self, lead: Lead, limit: float = math.inf) -> Choice | None:
        """The best cut found; None where nothing fits, or it would take longer than the limit."""
        shape = lead.shape
        if shape not in self._forms:
            groups = shape.groups_of(self.costs.units(shape.way.split))
            self._forms[shape] = self.form_of(shape.way.recompute, shape.zero, shape.stages, groups, shape.copies)
        turn = (limit - lead.rest_s) / (lead.microbatches - 1) if lead.microbatches > 1 else math.inf
        return self._cut(self._forms[shape], lead.microbatches, turn)

    def form_of(self, recompute: str, zero: int, stages: int, groups: Groups, copies: int) -> Form:
        """Stages on these groups of units, as many of each group per copy."""
        return Form(recompute, zero, stages, groups, copies, self.costs)

    def _cut(self, form: Form, microbatches: int, turn: float) -> Choice | None:
        columns, limits = form.columns, self.limits
        if limits.shares is not None and len(limits.shares) != len(columns):
            return None
        alike = limits.shares is None and (limits.equal or len(set(columns)) == 1)
        weights = limits.shares or ([1.0] * len(columns) if alike else self._paces(form, microbatches))
        final = alike or limits.shares is not None
        best: Choice | None = None
        for _ in range(1 if final else _ROUNDS):
            rows = round_shares(self.table.rows, weights, at_least_one=True)
            if min(rows) < microbatches and form.stages > 1:
                break
            made = self.with_rows(form, microbatches, rows, turn if final else math.inf)
            if made is None or (best is not None and made[0].order >= best.order):
                break
            most = max(weights)
            best, taken = replace(made[0], shares=tuple(weight / most for weight in weights)), made[1]
            weights = [own / max(seconds, 1e-12) for own, seconds in zip(rows, taken, strict=True)]
        return best

    def _paces(self, form: Form, microbatches: int) -> list[float]:
        """Rows per second of each copy, if its stages were even."""
        rows = max(self.table.rows // form.copies // microbatches, 1)
        keys = {(form.widths[k], kind) for column in set(form.columns) for k, kind in enumerate(column)}
        firsts = {width: k for k, width in reversed(list(enumerate(form.widths)))}
        pace = {
            key: 1 / float(self.costs.sums(*form.of(firsts[key[0]], microbatches, rows), key[1]).both[-1])
            for key in keys
        }
        known = {c: sum(pace[key] for key in zip(form.widths, c, strict=True)) for c in set(form.columns)}
        return [known[column] for column in form.columns]

    def with_rows(
        self, form: Form, microbatches: int, rows: Sequence[int], turn: float = math.inf
    ) -> tuple[Choice, list[float]] | None:
        """The best cut with these rows per copy, and the seconds of each copy; `turn`: of a stage at most."""
        kinds = [(column, math.ceil(own / microbatches)) for column, own in zip(form.columns, rows, strict=True)]
        classes = sorted(set(kinds))
        parts = self._parts(form, microbatches, classes)
        sizes = None if parts is None else cut_blocks(parts, turn)
        if parts is None or sizes is None:
            return None
        taken = {key: self._copy_s(form, microbatches, *key, sizes) for key in classes}
        each = [taken[kind] for kind in kinds]
        step = max(each) + self._closing_s(form, microbatches, sizes)
        filled, tightest = self._filled(form, parts, classes, sizes)
        choice = Choice(
            form.recompute, form.zero, form.groups, sizes, tuple(rows), microbatches, step, filled, tightest
        )
        return choice, each

    def _parts(
        self, form: Form, microbatches: int, classes: Sequence[tuple[tuple[int, ...], int]]
    ) -> list[Part] | None:
        """The stages as each kind of device and number of rows sees them; None where one has no room at all."""
        chunks, parts = self.limits.chunks, list[Part]()
        known: dict[object, list[_View]] = {}
        for k, width in enumerate(form.widths):
            keys = tuple(sorted({(column[k], each) for column, each in classes}))
            if (width, keys) not in known:
                known[width, keys] = [
                    self._view(*form.of(k, microbatches, each), form.zero, width.replicate * form.copies, kind)
                    for kind, each in keys
                ]
            own = known[width, keys]
            if any(view.room <= 0 for view in own):
                return None
            # Under 1F1B a stage that is S - k from the end holds as many microbatches, of interleaved ones up to a
            # round more.
            flying = min(microbatches, form.stages - k if chunks == 1 else 2 * form.stages // chunks)
            parts.append(Part([view.seconds for view in own], [(view.held(flying), view.room) for view in own]))
        return parts

    def _view(self, way: Way, rows: int, zero: int, replicas: int, kind: int) -> _View:
        """What a kind of device sees of the blocks."""
        key = way, rows, zero, replicas if zero else 1, kind
        if key not in self._views:
            sums, cost = self.costs.sums(way, rows, kind), self.costs.costs[kind]
            room = self.limits.filled * cost.device.memory_bytes - cost.runtime_bytes - sums.peak
            # Each of the stages on one group may use its part of the memory.
            seconds, static = sums.both.tolist(), self.costs.static(way, zero, replicas)
            self._views[key] = _View(seconds, static, sums.saved, room / self.limits.chunks)
        return self._views[key]

    def _copy_s(self, form: Form, microbatches: int, column: tuple[int, ...], rows: int, sizes: Sequence[int]) -> float:
        """Seconds of one copy without its gradients: its slowest stage over and over, and one way there and back."""
        own: list[float] = []
        between: list[float] = []
        gathered = [0.0] * form.stages
        start = 0
        for k, size in enumerate(sizes):
            sums = self.costs.sums(*form.of(k, microbatches, rows), column[k])
            own.append(float(sums.both[start + size] - sums.both[start]))
            start += size
            if k + 1 < form.stages:
                latency, per_byte = form.crossing(k, k + 1)
                crossing = form.widths[k].replicate * float(sums.sends[start])
                between.append(latency + per_byte * crossing)
                for end in (k, k + 1):
                    gathered[end] += self._gathering_s(form.widths[end], column[end], crossing)
        own = [a + b for a, b in zip(own, gathered, strict=True)]
        groups = len(form.groups)
        busy = [sum(own[g::groups]) for g in range(groups)]
        once = sum(own) + 2 * sum(between)
        turn = max(*busy, 0.0, *between, once / min(len(own), microbatches))
        chunks = self.limits.chunks  # they divide the bubble: Megatron-LM (SC 2021), section 2.2.2
        return once / chunks + (microbatches - 1 / chunks) * (turn if len(own) > 1 else own[0])

    def _gathering_s(self, width: Width, kind: int, crossing: float) -> float:
        """Seconds in which a stage that is split makes what crosses whole: what it reads, or its gradient."""
        if width.split == 1:
            return 0.0
        size = crossing / width.replicate * (1 - 1 / width.split)
        return self.costs.inside(width.split, kind).seconds("all-gather", round(size))

    def _closing_s(self, form: Form, microbatches: int, sizes: Sequence[int]) -> float:
        """Seconds after the last microbatch: gradients over those with parts of the rows, and the update."""
        most, start = 0.0, 0
        for k, size in enumerate(sizes):
            g, (way, _) = k % len(form.groups), form.of(k, 1, 1)
            gradients, replicas = self.costs.gradients(way), len(form.groups[g])
            own, route = float(gradients[start + size] - gradients[start]), form.reducing[g]
            reduced = route.seconds("all-reduce", round(2 * own * (1 - 1 / replicas))) if route else 0.0
            if form.stages == 1 and self._overlaps:
                rows, kind = max(self.table.rows // form.copies // microbatches, 1), form.groups[g][0].kind
                hidden = float(self.costs.sums(*form.of(k, microbatches, rows), kind).backward[-1])
                reduced = max(reduced - hidden, reduced / len(self.table.order))
            updated = own * max(self.costs.update_s(way, kind) for kind in form.kinds[g])
            most = max(most, reduced + updated / (replicas if form.zero else 1))
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
        return all(kind.profile.computes_beside for kind in self.costs.kinds)

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


_ROUNDS = 4
"""Rows are shared out anew by what the copies took, so often."""
_WASTED = 0.1
"""Forms that leave more of the units idle are not looked at."""
_WORTH_IT = 0.99
"""Stages of unlike widths are taken for what they are expected to gain by more than this: like ones are simpler."""
_MOST_CUT = 300
"""Choices of unlike widths that are cut, those with the best bounds."""
_MOST_LEFT_OUT = 4
"""Of up to so many kinds of device, each choice of some is tried without the others."""
