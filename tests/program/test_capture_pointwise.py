"""Which functions with a backward of their own treat every element alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whalepy.program.capture_pointwise import is_pointwise

X, Y = torch.rand(8, 6, requires_grad=True), torch.rand(8, 6, requires_grad=True)


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of a function whose backward gets its tensors and the gradients."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.args = args
            return forward(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(*ctx.args, *grads)

    return Made.apply


# function, arguments -> whether it treats every element alike
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], bool]] = {
    "straight through": (function(torch.round, lambda x, g: g), (X,), True),
    "two operands and a number": (
        function(lambda x, y, c: x * y + c, lambda x, y, c, g: (g * y, g * x, None)),
        (X, Y, 2.0),
        True,
    ),
    "two results": (function(lambda x: (x.sin(), x.exp()), lambda x, g, h: g * x.cos() + h * x.exp()), (X,), True),
    "a sum": (function(lambda x: x * x.sum(), lambda x, g: g * x.sum()), (X,), False),
    "a row": (function(lambda x: x.softmax(-1), lambda x, g: g), (X,), False),
    "a gradient that counts rows": (function(lambda x: x * 1, lambda x, g: g / len(x)), (X,), False),
    "a gradient that sums": (function(lambda x: x * 1, lambda x, g: g * g.sum()), (X,), False),
    "noise": (function(lambda x: x * torch.rand_like(x), lambda x, g: g), (X,), False),
    "filled by others": (
        function(lambda x: torch.from_numpy(x.detach().numpy() * 2), lambda x, g: g * 2 + torch.empty_like(g) * 0),
        (X,),
        False,
    ),
    "another shape": (function(lambda x: x[:, :1] * 1, lambda x, g: g.expand_as(x)), (X,), False),
    "operands that broadcast": (function(lambda x, y: x * y, lambda x, y, g: (g * y, None)), (X, torch.rand(6)), False),
    "whole numbers": (function(lambda x: x * 1, lambda x, g: g), (torch.arange(6),), False),
    "what fails": (function(lambda x: x.view(8, 6) * 1, lambda x, g: g), (X,), False),
}


@pytest.mark.parametrize(("apply", "args", "expected"), CASES.values(), ids=CASES)
def test_is_pointwise(apply: Callable[..., Any], args: tuple[Any, ...], expected: bool) -> None:
    assert is_pointwise(apply, args) == expected
