"""The geometry of the page's drawings: spans, memory and plans as positions, small however long the step is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from whalepy.planner.forecast import Alternative, DeviceForecast, Forecast, Span, SpanKind, Verdict

WIDTH = 10_000  # units of a drawing that is stretched to the width of the page
APART = 20  # units; spans of one kind that are nearer are drawn as one: 2 pixels of 1,000
NAMED = 60  # spans of a device that tell their name, the longest
POINTS = 200  # of a memory curve
DECADE = 10.0
SHOWN = 2.0  # parts of a memory: plans that need more are drawn at the edge, unless the best one does

# Row of a kind from the top, and its height; the optimizer fills both rows of computation, below what is drawn there.
ROWS: Mapping[SpanKind, tuple[float, float]] = {
    "optimizer": (0, 19),
    "forward": (0, 9),
    "backward": (10, 9),
    "bridge": (21, 6),
    "gradient": (28, 6),
}
HEIGHT = 34


@dataclass(frozen=True)
class Named:
    """A span that tells its name under the pointer."""

    x: int
    y: float
    width: int
    height: float
    span: Span


@dataclass(frozen=True)
class Drawing:
    """The step of one device: a path of horizontal strokes per kind, and the spans that tell their names."""

    paths: tuple[tuple[SpanKind, str, float], ...]
    """Kind, path, width of the stroke."""
    named: tuple[Named, ...]


def drawing(device: DeviceForecast, step_s: float) -> Drawing:
    """The spans of a device over a step, `WIDTH` by `HEIGHT` units."""
    paths: list[tuple[SpanKind, str, float]] = []
    for kind, (top, height) in ROWS.items():
        merged = _merged([_interval(span, step_s) for span in device.spans if span.kind == kind])
        path = "".join(f"M{start} {top + height / 2:g}h{end - start}" for start, end in merged)
        if path:
            paths.append((kind, path, height))
    longest = sorted(device.spans, key=lambda each: (each.start_s - each.end_s, each.start_s))[:NAMED]
    wide = [_named(span, step_s) for span in longest if (span.end_s - span.start_s) / step_s >= APART / WIDTH]
    return Drawing(tuple(paths), tuple(sorted(wide, key=lambda each: (each.x, each.y))))


def _interval(span: Span, step_s: float) -> tuple[int, int]:
    start, end = (round(WIDTH * min(max(moment / step_s, 0.0), 1.0)) for moment in (span.start_s, span.end_s))
    return start, max(end, start + 1)


def _merged(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start - merged[-1][1] < APART:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _named(span: Span, step_s: float) -> Named:
    start, end = _interval(span, step_s)
    top, height = ROWS[span.kind]
    return Named(start, top, end - start, height, span)


# -- memory


@dataclass(frozen=True)
class Curve:
    """Memory of one device over the step, from the top: `WIDTH` by 100 units."""

    area: str
    limit: float
    """Where the capacity lies."""


def curve(device: DeviceForecast, step_s: float) -> Curve:
    """Steps between at most `POINTS` moments; of each stretch the most that is held in it."""
    highest = max(device.memory_capacity_bytes, device.peak_memory_bytes, 1) * 1.04
    area = "M0 100"
    for moment, size in _thinned(device.memory):
        x = round(WIDTH * min(max(moment / step_s, 0.0), 1.0))
        area += f"H{x}V{100 * (1 - size / highest):.1f}"
    return Curve(f"{area}H{WIDTH}V100z", 100 * (1 - device.memory_capacity_bytes / highest))


def _thinned(points: Sequence[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    stretch = math.ceil(len(points) / POINTS) or 1
    for first in range(0, len(points), stretch):
        yield points[first][0], max(size for _, size in points[first : first + stretch])


# -- plans


@dataclass(frozen=True)
class Dot:
    """A plan that was tried; percent from the left and from the bottom."""

    left: float
    bottom: float
    verdict: Verdict
    plan: Alternative
    chosen: bool


@dataclass(frozen=True)
class Scatter:
    """Plans by time (to the right) and by the part of the tightest device's memory that they need (upwards)."""

    dots: tuple[Dot, ...]
    """The chosen plan last, so that nothing hides it."""
    times: tuple[tuple[float, float], ...]
    """Percent from the left, and the time in seconds there."""
    limit: float
    """Percent from the bottom where the memory is full."""
    highest: float
    """The part of the memory at the top."""
    beyond: int
    """Plans that need more and are drawn at the top, so that the others do not lie on one line."""


def scatter(forecast: Forecast, *, most: int = 1000) -> Scatter | None:
    """The best `most` plans; None where none was tried. Times are logarithmic where they span more than a decade."""
    plans = forecast.alternatives[:most]
    if not plans:
        return None
    shortest, longest = (pick(plan.step_time_s for plan in plans) for pick in (min, max))
    logarithmic = shortest > 0 and longest / shortest > DECADE
    low, high = (_scaled(limit, logarithmic) for limit in (0.9 * shortest, 1.05 * longest))
    most_shown = max(SHOWN, 1.5 * _filled(plans[0]))
    highest = 1.1 * min(max([_filled(plan) for plan in plans] + [1.0]), most_shown)

    def left(seconds: float) -> float:
        return round(100 * (_scaled(seconds, logarithmic) - low) / ((high - low) or 1.0), 2)

    dots = [
        Dot(left(plan.step_time_s), round(100 * min(_filled(plan) / highest, 1.0), 2), plan.verdict, plan, index == 0)
        for index, plan in enumerate(plans)
    ]
    moments = [low + (high - low) * quarter / 4 for quarter in range(1, 4)]
    ticks = [(25.0 * (k + 1), math.exp(at) if logarithmic else at) for k, at in enumerate(moments)]
    beyond = sum(_filled(plan) > highest for plan in plans)
    return Scatter((*dots[1:], dots[0]), tuple(ticks), round(100 / highest, 2), highest, beyond)


def _scaled(seconds: float, logarithmic: bool) -> float:
    return math.log(seconds) if logarithmic else seconds


def _filled(plan: Alternative) -> float:
    return plan.peak_memory_bytes / max(plan.memory_capacity_bytes, 1)
