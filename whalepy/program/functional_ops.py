"""Operators that torch has in another form only, as targets of call_function nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.batch_norm in training: the result, the new running mean and the new running variance."""
    mean, var = running_mean.detach().clone(), running_var.detach().clone()
    y = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn)
    return y, mean, var


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.instance_norm with input statistics: the result, the new running mean and the new running variance."""
    mean, var = running_mean.detach().clone(), running_var.detach().clone()
    y = torch.instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn)
    return y, mean, var


def bags(table: Tensor, rows: Tensor, mean: bool) -> Tensor:
    """The sum, or the mean, of the rows of a table that each row of `rows`, i64[bags, length], names."""
    return F.embedding_bag(rows, table, mode="mean" if mean else "sum")


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return x[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None


def _permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """The rows of x in another order, `back` the way back: its gradient is moved, where an index would add it up."""
    return _Permuted.apply(x, order, back)  # pyright: ignore[reportReturnType]


def grouped_linear(x: Tensor, weight: Tensor, groups: Tensor, product: str) -> Tensor:
    """Each row of x, f[rows, in], by the matrix of its group, of f[groups, in, out]: f[rows, out].

    `groups`: i64[rows]. `product`: the operator that multiplies rows in the order of their groups, `library.name`.
    """
    library, name = product.split(".")
    ids, order = torch.sort(groups)
    ends = torch.searchsorted(ids, torch.arange(weight.size(0), device=ids.device), right=True, out_int32=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.size(0), device=order.device)
    rows, matrices = _permuted(x, order, places), weight
    unit = 16 // x.element_size()
    inner, outer = -weight.size(1) % unit, -weight.size(2) % unit
    if library == "aten" and inner + outer:  # its kernel on cards wants rows that start at multiples of 16 bytes
        rows, matrices = F.pad(rows, (0, inner)), F.pad(matrices, (0, outer, 0, inner))
    found = getattr(getattr(torch.ops, library), name)(rows, matrices, offs=ends)
    return _permuted(found[:, : weight.size(2)] if library == "aten" else found, places, order)


class _CarryGradient(torch.autograd.Function):
    @staticmethod
    def forward(history: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def carry_gradient(history: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `history` unchanged: a write that autograd did not see."""
    return _CarryGradient.apply(history, value)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class WritesReturned:
    """A pure form of any operator: it works on copies of what it writes to, and returns them after its results."""

    op: Callable[..., Any]
    written: tuple[int, ...]  # positions of the arguments it writes to

    @property
    def __name__(self) -> str:
        return f"{getattr(self.op, '__name__', 'op').replace('.', '_')}_returned"

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = [arg.clone() if i in self.written and arg is not None else arg for i, arg in enumerate(args)]
        results = self.op(*given, **kwargs)
        several = results if isinstance(results, (tuple, list)) else () if results is None else (results,)
        return (*several, *(given[i] for i in self.written))


def first_only(x: Tensor) -> Tensor:
    """A term of the loss that does not depend on rows: it counts in the first microbatch of a step only."""
    return x


def known_size() -> int:
    """A number that follows from the sizes of the inputs; rewriting puts it in, nothing runs this."""
    raise NotImplementedError
