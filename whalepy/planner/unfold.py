"""From a step as it was run, with few blocks and microbatches, to the step of the whole model.

Before:  block 0, block 1, block 2, head             as run: three of the blocks that repeat, two microbatches
After:   block 0, 30 x block 1, block 2, head        in time and in memory, ZeRO and overlap as asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from whalepy.planner.work import (
    KEPT,
    Acted,
    ActionsRehearsal,
    Event,
    Fold,
    Holdings,
    Part,
    Phase,
    Recorded,
    RecordedActions,
    Rehearsal,
    Stretch,
    Wait,
)

Row = Event | Wait


@dataclass(frozen=True)
class Sharding:
    """How parameters, gradients and optimizer state are kept over the replicas."""

    zero: int = 0
    """0: whole on every replica; 1: the optimizer state in parts; 2: the gradients too; 3: the parameters too.

    What is read in half precision has its float32 originals, and their gradients, with the optimizer state.
    Source: Rajbhandari et al., ZeRO, SC 2020, sections 3.1 and 5.
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
        originals = self.parts_originals(holdings)
        return Holdings(
            round(holdings.parameters * (part if zero >= 3 or originals else 1)),
            0 if zero >= 3 else holdings.copies,
            round(holdings.first_gradients * (part if zero >= 2 else 1)),
            round(holdings.gradients * (part if zero >= 2 or originals else 1)),
            round(holdings.optimizer * (part if zero >= 1 else 1)),
        )

    def parts_originals(self, holdings: Holdings) -> bool:
        """Whether a rank keeps, of what the optimizer updates, its part alone, and reads copies of all of it."""
        return self.zero >= 1 and holdings.copies > 0

    def buffers(self, holdings: Holdings) -> int:
        """Bytes held beside what a run makes where replicas keep parts of float32 originals, but read copies.

        Gradients are accumulated in float32: whole, or with ZeRO 2 in parts. They are reduced to the parts that are
        updated in two buffers of half a billion elements each, or all there are. Source: Megatron-LM's documentation of
        its distributed optimizer (bf16 parameters, fp32 gradients: 6 + 12/d bytes); DeepSpeed's of zero_optimization,
        `reduce_bucket_size` and `overlap_comm`.
        """
        if self.zero not in (1, 2) or self.replicas == 1 or not holdings.copies:
            return 0
        accumulated = (holdings.gradients - holdings.first_gradients) * (1 if self.zero == 1 else 1 - self.gone)
        return round(accumulated) + 2 * min(_BUCKET_BYTES, holdings.first_gradients)


_BUCKET_BYTES = 1_000_000_000


def whole_step(
    recorded: Recorded, turns: Sequence[tuple[int, int]], folds: Sequence[Fold], sharding: Sharding, inputs: int = 0
) -> Rehearsal:
    """The step of the whole model: microbatches in `turns`, `folds` of the blocks.

    `turns`: which of the microbatches that were run comes next, and how often in a row.

    `inputs`: bytes of the rows that were left out.
    """
    run = sum(recorded.holdings.values(), Holdings())
    root = recorded.holdings.get(-1, Holdings())
    left_out = _left_out(recorded.holdings, folds)
    kept, more = sharding.kept(run), sharding.kept(left_out)
    # Held all the time: less of what was run, and what the blocks that were left out keep.
    always = kept.parameters - run.parameters + kept.optimizer - run.optimizer + more.parameters + more.optimizer
    always += inputs + sharding.buffers(run + left_out)
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


def _left_out(holdings: Mapping[int, Holdings], folds: Sequence[Fold]) -> Holdings:
    """Of all repeats that were not run: each takes what the middle one does."""
    middle = ((fold.repeats - KEPT, holdings.get(block)) for fold in folds for block in fold.blocks(1))
    return sum((held.times(count) for count, held in middle if held is not None), Holdings())


# -- pipelines


def whole_actions(
    recorded: RecordedActions, folds: Sequence[Fold], shardings: Mapping[int, Sharding]
) -> ActionsRehearsal:
    """What a rank of a pipeline does in each action with every repeat of the folds.

    `shardings`: by stage; the optimizer state alone may be in parts.
    """
    stages = {k: _Held.of(own, folds, shardings[k]) for k, own in recorded.holdings.items()}
    always = sum(held.always for held in stages.values())
    prelude, copies = _unfolded(_moved(recorded.prelude, always), folds)
    acts = {
        action: _reduced(acted, stages[action.stage], recorded.borrowed.get(action.stage, 0))
        if action.op == "REDUCE" and action.stage in stages
        else _whole_act(acted, folds)
        for action, acted in recorded.acts.items()
    }
    run = sum((held.run for held in stages.values()), Holdings())
    final = sum((held.kept for held in stages.values()), Holdings())
    growth = final.gradients / run.gradients if run.gradients else 1.0
    parts = sum(held.updated for held in stages.values())
    update = parts / run.gradients if run.gradients else 1.0
    more = always + final.gradients - run.gradients
    return ActionsRehearsal(
        tuple(prelude),
        recorded.before + always + copies,
        acts,
        tuple(_updates(recorded.optimizer, recorded.foreach, update, growth, more)),
        {k: tuple(_gathered(recorded.optimizer[-1:], held, more)) for k, held in stages.items()},
        final.parameters,
        recorded.buffers,
        final.gradients,
        final.optimizer,
        recorded.inputs,
    )


@dataclass(frozen=True)
class _Held:
    """What one stage of a rank takes, as run and with every repeat."""

    run: Holdings
    whole: Holdings
    sharding: Sharding

    @classmethod
    def of(cls, holdings: Mapping[int, Holdings], folds: Sequence[Fold], sharding: Sharding) -> _Held:
        run = sum(holdings.values(), Holdings())
        return cls(run, run + _left_out(holdings, folds), sharding)

    @property
    def kept(self) -> Holdings:
        """Of the whole, between operators."""
        return self.sharding.kept(self.whole)

    @property
    def always(self) -> int:
        """Bytes that are held all the time beyond those of the run."""
        own = self.kept.parameters - self.run.parameters + self.kept.optimizer - self.run.optimizer
        return own + self.sharding.buffers(self.whole)

    @property
    def growth(self) -> float:
        """The gradients of the whole over those of the run."""
        return self.whole.gradients / self.run.gradients if self.run.gradients else 1.0

    @property
    def gradients_kept(self) -> float:
        """The gradients that a rank keeps over those of the run."""
        return self.kept.gradients / self.run.gradients if self.run.gradients else 1.0

    @property
    def updated(self) -> float:
        """Bytes of the gradients whose parameters a rank updates."""
        return self.whole.gradients * (1 - self.sharding.gone if self.sharding.zero else 1.0)


def _whole_act(acted: Acted, folds: Sequence[Fold]) -> Acted:
    """With every repeat; what makes the tensors of a stage goes through all its blocks before the first one runs."""
    rows = [part for part in acted.parts if not isinstance(part, Stretch)]
    lead, read = _unfolded(rows[: acted.lead], folds)
    rest, grown = _unfolded(_moved(rows[acted.lead :], read), folds)
    return Acted((*lead, *rest), acted.grows + read + grown)


def _reduced(acted: Acted, held: _Held, borrowed: int) -> Acted:
    """The reductions of the gradients of every repeat; what these hold before it is held already.

    `borrowed`: bytes of gradients of other stages among them, which do not grow.
    """
    rows = [_scattered(part, held.sharding) for part in acted.parts if isinstance(part, Event)]
    run, growth, kept = held.run, held.growth, held.gradients_kept
    ahead = round(run.first_gradients * (growth - 1))
    own = run.first_gradients
    sent = (own * growth + borrowed) / (own + borrowed) if own + borrowed else 1.0
    parts = _reductions(rows, run, (growth, kept), sent, -ahead)
    return Acted(tuple(parts), acted.grows + round(run.gradients * (kept - 1)) - ahead)


def _moved(rows: Sequence[Row], by: int) -> list[Row]:
    """The same with so many more bytes held."""
    return [_more(row, by) for row in rows]


def _more(row: Row, by: int) -> Row:
    return row if isinstance(row, Wait) or not by else replace(row, memory=row.memory + by, peak=row.peak + by)


def _scattered(event: Event, sharding: Sharding) -> Event:
    """A reduction over the replicas, of which each keeps the part that it updates: half as much is sent."""
    parts = sharding.zero and sharding.replicas > 1 and event.level == sharding.level
    if not parts or event.collective != "all-reduce":
        return event
    return replace(event, name="reduce-scatter", collective="reduce-scatter", bytes=event.bytes // 2)


def _gathered(last: Sequence[Event], held: _Held, more: int) -> list[Event]:
    """What puts the parameters of a stage together after the last event of its update."""
    sharding = held.sharding
    if not sharding.zero or sharding.replicas == 1:
        return []
    sent = _sent("all-gather", held.whole.gathered, sharding)
    now = (replace(event, memory=event.memory + more) for event in last)
    return [replace(_collective(event, "all-gather", sent, sharding), beside=False) for event in now]


def moved(parts: Sequence[Part], by: int) -> list[Part]:
    """The same parts with so many more bytes held."""
    return [replace(p, parts=tuple(moved(p.parts, by))) if isinstance(p, Stretch) else _more(p, by) for p in parts]


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
        if ends and reduces and held.first_gradients > held.apart:
            at = replace(run[-1], memory=run[-1].memory + more)
            sent = _sent(kind, held.first_gradients - held.apart, sharding)
            rows.append(_collective(at, kind, sent, sharding))
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
    first_kept = growth * (part if sharding.zero >= 2 else 1)
    kept = growth * (part if sharding.zero >= 2 or sharding.parts_originals(whole) else 1)
    update = growth * (part if sharding.zero >= 1 else 1)
    done = sharding.replicas > 1 and (sharding.overlap or sharding.zero >= 1)
    left = [e for e in recorded.gradient if not (done and e.collective and e.level == sharding.level)]
    parts = _reductions(left, run, (first_kept, kept), growth, always + copies)
    parts.append(Wait("gradient"))
    more = always + round(run.gradients * (kept - 1))
    parts += _updates(recorded.optimizer, recorded.foreach, update, growth, more)
    if sharding.zero in (1, 2) and sharding.replicas > 1 and recorded.optimizer:
        sent = _sent("all-gather", whole.gathered, sharding)
        base = more + next((event.memory for event in recorded.optimizer), 0)
        at = replace(recorded.optimizer[-1], memory=base, peak=base)
        parts.append(replace(_collective(at, "all-gather", sent, sharding), beside=False))
    return parts


def _reductions(
    events: Sequence[Event], run: Holdings, kept: tuple[float, float], growth: float, base: int
) -> list[Part]:
    """Reductions of `growth` times the gradients that were run.

    `kept`: how many times as many are held, as the backward pass made them and as the optimizer reads them.
    """
    parts: list[Part] = []
    for k, event in enumerate(events):
        done = (k + 1) / len(events)
        more = run.first_gradients * (kept[0] - 1) * (1 - done) + run.gradients * (kept[1] - 1) * done
        parts.append(_more(_scaled(event, growth if event.collective else kept[1]), base + round(more)))
    return parts


def _updates(events: Sequence[Event], foreach: bool, update: float, growth: float, more: int) -> list[Part]:
    """The update of `update` times the parameters that were run, of `growth` times as many, with more bytes held.

    Buffers of the last reduction are gone by now: they do not grow with the model, as those of the update do. Every
    optimizer begins with an operator in place, so what it leaves is what was held before.
    """
    before = next((event.memory for event in events), 0)
    base = before + more
    temporary = update if foreach else 1.0
    # One parameter after another: each update stands for those of as many parameters as there are for it.
    times = 1 if foreach else max(round(growth), 1)
    updates: list[Part] = []
    for k, event in enumerate(events):
        peak = event.peak if k else event.memory
        memory, peak = (base + round((size - before) * temporary) for size in (event.memory, peak))
        updates.append(replace(_scaled(event, update / times), memory=memory, peak=max(memory, peak)))
    return updates if foreach else [Stretch(tuple(updates), times)]


def _scaled(event: Event, by: float) -> Event:
    seconds = None if event.seconds is None else event.seconds * by
    return replace(event, bytes=round(event.bytes * by), seconds=seconds)
