"""Which group of devices hosts which stages, and the blocks of neighbouring stages that a group runs in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import SENDS, Action, Op

Hosts = tuple[tuple[int, ...], ...]
"""Stages of each group, in order; groups in order of their first stage."""


@dataclass(frozen=True)
class Block:
    """Neighbouring stages of one group: for a schedule they are one stage."""

    group: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class BlockAction:
    """F, B, I or W of all stages of a block."""

    block: int
    op: Op
    microbatch: int


def checked_hosts(hosts: Sequence[Sequence[int]]) -> Hosts:
    """The same, as tuples.

    Raises PlanError unless every stage from 0 on has exactly one group, and all stand in order.
    """
    kept = tuple(tuple(stages) for stages in hosts)
    flat = sorted(stage for stages in kept for stage in stages)
    if not kept or not all(kept) or flat != list(range(len(flat))):
        fix = "give each of the stages 0, 1, 2 ... to one group: ((0,), (1,), (2,)), or ((0, 2), (1, 3))"
        raise PlanError(f"hosts {kept} do not give every stage to exactly one group", fix=fix)
    ordered = tuple(sorted(tuple(sorted(stages)) for stages in kept))
    if ordered != kept:
        raise PlanError(f"hosts {kept} are not in order of their stages", fix=f"write {ordered}")
    return kept


def group_of(hosts: Hosts) -> dict[int, int]:
    """The group of each stage."""
    return {stage: group for group, stages in enumerate(hosts) for stage in stages}


Link = tuple[int, int, int, int]
"""The way of a message: two groups, or two stages of one group. Its messages arrive in the order of the sends."""


def link(message: Action, groups: Mapping[int, int]) -> Link:
    """The way of a send or of a receive."""
    peer = message.stage if message.peer is None else message.peer
    source, target = (message.stage, peer) if message.op in SENDS else (peer, message.stage)
    if groups[source] == groups[target]:
        return groups[source], groups[target], source, target
    return groups[source], groups[target], -1, -1


def blocks_of(hosts: Hosts) -> tuple[Block, ...]:
    """The stages in order, neighbours of one group taken together."""
    groups = group_of(hosts)
    runs = groupby(range(len(groups)), key=groups.__getitem__)
    return tuple(Block(group, tuple(stages)) for group, stages in runs)


def of_group(blocks: Sequence[Block], group: int) -> list[int]:
    """The blocks of a group, in order."""
    return [index for index, block in enumerate(blocks) if block.group == group]


def spread(order: Iterable[BlockAction], blocks: Sequence[Block]) -> tuple[Action, ...]:
    """The actions of the stages of each block: forward in order of the stages, backward against it."""
    return tuple(action for step in order for action in _spread(step, blocks[step.block].stages))


def _spread(step: BlockAction, stages: Sequence[int]) -> Iterator[Action]:
    for stage in stages if step.op == "F" else reversed(stages):
        yield Action(stage, step.op, step.microbatch)
