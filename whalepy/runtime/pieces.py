"""The pieces of a program between its bridges, compiled by a backend of torch.compile.

Before:  linear, relu, bridge, linear, add
After:   piece_0 = [linear, relu], bridge, piece_1 = [linear, add]
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from whalepy.errors import PlanError
from whalepy.hardware.near import did_you_mean
from whalepy.rewrite import kernels
from whalepy.rewrite.deferring import Deferred

EAGER = "eager"
_LEAST = 2
"""A piece of fewer operators stays as it is."""
_MEETING = (kernels.bridge, kernels.retype, kernels.class_parallel)
"""What communicates, forward or backward."""


def check_backend(backend: str) -> None:
    """Raises PlanError for a name that torch.compile does not know."""
    if backend == EAGER:
        return  # asking torch takes a second
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise PlanError(f"unknown backend {backend!r}", fix=did_you_mean(backend, sorted({EAGER, *known})))


def in_pieces(module: fx.GraphModule, backend: str) -> fx.GraphModule:
    """The same program; what lies between two bridges is one piece, compiled when it first runs.

    Sizes are fixed in what is compiled until they change, and free from then on, as torch.compile has it. All ranks
    communicate in the order of one graph, and draw random numbers as without a backend.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    pieces: dict[int, dict[fx.Node, int | None]] = {}
    for node, depth in _depths(graph).items():
        if _belongs(node):
            pieces.setdefault(depth, {})[node] = None
    large = [piece for piece in pieces.values() if len(piece) >= _LEAST]
    cut = fuse_by_partitions(fx.GraphModule(module, graph), large, prefix="piece_")
    for name, piece in list(cut.named_children()):
        if name.startswith("piece_"):
            setattr(cut, name, torch.compile(piece, backend=backend))
    return cut


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many operators that stay alone lie on the longest way to each node."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = (found[n] + (not _belongs(n) and n.op == "call_function") for n in node.all_input_nodes)
        found[node] = max(before, default=0)
    return found


def _belongs(node: fx.Node) -> bool:
    """Whether a node may be part of a piece: it neither communicates nor draws, nor puts anything on a queue."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _belongs(node.all_input_nodes[0])
    target = node.target
    alone = target in _MEETING or isinstance(target, kernels.Seeded | Deferred)
    return not alone and not isinstance(target, torch._ops.HigherOrderOperator)
