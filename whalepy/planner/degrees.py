"""Degrees that annotations leave open, as the planner settles them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from whalepy.errors import PlanError
from whalepy.primitives import Primitive
from whalepy.primitives.scope import resized

Degrees = tuple[int | None, ...]
"""Per line of the user's that leaves a degree open, by order of appearance; None: all devices that are left there."""


def open_scopes(scopes: Iterable[Primitive]) -> list[tuple[Primitive, ...]]:
    """The levels among a program's scopes whose degree is open; those that one line made, as in a loop, together."""
    found: dict[tuple[str, str, str | None], list[Primitive]] = {}
    for p in scopes:
        if p.kind in ("replicate", "split") and p.degree is None:
            found.setdefault((p.at, p.kind, p.on), []).append(p)
    return [tuple(own) for own in found.values()]


def settled(scopes: Iterable[Primitive], degrees: Sequence[int | None]) -> dict[Primitive, Primitive]:
    """The scopes that stand for open ones, with their degrees. Raises PlanError for degrees of another program."""
    if not degrees:
        return {}
    lines = open_scopes(scopes)
    if len(lines) != len(degrees):
        raise PlanError(
            f"the plan settles {len(degrees)} open degree{'s' if len(degrees) > 1 else ''}, the model has {len(lines)}",
            fix="plan this model again, and save the plan",
        )
    pairs = zip(lines, degrees, strict=True)
    return {p: resized(p, degree, p.shares) for own, degree in pairs if degree is not None for p in own}
