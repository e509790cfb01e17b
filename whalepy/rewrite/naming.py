"""Names of the values of a rewritten program as we print them; torch's names change between versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx

from whalepy.program.analysis import Program
from whalepy.program.call import operator_name
from whalepy.program.capture import Placeholder
from whalepy.rewrite import kernels

MOVES = (kernels.bridge, kernels.retype)
HALVES = (kernels.start_bridge, kernels.finish_bridge)
"""What asynchronous bridges are made of."""


def operator_text(target: object) -> str:
    """`aten.linear`, or `whalepy.bridge` for what is ours."""
    name = operator_name(target)
    return f"whalepy.{name.rpartition('.')[2]}" if name.startswith("whalepy.") else name


def is_item(node: fx.Node) -> bool:
    """Whether the node picks one result of an operator that has several."""
    return operator_name(node.target).endswith("getitem")


def places_of(graph: fx.Graph, program: Program) -> dict[str, Placeholder]:
    """What each leading placeholder of a rewritten graph stands for, by its name there (fx spells names anew)."""
    nodes = graph.find_nodes(op="placeholder")
    return {node.name: place for node, place in zip(nodes, program.captured.placeholders, strict=False)}


def value_names(graph: fx.Graph, program: Program) -> dict[str, str]:
    """A printed name per node name, none twice.

    Parameters have their own names, inputs and constants those of their placeholders, operators a number
    (`linear2`), results of one operator an index (`split1.0`); a value in another layout gets a suffix (`linear2_1`).
    """
    places = places_of(graph, program)
    own = {node: p.name if p.kind in ("parameter", "buffer") else p.node for node, p in places.items()}
    numbers: Counter[str] = Counter()
    names: dict[str, str] = {}
    roots: dict[str, str] = {}
    for node in graph.nodes:
        moved = node.op == "call_function" and node.target in (*MOVES, *HALVES)
        root = roots[node.args[0].name] if moved else ""
        if node.target is kernels.finish_bridge:
            name = names[node.args[0].name]
        else:
            name = _numbered(f"{root}_", numbers) if moved else _name(node, own, names, numbers)
        names[node.name], roots[node.name] = name, root or name
    return names


def _name(node: fx.Node, own: Mapping[str, str], names: Mapping[str, str], numbers: Counter[str]) -> str:
    if node.op != "call_function":
        return own.get(node.name, node.name)
    source = node.args[0] if node.args else None
    if is_item(node) and isinstance(source, fx.Node):
        return f"{names[source.name]}.{node.args[1]}"
    return _numbered(_base(node), numbers)


def _numbered(base: str, numbers: Counter[str]) -> str:
    numbers[base] += 1
    return f"{base}{numbers[base]}"


def _base(node: fx.Node) -> str:
    """The short name of the operator that a node runs, in whatever it is wrapped."""
    target = node.target.op if isinstance(node.target, kernels.Seeded) else node.target
    inside = next((argument for argument in node.args if callable(argument)), target)
    return operator_text(inside).rpartition(".")[2].strip("_")
