from __future__ import annotations

import re

import pytest

import whalepy
from tests import models
from tests.block import block
from whalepy.errors import PlanError
from whalepy.planner.plan import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, example = block()
    return whalepy.plan(model, "2xcpu + 2xcpu*0.5", example)


def test_a_plan_has_the_program_of_every_rank(plan: Plan) -> None:
    texts = [str(plan.program(rank)) for rank in range(4)]
    assert [text.partition(";")[0] for text in texts] == [
        "program of rank 0, at place 0 x 0 of 2 x 2",
        "program of rank 1, at place 0 x 1 of 2 x 2",
        "program of rank 2, at place 1 x 0 of 2 x 2",
        "program of rank 3, at place 1 x 1 of 2 x 2",
    ]
    assert all("whalepy.bridge(" in text and "whalepy.retype(" in text for text in texts)


def test_a_plan_explains_its_classes(plan: Plan) -> None:
    assert re.fullmatch(r"split\(2, shares=\(3, 1\)\) \(block.py:\d+\) on level 1 is cut along .*", plan.explain())


def test_a_loaded_plan_has_no_programs(plan: Plan) -> None:
    loaded = Plan.from_json(plan.to_json())
    assert loaded.explain() == plan.explain()
    with pytest.raises(PlanError, match="only a plan made in this process has programs"):
        loaded.program(0)


def test_a_rank_that_is_not_there(plan: Plan) -> None:
    with pytest.raises(PlanError, match="there is no rank 4; ranks are 0 to 3"):
        plan.program(4)


def test_microbatches_stand_below_what_is_computed_once() -> None:
    model, batches = models.gpt2(layers=1)
    whalepy.annotate(model, {"": whalepy.replicate(2, shares=[3, 1])})
    text = str(whalepy.plan(model, "2xcpu", batches[0], microbatches=3).program(0))
    once, _, each = text.partition("\n\nper microbatch:\n")
    assert once.startswith("once per step, on the whole batch:\n")
    assert "aten.cross_entropy_loss" in each and "aten.cross_entropy_loss" not in once
    assert "labels = input  # i64[6, 12] (S(0.0))" in once  # three quarters of eight rows
    assert "labels = input  # i64[2, 12] (S(0.0))" in each  # the first of three microbatches of them
