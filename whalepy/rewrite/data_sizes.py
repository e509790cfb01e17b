"""Sizes that only the data tell, such as the number of rows that a mask keeps, computed in the graph.

Before:  reshape(index(x, mask), [s0, u0 // s0, 32])       u0: how many elements of the mask are true
After:   n = sym_size(index_1, 0); reshape(index_1, [total_0, n // total_0, 32])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from whalepy.errors import PlanError
from whalepy.program.axes import as_size
from whalepy.program.call import results, sizes_of
from whalepy.rewrite.bindings import GlobalSize

if TYPE_CHECKING:
    from whalepy.rewrite.rewrite import Rewriter


def size_from_data(rewriter: Rewriter, size: sympy.Expr) -> fx.Node:
    """The node of the new graph that computes `size`. PlanError: no value computed so far tells it."""
    known = _symbol_of(rewriter, size)
    if known is not None:
        return known
    tracer = GraphAppendingTracer(rewriter.graph)
    values: dict[Any, Any] = {}
    for symbol in sorted(size.free_symbols, key=str):
        values[symbol] = fx.Proxy(_value_of(rewriter, symbol), tracer)
    made: Any = sympy_interp(PythonReferenceAnalysis, values, size)
    return made.node


def _value_of(rewriter: Rewriter, symbol: Any) -> fx.Node:
    if symbol in rewriter.program.hints:
        return rewriter.bind(GlobalSize(symbol, False))
    found = _symbol_of(rewriter, symbol) or _dim_of(rewriter, symbol)
    if found is None:
        raise PlanError(f"a size that depends on data ({symbol}) is not known to the graph")
    return found


def _symbol_of(rewriter: Rewriter, size: sympy.Expr) -> fx.Node | None:
    """A number of the captured graph that has this value."""
    for node in rewriter.program.captured.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and as_size(value) == size:
            return rewriter.number(node)
    return None


def _dim_of(rewriter: Rewriter, symbol: Any) -> fx.Node | None:
    """The length of a dim that is as long as this; no level cuts it."""
    for (i, r), made in rewriter.made.items():
        sizes = sizes_of(results(rewriter.program.nodes[i])[r]) if rewriter.program.nodes[i].op != "output" else ()
        if symbol in sizes:
            new = rewriter.graph.call_function(torch.ops.aten.sym_size.int, (made, sizes.index(symbol)))
            new.meta["val"] = results(rewriter.program.nodes[i])[r].shape[sizes.index(symbol)]
            return new
    return None
