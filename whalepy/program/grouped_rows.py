"""Rows that are sorted by group, multiplied with the matrix of their group, and put back, keep their own order.

Before:  ids, order = sort(groups)
         y = grouped_mm(x[order // 2], w, offs=cumsum(histc(ids)))
         z = act(y)[inverse(order)]
After:   z = act(grouped_linear(repeat_interleave(x, 2), w, groups))

So mixtures of experts are written (transformers `grouped_mm`): which row is where after the sort depends on all rows,
and none could be cut. `grouped_linear` sorts inside, and every row of it depends on its own row alone. What lies
between the two moves must treat each row by itself; a sort of which that is not known stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from whalepy.program import functional_ops
from whalepy.program.axes import as_size
from whalepy.program.call import Call, operator_name, sizes_of
from whalepy.program.rule_table import rule_of
from whalepy.program.rules import is_whole

aten = torch.ops.aten
Build = Callable[..., fx.Node]


def unsorted(graph: fx.Graph, at: Callable[[fx.Node], Build]) -> None:
    """Rewrites every such sort of the graph; `at`: what builds operators before a node."""
    for node in list(graph.nodes):
        if node.op == "call_function" and operator_name(node.target) in ("aten.sort", "aten.argsort"):
            found = _Sorted.of(node)
            if found is not None:
                found.rewrite(at)


class _UnknownUse(Exception):
    """A value in sorted order is used in a way that may depend on the order."""


@dataclass
class _Sorted:
    """A sort of groups, i64[rows], and all that follows in its order."""

    groups: fx.Node
    order: fx.Node
    """i64[rows]: the row that stands at each place."""
    moved: set[fx.Node] = field(default_factory=set[fx.Node])
    """Values whose first dim has the rows in their sorted order."""
    ids: set[fx.Node] = field(default_factory=set[fx.Node])
    """Those that are the sorted groups."""
    gathers: list[tuple[fx.Node, int]] = field(default_factory=list[tuple[fx.Node, int]])
    """What takes rows into that order, and of how many neighbours one row stands for."""
    returns: list[fx.Node] = field(default_factory=list[fx.Node])
    """What takes them back."""
    products: list[fx.Node] = field(default_factory=list[fx.Node])

    @classmethod
    def of(cls, node: fx.Node) -> _Sorted | None:
        """What a sort does; None for one whose order may matter."""
        call = Call(node)
        groups = call["self"]
        if groups.meta["val"].ndim != 1 or groups.meta["val"].dtype.is_floating_point or call["descending"]:
            return None
        parts = {use.args[1]: use for use in node.users if use.target is operator.getitem}
        order = node if operator_name(node.target) == "aten.argsort" else parts.get(1)
        if order is None:
            return None
        made = cls(groups, order)
        if order is not node and 0 in parts:
            made.moved.add(parts[0])
            made.ids.add(parts[0])
        try:
            made._follow_order()
            made._follow_rows(node.graph)
        except _UnknownUse:
            return None
        return made if made.products and made.returns else None

    @property
    def rows(self) -> Any:
        """How many."""
        return sizes_of(self.groups.meta["val"])[0]

    # -- what the order does

    def _follow_order(self) -> None:
        inverses: list[fx.Node] = []
        for use in self.order.users:
            if _is_size(use) or _is_empty_like(use):
                continue
            if self._is_gather(use, self.order):
                self._gather(use, 1)
            elif self._is_inverse(use):
                inverses.append(use)
            elif (count := self._neighbours(use)) is not None:
                for gather in use.users:
                    if not self._is_gather(gather, use):
                        raise _UnknownUse
                    self._gather(gather, count)
            else:
                raise _UnknownUse
        for inverse in inverses:
            for use in inverse.users:
                if not self._is_gather(use, inverse):
                    raise _UnknownUse
                self.returns.append(use)

    def _gather(self, node: fx.Node, count: int) -> None:
        self.gathers.append((node, count))
        self.moved.add(node)
        if count == 1 and node.args[0] is self.groups:
            self.ids.add(node)

    def _is_gather(self, node: fx.Node, order: fx.Node) -> bool:
        """`x[order]`: of all rows of a value."""
        call = Call(node)
        return call.name == "aten.index" and list(call["indices"]) == [order] and call["self"] is not order

    def _neighbours(self, node: fx.Node) -> int | None:
        """How many rows in a row one of `x[order // count]` stands for; None for what is no such quotient."""
        if operator_name(node.target) not in ("aten.floor_divide", "aten.div") or node.args[0] is not self.order:
            return None
        if operator_name(node.target) == "aten.div" and node.kwargs.get("rounding_mode") != "floor":
            return None
        count = node.args[1]
        return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None

    def _is_inverse(self, node: fx.Node) -> bool:
        """`argsort(order)`, or 0, 1, ... written to the places that the order names."""
        name = operator_name(node.target)
        if name == "aten.argsort":
            return not Call(node)["descending"]
        if name != "aten.index_put":
            return False
        call = Call(node)
        base, counted = call["self"], call["values"]
        return (
            list(call["indices"]) == [self.order]
            and not call["accumulate"]
            and base.meta["val"].ndim == 1
            and sizes_of(base.meta["val"])[0] == self.rows
            and operator_name(counted.target) == "aten.arange"
            and [_number(Call(counted)[name]) for name in ("start", "step")] in ([0, 1], [0, 0])
            and sizes_of(counted.meta["val"])[0] == self.rows
        )

    # -- what is done with the rows

    def _follow_rows(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node in self.moved or not any(n in self.moved for n in node.all_input_nodes):
                continue
            if node in self.returns or _is_size(node):
                continue
            if node.target is operator.getitem:
                self.moved.add(node)
            elif (product := _PRODUCTS.get(operator_name(node.target))) is not None and self._is_product(node, product):
                self.moved.add(node)
                self.products.append(node)
            elif not self._sums_up(node):
                self._check_each(node)
                self.moved.add(node)
                if operator_name(node.target) == "aten.to" and node.args[0] in self.ids:
                    self.ids.add(node)
        if any(node.args[0] not in self.moved for node in self.returns):
            raise _UnknownUse
        for gather, count in self.gathers:
            source = gather.args[0]
            whole = sizes_of(source.meta["val"])[0] * count == self.rows  # type: ignore[union-attr]
            if source in self.moved or not whole:
                raise _UnknownUse

    def _check_each(self, node: fx.Node) -> None:
        """_UnknownUse unless each row of all results is made of the same row of the operands that have rows."""
        call = Call(node)
        rule = rule_of(call) if node.op == "call_function" else None
        if rule is None or any(r.ndim == 0 or sizes_of(r)[0] != self.rows for r in call.results):
            raise _UnknownUse
        if rule.flat:  # the leading dim stays, so what follows it is reshaped alone
            return
        moved = [operand in self.moved for operand in call.operands]
        first = {tokens[0] for tokens, own in zip(rule.inputs, moved, strict=True) if own and tokens}
        row = next(iter(first))
        others = [t for tokens, own in zip(rule.inputs, moved, strict=True) for t in (tokens[1:] if own else tokens)]
        others += [token for tokens in rule.outputs for token in tokens[1:]]
        each = len(first) == 1 and isinstance(row, str) and not is_whole(row) and row not in rule.kernels
        if (
            not each
            or any(row in (t if isinstance(t, tuple) else (t,)) for t in others)
            or any(t[0] != row for t in rule.outputs)
        ):
            raise _UnknownUse

    def _sums_up(self, node: fx.Node) -> bool:
        """Whether it counts, whatever the order: how many rows each group has."""
        return operator_name(node.target) == "aten.histc" and node.args[0] in self.ids

    def _is_product(self, node: fx.Node, names: Sequence[str]) -> bool:
        """Whether the rows of each group, and of all groups, are multiplied with the group's matrix."""
        call = Call(node)
        x, weight, offs = (call[name] for name in names)
        plain = call["bias"] is None and call["out_dtype"] is None
        if not plain or x not in self.moved or weight in self.moved or x.meta["val"].ndim != 2:
            return False
        return weight.meta["val"].ndim == 3 and self._ends(offs, sizes_of(weight.meta["val"])[0])

    def _ends(self, offs: Any, groups: Any) -> bool:
        """Whether these are the places at which so many groups end."""
        chain = list(_behind_casts(offs))
        if operator_name(chain[-1].target) != "aten.cumsum" or Call(chain[-1])["dim"] not in (0, -1):
            return False
        counts = list(_behind_casts(Call(chain[-1])["self"]))[-1]
        if operator_name(counts.target) != "aten.histc":
            return False
        call = Call(counts)
        given = call["bins"], call["min"], call["max"]
        return call["self"] in self.ids and given == (groups, 0, groups - 1)

    # -- the other form

    def rewrite(self, at: Callable[[fx.Node], Build]) -> None:
        """All of it in the order in which the rows came."""
        for node in self.products:
            call, product = Call(node), operator_name(node.target)
            x, weight = (call[name] for name in _PRODUCTS[product][:2])
            node.replace_all_uses_with(at(node)(functional_ops.grouped_linear, x, weight, self.groups, product))
        for node, count in self.gathers:
            source: Any = node.args[0]
            node.replace_all_uses_with(source if count == 1 else _repeated(at(node), source, count))
        for node in self.ids:
            if node.target is operator.getitem:
                node.replace_all_uses_with(self.groups)
        for node in self.returns:
            rows: Any = node.args[0]
            node.replace_all_uses_with(rows)


_PRODUCTS = {
    "transformers.grouped_mm_fallback": ("input", "weight", "offs"),
    "aten._grouped_mm": ("self", "mat2", "offs"),
}
"""Products of rows, in the order of their groups, with a matrix each: rows, matrices, and where each group ends."""


def _repeated(build: Build, x: fx.Node, count: int) -> fx.Node:
    """Every row so often, one copy behind the other."""
    apart = build(aten.unsqueeze.default, x, 1)
    rank = x.meta["val"].ndim
    copies = build(aten.expand.default, apart, [-1, count, *[-1] * (rank - 1)])
    sizes = sizes_of(x.meta["val"])
    kept = [sizes[d] if isinstance(sizes[d], int) else build(aten.sym_size.int, x, d) for d in range(1, rank)]
    return build(aten.reshape.default, copies, [-1, *kept])


def _behind_casts(node: Any) -> Iterator[fx.Node]:
    yield node
    while operator_name(node.target) == "aten.to":
        node = node.args[0]
        yield node


def _is_size(node: fx.Node) -> bool:
    return operator_name(node.target) == "aten.sym_size"


def _is_empty_like(node: fx.Node) -> bool:
    return operator_name(node.target) in ("aten.empty_like", "aten.zeros_like", "aten.ones_like")


def _number(value: Any) -> Any:
    return as_size(value.meta["val"] if isinstance(value, fx.Node) else value or 0)
