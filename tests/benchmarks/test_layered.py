"""The formula of a pipeline, the constants that half of the runs set, and the limits of the other half."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published import layered
from benchmarks.published.layered import Compared, fitted
from benchmarks.published.pipelined import StageCost, peak_bytes, step_seconds
from benchmarks.published.rows import table

STAGE = StageCost(compute_s=3.0, exchange_s=0.0, closing_s=0.5, peak=10, saved=4)


def test_one_stage_does_its_microbatches_one_after_the_other() -> None:
    assert step_seconds([STAGE], 4) == 4 * 3.0 + 0.5
    assert peak_bytes([STAGE], 4) == 10


def test_equal_stages_wait_for_the_first_and_the_last_microbatch() -> None:
    assert step_seconds([STAGE] * 4, 8) == (8 + 4 - 1) * 3.0 + 0.5


def test_the_slowest_stage_sets_the_pace() -> None:
    slow = replace(STAGE, compute_s=5.0)
    assert step_seconds([STAGE, slow], 8) == 3.0 + 8 * 5.0 + 0.5


def test_transfers_block_both_sides() -> None:
    """One boundary, one second both ways: it lengthens every microbatch of either stage, and is passed once."""
    stages = [replace(STAGE, exchange_s=1.0)] * 2
    assert step_seconds(stages, 8) == 2 * 3.0 + 1.0 + 7 * (3.0 + 1.0) + 0.5


@pytest.mark.parametrize(("microbatches", "bytes_"), [(1, 10), (2, 14), (4, 22), (9, 22)])
def test_the_first_stage_holds_most(microbatches: int, bytes_: int) -> None:
    assert peak_bytes([STAGE] * 4, microbatches) == bytes_


def test_every_run_cuts_all_layers() -> None:
    cuts = layered._stages()
    assert {row.row for row in table(layered.RUNS)} == set(cuts)
    assert {sum(layers) for layers in cuts.values()} == {26}


def test_constants_have_the_least_mean_error() -> None:
    rows = table(layered.RUNS)
    runs = [Compared(row, 0.9 * (row.published or 0) + 0.01 * k, 2**30 * k) for k, row in enumerate(rows)]
    found = fitted(runs)

    def off(which: int, **other: float) -> float:
        return sum(abs(replace(found, **other).ratios(one)[which] - 1) for one in runs)

    for k in range(50, 200):
        assert off(0) <= off(0, time=k / 100) + 1e-12
        assert off(1) <= off(1, process_bytes=k / 10 * 2**30) + 1e-12


def test_runs_that_are_held_out_are_met() -> None:
    made = layered.compare("", "")
    assert made["summary"]["held_out"]["ratio"]["mean"] <= 0.08
    assert made["summary"]["held_out"]["memory_ratio"]["mean"] <= 0.06
