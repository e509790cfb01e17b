"""From a step as it was run, with few blocks and microbatches, to the step of the whole model.

Before:  block 0, block 1, block 2, head             as run: three of the blocks that repeat, two microbatches
After:   block 0, 30 x block 1, block 2, head        in time and in memory, ZeRO and overlap as asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from whalepy.planner.work import KEPT, Event, Fold, Holdings, Part, Phase, Recorded, Rehearsal, Stretch, Wait

Row = Event | Wait


@dataclass(frozen=True)
class Sharding:
    """How parameters, gradients and optimizer state are kept over the replicas."""

    zero: int = 0
    """0: whole on every replica; 1: the optimizer state in parts; 2: the gradients too; 3: the parameters too.

    Source: Rajbhandari et al., ZeRO, SC 2020, section 5.
    """
    replicas: int = 1
    level: int = 0
    """The level of the replicas."""
    overlap: bool = False
    """Whether gradients are reduced during the backward pass."""

    @property
    def gone(self) -> float:
        """The part of a value in parts that another replica holds."""
        return 1 - 1 / self.replicas

    def kept(self, holdings: Holdings) -> Holdings:
        """What a rank keeps of them between operators."""
        part, zero = 1 - self.gone, self.zero
        return Holdings(
            round(holdings.parameters * (part if zero >= 3 else 1)),
            0 if zero >= 3 else holdings.copies,
            round(holdings.first_gradients * (part if zero >= 2 else 1)),
            round(holdings.gradients * (part if zero >= 2 else 1)),
            round(holdings.optimizer * (part if zero >= 1 else 1)),
        )


def whole_step(
    recorded: Recorded, turns: Sequence[tuple[int, int]], folds: Sequence[Fold], sharding: Sharding, inputs: int = 0
) -> Rehearsal:
    """The step of the whole model: microbatches in `turns`, `folds` of the blocks.

    `turns`: which of the microbatches that were run comes next, and how often in a row.

    `inputs`: bytes of the rows that were left out.
    """
    run = sum(recorded.holdings.values(), Holdings())
    root = recorded.holdings.get(-1, Holdings())
    left_out = sum((_unit(recorded, fold).times(fold.repeats - KEPT) for fold in folds), Holdings())
    kept, more = sharding.kept(run), sharding.kept(left_out)
    # Held all the time: less of what was run, and what the blocks that were left out keep.
    always = kept.parameters - run.parameters + kept.optimizer - run.optimizer + more.parameters + more.optimizer
    always += inputs
    if sharding.zero >= 3 and not root.copies:
        always += round(root.parameters * sharding.gone)  # gathered once
    copies = more.copies + (root.copies - run.copies if sharding.zero >= 3 else 0)
    parts: list[Part] = list(_moved(recorded.prelude, always))
    grown, started = 0, False
    for index, (which, times) in enumerate(turns):
        last, events = index == len(turns) - 1, recorded.microbatches[which]
        for count, is_last in ((times - 1, False), (1, True)) if last else ((times, False),):
            if count < 1:
                continue
            rows = _sharded(events, recorded.holdings, sharding, first=not started, last=is_last)
            started = True
            inner, grows = _unfolded(_moved(rows, always + copies + grown), folds)
            if count == 1:
                parts += inner
            else:
                parts.append(Stretch(tuple(inner), count))
            grown += grows
    whole = run + left_out
    parts += _closing(recorded, sharding, run, always, copies, whole)
    final = sharding.kept(whole)
    return Rehearsal(
        tuple(parts), final.parameters, recorded.buffers, final.gradients, final.optimizer, recorded.inputs + inputs
    )


def _unit(recorded: Recorded, fold: Fold) -> Holdings:
    """Of the blocks that one repeat is made of."""
    return sum((recorded.holdings.get(block, Holdings()) for block in fold.blocks(1)), Holdings())


def _moved(rows: Sequence[Row], by: int) -> list[Row]:
    """The same with so many more bytes held."""
    return [_more(row, by) for row in rows]


def _more(row: Row, by: int) -> Row:
    return row if isinstance(row, Wait) or not by else replace(row, memory=row.memory + by, peak=row.peak + by)


# -- blocks that repeat


def _unfolded(rows: Sequence[Row], folds: Sequence[Fold]) -> tuple[list[Part], int]:
    """The rows of one microbatch with every repeat of the folds, and the bytes that the added ones leave."""
    ranges = sorted(found for fold in folds for found in _ranges(rows, fold))
    parts: list[Part] = []
    at = grown = 0
    for start, stop, repeats in ranges:
        parts += _moved(rows[at:start], grown)
        inside = _moved(rows[start:stop], grown)
        grows = _held(rows, stop) - _held(rows, start)
        parts.append(Stretch(tuple(inside), repeats - KEPT + 1, grows))
        grown += grows * (repeats - KEPT)
        at = stop
    return [*parts, *_moved(rows[at:], grown)], grown


def _held(rows: Sequence[Row], before: int) -> int:
    """Bytes held before the row at an index."""
    return next((row.memory for row in reversed(rows[:before]) if isinstance(row, Event)), 0)


def _ranges(rows: Sequence[Row], fold: Fold) -> list[tuple[int, int, int]]:
    """Where the middle one of the three repeats runs, forward and backward."""
    forward = _first(rows, "forward", fold.blocks(1)), _first(rows, "forward", fold.blocks(2))
    backward = _first(rows, "backward", fold.blocks(1)), _first(rows, "backward", fold.blocks(0))
    pairs = (forward, backward)
    return [(a, b, fold.repeats) for a, b in pairs if a is not None and b is not None and a < b]


def _first(rows: Sequence[Row], phase: Phase, blocks: range) -> int | None:
    """Where the first row of these blocks stands in a phase, with the collectives that belong before it."""
    found = (k for k, row in enumerate(rows) if isinstance(row, Event) and row.phase == phase and row.block in blocks)
    return next(found, None)


# -- ZeRO and overlap


def _sharded(
    events: Sequence[Event], holdings: Mapping[int, Holdings], sharding: Sharding, *, first: bool, last: bool
) -> list[Row]:
    """One microbatch with the collectives of ZeRO, and those of gradients that overlap the backward pass.

    `first`, `last`: of the step; before the first no gradients are there, after the last they are reduced.
    """
    if sharding.replicas == 1:
        return list(events)
    runs = _runs(events)
    reduces = sharding.zero >= 2 or (last and (sharding.overlap or sharding.zero == 1))
    kind = "all-reduce" if sharding.zero == 0 else "reduce-scatter"
    gone = sharding.gone if sharding.zero >= 2 else 0.0
    freed = 0 if first else sum(round(held.first_gradients * gone) for held in holdings.values())
    rows: list[Row] = []
    for index, run in enumerate(runs):
        block, phase = run[0].block, run[0].phase
        held = holdings.get(block, Holdings())
        more = -freed
        if sharding.zero >= 3 and block >= 0 and held.gathered:
            begins = index == 0 or runs[index - 1][0].block < 0
            after = _next_gathered(runs[index:], holdings)
            more += held.gathered + after
            at = replace(run[0], memory=run[0].memory + more)
            rows += _gathers(at, held, sharding, begins=begins, after=after)
        rows += _moved(run, more)
        ends = phase == "backward" and not any(r[0].block == block and r[0].phase == phase for r in runs[index + 1 :])
        if ends and reduces and held.first_gradients:
            at = replace(run[-1], memory=run[-1].memory + more)
            rows.append(_collective(at, kind, _sent(kind, held.first_gradients, sharding), sharding))
            freed += round(held.first_gradients * gone) if first else 0
    return rows


def _next_gathered(runs: Sequence[Sequence[Event]], holdings: Mapping[int, Holdings]) -> int:
    """Bytes of the block that runs next, if it follows at once."""
    if len(runs) < 2 or runs[1][0].block in (-1, runs[0][0].block):
        return 0
    return holdings.get(runs[1][0].block, Holdings()).gathered


def _runs(events: Sequence[Event]) -> list[list[Event]]:
    """Neighbours of one block and phase."""
    runs: list[list[Event]] = []
    for event in events:
        if runs and (runs[-1][0].block, runs[-1][0].phase) == (event.block, event.phase):
            runs[-1].append(event)
        else:
            runs.append([event])
    return runs


def _gathers(event: Event, held: Holdings, sharding: Sharding, *, begins: bool, after: int) -> list[Row]:
    """The gather of the block after this one starts, and that of this one has ended."""
    before: list[Row] = []
    if begins:
        before.append(_collective(event, "all-gather", _sent("all-gather", held.gathered, sharding), sharding))
    if after:
        before.append(_collective(event, "all-gather", _sent("all-gather", after, sharding), sharding))
    outstanding = (1 if after else 0) + (1 if event.phase == "backward" and not begins else 0)
    return [*before, Wait(event.phase, outstanding)]


def _collective(at: Event, kind: str, sent: int, sharding: Sharding) -> Event:
    return replace(
        at, name=kind, flops=0, bytes=sent, collective=kind, level=sharding.level, beside=True, peak=at.memory
    )


def _sent(kind: str, size: int, sharding: Sharding) -> int:
    """Bytes that one rank sends."""
    return round(size * sharding.gone * (2 if kind == "all-reduce" else 1))


def _closing(
    recorded: Recorded, sharding: Sharding, run: Holdings, always: int, copies: int, whole: Holdings
) -> list[Part]:
    """The reductions that are left, and the update of the parameters, for the trained parameters of the whole model."""
    growth = whole.gradients / run.gradients if run.gradients else 1.0
    part = 1 - sharding.gone
    gradients_kept = growth * (part if sharding.zero >= 2 else 1)
    update = growth * (part if sharding.zero >= 1 else 1)
    done = sharding.replicas > 1 and (sharding.overlap or sharding.zero >= 1)
    left = [e for e in recorded.gradient if not (done and e.collective and e.level == sharding.level)]
    parts: list[Part] = []
    for k, event in enumerate(left):
        held = run.first_gradients + (run.gradients - run.first_gradients) * (k + 1) / len(left)
        more = always + copies + round(held * (gradients_kept - 1))
        parts.append(replace(_scaled(event, growth if event.collective else gradients_kept), memory=event.memory + more,
                             peak=event.peak + more))  # fmt: skip
    parts.append(Wait("gradient"))
    # Buffers of the last reduction are gone by now: they do not grow with the model, as those of the update do. Every
    # optimizer begins with an operator in place, so what it leaves is what was held before.
    before = next((event.memory for event in recorded.optimizer), 0)
    base = before + always + round(run.gradients * (gradients_kept - 1))
    temporary = update if recorded.foreach else 1.0
    # One parameter after another: each update stands for those of as many parameters as there are for it.
    times = 1 if recorded.foreach else max(round(growth), 1)
    updates: list[Part] = []
    for k, event in enumerate(recorded.optimizer):
        peak = event.peak if k else event.memory
        memory, peak = (base + round((size - before) * temporary) for size in (event.memory, peak))
        updates.append(replace(_scaled(event, update / times), memory=memory, peak=max(memory, peak)))
    parts += updates if recorded.foreach else [Stretch(tuple(updates), times)]
    if sharding.zero in (1, 2) and sharding.replicas > 1 and recorded.optimizer:
        sent = _sent("all-gather", whole.gathered, sharding)
        at = replace(recorded.optimizer[-1], memory=base, peak=base)
        parts.append(replace(_collective(at, "all-gather", sent, sharding), beside=False))
    return parts


def _scaled(event: Event, by: float) -> Event:
    seconds = None if event.seconds is None else event.seconds * by
    return replace(event, bytes=round(event.bytes * by), seconds=seconds)
