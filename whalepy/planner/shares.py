"""Whole units from weights: how many rows, heads or devices' worth of an axis each position of a level gets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from whalepy.errors import AnnotationError, PlanError


def round_shares(total: int, weights: Sequence[float], *, at_least_one: bool = False) -> tuple[int, ...]:
    """Whole units for each position, `total` in all, as near to the weights as whole numbers come.

    Largest remainder: every position gets the whole part of its exact share, and the units left over go to the largest
    remainders, ties to the lower position. Weight 0 gets 0. No other whole shares deviate less from the exact ones, be
    it by the largest deviation or by the sum of their squares. Exact arithmetic: the same result on every rank.

    With `at_least_one` every positive weight gets at least 1, and the rest is as near as that allows, by the same
    measures: units are taken back where a position is furthest above its exact share, ties from the higher position.

    Raises AnnotationError for weights that are missing, negative, not finite or all 0; PlanError for a negative total
    or, with `at_least_one`, one smaller than the number of positive weights.
    """
    check_weights(weights)
    positive = sum(weight > 0 for weight in weights)
    if total < (positive if at_least_one else 0):
        fix = "use fewer positions, weights of 0, or a larger axis" if total >= 0 else "share at least 0 units"
        raise PlanError(f"{total} units cannot be shared over {positive} positive weights", fix=fix)
    exact, parts = _exact_shares(total, weights)
    least = [int(at_least_one and weight > 0) for weight in weights]
    shares = [max(low, share // parts) for low, share in zip(least, exact, strict=True)]
    above = [share * parts - whole for share, whole in zip(shares, exact, strict=True)]
    _give(total - sum(shares), shares, above)
    _take_back(sum(shares) - total, shares, above, parts, least)
    return tuple(shares)


def check_weights(weights: Sequence[float]) -> None:
    """Raises AnnotationError unless the weights are finite, none negative, and at least one positive."""
    for position, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            fix = "shares are finite weights of at least 0, one per position"
            raise AnnotationError(f"share {weight} at position {position} is not a weight", fix=fix)
    if not any(weights):
        raise AnnotationError(f"no share in {tuple(weights)} is positive", fix="give at least one position some weight")


def parse_shares(text: str) -> tuple[float, ...] | Literal["equal"]:
    """The weights of `3:1` or `0.5:0.25:0.25`, or the word `equal`. Raises AnnotationError for anything else."""
    if text.strip() == "equal":
        return "equal"
    try:
        weights = tuple(float(part) for part in text.split(":"))
    except ValueError:
        fix = "write `equal`, or one weight per position: 3:1"
        raise AnnotationError(f"{text!r} is not a list of shares", fix=fix) from None
    check_weights(weights)
    return weights


def exact_weight(weight: float) -> Fraction:
    """The weight as the decimal it is written as: 0.3 is 3/10, so that 0.3:0.1 ties where 3:1 does."""
    return Fraction(weight) if isinstance(weight, int | Fraction) else Fraction(str(float(weight)))


def _exact_shares(total: int, weights: Sequence[float]) -> tuple[list[int], int]:
    """The share of each position in parts of a unit, and how many parts a unit has: whole numbers compare fast."""
    known = {weight: exact_weight(weight) for weight in dict.fromkeys(weights)}
    common = math.lcm(*(part.denominator for part in known.values()))
    whole = {weight: part.numerator * (common // part.denominator) for weight, part in known.items()}
    return [total * whole[weight] for weight in weights], sum(whole[weight] for weight in weights)


def _give(units: int, shares: list[int], above: Sequence[int]) -> None:
    """One more unit to each of the `units` positions furthest below their exact share, ties to the lower."""
    order = sorted(range(len(shares)), key=above.__getitem__)
    for i in order[: max(0, units)]:
        shares[i] += 1


def _take_back(units: int, shares: list[int], above: Sequence[int], parts: int, least: Sequence[int]) -> None:
    """`units` units, one by one, from the position furthest above its exact share, ties from the higher."""
    order = [(-gap, -i) for i, gap in enumerate(above) if shares[i] > least[i]]
    heapq.heapify(order)
    for _ in range(units):
        gap, negative = order[0]
        i = -negative
        shares[i] -= 1
        if shares[i] > least[i]:
            heapq.heapreplace(order, (gap + parts, negative))
        else:
            heapq.heappop(order)
