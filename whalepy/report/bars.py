"""Bars made of characters: a filled part of a whole, and a whole cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whalepy.planner.shares import round_shares


@dataclass(frozen=True)
class Glyphs:
    """The characters of the bars. Parts of a step differ by character, never by colour alone."""

    full: str
    empty: str
    fractions: str
    """From the smallest; "" where only whole characters can be drawn."""
    compute: str
    gradient: str
    bridge: str
    bubble: str


UNICODE = Glyphs("█", "░", "▏▎▍▌▋▊▉", compute="█", gradient="▓", bridge="░", bubble="·")
ASCII = Glyphs("#", ".", "", compute="#", gradient="+", bridge="-", bubble=".")


def filled(part: float, width: int, glyphs: Glyphs) -> str:
    """`width` characters of which `part` (0 to 1) is full; a part above 0 and below 1 is never drawn as 0 or 1."""
    if width < 1:
        return ""
    steps = len(glyphs.fractions) + 1
    total = width * steps
    done = round(min(max(part, 0.0), 1.0) * total)
    if 0 < part < 1:
        done = min(max(done, 1), total - 1)
    whole, rest = divmod(done, steps)
    shown = glyphs.full * whole + (glyphs.fractions[rest - 1] if rest else "")
    return shown + glyphs.empty * (width - len(shown))


def lengths(parts: Sequence[float], width: int) -> tuple[int, ...]:
    """Characters for each part, `width` in all; at least one for a part above 0, if there is room for that."""
    weights = [max(part, 0.0) for part in parts]
    positive = sum(weight > 0 for weight in weights)
    if not positive:
        return (0,) * len(parts)
    return round_shares(width, weights, at_least_one=positive <= width)
