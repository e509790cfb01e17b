"""The devices a graph names: where it creates tensors, and where it moves them."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree


def with_device(module: fx.GraphModule, was: torch.device, now: torch.device) -> fx.GraphModule:
    """The same graph, naming `now` wherever it named `was`.

    Before: `arange(8, device=cpu)`   After: `arange(8, device=cuda:1)`
    """

    def placed(value: object) -> object:
        same = isinstance(value, torch.device) and value.type == was.type and value.index in (None, was.index)
        return now if same else value

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        copy.args, copy.kwargs = pytree.tree_map(placed, (copy.args, dict(copy.kwargs)))
    return fx.GraphModule(module, graph)
