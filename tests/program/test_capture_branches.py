"""A branch of the model on a size of 0 or 1 is never taken for that of larger sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.program.capture import Captured, capture

WIDTH = 4


class Branching(nn.Module):
    """Does something else where `asks` says so."""

    def __init__(self, asks: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.asks = asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return (y * 3 if self.asks(x) else y.tanh()).pow(2).mean()


def one_step(x: torch.Tensor) -> Any:
    return x.shape[1] == 1


def several(x: torch.Tensor) -> Any:
    return x.shape[1] > 1


def longest(x: torch.Tensor) -> Any:
    return max(2, x.shape[1]) == x.shape[1]


def one_row(x: torch.Tensor) -> Any:
    return x.shape[0] == 1


def captured(asks: Callable[[torch.Tensor], Any]) -> Captured:
    return capture(Branching(asks), (torch.randn(6, 5, WIDTH),))


# what is asked, a shape that takes the captured branch, one that takes the other
ASKED = [
    (one_step, (6, 2, WIDTH), (6, 1, WIDTH)),
    (several, (1, 2, WIDTH), (6, 1, WIDTH)),
    (longest, (6, 2, WIDTH), (6, 1, WIDTH)),
    (one_row, (2, 1, WIDTH), (1, 5, WIDTH)),
]


@pytest.mark.parametrize(("asks", "same", "other"), ASKED)
def test_a_branch_is_a_condition(asks: Any, same: tuple[int, ...], other: tuple[int, ...]) -> None:
    program = captured(asks)
    assert not program.branches_otherwise(program.bind([same]))
    assert program.check_sizes(program.bind([same])) is None
    assert program.branches_otherwise(program.bind([other]))
    told = program.check_sizes(program.bind([other]))
    assert told is not None and "test_capture_branches.py:" in told


def test_a_model_that_asks_nothing_takes_every_size() -> None:
    program = captured(lambda x: False)
    assert not program.branches_otherwise(program.bind([(1, 1, WIDTH)]))
    assert program.check_sizes(program.bind([(1, 1, WIDTH)])) is None


def made(asks: Callable[[torch.Tensor], Any]) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return Branching(asks), [{"x": torch.randn(6, length, WIDTH)} for length in (5, 1, 3, 1)]


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=[3, 1])}


@pytest.mark.parametrize("asks", [one_step, several])
def test_steps_of_length_one_take_their_own_branch(workers: Pool, asks: Callable[[torch.Tensor], Any]) -> None:
    compare(workers, Run(partial(made, asks), uneven, 2, steps=4))
