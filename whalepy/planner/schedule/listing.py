"""Orders found by playing a chain of blocks in ticks: each group does what is ready, by a fixed preference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from whalepy.planner.schedule.actions import Op
from whalepy.planner.schedule.hosting import Block, BlockAction

_Done = dict[tuple[int, str, int], int]
"""The tick after which (block, F or backward, microbatch) is done."""


def listed(blocks: Sequence[Block], microbatches: int, *, deferred: bool) -> list[list[BlockAction]]:
    """Per group, what it does if every action takes one tick and a group prefers backward to forward to weights.

    Block i of L starts no forward while L - i microbatches wait for their backward, nor, with `deferred` weight
    gradients, while L wait for their weights. Among what is ready: the earliest microbatch, then the last block.
    It always ends: nothing can hold up the earliest microbatch that is not done, since those that count against it
    are earlier ones, and these are done or wait for weights, which is always possible.
    """
    groups = max(block.group for block in blocks) + 1
    lanes = [_Lane(index, len(blocks), microbatches, deferred) for index in range(len(blocks))]
    orders: list[list[BlockAction]] = [[] for _ in range(groups)]
    of = [[lane for lane in lanes if blocks[lane.block].group == group] for group in range(groups)]
    done: _Done = {}
    tick = 0
    while not all(lane.ended for lane in lanes):
        for own, order in zip(of, orders, strict=True):
            if (step := _preferred(own, done, tick)) is not None:
                order.append(step)
                lanes[step.block].advance(step.op)
                done[step.block, "F" if step.op == "F" else step.op.replace("I", "B"), step.microbatch] = tick + 1
        tick += 1
    return orders


@dataclass
class _Lane:
    """How far a block is."""

    block: int
    length: int
    microbatches: int
    deferred: bool
    done: dict[Op, int] = field(default_factory=lambda: dict[Op, int]({"F": 0, "B": 0, "W": 0}))

    @property
    def ended(self) -> bool:
        return self.done["W" if self.deferred else "B"] == self.microbatches

    def advance(self, op: Op) -> None:
        self.done["B" if op == "I" else op] += 1

    def ready(self, op: Op, done: _Done, tick: int) -> bool:
        microbatch = self.done[op]
        if op == "W":
            return microbatch < self.done["B"]
        if op == "B":
            after = self.block + 1 == self.length or done.get((self.block + 1, "B", microbatch), tick + 1) <= tick
            return microbatch < self.done["F"] and after
        after = self.block == 0 or done.get((self.block - 1, "F", microbatch), tick + 1) <= tick
        return microbatch < self.microbatches and after and self._has_room()

    def _has_room(self) -> bool:
        waiting = self.done["F"] - self.done["B"] < self.length - self.block
        return waiting and (not self.deferred or self.done["F"] - self.done["W"] < self.length)


def _preferred(own: Sequence[_Lane], done: _Done, tick: int) -> BlockAction | None:
    ops: tuple[Op, ...] = ("B", "F", "W")
    for op in ops if own[0].deferred else ops[:2]:
        ready = [lane for lane in own if lane.ready(op, done, tick)]
        if ready:
            lane = min(ready, key=lambda each: (each.done[op], -each.block))
            return BlockAction(lane.block, "I" if op == "B" and lane.deferred else op, lane.done[op])
    return None


def completes(orders: Sequence[Sequence[BlockAction]], blocks: Sequence[Block]) -> bool:
    """Whether all groups come to the end of these orders of F and B if each action waits for what it needs."""
    done: set[tuple[int, str, int]] = set()
    at = [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for group, order in enumerate(orders):
            for step in _possible(order, at[group], done, len(blocks)):
                done.add((step.block, step.op, step.microbatch))
                at[group] += 1
                moved = True
    return all(position == len(order) for position, order in zip(at, orders, strict=True))


def _possible(
    order: Sequence[BlockAction], start: int, done: set[tuple[int, str, int]], length: int
) -> Iterator[BlockAction]:
    """The steps from `start` on until one has to wait; each is done before the next is looked at."""
    for position in range(start, len(order)):
        if not _needed(order[position], length) <= done:
            return
        yield order[position]


def _needed(step: BlockAction, length: int) -> set[tuple[int, str, int]]:
    block, microbatch = step.block, step.microbatch
    if step.op == "F":
        return {(block - 1, "F", microbatch)} if block else set()
    return {(block, "F", microbatch)} | ({(block + 1, "B", microbatch)} if block + 1 < length else set())
