"""A model without annotations: the best way is chosen from what the devices and links can do, and it trains exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import whalepy
from tests import pipelines
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.dryrun.run import Request, run
from whalepy.planner.form import parse_widths
from whalepy.planner.plan import Plan
from whalepy.primitives import scopes_on

LINK = {"nodes": [{"devices": [{"type": "cpu", "count": 2}], "link": "2MB/s"}]}
"""So slow that gradients of all parameters take longer than half the devices."""


def plan_of(spec: Any, **options: Any) -> Plan:
    model, batches = pipelines.gpt2()
    return whalepy.plan(model, spec, batches[0], **options)


def test_equal_devices_share_the_rows_equally() -> None:
    plan = plan_of("2xcpu")
    assert plan.only.mesh == (2,) and not plan.annotation


def test_rows_follow_what_devices_have_time_for() -> None:
    plan = plan_of("1xcpu + 1xcpu*0.6")
    (path, (level,)), *_ = plan.annotation
    assert path == "" and level.kind == "replicate" and level.shares is not None
    assert level.shares[0] == 1 > level.shares[1] > 0.3
    assert "rows that each device has time for" in plan.explain()


def test_a_device_that_slows_the_others_is_left_out() -> None:
    with pytest.warns(UserWarning, match="rank 2 is idle"):
        plan = plan_of("2xcpu + 1xcpu*0.001")
    assert plan.idle == (2,) and "without device 2, which would not help the others" in plan.explain()


def test_a_slow_link_makes_stages() -> None:
    plan = plan_of(LINK)
    assert len(plan.stages) == 2 and plan.microbatches > 1
    assert "2 stages: chosen for a model without annotations" in plan.explain()


def test_what_the_user_writes_is_kept() -> None:
    assert plan_of(LINK, microbatches=4).microbatches == 4
    model, batches = pipelines.gpt2()
    whalepy.annotate(model, {"": whalepy.replicate(2)})
    plan = whalepy.plan(model, LINK, batches[0])
    assert len(plan.stages) == 1 and not plan.annotation


class Bare(torch.nn.Module):
    """A model of parameters alone, without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).square().mean()


@pytest.mark.parametrize("rows", [2, 5])
def test_a_model_without_modules_shares_its_rows(rows: int) -> None:
    """Odd rows on equal devices leave the shares equal, for batches of other sizes."""
    assert not whalepy.plan(Bare(), "2xcpu", (torch.randn(rows, 8),)).annotation


@pytest.mark.filterwarnings("ignore:rank 1 is idle")
def test_fewer_rows_than_devices() -> None:
    plan = whalepy.plan(Bare(), "2xcpu", (torch.randn(1, 8),))
    assert plan.idle == (1,) and "as there are fewer rows than devices" in plan.explain()


def test_a_plan_leaves_the_model_as_it_is() -> None:
    """The same model may be asked for on other devices."""
    model, batches = pipelines.gpt2()
    assert len(whalepy.plan(model, LINK, batches[0]).stages) == 2
    assert not scopes_on(model) and whalepy.plan(model, "3xcpu", batches[0]).only.mesh == (3,)


def test_a_saved_plan_puts_its_scopes_on_a_bare_model(tmp_path: Path) -> None:
    plan_of(LINK).save(tmp_path / "two.plan")
    model, batches = pipelines.gpt2()
    again = whalepy.plan(model, LINK, batches[0], plan=tmp_path / "two.plan")
    assert len(again.stages) == 2 and again.program(1) is not None
    assert not scopes_on(model)  # the plan is told, the model stays as it is


@pytest.mark.parametrize("spec", ["1xcpu + 1xcpu*0.6", "2xcpu + 1xcpu*0.001", "slow link"])
def test_it_trains_exactly(workers: Pool, tmp_path: Path, spec: str) -> None:
    if spec == "slow link":
        spec = str(tmp_path / "slow.json")
        Path(spec).write_text(json.dumps(LINK))
    compare(workers, Run(pipelines.gpt2, dict[str, Any], 3 if spec.startswith("2xcpu") else 2, spec=spec))


FACTORY = """
from tests import pipelines

def factory():
    model, batches = pipelines.gpt2()
    return model, batches[0]
"""


@pytest.mark.parametrize(
    ("widths", "spec"),
    [("2,1", "3xcpu"), ("1,1x2", "2xcpu + 1xcpu*0.5"), pytest.param("1,2", "3xcpu", marks=pytest.mark.slow)],
)
def test_stages_of_unlike_widths_train_exactly(workers: Pool, tmp_path: Path, widths: str, spec: str) -> None:
    (tmp_path / "train.py").write_text(FACTORY)
    asked = Request(f"{tmp_path}/train.py:factory", spec, widths=parse_widths(widths), microbatches=3)
    _, plan = run(asked, lambda _: None)
    assert plan is not None and [stage.mesh for stage in plan.stages] in ([(2,), (1,)], [(1,), (2,)])
    plan.save(tmp_path / "wide.plan")
    compare(workers, Run(pipelines.gpt2, dict[str, Any], 3, spec=spec, options={"plan": str(tmp_path / "wide.plan")}))


def test_a_step_that_cannot_be_rehearsed_takes_all_devices_side_by_side() -> None:
    class Chooses(torch.nn.Module):
        """A number in it depends on the values."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) * x.abs().max().item()).sum()

    plan = whalepy.plan(Chooses(), "1xcpu + 1xcpu*0.5", (torch.randn(6, 4),))
    assert plan.only.mesh == (2,)
    assert "no other way was looked for" in plan.explain()


def test_models_with_batch_statistics_keep_one_microbatch() -> None:
    layers = (torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 4))
    batch = torch.randn(8, 8), torch.randint(4, (8,))
    plan = whalepy.plan(torch.nn.Sequential(*layers), LINK, batch, loss_fn=torch.nn.functional.cross_entropy)
    assert plan.microbatches == 1


def test_equal_shares_of_unequal_devices_are_written_down() -> None:
    """A step of small operators takes as long on both; default shares would follow what large ones take."""
    plan = plan_of("1xV100-SXM2-16GB + 1xT4")
    row_cut = plan.only.row_cuts[0]
    assert row_cut is not None and plan.only.cuts[row_cut].weights == (1.0, 1.0)


def test_interleaved_stages_are_looked_for() -> None:
    plan = plan_of(LINK, schedule="interleaved:2")
    assert len(plan.stages) == 4 and plan.schedule == "interleaved:2"
    assert "4 stages: chosen for a model without annotations" in plan.explain()
