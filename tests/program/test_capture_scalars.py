"""A size that goes through a scalar tensor stays a size: free, known, and no value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.program.test_functionalise import check_against_eager
from whalepy.program.capture import capture

POSITIONS, WIDTH = 12, 4


class Reading(nn.Module):
    """Embeds positions in a way that `chosen` computes from the size of the input."""

    def __init__(self, chosen: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(POSITIONS, WIDTH))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.chosen(self.table, x).sum()).pow(2).mean()


def length(x: Tensor) -> Any:
    return torch.tensor(x.size(1))


def around(table: Tensor, x: Tensor) -> Tensor:
    """The positions around the middle, as relative attention takes them."""
    span = torch.tensor(min(x.size(1), 5))
    return table[6 - span : span + 6, :]


def computed(table: Tensor, x: Tensor) -> Tensor:
    half = torch.minimum(length(x) * 2 - 1, torch.tensor(8)).clone() // 2
    return table[half.item() :: 2]


def counted(table: Tensor, x: Tensor) -> Tensor:
    return torch.arange(length(x)) * table.sum()


def narrowed(table: Tensor, x: Tensor) -> Tensor:
    return table.narrow(0, 1, length(x).long())


def divided(table: Tensor, x: Tensor) -> Tensor:
    """Parts of a size, as local attention takes them."""
    pairs: Any = torch.div(x.size(1) * 2, 2, rounding_mode="trunc")
    return x.view(x.size(0), pairs, WIDTH) * table[: torch.div(length(x), 2, rounding_mode="floor")].sum()


def written(table: Tensor, x: Tensor) -> Tensor:
    """A write through such a bound."""
    table = table.clone()
    table[: length(x)] *= 2
    return table


@pytest.mark.parametrize("chosen", [around, computed, counted, narrowed, divided, written])
def test_sizes_in_scalar_tensors_stay_free(chosen: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Reading(chosen)
    captured = capture(model, (torch.randn(6, 5, WIDTH),))
    assert all(size.is_Symbol for size in captured.inputs[0].shape[:2])
    for steps in (5, 3, 7):
        check_against_eager(model, captured, torch.randn(2, steps, WIDTH))


def ranged(table: Tensor, x: Tensor) -> Tensor:
    return sum((table[i] for i in range(length(x))), table[0])


def as_int(table: Tensor, x: Tensor) -> Tensor:
    return table[: int(length(x))]


@pytest.mark.parametrize("chosen", [ranged, as_int])
def test_an_int_of_it_fixes_the_size_as_without_a_tensor(chosen: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Reading(chosen)
    captured = capture(model, (torch.randn(6, 5, WIDTH),))
    assert captured.inputs[0].shape[1] == 5
    check_against_eager(model, captured, torch.randn(2, 5, WIDTH))


def overwritten(table: Tensor, x: Tensor) -> Tensor:
    """What was written since is not what was put in."""
    span = length(x)
    span.copy_(x.gt(0).sum())
    return table[:span]


def reduced(table: Tensor, x: Tensor) -> Tensor:
    """The largest of many values is none of a size."""
    return table[: x.argmax()]


@pytest.mark.parametrize("chosen", [overwritten, reduced])
def test_values_stay_values(chosen: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Reading(chosen)
    captured = capture(model, (torch.randn(6, 5, WIDTH),))
    check_against_eager(model, captured, torch.rand(2, 3, WIDTH) - 0.3)
    assert any(node.meta.get("unbacked_bindings") for node in captured.graph.graph.nodes)
