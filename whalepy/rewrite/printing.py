"""The program of one rank as text: our own words throughout, so that it reads alike under every torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.planner.decide import Decisions
from whalepy.planner.mesh import Chain, arrange
from whalepy.program.analysis import Program, Value
from whalepy.program.axes import as_size
from whalepy.program.layout import Layout, Sharded, Type
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import Binding, First, GlobalSize, LocalSize, MoveBinding, Reducer, Start, Stream
from whalepy.rewrite.exchanges import Crossing, counts, differentiated, exchange, group_of, placements
from whalepy.rewrite.naming import MOVES, is_item, operator_text, places_of, value_names
from whalepy.rewrite.rewrite import Rewritten
from whalepy.rewrite.sizes import Coordinates, LocalSizes, SizesAt, symbols_in
from whalepy.rewrite.terms import moves, terms_of

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_NOT_COMPUTED_WITH = {"device", "layout", "pin_memory", "memory_format"}
"""Arguments that say where and how values lie in memory; they are left out."""
_TO_THE_END = 2**63 - 1
"""How torch writes the end of a dim."""


@dataclass(frozen=True)
class RankProgram:
    """What one rank runs: the graph, and its text with every operator, bridge and layout."""

    rank: int
    graph: fx.GraphModule
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Ranks:
    """Where ranks stand: the chains of scopes that make the levels, and the rank at each place, last level fastest."""

    chains: tuple[Chain, ...]
    rank_of: tuple[int, ...]


def rank_program(
    rewritten: Rewritten, program: Program, decisions: Decisions, ranks: Ranks, rank: int, sizes_at: SizesAt
) -> RankProgram:
    """The program of `rank`, with the sizes that `sizes_at` gives at its place."""
    text = program_text(rewritten, program, decisions, ranks, rank, sizes_at)
    return RankProgram(rank, rewritten.graph, text)


def program_text(
    rewritten: Rewritten, program: Program, decisions: Decisions, ranks: Ranks, rank: int, sizes_at: SizesAt
) -> str:
    """Mesh, place and shares, then one line per value: `name = op(args)  # dtype[local shape] layout  file:line`.

    Shapes are this rank's, at the sizes that `sizes_at` gives. A layout has one type per level, outermost first:
    R replicated, B replicated with a partial gradient, P a partial sum, S(dim.term) a shard. Bridges say what they
    convert on which level and how many bytes this rank sends for it, forward and backward.
    """
    return "\n".join(_Printer(rewritten, program, decisions, ranks, rank, sizes_at).lines())


def level_names(chains: Sequence[Chain], devices: int) -> tuple[str, ...]:
    """Per level, the kinds of the primitives that own it; `implicit replicate` where none does."""
    mesh = arrange(chains, devices)
    names: list[str] = []
    for level in range(len(mesh.sizes)):
        kinds = dict.fromkeys(owner.kind for chain in chains if (owner := mesh.owners[chain][level]) is not None)
        names.append(" or ".join(kinds) or "implicit replicate")
    return tuple(names)


@dataclass(frozen=True)
class _Printer:
    rewritten: Rewritten
    program: Program
    decisions: Decisions
    ranks: Ranks
    rank: int
    sizes_at: SizesAt

    @cached_property
    def graph(self) -> fx.Graph:
        return self.rewritten.graph.graph

    @cached_property
    def coordinates(self) -> Coordinates:
        place = self.ranks.rank_of.index(self.rank)
        found: list[int] = []
        for size in reversed(self.decisions.mesh):
            place, position = divmod(place, size)
            found.append(position)
        return tuple(reversed(found))

    @cached_property
    def sizes(self) -> LocalSizes:
        return self.sizes_at(self.coordinates)

    @cached_property
    def levels(self) -> tuple[str, ...]:
        names = level_names(self.ranks.chains, len(self.ranks.rank_of))
        return tuple(f"level {level} {name}" for level, name in enumerate(names))

    @cached_property
    def names(self) -> dict[str, str]:
        return value_names(self.graph, self.program)

    @cached_property
    def placed(self) -> dict[str, tuple[Value, Layout]]:
        return placements(self.rewritten)

    @cached_property
    def learning(self) -> set[str]:
        return differentiated(self.rewritten, self.program)

    @cached_property
    def bindings(self) -> dict[str, Binding]:
        """What each extra argument of the graph is, by placeholder."""
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        own = placeholders[len(placeholders) - len(self.rewritten.bindings) :]
        return {node.name: binding for node, binding in zip(own, self.rewritten.bindings, strict=True)}

    def lines(self) -> Iterator[str]:
        yield from self._header()
        places = places_of(self.graph, self.program)
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name in places and node.name in self.placed:
                yield f"{self.names[node.name]} = {places[node.name].kind}{self._comment(node)}{self._reading(node)}"
            elif node.op == "call_function":
                yield f"{self.names[node.name]} = {self._call(node)}{self._comment(node)}{self._moved(node)}"
            elif node.op == "output":
                yield from self._outputs(node)

    def _header(self) -> Iterator[str]:
        mesh = " x ".join(map(str, self.decisions.mesh))
        at = " x ".join(map(str, self.coordinates))
        yield f"program of rank {self.rank}, at place {at} of {mesh}; shapes are this rank's for the example inputs"
        for level, (name, size) in enumerate(zip(self.levels, self.decisions.mesh, strict=True)):
            shares = " or ".join(dict.fromkeys(self.decisions.cuts[cut].shares for cut in self._cuts(level)))
            cut = f", shares {shares}" if shares else ", nothing is cut"
            yield f"  {name}, position {self.coordinates[level]} of {size}{cut}"

    def _cuts(self, level: int) -> list[int]:
        """The cuts that rows or operators use on a level."""
        rows = self.decisions.row_cuts[level]
        used = {modes[level].cut for modes in self.decisions.modes if modes[level].kind == "S"}
        return sorted(used if rows is None else {rows, *used})

    def _outputs(self, node: fx.Node) -> Iterator[str]:
        values = [self._argument(value) for value in pytree.tree_leaves(node.args)]
        count = self.rewritten.results
        for name, value in zip(self.rewritten.mutations, values[count:], strict=False):
            yield f"{name} <- {value}"
        given = values[count + len(self.rewritten.mutations) :]
        if given:
            yield f"give {', '.join(given)}"
        if count or not given:
            yield f"return {', '.join(values[:count])}"

    # -- right of the equals sign

    def _call(self, node: fx.Node) -> str:
        if is_item(node):
            return f"{self._argument(node.args[0])}[{node.args[1]}]"
        if node.target in MOVES:
            binding: MoveBinding = node.meta["move"]
            ends = self._ends(binding.source, binding.target)
            return f"{operator_text(node.target)}({self._argument(node.args[0])}, {ends}, {self.levels[binding.level]})"
        target, arguments = node.target, [self._argument(argument) for argument in node.args]
        arguments += [f"{k}={self._argument(v)}" for k, v in node.kwargs.items() if k not in _NOT_COMPUTED_WITH]
        if isinstance(target, kernels.Seeded):
            target, arguments = target.op, [*arguments[1:], arguments[0]]
        return f"{operator_text(target)}({', '.join(arguments)})"

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            binding = self.bindings.get(value.name)
            return self.names[value.name] if binding is None else self._number(binding)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._argument, value))}]"
        if isinstance(value, torch.dtype):
            return DTYPES.get(value, str(value).removeprefix("torch."))
        if callable(value):
            return operator_text(value)
        return "end" if value == _TO_THE_END else repr(value)

    def _number(self, binding: Binding) -> str:
        match binding:
            case LocalSize(dim):
                return str(self.sizes.dim_size(dim))
            case GlobalSize(size):
                return str(sympy.sympify(size).subs(list(self.program.hints.items())))
            case Start(dim):
                return str(self.sizes.start(dim))
            case Reducer(level):
                return self.levels[level]
            case Stream(_, levels):
                return f"stream={' and '.join(self.levels[level] for level in levels) or 'everywhere the same'}"
            case First():
                return "first microbatch"
            case MoveBinding():
                return self._ends(binding.source, binding.target)

    def _ends(self, source: Type, target: Type) -> str:
        """`S(0.0) -> R`; the weights too where two shards differ in nothing else."""
        texts = [str(source), str(target)]
        if texts[0] == texts[1] and isinstance(source, Sharded) and isinstance(target, Sharded):
            texts = [f"{kind} by {self.decisions.cuts[kind.cut].shares}" for kind in (source, target)]
        return " -> ".join(texts)

    # -- the comment

    def _comment(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        where = f"  {place}" if (place := node.meta.get("where")) and node.op == "call_function" else ""
        if node.name not in self.placed or not isinstance(value, torch.Tensor):
            return f"  #{where}" if where else ""
        key, layout = self.placed[node.name]
        shape = ", ".join(self._shape(key, layout))
        return f"  # {DTYPES.get(value.dtype, value.dtype)}[{shape}] {layout_text(layout)}{where}"

    def _shape(self, key: Value, layout: Layout) -> Iterator[str]:
        """Local sizes; the symbols of the capture where only data tell."""
        whole = self.program.dims[key[0]][key[1]]
        for dim, terms in zip(whole, terms_of(self.program, key, layout), strict=True):
            if symbols_in((terms,)) <= set(self.program.hints):
                yield str(self.sizes.dim_size(terms))
            else:
                yield " * ".join(str(as_size(self.program.axes.size(axis))) for axis in self.program.axes.leaves(dim))

    def _moved(self, node: fx.Node) -> str:
        if node.target not in MOVES:
            return ""
        dtype = node.meta["val"].dtype
        ways = (False, True) if node.name in self.learning else (False,)
        sent = [self._sent(Crossing("", 0, node.meta["move"], dtype, backward)) for backward in ways]
        return f"  sends {bytes_text(sent[0])} forward" + (f", {bytes_text(sent[1])} backward" if len(sent) > 1 else "")

    def _reading(self, node: fx.Node) -> str:
        """What a parameter costs beside the program: gathering what is stored sharded, reducing its gradient."""
        operator, (_, layout) = self.program.operators[self.placed[node.name][0][0]], self.placed[node.name]
        if operator.kind != "parameter":
            return ""
        stored = self.decisions.stored[self.names[node.name]]
        trained = any(operator.result_grad)
        ways = (False, True) if trained else (False,)
        path = [binding for _, binding in moves(self.program, self.placed[node.name][0], stored, layout)]
        dtype = node.meta["val"].dtype
        sent = [sum(self._sent(Crossing("", 0, binding, dtype, way)) for binding in path) for way in ways]
        texts = [f"stored {layout_text(stored)}"] if sent[0] else []
        texts += [] if trained else ["frozen"]
        texts += [f"sends {bytes_text(sent[0])} when read"] if sent[0] else []
        texts += [f"sends {bytes_text(sent[1])} of gradient"] if trained and sent[1] else []
        return f"  {', '.join(texts)}" if texts else ""

    def _sent(self, crossing: Crossing) -> int:
        """Bytes this rank sends for a move in one direction."""
        mesh, level = self.decisions.mesh, crossing.binding.level
        if crossing.collective is None or mesh[level] == 1:
            return 0
        numbers = counts(crossing, self.sizes, self.coordinates, mesh, set(self.program.hints))
        group = group_of(level, self.coordinates, mesh, self.ranks.rank_of)
        return 0 if numbers is None else exchange(crossing, numbers, group).sent_bytes(self.rank)


def layout_text(layout: Layout) -> str:
    """One type per level, outermost first."""
    return f"({', '.join(map(str, layout))})"


def bytes_text(count: int) -> str:
    """`96 B`, `6.0 KiB`, `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
