"""Largest remainder: exact sums, the tie rule, and a brute-force proof that nothing is nearer."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepy.errors import AnnotationError, PlanError
from whalepy.planner.shares import exact_weight, parse_shares, round_shares

CASES = [
    (8, (1, 1), False, (4, 4)),
    (4, (3, 1), False, (3, 1)),
    (
        10,
        (0.7, 0.3),
        False,
        (7, 3),
    ),
    (5, (1, 1), False, (3, 2)),  # ties to the lower position
    (2, (0.3, 0.1), False, (2, 0)),  # the tie that 3:1 has, although the doubles lie off it
    (7, (1, 1, 1), False, (3, 2, 2)),
    (2, (1, 1, 1), False, (1, 1, 0)),
    (10, (5, 3, 1), False, (6, 3, 1)),  # exact 5.56, 3.33, 1.11
    (3, (0, 1, 0, 1), False, (0, 2, 0, 1)),  # weight 0 gets 0
    (0, (1, 2), False, (0, 0)),
    (1, (1, 10**9), False, (0, 1)),
    (128, (100, 28), True, (100, 28)),
    (4, (100, 1), True, (3, 1)),  # exact 3.96, 0.04
    (3, (100, 1, 1), True, (1, 1, 1)),
    (5, (100, 1, 1, 0), True, (3, 1, 1, 0)),
    (6, (45, 45, 5, 5), True, (2, 2, 1, 1)),  # both give one
    (5, (45, 45, 5, 5), True, (2, 1, 1, 1)),  # a tie: taken from the higher position
    (12, (100, 60) + (1,) * 8, True, (3, 1) + (1,) * 8),  # exact 7.1 and 4.3: they give in turn, not one for all
]


@pytest.mark.parametrize(("total", "weights", "at_least_one", "shares"), CASES)
def test_cases(total: int, weights: tuple[float, ...], at_least_one: bool, shares: tuple[int, ...]) -> None:
    assert round_shares(total, weights, at_least_one=at_least_one) == shares


def candidates(total: int, weights: tuple[int, ...], low: int) -> list[tuple[int, ...]]:
    """Every way to share `total` whole units where weight 0 gets 0 and the others at least `low`."""
    ranges = [range(low, total + 1) if weight else range(1) for weight in weights]
    return [shares for shares in itertools.product(*ranges) if sum(shares) == total]


def deviations(shares: tuple[int, ...], weights: tuple[int, ...]) -> list[Fraction]:
    total, whole = sum(shares), sum(weights)
    return [abs(share - Fraction(total * weight, whole)) for share, weight in zip(shares, weights, strict=True)]


GRID = [weights for weights in itertools.product(range(6), repeat=3) if any(weights)] + [
    weights for weights in itertools.product((0, 1, 3, 20), repeat=4) if any(weights)
]


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("total", [1, 4, 7])
def test_nothing_is_nearer(total: int, at_least_one: bool) -> None:
    """Brute force over every sharing: neither the largest deviation nor the sum of squares can be smaller."""
    for weights in GRID:
        if at_least_one and total < sum(weight > 0 for weight in weights):
            continue
        found = round_shares(total, weights, at_least_one=at_least_one)
        every = [deviations(shares, weights) for shares in candidates(total, weights, int(at_least_one))]
        own = deviations(found, weights)
        assert max(own) == min(max(gaps) for gaps in every), (weights, found)
        assert sum(gap**2 for gap in own) == min(sum(gap**2 for gap in gaps) for gaps in every), (weights, found)


WEIGHTS = st.lists(st.floats(0, 1e6) | st.integers(0, 9), min_size=1, max_size=9).filter(any)


@given(st.integers(0, 10**6), WEIGHTS)
def test_rules(total: int, weights: list[float]) -> None:
    shares = round_shares(total, weights)
    assert sum(shares) == total
    assert all(share == 0 for share, weight in zip(shares, weights, strict=True) if weight == 0)
    whole = sum(map(exact_weight, weights))
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * exact_weight(weight) / whole) < 1  # never a whole unit off
    pairs = sorted(zip(weights, shares, strict=True))
    assert all(low[1] <= high[1] for low, high in itertools.pairwise(pairs) if low[0] < high[0])  # more weight, no less


@given(st.integers(0, 10**4), WEIGHTS)
def test_scale_does_not_matter(total: int, weights: list[float]) -> None:
    assert round_shares(total, weights) == round_shares(total, [exact_weight(weight) * 3 / 7 for weight in weights])


@given(st.integers(9, 10**4), WEIGHTS)
def test_rules_at_least_one(total: int, weights: list[float]) -> None:
    shares = round_shares(total, weights, at_least_one=True)
    assert sum(shares) == total
    assert all((share >= 1) == (weight > 0) for share, weight in zip(shares, weights, strict=True))
    plain = round_shares(total, weights)
    assert all(share or not weight for share, weight in zip(plain, weights, strict=True)) <= (plain == shares)


@settings(max_examples=30)
@given(st.integers(1, 50), st.integers(1, 9))
def test_equal_weights_differ_by_one_larger_first(total: int, positions: int) -> None:
    shares = round_shares(total, [0.1] * positions)
    assert sorted(shares, reverse=True) == list(shares)
    assert max(shares) - min(shares) <= 1


POSITIVE = "shares are finite weights of at least 0, one per position"
BAD_WEIGHTS: list[tuple[tuple[float, ...], str]] = [
    ((1, -1), f"share -1 at position 1 is not a weight\n  fix: {POSITIVE}"),
    ((float("nan"), 1), f"share nan at position 0 is not a weight\n  fix: {POSITIVE}"),
    ((1, float("inf")), f"share inf at position 1 is not a weight\n  fix: {POSITIVE}"),
    ((0, 0.0), "no share in (0, 0.0) is positive\n  fix: give at least one position some weight"),
    ((), "no share in () is positive\n  fix: give at least one position some weight"),
]


@pytest.mark.parametrize(("weights", "message"), BAD_WEIGHTS)
def test_bad_weights(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(AnnotationError) as error:
        round_shares(4, weights)
    assert str(error.value) == message


def test_too_few_units() -> None:
    with pytest.raises(PlanError) as error:
        round_shares(2, (1, 1, 1, 0), at_least_one=True)
    assert str(error.value) == (
        "2 units cannot be shared over 3 positive weights\n  fix: use fewer positions, weights of 0, or a larger axis"
    )
    with pytest.raises(PlanError, match="-1 units cannot be shared"):
        round_shares(-1, (1, 1))


@pytest.mark.parametrize(
    ("text", "shares"), [("equal", "equal"), ("3:1", (3.0, 1.0)), ("0.5: .25 :.25", (0.5, 0.25, 0.25)), ("2", (2.0,))]
)
def test_parse(text: str, shares: object) -> None:
    assert parse_shares(text) == shares


@pytest.mark.parametrize("text", ["3:", "a:b", "", "3,1", "even"])
def test_parse_errors(text: str) -> None:
    with pytest.raises(AnnotationError) as error:
        parse_shares(text)
    assert str(error.value) == (
        f"{text!r} is not a list of shares\n  fix: write `equal`, or one weight per position: 3:1"
    )


def test_parse_checks_the_weights() -> None:
    with pytest.raises(AnnotationError, match=r"share -1\.0 at position 1"):
        parse_shares("3:-1")
