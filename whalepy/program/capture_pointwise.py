"""Whether a torch.autograd.Function treats every element alike, forward and backward: then it can be cut anywhere.

It is run on a few numbers. Only operators that are known to be elementwise may be called, and parts of the arguments
must give the same parts of the results and of the gradients: a number that depends on the shape, such as the mean over
rows, would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from whalepy.program.call import operator_name, sizes_of
from whalepy.program.rules_pointwise import BINARY, MORE, UNARY

_SIZES = (4, 3, 5, 3, 4, 3)
_KNOWN = (UNARY | BINARY | MORE | {"aten.ones_like", "aten.zeros_like"}) - {"aten.empty_like"}
"""What fills an empty tensor may be no operator of torch."""


def is_pointwise(apply: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether `apply` gives, for tensors like these, results of their one shape, element by element."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    shapes = {sizes_of(tensor) for tensor in tensors}
    floating = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    if len(shapes) != 1 or not floating or not 0 < tensors[0].ndim <= len(_SIZES):
        return False
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return _parts_agree(apply, args)


def _parts_agree(apply: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    draw = torch.Generator().manual_seed(0)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    shape = _SIZES[: tensors[0].ndim]
    values = [torch.rand(shape, generator=draw, dtype=t.dtype) + 0.25 for t in tensors]
    weight = torch.rand(math.prod(shape), generator=draw, dtype=torch.float64)

    def run(part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        remaining = iter(part(v).clone().requires_grad_(t.requires_grad) for v, t in zip(values, tensors, strict=True))
        own = [next(remaining) if isinstance(arg, Tensor) else arg for arg in args]
        return _results(apply, own, part(weight.view(shape)))

    try:
        with _OnlyKnown() as seen:
            whole = run(lambda value: value)
            halves = [(part, run(part)) for part in _parts(shape)]
    except Exception:  # it wants other numbers than these
        return False
    if not seen.known or any(value.shape != shape for value in whole):
        return False
    return all(
        len(own) == len(whole) and all(_same(a, part(b)) for a, b in zip(own, whole, strict=True))
        for part, own in halves
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)


def _parts(shape: tuple[int, ...]) -> Iterable[Callable[[Tensor], Tensor]]:
    """The first index along each dim, and the others."""
    for dim, size in enumerate(shape):
        yield lambda value, dim=dim: value.narrow(dim, 0, 1)
        yield lambda value, dim=dim, size=size: value.narrow(dim, 1, size - 1)


def _results(apply: Callable[..., Any], args: list[Any], weight: Tensor) -> list[Tensor]:
    """Results, and the gradients of their sum with these weights."""
    with torch.enable_grad():
        outputs = [leaf for leaf in pytree.tree_leaves(apply(*args)) if isinstance(leaf, Tensor)]
    learning = [output for output in outputs if output.requires_grad]
    sources = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if not learning or not sources:
        return outputs
    weights = [weight.to(output.dtype) for output in learning]
    return [*outputs, *torch.autograd.grad(learning, sources, weights, allow_unused=True, materialize_grads=True)]


class _OnlyKnown(TorchDispatchMode):
    """Sees whether an operator is called that is not known to be elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.known = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operator_name(func)
        self.known &= name in _KNOWN or name.removesuffix("_") in _KNOWN or name in _OF_THE_PROBE
        return func(*args, **(kwargs or {}))


_OF_THE_PROBE = {"aten.slice", "aten.narrow", "aten.view", "aten.detach"}
