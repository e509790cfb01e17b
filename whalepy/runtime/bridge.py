"""Bridges at run time: a value changes its type on one level, and its gradient changes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import Kind, Shard, convert
from whalepy.runtime.reach import current_reach

# "R": replicated, gradient replicated. "B": replicated, gradient partial. "P": partial, gradient replicated.
# A Shard: both sharded.
Type: TypeAlias = Literal["R", "B", "P"] | Shard

_VALUE: dict[str, Kind] = {"R": "R", "B": "R", "P": "P"}
_GRADIENT: dict[str, Kind] = {"R": "R", "B": "P", "P": "R"}


@dataclass(frozen=True)
class Move:
    """A value goes from `source` to `target`; its gradient comes as `gradient_source`, goes on as `gradient_target`.

    Forward and backward are one conversion each over the group: no collective is differentiated by torch.
    """

    group: Group
    source: Kind
    target: Kind
    gradient_source: Kind
    gradient_target: Kind
    learns: bool = True
    """Whether a gradient can come back: a trainable parameter stands behind the value."""

    @property
    def is_retype(self) -> bool:
        """Whether the forward moves nothing: the result shares the memory of the argument."""
        return self.source == self.target or self.group.size == 1

    def __call__(self, x: Tensor) -> Tensor:
        """The value as `target`. A gradient that does not arrive is zero, so that all ranks communicate alike."""
        if not torch.is_grad_enabled() or (self.is_retype and self._keeps_gradient):
            return convert(x, self.source, self.target, self.group)
        reach = current_reach()
        if reach is not None and self.learns and not x.requires_grad:
            x = x.detach().requires_grad_()
        if not x.requires_grad:
            return convert(x, self.source, self.target, self.group)
        result: Tensor = _Moved.apply(x, self)
        if reach is not None:
            reach.note(result)
        return result

    @property
    def _keeps_gradient(self) -> bool:
        return self.gradient_source == self.gradient_target or self.group.size == 1


def move_between(source: Type, target: Type, group: Group, *, learns: bool = True) -> Move:
    """The bridge from one type to another on the level of the group."""
    kinds = value_kind(source), value_kind(target), gradient_kind(target), gradient_kind(source)
    return Move(group, *kinds, learns)


def value_kind(kind: Type) -> Kind:
    """How a value of this type lies over the level."""
    return kind if isinstance(kind, Shard) else _VALUE[kind]


def gradient_kind(kind: Type) -> Kind:
    """How the gradient of a value of this type lies over the level."""
    return kind if isinstance(kind, Shard) else _GRADIENT[kind]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move) -> Tensor:
        ctx.move = move
        return convert(x, move.source, move.target, move.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        move: Move = ctx.move
        return convert(gradients[0], move.gradient_source, move.gradient_target, move.group), None
