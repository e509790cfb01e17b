"""Rules of products: matrices, contractions, convolutions, and the algebra of matrices in a batch."""

from __future__ import annotations

import re

from whalepy.program.call import Call
from whalepy.program.rules import Rule, parse_rule
from whalepy.program.rules_write import Maker, write

EACH = ((0,), (1,))

LINES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    # operator: (rule, groups of operands in which it is jointly linear)
    "aten.linear": ("...k, nk, +n -> ...n", EACH),
    "aten.mm": ("mk, kn -> mn", EACH),
    "aten.bmm": ("bmk, bkn -> bmn", EACH),
    "aten.baddbmm": ("+bmn, bmk, bkn -> bmn", ((1,), (2,))),
    "aten.addbmm": ("+mn, bmk, bkn -> mn", ((1,), (2,))),
    "aten.mv": ("mk, k -> m", EACH),
    "aten.dot": ("k, k -> ", EACH),
    "aten.vdot": ("k, k -> ", EACH),
    "aten.outer": ("m, n -> mn", EACH),
    "aten.ger": ("m, n -> mn", EACH),
    "aten.addmv": ("+m, mk, k -> m", ((1,), (2,))),
    "aten.addr": ("+mn, m, n -> mn", ((1,), (2,))),
    "aten.bilinear": ("...I, ...J, oIJ, +o -> ...o", ((0,), (1,), (2,))),
    "aten.cdist": ("...pM, ...rM -> ...pr", ()),
    # Matrices in a batch: the matrix itself is whole.
    "aten.linalg_inv": ("...MN -> ...MN", ()),
    "aten.inverse": ("...MN -> ...MN", ()),
    "aten.linalg_cholesky": ("...MN -> ...MN", ()),
    "aten.linalg_matrix_exp": ("...MN -> ...MN", ()),
    "aten.matrix_exp": ("...MN -> ...MN", ()),
    "aten.linalg_matrix_power": ("...MN -> ...MN", ()),
    "aten.linalg_det": ("...MN -> ...", ()),
    "aten.det": ("...MN -> ...", ()),
    "aten.logdet": ("...MN -> ...", ()),
    "aten.linalg_slogdet": ("...MN -> ..., ...", ()),
    "aten.linalg_solve_triangular": ("...MN, ...NK -> ...NK", ()),
}


def _matmul(call: Call) -> Rule | None:
    a, b = call.ranks
    if a == 1 and b > 2:
        return None
    left, right = "...mk" if a > 1 else "k", "...kn" if b > 1 else "k"
    out = "..." * (max(a, b) > 1) + "m" * (a > 1) + "n" * (b > 1)
    return parse_rule(f"{left}, {right} -> {out}", linear=EACH)


def _inner(call: Call) -> Rule | None:
    rows = [letter if rank == 2 else "" for letter, rank in zip("mn", call.ranks, strict=True)]
    if any(rank not in (1, 2) for rank in call.ranks):
        return None
    return parse_rule(f"{rows[0]}k, {rows[1]}k -> {''.join(rows)}", linear=EACH)


def _grouped_linear(call: Call) -> Rule | None:
    """Every row by the matrix of its group: which group, each row says."""
    return parse_rule("mk, Gkn, m -> mn", linear=EACH)


def _addmm(call: Call) -> Rule:
    bias = ["", "+n", "+mn"][call.ranks[0]] or "+"
    return parse_rule(f"{bias}, mk, kn -> mn", linear=((1,), (2,)))


def _einsum(call: Call) -> Rule | None:
    """Every index a factor; traces, implied results, and leading dims that are summed, have no rule."""
    equation = str(call["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    sides = [*left.split(","), right]
    entries: list[list[str]] = [re.findall(r"\.\.\.|[a-zA-Z]", side) for side in sides]
    plain = all("".join(entry) == side for entry, side in zip(entries, sides, strict=True))
    if not arrow or not plain or len(sides) != len(call.operands) + 1:
        return None
    if any(len(set(entry)) != len(entry) for entry in entries) or ("..." in left and "..." not in right):
        return None
    # Upper-case indices are ordinary ones: in a rule they would be whole.
    names = [[f"{name.lower()}1x" if name.isupper() else name for name in entry] for entry in entries]
    linear = tuple(frozenset({i}) for i in range(len(call.operands)))
    return write(names[:-1], names[-1:], linear=linear)


def _convolution(call: Call) -> Rule | None:
    """Rows and channels free, space whole; with groups the groups are free, outermost of the channels."""
    space = call.ranks[1] - 2
    if call.ranks[0] not in (space + 1, space + 2):
        return None
    rows = ["n"] * (call.ranks[0] - space - 1)
    spatial = ["_"] * space
    transposed = "transpose" in call.name or bool(call["transposed"])
    if call["groups"] not in (None, 1):
        return None if transposed else _grouped(call, rows, spatial)
    weight = ["c", "o"] if transposed else ["o", "c"]
    bias = [["o"]] if len(call.operands) > 2 else []
    additive = frozenset({2}) if bias else frozenset[int]()
    operands = [[*rows, "c", *spatial], [*weight, *spatial], *bias]
    return write(operands, [[*rows, "o", *spatial]], additive=additive, linear=(frozenset({0}), frozenset({1})))


def _grouped(call: Call, rows: list[str], spatial: list[str]) -> Rule | None:
    groups = call["groups"]
    out = call.sizes(1)[0]
    if not isinstance(out, int):
        return None
    depthwise = out == groups
    channels: object = ("g", "O") if not depthwise else "g"
    source: object = ("g", "C") if call.sizes(1)[1] != 1 else "g"
    bias = [[channels]] if len(call.operands) > 2 else []
    sizes = {"g": groups, "O": out // groups, "C": call.sizes(1)[1]}
    operands = [[*rows, source, *spatial], [channels, "C", *spatial], *bias]
    return write(operands, [[*rows, channels, *spatial]], sizes=sizes)


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("aten.matmul", "aten.linalg_matmul"), _matmul),
    "aten.inner": _inner,
    "whalepy.program.functional_ops.grouped_linear": _grouped_linear,
    "aten.addmm": _addmm,
    "aten.einsum": _einsum,
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"), _convolution),
    **dict.fromkeys(("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"), _convolution),
}
