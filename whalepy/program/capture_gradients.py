"""Which values of a pure graph can carry a gradient, and what is dropped because they cannot."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from whalepy.program.call import operator_name
from whalepy.program.dead_code import drop_unused
from whalepy.program.functional_ops import carry_gradient

aten = torch.ops.aten

OVERWRITES = "overwrites"
"""In the meta of `where(always, value, old)`: all it does is to give `old` a gradient of zeros."""
SHAPED_ALIKE = frozenset(
    f"aten.{name}"
    for name in (
        *(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")),
        *(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "empty_strided")),
    )
)
"""Operators that take the shape and the type of another tensor, and no gradient."""


def settle_gradients(module: fx.GraphModule, parameters: Collection[str]) -> None:
    """Drops `detach` of values without a gradient, and the like, in place; `parameters` are placeholder names.

    Afterwards meta["no_grad"] is set exactly on nodes of no_grad regions which carry no gradient.
    """
    graph = module.graph
    carrying = {node for node in graph.find_nodes(op="placeholder") if node.name in parameters}
    for node in graph.nodes:
        kept = _idle(node, carrying)
        if kept is not None:
            node.replace_all_uses_with(kept)
        elif _carries(node, carrying):
            carrying.add(node)
            node.meta["no_grad"] = False
    drop_unused(graph)
    module.recompile()


def make_dense(module: fx.GraphModule) -> tuple[str, ...]:
    """Embeddings give their gradients dense, in place: ranks add them. The user's lines that ask for sparse ones."""
    lines: dict[str, None] = {}
    for node in module.graph.nodes:
        place = _place_of_sparse(node.target)
        if place is not None and len(node.args) > place and node.args[place] is True:
            node.update_arg(place, False)
            lines[str(node.meta.get("where") or "the model")] = None
    module.recompile()
    return tuple(lines)


def _place_of_sparse(target: Any) -> int | None:
    """Where among its arguments an operator is told to give sparse gradients."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    return names.index("sparse") if "sparse" in names else None


def _idle(node: fx.Node, carrying: set[fx.Node]) -> Any:
    """What `node` equals, if all it does is to cut or carry a gradient that is not there; None otherwise."""
    if node.target is aten.lift_fresh_copy.default:  # a copy of a literal, which nobody writes to any more
        return node.args[0]
    if node.target is aten.alias.default:
        return node.args[0]
    if node.target is aten.detach.default and node.args[0] not in carrying:
        return node.args[0]
    if node.target is carry_gradient and node.args[0] not in carrying:
        return _without_gradient(node, carrying)
    if OVERWRITES in node.meta and node.args[2] not in carrying:
        return node.args[1]
    return None


def _without_gradient(node: fx.Node, carrying: set[fx.Node]) -> Any:
    """The value of a carry_gradient whose history has none: cut off from a gradient of its own, which eager drops."""
    value: Any = node.args[1]
    if value not in carrying:
        return value
    node.target, node.args = aten.detach.default, (value,)
    return None


def _carries(node: fx.Node, carrying: set[fx.Node]) -> bool:
    """Whether a gradient can flow from `node` to a parameter."""
    if node.op != "call_function" or node.target is aten.detach.default or operator_name(node.target) in SHAPED_ALIKE:
        return False
    if node.target is carry_gradient:
        return True  # its history carries one, otherwise it is idle
    reads = any(argument in carrying for argument in node.all_input_nodes)
    return reads and is_differentiable(node.meta.get("val"))


def is_differentiable(value: Any) -> bool:
    """Whether a value, or one of several, is of a type that can have a gradient."""
    if isinstance(value, (list, tuple)):
        return any(map(is_differentiable, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
