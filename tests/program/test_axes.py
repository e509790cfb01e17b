from __future__ import annotations

from math import prod

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from whalepy.program.axes import Axes, Dim, as_size, divide, strip_common

B = sympy.Symbol("b", positive=True, integer=True)
S = sympy.Symbol("s", positive=True, integer=True)

# sizes of two products of equal total -> sizes of their leaves after matching
MATCHES = [
    ([768], [12, 64], [12, 64], [12, 64]),  # heads
    ([2304], [3, 12, 64], [3, 12, 64], [3, 12, 64]),  # a fused projection
    ([12, 64], [4, 192], [4, 3, 64], [4, 3, 64]),  # both come apart
    ([6, 4], [4, 6], [6, 4], [4, 6]),  # nothing divides from either end: left apart
    ([2, 6, 5], [2, 10, 3], [2, 6, 5], [2, 10, 3]),  # equal at the start, blocked in the middle
    ([4, 9], [6, 6], [4, 9], [6, 6]),
    ([1, 8], [8], [8], [8]),  # a dim of size 1 is no axis
]


def dims(axes: Axes, sizes: list[int]) -> Dim:
    return tuple(axis for size in sizes for axis in axes.dim(size))


@pytest.mark.parametrize(("left", "right", "left_leaves", "right_leaves"), MATCHES)
def test_products_are_matched_from_both_ends(
    left: list[int], right: list[int], left_leaves: list[int], right_leaves: list[int]
) -> None:
    axes = Axes()
    a, b = dims(axes, left), dims(axes, right)
    axes.match(a, b)
    assert [axes.size(leaf) for leaf in axes.leaves(a)] == left_leaves
    assert [axes.size(leaf) for leaf in axes.leaves(b)] == right_leaves
    assert (axes.leaves(a) == axes.leaves(b)) is (left_leaves == right_leaves)


def test_free_sizes_divide_where_they_always_do() -> None:
    assert divide(B * 12, 12) == B
    assert divide(B * S, S) == B
    assert divide(B * S, 2) is None
    assert divide(B, S) is None
    assert divide(12, 5) is None
    assert as_size(sympy.Integer(4)) == 4


def test_a_free_size_matches_through_a_flattened_view() -> None:
    axes = Axes()
    x, flat = (axes.new(B), axes.new(S), axes.new(64)), (axes.new(B * S), axes.new(64))
    axes.match(x, flat)
    assert axes.leaves(flat) == axes.leaves(x)


def test_sizes_that_an_operator_equates_are_known_afterwards() -> None:
    axes = Axes()
    a, b = axes.new(B), axes.new(8)
    axes.match((a,), (b,))
    assert axes.size(a) == axes.size(b) == 8
    c = axes.new(B * S)
    assert axes.size(c) == 8 * S


def test_a_known_size_is_kept_where_a_free_expression_must_equal_it() -> None:
    """A convolution that halves a free dim, flattened into a linear layer: the parameter's own size counts."""
    axes = Axes({S: 4})
    rows, weight = axes.dim(4 * (S // 2)), axes.dim(8)
    axes.match(rows, weight)
    assert [axes.size(leaf) for leaf in axes.leaves(weight)] == [8]
    assert [axes.size(leaf) for leaf in axes.leaves(rows)] == [8]


def test_a_fixed_axis_is_never_refined() -> None:
    axes = Axes()
    rows, a = axes.new(12), (axes.new(3), axes.new(4))
    axes.fix(rows)
    axes.match((rows,), a)
    assert axes.leaves((rows,)) == (rows,)


def test_a_concatenation_is_sharded_along_what_every_part_has_once() -> None:
    axes = Axes()
    kv, rep, dh = axes.new(4), axes.new(2), axes.new(8)
    fused = axes.new(128)
    assert axes.concatenate(fused, [(kv, rep, dh), (kv, dh), (kv, dh)])
    assert axes.shardable_inside(fused) == (kv, dh)
    assert axes.shardable_inside(kv) == (kv,)
    assert axes.leaves((fused,)) == (fused,)
    assert axes.parts(fused) == ((kv, rep, dh), (kv, dh), (kv, dh))


def test_equal_concatenations_are_united_part_by_part() -> None:
    axes = Axes()
    one, other = axes.new(12), axes.new(12)
    p, q, r, s = axes.new(8), axes.new(4), axes.new(8), axes.new(4)
    axes.concatenate(one, [(p,), (q,)])
    axes.concatenate(other, [(r,), (s,)])
    axes.match((one,), (other,))
    assert axes.find(one) == axes.find(other)
    assert axes.find(p) == axes.find(r) and axes.find(q) == axes.find(s)


def test_unequal_concatenations_stay_apart() -> None:
    axes = Axes()
    one, other = axes.new(12), axes.new(12)
    axes.concatenate(one, [(axes.new(8),), (axes.new(4),)])
    axes.concatenate(other, [(axes.new(4),), (axes.new(8),)])
    axes.match((one,), (other,))
    assert axes.find(one) != axes.find(other)


def test_common_ends_are_stripped() -> None:
    assert strip_common((1, 2, 3, 4), (1, 5, 4)) == ((2, 3), (5,))
    assert strip_common((1, 1), (1,)) == ((1,), ())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_matching_keeps_every_total_and_ends_in_agreement(sizes: list[int], data: st.DataObject) -> None:
    axes = Axes()
    cuts = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    grouped: list[int] = []
    for size, joined in zip(sizes, cuts, strict=True):
        if grouped and joined:
            grouped[-1] *= size
        else:
            grouped.append(size)
    a, b = dims(axes, sizes), dims(axes, grouped)
    axes.match(a, b)
    assert axes.leaves(a) == axes.leaves(b)  # one is a grouping of the other: all of it comes apart
    assert prod(int(axes.size(leaf)) for leaf in axes.leaves(a)) == prod(sizes)


def test_an_axis_of_a_parameter_keeps_its_number_when_it_meets_a_size_of_an_input() -> None:
    axes = Axes({S: 32})
    patches, positions = axes.new((S // 8) ** 2), axes.new(16)
    axes.match((patches,), (positions,))
    assert axes.size(patches) == axes.size(positions) == 16
