"""Schedules for tests: pipelines in a chain, and random plans with skips, branches, ties and any hosts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from whalepy.planner.schedule.actions import Action, Crossing, Lending, Op, Schedule
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered

SECONDS: dict[Op, float] = {"F": 1, "B": 2, "I": 1, "W": 1}
PLAIN = ("1f1b", "gpipe", "zero-bubble")
KINDS = (*PLAIN, "interleaved")


def seconds(action: Action) -> float:
    """Equal stages, equal F, I and W; messages and reductions take no time."""
    return SECONDS.get(action.op, 0)


@dataclass(frozen=True)
class Case:
    """What a schedule is made for."""

    kind: str
    hosts: tuple[tuple[int, ...], ...]
    microbatches: int
    crossings: tuple[Crossing, ...]
    lendings: tuple[Lending, ...] = ()
    trained: tuple[int, ...] | None = None

    def schedule(self) -> Schedule:
        computes = compute_actions(self.kind, self.hosts, self.microbatches)
        return lowered(computes, self.crossings, self.lendings, self.trained)


def chain(stages: int) -> tuple[Crossing, ...]:
    return tuple(Crossing(stage, stage + 1, True) for stage in range(stages - 1))


def plain(stages: int) -> tuple[tuple[int, ...], ...]:
    return tuple((stage,) for stage in range(stages))


def looped(groups: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(group, groups * chunks, groups)) for group in range(groups))


def in_a_chain(kind: str, stages: int, microbatches: int) -> Case:
    return Case(kind, plain(stages), microbatches, chain(stages))


def random_case(draw: random.Random) -> Case:
    """Up to 8 stages and 16 microbatches; any crossings and lendings; some stages are not trained."""
    stages, microbatches = draw.randint(1, 8), draw.randint(1, 16)
    untrained = {stage for stage in range(stages) if draw.random() < 0.1}
    trained = None if not untrained else tuple(sorted(set(range(stages)) - untrained))
    crossings = [
        Crossing(a, b, draw.random() < 0.8 and not {a, b} & untrained)
        for a in range(stages)
        for b in range(a + 1, stages)
        if draw.random() < (0.9 if b == a + 1 else 0.25)
    ]
    lendings = [
        Lending(a, b, draw.random() < 0.8 and b not in untrained)
        for a in range(stages)
        for b in range(stages)
        if a != b and draw.random() < 0.1
    ]
    return Case(draw.choice(KINDS), _hosts(draw, stages), microbatches, tuple(crossings), tuple(lendings), trained)


def _hosts(draw: random.Random, stages: int) -> tuple[tuple[int, ...], ...]:
    way = draw.random()
    if way < 0.4:
        return plain(stages)
    groups = draw.randint(1, stages)
    if way < 0.7:
        return tuple(tuple(range(group, stages, groups)) for group in range(groups))
    of = [draw.randrange(groups) for _ in range(stages)]
    return tuple(sorted(tuple(s for s in range(stages) if of[s] == group) for group in set(of)))
