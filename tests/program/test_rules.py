from __future__ import annotations

import pytest

from whalepy.program.rules import at_ranks, is_whole, parse_rule

# line -> operands, results (a product dim is a tuple)
LINES = [
    ("mk, kn -> mn", (("m", "k"), ("k", "n")), (("m", "n"),)),
    ("...k, nk, +n -> ...n", (("...", "k"), ("n", "k"), ("n",)), (("...", "n"),)),
    ("b heads s D, s D -> b heads s D", (("b", "heads", "s", "D"), ("s", "D")), (("b", "heads", "s", "D"),)),
    ("nc__ -> nc__, nc__", (("n", "c", "_", "_"),), (("n", "c", "_", "_"), ("n", "c", "_", "_"))),
    ("a(n p) -> ap, ap", (("a", ("n", "p")),), (("a", "p"), ("a", "p"))),
    ("b (h d) -> b h d", (("b", ("h", "d")),), (("b", "h", "d"),)),
    ("k, k -> ", (("k",), ("k",)), ((),)),  # a scalar result
    (" -> ab", (), (("a", "b"),)),  # no operands
]


@pytest.mark.parametrize(("line", "inputs", "outputs"), LINES)
def test_a_line_is_read(line: str, inputs: object, outputs: object) -> None:
    rule = parse_rule(line)
    assert (rule.inputs, rule.outputs) == (inputs, outputs)
    assert rule.additive == (frozenset({2}) if "+" in line else frozenset())


def test_marks_name_local_kernels() -> None:
    rule = parse_rule("vd, ... -> ...d  !v=masked_embedding", linear=((0,),))
    assert rule.kernels == {"v": "masked_embedding"} and rule.linear == (frozenset({0}),)
    assert str(rule) == "v d, ... -> ... d  !v=masked_embedding"


# line, ranks -> at these ranks, leading dims counted from the right so that they broadcast
RANKS = [
    ("...k, nk -> ...n", (3, 2), (3,), ".1 .0 k, n k -> .1 .0 n"),
    ("...k, nk -> ...n", (1, 2), (1,), "k, n k -> n"),
    ("..., ... -> ...", (1, 3), (3,), ".0, .2 .1 .0 -> .2 .1 .0"),
    ("...k, nk -> ...n", (0, 2), (1,), None),  # the operand has no dim for k
    ("mk, kn -> mn", (3, 2), (2,), None),  # a dim too many
    ("mk, kn -> mn", (2,), (2,), None),  # an operand too few
    ("mk, kn -> mn", (2, 2), (2, 2), None),  # a result too many
]


@pytest.mark.parametrize(("line", "inputs", "outputs", "text"), RANKS)
def test_leading_dims_are_written_out(
    line: str, inputs: tuple[int, ...], outputs: tuple[int, ...], text: str | None
) -> None:
    rule = at_ranks(parse_rule(line), inputs, outputs)
    assert (None if rule is None else str(rule)) == text


@pytest.mark.parametrize(
    ("token", "whole"), [("n", False), ("N", True), ("_", True), (".0", False), ("N1", True), ("n1", False)]
)
def test_case_says_whether_a_factor_is_whole(token: str, whole: bool) -> None:
    assert is_whole(token) is whole
