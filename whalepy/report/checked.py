"""A forecast that can be reported: every figure a finite number, and strings that are safe to print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from whalepy.errors import PlanError
from whalepy.planner.forecast import REPORT, Forecast

T = TypeVar("T")
REPLACEMENT = "?"


def check(forecast: Forecast) -> None:
    """Raises PlanError for a figure that is not a finite number, a step of no time, or a rank that does not exist."""
    for path, value in _figures(forecast, "forecast", set()):
        if not math.isfinite(value):
            raise PlanError(f"{path} is {value}, not a finite number", fix=REPORT)
    for name in ("step_time_s", "equal_shares_step_time_s"):
        if getattr(forecast, name) <= 0:
            raise PlanError(f"forecast.{name} is {getattr(forecast, name)}: a step takes time", fix=REPORT)
    known = {device.rank for device in forecast.devices}
    for name in ("bottleneck", "tightest"):
        if getattr(forecast, name) not in known:
            raise PlanError(f"forecast.{name} is {getattr(forecast, name)}, which is no rank", fix=REPORT)


def _figures(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, float]]:
    """What many devices have in common, such as their course over the step, only once."""
    if isinstance(value, float):
        yield path, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _figures(getattr(value, field.name), f"{path}.{field.name}", seen)
    elif isinstance(value, tuple) and id(value) not in seen:
        seen.add(id(value))
        for index, item in enumerate(value):
            yield from _figures(item, f"{path}[{index}]", seen)


def printable(value: T, *, unicode: bool = True, breaks: bool = False) -> T:
    """The same value, in whose strings nothing moves the cursor or, without `unicode`, lies outside ASCII.

    Line breaks stay with `breaks` and become spaces without; other unprintable characters, such as escape codes in the
    name of a module, become question marks.
    """
    cleaned: Any = value
    if isinstance(value, str):
        cleaned = "".join(_shown(char, unicode, breaks) for char in value)
    elif isinstance(value, tuple):
        cleaned = tuple(printable(item, unicode=unicode, breaks=breaks) for item in value)
    elif isinstance(value, Mapping):
        cleaned = {key: printable(item, unicode=unicode, breaks=breaks) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in fields(value)}
        cleaned = replace(value, **printable(own, unicode=unicode, breaks=breaks))
    return cleaned


def _shown(char: str, unicode: bool, breaks: bool) -> str:
    if char.isspace():
        return char if breaks and char == "\n" else " "
    return char if char.isprintable() and (unicode or char.isascii()) else REPLACEMENT
