"""Bridges at run time: a value changes its type on one level, and its gradient changes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalepy.rewrite.deferring import Queue, current_queue
from whalepy.runtime.groups import Group, Pending
from whalepy.runtime.kernels import Kind, Shard, convert, start_convert
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
        seen = self._seen(x)
        if seen is None:
            return convert(x, self.source, self.target, self.group)
        return _noted(_Moved.apply(seen, self, current_queue()))

    def start(self, x: Tensor) -> Started:
        """The same on its way, until `finish`. Its gradient sets out where `finish` stands and is waited for here."""
        seen = self._seen(x)
        if seen is None:
            return Started(Flight(start_convert(x, self.source, self.target, self.group)), None)
        flight = Flight()
        return Started(flight, _Started.apply(seen, self, flight, current_queue()))  # pyright: ignore[reportArgumentType]

    def finish(self, started: Started) -> Tensor:
        """The value as `target`, once it is there."""
        flight, token = started
        return flight.taken().done() if token is None else _noted(_Finished.apply(token, self, flight))

    def _seen(self, x: Tensor) -> Tensor | None:
        """The value as autograd has to see it; None: no gradient takes another way than the value."""
        if not torch.is_grad_enabled() or (self.is_retype and self._keeps_gradient):
            return None
        if current_reach() is not None and self.learns and not x.requires_grad:
            return x.detach().requires_grad_()
        return x if x.requires_grad else None

    def _start_gradient(self, gradient: Tensor) -> Pending:
        return start_convert(gradient, self.gradient_source, self.gradient_target, self.group)

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


@dataclass(eq=False)
class Flight:
    """What of a bridge is on its way: first the value, in the backward pass its gradient."""

    pending: Pending | None = None

    def taken(self) -> Pending:
        """What is on its way; the flight lets go of it."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending


class Started(NamedTuple):
    """A bridge between `start` and `finish`; autograd goes by the token, None where there is nothing for it to do."""

    flight: Flight
    token: Tensor | None

    def left(self) -> tuple[Pending, Tensor]:
        """A number on its way, and what the backward pass begins at in its place. Its gradient takes no other way."""
        pending = self.flight.taken()
        return pending, torch.empty(()) if self.token is None else self.token


def _noted(result: Any) -> Tensor:
    reach = current_reach()
    if reach is not None:
        reach.note(result)
    return result


def _waited(pending: Pending, queue: Queue | None) -> Tensor:
    """A gradient once it is there; weight gradients that wait for such an opportunity are computed until then."""
    if queue is not None and pending.work is not None:
        queue.use_wait()
    return pending.done()


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, queue: Queue | None) -> Tensor:
        ctx.move, ctx.queue = move, queue
        return convert(x, move.source, move.target, move.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _waited(ctx.move._start_gradient(gradients[0]), ctx.queue), None, None


class _Started(torch.autograd.Function):
    """Its result is a token; the value, and later the gradient, are in the flight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, flight: Flight, queue: Queue | None) -> Tensor:
        ctx.flight, ctx.queue = flight, queue
        # What the other half gives is told of by its own history, though it may share the memory of the value.
        flight.pending = start_convert(x.detach(), move.source, move.target, move.group)
        return x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.flight.pending is None:  # no other half: its gradient stays as it is, and came to the token
            return gradients[0], None, None, None
        return _waited(ctx.flight.taken(), ctx.queue), None, None, None


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, move: Move, flight: Flight) -> Tensor:
        ctx.move, ctx.flight = move, flight
        return flight.taken().done()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        ctx.flight.pending = ctx.move._start_gradient(gradient)
        return gradient.new_zeros(()), None, None
