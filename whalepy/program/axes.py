"""Axes of a program: every dim of every value as a product of atomic axes, found by union and refinement.

An *axis* is an integer id. A dim is a tuple of axes, outermost first; of size 1: the empty tuple. An axis can be
refined into a product of smaller ones (`768 -> 3 x 12 x 64`) or into a sum of products
(`[kv rep dh | kv dh | kv dh]`, a dim that is a concatenation). `leaves` always gives the present refinement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy

Size = int | sympy.Expr
Dim = tuple[int, ...]


def as_size(size: object) -> Size:
    """An int where the size is known, else a sympy expression over the free sizes."""
    node = getattr(size, "node", None)
    expr = size if node is None else _constant(node.shape_env, node.expr)
    if isinstance(expr, sympy.Expr) and not expr.is_Integer:
        return expr
    return int(expr)  # type: ignore[call-overload]


def _constant(shape_env: Any, expr: sympy.Basic) -> sympy.Basic:
    """The one value that an expression takes over the ranges of its free sizes, where it has but one."""
    if not expr.atoms(sympy.Function):
        return expr
    bounds = shape_env.bound_sympy(expr)
    return bounds.lower if bounds.is_singleton() else expr


def divide(total: Size, part: Size) -> Size | None:
    """`total / part` where that is exact for every value of the free sizes, else None."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if part and total % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(total) / sympy.sympify(part))
    numerator, denominator = sympy.fraction(quotient)
    if denominator != 1 or not numerator.is_polynomial(*numerator.free_symbols):
        return None
    return as_size(quotient)


def evaluate(size: Size | sympy.Basic, values: Mapping[sympy.Symbol, int]) -> int:
    """A size at these values of the free sizes."""
    return size if isinstance(size, int) else int(substituted(size, values))  # type: ignore[call-overload]


def substituted(expression: sympy.Basic, values: Mapping[sympy.Symbol, int]) -> sympy.Basic:
    """An expression at these values of the free sizes."""
    return expression.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})


class Axes:
    """Union-find over axes with refinement; sizes are ints or expressions over the free sizes of the inputs."""

    def __init__(self, hints: Mapping[sympy.Symbol, int] | None = None) -> None:
        self._hints = dict(hints or {})
        self._parent: list[int] = []
        self._size: list[Size] = []
        self._product: dict[int, Dim] = {}
        self._sum: dict[int, tuple[Dim, ...]] = {}
        self._fixed: set[int] = set()
        self._equal: dict[sympy.Symbol, Size] = {}
        self.version = 0

    def new(self, size: Size) -> int:
        """A fresh axis of `size`."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def dim(self, size: Size) -> Dim:
        """A dim of one fresh axis, or of none when its size is 1."""
        return () if size == 1 else (self.new(size),)

    def fix(self, axis: int) -> None:
        """Forbid refinement of `axis`: the batch axis is cut in rows, never inside a row."""
        self._fixed.add(self.find(axis))

    def find(self, axis: int) -> int:
        """The representative of `axis`."""
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def size(self, axis: int) -> Size:
        """Size of an axis, in elements."""
        return self._known(self._size[self.find(axis)])

    def leaves(self, dim: Iterable[int]) -> Dim:
        """The dim in its present refinement, outermost first; an axis that is a sum counts as one leaf."""
        found: list[int] = []
        for axis in dim:
            root = self.find(axis)
            product = self._product.get(root)
            found.extend(self.leaves(product) if product is not None else (root,))
        return tuple(found)

    def parts(self, axis: int) -> tuple[Dim, ...] | None:
        """The concatenated products of an axis that is a sum, else None."""
        parts = self._sum.get(self.find(axis))
        return None if parts is None else tuple(self.leaves(part) for part in parts)

    def shardable_inside(self, leaf: int) -> tuple[int, ...]:
        """Axes by which a leaf can be sharded: itself, or for a sum every axis that stands once in each part."""
        parts = self.parts(leaf)
        if parts is None:
            return (leaf,)
        return tuple(axis for axis in parts[0] if all(part.count(axis) == 1 for part in parts))

    def equate(self, one: Size, other: Size) -> None:
        """Learn that two sizes are always equal (an operator demands it)."""
        one, other = self._known(one), self._known(other)
        if one == other:
            return
        for symbol, same in ((one, other), (other, one)):
            if isinstance(symbol, sympy.Symbol) and symbol not in getattr(same, "free_symbols", ()):
                self._equal[symbol] = same
                return

    def match(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Make two products of equal total size the same axes, from both ends, refining where sizes divide.

        What does not divide is left apart in the middle: there it cannot be sharded.
        """
        while True:
            a, b = strip_common(self.leaves(left), self.leaves(right))
            if not a or not b:
                return
            whole = len(a) == 1 and len(b) == 1
            if not (self._merge(a[0], b[0], whole, outer=True) or self._merge(a[-1], b[-1], whole, outer=False)):
                return

    def refine(self, axis: int, sizes: Sequence[Size]) -> bool:
        """Refine a leaf into a product of `sizes`, outermost first; False where it may not be."""
        root = self.find(axis)
        if root in self._fixed or root in self._sum or root in self._product:
            return False
        self._product[root] = tuple(self.new(size) for size in sizes if size != 1)
        self.version += 1
        return True

    def concatenate(self, axis: int, parts: Sequence[Dim]) -> bool:
        """Say that `axis` is the concatenation of `parts`; False where it is already something else."""
        root = self.find(axis)
        if root in self._fixed or root in self._product:
            return False
        if root in self._sum:
            return self._match_parts(self._sum[root], parts)
        self._sum[root] = tuple(parts)
        self.version += 1
        return True

    def _match_parts(self, one: Sequence[Dim], other: Sequence[Dim]) -> bool:
        if len(one) != len(other) or any(self._total(p) != self._total(q) for p, q in zip(one, other, strict=True)):
            return False
        for p, q in zip(one, other, strict=True):
            self.match(p, q)
        return True

    def _total(self, dim: Dim) -> Size:
        total: Size = 1
        for axis in dim:
            total = total * self.size(axis)
        return total

    def _merge(self, a: int, b: int, whole: bool, *, outer: bool) -> bool:
        """Unite two leaves, or split the larger by the smaller on its outer or inner side."""
        size_a, size_b = self.size(a), self.size(b)
        if whole or size_a == size_b:
            return self._unite(a, b)
        for big, small, total, part in ((a, b, size_a, size_b), (b, a, size_b, size_a)):
            rest = divide(total, part)
            if rest is not None and small != big:
                return self.refine(big, (part, rest) if outer else (rest, part))
        return False

    def _unite(self, a: int, b: int) -> bool:
        a, b = self.find(a), self.find(b)
        if a == b:
            return False
        if a in self._sum and b in self._sum and not self._match_parts(self._sum[a], self._sum[b]):
            return False
        if (a in self._fixed and b in self._sum) or (b in self._fixed and a in self._sum):
            return False
        if not self._alike(self.size(a), self.size(b)):
            return False
        self.equate(self._size[b], self._size[a])
        keep, drop = (a, b) if (a in self._sum or b not in self._sum) else (b, a)
        if isinstance(known := self.size(drop), int):
            self._size[keep] = known  # a parameter's own size, where the other follows free sizes
        self._parent[drop] = keep
        if drop in self._fixed:
            self._fixed.add(keep)
        self.version += 1
        return True

    def _alike(self, one: Size, other: Size) -> bool:
        """Whether two sizes are equal at the example's sizes, as far as these tell: a size of 1 there broadcasts."""
        if one == other:
            return True
        known = [substituted(sympy.sympify(size), self._hints) for size in (one, other)]
        return known[0] == known[1] or any(value.free_symbols for value in known)

    def _known(self, size: Size) -> Size:
        if isinstance(size, int) or not self._equal:
            return size
        while not isinstance(size, int):
            known = as_size(size.xreplace({symbol: sympy.sympify(same) for symbol, same in self._equal.items()}))
            if known == size:
                break
            size = known
        return size


def strip_common(left: Dim, right: Dim) -> tuple[Dim, Dim]:
    """Both products without their common ends."""
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    left, right = left[start:], right[start:]
    end = 0
    while end < min(len(left), len(right)) and left[-1 - end] == right[-1 - end]:
        end += 1
    return left[: len(left) - end], right[: len(right) - end]
