"""Operators whose weight gradients wait: the backward pass gives the gradient of the input and queues the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalepy.errors import WhaleError
from whalepy.rewrite.weight_gradients import Form


@dataclass(frozen=True)
class Owed:
    """The weight gradient of one call: it holds the input of the call and the gradient of its result, nothing else."""

    form: Form
    x: Tensor
    gradient: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: tuple[Any, ...]

    def pay(self) -> None:
        """Add the gradients to those of the leaves, as the backward pass itself would have done.

        Weight and bias are leaves or views of leaves. There is no bridge behind them, so that this walk of autograd
        crosses none a second time.
        """
        owners = [self.weight] if self.bias is None else [self.weight, self.bias]
        with torch.no_grad():
            gradients = self.form.of_weights(self.gradient, self.x, self.weight, self.bias, self.rest)
        torch.autograd.backward(owners, gradients)


@dataclass
class Queue:
    """The weight gradients of one microbatch, filled by its backward pass in the order of that pass."""

    waiting: deque[Owed] = field(default_factory=deque[Owed])
    was_run: bool = False
    uses_waits: bool = False
    """Whether its weight gradients are computed as soon as the backward pass waits for a bridge."""

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, owed: Owed) -> None:
        """WhaleError: the queue was run already, and nobody would run it again."""
        if self.was_run:
            raise WhaleError(
                "weight gradients of a microbatch were run before its backward pass",
                fix="give every microbatch a queue of its own, and run it after the backward pass",
            )
        self.waiting.append(owed)

    def run(self) -> None:
        """Add every weight gradient to its leaf; each lets go of what it held as soon as it is done. Once."""
        self.was_run = True
        self._pay()

    def use_wait(self) -> None:
        """The backward pass waits for a bridge: those that are there may be computed."""
        if self.uses_waits:
            self._pay()

    def _pay(self) -> None:
        while self.waiting:
            self.waiting.popleft().pay()


_QUEUE: ContextVar[Queue | None] = ContextVar("queue", default=None)


def current_queue() -> Queue | None:
    """The queue of what is computed now; None: weight gradients do not wait."""
    return _QUEUE.get()


@contextmanager
def deferring(queue: Queue | None) -> Generator[None]:
    """The backward pass of what is computed inside puts its weight gradients on the queue; None: it computes them."""
    token = _QUEUE.set(queue)
    try:
        yield
    finally:
        _QUEUE.reset(token)


@dataclass(frozen=True)
class Deferred:
    """An operator whose weight gradient waits where a queue is given; anywhere else it is the operator itself."""

    op: Callable[..., Tensor]
    form: Form
    with_bias: bool
    """The gradient of the bias waits as well; otherwise the backward pass gives it at once."""

    @property
    def __name__(self) -> str:
        return f"deferred_{getattr(self.op, '__name__', 'op').replace('.', '_')}"

    def __call__(self, *args: Any) -> Tensor:
        queue = _QUEUE.get()
        x, weight = args[self.form.x], args[self.form.weight]
        if queue is None or not weight.requires_grad or not (x.numel() and weight.numel()):
            return self.op(*args)
        return _Deferring.apply(self, queue, args, x, weight, self.bias(args))  # pyright: ignore[reportReturnType]

    def bias(self, args: tuple[Any, ...]) -> Tensor | None:
        """The bias of a call."""
        at = self.form.bias
        return args[at] if at is not None and at < len(args) else None


class _Deferring(torch.autograd.Function):
    """The weight is an operand, though it gets no gradient here: what reaches it on one rank reaches it on all."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Deferred,
        queue: Queue,
        args: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)
        ctx.call, ctx.queue = call, queue
        ctx.rest = tuple(None if isinstance(arg, Tensor) else arg for arg in args)
        return call.op(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, call, nothing = gradients[0], ctx.call, (None,) * 6
        if gradient is None:
            return nothing
        x, weight, bias = ctx.saved_tensors
        waits = call.with_bias and bias is not None and bias.requires_grad
        ctx.queue.add(Owed(call.form, x.detach(), gradient, weight, bias if waits else None, ctx.rest))
        of_x = call.form.of_input(gradient, x, weight, ctx.rest) if ctx.needs_input_grad[3] else None
        now = ctx.needs_input_grad[5] and not waits
        return *nothing[:3], of_x, None, call.form.of_bias(gradient, bias) if now else None
