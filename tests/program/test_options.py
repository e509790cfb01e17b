from __future__ import annotations

import pytest

from whalepy.program.axes import Axes
from whalepy.program.options import Dims, Option, aligned, options, unify
from whalepy.program.rules import Rule, parse_rule


def made(axes: Axes, shapes: list[list[int]]) -> list[Dims]:
    return [tuple(axes.dim(size) for size in shape) for shape in shapes]


def ways(rule: Rule, inputs: list[list[int]], outputs: list[list[int]]) -> list[str]:
    axes = Axes()
    left, right = made(axes, inputs), made(axes, outputs)
    counted: dict[str, tuple[int, ...]] = {}
    unify(axes, rule, left, right, counted)
    unify(axes, rule, left, right, counted)
    return [text(axes, option) for option in options(axes, rule, left, right)]


def text(axes: Axes, option: Option) -> str:
    """`8: 1.0, - -> 0.0`: the size of the axis, then dim.term in each operand and result."""
    sides = [
        ", ".join("-" if place is None else f"{place.dim}.{place.term}" for place in side)
        for side in (option.inputs, option.outputs)
    ]
    return f"{axes.size(option.axis)}: {' -> '.join(sides)}" + (f" !{option.kernel}" if option.kernel else "")


CASES = [
    # a factor in two operands, one lacking, one contracted
    ("mk, kn -> mn", [[4, 5], [5, 6]], [[4, 6]], ["4: 0.0, - -> 0.0", "5: 1.0, 0.0 -> -", "6: -, 1.0 -> 1.0"]),
    # a whole factor is no option, nor is an unrelated one
    ("aB_ -> aB_", [[4, 5, 6]], [[4, 5, 7]], ["4: 0.0 -> 0.0"]),
    # a dim of size 1 lacks the factor
    ("ab, ab -> ab", [[4, 1], [1, 6]], [[4, 6]], ["4: 0.0, - -> 0.0", "6: -, 1.0 -> 1.0"]),
    # a factor twice in one value cannot be cut: one occurrence would not do
    ("a -> aa", [[4]], [[4, 4]], []),
    # a kernel comes with its factor
    (
        "vd, n -> nd !v=masked",
        [[9, 4], [5]],
        [[5, 4]],
        ["9: 0.0, - -> - !masked", "4: 1.0, - -> 1.0", "5: -, 0.0 -> 0.0"],
    ),
]


@pytest.mark.parametrize(("line", "inputs", "outputs", "expected"), CASES)
def test_options_of_a_line(line: str, inputs: list[list[int]], outputs: list[list[int]], expected: list[str]) -> None:
    assert ways(parse_rule(line), inputs, outputs) == expected


def test_a_product_dim_is_cut_along_either_factor() -> None:
    equal = parse_rule("a(N p) -> ap, ap, ap", sizes={"N": 3})
    assert ways(equal, [[4, 24]], [[4, 8]] * 3) == ["4: 0.0 -> 0.0, 0.0, 0.0", "8: 1.1 -> 1.0, 1.0, 1.0"]
    repeated = parse_rule("x -> (x R)", sizes={"R": 3})
    assert ways(repeated, [[4]], [[12]]) == ["4: 0.0 -> 0.0"]
    assert ways(repeated, [[1]], [[3]]) == []  # all that is left are the copies, which are whole


def test_a_reshape_is_cut_along_what_both_ends_share() -> None:
    flat = Rule((("_",) * 2,), (("_",) * 3,), flat=True)
    assert ways(flat, [[4, 24]], [[4, 3, 8]]) == ["4: 0.0 -> 0.0", "3: 1.0 -> 1.0", "8: 1.1 -> 2.0"]
    assert ways(flat, [[6, 4]], [[4, 3, 2]]) == ["2: 1.1 -> 2.0"]  # 6 x 4 against 4 x 3 x 2: only the last 2 agrees


def test_a_concatenation_is_cut_inside_every_part() -> None:
    axes = Axes()
    kv, rep, dh = axes.new(4), axes.new(2), axes.new(8)
    fused = axes.dim(128)
    results: list[Dims] = [((kv, rep, dh),), ((kv, dh),), ((kv, dh),)]
    rule = Rule((("_",),), (("_",),) * 3, concatenated=0)
    unify(axes, rule, [(fused,)], results, {})
    assert [text(axes, o) for o in options(axes, rule, [(fused,)], results)] == [
        "4: 0.0 -> 0.0, 0.0, 0.0",
        "8: 0.0 -> 0.2, 0.1, 0.1",
    ]


# lists -> positions where all agree, from the start, then from the end
ALIGNED = [
    ([[1, 2, 3], [1, 2, 3]], [(0, 0), (1, 1), (2, 2)]),
    ([[1, 2, 3], [1, 4, 5, 3]], [(0, 0), (2, 3)]),
    ([[1], [2]], []),
    ([[1, 1], [1]], [(0, 0)]),  # never the same position twice
]


@pytest.mark.parametrize(("lists", "expected"), ALIGNED)
def test_alignment(lists: list[list[int]], expected: list[tuple[int, ...]]) -> None:
    assert list(aligned(lists)) == expected
