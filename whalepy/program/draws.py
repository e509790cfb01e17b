"""Which calls draw random numbers: each gets a stream of its own, so that ranks that compute alike draw alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from whalepy.program.call import Call
from whalepy.program.functional_ops import WritesReturned

Op = torch._ops.OpOverload

_FLAGS = ("train", "training", "dropout", "dropout_p")  # where one of these is False or 0, nothing is drawn
_KNOWN = ("aten", "prims")  # namespaces of torch, which says of its operators what they draw


def draws(call: Call) -> bool:
    """Whether a call may draw random numbers. Of operators that are not torch's nobody knows: they may."""
    target = call.node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return any(_graph_draws(graph) for graph in _graphs(call.node))
    quiet = any(flag in call.arguments and call[flag] in (False, 0) for flag in _FLAGS)
    return _may_draw(target) and not quiet


def _may_draw(target: Any) -> bool:
    inner = target.op if isinstance(target, WritesReturned) else target
    if not isinstance(inner, Op):
        return False
    return inner.namespace not in _KNOWN or torch.Tag.nondeterministic_seeded in inner.tags


def _graphs(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that an operator such as torch.cond is given."""
    owner = node.graph.owning_module
    given = [arg for arg in node.all_input_nodes if arg.op == "get_attr"]
    found = [getattr(owner, str(arg.target), None) for arg in given]
    return [graph for graph in found if isinstance(graph, fx.GraphModule)]


def _graph_draws(graph: fx.GraphModule) -> bool:
    return any(node.op == "call_function" and draws(Call(node)) for node in graph.graph.nodes)
