"""What the benchmarks of pipelines compare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import pipeline, pipeline_unequal
from benchmarks.blocks import made
from benchmarks.ways import differences, expected
from tests.pool import Pool
from whalepy.planner.schedule.actions import Action, parse


def test_the_head_weighs_as_much_as_more_than_a_block() -> None:
    assert pipeline.balanced() == 3


def test_units_are_the_whole_model() -> None:
    model, _ = made()
    units = pipeline.units(model)
    names = [f"{at}.{name}" for at, unit in units.items() for name, _ in unit.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def _ways(schedule: str) -> list[list[str]]:
    loss, gradients = expected()
    ways = pipeline.own(schedule, 3), pipeline.theirs(schedule, 2)
    return [differences(way, loss, gradients) for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_both_ways_give_the_local_gradients(workers: Pool, schedule: str) -> None:
    assert workers.run(2, _ways, schedule) == [[[], []], [[], []]]


def _noted(seconds: dict[str, float]) -> dict[Action, float]:
    return {parse(text): taken for text, taken in seconds.items()}


@pytest.mark.parametrize(("kind", "expected"), [("split 3:1", 1 + 0.5 + 4 + 0.25), ("rows 1:1", 1 + 0.5 + 3 + 0.25)])
def test_a_simulated_step_takes_both_ranks_of_a_stage(kind: str, expected: float) -> None:
    """Rank 0 sends to ranks 1 and 2, of which one takes twice as long; the other one waits for it in REDUCE."""
    stages = [SimpleNamespace(rank_of=(0,)), SimpleNamespace(rank_of=(1, 2))]
    parallel: Any = SimpleNamespace(plan=SimpleNamespace(stages=stages, hosts=((0,), (1,))))
    everyone = [
        _noted({"0F0": 1.0, "0SEND_F0>1": 9.0}),
        _noted({"1RECV_F0<0": 9.0, "1F0": 4.0, "1REDUCE": 0.25}),
        _noted({"1RECV_F0<0": 9.0, "1F0": 2.0, "1REDUCE": 2.25}),
    ]
    assert pipeline_unequal.simulated_s(parallel, everyone, kind, message_s=0.5) == pytest.approx(expected)
