"""What annotations leave open: the best is found, a plan keeps it, and it trains exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests import models, pipelines
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.dryrun.run import Request, run
from whalepy.errors import PlanError
from whalepy.planner.plan import Plan

LINK = {"nodes": [{"devices": [{"type": "cpu", "count": 4}], "link": "20MB/s"}]}
"""So slow that what crosses decides."""


def nested(*degrees: int | None) -> dict[str, Any]:
    """Replicas that are split, of these degrees."""
    outer, inner = degrees
    return {"": [whalepy.replicate(outer), whalepy.split(inner)]}


def long_gpt2() -> models.Made:
    """Many rows and few parameters: gradients are less than what a split moves."""
    return models.gpt2(models.language_batches([(24, 12), (23, 9)], ignored=3), layers=2)


class Small(nn.Module):
    """Scopes in the code, made anew in every capture: large weights, few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 256), nn.Linear(256, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with whalepy.replicate():
            with whalepy.split():
                x = x + self.down(torch.tanh(self.up(x)))
            return nn.functional.cross_entropy(self.head(x), target)


def small() -> models.Made:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    sizes = (8, 6)
    return Small(), [
        (torch.randn(rows, 16, generator=draw), torch.randint(5, (rows,), generator=draw)) for rows in sizes
    ]


def plan_of(make: Callable[[], models.Made], annotation: dict[str, Any], spec: Any = LINK, **options: Any) -> Plan:
    model, batches = make()
    if annotation:
        whalepy.annotate(model, annotation)
    return whalepy.plan(model, spec, batches[0], **options)


def test_the_best_degrees_are_found() -> None:
    """Of 4 devices, two replicas of two would be taken where nothing is compared."""
    plan = plan_of(small, {})
    assert plan.mesh == (4,) and plan.degrees == (1, None) and "split 4: chosen for the degrees" in plan.explain()
    again = Plan.from_json(plan.to_json())
    assert again == plan and plan_of(small, {}, plan=again).mesh == (4,)


@pytest.mark.parametrize("spec", ["4xV100-SXM2-16GB + 4xT4 @ 10Gbit/s", "2x4xV100-SXM2-16GB @ 1Gbit/s", "8xT4"])
def test_none_that_may_be_written_is_better(spec: str, tmp_path: Path) -> None:
    """Of more than a twentieth, which is what another one is taken for."""

    def step(degrees: str) -> float:
        file = tmp_path / "model.py"
        file.write_text(FACTORY.replace("DEGREES", degrees))
        forecast, _ = run(Request(f"{file}:factory", spec, keeps_plan=False, beyond=False), lambda _: None)
        return forecast.step_time_s

    written = min(step(degrees) for degrees in ("1, 8", "2, 4", "4, 2"))
    assert step("None, None") <= written / 0.95


FACTORY = """
from tests.runtime.test_left_open import long_gpt2, nested
import whalepy

def factory():
    model, batches = long_gpt2()
    return whalepy.annotate(model, nested(DEGREES)), batches[0]
"""


def test_what_is_written_stays() -> None:
    plan = plan_of(small_modules, {"": [whalepy.replicate(2), whalepy.split()]})
    assert plan.mesh == (2, 2) and not plan.degrees


def small_modules() -> models.Made:
    """The same sizes without scopes of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 5))
    draw = torch.Generator().manual_seed(3)
    return Scored(model), [(torch.randn(8, 16, generator=draw), torch.randint(5, (8,), generator=draw))]


class Scored(nn.Module):
    """A model with its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.inner(x), target)


def test_fewer_rows_than_replicas_are_split_more() -> None:
    """Two replicas of two would have a row each; of eight devices four replicas would not."""
    model = small_modules()[0]
    batch = torch.randn(2, 16), torch.tensor([1, 4])
    plan = whalepy.plan(whalepy.annotate(model, nested(None, None)), "8xcpu", batch)
    assert plan.mesh in ((2, 4), (8,)) and plan.degrees


def test_degrees_of_another_model_are_refused() -> None:
    plan = plan_of(small, {})
    with pytest.raises(PlanError, match="settles 1 open degree, the model has 2"):
        plan_of(small, {}, plan=replace(plan, degrees=(4,)))


def test_microbatches_are_not_fewer_than_stages() -> None:
    """So small a model would take least in one: every further one costs as many calls. On CPUs the rule stays."""
    model, batches = pipelines.gpt2()
    stages = pipelines.staged(pipelines.blocks("transformer.h.*", (0, 2, 4)))
    annotated = whalepy.annotate(model, stages)
    plan = whalepy.plan(annotated, "2xT4", batches[0], schedule="1f1b")
    assert plan.microbatches == 2 and plan.schedule == "1f1b"
    note = "1f1b in 2 microbatches: chosen as none are asked for, expected to take"
    assert note in plan.explain() and "of the time of 1f1b in 8" in plan.explain()
    assert whalepy.plan(annotated, "2xcpu", batches[0]).microbatches == 8


def test_more_microbatches_are_taken_where_fewer_do_not_fit() -> None:
    """By rule there are eight, in which it would be fast enough."""
    stages = pipelines.staged(pipelines.blocks("transformer.h.*", (0, 2, 4)))
    batch = models.language_batches([(512, 60)])[0]

    def plan(mib: int) -> Plan:
        spec = {"nodes": [{"devices": [{"type": "T4", "count": 2, "memory_bytes": mib << 20}]}]}
        return whalepy.plan(whalepy.annotate(pipelines.gpt2()[0], stages), spec, batch, schedule="1f1b")

    assert plan(900).microbatches == 8, "where nothing fits"
    least = plan(1060)
    assert least.microbatches > 8 and "chosen as none are asked for, as 1f1b in 8 does not fit" in least.explain()


def stages() -> dict[str, Any]:
    """Two stages, each in replicas that are split."""
    first, second = ([whalepy.stage(), whalepy.replicate(), whalepy.split()] for _ in range(2))
    return {"first": first, "second": second, "third": second}


RUNS = {
    "scopes in the code": Run(small, dict[str, Any], 4, evaluate=True),
    "scopes on modules": Run(small_modules, lambda: nested(None, None), 4, evaluate=True),
    "stages": Run(pipelines.feeding, stages, 4, options={"microbatches": 2}, evaluate=True),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_they_train_exactly(workers: Pool, tmp_path: Path, run: Run) -> None:
    assert plan_of(run.make, dict(run.annotations()), **run.options).degrees
    spec = tmp_path / "slow.json"
    spec.write_text(json.dumps(LINK))
    compare(workers, replace(run, spec=str(spec)))
