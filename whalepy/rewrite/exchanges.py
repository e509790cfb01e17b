"""Every communication of a program, rank by rank, in the order in which ranks issue them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.errors import VerificationError
from whalepy.program.analysis import Program, Value
from whalepy.program.call import operator_name, results
from whalepy.program.layout import Layout, Sharded, Type, gradient_kind, value_kind
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import MoveBinding, Reducer, Term
from whalepy.rewrite.naming import HALVES, MOVES, is_item, places_of, value_names
from whalepy.rewrite.rewrite import Rewritten
from whalepy.rewrite.sizes import Coordinates, LocalSizes, SizesAt, held, local_shape, symbols_in
from whalepy.rewrite.terms import terms_of

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]

_COLLECTIVES: dict[tuple[str, str], Collective] = {
    ("P", "R"): "all-reduce",
    ("S", "R"): "all-gather",
    ("P", "S"): "reduce-scatter",
    ("S", "S"): "all-to-all",
}
"""The conversions of a value that move elements between ranks, by source and target."""

_INSIDE: dict[object, tuple[int, ...]] = {kernels.class_parallel: (1, 2)}
"""Kernels that communicate inside: how many numbers per row of their first operand each all-reduce is of, forward."""


SUMMED_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
}
"""Where an all-reduce sums in another dtype than that of the value: for exactness, or as backends lack it."""


@dataclass(frozen=True)
class Exchange:
    """One collective as one rank issues it."""

    bridge: str
    """Name of the value it makes, as programs print it."""
    position: int
    """Place of the bridge in the forward program of this rank."""
    level: int
    group: tuple[int, ...]
    """Ranks by position on the level."""
    kind: Collective
    dtype: str
    sends: tuple[int, ...]
    """Elements for each position of the group; empty where only the data of a step tell."""
    receives: tuple[int, ...]
    """Elements from each position of the group."""
    backward: bool = False
    at: str = ""
    """The user's line of the operator that makes the value."""

    @property
    def direction(self) -> str:
        """The pass in which it is issued."""
        return "backward" if self.backward else "forward"

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank sends, as ring and direct algorithms would send them."""
        itemsize = getattr(torch, self.dtype).itemsize
        if not self.sends:
            return 0
        if self.kind == "all-reduce":
            return 2 * (len(self.group) - 1) * self.sends[0] * itemsize // len(self.group)
        return (sum(self.sends) - self.sends[self.group.index(rank)]) * itemsize


@dataclass(frozen=True)
class Crossing:
    """One communication of a program that all ranks share, before sizes and ranks are known."""

    bridge: str
    position: int
    binding: MoveBinding
    dtype: torch.dtype
    backward: bool
    at: str = ""

    @property
    def ends(self) -> tuple[Type, Type]:
        """The kind of what is converted, and what it becomes: the value, or backward its gradient."""
        source, target = self.binding.source, self.binding.target
        if self.backward:
            return gradient_kind(target), gradient_kind(source)
        return value_kind(source), value_kind(target)

    @property
    def collective(self) -> Collective | None:
        """What it takes; None where no rank needs another's elements."""
        source, target = self.ends
        return None if source == target else _COLLECTIVES.get((_letter(source), _letter(target)))


def collect(
    rewritten: Rewritten,
    program: Program,
    mesh: Sequence[int],
    rank_of: Sequence[int],
    sizes_at: SizesAt,
    *,
    backward: bool = True,
) -> dict[int, tuple[Exchange, ...]]:
    """Per rank, what it issues in one step: the forward in program order, then the backward in exactly the reverse.

    `rank_of` lists the ranks of the mesh, last level fastest. Parameters' gradients, reduced after the backward in
    planned order, are not among them. Raises VerificationError for a kernel whose communication is not known.
    """
    found = [c for c in crossings(rewritten, program, backward=backward) if mesh[c.binding.level] > 1]
    ordered = [c for c in found if not c.backward] + [c for c in reversed(found) if c.backward]
    counted: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...]] | None] = {}
    programs: dict[int, tuple[Exchange, ...]] = {}
    for coordinates, rank in zip(product(*map(range, mesh)), rank_of, strict=True):
        sizes = sizes_at(coordinates)
        issued: list[Exchange] = []
        for crossing in ordered:
            key = (crossing.binding, crossing.backward, coordinates)
            if key not in counted:
                counted[key] = counts(crossing, sizes, coordinates, mesh, known=set(program.hints))
            if (numbers := counted[key]) is not None:
                issued.append(exchange(crossing, numbers, group_of(crossing.binding.level, coordinates, mesh, rank_of)))
        programs[rank] = tuple(issued)
    return programs


def crossings(rewritten: Rewritten, program: Program, *, backward: bool = True) -> list[Crossing]:
    """Every communication of the shared program in forward order, that of a backward next to that of its forward."""
    graph = rewritten.graph.graph
    names = value_names(graph, program)
    placed = placements(rewritten)
    learning = differentiated(rewritten, program) if backward else set[str]()
    reducers = _reducers(rewritten)
    found: list[Crossing] = []
    for position, node in enumerate(graph.nodes):
        name, at = names[node.name], str(node.meta.get("where") or "")
        if node.op == "call_function" and node.target in (*MOVES, *HALVES):
            binding, dtype = node.meta["move"], node.meta["val"].dtype
            ways = [way for way in _ways(node) if not way or node.name in learning]
            found.extend(Crossing(name, position, binding, dtype, way, at or _origin(node)) for way in ways)
        for level in (reducers[n.name] for n in node.all_input_nodes if n.name in reducers):
            found.extend(_inside(node, name, position, level, program, placed, at))
    return [c for c in found if c.collective is not None]


def _ways(node: fx.Node) -> tuple[bool, ...]:
    """What a node of a bridge issues: the communication of the forward (False), of the backward (True)."""
    if node.target is kernels.start_bridge:
        return (False,)
    return (True,) if node.target is kernels.finish_bridge else (False, True)


def _origin(node: fx.Node) -> str:
    """The line of the operator whose value is moved."""
    source = node
    while source.op == "call_function" and (source.target in (*MOVES, *HALVES) or is_item(source)):
        source = source.args[0]  # type: ignore[assignment]
        assert isinstance(source, fx.Node)
    return str(source.meta.get("where") or "")


def _reducers(rewritten: Rewritten) -> dict[str, int]:
    """Placeholders that give kernels access to a level's group."""
    placeholders = list(rewritten.graph.graph.find_nodes(op="placeholder"))
    pairs = zip(placeholders[len(placeholders) - len(rewritten.bindings) :], rewritten.bindings, strict=True)
    return {node.name: binding.level for node, binding in pairs if isinstance(binding, Reducer)}


def _inside(
    node: fx.Node,
    name: str,
    position: int,
    level: int,
    program: Program,
    placed: Mapping[str, tuple[Value, Layout]],
    at: str,
) -> Iterator[Crossing]:
    if node.target not in _INSIDE:
        raise VerificationError(
            f"{operator_name(node.target)} communicates in a way that verification does not know", at=at
        )
    first = node.args[0]
    assert isinstance(first, fx.Node)
    key, layout = placed[first.name]
    dtype = torch.float64 if first.meta["val"].dtype == torch.float64 else torch.float32
    rows = terms_of(program, key, layout)[:1]
    for turn, numbers in enumerate(_INSIDE[node.target], 1):
        binding = MoveBinding(level, "P", "R", ((Term(numbers),), *rows))
        yield Crossing(f"{name} (reduction {turn})", position, binding, dtype, False, at)


def placements(rewritten: Rewritten) -> dict[str, tuple[Value, Layout]]:
    """Per tensor node: which (operator, result) of the program it is, and in which layout."""
    found: dict[str, tuple[Value, Layout]] = {}
    for node in rewritten.graph.graph.nodes:
        if node.name in rewritten.values:
            found[node.name] = rewritten.values[node.name], rewritten.layouts[node.name][0]
        elif node.target is kernels.start_bridge:
            found[node.name] = found[node.args[0].name]
        elif node.op == "call_function" and node.target in (*MOVES, kernels.finish_bridge):
            key, layout = found[node.args[0].name]
            binding: MoveBinding = node.meta["move"]
            found[node.name] = key, (*layout[: binding.level], binding.target, *layout[binding.level + 1 :])
    return found


_CUTS_GRADIENT = {"aten.detach", "aten.argmax"}


def differentiated(rewritten: Rewritten, program: Program) -> set[str]:
    """Nodes on a differentiable way from a trainable parameter, or from what another stage gives, to a result or to
    what other stages read: the backward runs through them."""
    places = places_of(rewritten.graph.graph, program)
    trained = {node for node, p in places.items() if p.value is not None and p.value.requires_grad}
    learning = {op.name for op in program.operators if op.kind == "received" and any(op.result_grad)}
    trained |= {node for node, p in places.items() if p.kind == "received" and p.node in learning}
    flows: set[str] = set()
    nodes = list(rewritten.graph.graph.nodes)
    for node in nodes:
        through = any(n.name in flows for n in node.all_input_nodes) and _is_differentiable(node)
        if node.name in trained if node.op == "placeholder" else through:
            flows.add(node.name)
    outputs = pytree.tree_leaves(nodes[-1].args)
    ends = [*outputs[: rewritten.results], *outputs[rewritten.results + len(rewritten.mutations) :]]
    needed = {end.name for end in ends if isinstance(end, fx.Node)}
    for node in reversed(nodes[:-1]):
        if node.name in needed:
            needed.update(n.name for n in node.all_input_nodes if n.name in flows)
    return needed & flows


def _is_differentiable(node: fx.Node) -> bool:
    if node.op != "call_function" or operator_name(node.target) in _CUTS_GRADIENT:
        return False
    values = results(node)
    return not values or any(v.dtype.is_floating_point or v.dtype.is_complex for v in values)


def counts(
    crossing: Crossing, sizes: LocalSizes, coordinates: Coordinates, mesh: Sequence[int], known: set[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(elements sent to, elements received from) each position, as this place sees it; None where nothing moves.

    That is a value of no elements, or one that lies the same before and after. Both are empty where the shape depends
    on data.
    """
    binding = crossing.binding
    if not symbols_in(binding.terms) <= known:
        return (), ()
    me, positions = coordinates[binding.level], range(mesh[binding.level])
    total = prod(local_shape(binding.terms, sizes))
    if total == 0:
        return None
    source, target = crossing.ends
    before, after = (
        held(binding, kind, _term(binding, kind), sizes) if isinstance(kind, Sharded) else None
        for kind in (source, target)
    )
    if before is None and after is None:
        return (total,) * len(positions), (total,) * len(positions)
    if after is None and before is not None:
        return (before.elements(me),) * len(positions), tuple(map(before.elements, positions))
    if before is None and after is not None:
        return tuple(map(after.elements, positions)), (after.elements(me),) * len(positions)
    assert before is not None and after is not None
    if before == after:  # cut by different weights, but into the same parts
        return None
    sent = tuple(before.shared(me, after, other) for other in positions)
    return sent, tuple(before.shared(other, after, me) for other in positions)


def _term(binding: MoveBinding, kind: Sharded) -> Any:
    return binding.source_term if kind == binding.source else binding.target_term


def exchange(crossing: Crossing, numbers: tuple[tuple[int, ...], tuple[int, ...]], group: tuple[int, ...]) -> Exchange:
    """The communication as one rank of the group issues it."""
    collective = crossing.collective
    assert collective is not None
    dtype = SUMMED_IN.get(crossing.dtype, crossing.dtype) if collective == "all-reduce" else crossing.dtype
    return Exchange(
        crossing.bridge,
        crossing.position,
        crossing.binding.level,
        group,
        collective,
        str(dtype).removeprefix("torch."),
        *numbers,
        crossing.backward,
        crossing.at,
    )


def group_of(level: int, coordinates: Coordinates, mesh: Sequence[int], rank_of: Sequence[int]) -> tuple[int, ...]:
    """The ranks that share all other coordinates, by position on the level."""
    stride = prod(mesh[level + 1 :])
    place = 0
    for size, at in zip(mesh, coordinates, strict=True):
        place = place * size + at
    first = place - coordinates[level] * stride
    return tuple(rank_of[first + position * stride] for position in range(mesh[level]))


def _letter(kind: Type) -> str:
    return "S" if isinstance(kind, Sharded) else kind
