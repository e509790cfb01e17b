"""Ranks measure their speed at the same time, and shares follow that."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import whalepy
from tests.pool import Pool
from whalepy.hardware.detect import report_this_rank
from whalepy.hardware.measured import Measured, Point
from whalepy.runtime import planning
from whalepy.runtime.groups import Group, start_process_group
from whalepy.runtime.measure_together import speed_together

CPU = torch.device("cpu")
ALIKE = Measured({"float32": (Point(1e6, 1e-3),)})


def test_speed_together_is_the_speed_of_a_report() -> None:
    """The best of short windows alone says nothing of what ranks share."""
    assert report_this_rank(CPU, ALIKE).speed == ALIKE.rate()
    assert report_this_rank(CPU, ALIKE, 4e8).speed == 4e8
    assert report_this_rank(CPU).speed is None


def _measured() -> float:
    return speed_together(CPU, start_process_group(CPU), window_s=0.05)


def test_every_rank_measures(workers: Pool) -> None:
    speeds = workers.run(2, _measured)
    assert all(0 < speed < 1e14 for speed in speeds)


def _shared(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    def half(device: torch.device, host: Group) -> float:
        return 2e9 if dist.get_rank() == 0 else 1e9

    monkeypatch.setattr(planning, "measured_here", lambda device: ALIKE)
    monkeypatch.setattr(planning, "speed_here", half)
    model = torch.nn.Linear(4, 4)
    whalepy.annotate(model, {"": whalepy.replicate()})
    parallel = whalepy.compile(model, None, (torch.ones(12, 4),), loss_fn=lambda y: y.mean())
    return tuple(len(rows) for rows in parallel.local_batch((torch.ones(12, 4),)))


def _shared_with_a_patch() -> tuple[int, ...]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _shared(monkeypatch)


def test_rows_follow_what_ranks_do_together(workers: Pool) -> None:
    """Alone each of the ranks is as fast; together the second has half of the speed."""
    assert workers.run(2, _shared_with_a_patch) == [(8,), (4,)]
