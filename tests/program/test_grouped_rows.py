"""Mixtures of experts: rows that are sorted by expert and put back are computed in their own order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers the product
from torch import Tensor

from tests.program.test_canonicalise import canonical, names
from whalepy.program.functional_ops import grouped_linear

EXPERTS = 4
FIRST, BIAS = torch.randn(EXPERTS, 8, 10, dtype=torch.float64), torch.randn(EXPERTS, 10, dtype=torch.float64)
SECOND = torch.randn(EXPERTS, 5, 3, dtype=torch.float64)
WEIGHTS = torch.rand(12, dtype=torch.float64)
CHOSEN = torch.tensor([[3, 0], [1, 3], [3, 2], [0, 1], [0, 3], [1, 0]])  # of two experts, one has a single row
product = torch.ops.transformers.grouped_mm_fallback

Between = Callable[[Tensor], Tensor]


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def inverted(order: Tensor) -> Tensor:
    places = torch.empty_like(order)
    places[order] = torch.arange(order.size(0))
    return places


def experts(
    x: Tensor,
    chosen: Tensor,
    *,
    between: Between = gated,
    back: Between = inverted,
    bins: int = EXPERTS,
    descending: bool = False,
    take: Callable[[Tensor, Tensor], Tensor] = lambda x, order: x[order // 2],
) -> Tensor:
    """Rows f[rows, 8] by the matrices of their experts, i64[rows, 2], weighted and summed: f[rows, 3]."""
    flat = chosen.reshape(-1)
    ids, order = torch.sort(flat, descending=descending)
    ends = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1).cumsum(0, dtype=torch.int32)
    y = product(take(x, order), FIRST, ends) + BIAS[ids]
    y = product(between(y), SECOND, ends) * WEIGHTS[order].unsqueeze(-1)
    return y[back(order)].view(-1, 2, 3).sum(1)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda w: (function(w, CHOSEN) * torch.linspace(-1, 1, 18).view(6, 3)).sum()


ROW_BY_ROW: dict[str, Callable[..., Tensor]] = {
    "gated": experts,
    "put back by a second sort": partial(experts, back=lambda order: order.argsort()),
    "normalised": partial(experts, between=lambda y: torch.nn.functional.layer_norm(gated(y), (5,))),
    "softmax of a row": partial(experts, between=lambda y: gated(y).softmax(-1)),
    "reshaped": partial(experts, between=lambda y: y.view(-1, 2, 5).transpose(1, 2).sum(-1)),
}


@pytest.mark.parametrize("function", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
def test_rows_keep_their_order(function: Callable[..., Tensor]) -> None:
    module, found, expected = canonical(loss_of(function))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    left = names(module)
    assert left.count("whalepy.program.functional_ops.grouped_linear") == 2
    assert not {"aten.sort", "aten.histc", "aten.index_put", "aten.argsort"} & set(left)


MIXED: dict[str, Callable[..., Tensor]] = {
    "summed up along the order": partial(experts, between=lambda y: gated(y).cumsum(0)),
    "flipped": partial(experts, between=lambda y: gated(y).flip(0)),
    "softmax over rows": partial(experts, between=lambda y: gated(y).softmax(0)),
    "a number for each place": partial(experts, between=lambda y: gated(y) * torch.arange(12.0).unsqueeze(1)),
    "products of rows": partial(experts, between=lambda y: (gated(y) @ gated(y).T) @ gated(y)),
    "a mean over rows": partial(experts, between=lambda y: gated(y) - gated(y).mean(0)),
    "not put back": partial(experts, back=lambda order: order),
    "put back elsewhere": partial(experts, back=lambda order: inverted(order).flip(0)),
    "other rows": partial(experts, take=lambda x, order: x[order % 6]),
    "of half the rows": partial(experts, take=lambda x, order: x[order // 4]),
    "the largest first": partial(experts, descending=True),
    "rolled": partial(experts, between=lambda y: gated(y).roll(1, 0)),
}


@pytest.mark.parametrize("function", MIXED.values(), ids=MIXED)
def test_what_may_depend_on_the_order_stays(function: Callable[..., Tensor]) -> None:
    module, found, expected = canonical(loss_of(function))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    left = names(module)
    assert "whalepy.program.functional_ops.grouped_linear" not in left and "aten.sort" in left


def test_ends_of_other_groups_stay() -> None:
    """How many rows each matrix gets does not come from the sort."""

    def fixed(x: Tensor, chosen: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.reshape(-1))
        y = product(x[order // 2], FIRST[..., :3], torch.tensor([2, 6, 7, 12], dtype=torch.int32))
        return (y * ids.unsqueeze(-1))[inverted(order)].view(-1, 2, 3).sum(1)

    module, found, expected = canonical(loss_of(fixed))
    torch.testing.assert_close(found, expected)
    assert "aten.sort" in names(module)


@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (12, 16), (16, 12), (5, 3)])
def test_shards_of_any_width(inner: int, outer: int) -> None:
    """The product of half precision wants rows that start at multiples of 16 bytes; shards do as shares have it."""
    rows = torch.randn(12, inner, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(EXPERTS, inner, outer, dtype=torch.bfloat16, requires_grad=True)
    groups = CHOSEN.reshape(-1)
    made = grouped_linear(rows, weight, groups, "aten._grouped_mm")
    wanted = torch.bmm(rows.unsqueeze(1), weight[groups]).squeeze(1)
    gradients = [torch.autograd.grad(y.float().square().sum(), (rows, weight)) for y in (made, wanted)]
    torch.testing.assert_close((made, *gradients[0]), (wanted, *gradients[1]), rtol=0.05, atol=0.5)


def test_no_rows_at_all() -> None:
    rows = torch.randn(0, 8, dtype=torch.float64, requires_grad=True)
    weight = FIRST.clone().requires_grad_()
    made = grouped_linear(rows, weight, torch.empty(0, dtype=torch.int64), "transformers.grouped_mm_fallback")
    assert made.shape == (0, 10)
    made.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
