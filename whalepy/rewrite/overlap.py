"""Passes that let operators run while bridges are under way, forward and backward.

Before:  q = linear(x, wq); k = linear(x, wk); kr = bridge(k); qr = bridge(q); attention(qr, kr)
After:   q = linear(x, wq); qs = start(q); k = linear(x, wk); ks = start(k); kr = finish(ks); qr = finish(qs); ...

Before:  linear; ...; loss = cross_entropy(...); n = sum(targets != ignored); nr = bridge(n); return bridge(loss / nr)
After:   linear; n = sum(targets != ignored); ns = start(n); ...; nr = finish(ns); return start(loss / nr)

All ranks run the one graph, so that they start all bridges, and all of their gradients, in one order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from whalepy.program.analysis import Program
from whalepy.program.costs import PRODUCTS
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import MoveBinding
from whalepy.rewrite.deferred import deferred
from whalepy.rewrite.naming import MOVES, places_of
from whalepy.rewrite.rewrite import Rewritten


def asynchronous(rewritten: Rewritten, program: Program, mesh: Sequence[int], *, trains: bool = False) -> Rewritten:
    """The graph with each bridge started as soon as its value is there, and finished where the result is read first.

    Only where a product lies between both; itself where there is none. Bridges of parameters stay: started earlier, all
    of them would be in memory at once. Counts that no parameter stands behind, such as those of targets, come behind
    the first product: during that one ranks still agree on the step. Where it `trains`, the bridge of the loss may be
    left to whoever runs the graph: the backward pass does not need what comes over it.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(rewritten.graph.graph, copies))
    places = places_of(graph, program)
    kept = {name for name, place in places.items() if place.kind == "parameter"}
    values = {copies[node]: rewritten.values[node.name] for node in copies if node.name in rewritten.values}
    multiplies = {node for node, (i, _) in values.items() if program.operators[i].target in PRODUCTS}
    received = {name for name, place in places.items() if place.kind == "received"}
    _count_early(graph, kept | received, mesh, multiplies)
    changed = trains and rewritten.results > 0 and _left_to_finish(graph, mesh)
    order = {node: at for at, node in enumerate(graph.nodes)}
    products = sorted(order[node] for node in multiplies)
    for node in list(graph.nodes):
        binding = _binding(node, mesh)
        if binding is None or not (binding.communicates or binding.communicates_back):
            continue
        value = node.args[0]
        if value.name in kept:
            continue
        first = min(node.users, key=order.__getitem__)
        if bisect_right(products, order[value]) < bisect_left(products, order[first]):
            start, finish = _halves(graph, node, value, first)
            order[start], order[finish] = order[value], order[first]
            changed = True
    return replace(rewritten, graph=fx.GraphModule(rewritten.graph, graph)) if changed else rewritten


def _count_early(
    graph: fx.Graph, learning: Collection[str], mesh: Sequence[int], products: Collection[fx.Node]
) -> None:
    """Moves bridges of single numbers behind which nothing learns, with all that they need, to the first product."""
    learns: set[fx.Node] = set()
    needed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in learning or not learns.isdisjoint(node.all_input_nodes):
            learns.add(node)
            continue
        binding = _binding(node, mesh)
        if binding is not None and binding.communicates and node.meta["val"].ndim == 0:
            needed.add(node)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    calls = [node for node in graph.nodes if node.op != "placeholder"]
    first = next((k for k, node in enumerate(calls) if node in products), None)
    if first is None:
        return
    at = calls[first]
    for node in calls[first + 1 :]:
        if node in needed:
            at.append(node)
            at = node


def _left_to_finish(graph: fx.Graph, mesh: Sequence[int]) -> bool:
    """Whether the bridge of the loss could be started alone, so that the graph gives what is on its way."""
    (end,) = graph.find_nodes(op="output")
    first = next(iter(end.args[0]), None)
    binding = _binding(first, mesh) if isinstance(first, fx.Node) else None
    if first is None or binding is None or not binding.communicates or binding.communicates_back:
        return False
    if first.meta["val"].ndim > 0 or set(first.users) != {end} or end.args[0].count(first) > 1:
        return False
    with graph.inserting_before(first):
        start = graph.call_function(kernels.start_bridge, first.args)
    start.meta.update(first.meta)
    first.replace_all_uses_with(start)
    graph.erase_node(first)
    return True


def _halves(graph: fx.Graph, node: fx.Node, value: fx.Node, first: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What stands for a bridge: its start right behind the value, its finish right ahead of the first user."""
    move = node.args[1]
    calls = (one for one in graph.nodes if one.op != "placeholder")
    with graph.inserting_before(next(calls) if value.op == "placeholder" else value.next):
        start = graph.call_function(kernels.start_bridge, (value, move))
    with graph.inserting_before(first):
        finish = graph.call_function(kernels.finish_bridge, (start, move))
    start.meta.update(node.meta)
    finish.meta.update(node.meta)
    node.replace_all_uses_with(finish)
    graph.erase_node(node)
    return start, finish


def waits_used(rewritten: Rewritten, program: Program, mesh: Sequence[int]) -> Rewritten:
    """The graph in which the weight gradients of products may wait until the gradient of a bridge is under way.

    Those of products that read what comes over the bridge with no other product between, and so come last before it in
    the backward pass. As Megatron-LM overlaps the all-reduce of a column-parallel layer's input gradient with its
    weight gradient.
    """
    behind: set[str] = set()
    for node in rewritten.graph.graph.nodes:
        binding, value = _binding(node, mesh), rewritten.values.get(node.name)
        is_product = value is not None and program.operators[value[0]].target in PRODUCTS
        passes = not is_product and any(n.name in behind for n in node.all_input_nodes)
        if passes or (binding is not None and binding.communicates_back):
            behind.add(node.name)
    return deferred(rewritten, program, behind)[0] if behind else rewritten


def _binding(node: fx.Node, mesh: Sequence[int]) -> MoveBinding | None:
    """What a bridge between several devices moves; None for all else."""
    binding: MoveBinding | None = node.meta["move"] if node.target in MOVES else None
    return binding if binding is not None and mesh[binding.level] > 1 else None
