"""What the capture assumed about sizes, and the check that a step keeps to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from whalepy.errors import BatchError
from whalepy.program.capture_places import place_of_frame

Bindings = dict[sympy.Symbol, int]


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the graph is what the model would compute."""

    predicate: sympy.Basic
    where: str | None  # file:line of the user's code that asked

    def holds(self, bindings: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the sizes satisfy the condition; one that cannot be decided counts as violated."""
        if self.predicate.xreplace(_integers(bindings)) == sympy.true:
            return True
        # Export takes sizes 0 and 1 to be neither: "8 * batch != 8" is such a condition in disguise.
        raised = {symbol: max(size, 2) for symbol, size in bindings.items()}
        strict = isinstance(self.predicate, (sympy.Ne, sympy.Gt, sympy.Lt))
        return strict and self.predicate.xreplace(_integers(raised)) == sympy.true


def _integers(bindings: Mapping[sympy.Symbol, int]) -> dict[sympy.Basic, sympy.Basic]:
    return {symbol: sympy.Integer(size) for symbol, size in bindings.items()}


@dataclass(frozen=True)
class InputSizes:
    """The shape of one tensor input in the capture: numbers, symbols and expressions of them."""

    name: str
    leaf: int
    shape: tuple[sympy.Expr, ...]


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression of one entry of a fake tensor's shape."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def guards_of(graph: fx.Graph, inputs: Sequence[InputSizes]) -> tuple[Guard, ...]:
    """The conditions over input sizes which hold only for some of them, in the order they were asked."""
    shape_env = _shape_env(graph)
    if shape_env is None:
        return ()
    symbols = {symbol for sizes in inputs for size in sizes.shape for symbol in size.free_symbols}
    found: dict[sympy.Basic, Guard] = {}
    for guard in shape_env.guards:
        predicate = sympy.sympify(guard.expr).xreplace(dict(shape_env.replacements))
        where = place_of_frame(getattr(getattr(guard, "sloc", None), "framework_loc", None))
        found.setdefault(predicate, Guard(predicate, where))
    for predicate in _range_predicates(shape_env, symbols):
        found.setdefault(predicate, Guard(predicate, None))
    return tuple(g for p, g in found.items() if p not in (sympy.true, True) and p.free_symbols <= symbols)


def _range_predicates(shape_env: Any, symbols: Iterable[sympy.Symbol]) -> Iterable[sympy.Basic]:
    for symbol in sorted(symbols, key=str):
        bounds = shape_env.var_to_range.get(symbol)
        if bounds is None:
            continue
        if bounds.lower.is_Integer and bounds.lower > 2:
            yield sympy.Ge(symbol, bounds.lower)
        if bounds.upper.is_Integer:
            yield sympy.Le(symbol, bounds.upper)


def _shape_env(graph: fx.Graph) -> Any:
    mode = fake_mode_of(graph)
    return None if mode is None else mode.shape_env


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode under which the graph was captured; None if no node has a fake tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    return None


def guard_line(graph: fx.Graph, symbol_or_size: int) -> str | None:
    """The user's line that fixed a size to the number, if the guards name it."""
    shape_env = _shape_env(graph)
    for guard in shape_env.guards if shape_env is not None else ():
        where = place_of_frame(getattr(getattr(guard, "sloc", None), "framework_loc", None))
        if where and isinstance(guard.expr, sympy.Eq) and sympy.Integer(symbol_or_size) in guard.expr.args:
            return where
    return None


def bind_sizes(inputs: Sequence[InputSizes], shapes: Sequence[tuple[int, ...] | None]) -> Bindings:
    """The value of every symbol. BatchError: a shape contradicts the captured one, or another input's."""
    bindings: Bindings = {}
    origin: dict[sympy.Symbol, str] = {}
    for sizes in inputs:
        shape = _shape_of(sizes, shapes)
        for dim, (expr, size) in enumerate(zip(sizes.shape, shape, strict=True)):
            if isinstance(expr, sympy.Symbol) and expr not in bindings:
                bindings[expr] = size
                origin[expr] = f"{sizes.name} dim {dim}"
    _solve(inputs, shapes, bindings)
    for sizes in inputs:
        for dim, (expr, size) in enumerate(zip(sizes.shape, _shape_of(sizes, shapes), strict=True)):
            _check_size(f"{sizes.name} dim {dim}", expr, size, bindings, origin)
    return bindings


def _shape_of(sizes: InputSizes, shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...]:
    shape = shapes[sizes.leaf]
    if shape is None or len(shape) != len(sizes.shape):
        given = "no tensor" if shape is None else f"shape {list(shape)}"
        raise BatchError(f"input {sizes.name} has {given}, the captured one has {len(sizes.shape)} dims")
    return shape


def _solve(inputs: Sequence[InputSizes], shapes: Sequence[tuple[int, ...] | None], bindings: Bindings) -> None:
    """Adds the symbols that appear only in expressions of one unknown, such as 2*s0."""
    for sizes in inputs:
        for expr, size in zip(sizes.shape, _shape_of(sizes, shapes), strict=True):
            unknown = expr.free_symbols - bindings.keys()
            if len(unknown) == 1:
                symbol = unknown.pop()
                roots = sympy.solve(expr.subs(bindings) - size, symbol)
                if len(roots) == 1 and roots[0].is_Integer:
                    bindings[symbol] = int(roots[0])


def _check_size(name: str, expr: sympy.Expr, size: int, bindings: Bindings, origin: Mapping[sympy.Symbol, str]) -> None:
    expected = expr.xreplace(_integers(bindings))
    if expected == size:
        return
    if expr.is_Integer:
        raise BatchError(
            f"input {name} has size {size}, but the model was captured for {expr} only",
            fix="compile with example inputs of this size",
        )
    others = ", ".join(f"{origin.get(s, s)} = {bindings.get(s)}" for s in sorted(expr.free_symbols, key=str))
    raise BatchError(f"input {name} has size {size}, but it must be {expected} ({others})")


def violated(guards: Sequence[Guard], inputs: Sequence[InputSizes], bindings: Mapping[sympy.Symbol, int]) -> str | None:
    """A sentence on the first condition that the sizes violate; None if all hold."""
    for guard in guards:
        if not guard.holds(bindings):
            return _sentence(guard, inputs, bindings)
    return None


def _sentence(guard: Guard, inputs: Sequence[InputSizes], bindings: Mapping[sympy.Symbol, int]) -> str:
    names = {s: _first_use(s, inputs) for s in sorted(guard.predicate.free_symbols, key=str)}
    values = ", ".join(f"{s} = {bindings.get(s)} is {name}" for s, name in names.items())
    place = f" at {guard.where}" if guard.where else ""
    return f"the capture relies on {guard.predicate}{place}, but {values}"


def _first_use(symbol: sympy.Basic, inputs: Sequence[InputSizes]) -> str:
    for sizes in inputs:
        for dim, expr in enumerate(sizes.shape):
            if symbol in expr.free_symbols:
                return f"{sizes.name} dim {dim}"
    return "no input"
