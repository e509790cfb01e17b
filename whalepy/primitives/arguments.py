"""Checks of what a user gives to a primitive: degree, shares, on. Each returns the value in its stored form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TypeGuard, cast

from whalepy.errors import AnnotationError

_PARAMETER_DIM = re.compile(r"[^\s:]+:\d+")


def checked_degree(kind: str, name: str, degree: object, at: str) -> int | None:
    """A whole number of at least 1, or None for the planner to decide. Raises AnnotationError."""
    if degree is None:
        return None
    if callable(degree):
        raise AnnotationError(f"{kind} is used as a decorator without parentheses", at=at, fix=f"write @{kind}()")
    if not is_whole(degree) or degree < 1:
        raise AnnotationError(
            f"{kind}({name}={degree!r}): {name} is a whole number of at least 1",
            at=at,
            fix=f"give {name} as 1 or more, or leave it out to let the planner decide",
        )
    return int(degree)


def checked_shares(kind: str, degree: int | None, shares: object, at: str) -> tuple[float, ...] | None:
    """One finite weight >= 0 per position of the level, at least one of them positive. Raises AnnotationError."""
    if shares is None:
        return None
    if isinstance(shares, (str, bytes)) or not isinstance(shares, Iterable):
        raise _shares_error(kind, shares, "shares are a list of weights", "write one weight per part: (3, 1)", at)
    weights = tuple(cast(Iterable[object], shares))
    bad = [weight for weight in weights if not _is_weight(weight)]
    if bad:
        fix = "give every part a finite weight of 0 or more"
        raise _shares_error(kind, shares, f"{bad[0]!r} is no weight", fix, at)
    numbers = tuple(float(cast(Real, weight)) for weight in weights)
    if not any(numbers):
        fix = "give at least one part a positive weight"
        raise _shares_error(kind, shares, "no part has a positive weight", fix, at)
    if degree not in (None, len(numbers)):
        fix = "give one weight per part; without a degree, it is the number of shares"
        raise _shares_error(kind, shares, f"{len(numbers)} shares for a degree of {degree}", fix, at)
    return numbers


def checked_parameter_dim(on: object, at: str) -> str | None:
    """A parameter and one of its dims, like "head.weight:0". Raises AnnotationError."""
    if on is None or (isinstance(on, str) and _PARAMETER_DIM.fullmatch(on)):
        return on
    raise AnnotationError(
        f"split(on={on!r}): this names no dim of a parameter",
        at=at,
        fix='write the parameter\'s name and its dim: on="head.weight:0"',
    )


def is_whole(value: object) -> TypeGuard[int]:
    """True for an integer, numpy's too; False for True and False, which Python counts as integers."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_weight(weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        return False
    return 0 <= float(weight) < math.inf  # NaN is neither


def _shares_error(kind: str, shares: object, why: str, fix: str, at: str) -> AnnotationError:
    return AnnotationError(f"{kind}(shares={shares!r}): {why}", at=at, fix=fix)
