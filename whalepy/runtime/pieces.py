"""The pieces of a program between its bridges, compiled by a backend of torch.compile.

Before:  linear, relu, bridge, linear, add
After:   piece_0 = [linear, relu], bridge, piece_1 = [linear, add]
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from whalepy.errors import PlanError
from whalepy.hardware.near import did_you_mean
from whalepy.rewrite.bindings import MoveBinding, Reducer, Stream
from whalepy.rewrite.deferring import Deferred
from whalepy.rewrite.rewrite import Rewritten

EAGER = "eager"
_LEAST = 2
"""A piece of fewer operators stays as it is."""


def check_backend(backend: str) -> None:
    """Raises PlanError for a name that torch.compile does not know."""
    if backend == EAGER:
        return  # asking torch takes a second
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise PlanError(f"unknown backend {backend!r}", fix=did_you_mean(backend, sorted({EAGER, *known})))


def in_pieces(rewritten: Rewritten, backend: str) -> fx.GraphModule:
    """The same program; what lies between two bridges is one piece, compiled when it first runs.

    Sizes are fixed in what is compiled until they change, and free from then on, as torch.compile has it. All ranks
    communicate in the order of one graph, and draw random numbers as without a backend.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(rewritten.graph.graph, {}))
    alone = _alone(graph, rewritten)
    pieces: dict[int, dict[fx.Node, int | None]] = {}
    for node, depth in _depths(graph, alone).items():
        if node.op == "call_function" and node not in alone:
            pieces.setdefault(depth, {})[node] = None
    large = [piece for piece in pieces.values() if len(piece) >= _LEAST]
    cut = fuse_by_partitions(fx.GraphModule(rewritten.graph, graph), large, prefix="piece_")
    for name, piece in list(cut.named_children()):
        if name.startswith("piece_"):
            setattr(cut, name, torch.compile(piece, backend=backend))
    return cut


def _depths(graph: fx.Graph, alone: Collection[fx.Node]) -> dict[fx.Node, int]:
    """How many operators that stay alone lie on the longest way to each node."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        found[node] = max((found[n] + (n in alone) for n in node.all_input_nodes), default=0)
    return found


def _alone(graph: fx.Graph, rewritten: Rewritten) -> set[fx.Node]:
    """What is part of no piece: it communicates or draws, puts something on a queue, or holds graphs of its own."""
    places = list(graph.find_nodes(op="placeholder"))[-len(rewritten.bindings) :] if rewritten.bindings else []
    told = {
        place
        for place, binding in zip(places, rewritten.bindings, strict=True)
        if isinstance(binding, MoveBinding | Reducer | Stream)
    }
    found: set[fx.Node] = set()
    for node in graph.nodes:
        own = isinstance(node.target, Deferred | torch._ops.HigherOrderOperator)
        taken = node.target is operator.getitem and node.args[0] in found
        if node.op == "call_function" and (own or taken or not told.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found
