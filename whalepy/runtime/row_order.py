"""Whether a program needs the rows of the batch in their order: ranks that hold them by microbatches do not give it."""

from __future__ import annotations

from torch import fx

from whalepy.program.analysis import Program, Value
from whalepy.program.layout import Sharded, Type
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import MoveBinding
from whalepy.rewrite.rewrite import Rewritten

_EQUAL_ELEMENTS = {"aten.full", "aten.zeros", "aten.ones"}


def needs_row_order(program: Program, rewritten: Rewritten) -> bool:
    """Whether rows of several ranks are put together, or rows taken of a whole value whose rows differ."""
    return any(
        isinstance(move := node.meta.get("move"), MoveBinding) and _by_order(program, rewritten, node, move)
        for node in rewritten.graph.graph.nodes
    )


def _by_order(program: Program, rewritten: Rewritten, node: fx.Node, move: MoveBinding) -> bool:
    if move.source == move.target:
        return False
    if _by_rows(program, move.source):
        return True
    if not _by_rows(program, move.target) or _only_indexes(program, rewritten, node):
        return False
    return not _alike(program, _moved(rewritten, node))


def _by_rows(program: Program, kind: Type) -> bool:
    return isinstance(kind, Sharded) and kind.place.axis == program.batch


def _only_indexes(program: Program, rewritten: Rewritten, node: fx.Node) -> bool:
    """Whether a value counts rows for nothing but to index those that the same rank holds."""
    for user in node.users:
        if user.target is kernels.local_index and user.args[0] is not node:
            continue
        counts = user.name in rewritten.values and "iota" in program.nodes[rewritten.values[user.name][0]].meta
        if not counts or not _only_indexes(program, rewritten, user):
            return False
    return True


def _moved(rewritten: Rewritten, node: fx.Node) -> Value:
    """The value of the program that a bridge moves."""
    while node.name not in rewritten.values:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return rewritten.values[node.name]


def _alike(program: Program, key: Value) -> bool:
    """Whether all rows of a value are the same: it has none, or is made row by row of such values."""
    op = program.operators[key[0]]
    if all(program.batch not in program.axes.leaves(dim) for dim in program.dims[key[0]][key[1]]):
        return True
    if op.target in _EQUAL_ELEMENTS:
        return True
    by_row = any(way.axis == program.batch and way.kernel is None for way in op.options)
    return by_row and bool(op.operands) and all(_alike(program, operand) for operand in op.operands)
