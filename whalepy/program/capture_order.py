"""One order for one graph: a model that iterates over a set runs its operators in another order in each process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from whalepy.program.capture_placeholders import Placeholder


def settle_order(
    module: fx.GraphModule, placeholders: Sequence[Placeholder]
) -> tuple[fx.GraphModule, tuple[Placeholder, ...]]:
    """The same pure graph, every operator just before its first reader, numbered in that order; without dead ones.

    Two graphs that differ only in the order of independent operators become equal. Placeholders keep their order,
    except that literals of the model come last, by first use. meta["turn"] says when the model ran an operator.
    """
    for turn, node in enumerate(module.graph.nodes):
        node.meta["turn"] = turn
    calls = list(_by_first_reader(module.graph.output_node()))
    order = _settled_placeholders(module.graph, placeholders, calls)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in (*order, *calls):
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        literal = node in order and order[node].kind == "constant"
        name = node.name if node in order and not literal else _unnumbered(node.name)
        made[node] = copy = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copy.target = copy.name if node in order else node.target
        copy.meta = dict(node.meta)
    settled = fx.GraphModule(module, graph)
    settled.graph.lint()
    return settled, tuple(replace(place, node=made[node].name) for node, place in order.items())


def _settled_placeholders(
    graph: fx.Graph, placeholders: Sequence[Placeholder], calls: Sequence[fx.Node]
) -> dict[fx.Node, Placeholder]:
    """The placeholders in their new order; literals that nothing reads stay among the last."""
    by_name = {place.node: place for place in placeholders}
    found = {node: by_name[node.name] for node in graph.find_nodes(op="placeholder")}
    read = dict.fromkeys(operand for node in calls for operand in node.all_input_nodes if operand in found)
    by_use = {node: k for k, node in enumerate(read)}
    constants = [node for node, place in found.items() if place.kind == "constant"]
    constants.sort(key=lambda node: by_use.get(node, len(by_use)))
    others = [node for node in found if node not in constants]
    return {node: found[node] for node in (*others, *constants)}


def _by_first_reader(output: fx.Node) -> Iterator[fx.Node]:
    """What the output needs, operands before readers, in the order in which readers name them; the output last."""
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, Iterator[fx.Node]]] = [(output, iter(output.all_input_nodes))]
    while stack:
        node, operands = stack[-1]
        following = next((operand for operand in operands if operand not in seen), None)
        if following is not None:
            seen.add(following)
            if following.op != "placeholder":
                stack.append((following, iter(following.all_input_nodes)))
            continue
        stack.pop()
        yield node


def _unnumbered(name: str) -> str:
    return re.sub(r"(_\d+)+$", "", name)
