"""What is tried, in which order, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.dryrun.studies import chain, ids
from whalepy.dryrun.answer import answer, sizes_of, subject_of
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.run import Request, run
from whalepy.dryrun.shares import best_rows
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.forecast import Forecast
from whalepy.runtime.build import Recipe


def answered(
    model: nn.Module, cluster: str, rows: int, told: list[str] | None = None, **forced: Any
) -> tuple[Forecast, Tried]:
    spec, options = ClusterSpec.load(cluster), Options(**forced)
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model), ids(), "adamw", blocks).with_rows(rows)
        subject = subject_of("chain", sizes_of(model), study, spec, options, 16)
        return answer(study, model, spec, options, subject, [].append if told is None else told.append)


def test_fewer_rows_than_devices_leave_devices_idle() -> None:
    forecast, best = answered(chain(2), "1xT4 + 1xV100-SXM2-16GB", 1)
    assert forecast.strategy == "1 x V100-SXM2-16GB alone" and best.ranks == (0,)
    assert "idle: device 0 (1 x T4), for want of rows in the batch" in forecast.assumptions
    assert {other.strategy for other in forecast.alternatives} >= {"split 2"}


def test_a_device_that_is_too_slow_for_a_row_is_left_idle() -> None:
    """Nobody asked for replicas: there is nothing to refuse."""
    forecast, best = answered(chain(2), "1xT4*0.001 + 1xT4", 16)
    assert best.ranks == (0,) and best.candidate.device(0).speed == 1.0
    assert "idle: device 0 (1 x T4), for want of rows in the batch" in forecast.assumptions


def test_forced_replicas_need_a_row_each() -> None:
    with pytest.raises(PlanError) as raised:
        answered(chain(2), "2xT4", 1, replicate=2)
    assert "1 rows, too few for 2 replicas" in raised.value.what and raised.value.at is None


def test_degrees_that_only_take_longer_are_left_out() -> None:
    """A split over a slow network: the more, the longer."""
    told: list[str] = []
    forecast, _ = answered(chain(2), "16x2xV100-SXM2-16GB @ 100Mbit/s", 4096, told)
    left_out = next(said for said in forecast.assumptions if said.startswith("not tried: "))
    assert left_out.endswith("; two that split less already take over twice the time of the best")
    assert "split 32" in left_out and "split 32" not in told
    steps = [other.step_time_s for other in forecast.alternatives]
    assert sum(step > 2 * forecast.step_time_s for step in steps) >= 2


def test_few_degrees_are_all_tried() -> None:
    forecast, _ = answered(chain(2), "2x2xV100-SXM2-16GB @ 100Mbit/s", 8)
    assert not any(said.startswith("not tried") for said in forecast.assumptions)


def test_equal_devices_share_equally_without_a_rehearsal_of_other_shares() -> None:
    _, best = answered(chain(2), "4xT4", 8, replicate=4, microbatches=1)
    candidate = best.candidate.study.candidate(best.candidate.levels, best.candidate.cluster, (1.0,) * 4)
    assert best_rows(candidate, 8) == (2, 2, 2, 2) and not candidate.known


@pytest.mark.parametrize("forced", [{}, {"split": 2, "replicate": 1}, {"split": 2, "replicate": 2}])
@pytest.mark.parametrize("cluster", ["4xV100-SXM2-16GB", "2xV100-SXM2-16GB + 2xT4"])
def test_no_plan_is_faster_than_the_bound(cluster: str, forced: dict[str, Any]) -> None:
    spec = cluster if forced != {"split": 2, "replicate": 1} else cluster.replace("2x", "1x").replace("4x", "2x")
    forecast, _ = answered(chain(2), spec, 8, **forced)
    assert forecast.gain_over_equal <= forecast.bound


def test_whales_shares_are_shown_beside_the_exact_ones() -> None:
    """Small layers are bound by launches, which take the same on both types: the rates say more than there is."""
    cluster = "1xV100-SXM2-16GB + 1xP100-PCIE-16GB"
    forecast, best = answered(chain(2), cluster, 1024, replicate=2)
    whales = [other for other in forecast.alternatives if "Whale" in other.strategy]
    assert [other.strategy for other in whales] == ["replicate 2, shares by Whale 643:381"]  # 15.7 to 9.3 TFLOP/s
    assert [other.flags for other in whales] == ["--replicate 2 --split 1 --balance whale"]
    assert "Whale" not in forecast.strategy
    _, forced = answered(chain(2), cluster, 1024, replicate=2, balance="whale")
    assert forced.rows == (643, 381) and best.step_s < forced.step_s == whales[0].step_time_s
    _, equal = answered(chain(2), cluster, 1024, replicate=2, balance="equal")
    assert equal.rows == (512, 512)


def test_equal_devices_have_no_shares_of_whales() -> None:
    forecast, _ = answered(chain(2), "2xT4", 8)
    assert not any("Whale" in other.strategy for other in forecast.alternatives)


def test_savings_that_would_be_faster_are_told_beside_what_can_run(tmp_path: Path) -> None:
    """Two cards that the whole model does not fit on; forced, each takes as long as it is said to."""
    (tmp_path / "small.json").write_text(
        json.dumps({"nodes": [{"devices": [{"type": "T4", "count": 2, "memory_gib": 3}]}]})
    )
    asked = Request("gpt2", str(tmp_path / "small.json"), 8, 256, stages=1, keeps_plan=False)
    forecast, _ = run(asked, lambda _: None)
    assert forecast.fits and not forecast.not_runnable and "split 2" in forecast.strategy
    savings = [one for one in forecast.alternatives if one.not_runnable]
    assert len(savings) > 3 and all(one.step_time_s < forecast.step_time_s for one in savings)
    assert all("--zero" in one.flags or "--recompute" in one.flags for one in savings)
    forced, _ = run(replace(asked, zero=3, recompute="selective"), lambda _: None)
    assert forced.strategy == savings[0].strategy and forced.step_time_s == savings[0].step_time_s


def test_rows_that_a_condition_names_are_planned_as_all_rows(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "class Picks(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.head = torch.nn.Linear(8, 64), torch.nn.Linear(64, 1)\n"
        "    def forward(self, x):\n"
        "        y = self.body(x)\n"
        "        return self.head(y[x[:, 0] > 0]).sum()\n"
        "def make():\n"
        "    return Picks(), torch.randn(6, 8)\n"
    )
    forecast, plan = run(Request(f"{tmp_path}/train.py:make", "1xT4 + 1xP100-PCIE-16GB"), lambda _: None)
    assert plan is not None and "sizes that depend on values are as large as they can be" in forecast.assumptions
