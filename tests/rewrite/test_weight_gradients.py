"""Gradients of one operand at a time lie in memory as torch's own, and read no row that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from whalepy.rewrite.weight_gradients import Convolved, LookedInShard, Product, pads_evenly

aten = torch.ops.aten


def by_columns(rows: int, columns: int) -> Tensor:
    return torch.randn(columns, rows).t().requires_grad_()


def by_rows(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).requires_grad_()


LAID: list[Any] = [(x, weight) for x in (by_rows, by_columns) for weight in (by_rows, by_columns)]


@pytest.mark.parametrize(("x_laid", "weight_laid"), LAID)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_has_the_gradients_of_torch_in_its_order_in_memory(
    x_laid: Any, weight_laid: Any, transposed: bool
) -> None:
    x, weight = x_laid(6, 4), weight_laid(*((3, 4) if transposed else (4, 3)))
    y = aten.mm.default(x, weight.t() if transposed else weight)
    gradient = torch.randn(y.shape)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
    form = Product(0, 1, transposed=transposed)
    with torch.no_grad():
        found = form.of_input(gradient, x, weight, ()), *form.of_weights(gradient, x, weight, None, ())
    for own, theirs in zip(found, (of_x, of_weight), strict=True):
        assert torch.equal(own, theirs) and own.stride() == theirs.stride()


class _Read(TorchDispatchMode):
    """Keeps the rows that gradients of tables are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.embedding_dense_backward.default:
            self.rows += args[1].flatten().tolist()
        return func(*args, **(kwargs or {}))


def test_the_shard_of_a_table_adds_to_its_own_rows_alone() -> None:
    weight, indices = torch.randn(4, 3), torch.arange(10).reshape(2, 5)
    with _Read() as read:
        LookedInShard().of_weights(torch.randn(2, 5, 3), indices, weight, None, (None, None, 3, -1))
    assert set(read.rows) == {0, 1, 2, 3}  # a GPU would write beyond the table


def test_padding_on_both_sides_by_the_default_dilation() -> None:
    assert pads_evenly(torch.empty(2, 2, 3, 5), 1) and not pads_evenly(torch.empty(2, 2, 3, 4), 1)


class _Convolved(TorchDispatchMode):
    """Keeps what convolutions backward are told, but for the sizes of the bias and what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution_backward.default:
            self.told.append([v * 2 if isinstance(v, list) and len(v) == 1 else v for v in args[4:-1]])
        return func(*args, **(kwargs or {}))


TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
ANY = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
CONVOLUTIONS: list[Any] = [
    # operator, its form, what comes after the bias
    (aten.conv2d.default, Convolved(("stride", "padding", "dilation", "groups")), ([2, 1], [1, 0], [2, 1], 2)),
    (aten.conv2d.padding, Convolved(("stride", "padding", "dilation", "groups")), ([2, 1], "valid", [2, 1], 1)),
    (aten.conv2d.padding, Convolved(("stride", "padding", "dilation", "groups")), ([1, 1], "same", [2, 1], 1)),
    (aten.conv_transpose2d.input, Convolved(TRANSPOSED, transposed=True), ([2, 2], [1, 1], [1, 0], 1, [1, 2])),
    (aten.convolution.default, Convolved(ANY), ([2, 2], [1, 1], [1, 1], True, [1, 0], 1)),
    (aten.convolution.default, Convolved(ANY), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
]


@pytest.mark.parametrize(("op", "form", "after"), CONVOLUTIONS)
def test_a_convolution_backward_is_told_what_torch_tells_it(op: Any, form: Convolved, after: tuple[Any, ...]) -> None:
    groups = 2 if op is aten.conv2d.default else 1
    x, weight = torch.randn(2, 4, 7, 7).requires_grad_(), torch.randn(4, 4 // groups, 3, 3).requires_grad_()
    y = op(x, weight, None, *after)
    with _Convolved() as seen:
        of_x, of_weight = torch.autograd.grad(y.square().sum(), (x, weight))
        with torch.no_grad():
            found = form.of_weights(2 * y, x, weight, None, (None, None, None, *after))[0]
            back = form.of_input(2 * y, x, weight, (None, None, None, *after))
    assert seen.told[1:] == seen.told[:1] * 2
    assert torch.equal(found, of_weight) and torch.equal(back, of_x)
