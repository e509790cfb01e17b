"""The geometry of the page's drawings."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests import forecasts
from whalepy.planner.forecast import Span
from whalepy.report.shapes import APART, POINTS, WIDTH, curve, drawing, scatter

DEVICE = forecasts.four_cards().devices[0]


def test_a_span_lies_where_it_happens() -> None:
    device = replace(DEVICE, spans=(Span(0.5, 1.0, "forward", "a"), Span(1.5, 2.0, "bridge", "b")))
    found = drawing(device, 2.0)
    assert found.paths == (("forward", "M2500 4.5h2500", 9), ("bridge", "M7500 24h2500", 6))
    assert [(each.x, each.width, each.span.name) for each in found.named] == [(2500, 2500, "a"), (7500, 2500, "b")]


def test_near_spans_are_drawn_as_one() -> None:
    near, far = (APART - 1) / WIDTH, (APART + 1) / WIDTH
    for gap, strokes in ((near, 1), (far, 2)):
        device = replace(DEVICE, spans=(Span(0.0, 0.5, "forward", "a"), Span(0.5 + gap, 0.9, "forward", "b")))
        assert drawing(device, 1.0).paths[0][1].count("M") == strokes


def test_a_drawing_is_small_however_many_spans() -> None:
    many = tuple(Span(k / 5000, (k + 0.5) / 5000, ("forward", "backward")[k % 2], "x") for k in range(5000))
    found = drawing(replace(DEVICE, spans=many), 1.0)
    assert sum(len(path) for _, path, _ in found.paths) < 12_000
    assert len(found.named) <= 60


def test_a_span_that_is_hardly_there_is_still_drawn() -> None:
    found = drawing(replace(DEVICE, spans=(Span(0.3, 0.3, "bridge", "a"),)), 1.0)
    assert found.paths[0][1] == "M3000 24h1"
    assert found.named == ()


def test_memory_over_the_step() -> None:
    device = replace(DEVICE, memory=((0.0, 0), (0.5, 104), (1.0, 52)), peak_memory_bytes=104, memory_capacity_bytes=200)
    found = curve(device, 2.0)
    assert found.area == "M0 100H0V100.0H2500V50.0H5000V75.0H10000V100z"
    assert found.limit == pytest.approx(100 - 100 / 1.04)


def test_a_thinned_curve_keeps_the_peak() -> None:
    many = tuple((k / 10_000, 7 if k == 5003 else 1) for k in range(10_000))
    device = replace(DEVICE, memory=many, peak_memory_bytes=7, memory_capacity_bytes=7)
    area = curve(device, 1.0).area
    assert area.count("V") <= POINTS + 2
    assert "V3.8" in area  # 100 - 100 / 1.04, and no higher
    assert min(float(y) for y in re.findall(r"V([\d.]+)", area)) == 3.8


def test_no_course_of_memory() -> None:
    assert curve(replace(DEVICE, memory=()), 1.0).area == f"M0 100H{WIDTH}V100z"


def test_plans_as_dots() -> None:
    found = scatter(forecasts.four_cards())
    assert found is not None
    assert [(dot.chosen, dot.verdict) for dot in found.dots] == [(False, "fits"), (False, "no"), (True, "tight")]
    assert all(0 <= dot.left <= 100 and 0 <= dot.bottom <= 100 for dot in found.dots)
    assert [dot.bottom > found.limit for dot in found.dots] == [False, True, False]
    assert [left for left, _ in found.times] == [25, 50, 75]
    assert scatter(replace(forecasts.four_cards(), alternatives=())) is None


def test_the_best_plans_are_drawn() -> None:
    found = scatter(forecasts.sixty_four(), most=3)
    assert found is not None
    assert [dot.plan.step_time_s for dot in found.dots] == pytest.approx([1.35, 1.45, 1.25])


def test_times_of_several_decades_are_logarithmic() -> None:
    known = forecasts.four_cards()
    plans = tuple(replace(known.alternatives[0], step_time_s=seconds) for seconds in (1.0, 10.0, 100.0))
    found = scatter(replace(known, alternatives=plans))
    assert found is not None
    left = {dot.plan.step_time_s: dot.left for dot in found.dots}
    assert left[10.0] - left[1.0] == pytest.approx(left[100.0] - left[10.0], abs=0.02)
    assert found.times[1][1] == pytest.approx((0.9 * 105) ** 0.5)


def test_plans_that_need_far_more_are_drawn_at_the_edge() -> None:
    known = forecasts.four_cards()
    best = known.alternatives[0]
    huge = replace(best, peak_memory_bytes=30 * best.memory_capacity_bytes, verdict="no")
    found = scatter(replace(known, alternatives=(best, huge)))
    assert found is not None
    assert found.beyond == 1 and found.highest == pytest.approx(2.2)
    assert max(dot.bottom for dot in found.dots) == 100
    alone = scatter(replace(known, alternatives=(huge,)))
    assert alone is not None and alone.beyond == 0
