"""Which operators of a captured model draw random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whalepy.program.analysis import analyse
from whalepy.program.capture import capture


@torch.library.custom_op("whalepy_test::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


noisy.register_fake(torch.empty_like)
noisy.register_autograd(lambda ctx, grad: grad)


def written(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    y = x * 1
    write(y)
    return y


# what becomes of x, f32[4, 6] -> the operators that draw
CASES: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda x: F.dropout(x, 0.5), ["aten.dropout"]),
    (lambda x: F.dropout(x * 1, 0.5, inplace=True), ["aten.dropout"]),
    (lambda x: F.alpha_dropout(x * 1, 0.5, True, inplace=True), ["aten.alpha_dropout"]),
    (lambda x: F.dropout2d((x * 1)[..., None, None], 0.5, inplace=True), ["aten.feature_dropout"]),
    (lambda x: F.dropout(x, 0.5, training=False), []),
    (lambda x: torch.native_dropout(x, 0.5, True)[0], ["aten.native_dropout"]),
    (lambda x: F.rrelu(x * 1, training=True, inplace=True), ["aten.rrelu"]),
    (lambda x: F.gumbel_softmax(x), ["aten.exponential"]),
    (lambda x: x + torch.zeros_like(x).random_(), ["aten.random"]),
    (lambda x: x + torch.zeros_like(x).uniform_(), ["aten.uniform"]),
    (lambda x: x + torch._standard_gamma(x.detach().exp()), ["aten._standard_gamma"]),
    (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), ["aten.scaled_dot_product_attention"]),
    (lambda x: F.scaled_dot_product_attention(x, x, x), []),
    (noisy, ["whalepy_test.noisy"]),  # not torch's: nobody knows
    (lambda x: F.gelu(x) @ x.mT, []),
]


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale).sum()


@pytest.mark.parametrize(("function", "expected"), CASES)
def test_what_draws(function: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    program = analyse(capture(Applied(function), (torch.randn(4, 6),)), {})
    assert [op.target for op in program.operators if op.random] == expected
