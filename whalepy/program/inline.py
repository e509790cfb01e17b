"""One flat graph out of an exported one: regions of no_grad and autocast are inlined, assertions erased."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from whalepy.errors import CaptureError
from whalepy.primitives.recording import KEY as SCOPE_KEY
from whalepy.program.capture_places import PLACE_KEY, place_of_stack
from whalepy.program.capture_schema import returned_argument, writes

_DETACH = torch.ops.aten.detach.default
_ASSERTION_PREFIXES = ("_assert_", "_functional_assert", "sym_constrain_range", "_check_", "_guards_fn")

Value = Any  # a node of the new graph, or a tuple of them for the outputs of a region


def inline(module: fx.GraphModule) -> fx.GraphModule:
    """The same computation in one graph.

    Before: `r = wrap_with_set_grad_enabled(False, submod, a, w); y = r[0]`
    After:  `a_ = detach(a); w_ = detach(w); y = mul(a_, w_)` with meta["no_grad"] on the nodes of the region

    Every node gets meta["where"] (file:line in the user's code, or None), meta["scope"] and meta["no_grad"].
    CaptureError: a region of autocast.
    """
    graph = fx.Graph()
    placeholders = [_copy_placeholder(graph, node) for node in module.graph.find_nodes(op="placeholder")]
    results = _copy_region(module, graph, placeholders, no_grad=False)
    graph.output(tuple(results))
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    inlined = fx.GraphModule(module, graph)
    inlined.graph.lint()
    return inlined


def _is_impure(node: fx.Node) -> bool:
    """Whether dead code elimination must keep `node`: writes to aliases are pure only after functionalise."""
    return node.op in ("placeholder", "output") or writes(node)


def _copy_placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.node_copy(node)
    _mark(copy, node, no_grad=False)
    return copy


def _copy_region(
    module: fx.GraphModule, graph: fx.Graph, operands: Sequence[Value], *, no_grad: bool
) -> Sequence[Value]:
    """Copies the nodes of `module` to `graph`, its placeholders being `operands`; returns its results."""
    values: dict[fx.Node, Value] = {}
    remaining = iter(operands)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            results = fx.map_arg(node.args[0], values.__getitem__)
            return results if isinstance(results, (tuple, list)) else (results,)
        elif not _is_assertion(node):
            values[node] = _copy_node(module, graph, node, values, no_grad)
    return ()


def _is_assertion(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return node.op in ("call_function", "call_module") and name.startswith(_ASSERTION_PREFIXES)


def _copy_node(
    module: fx.GraphModule, graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Value], no_grad: bool
) -> Value:
    region = _REGIONS.get(_name_of_region(node))
    if region is not None:
        return region(module, graph, node, values, no_grad)
    picked = _pick(node, values)
    if picked is not None:
        return picked
    copy = graph.node_copy(node, values.__getitem__)
    _mark(copy, node, no_grad=no_grad)
    return copy


def _name_of_region(node: fx.Node) -> str | None:
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else None


def _pick(node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    """The result which `getitem(region, i)` names, if `node` is one."""
    arguments: Any = node.args
    results = values.get(arguments[0]) if node.target is operator.getitem else None
    return results[arguments[1]] if isinstance(results, (tuple, list)) else None


def _mark(copy: fx.Node, node: fx.Node, *, no_grad: bool) -> None:
    copy.meta["where"] = _place_of(node)
    copy.meta["scope"] = tuple((node.meta.get("custom") or {}).get(SCOPE_KEY, ()))
    copy.meta["no_grad"] = no_grad


def _place_of(node: fx.Node) -> str | None:
    custom = node.meta.get("custom") or {}
    return custom.get(PLACE_KEY) or place_of_stack(node.meta.get("stack_trace"))


def _grad_region(
    module: fx.GraphModule, graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Value], no_grad: bool
) -> Sequence[Value]:
    enabled, region, *operands = node.args
    inner = _submodule(module, region)
    entering = [values[operand] if isinstance(operand, fx.Node) else operand for operand in operands]
    if enabled or no_grad:
        return _copy_region(inner, graph, entering, no_grad=not enabled)
    first = next((n for n in inner.graph.nodes if n.op == "call_function"), node)
    detached = [_detached(graph, value, first) for value in entering]
    outside = dict(zip(detached, entering, strict=True))
    before = len(graph.nodes)
    results = _copy_region(inner, graph, detached, no_grad=True)
    for copy in list(graph.nodes)[before:]:
        _turn_outside(graph, copy, outside)
    return [_same_tensor(result, outside) for result in results]


def _same_tensor(result: Value, outside: dict[Value, Value]) -> Value:
    """`result`, or the tensor outside the region which it is: a write returns the tensor written to, gradient and all.

    Before: `a_ = detach(a); r = add_(a_, 1)`, r used outside the region   After: a in place of r
    """
    root = _root(result, outside)
    return result if root is None else outside[root]


def _root(value: Value, outside: dict[Value, Value]) -> fx.Node | None:
    """The operand of the region that `value` is after writes; None if it is none."""
    while isinstance(value, fx.Node) and value not in outside:
        value = returned_argument(value)
    return value if isinstance(value, fx.Node) else None


def _turn_outside(graph: fx.Graph, node: fx.Node, outside: dict[Value, Value]) -> None:
    """`transpose_` and its like on an operand of a region turn the tensor outside too, which detach would hide."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.inplace_view not in node.target.tags:
        return
    root = _root(node, outside)
    if root is not None:
        with graph.inserting_after(node):
            turned = graph.call_function(node.target, (outside[root], *node.args[1:]), dict(node.kwargs))
        turned.meta = dict(node.meta)


def _detached(graph: fx.Graph, value: Value, like: fx.Node) -> Value:
    """`value` cut off from gradients, where it can carry one."""
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(fake, torch.Tensor) or not (fake.is_floating_point() or fake.is_complex()):
        return value
    copy = graph.call_function(_DETACH, (value,))
    copy.meta["val"] = fake.detach()
    _mark(copy, like, no_grad=True)
    return copy


def _autocast_region(
    module: fx.GraphModule, graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Value], no_grad: bool
) -> Sequence[Value]:
    _, _, enabled, _, region, *operands = node.args
    inner = _submodule(module, region)
    if enabled:
        raise CaptureError(
            "autocast inside the model is not supported",
            at=next(filter(None, map(_place_of, inner.graph.nodes)), None),
            fix="remove it, or cast there by hand: x.to(torch.bfloat16)",
        )
    entering = [values[operand] if isinstance(operand, fx.Node) else operand for operand in operands]
    return _copy_region(inner, graph, entering, no_grad=no_grad)


def _submodule(module: fx.GraphModule, region: Any) -> fx.GraphModule:
    inner = module.get_submodule(region.target)
    if not isinstance(inner, fx.GraphModule):
        raise CaptureError(f"the region {region.target} is not a graph")
    return inner


_Region = Callable[[fx.GraphModule, fx.Graph, fx.Node, dict[fx.Node, Value], bool], Sequence[Value]]
_REGIONS: dict[str | None, _Region] = {
    "wrap_with_set_grad_enabled": _grad_region,
    "wrap_with_autocast": _autocast_region,
}
