"""Which values of a captured program may lie in memory that it writes to: the others need no replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.program.capture_schema import Op, by_name, writes, writes_silently, written_names

aten = torch.ops.aten

DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)

# Composite operators may hand back an argument without saying so in their schema; these, the usual ones, never do.
_FRESH = frozenset(
    {
        *(
            "linear",
            "matmul",
            "where",
            "layer_norm",
            "rms_norm",
            "group_norm",
            "batch_norm",
            "instance_norm",
            "embedding",
        ),
        *("conv1d", "conv2d", "conv3d", "softmax", "log_softmax", "scaled_dot_product_attention"),
        *("cross_entropy_loss", "nll_loss_nd", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
    }
)


def does_nothing(node: fx.Node) -> bool:
    """Whether the call returns its first argument itself: dropout out of use, `detach_` of what has no gradient."""
    arguments: Any = node.args
    if node.target is aten.detach_.default:
        return not _reads_floats(node)
    return node.target in DROPOUTS and bool(arguments[1] == 0 or not arguments[2])


def _reads_floats(node: fx.Node) -> bool:
    """Whether a gradient could reach the call: it is computed from floating values, not only from their sizes."""
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        value = at.meta.get("val")
        floats = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        if at.op == "placeholder" and floats:
            return True
        operands = [operand for operand in at.all_input_nodes if _holds_tensors(operand) and operand not in seen]
        seen.update(operands)
        stack.extend(operands)
    return False


def _holds_tensors(node: fx.Node) -> bool:
    return any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def near_writes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose values may lie in memory that some node writes to; never too few."""
    memory: Any = UnionFind(graph.nodes)
    written: set[fx.Node] = set()
    for node in graph.nodes:
        targets = list(_written_by(node)) if writes(node) and not does_nothing(node) else []
        written.update(targets)
        for other in (*targets, *(node.all_input_nodes if _may_share(node) else ())):
            memory.union(node, other)
    roots = {memory[node] for node in written}
    return frozenset(node for node in graph.nodes if memory[node] in roots)


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    if writes_silently(node):
        yield from _nodes(node.args[3:5])
    else:
        arguments = by_name(node)
        assert isinstance(node.target, Op)
        for name in written_names(node.target):
            yield from _nodes([arguments[name]])


def _nodes(values: Iterable[Any]) -> Iterator[fx.Node]:
    for value in values:
        if isinstance(value, fx.Node):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _nodes(value)


def _may_share(node: fx.Node) -> bool:
    """Whether a result may lie in the memory of an argument."""
    if node.op != "call_function" or not _holds_tensors(node):
        return False
    return not isinstance(node.target, Op) or does_nothing(node) or may_view(node.target)


@cache
def may_view(op: Op) -> bool:
    """Whether a result of the operator may lie in the memory of an argument."""
    if any(result.alias_info is not None for result in op._schema.returns):
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return composite and op._schema.name.removeprefix("aten::") not in _FRESH
