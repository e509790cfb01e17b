"""What torch settles without asking, since a capture takes every free size to be at least 2: cuts and squeezes.

`x[:2]` of free rows comes out with 2 rows, and `squeeze` keeps a free dim; of one row, both do otherwise. As conditions
of the capture they are like branches of the user's code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Sizes = tuple[int | torch.SymInt, ...]

_SQUEEZES = (torch.squeeze, Tensor.squeeze, Tensor.squeeze_)


def settled(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[sympy.Basic]:
    """The conditions on free sizes under which a call of torch does what it did in the capture."""
    if func is Tensor.__getitem__:
        yield from _long_enough(args[0].shape, args[1])
    # Where one dim is left, a tensor of one element and a scalar are as good in what follows.
    elif func in _SQUEEZES and isinstance(result, Tensor) and result.dim() > 1:
        yield from (sympy.Ne(size.node.expr, 1) for size in _squeezed(*args, **kwargs) if _is_free(size))


def _is_free(size: int | torch.SymInt) -> TypeGuard[torch.SymInt]:
    """Whether a size follows the inputs."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _long_enough(shape: Sizes, index: Any) -> Iterator[sympy.Basic]:
    """Per free dim that an index cuts: it has all elements that the cut counts from its ends."""
    for size, item in _by_dim(shape, index if isinstance(index, tuple) else (index,)):
        if _is_free(size) and isinstance(item, slice):
            needed = _needed(item.start, item.stop)
            if needed > 1 and statically_known_true(size >= needed):  # else export asks, and keeps the answer
                yield sympy.Ge(size.node.expr, needed)


def _by_dim(shape: Sizes, items: tuple[Any, ...]) -> Iterator[tuple[int | torch.SymInt, Any]]:
    """The dims of a tensor, each with what an index says of it; those that it does not name are left out."""
    rest = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    ahead, behind = _over_dims(items[:rest]), _over_dims(items[rest + 1 :])
    yield from zip(shape, ahead, strict=False)
    yield from zip(reversed(shape), reversed(behind), strict=False)


def _over_dims(items: tuple[Any, ...]) -> list[Any]:
    """One entry per dim that the items read: none for None, several for a mask."""
    return list(itertools.chain.from_iterable([item] * _dims_of(item) for item in items))


def _dims_of(item: Any) -> int:
    if item is None or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _needed(start: Any, stop: Any) -> int:
    """The elements from which on a cut comes out by one formula."""
    first, last = (bound if type(bound) is int else 0 for bound in (start, stop))
    return first - last if first > 0 > last else max(abs(first), abs(last))


def _squeezed(tensor: Tensor, dim: Any = None) -> Iterator[int | torch.SymInt]:
    dims = range(tensor.dim()) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    return (tensor.shape[d] for d in dims)
