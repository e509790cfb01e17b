"""Figures as they are printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import forecasts
from whalepy.planner.forecast import Alternative, Verdict
from whalepy.report import wording

GIB = 2**30


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (3.4, "3.40"),
        (9.996, "10.0"),  # the digits are those of the rounded figure
        (34.25, "34.2"),
        (99.96, "100"),
        (342.4, "342"),
        (34215.4, "34,215"),
    ],
)
def test_digits(value: float, shown: str) -> None:
    assert wording.digits(value) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (wording.seconds(3.4), "3.40 s"),
        (wording.seconds(0.342), "342 ms"),
        (wording.seconds(3.42e-5), "34.2 µs"),
        (wording.seconds(0.0), "0.00 µs"),
        (wording.seconds(7200.0), "7,200 s"),
        (wording.memory(3.4 * GIB), "3.4 GiB"),
        (wording.memory(0), "0.0 KiB"),
        (wording.traffic(15.75e9), "15.8 GB"),
        (wording.traffic(12), "12.0 B"),
        (wording.count(1_235_814_400), "1.24 B"),
        (wording.count(312), "312"),
        (wording.percent(0.413), "41 %"),
        (wording.percent(0.031), "3.1 %"),
        (wording.percent(0.0), "0 %"),
        (wording.percent(0.0996), "10 %"),  # not 10.0 %
        (wording.times(1.432), "1.43 x"),
        (wording.ranks([3, 0, 1]), "0, 1, 3"),
        (wording.ranks([0, 1, 2, 5, 7, 8, 9]), "0-2, 5, 7-9"),
        (wording.ranks([]), ""),
        (wording.shares((24.0, 24.0, 8.0, 0.5)), "24:24:8:0.5"),
        (wording.plural(1, "node"), "1 node"),
        (wording.plural(2, "microbatch", "microbatches"), "2 microbatches"),
        (wording.parameters(1000, 1000), "1.00 k parameters, all trainable"),
        (wording.parameters(2000, 1000), "2.00 k parameters, 1.00 k trainable"),
        (wording.parameters(2000, 0), "2.00 k parameters, none trainable"),
        (wording.batch(64, 2048), "64 x 2,048 tokens a step"),
        (wording.batch(1, None), "1 row a step"),
        (wording.optimizer("adamw"), "AdamW"),
        (wording.optimizer("lion"), "lion"),
        (wording.out_of_memory({2: GIB, 3: GIB}), "out of memory on 2, 3 by 1.0 GiB"),
        (wording.out_of_memory({2: GIB, 3: 2 * GIB}), "out of memory on 2, 3 by up to 2.0 GiB"),
        (wording.out_of_memory({}), ""),
    ],
)
def test_a_figure_or_a_word(text: str, shown: str) -> None:
    assert text == shown


@pytest.mark.parametrize(
    ("largest", "unit"),
    [(GIB, "GiB"), (GIB // 10 + 1, "GiB"), (GIB // 20, "MiB"), (1000, "KiB"), (0, "KiB")],
)
def test_the_unit_of_a_column(largest: int, unit: str) -> None:
    assert wording.memory_unit([1, largest])[0] == unit


def other(step: float, verdict: Verdict = "fits", *options: str) -> Alternative:
    return Alternative("another", step, verdict, 0, GIB, GIB, {1: GIB} if verdict == "no" else {}, options)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (other(3.42), "as fast"),
        (other(3.43), "as fast"),  # a third of a percent
        (other(3.8), "11 % slower"),
        (other(3.0), "12 % less time"),
        (other(9.0), "2.63 x the time"),
        (other(3.8, "tight"), "11 % slower, tight"),
        (other(3.0, "no"), "out of memory on 1 by 1.0 GiB"),
        (other(3.0, "fits", "zero 3", "offload"), "12 % less time, zero 3, offload: not runnable yet"),
    ],
)
def test_what_another_plan_costs(plan: Alternative, said: str) -> None:
    assert wording.against(forecasts.four_cards(), plan) == said


def test_equal_shares_that_would_not_fit() -> None:
    tight = forecasts.four_cards()
    assert wording.gain(tight) == ("1.43 x equal shares (what DDP gives), which run out of memory on 2, 3 by 3.1 GiB")
    assert wording.gain(replace(tight, equal_shares_missing_bytes={})) == "1.43 x equal shares (what DDP gives)"
    same = replace(tight, equal_shares_step_time_s=3.43, equal_shares_missing_bytes={})
    assert wording.gain(same) == "as fast as equal shares (what DDP gives)"


def test_how_a_plan_is_started() -> None:
    plan = forecasts.runnable()
    assert wording.launch(plan) == "torchrun --nproc-per-node 4 train.py"
    assert wording.launch(forecasts.sixty_four()) == "torchrun --nnodes 8 --nproc-per-node 8 train.py"
    assert wording.launch(forecasts.four_cards()) is None  # zero 3 does not run yet
    assert wording.launch(forecasts.nothing_fits()) is None
    idle = replace(plan, devices=plan.devices[:1])
    assert wording.launch(idle) == "torchrun --nproc-per-node 4 train.py"  # a rank on every device of the cluster
    one = replace(plan.subject, devices=((1, *plan.subject.devices[0][1:]),))
    assert wording.launch(replace(idle, subject=one)) == "python train.py"
    two = replace(plan.subject, nodes=2)
    uneven = replace(plan, subject=two, devices=(*plan.devices[:3], replace(plan.devices[3], node=1)))
    assert wording.launch(replace(uneven, devices=uneven.devices[1:])) == wording.launch(uneven)
    assert wording.launch(uneven) == "torchrun --nnodes 2 --nproc-per-node DEVICES_OF_THIS_NODE train.py"


def test_what_is_missing_where() -> None:
    assert wording.missing_bytes(forecasts.four_cards()) == {}
    lacking = forecasts.nothing_fits()
    assert set(wording.missing_bytes(lacking)) == {0, 1, 2, 3}
    # Without a list of plans, from the devices themselves.
    assert wording.missing_bytes(replace(lacking, alternatives=())) == wording.missing_bytes(lacking)


def test_room_is_told_only_where_there_is_some() -> None:
    known = forecasts.four_cards()
    assert wording.room(known) == ["batch 64 -> 72", "sequence 2,048 -> 2,304"]
    assert wording.room(replace(known, largest_batch=64, longest_sequence=2048)) == []


def test_microbatches() -> None:
    known = forecasts.four_cards()
    assert wording.microbatches(replace(known, microbatches=1)) == ""
    assert wording.microbatches(replace(known, microbatches=8, schedule="none")) == "8 microbatches"
    assert wording.microbatches(replace(known, microbatches=8, schedule="1f1b")) == "8 microbatches, schedule 1f1b"


def test_what_does_not_run_in_brief() -> None:
    plan = other(3.0, "fits", "zero 3", "offload")
    assert wording.against(forecasts.four_cards(), plan, brief=True) == "12 % less time, not runnable yet"
    assert wording.beside_itself(plan, brief=True) == "not runnable yet"
