"""Fewer forms for the rules to know: identities go, means of losses become sums over counts.

Before:  cross_entropy(slice(x, 0, 0, max), t)             mean over the counted targets
After:   cross_entropy(x, t, reduction=sum) / (t != ignore_index).sum()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from whalepy.program.call import Call, operator_name, sizes_of
from whalepy.program.capture_sizes import fake_mode_of
from whalepy.program.rule_table import LOSSES_WITH_REDUCTION

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def canonicalise(module: fx.GraphModule) -> fx.GraphModule:
    """The same computation in fewer forms, changed in place."""
    graph = module.graph
    build = _Builder(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rewrite = _REWRITES.get(operator_name(node.target))
        new = rewrite(build.at(node), Call(node)) if rewrite is not None else None
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


class _Builder:
    """Adds operators before a node, with their fake values and the node's place and scope."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = fake_mode_of(graph)
        self.node: fx.Node | None = None

    def at(self, node: fx.Node) -> _Builder:
        self.node = node
        return self

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        assert self.node is not None
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        new.meta.update({k: v for k, v in self.node.meta.items() if k in ("where", "scope", "no_grad")})
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            new.meta["val"] = target(*values[0], **values[1])
        return new


def _slice(build: _Builder, call: Call) -> fx.Node | None:
    same = sizes_of(call.results[0]) == call.sizes(0)
    return call.operands[0] if same and call["step"] in (None, 1) else None


def _cat(build: _Builder, call: Call) -> fx.Node | None:
    """torch lets an empty tensor of one dim stand among the operands; it adds nothing."""
    rank = call.results[0].ndim
    kept = [o for o in call.operands if not (o.meta["val"].ndim == 1 and rank > 1)]
    if len(kept) == len(call.operands) or not kept:
        return None
    return kept[0] if len(kept) == 1 else build(aten.cat.default, kept, call["dim"])


def _loss(build: _Builder, call: Call) -> fx.Node | None:
    """Elementwise losses: the mean (or sum) taken apart from the loss."""
    reduction = call["reduction"]
    if reduction not in (MEAN, SUM):
        return None
    arguments = {**call.arguments, "reduction": NONE}
    target: Any = call.node.target
    positional = [arguments[a.name] for a in target._schema.arguments if not a.kwarg_only]
    keywords = {a.name: arguments[a.name] for a in target._schema.arguments if a.kwarg_only}
    each = build(target, *positional, **keywords)
    return build(aten.mean.default if reduction == MEAN else aten.sum.default, each)


def _cross_entropy(build: _Builder, call: Call) -> fx.Node | None:
    logits, target = call["self"], call["target"]
    wide = call.results[0].dtype in (torch.float32, torch.float64)
    by_class = not target.meta["val"].dtype.is_floating_point
    if call["reduction"] != MEAN or not by_class:
        return None
    source = logits if wide else build(aten.to.dtype, logits, torch.float32)
    weight = call["weight"]
    if weight is not None and not wide:
        weight = build(aten.to.dtype, weight, torch.float32)
    ignore = call["ignore_index"]
    rest = () if operator_name(call.node.target) != "aten.cross_entropy_loss" else (call["label_smoothing"],)
    total = build(call.node.target, source, target, weight, SUM, ignore, *rest)
    loss = build(aten.div.Tensor, total, _count(build, target, weight, ignore, total.meta["val"].dtype))
    return loss if wide else build(aten.to.dtype, loss, call.results[0].dtype)


def _count(build: _Builder, target: fx.Node, weight: fx.Node | None, ignore: int, dtype: torch.dtype) -> fx.Node:
    """The sum of the class weights of the targets that count, or their number."""
    counted = build(aten.ne.Scalar, target, ignore)
    if weight is None:
        return build(aten.to.dtype, build(aten.sum.default, counted), dtype)
    classes = build(aten.masked_fill.Scalar, target, build(aten.eq.Scalar, target, ignore), 0)
    weights = build(aten.index.Tensor, build(aten.detach.default, weight), [classes])
    return build(aten.sum.default, build(aten.mul.Tensor, weights, counted))


_REWRITES: dict[str, Callable[[_Builder, Call], fx.Node | None]] = {
    "aten.slice": _slice,
    "aten.cat": _cat,
    "aten.cross_entropy_loss": _cross_entropy,
    "aten.nll_loss": _cross_entropy,
    "aten.nll_loss_nd": _cross_entropy,
    **dict.fromkeys(LOSSES_WITH_REDUCTION, _loss),
}
