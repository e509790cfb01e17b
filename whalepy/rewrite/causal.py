"""Attention whose mask says only that no query reads a later key: fused kernels then skip half of the scores.

Before:  mask = le(keys, queries); scaled_dot_product_attention(q, k, v, mask)        positions that count 0, 1, ...
After:   scaled_dot_product_attention(q, k, v, is_causal=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from whalepy.program.call import Call, sizes_of
from whalepy.program.layout import Layout, Sharded

_SPREADS = frozenset(
    ("aten.expand", "aten.unsqueeze", "aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.alias")
)
_NO_LATER = {"aten.le": (0, 1), "aten.ge": (1, 0)}
"""Comparisons with which of their operands are the keys and the queries."""


def is_causal(mask: Any) -> bool:
    """Whether a mask of as many queries as keys, both from position 0, admits just the keys up to each query."""
    if not isinstance(mask, fx.Node) or mask.op != "call_function":
        return False
    value, call = mask.meta.get("val"), Call(mask)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.ndim < 2:
        return False
    if call.name in _SPREADS:
        source = call.operands[0]
        before = source.meta.get("val")
        same = isinstance(before, torch.Tensor) and sizes_of(before)[-2:] == sizes_of(value)[-2:]
        return same and is_causal(source)
    if call.name not in _NO_LATER or len(call.operands) != 2:
        return False
    keys, queries = (call.operands[k] for k in _NO_LATER[call.name])
    rows, columns = sizes_of(value)[-2:]
    return rows == columns and _counts(keys, 1) and _counts(queries, 2)


def _counts(node: fx.Node, dim: int) -> bool:
    """Whether it counts 0, 1, ... along this dim from the end."""
    return "iota" in node.meta and node.meta["iota"] == node.meta["val"].ndim - dim


def positions_whole(operands: Sequence[Layout], ranks: Sequence[int]) -> bool:
    """Whether no level cuts queries, keys, or the mask along them."""
    cut = (
        (k, kind.place.dim - rank)
        for k, (layout, rank) in enumerate(zip(operands, ranks, strict=True))
        for kind in layout
        if isinstance(kind, Sharded)
    )
    return not any(dim == -2 or (k == 3 and dim == -1) for k, dim in cut)


def without_mask(node: fx.Node) -> None:
    """The same attention of a new graph, told that it is causal instead of a mask."""
    names = [argument.name for argument in torch.ops.aten.scaled_dot_product_attention.default._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given.pop(name) for name in names[:3])
    given.pop("attn_mask")
    node.args = (query, key, value)
    node.kwargs = {**given, "is_causal": True}
