"""Lanes: nothing overlaps, nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests import forecasts
from whalepy.planner.forecast import Span, SpanKind
from whalepy.report.lanes import FAMILIES, lanes

DEVICE = forecasts.four_cards().devices[0]
KINDS: list[SpanKind] = [kind for kinds in FAMILIES.values() for kind in kinds]
moments = st.floats(0, 1, allow_subnormal=False)
span = st.builds(lambda a, b, kind: Span(min(a, b), max(a, b), kind, "x"), moments, moments, st.sampled_from(KINDS))


def test_two_lanes_where_nothing_overlaps() -> None:
    found = lanes(DEVICE)
    assert [lane.name for lane in found] == ["compute", "communication"]
    assert {each.kind for each in found[1].spans} == {"gradient"}


def test_an_overlap_opens_another_lane() -> None:
    both = (Span(0.0, 2.0, "bridge", "a"), Span(1.0, 3.0, "gradient", "b"), Span(2.0, 3.0, "bridge", "c"))
    found = lanes(replace(DEVICE, spans=both))
    assert [(lane.name, [each.name for each in lane.spans]) for lane in found] == [
        ("communication", ["a", "c"]),
        ("communication 2", ["b"]),
    ]


@given(st.lists(span, max_size=30))
def test_nothing_overlaps_and_nothing_is_lost(spans: list[Span]) -> None:
    found = lanes(replace(DEVICE, spans=tuple(spans)))
    assert sorted(map(repr, (each for lane in found for each in lane.spans))) == sorted(map(repr, spans))
    for lane in found:
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(lane.spans))
