"""The queue of weight gradients: what it holds, when it is run, and the kernels of a device's own part."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whalepy.errors import WhaleError
from whalepy.rewrite.deferring import Deferred, Queue, deferring
from whalepy.rewrite.kernels import Convolution, masked_embedding
from whalepy.rewrite.weight_gradients import Convolved, Form, LookedInShard, Product

aten = torch.ops.aten
LINEAR = Deferred(aten.linear.default, Product(0, 1, 2, transposed=True), with_bias=True)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_the_weight_waits_and_the_input_does_not() -> None:
    x, weight, bias, queue = leaf(6, 4), leaf(3, 4), leaf(3), Queue()
    with deferring(queue):
        loss = LINEAR(x, weight, bias).square().sum()
    loss.backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None and len(queue) == 1
    queue.run()
    assert weight.grad is not None and bias.grad is not None and len(queue) == 0


def test_gradients_of_microbatches_add_up_in_any_order() -> None:
    weight, bias, queues = leaf(3, 4), leaf(3), [Queue(), Queue()]
    parts = [leaf(6, 4, seed=1).detach(), leaf(2, 4, seed=2).detach()]
    for queue, part in zip(queues, parts, strict=True):
        with deferring(queue):
            LINEAR(part, weight, bias).square().sum().backward()
    for queue in reversed(queues):
        queue.run()
    late = weight.grad, bias.grad
    weight.grad = bias.grad = None
    for part in reversed(parts):
        LINEAR(part, weight, bias).square().sum().backward()
    assert weight.grad is not None and torch.equal(late[0], weight.grad) and torch.equal(late[1], bias.grad)  # type: ignore[arg-type]


def test_a_queue_adds_its_gradients_once() -> None:
    weight, queue = leaf(3, 4), Queue()
    with deferring(queue):
        LINEAR(leaf(6, 4), weight, None).sum().backward()
    queue.run()
    once = weight.grad.clone()  # type: ignore[union-attr]
    queue.run()
    assert torch.equal(once, weight.grad)  # type: ignore[arg-type]


def test_a_queue_that_was_run_takes_no_more() -> None:
    queue = Queue()
    with deferring(queue):
        loss = LINEAR(leaf(6, 4), leaf(3, 4), None).sum()
    queue.run()
    with pytest.raises(WhaleError) as raised:
        loss.backward()
    assert str(raised.value) == (
        "weight gradients of a microbatch were run before its backward pass\n"
        "  fix: give every microbatch a queue of its own, and run it after the backward pass"
    )


PLAIN: list[Any] = [
    (None, True, True),  # no queue: another schedule
    (Queue(), False, True),  # evaluation
    (Queue(), True, False),  # frozen
]


@pytest.mark.parametrize(("queue", "grad", "trained"), PLAIN)
def test_otherwise_it_is_the_operator_itself(queue: Queue | None, grad: bool, trained: bool) -> None:
    x, weight = leaf(6, 4), leaf(3, 4).requires_grad_(trained)
    with deferring(queue), torch.set_grad_enabled(grad):
        y = LINEAR(x, weight, None)
    assert "Deferring" not in repr(y.grad_fn) and torch.equal(y, aten.linear.default(x, weight))


def test_inside_is_left_when_it_fails() -> None:
    with pytest.raises(ZeroDivisionError), deferring(Queue()):
        raise ZeroDivisionError
    assert "Deferring" not in repr(LINEAR(leaf(6, 4), leaf(3, 4), None).grad_fn)


class _Noted(torch.autograd.Function):
    """The identity; keeps weak references to the gradients that pass."""

    passed: list[weakref.ref[Tensor]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        made = gradients[0] * 1
        _Noted.passed.append(weakref.ref(made.untyped_storage()))  # type: ignore[arg-type]
        return made


def test_what_waits_are_inputs_and_gradients_and_they_go_one_by_one() -> None:
    _Noted.passed.clear()
    queue, start = Queue(), leaf(6, 4)
    weights = [leaf(4, 4, seed=k) for k in range(3)]
    with deferring(queue):
        x, inputs, hidden = start, list[Any](), list[Any]()
        for weight in weights:
            x = x.tanh()
            inputs.append(weakref.ref(x.untyped_storage()))
            x = _Noted.apply(LINEAR(x, weight, None))
            squared = x.exp()  # nothing of this is needed once the backward pass went through
            hidden.append(weakref.ref(squared.untyped_storage()))
            x = squared
        x.sum().backward()
    del x, squared
    gc.collect()
    assert alive(inputs) == [True] * 3 and alive(_Noted.passed) == [True] * 3 and alive(hidden) == [False] * 3
    queue.waiting.popleft().pay()  # the last operator comes first
    assert alive(inputs) == [True, True, False] and alive(_Noted.passed) == [False, True, True]
    queue.run()
    assert alive(inputs) == alive(_Noted.passed) == [False] * 3


def alive(references: list[Any]) -> list[bool]:
    return [reference() is not None for reference in references]


def test_a_bias_behind_a_bridge_gets_its_gradient_at_once() -> None:
    x, weight, bias, queue = leaf(6, 4), leaf(3, 4), leaf(3), Queue()
    with deferring(queue):
        Deferred(LINEAR.op, LINEAR.form, with_bias=False)(x, weight, bias * 2).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((3,), 12.0)) and weight.grad is None
    queue.run()
    assert torch.equal(bias.grad, torch.full((3,), 12.0)) and weight.grad is not None


def test_a_gradient_that_never_comes_leaves_none() -> None:
    weight, queue = leaf(3, 4), Queue()
    with deferring(queue):
        y = LINEAR(leaf(6, 4), weight, None)
        _Forgotten.apply(y).sum().backward()
    queue.run()
    assert weight.grad is None


class _Forgotten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


CONV = ("stride", "padding", "dilation", "groups")
HALF = torch.arange(10).reshape(2, 5)


def embedding(*, rows: int = 4, start: int = 3, padding: int = -1) -> tuple[Callable[..., Tensor], Form, Any]:
    return masked_embedding, LookedInShard(), (leaf(rows, 3), HALF, start, padding)


def convolution(*, rows: int = 2, channels: int = 2, outputs: int = 6) -> tuple[Callable[..., Tensor], Form, Any]:
    """The channels of this device, of a convolution of 4 groups, each from one channel to three."""
    op = Convolution(aten.conv2d.default, groups_at=3)
    shape = [rows, outputs, 4, 4]
    arguments = (leaf(outputs, 1, 3, 3), leaf(outputs), [2, 2], [1, 1], [1, 1], 4)
    return op, Convolved(CONV, local=op), (shape, leaf(rows, channels, 8, 8), *arguments)


PARTS: list[Any] = [
    pytest.param(*embedding(), id="shard of a table"),
    pytest.param(*embedding(padding=4), id="with padding"),
    pytest.param(*embedding(padding=9), id="padding on another device"),
    pytest.param(*embedding(rows=0), id="no rows of the table"),
    pytest.param(*convolution(), id="groups of this device"),
    pytest.param(*convolution(rows=0), id="convolution without rows"),
    pytest.param(*convolution(channels=0, outputs=0), id="convolution without channels"),
    pytest.param(LINEAR.op, LINEAR.form, (leaf(0, 5, 4), leaf(3, 4), leaf(3)), id="product without rows"),
    pytest.param(LINEAR.op, LINEAR.form, (leaf(6, 0), leaf(3, 0), leaf(3)), id="product without a factor"),
    pytest.param(LINEAR.op, LINEAR.form, (leaf(6, 4), leaf(0, 4), leaf(0)), id="product without results"),
]


@pytest.mark.parametrize(("op", "form", "args"), PARTS)
def test_the_part_of_a_device(op: Callable[..., Tensor], form: Form, args: tuple[Any, ...]) -> None:
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    plain = op(*args)
    # gradients come also for what a mask has put to zero
    expected = torch.autograd.grad((plain + 1).square().sum(), leaves, allow_unused=True)
    queue = Queue()
    with deferring(queue):
        y = Deferred(op, form, with_bias=True)(*args)
    assert torch.equal(y, plain) and y.shape == plain.shape
    (y + 1).square().sum().backward()
    queue.run()
    for value, gradient in zip(leaves, expected, strict=True):
        found, value.grad = value.grad, None
        assert (found is None) == (gradient is None)
        assert found is None or gradient is None or torch.equal(found, gradient)
