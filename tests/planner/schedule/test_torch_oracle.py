"""torch's own checks of schedules agree where they apply: on a chain of stages, each of which talks to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.planner.schedule.plans import PLAIN, Case, chain, looped, plain
from whalepy.planner.schedule.actions import Action
from whalepy.planner.schedule.kinds import compute_actions

schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")

CASES = [
    *(Case(kind, plain(s), m, chain(s)) for kind in PLAIN for s in range(1, 9) for m in (1, 2, 3, 5, 8, 16)),
    *(
        Case("interleaved", looped(g, v), m, chain(g * v))
        for g, v in ((1, 2), (2, 2), (2, 3), (3, 2), (4, 2))
        for m in (1, 2, 3, 5, 8, 16)
    ),
]


def as_torch(own: Sequence[Action]) -> list[Any]:
    """`0SEND_F3>1` is `0SEND_F3` there: only neighbours talk."""
    return [
        schedules._Action(action.stage, schedules._ComputationType(action.op), action.microbatch)
        for action in own
        if action.op != "REDUCE"
    ]


def group_of(case: Case) -> dict[int, int]:
    return {stage: group for group, own in enumerate(case.hosts) for stage in own}


def blocking(case: Case) -> dict[int, list[Any]]:
    """Our computes with torch's own communication, whose receives block where they stand."""
    groups = group_of(case)
    computes = compute_actions(case.kind, case.hosts, case.microbatches)
    given = {group: as_torch(own) for group, own in enumerate(computes)}
    return schedules._add_send_recv(given, groups.__getitem__, len(groups))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind} {case.hosts} x {case.microbatches}")
def test_torch_agrees(case: Case) -> None:
    groups = group_of(case)
    lists = {group: as_torch(own) for group, own in enumerate(case.schedule())}
    mapping = schedules._validate_schedule(lists, len(case.hosts), len(groups), case.microbatches)
    assert mapping == groups
    assert schedules._simulate_comms_compute(blocking(case), groups.__getitem__, len(groups))


def test_torch_disagrees_with_a_broken_schedule() -> None:
    case = Case("zero-bubble", plain(2), 2, chain(2))
    lists = {group: as_torch(own) for group, own in enumerate(case.schedule())}
    lists[0] = [action for action in lists[0] if str(action) != "0W1"]
    with pytest.raises(AssertionError, match="I and W must have equal counts"):
        schedules._validate_schedule(lists, 2, 2, 2)


def test_interleaved_orders_are_those_of_torch_where_rounds_are_alike() -> None:
    """A second source for the generator: torch's warm-up and rounds, for M a multiple of the number of groups."""
    for groups, chunks, microbatches in ((2, 2, 4), (2, 3, 6), (4, 2, 8), (4, 3, 12)):
        ours = compute_actions("interleaved", looped(groups, chunks), microbatches)
        for rank, own in enumerate(ours):
            theirs = torch_interleaved(rank, groups, chunks, microbatches)
            assert [str(action) for action in own] == theirs


def torch_interleaved(rank: int, groups: int, chunks: int, microbatches: int) -> list[str]:
    per_round = microbatches // max(1, microbatches // groups)
    last = (chunks - 1) * per_round
    warm = min(last + 2 * (groups - 1 - rank), microbatches * chunks)
    total = microbatches * chunks

    def forward(step: int) -> int:
        return (step // per_round) % chunks * groups + rank

    def backward(step: int) -> int:
        return (chunks - 1 - ((step - warm) // per_round) % chunks) * groups + rank

    actions = schedules._get_1f1b_rank_ops(chunks, groups, warm, total - warm, warm, rank, forward, backward)
    return [str(action) for action in actions if action is not None]
