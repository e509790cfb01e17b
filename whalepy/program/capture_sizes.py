"""What the capture assumed about sizes, and the check that a step keeps to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from whalepy.errors import BatchError
from whalepy.program.capture_places import place_of_frame

Bindings = dict[sympy.Symbol, int]
Shapes = Sequence[tuple[int, ...] | None]  # per leaf of (args, kwargs); None for one that is no tensor
Expr = Any  # a sympy expression: sympy's stubs tell symbols, expressions and conditions apart only in part


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the graph is what the model would compute."""

    predicate: Expr
    where: str | None  # file:line of the user's code that asked
    branch: bool = False  # the user's code itself asked for the truth of it

    def holds(self, bindings: Bindings) -> bool:
        """Whether the sizes satisfy the condition; one that cannot be decided counts as violated."""
        if _value(self.predicate, bindings) == sympy.true:
            return True
        # Export takes no size to be 0 or 1: "8 * batch != 8" says that in disguise, and is no branch of the model's.
        strict = isinstance(self.predicate, (sympy.Ne, sympy.Gt, sympy.Lt))
        return strict and not self.branch and self.holds_from_two(bindings)

    def holds_from_two(self, bindings: Bindings) -> bool:
        """Whether it would hold if sizes of 0 and 1 were 2."""
        return _value(self.predicate, {symbol: max(size, 2) for symbol, size in bindings.items()}) == sympy.true


def _value(expr: Expr, bindings: Bindings) -> Expr:
    return expr.xreplace({symbol: sympy.Integer(size) for symbol, size in bindings.items()})


@dataclass(frozen=True)
class InputSizes:
    """The shape of one tensor input in the capture: numbers, symbols and expressions of them."""

    name: str
    leaf: int
    shape: tuple[Expr, ...]


def size_expr(size: int | torch.SymInt) -> Expr:
    """The sympy expression of one entry of a fake tensor's shape."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode under which the graph was captured; None if no node has a fake tensor."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def all_guards(graph: fx.Graph, places: Mapping[int, str], branches: Mapping[Expr, str]) -> tuple[Guard, ...]:
    """Every condition the capture asked about sizes, in order; `places` are the user's lines by position.

    `branches` are the conditions that the user's code asked, with their lines.
    """
    mode = fake_mode_of(graph)
    guards = [] if mode is None or mode.shape_env is None else mode.shape_env.guards
    return tuple(Guard(predicate, place, branch=True) for predicate, place in branches.items()) + tuple(
        Guard(sympy.sympify(guard.expr), _asked_at(guard) or places.get(position))
        for position, guard in enumerate(guards)
    )


def _asked_at(guard: Any) -> str | None:
    return place_of_frame(getattr(getattr(guard, "sloc", None), "framework_loc", None))


def guards_over(graph: fx.Graph, guards: Sequence[Guard], inputs: Sequence[InputSizes]) -> tuple[Guard, ...]:
    """The conditions that hold for some sizes of `inputs` and not for others, without repetition."""
    mode = fake_mode_of(graph)
    if mode is None or mode.shape_env is None:
        return ()
    symbols = {symbol for sizes in inputs for size in sizes.shape for symbol in size.free_symbols}
    known = dict(mode.shape_env.replacements)
    settled = [replace(guard, predicate=guard.predicate.xreplace(known)) for guard in guards]
    ranges = [Guard(predicate, None) for predicate in _ranges(mode.shape_env, symbols)]
    found: dict[Expr, Guard] = {}
    for guard in (*settled, *ranges):
        if guard.predicate != sympy.true and guard.predicate.free_symbols <= symbols:
            found.setdefault(guard.predicate, guard)
    return tuple(found.values())


def _ranges(shape_env: Any, symbols: set[Expr]) -> Iterator[Expr]:
    """What the capture knows of single symbols beyond "at least 2"."""
    for symbol in sorted(symbols, key=str):
        bounds = shape_env.var_to_range.get(symbol)
        if bounds is not None and bounds.lower.is_Integer and bounds.lower > 2:
            yield sympy.Ge(symbol, bounds.lower)
        if bounds is not None and bounds.upper.is_Integer:
            yield sympy.Le(symbol, bounds.upper)


def line_that_fixed(guards: Sequence[Guard], size: int) -> str | None:
    """The user's line that fixed an input dim to `size`; None if no equation with a known line gives that size."""
    for guard in guards:
        symbols = guard.predicate.free_symbols
        if guard.where is None or not isinstance(guard.predicate, sympy.Eq) or len(symbols) != 1:
            continue
        if _value(guard.predicate, {next(iter(symbols)): size}) == sympy.true:
            return guard.where
    return None


def bind_sizes(inputs: Sequence[InputSizes], shapes: Shapes) -> Bindings:
    """The value of every symbol. BatchError: a shape contradicts the captured one, or another input's."""
    dims = [dim for sizes in inputs for dim in _dims(sizes, shapes)]
    bindings: Bindings = {}
    origin: dict[Expr, str] = {}
    for name, expr, size in dims:
        if expr.is_Symbol and expr not in bindings:
            bindings[expr], origin[expr] = size, name
    for _, expr, size in dims:
        _solve(expr, size, bindings)
    for name, expr, size in dims:
        if _value(expr, bindings) != size:
            raise _contradiction(name, expr, size, bindings, origin)
    return bindings


def _dims(sizes: InputSizes, shapes: Shapes) -> list[tuple[str, Expr, int]]:
    """Name, captured size and given size of every dim of one input."""
    shape = shapes[sizes.leaf]
    if shape is None or len(shape) != len(sizes.shape):
        given = "is no tensor" if shape is None else f"has shape {list(shape)}"
        raise BatchError(f"input {sizes.name} {given}, but it was captured with {len(sizes.shape)} dims")
    both = zip(sizes.shape, shape, strict=True)
    return [(f"{sizes.name} dim {dim}", expr, size) for dim, (expr, size) in enumerate(both)]


def _solve(expr: Expr, size: int, bindings: Bindings) -> None:
    """Adds a symbol that appears only in expressions, such as 2*s0, if it is the only unknown."""
    unknown = expr.free_symbols - bindings.keys()
    if len(unknown) == 1:
        symbol = unknown.pop()
        roots = sympy.solve(_value(expr, bindings) - size, symbol)
        if len(roots) == 1 and roots[0].is_Integer:
            bindings[symbol] = int(roots[0])


def _contradiction(name: str, expr: Expr, size: int, bindings: Bindings, origin: Mapping[Expr, str]) -> BatchError:
    if expr.is_Integer:
        return BatchError(
            f"input {name} has size {size}, but the model was captured for size {expr} only",
            fix=f"give size {expr}, or compile with example inputs of size {size}",
        )
    others = ", ".join(f"{origin.get(s, s)} is {bindings.get(s)}" for s in sorted(expr.free_symbols, key=str))
    return BatchError(f"input {name} has size {size}, but must have {_value(expr, bindings)}: {others}")


def violated(guards: Sequence[Guard], inputs: Sequence[InputSizes], bindings: Bindings) -> str | None:
    """A sentence on the first condition that the sizes violate; None if all hold."""
    broken = next((guard for guard in guards if not guard.holds(bindings)), None)
    if broken is None:
        return None
    symbols = sorted(broken.predicate.free_symbols, key=str)
    values = ", ".join(f"{symbol} is {bindings.get(symbol)} ({_first_use(symbol, inputs)})" for symbol in symbols)
    place = f" ({broken.where})" if broken.where else ""
    return f"the captured graph holds only where {broken.predicate}{place}, but {values}"


def branches_otherwise(guards: Sequence[Guard], bindings: Bindings) -> bool:
    """Whether sizes of 0 or 1 lead the user's code into another branch than the captured one."""
    broken = [guard for guard in guards if not guard.holds(bindings)]
    return bool(broken) and all(guard.branch and guard.holds_from_two(bindings) for guard in broken)


def _first_use(symbol: Expr, inputs: Sequence[InputSizes]) -> str:
    uses = (
        f"{sizes.name} dim {dim}"
        for sizes in inputs
        for dim, expr in enumerate(sizes.shape)
        if symbol in expr.free_symbols
    )
    return next(uses, "no input")
