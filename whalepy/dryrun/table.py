"""The blocks of a studied model as a table: each split degree is rehearsed with two numbers of rows, others follow.

Operators outside all blocks belong to the block that runs before them, the leading ones to the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from whalepy.dryrun.blocks import Blocks, module_of
from whalepy.dryrun.strategies import levels_of, only
from whalepy.dryrun.study import Savings, Study
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import BlockWork, Lent, Way
from whalepy.planner.units import kind_of
from whalepy.planner.work import KEPT, Event, Holdings, Recorded
from whalepy.program.analysis import Program
from whalepy.program.taskgraphs import turns


@dataclass
class ModelTable:
    """What each block of a model takes; `study` holds the model, without most of the blocks that repeat."""

    study: Study
    cluster: ClusterSpec
    in_time: bool
    """Whether the loss can be computed in microbatches."""
    split: int | None = None
    """The only degree of split that is asked for; None: any."""
    _runs: dict[tuple[Way, int], tuple[Recorded, tuple[BlockWork, ...]]] = field(
        default_factory=dict[tuple[Way, int], tuple[Recorded, tuple[BlockWork, ...]]]
    )
    _works: dict[tuple[Way, int], tuple[BlockWork, ...]] = field(
        default_factory=dict[tuple[Way, int], tuple[BlockWork, ...]]
    )

    @property
    def rows(self) -> int:
        """Of the global batch."""
        return self.study.rows

    @cached_property
    def turn_of(self) -> list[int]:
        """Per operator of the program, the block that it belongs to."""
        return blocks_of_operators(self.study.program, self.study.blocks)

    @cached_property
    def ran(self) -> tuple[int, ...]:
        """The blocks that were run, in their order."""
        order = turns(self.study.program)
        found = (self.turn_of[i] for i in sorted(range(len(order)), key=order.__getitem__) if self.turn_of[i] >= 0)
        return tuple(dict.fromkeys(found))

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The numbers, in the whole model, of its blocks in the order in which they run."""
        found: dict[int, list[int]] = defaultdict(list)
        for place, number in enumerate(self.study.blocks.stand_ins):
            found[number].append(place)
        keys: dict[int, tuple[int, int, int]] = {}
        for k, number in enumerate(self.ran):
            for turn, place in enumerate(found[number]):
                keys[place] = self._starts[number], self._repeat_of.get(number, 0) + turn, k
        return tuple(sorted(keys, key=keys.__getitem__))

    @cached_property
    def _repeat_of(self) -> Mapping[int, int]:
        """For each block of a fold that was run, the repeat of the whole model that it is, or the first."""
        firsts = ((fold, (0, 1, fold.repeats - 1)) for fold in self.study.blocks.folds)
        return {block: first for fold, own in firsts for k, first in enumerate(own) for block in fold.blocks(k)}

    @cached_property
    def _starts(self) -> Mapping[int, int]:
        """Where in `ran` each block begins; those of a fold, and of folds that take turns with it, begin together."""
        fold_of = {b: fold.first for fold in self.study.blocks.folds for r in range(KEPT) for b in fold.blocks(r)}
        last = {fold_of.get(number, -1): k for k, number in enumerate(self.ran)}
        found: dict[int, int] = {}
        begins, ends = 0, -1
        for k, number in enumerate(self.ran):
            if k > ends:
                begins = k
            ends = max(ends, last[fold_of[number]] if number in fold_of else k)
            found[number] = begins
        return found

    @property
    def order(self) -> tuple[int, ...]:
        """For each block of the model the one in `works` that stands for it."""
        return self._order

    @cached_property
    def _order(self) -> tuple[int, ...]:
        numbers = self.study.blocks.stand_ins
        at = {number: k for k, number in enumerate(self.ran)}
        return tuple(at[numbers[place]] for place in self.places)

    @property
    def splits(self) -> tuple[int, ...]:
        """Of 1 and the powers of two those asked for, of like devices in one node, that the model can be split over."""
        return self._splits

    @cached_property
    def _splits(self) -> tuple[int, ...]:
        alike: defaultdict[tuple[int, object], int] = defaultdict(int)
        for device in self.cluster.devices:
            alike[device.node, kind_of(device)] += 1
        most = max(alike.values())
        wanted = [s for s in (1, 2, 4, 8, 16) if self.split in (None, s) and s <= most]
        return tuple(s for s in wanted if self._can_be_split(s))

    def _can_be_split(self, degree: int) -> bool:
        try:
            self._run(Way(degree), self._few[0])
        except WhaleError:
            if degree == 1:
                raise
            return False
        return True

    def works(self, way: Way, rows: int) -> tuple[BlockWork, ...]:
        """The blocks that were run, in their order, with so many rows in a microbatch."""
        key = way, rows
        if key not in self._works:
            self._works[key] = self._between(way, rows)
        return self._works[key]

    def update(self, way: Way) -> Sequence[Event]:
        """The optimizer over all parameters of the blocks that were run."""
        return self._run(way, self._few[0])[0].optimizer

    @property
    def some(self) -> int:
        """A number of rows that was run."""
        return self._few[0]

    @property
    def _few(self) -> tuple[int, int]:
        """The numbers of rows that are rehearsed."""
        return (2, 4) if self.rows >= 4 else (1, max(self.rows, 1))

    def _between(self, way: Way, rows: int) -> tuple[BlockWork, ...]:
        small, large = self._few
        if rows in (small, large) or small == large:
            return self._run(way, rows)[1]
        pairs = zip(self._run(way, small)[1], self._run(way, large)[1], strict=True)
        part = (rows - small) / (large - small)
        found = [_mixed(a, b, part) for a, b in pairs]
        return self._run(way, rows)[1] if None in found else tuple(one for one in found if one is not None)

    def _run(self, way: Way, rows: int) -> tuple[Recorded, tuple[BlockWork, ...]]:
        """What was run: two microbatches where there may be several, of which the first makes its gradients anew."""
        if (way, rows) not in self._runs:
            part = _alike(self.cluster, way.split)
            savings = Savings(0, way.recompute)  # type: ignore[arg-type]
            count = 2 if self.in_time else 1
            candidate = self.study.candidate(levels_of(1, way.split), part, part.speeds(), count, savings)
            recorded = candidate.recording(candidate.plan.ranks[0], count * rows)
            for adds, turn in ((False, 0), (True, count - 1)):
                works = tuple(self._block_works(recorded, turn, rows))
                self._runs[way._replace(adds=adds), rows] = recorded, works
        return self._runs[way, rows]

    def _block_works(self, recorded: Recorded, turn: int, rows: int) -> Iterator[BlockWork]:
        """Of one of the microbatches that were run."""
        events = recorded.microbatches[turn]
        forward = _by_block([e for e in events if e.phase == "forward"], self.ran[0])
        backward = _by_block([e for e in events if e.phase == "backward"], self.ran[-1])
        held = _before(events, recorded.microbatches[turn - 1][-1].memory if turn else None)
        for number in self.ran:
            own, back = forward.get(number, ()), backward.get(number, ())
            holdings = recorded.holdings.get(number, Holdings())
            holdings += _part(recorded.holdings.get(-1, Holdings()), self._outside.get(number, 0.0))
            saved = own[-1].memory - held[id(own[0])] if own else 0
            peaks = [max(e.peak for e in part) - held[id(part[0])] for part in (own, back) if part]
            peak = max([0, *(p - saved for p in peaks[:1]), *(p - holdings.first_gradients for p in peaks[1:])])
            sends = round(self._crossing[number] * rows)
            yield BlockWork(own, back, max(saved, 0), peak, sends, holdings)

    @cached_property
    def _outside(self) -> Mapping[int, float]:
        """Of the parameters outside all blocks, the part that each block is the first to read."""
        program, sizes = self.study.program, defaultdict[int, float](float)
        at = {number: k for k, number in enumerate(self.ran)}
        first: dict[int, int] = {}
        for i, op in enumerate(program.operators):
            for j, _ in op.operands:
                if program.operators[j].kind == "parameter" and self.turn_of[i] in at:
                    first[j] = min(first.get(j, self.turn_of[i]), self.turn_of[i], key=at.__getitem__)
        for j, reader in first.items():
            if self.study.blocks.of(program.placeholder(j).name) < 0:
                sizes[reader] += sum(program.operators[j].result_bytes)
        whole = sum(sizes.values())
        return {number: size / whole for number, size in sizes.items()} if whole else {}

    @property
    def lent(self) -> tuple[Lent, ...]:
        """Parameters outside all blocks that several of them read: from the first to the last of these."""
        return self._lent

    @cached_property
    def _lent(self) -> tuple[Lent, ...]:
        program, readers = self.study.program, defaultdict[int, set[int]](set)
        last = {number: place for place, number in enumerate(self.ran[k] for k in self.order)}
        last[self.ran[0]] = 0
        for i, op in enumerate(program.operators):
            for j, _ in op.operands:
                if program.operators[j].kind == "parameter" and self.turn_of[i] in last:
                    readers[j].add(last[self.turn_of[i]])
        sizes = {j: sum(program.operators[j].result_bytes) for j in readers}
        return tuple(
            Lent(min(places), max(places), sizes[j])
            for j, places in readers.items()
            if len(places) > 1 and self.study.blocks.of(program.placeholder(j).name) < 0
        )

    @cached_property
    def _crossing(self) -> Mapping[int, float]:
        """Bytes per row that are made up to the end of each block and read after it, where parameters lie behind."""
        program, at = self.study.program, {number: k for k, number in enumerate(self.ran)}
        learned: list[bool] = []
        last: dict[tuple[int, int], int] = {}
        for i, op in enumerate(program.operators):
            learned.append(op.kind == "parameter" or any(learned[j] for j, _ in op.operands))
            for value in op.operands:
                if self.turn_of[i] in at:
                    last[value] = max(last.get(value, 0), at[self.turn_of[i]])
        found = dict.fromkeys(self.ran, 0.0)
        for (i, r), stop in last.items():
            op = program.operators[i]
            if op.kind == "call" and learned[i] and self.turn_of[i] in at:
                for k in range(at[self.turn_of[i]], stop):
                    found[self.ran[k]] += op.result_bytes[r] / max(self.rows, 1)
        return found


def blocks_of_operators(program: Program, blocks: Blocks) -> list[int]:
    """Per operator the number of the block that it belongs to; -1 for what is no operator."""
    found = [-1] * len(program.operators)
    order = turns(program)
    early: list[int] = []
    at = -1
    for i in sorted(range(len(order)), key=order.__getitem__):
        if program.operators[i].kind != "call":
            continue
        own = blocks.of(module_of(program.nodes[i]) or "")
        at = own if own >= 0 else at
        found[i] = at
        if at < 0:
            early.append(i)
    first = next((found[i] for i in sorted(range(len(order)), key=order.__getitem__) if found[i] >= 0), 0)
    for i in early:
        found[i] = first
    return found


def _by_block(events: Sequence[Event], first: int) -> dict[int, tuple[Event, ...]]:
    """Events outside all blocks go with the block before them, the leading ones with `first`."""
    found: dict[int, list[Event]] = defaultdict(list)
    at = first
    for event in events:
        at = event.block if event.block >= 0 else at
        found[at].append(event)
    return {block: tuple(own) for block, own in found.items()}


def _before(events: Sequence[Event], held: int | None) -> dict[int, int]:
    """Bytes held before each event, by its identity; `held` before the first, where that is known."""
    found: dict[int, int] = {}
    held = events[0].memory if held is None else held
    for event in events:
        found[id(event)] = held
        held = event.memory
    return found


def _part(holdings: Holdings, part: float) -> Holdings:
    return Holdings(*(round(part * getattr(holdings, name)) for name in Holdings.__dataclass_fields__))


def _mixed(a: BlockWork, b: BlockWork, part: float) -> BlockWork | None:
    """What lies on the line through both; None where they did not do the same."""
    if len(a.forward) != len(b.forward) or len(a.backward) != len(b.backward):
        return None

    def on(x: float, y: float) -> int:
        return max(round(x + (y - x) * part), 0)

    def events(one: Sequence[Event], other: Sequence[Event]) -> tuple[Event, ...]:
        return tuple(
            _event(x, on(x.flops, y.flops), on(x.bytes, y.bytes), on(x.outputs, y.outputs))
            for x, y in zip(one, other, strict=True)
        )

    return BlockWork(
        events(a.forward, b.forward),
        events(a.backward, b.backward),
        on(a.saved, b.saved),
        on(a.peak, b.peak),
        on(a.sends, b.sends),
        a.holdings,
    )


def _event(like: Event, flops: int, size: int, outputs: int) -> Event:
    """The same with other sizes; of all that events are made of, only what their time depends on."""
    plain = replace(like, flops=flops, bytes=size, outputs=outputs)
    return replace(plain, memory=0, peak=0, beside=False, seconds=None)


def _alike(cluster: ClusterSpec, count: int) -> ClusterSpec:
    """So many like devices of one node."""
    for node in cluster.nodes:
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for device in node.devices:
            alike[kind_of(device)].append(device.index)
            if len(alike[kind_of(device)]) == count:
                return only(cluster, set(alike[kind_of(device)]))
    raise AssertionError("splits asks for no more than there are")
