"""Writes through one view as pure operators: the viewed tensor with the view replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from whalepy.errors import CaptureError
from whalepy.program.capture_gradients import OVERWRITES, is_differentiable
from whalepy.program.functional_ops import carry_gradient

aten = torch.ops.aten


class Emit(Protocol):
    """Adds a call to the graph being built and returns its node, meta["val"] included."""

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node: ...


@dataclass(frozen=True)
class Step:
    """One view: the operator, its arguments, where the viewed tensor stands among them, and which of its results."""

    op: Callable[..., Any]
    path: tuple[int, ...]  # (0,) for the first argument, (0, 1) for the second member of a list
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None

    def apply(self, emit: Emit, viewed: fx.Node) -> fx.Node:
        """The view of `viewed`."""
        result = emit(self.op, *_replaced(self.args, self.path, viewed), **self.kwargs)
        return result if self.index is None else emit(operator.getitem, result, self.index)

    @property
    def detaches(self) -> bool:
        """Whether the view has no part in the gradient of what it views."""
        return self.op is aten.detach.default

    def arg(self, position: int, name: str, default: Any) -> Any:
        """One argument of the operator."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def _replaced(values: Sequence[Any], path: tuple[int, ...], new: Any) -> tuple[Any, ...]:
    inner = new if len(path) == 1 else list(_replaced(values[path[0]], path[1:], new))
    return (*values[: path[0]], inner, *values[path[0] + 1 :])


def scatter(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    """`viewed` after `new` was written to its view.

    Before: `v = step(viewed); v.copy_(new)`   After: `slice_scatter(viewed, new, ...)`, or what fits the step
    """
    if step.detaches:
        return carried(emit, viewed, new)
    rule = _SCATTERS.get(step.op) if step.path == (0,) else None
    if rule is not None:
        return rule(emit, step, viewed, new)
    if same_shape(viewed.meta["val"], new.meta["val"]) and step.op in _IDENTITIES:
        return new
    return _scatter_by_index(emit, step, viewed, new)


def carried(emit: Emit, history: fx.Node, value: fx.Node) -> fx.Node:
    """`value` with the gradient of `history`, where there can be one."""
    return emit(carry_gradient, history, value) if history.meta["val"].is_floating_point() else value


def overwritten(emit: Emit, old: fx.Node, value: fx.Node) -> fx.Node:
    """`value`, written over all of `old`: autograd gives what `old` depends on a gradient of zeros, and not none."""
    if not is_differentiable(old.meta["val"]):
        return value
    always = emit(aten.full.default, [], True, dtype=torch.bool, device=old.meta["val"].device)
    written = emit(aten.where.self, always, value, old)
    written.meta[OVERWRITES] = True
    return written


def sizes(emit: Emit, node: fx.Node) -> list[int | fx.Node]:
    """The shape of `node` as arguments: numbers, and sym_size nodes where it is free."""
    shape = node.meta["val"].shape
    return [size if isinstance(size, int) else emit(aten.sym_size.int, node, dim) for dim, size in enumerate(shape)]


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the shapes are the same expressions; never adds a guard."""
    return len(a.shape) == len(b.shape) and all(map(_same_size, a.shape, b.shape))


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.expr == b.node.expr
    return type(a) is type(b) and a == b


def _reshaped(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    if same_shape(viewed.meta["val"], new.meta["val"]):
        return new
    return emit(aten.reshape.default, new, sizes(emit, viewed))


def _transposed(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.transpose.int, new, step.args[1], step.args[2])


def _t(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.t.default, new)


def _permuted(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    rank = len(step.args[1])
    order = [dim % rank for dim in step.args[1]]
    return emit(aten.permute.default, new, [order.index(dim) for dim in range(rank)])


def _unsqueezed(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.squeeze.dim, new, step.args[1])


def _sliced(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    if same_shape(viewed.meta["val"], new.meta["val"]):
        return new  # the whole of it
    return emit(aten.slice_scatter.default, viewed, new, *step.args[1:], **step.kwargs)


def _narrowed(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    _, dim, start, length = step.args
    return emit(aten.slice_scatter.default, viewed, new, dim, start, _sum(emit, start, length))


def _selected(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.select_scatter.default, viewed, new, *step.args[1:])


def _unbound(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.select_scatter.default, viewed, new, step.arg(1, "dim", 0), step.index)


def _diagonal(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.diagonal_scatter.default, viewed, new, *step.args[1:], **step.kwargs)


def _piece(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    """A piece of split, split_with_sizes or chunk: it begins where those before it end."""
    dim = step.arg(2, "dim", 0)
    pieces = emit(step.op, viewed, *step.args[1:], **step.kwargs)
    start: int | fx.Node = 0
    for i in range(step.index or 0):
        start = _sum(emit, start, sizes(emit, emit(operator.getitem, pieces, i))[dim])
    return emit(aten.slice_scatter.default, viewed, new, dim, start, _sum(emit, start, sizes(emit, new)[dim]))


def _sum(emit: Emit, a: int | fx.Node, b: int | fx.Node) -> int | fx.Node:
    return a + b if isinstance(a, int) and isinstance(b, int) else emit(operator.add, a, b)


def _viewed_as(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.view.dtype, new, viewed.meta["val"].dtype)


def _as_complex(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.view_as_complex.default, emit(aten.contiguous.default, new))


def _as_real(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.view_as_real.default, new)


def _scatter_by_index(emit: Emit, step: Step, viewed: fx.Node, new: fx.Node) -> fx.Node:
    """Any other view: the same view of the flat positions says where the elements of `new` go."""
    old, written = viewed.meta["val"], new.meta["val"]
    if old.dtype != written.dtype or old.is_complex():
        raise CaptureError(
            f"a write through the view {step.op} has no pure form",
            at=new.meta.get("where"),
            fix="write the pure form: a result instead of a write",
        )
    shape = sizes(emit, viewed)
    count: int | fx.Node = 1
    for size in shape:
        count = count * size if isinstance(count, int) and isinstance(size, int) else emit(operator.mul, count, size)
    positions = emit(aten.arange.default, count, device=viewed.meta["val"].device)
    chosen = step.apply(emit, emit(aten.reshape.default, positions, shape))
    flat = emit(aten.reshape.default, viewed, [-1])
    places = emit(aten.reshape.default, chosen, [-1])
    put = emit(aten.index_put.default, flat, [places], emit(aten.reshape.default, new, [-1]))
    return emit(aten.reshape.default, put, shape)


_IDENTITIES = (
    aten.alias.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.other,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.expand.default,
    aten.expand_as.default,
)
_SCATTERS: dict[Any, Callable[[Emit, Step, fx.Node, fx.Node], fx.Node]] = {
    aten.transpose.int: _transposed,
    aten.t.default: _t,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    aten.slice.Tensor: _sliced,
    aten.narrow.default: _narrowed,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    aten.diagonal.default: _diagonal,
    aten.split.Tensor: _piece,
    aten.split_with_sizes.default: _piece,
    aten.split.sizes: _piece,
    aten.chunk.default: _piece,
    aten.view.dtype: _viewed_as,
    aten.view_as_real.default: _as_complex,
    aten.view_as_complex.default: _as_real,
    **dict.fromkeys(
        (
            aten.view.default,
            aten.view_as.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.reshape_as.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
        ),
        _reshaped,
    ),
}
