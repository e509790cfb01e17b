"""The lanes of one device over a step: what it computes, and what it sends meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.planner.forecast import DeviceForecast, Span, SpanKind

FAMILIES: Mapping[str, tuple[SpanKind, ...]] = {
    "compute": ("forward", "backward", "optimizer"),
    "communication": ("bridge", "gradient"),
}


@dataclass(frozen=True)
class Lane:
    """Spans of one device that do not overlap, in order of their start."""

    name: str
    spans: tuple[Span, ...]


def lanes(device: DeviceForecast) -> tuple[Lane, ...]:
    """The lanes of each family that has spans: as few as hold them without overlap, earliest span first.

    `compute` and `communication`; where spans of a family overlap, `communication 2` and so on.
    """
    found: list[Lane] = []
    for family, kinds in FAMILIES.items():
        spans = sorted(
            (span for span in device.spans if span.kind in kinds), key=lambda each: (each.start_s, each.end_s)
        )
        for index, lane in enumerate(_packed(spans)):
            found.append(Lane(f"{family} {index + 1}" if index else family, tuple(lane)))
    return tuple(found)


def _packed(spans: Sequence[Span]) -> list[list[Span]]:
    """Each span in the first lane that is free by then."""
    packed: list[list[Span]] = []
    for span in spans:
        free = next((lane for lane in packed if lane[-1].end_s <= span.start_s + _SAME_MOMENT_S), None)
        if free is None:
            packed.append([span])
        else:
            free.append(span)
    return packed


_SAME_MOMENT_S = 1e-9  # sums of seconds differ in their last bits: below this, one ends where the other starts
