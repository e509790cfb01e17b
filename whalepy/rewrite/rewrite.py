"""Rewriting: from the local model's graph and a plan to the graph that every rank runs.

Before:  linear(x, w)                      x sharded by rows, w sharded by heads on another level
After:   linear(bridge(x, ...), w)         bridges where layouts differ, sizes as arguments, local kernels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.errors import PlanError
from whalepy.planner.decide import Decisions
from whalepy.program.analysis import Program, producer
from whalepy.program.axes import Size
from whalepy.program.call import is_tensor, tensor_operands
from whalepy.program.dead_code import drop_unused
from whalepy.program.layout import (
    Layout,
    operand_type,
    result_type,
)
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import (
    Binding,
    DimTerms,
    First,
    GlobalSize,
    LocalSize,
    MoveBinding,
    Reducer,
    Start,
    Stream,
    ValueTerms,
)
from whalepy.rewrite.crossing import input_layout, read_layout, received_layout
from whalepy.rewrite.data_sizes import size_from_data
from whalepy.rewrite.emission import emit
from whalepy.rewrite.terms import moves, terms_of


@dataclass(frozen=True)
class Rewritten:
    """One graph for all ranks of a class, and what its extra arguments are."""

    graph: fx.GraphModule
    """Placeholders: those of the captured graph in order, then one per binding."""
    bindings: tuple[Binding, ...]
    results: int
    """The first outputs are the loss or the model's outputs, then the new buffer values."""
    mutations: tuple[str, ...]
    layouts: Mapping[str, tuple[Layout, ...]]
    """Layout per node name and result, for printing."""
    values: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """The (operator, result) of the program that a node computes; bridges have none."""

    @property
    def levels_in_backward(self) -> frozenset[int]:
        """Levels over which its backward pass may communicate."""
        found = (b for b in self.bindings if isinstance(b, Reducer | MoveBinding))
        return frozenset(b.level for b in found if isinstance(b, Reducer) or b.communicates_back)


@dataclass
class Rewriter:
    """State of one rewriting: the new graph, and where each value stands in which layout."""

    program: Program
    decisions: Decisions
    result_layout: Callable[[int], Layout] | None = None
    """Layout wanted of graph output `i`; replicated where None."""
    graph: fx.Graph = field(default_factory=fx.Graph)
    bindings: dict[Binding, fx.Node] = field(default_factory=dict[Binding, fx.Node])
    made: dict[tuple[int, int], fx.Node] = field(default_factory=dict[tuple[int, int], fx.Node])
    layouts: dict[tuple[int, int], Layout] = field(default_factory=dict[tuple[int, int], Layout])
    read: dict[tuple[int, int], Layout] = field(default_factory=dict[tuple[int, int], Layout])
    """Of what other stages give: the layout that it gets before anything reads it."""
    moved: dict[tuple[int, int, Layout], fx.Node] = field(default_factory=dict[tuple[int, int, Layout], fx.Node])
    symbols: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    inner: dict[str, Any] = field(default_factory=dict[str, Any])
    """The graphs that operators such as torch.cond choose from, by name."""

    def run(self) -> Rewritten:
        """The rewritten graph."""
        captured = self.program.captured
        self._placeholders()
        for i, node in enumerate(self.program.nodes):
            if node.op == "call_function":
                self._call(i, node)
        outputs = self._outputs()
        self.graph.output(tuple(outputs))
        drop_unused(self.graph)
        bindings = self._order_bindings()
        module = fx.GraphModule(self.inner, self.graph)
        named = {node.name: key for key, node in self.made.items()}
        layouts = {name: (self.layouts[key],) for name, key in named.items()}
        return Rewritten(module, bindings, captured.results, captured.mutations, layouts, named)

    # -- leaves and outputs

    def _placeholders(self) -> None:
        level_count = len(self.decisions.mesh)
        places = {p.node: p for p in self.program.captured.placeholders}
        index = self.program.positions
        for node in self.program.captured.graph.graph.find_nodes(op="placeholder"):
            new = self.graph.placeholder(node.name)
            new.meta.update(node.meta)
            if node not in index:
                self.symbols[node] = new
                continue
            place = places[node.name]
            layout: Layout = ("R",) * level_count
            if place.kind == "parameter":
                layout = self.decisions.read[place.name]
            elif place.kind == "input":
                layout = input_layout(self.program, self.decisions, index[node])
            elif place.kind == "received":
                layout = received_layout(self.program, self.decisions, index[node])
                self.read[index[node], 0] = read_layout(self.program, self.decisions, index[node])
            self.made[index[node], 0] = new
            self.layouts[index[node], 0] = layout

    def _outputs(self) -> list[Any]:
        """Every graph output in its wanted layout."""
        output = next(iter(self.program.captured.graph.graph.find_nodes(op="output")))
        replicated: Layout = ("R",) * len(self.decisions.mesh)
        wanted: list[Any] = []
        flat = pytree.tree_leaves(output.args)
        for i, item in enumerate(flat):
            if not isinstance(item, fx.Node):
                wanted.append(item)
                continue
            layout = self.result_layout(i) if self.result_layout is not None else replicated
            wanted.append(self._value(item, layout) if is_tensor(item) else self._symbol(item, step=True))
        return wanted

    # -- operators

    def _call(self, i: int, node: fx.Node) -> None:
        op = self.program.operators[i]
        modes = self.decisions.modes[i]
        wants: list[Layout] = [tuple(operand_type(op, mode, k) for mode in modes) for k in range(len(op.operands))]
        operands = [self._value(n, want) for n, want in zip(tensor_operands(node), wants, strict=True)]
        new = emit(self, i, node, operands, modes)
        new.meta.update({key: node.meta[key] for key in ("val", "where", "scope") if key in node.meta})
        for r in range(len(op.result_grad)):
            self.layouts[i, r] = tuple(result_type(op, mode, r) for mode in modes)
        if isinstance(node.meta["val"], torch.Tensor):
            self.made[i, 0] = new
            return
        r = 0
        for position, member in enumerate(node.meta["val"]):
            if isinstance(member, torch.Tensor):
                item = self.graph.call_function(_getitem, (new, position))
                item.meta["val"] = member
                self.made[i, r] = item
                r += 1

    def _value(self, node: fx.Node, want: Layout) -> fx.Node:
        """The value of a captured node in the layout an operator wants; bridges are made once per value and layout."""
        source, r = producer(node)
        i = self.program.positions[source]
        key = (i, r)
        if not self.program.operators[i].result_grad[r]:
            want = tuple("R" if t == "B" else t for t in want)
        value, now = self.made[key], self.layouts[key]
        summed: Layout = tuple("R" if have == "P" != to else have for have, to in zip(now, want, strict=True))
        for start in (self.read.get(key), summed if (*key, summed) in self.moved else None):
            if start is not None:
                value, now = self._converted(key, value, now, start), start
        return self._converted(key, value, now, want)

    def _converted(self, key: tuple[int, int], value: fx.Node, source: Layout, target: Layout) -> fx.Node:
        for now, binding in moves(self.program, key, source, target):
            cached = self.moved.get((*key, now))
            value = cached if cached is not None else self._move(value, binding)
            self.moved[*key, now] = value
        return value

    def _move(self, value: fx.Node, binding: MoveBinding) -> fx.Node:
        target = kernels.retype if binding.is_retype else kernels.bridge
        new = self.graph.call_function(target, (value, self.bind(binding)))
        new.meta["val"] = value.meta.get("val")
        new.meta["move"] = binding
        return new

    # -- sizes

    def terms(self, i: int, r: int, layout: Layout) -> ValueTerms:
        """The terms of every dim of a value under a layout."""
        return terms_of(self.program, (i, r), layout)

    def bind(self, binding: Binding) -> fx.Node:
        """The placeholder of a binding."""
        if binding not in self.bindings:
            with self.graph.inserting_before(self._first_call()):
                self.bindings[binding] = self.graph.placeholder(f"{_PREFIX[type(binding)]}_{len(self.bindings)}")
        return self.bindings[binding]

    def _first_call(self) -> fx.Node:
        return next((n for n in self.graph.nodes if n.op != "placeholder"), self.graph._root)

    def local_shape(self, i: int, r: int, layout: Layout) -> list[int | fx.Node]:
        """Local sizes of a value: literals where nothing is free or cut, else arguments."""
        return [self.local_size(dim) for dim in self.terms(i, r, layout)]

    def local_size(self, dim: DimTerms) -> int | fx.Node:
        """This rank's size of one dim."""
        total = 1
        for term in dim:
            if term.chain or not isinstance(term.size, int):
                return self.bind(LocalSize(dim)) if self._bound(dim) else self._unbound(dim)
            total *= term.size
        return total

    def _bound(self, dim: DimTerms) -> bool:
        symbols = {s for term in dim for s in getattr(term.size, "free_symbols", ())}
        return symbols <= set(self.program.hints)

    def _unbound(self, dim: DimTerms) -> fx.Node:
        """A size that only the data tell."""
        size: Size = 1
        for term in dim:
            size = size * term.size
        return size_from_data(self, sympy.sympify(size))

    def argument(self, value: Any, operands: Mapping[fx.Node, fx.Node], *, step: bool = False) -> Any:
        """An argument of a captured call with its nodes replaced; sizes become arguments of the new graph."""
        if isinstance(value, fx.Node):
            return operands[value] if value in operands else self._symbol(value, step=step)
        if isinstance(value, list | tuple):
            return type(value)(self.argument(item, operands, step=step) for item in value)
        if isinstance(value, dict):
            return {k: self.argument(item, operands, step=step) for k, item in value.items()}
        return value

    def _symbol(self, node: fx.Node, *, step: bool) -> Any:
        """A symbolic number as the local model would see it."""
        value = node.meta.get("val")
        symbolic = getattr(getattr(value, "node", None), "expr", None)
        if symbolic is None:
            if isinstance(value, int | float | bool):
                return value
            return self._copied(node)
        if symbolic.free_symbols <= set(self.program.hints):
            return self.bind(GlobalSize(symbolic, step)) if symbolic.free_symbols else _number(symbolic)
        return self._copied(node)

    def number(self, node: fx.Node) -> fx.Node:
        """A number of the captured graph, computed in the new one as the local model would on one microbatch."""
        return self._symbol(node, step=False)

    def _copied(self, node: fx.Node) -> fx.Node:
        """A number that depends on data: the same computation on whole values. Or a graph within the graph."""
        if node.op == "get_attr" and node not in self.symbols:
            self.inner[str(node.target)] = getattr(self.program.captured.graph, str(node.target))
            self.symbols[node] = self.graph.get_attr(str(node.target))
        elif node not in self.symbols:
            replicated: Layout = ("R",) * len(self.decisions.mesh)
            tensors = {n: self._value(n, replicated) for n in tensor_operands(node)}
            args = self.argument(node.args, tensors)
            kwargs = self.argument(node.kwargs, tensors)
            new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta["val"] = node.meta.get("val")
            self.symbols[node] = new
        return self.symbols[node]

    def _order_bindings(self) -> tuple[Binding, ...]:
        """Bindings in the order of their placeholders, unused ones gone."""
        kept: list[Binding] = []
        for binding, node in self.bindings.items():
            if node.users:
                kept.append(binding)
            else:
                self.graph.erase_node(node)
        order = {node: k for k, node in enumerate(self.graph.find_nodes(op="placeholder"))}
        return tuple(sorted(kept, key=lambda b: order[self.bindings[b]]))


_PREFIX: dict[type, str] = {
    LocalSize: "size",
    GlobalSize: "total",
    Start: "start",
    Stream: "stream",
    Reducer: "level",
    First: "first",
    MoveBinding: "move",
}


def _getitem(values: Any, i: int) -> Any:
    return values[i]


def _number(expr: sympy.Expr) -> int | float:
    return int(expr) if expr.is_Integer else float(expr)


def rewrite(program: Program, decisions: Decisions, result_layout: Callable[[int], Layout] | None = None) -> Rewritten:
    """The graph all ranks run under these decisions. Raises PlanError for decisions that contradict each other."""
    if any(len(modes) != len(decisions.mesh) for modes in decisions.modes):
        raise PlanError("every operator needs one mode per level")
    return Rewriter(program, decisions, result_layout).run()
