"""FLOPs and sizes of an operator at the example's sizes, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.program.axes import Size, evaluate
from whalepy.program.call import Call, sizes_of


def hint(size: Size, hints: Mapping[sympy.Symbol, int]) -> int:
    """A size at the example inputs."""
    return evaluate(size, hints)


def hinted(sizes: Sequence[Size], hints: Mapping[sympy.Symbol, int]) -> int:
    """Number of elements at the example inputs."""
    return prod(hint(size, hints) for size in sizes)


def with_unknown(graph: fx.Graph, hints: Mapping[sympy.Symbol, int]) -> Mapping[sympy.Symbol, int]:
    """`hints`, and a guess for every size that only the data tell: the largest of the others."""
    guess = max(hints.values(), default=1)
    values = (value for node in graph.nodes for value in pytree.tree_leaves(node.meta.get("val")))
    sizes = (size for value in values if isinstance(value, torch.Tensor) for size in sizes_of(value))
    found = {symbol for size in sizes for symbol in getattr(size, "free_symbols", ())}
    return {**dict.fromkeys(found - hints.keys(), guess), **hints}


def _contraction(left: int, dim: int = -1) -> Callable[[Call, Mapping[sympy.Symbol, int]], int]:
    def count(call: Call, hints: Mapping[sympy.Symbol, int]) -> int:
        out = hinted(sizes_of(call.results[0]), hints)
        return 2 * out * hint(call.sizes(left)[dim], hints)

    return count


def _attention(call: Call, hints: Mapping[sympy.Symbol, int]) -> int:
    query, key, value = (call.sizes(i) for i in range(3))
    scores = hinted(query[:-1], hints) * hint(key[-2], hints)
    return 2 * scores * (hint(query[-1], hints) + hint(value[-1], hints))


def _convolution(call: Call, hints: Mapping[sympy.Symbol, int]) -> int:
    weight = call.sizes(1)
    return 2 * hinted(sizes_of(call.results[0]), hints) * hinted(weight[1:], hints)


_COUNT: dict[str, Callable[[Call, Mapping[sympy.Symbol, int]], int]] = {
    "aten.linear": _contraction(0),
    "aten.mm": _contraction(0),
    "aten.bmm": _contraction(0),
    "aten.matmul": _contraction(0),
    "aten.addmm": _contraction(1),
    "aten.baddbmm": _contraction(1),
    "whalepy.program.functional_ops.grouped_linear": _contraction(0),
    "aten.scaled_dot_product_attention": _attention,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
}


PRODUCTS = frozenset(_COUNT)
"""Operators whose FLOPs are those of products."""


def flops_of(call: Call, hints: Mapping[sympy.Symbol, int]) -> int:
    """Multiply-adds count two; operators that only move or combine elements count one per result element."""
    if not call.results:
        return 0
    if call.name in _COUNT:
        return _COUNT[call.name](call, hints)
    return sum(hinted(sizes_of(result), hints) for result in call.results)
